"""What the chunked head gives besides log-probs, against the whole distributions of the model's own forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from align import logps
from align.forward import bind, causal_lm, dense
from align.head import HeadTransform
from align.logps import HeadExtras
from data.loader import number_counts
from data.number_tokens import number_values
from data.pack import PackedBatch, pack
from data.store import TokenTable
from data.worlds import POLICY
from objectives import EXTRAS, Leg, LegBatch
from tests.align.tiny import CONFIGS, VOCABULARY, float64_throughout, mamba, model_of, random_table

FLOAT64_REORDERED = {"rtol": 1e-9, "atol": 1e-9, "equal_nan": True}  # sums in another order
LEGS = ("chosen", "rejected", "gold")
LAYOUTS = {"bucket": (True, "bucket"), "pack": (True, "pack"), "separate": (False, "bucket")}
CHUNKS = {"one": 1, "three": 3, "all": 10_000}
NAMES = ("log_sum_p2", "ref_kl", "number_value", "number_mean", "number_distance")
WITH_GRADIENT = ("logps", "ref_kl", "number_mean", "number_distance")
TRANSFORMED = ["gemma2-window-softcaps", "cohere-scaled-head", "granite-scaled-head"]
every_architecture = pytest.mark.parametrize("name", CONFIGS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def made_up_numbers() -> Tensor:
    """Values that are no digits: some negative, some fractions, several tokens of one value."""
    values = torch.full((VOCABULARY,), torch.nan, dtype=torch.float64)
    values[5:65:2] = torch.tensor([0.0, 1, 2, 3, 7, 7, 100, -3, 0.5, 12] * 3, dtype=torch.float64)
    return values


def peaked(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model whose distributions are far from uniform, and so from those of another seed."""
    config = CONFIGS[name]()
    if getattr(config, "final_logit_softcapping", None):
        config.final_logit_softcapping = 5.0
    model = model_of(config, dtype, seed)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(3, 60)[None]).logits
        model.get_output_embeddings().weight.mul_(3.0 / logits.std())
    return model


def table_with_numbers(rows: int = 3) -> TokenTable:
    """Of random tokens a third are numbers; a response has none."""
    table = random_table(LEGS, rows=rows)
    found = number_counts(table, made_up_numbers().numpy())
    assert any(0 in counts for counts in found.values())
    assert sum(counts.sum() for counts in found.values()) > 5
    return table


# ---- plainly: every response alone, and all of its logits ----


def whole_logits(model: nn.Module, table: TokenTable, leg: str, row: int) -> tuple[Tensor, Tensor]:
    """Logits that predict each response token, and these tokens."""
    ids = torch.from_numpy(np.concatenate([table.prompts[row], table.legs[leg][row]])).long()
    start = len(table.prompts[row])
    return model(input_ids=ids[None], use_cache=False).logits[0, start - 1 : -1], ids[start:]


def plainly(model: nn.Module, reference: nn.Module, table: TokenTable, rows: Sequence[int]) -> dict[str, Tensor]:
    """Log-probs and extras of every response token, leg by leg, row by row, as their definitions have it."""
    numbers = made_up_numbers()
    ids = numbers.isfinite().nonzero()[:, 0]
    found: dict[str, list[Tensor]] = {name: [] for name in ("logps", *NAMES)}
    for leg in table.legs:
        for row in rows:
            logits, targets = whole_logits(model, table, leg, row)
            with torch.no_grad():
                ref = torch.softmax(whole_logits(reference, table, leg, row)[0], -1)
            p = torch.softmax(logits, -1)
            among = p[:, ids] / p[:, ids].sum(-1, keepdim=True)
            found["logps"].append(p.log().gather(-1, targets[:, None])[:, 0])
            found["log_sum_p2"].append((p.detach() ** 2).sum(-1).log())
            found["ref_kl"].append((ref * (ref.log() - p.log())).sum(-1))
            found["number_value"].append(numbers[targets])
            found["number_mean"].append((among * numbers[ids]).sum(-1))
            apart = (numbers[ids] - numbers[targets].nan_to_num()[:, None]).abs()
            found["number_distance"].append((among * apart).sum(-1))
    return {name: torch.cat(parts) for name, parts in found.items()}


# ---- as runs do it ----


def head_of(reference: nn.Module, batch: PackedBatch) -> Any:
    """The head of a model that scored the batch, without gradient, as a frozen reference is asked for it."""
    with torch.no_grad():
        return reference(packed=batch, keep_head=True)["head"]


def scored(
    model: nn.Module, reference: nn.Module | None, batch: PackedBatch, names: Sequence[str] = NAMES
) -> dict[str, Tensor]:
    """Log-probs and extras, through the chunked head."""
    head = None if reference is None else head_of(reference, batch)
    extras = HeadExtras(names=tuple(names), numbers=made_up_numbers(), reference=head)
    found = model(packed=batch, extras=extras)
    return {name: found[name] for name in ("logps", *names)}


def weighted(found: dict[str, Tensor]) -> Tensor:
    """One number whose gradient tells tokens and extras apart."""
    total = torch.zeros((), dtype=torch.float64)
    for number, name in enumerate(WITH_GRADIENT, start=1):
        n = len(found[name])
        total = total + (found[name] * torch.linspace(-1.0, 1.0 + number, n, dtype=torch.float64)).sum() / number
    return total


def gradients(model: nn.Module, total: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def laid_out(table: TokenTable, rows: Sequence[int], layout: str) -> PackedBatch:
    share, kind = LAYOUTS[layout]
    return pack(table, rows, share=share, kind=kind, counts={})


@contextmanager
def chunks_of(positions: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logps, "LOGITS_PER_CHUNK", positions * VOCABULARY)
        yield


@pytest.mark.slow
@every_architecture
def test_values_and_gradients_equal_those_of_whole_logits(name: str) -> None:
    """In every layout and with chunks of one, three and all positions."""
    table, rows = table_with_numbers(), [2, 0, 1]
    with float64_throughout():
        model, reference = peaked(name), peaked(name, seed=1)
        wanted = plainly(model, reference, table, rows)
        assert float(wanted["ref_kl"].detach().max()) > 0.1, "two models that are alike would be no test"
        wanted_gradients = gradients(model, weighted(wanted))
        for layout in LAYOUTS:
            for positions in CHUNKS.values():
                with chunks_of(positions):
                    found = scored(model, reference, laid_out(table, rows, layout))
                    found_gradients = gradients(model, weighted(found))
                where = f"{layout}, {positions}"
                for key, value in wanted.items():
                    torch.testing.assert_close(
                        found[key], value, **FLOAT64_REORDERED, msg=lambda m, k=key, w=where: f"{w}: {k}: {m}"
                    )
                assert found_gradients.keys() == wanted_gradients.keys()
                for key, gradient in wanted_gradients.items():
                    torch.testing.assert_close(
                        found_gradients[key],
                        gradient,
                        **FLOAT64_REORDERED,
                        msg=lambda m, k=key, w=where: f"{w}: gradient of {k}: {m}",
                    )
    assert all(parameter.grad is None for parameter in reference.parameters())


@pytest.mark.filterwarnings("ignore:.*fast path is not available.*")
def test_a_model_without_shared_prompts_gives_them_too() -> None:
    table, rows = table_with_numbers(), [1, 2]
    with float64_throughout():
        model, reference = model_of(mamba()), model_of(mamba(), seed=1)
        wanted = plainly(model, reference, table, rows)
        wanted_gradients = gradients(model, weighted(wanted))
        with chunks_of(3):
            found = scored(model, reference, laid_out(table, rows, "separate"))
            found_gradients = gradients(model, weighted(found))
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, **FLOAT64_REORDERED)
    for key, gradient in wanted_gradients.items():
        torch.testing.assert_close(found_gradients[key], gradient, **FLOAT64_REORDERED)


@pytest.mark.parametrize("name", TRANSFORMED)
def test_a_cap_or_a_scale_matters_here(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The models above would be no test if what they are named for changed nothing, of policy or of reference."""
    table, rows = table_with_numbers(), [0, 1, 2]
    with float64_throughout(), torch.no_grad():
        model, reference = peaked(name), peaked(name, seed=1)
        batch = laid_out(table, rows, "bucket")
        before = scored(model, reference, batch)
        original, plain = HeadTransform.of, [model.config]
        monkeypatch.setattr(
            HeadTransform, "of", lambda config: HeadTransform() if config is plain[0] else original(config)
        )
        without = scored(model, reference, batch)
        for key in ("logps", "log_sum_p2", "ref_kl", "number_mean", "number_distance"):
            assert float((without[key] - before[key]).abs().max()) > 0.01, key
        plain[0] = reference.config
        assert float((scored(model, reference, batch)["ref_kl"] - before["ref_kl"]).abs().max()) > 0.01


@every_layout
def test_what_is_no_function_of_the_weights_has_no_gradient(layout: str) -> None:
    """log Σ p² is one, but is declared without: it only weighs rows."""
    model = model_of(CONFIGS["llama"](), torch.float32)
    found = scored(model, model, laid_out(table_with_numbers(), [0, 1], layout))
    assert {name for name, values in found.items() if values.requires_grad} == set(WITH_GRADIENT)


@pytest.mark.slow
@every_architecture
@every_layout
def test_a_policy_that_is_its_own_reference_has_no_divergence_and_no_slope(name: str, layout: str) -> None:
    """KL is at its minimum there, which it is only if both are of the same distributions, chunk by chunk."""
    with float64_throughout(), chunks_of(3):
        model = peaked(name)
        found = scored(model, model, laid_out(table_with_numbers(), [2, 1, 0], layout), ["ref_kl"])
        slopes = gradients(model, found["ref_kl"].sum())
    assert float(found["ref_kl"].detach().abs().max()) < 1e-12
    assert len(slopes) > 5
    assert max(float(slope.abs().max()) for slope in slopes.values()) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"target_modules": "all-linear"}, {"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}],
    ids=["all-linear", "lora-on-head", "head-in-full"],
)
def test_a_reference_may_be_the_policy_without_its_adapter(settings: dict[str, Any]) -> None:
    """Chunks are computed again in the backward pass, when the adapter is on: its head must be as it was."""
    table, rows = table_with_numbers(), [0, 2]
    settings = {"target_modules": ["q_proj"], **settings}
    with float64_throughout():
        plain = model_of(CONFIGS["llama"]())
        model: Any = get_peft_model(
            causal_lm(model_of(CONFIGS["llama"]())), LoraConfig(r=4, task_type="CAUSAL_LM", **settings)
        )
        model.to(torch.float64)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key or "modules_to_save" in key:
                    parameter.add_(0.5 * torch.randn_like(parameter))
        bind(model)
        wanted = plainly(model, plain, table, rows)
        wanted_gradients = gradients(model, weighted(wanted))
        batch = laid_out(table, rows, "bucket")
        with chunks_of(3):
            with model.disable_adapter():
                head = head_of(model, batch)
            extras = HeadExtras(names=NAMES, numbers=made_up_numbers(), reference=head)
            found = model(packed=batch, extras=extras)
            found_gradients = gradients(model, weighted(found))
    assert float(wanted["ref_kl"].detach().max()) > 0.1
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, **FLOAT64_REORDERED)
    assert found_gradients.keys() == wanted_gradients.keys()
    for key, gradient in wanted_gradients.items():
        torch.testing.assert_close(found_gradients[key], gradient, **FLOAT64_REORDERED)


@every_layout
def test_names_come_in_any_order_and_number(layout: str) -> None:
    """An objective that declares one extra gets that one, as it is beside the others, to float32's last digits."""
    model, reference = (peaked("llama", seed, torch.float32) for seed in (0, 1))
    batch = laid_out(table_with_numbers(), [0, 1], layout)
    with torch.no_grad():
        every = scored(model, reference, batch)
        assert set(every) == {"logps", *EXTRAS}
        for names in ([], *[[name] for name in NAMES], NAMES[::-1]):
            found = scored(model, reference if "ref_kl" in names else None, batch, names)
            assert list(found) == ["logps", *names]
            for name, values in found.items():
                torch.testing.assert_close(values, every[name], rtol=1e-6, atol=2e-6, equal_nan=True)


# ---- legs ----


@every_layout
def test_legs_hold_them_at_their_tokens(layout: str) -> None:
    """Dense matrices have each token's own number, 0 beyond; number tokens are counted as the plan counts them."""
    table, rows = table_with_numbers(rows=5), [4, 0, 2]
    model, reference = (peaked("llama", seed, torch.float32) for seed in (0, 1))
    batch = laid_out(table, rows, layout)
    with torch.no_grad():
        found = scored(model, reference, batch)
        wanted = plainly(model, reference, table, rows)
    legs, at = {}, 0
    for name, place in batch.legs.items():
        extras = {extra: dense(found[extra], batch, name) for extra in NAMES}
        legs[name] = Leg(logps=dense(found["logps"], batch, name), mask=place.mask, tokens=place.tokens, extras=extras)
        for i, row in enumerate(rows):
            n = len(table.legs[name][row])
            for extra, matrix in extras.items():
                alone = wanted[extra][at : at + n].float()
                torch.testing.assert_close(matrix[i, :n].float(), alone, rtol=1e-4, atol=1e-5, equal_nan=True)
                assert not matrix[i, n:].any()
            at += n
    counts = LegBatch(legs=legs).counts()
    for name, numbers in number_counts(table, made_up_numbers().numpy()).items():
        assert counts[f"{name}.number"] == numbers[rows].sum()


@pytest.mark.slow
@every_layout
@pytest.mark.parametrize("name", ["llama", "gemma2-window-softcaps", "qwen3-experts"])
def test_a_dummy_batch_has_no_rows_and_reaches_every_parameter(name: str, layout: str) -> None:
    """A rank without rows takes part in the backward pass, with a gradient of nothing."""
    table = table_with_numbers()
    with float64_throughout():
        model, reference = peaked(name), peaked(name, seed=1)
        batch, full = laid_out(table, [], layout), laid_out(table, [0, 1, 2], layout)
        found = scored(model, reference, batch)
        for extra in ("logps", *NAMES):
            assert all(dense(found[extra], batch, leg).shape[0] == 0 for leg in LEGS)
        total = 0.0 * found["logps"].sum()
        for extra in WITH_GRADIENT:
            assert found[extra].isfinite().all()
            total = total + sum(dense(found[extra], batch, leg).sum() for leg in LEGS)
        slopes = gradients(model, total)
        reached = gradients(model, weighted(scored(model, reference, full)))
    assert float(total.detach()) == 0
    assert slopes.keys() == reached.keys()
    assert not any(slope.any() for slope in slopes.values())


# ---- memory ----


class Widest(TorchDispatchMode):
    """Most rows of logits in any one tensor, whatever makes it, the backward pass included."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.rows = max([self.rows, *(logits_in(value) for value in tree_leaves(out))])
        return out


def logits_in(value: Any) -> int:
    """Rows of a tensor that is as wide as the vocabulary, and is not the head's weight seen from the other side."""
    if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[-1] != WIDE or value.shape == (HIDDEN, WIDE):
        return 0
    return value.numel() // WIDE


@contextmanager
def kept_for_backward() -> Iterator[list[int]]:
    """Rows of logits in each tensor that is kept for the backward pass."""
    sizes: list[int] = []

    def keep(value: Tensor) -> Tensor:
        sizes.append(logits_in(value))
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        yield sizes


WIDE, HIDDEN = 997, 32
"""Of the vocabulary, as wide as nothing else, and of the states."""


def wide(name: str, seed: int = 0) -> nn.Module:
    config = CONFIGS[name]()
    config.vocab_size = WIDE
    return model_of(config, torch.float32, seed=seed)


def widths(name: str, positions: int | None) -> tuple[int, int, int]:
    """Most rows of logits in a tensor, most in one that is kept for the backward pass, response tokens of the batch."""
    model, reference = wide(name), wide(name, seed=1)
    batch = laid_out(table_with_numbers(), [0, 1, 2], "bucket")
    numbers = torch.cat([made_up_numbers(), torch.full((WIDE - VOCABULARY,), torch.nan, dtype=torch.float64)])
    with pytest.MonkeyPatch.context() as patch, Widest() as widest:
        if positions is not None:
            patch.setattr(logps, "LOGITS_PER_CHUNK", positions * WIDE)
        extras = HeadExtras(names=NAMES, numbers=numbers, reference=head_of(reference, batch))
        with kept_for_backward() as kept:
            total = weighted(model(packed=batch, extras=extras))
        total.backward()
    return widest.rows, max(kept), len(batch.target)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2-window-softcaps", "cohere-scaled-head"])
def test_logits_of_more_than_a_chunk_are_never_there(name: str) -> None:
    """Neither the policy's nor the reference's, in no pass; and those of a chunk are not kept until the backward."""
    for positions in (1, 4):
        rows, kept, responses = widths(name, positions)
        assert rows == positions < responses
        assert kept == 0


@pytest.mark.slow
def test_the_watch_sees_whole_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above would be none if it could not see them: in one chunk, and where chunks are not computed again."""
    rows, kept, responses = widths("llama", None)
    assert rows == responses
    assert kept == 0

    def plain_call(score: Any, *inputs: Any, **options: Any) -> Any:
        return score(*inputs)

    monkeypatch.setattr(logps, "checkpoint", plain_call)
    rows, kept, _ = widths("llama", 4)
    assert rows == 4
    assert kept == 4


# ---- number tokens ----


def assert_values_are_the_tokens_texts(tokenizer: Any, values: np.ndarray) -> None:
    """Number tokens decode to their digits; no other token's text is one of digits alone."""
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token]).strip()
        is_number = text.isascii() and text.isdigit() and token not in tokenizer.all_special_ids
        assert np.isfinite(values[token]) == is_number, (token, text)
        assert not is_number or values[token] == int(text)


def numbers_in(tokenizer: Any, values: np.ndarray, text: str) -> list[float]:
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
    return [float(value) for value in values[ids] if np.isfinite(value)]


def test_number_tokens_of_the_policy_that_comes_with_us() -> None:
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    values = number_values(tokenizer, AutoConfig.from_pretrained(POLICY).vocab_size)
    assert sorted(values[np.isfinite(values)]) == list(range(10))
    assert_values_are_the_tokens_texts(tokenizer, values)
    assert numbers_in(tokenizer, values, "What is 12 + 305? -7, 4.5 or x²") == [1, 2, 3, 0, 5, 7, 4, 5]


def test_number_tokens_of_a_sentencepiece_tokenizer(shared: Path) -> None:
    """Its bytes are written <0x31>, and are no numbers."""
    folder = shared / "models" / "stories260k"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    values = number_values(tokenizer, AutoConfig.from_pretrained(folder).vocab_size)
    assert sorted(values[np.isfinite(values)]) == list(range(10))
    assert np.isnan(values[tokenizer.convert_tokens_to_ids("<0x31>")])
    assert numbers_in(tokenizer, values, "I am 12, he is 305.") == [1, 2, 3, 0, 5]


def test_what_is_a_number_token() -> None:
    """Blanks before it count for nothing, signs, points and other scripts' digits make it none, and so does a task."""
    texts = {
        **dict(zip(["7", "▁12", "Ġ305", " 4", "007", "▁▁8", "9" * 15], [7, 12, 305, 4, 7, 8, 10**15 - 1], strict=True)),
        **dict.fromkeys(["-3", "1.5", "1,000", "12a", "²", "٣", "３", "▁", "Ġ", "", "1e3", "<0x31>", "5▁", "9" * 16]),
    }
    vocabulary = {text: number for number, text in enumerate(texts)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="▁"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"eos_token": "0"})
    assert tokenizer.eos_token_id == len(texts)
    found = number_values(tokenizer, len(texts) + 5)
    assert len(found) == len(texts) + 5
    for text, number in vocabulary.items():
        assert found[number] == texts[text] if texts[text] is not None else np.isnan(found[number]), text
    assert np.isnan(found[len(texts) :]).all()
    assert np.isfinite(number_values(tokenizer, 3)).all()  # a model with fewer logits than the tokenizer has tokens
