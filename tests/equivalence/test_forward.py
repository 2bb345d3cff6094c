"""Shared prompts and the chunked head against the model's own forward on each sequence alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from align import fused, logps
from align.assemble import BLOCK
from align.checks import choose_path
from align.forward import bind, causal_lm, dense, router_weight
from align.model import dense_attention
from align.segments import NAME, segments_of
from data.pack import pack
from tests.align.tiny import CONFIGS, float64_throughout, mamba, model_of, random_table

FLOAT64_REORDERED = {"rtol": 1e-9, "atol": 1e-9}  # sums in another order
every_architecture = pytest.mark.parametrize("name", CONFIGS)
LEGS = ("chosen", "rejected", "gold")


def plainly(model, table, rows):
    """Every (row, leg) by itself through the model's own forward: summed weighted log-probs, and the router's loss.

    Nothing is fused.
    """
    total, values = 0.0, {}
    for leg in LEGS:
        for row in rows:
            ids = torch.from_numpy(np.concatenate([table.prompts[row], table.legs[leg][row]])).long()[None]
            start = len(table.prompts[row])
            options = {"output_router_logits": True} if router_weight(model.config) else {}
            with fused.plain():
                output = model(input_ids=ids, use_cache=False, **options)
            scored = torch.log_softmax(output.logits[0, start - 1 : -1], -1).gather(-1, ids[0, start:, None])[:, 0]
            values[leg, row] = scored
            total = total + (scored * token_weights(len(scored))).sum()
            if options:
                total = total + output.aux_loss
    return total, values


def token_weights(n):
    return torch.linspace(-1.0, 2.0, n, dtype=torch.float64)


def packed(model, table, rows, *, share, kind="bucket"):
    batch = pack(table, rows, share=share, kind=kind, counts={})
    scores = model(packed=batch)
    total, values = scores.get("router", 0.0), {}
    for leg in LEGS:
        matrix = dense(scores["logps"], batch, leg)
        for i, row in enumerate(rows):
            values[leg, row] = matrix[i, : len(table.legs[leg][row])]
            total = total + (values[leg, row] * token_weights(len(values[leg, row]))).sum()
    return total, values


def gradients(model, total):
    model.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@every_architecture
@pytest.mark.parametrize("layout", ["bucket", "pack", "segments", "separate"])
def test_values_and_gradients_equal_the_models_own_forward(name, layout, monkeypatch):
    """Three legs, three rows, prompts computed once; the head in chunks of seven tokens. Router loss included."""
    monkeypatch.setattr(logps, "LOGITS_PER_CHUNK", 7 * 96)
    table = random_table(LEGS)
    rows = [2, 0, 1]
    with float64_throughout():
        model = model_of(CONFIGS[name]())
        wanted, wanted_values = plainly(model, table, rows)
        wanted_gradients = gradients(model, wanted)
        kind = {"separate": "bucket", "segments": "pack"}.get(layout, layout)
        if layout == "segments":
            if dense_attention(model.config) != "sdpa":
                pytest.skip("scores are capped, which fused attention does not know")
            model.set_attn_implementation(NAME)
        total, values = packed(model, table, rows, share=layout != "separate", kind=kind)
        found_gradients = gradients(model, total)
    for key, value in wanted_values.items():
        torch.testing.assert_close(values[key], value, **FLOAT64_REORDERED)
    assert found_gradients.keys() == wanted_gradients.keys()
    for key, gradient in wanted_gradients.items():
        torch.testing.assert_close(
            found_gradients[key], gradient, **FLOAT64_REORDERED, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("name", ["mistral-window", "gemma2-window-softcaps"])
def test_a_window_or_softcap_matters_here(name):
    """The models above would be no test if what they are named for changed nothing."""
    table, rows = random_table(LEGS), [0, 1, 2]
    with float64_throughout():
        model = model_of(CONFIGS[name]())
        before, _ = packed(model, table, rows, share=True)
        model.config.sliding_window = 100
        after, _ = packed(model, table, rows, share=True)
    assert abs(float((before - after).detach())) > 1e-3


def test_segments_by_hand():
    """Two rows of three legs in a line: each prompt sees itself, each response its prompt; then padding, which none."""
    table = random_table(LEGS)
    batch = pack(table, [1, 0], share=True, kind="pack", counts={})
    found = segments_of(batch, window=7)[0, 0].tolist()
    at, wanted = 0, []
    for row in (1, 0):
        prompt = (at, at + len(table.prompts[row]))
        wanted.append([*prompt, at, at, 7])
        at = prompt[1]
        for leg in LEGS:
            wanted.append([at, at + len(table.legs[leg][row]), *prompt, 7])
            at = wanted[-1][1]
    assert found == wanted
    assert at == batch.input_ids.shape[1]


def test_segments_know_no_capped_scores():
    model = model_of(CONFIGS["gemma2-window-softcaps"](), torch.float32)
    model.set_attn_implementation(NAME)
    with pytest.raises(ValueError, match="segments know no softcap"):
        packed(model, random_table(LEGS), [0, 1], share=True, kind="pack")


def test_where_segments_are_not_asked_for_it_is_the_models_own_attention():
    """Plain forwards with padding on the left, and generation."""
    model = model_of(CONFIGS["qwen3"](), torch.float32)
    ids, mask = torch.tensor([[1, 5, 9], [0, 0, 4]]), torch.tensor([[1, 1, 1], [0, 0, 1]])
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask).logits
        written = model.generate(ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        model.set_attn_implementation(NAME)
        found = model(input_ids=ids, attention_mask=mask).logits
        again = model.generate(ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], rtol=0, atol=0)
    assert torch.equal(written, again)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "use_rslora": True},
        {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["all-linear", "rslora", "dora", "lora-on-head", "head-in-full"],
)
def test_adapters_take_the_effective_head(settings):
    table, rows = random_table(LEGS), [0, 2]
    with float64_throughout():
        model = get_peft_model(
            causal_lm(model_of(CONFIGS["llama"]())), LoraConfig(r=4, task_type="CAUSAL_LM", **settings)
        )
        model.to(torch.float64)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key or "modules_to_save" in key:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        bind(model)
        wanted, _ = plainly(model, table, rows)
        wanted_gradients = gradients(model, wanted)
        total, _ = packed(model, table, rows, share=True)
        found_gradients = gradients(model, total)
        torch.testing.assert_close(total, wanted, **FLOAT64_REORDERED)
        assert found_gradients.keys() == wanted_gradients.keys()
        for key, gradient in wanted_gradients.items():
            torch.testing.assert_close(found_gradients[key], gradient, **FLOAT64_REORDERED)
        with model.disable_adapter():
            off, _ = packed(model, table, rows, share=True)
            plain, _ = plainly(model, table, rows)
        torch.testing.assert_close(off, plain, **FLOAT64_REORDERED)
        assert abs(float((off - total).detach())) > 1e-3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, while it traces its own code
@pytest.mark.parametrize("kind", ["bucket", "pack"])
def test_flex_attention_masks_say_the_same_as_dense_ones(kind):
    """FlexAttention has no backward on CPU; its forward runs here uncompiled, with the block mask that GPUs use."""
    table, rows = random_table(LEGS, seed=3), [0, 1, 2]
    for name in ("llama", "mistral-window"):
        model = model_of(CONFIGS[name](), torch.float32)
        batch = pack(table, rows, share=True, kind=kind, counts={})
        with torch.no_grad():
            dense_masks = model(packed=batch)["logps"]
            model.set_attn_implementation("flex_attention")
            block_masks = model(packed=batch)["logps"]
        torch.testing.assert_close(block_masks, dense_masks, rtol=1e-4, atol=1e-4)  # float32, another kernel


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, while it traces its own code
def test_flex_attention_is_compiled_for_two_lengths_and_then_for_all(monkeypatch):
    """Once for the first length, once for any; every microbatch has another. What is compiled can be seen on a CPU."""
    from torch._dynamo.utils import counters
    from transformers.integrations.flex_attention import WrappedFlexAttention

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_(function, backend="eager"))
    monkeypatch.setattr(WrappedFlexAttention, "_instance", None)
    torch._dynamo.reset()
    table, model = random_table(LEGS, rows=40, seed=3), model_of(CONFIGS["llama"](), torch.float32)
    widths, graphs = [], []
    for rows in (3, 9, 20, 14, 30, 40):
        batch = pack(table, range(rows), share=True, kind="pack", counts={}, multiple=BLOCK)
        counters.clear()
        with torch.no_grad():
            model.set_attn_implementation("sdpa")
            dense_masks = model(packed=batch)["logps"]
            model.set_attn_implementation("flex_attention")
            block_masks = model(packed=batch)["logps"]
        torch.testing.assert_close(block_masks, dense_masks, rtol=1e-4, atol=1e-4)
        widths.append(batch.input_ids.shape[1])
        graphs.append(counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert len(set(widths)) == 6
    assert graphs[0] > 0
    assert graphs[2:] == [0, 0, 0, 0]


def test_start_up_chooses_shared_prompts_where_they_are_exact():
    share, check = choose_path(
        model_of(CONFIGS["llama"](), torch.float32), random_table(), torch.float32, torch.device("cpu")
    )
    assert share
    assert check.passed


@pytest.mark.filterwarnings("ignore:.*fast path is not available.*")
def test_mamba_takes_the_plain_path_and_says_so():
    model = model_of(mamba(), torch.float32)
    share, check = choose_path(model, random_table(), torch.float32, torch.device("cpu"))
    assert not share
    assert "own forward" in check.detail


def test_start_up_distrusts_a_model_whose_responses_see_each_other(monkeypatch):
    """A mask that lets the second response read the first is what prefix sharing gets wrong most easily."""
    from align import masks

    original = masks.attention_mask

    def leaky(batch, window=None):
        n = batch.row_ids.shape[1]
        causal = torch.ones(n, n, dtype=torch.bool).tril()
        return original(batch, window) | causal

    monkeypatch.setitem(masks.MAKERS, "sdpa", leaky)
    model = model_of(CONFIGS["llama"](), torch.float32)
    share, check = choose_path(model, random_table(), torch.float32, torch.device("cpu"))
    assert not share
    assert "differ" in check.detail


def test_gradient_checkpointing_changes_nothing():
    table, rows = random_table(LEGS), [0, 1]
    with float64_throughout():
        model = model_of(CONFIGS["llama"]()).train()
        wanted = gradients(model, packed(model, table, rows, share=True)[0])
        model.activation_checkpointing_enable({"use_reentrant": False})
        found = gradients(model, packed(model, table, rows, share=True)[0])
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, **FLOAT64_REORDERED)


def test_what_is_not_scoring_is_untouched():
    """Generation and plain forwards of a bound model are the model's own."""
    model = model_of(CONFIGS["llama"](), torch.float32)
    ids = torch.tensor([[1, 5, 9]])
    assert model(input_ids=ids).logits.shape == (1, 3, 96)
    assert model.generate(ids, max_new_tokens=2, do_sample=False, min_new_tokens=2).shape == (1, 5)
