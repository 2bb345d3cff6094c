"""What is told before a run: arithmetic by hand, memory against what runs take, and that ``--plan`` costs nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaModel

from align import forecast as forecasting
from align import logps, rates, train
from align import model as models
from align.assemble import train_plan
from align.forecast import Forecast, look_ahead, skeleton
from align.forward import bind
from align.rates import Rates
from align.recipe import read_recipe
from align.segments import NAME
from align.tracing import Traced, by_layers, trace, without_random_numbers
from data.pack import PackedBatch, pack
from tests.align.tiny import CONFIGS, mamba, random_table
from tests.equivalence.runs import write_rows
from tests.equivalence.worlds import WORDS, save_model

LEGS = ("chosen", "rejected")
SHAPE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip


def shape(layers: int) -> LlamaConfig:
    return LlamaConfig(**SHAPE, num_hidden_layers=layers)  # type: ignore[arg-type]


def packed() -> PackedBatch:
    return pack(random_table(LEGS), [0, 1, 2], share=True, kind="pack", counts={})


def full(config: Any) -> Any:
    model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
    bind(model)
    return model


def with_adapter(config: Any) -> Any:
    model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    bind(model)
    return model


def traced(layers: int = 2, make: Any = full, *, dtype: torch.dtype = torch.float32, **more: Any) -> Traced:
    options: dict[str, Any] = {"checkpointing": False} | more
    return by_layers(shape(layers), partial(trace, batch=packed(), make=make, dtype=dtype, **options))


@pytest.mark.slow
def test_arithmetic_by_hand():
    """Two operations for each weight and position; the head at responses alone; QKᵀ and PV of what a segment sees."""
    batch = packed()
    positions, responses = batch.input_ids.shape[1], len(batch.target)
    wanted = 2 * (2 * OF_LAYER * positions) + 2 * 32 * 96 * responses
    for segment in batch.segments:
        length, seen = segment.end - segment.start, segment.prompt[1] - segment.prompt[0]
        wanted += 2 * (4 * 32 * length * (length + seen))
    found = traced()
    assert found.forward_flops == wanted
    # The backward pass has twice that, and computes the head's logits and its chunk's own forward again.
    again = 2 * 32 * 96 * responses
    assert found.total_flops == pytest.approx(3 * wanted + again, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "again"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_are_extrapolated_exactly(dtype: torch.dtype, checkpointing: bool):
    whole = trace(shape(7), packed(), make=full, dtype=dtype, checkpointing=checkpointing)
    found = traced(7, dtype=dtype, checkpointing=checkpointing)
    for name in Traced.__slots__:
        assert getattr(found, name) == pytest.approx(getattr(whole, name), rel=0.01), name
    assert found.parameters == whole.parameters


OF_LAYER = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "again"])
def test_autocast_has_copies_of_all_weights_until_the_forward_pass_ends(checkpointing: bool):
    """Two bytes for each weight of every layer and of the head, also where activations are computed again: then the
    backward pass has those of one layer. Engines whose weights are in that type have none."""
    copied, without = (
        traced(6, dtype=torch.bfloat16, checkpointing=checkpointing, copies=copies) for copies in (True, False)
    )
    assert copied.forward_head - without.forward_head == 2 * (6 * OF_LAYER + 32 * 96)
    if checkpointing:
        assert copied.backward - without.backward == 2 * OF_LAYER


@pytest.mark.slow
def test_what_an_adapter_and_checkpointing_save():
    plain, adapter, again = traced(6), traced(6, with_adapter), traced(6, checkpointing=True)
    assert plain.trained == plain.parameters
    assert adapter.trained < 0.3 * adapter.parameters
    assert adapter.parameters == plain.parameters + adapter.trained
    assert adapter.total_flops < plain.total_flops
    assert again.activations < plain.activations
    assert again.total_flops > 1.25 * plain.total_flops


@pytest.mark.slow
def test_looking_ahead_draws_no_random_numbers():
    torch.manual_seed(3)
    with without_random_numbers():
        traced()
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))


AHEAD = Forecast(
    memory={"program": 1e9, "weights": 2e9},
    fixed=5e8,
    costliest=1000,
    available=4e9,
    rates=Rates(flops=1e12, bandwidth=1e10, start=1e-5),
    microbatches=2,
    token_budget=1000,
    chunk=340,
    checkpointing=False,
    steps=10,
    useful_per_step=1500.0,
    padding=0.25,
    arithmetic=3.0,
    moving=0.75,
    starting=0.25,
    useful_flops=2e12,
    reference=7.0,
    world=1,
    share=True,
)


def test_words_and_shares_by_hand():
    """A step of 5 seconds: 3 of arithmetic, 0.75 of memory traffic, 0.25 of starting operations.

    2 of the 5 · 10¹² operations possible were useful.
    """
    told = " ".join(AHEAD.lines())
    for part in (
        "2.79 GiB at most of 3.73",
        "1000 positions a microbatch, 2 of them a step, 340 positions a chunk of the head, activations kept",
        "375 useful tokens/s",
        "would allow 500",
        "25.0% padding",
        "40.0 s",
        "7.0 s",
    ):
        assert part in told, part
    assert "warning" not in told
    lines, found = AHEAD.verdict([9.0, 5.0, 4.0], peak=3.3e9, reference=6.5)
    assert lines[0].endswith("3.07 GiB at most (forecast 2.79), 6.5 s for the reference (forecast 7.0 s)")
    assert AHEAD.verdict([9.0], peak=3.3e9)[0][0].endswith("(forecast 2.79)")
    assert found["mfu"] == pytest.approx(0.4)
    assert found["useful_tokens_per_second"] == 300
    assert list(found["shares"].values()) == pytest.approx([0.6, 0.15, 0.05, 0.2])
    assert "limited by arithmetic" in lines[1]


def test_too_much_memory_is_said_with_what_to_do():
    told = replace(AHEAD, available=2e9).lines()[-1]
    assert told.startswith("warning: that is more memory than there is; lower train.token_budget")
    assert "gradient_checkpointing" in told
    assert "gradient_checkpointing" not in replace(AHEAD, available=2e9, checkpointing=True).lines()[-1]


def long_rows(folder: Path, number: int) -> Path:
    text = " ".join(WORDS)
    rows = [
        {"prompt": f"{i} {text}:", "chosen": f" {text[: 40 + i]}.", "rejected": f" {text[i:]}!"} for i in range(number)
    ]
    return write_rows(folder / "pairs.jsonl", rows)


def words(folder: Path, *more: str) -> list[str]:
    return [
        "--objective=dpo", f"--model_name_or_path={folder / 'model'}", f"--dataset_name={folder / 'pairs.jsonl'}",
        f"--output_dir={folder / 'run'}", "--eval_share=0", "--save_strategy=no", *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_plan_tells_and_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """No weight is read and no folder is made."""
    save_model(tmp_path / "model")
    long_rows(tmp_path, 12)
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "load_weights", None)
    assert train.main(words(tmp_path, "--rows_per_step=4", "--plan")) == 0
    told = capsys.readouterr().out
    assert "forecast: " in told
    assert "3 steps" in told
    assert not (tmp_path / "run").exists()


def test_positions_that_fit_by_hand():
    """2 GB of activations for 1000 positions; of 3.6 GB the rest takes 2.6, so that half of them fit."""
    memory = {"program": 1e9, "weights": 1.1e9, "gradients and activations": 2.5e9}
    assert replace(AHEAD, memory=memory).fitting() == 500


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "checkpointing", "device"),
    [("float32", False, "cpu"), ("bfloat16", False, "cuda"), ("bfloat16", True, "cpu"), ("lora", True, "cuda")],
)
def test_rows_are_extrapolated_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, checkpointing: bool, device: str
):
    """Copies of weights and their gradients do not grow with the rows; logits do up to a chunk, which is of 10
    positions on CPUs and of 40 on GPUs. Two rows are traced of twenty like them."""
    save_model(tmp_path / "model")
    long_rows(tmp_path, 2)
    words_ = words(tmp_path, f"--model.dtype={kind}" if kind != "lora" else "--lora.r=4", "--token_budget=1024")
    recipe = read_recipe(None, [*words_, f"--gradient_checkpointing={str(checkpointing).lower()}"])
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    config, table, rows = shape(3), random_table(LEGS), np.array([0, 2] * 10)
    plan = train_plan(recipe, table, share=True, way=NAME)
    monkeypatch.setattr(logps, "LOGITS_PER_CHUNK", 10 * 96)
    found, none = forecasting._of_rows(recipe, config, plan, table, rows, dtype, torch.device(device), share=True)
    if device == "cuda":  # what is traced lies on a CPU
        monkeypatch.setattr(logps, "LOGITS_PER_CHUNK", 40 * 96)
    batch = pack(table, rows, share=True, kind="pack", counts={})
    make = partial(skeleton, recipe)
    whole = trace(config, batch, make=make, dtype=dtype, checkpointing=checkpointing)
    for name in ("logits", "activations", "total_flops", "trained_bytes"):
        assert getattr(found, name) == pytest.approx(getattr(whole, name), rel=0.02), name
    copied = 2 * 3 * OF_LAYER if kind == "bfloat16" else 0
    # The most is in use before the last layer's last copies are made, with many rows.
    assert 0.9 * copied <= none.forward < 1.3 * copied + 1e4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "share"), [("single", 1), ("ddp", 2), ("zero1", 1), ("zero2", 0.25), ("zero3", 0.25), ("fsdp2", 0.25)]
)
def test_gradients_by_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, share: float):
    """Of four processes each has a quarter, or as much again in DDP's buckets, whatever the rows."""
    save_model(tmp_path / "model")
    long_rows(tmp_path, 2)
    recipe, table = read_recipe(None, words(tmp_path, "--rows_per_step=4")), random_table(LEGS, rows=8)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(forecasting, "launched", lambda: "single")
    alone = look_ahead(recipe, shape(2), table)
    monkeypatch.setattr(forecasting, "launched", lambda: engine)
    found = look_ahead(recipe, shape(2), table)
    gradients = 4 * (2 * OF_LAYER + 2 * 32 * 96 + 5 * 32) * forecasting.KEPT_BY_ALLOCATOR
    assert found.fixed - alone.fixed == pytest.approx((share - 1) * gradients)
    passes, before = (each.memory["gradients and activations"] for each in (found, alone))
    assert passes - before == pytest.approx((share - 1) * gradients)


@pytest.mark.slow
def test_a_tenth_of_a_gpu_stays_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing runs on it here. 10 of 80 GB are taken, and a chunk of the head is eight times a CPU's."""
    save_model(tmp_path / "model")
    long_rows(tmp_path, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (70 * 10**9, 80 * 10**9))
    monkeypatch.setattr(forecasting, "measured", lambda *_: AHEAD.rates)
    recipe, table = read_recipe(None, words(tmp_path, "--rows_per_step=4")), random_table(LEGS, rows=8)
    ahead = look_ahead(recipe, shape(2), table)
    assert ahead.memory["program"] == 1e10
    assert ahead.chunk == 8 * 2**24 // 96
    assert replace(ahead, memory={"program": 7.2e10}).fits
    assert not replace(ahead, memory={"program": 7.3e10}).fits


def test_measuring_leaves_a_gpu_as_it_was(monkeypatch: pytest.MonkeyPatch):
    emptied: list[bool] = []
    monkeypatch.setattr(rates, "_measured", lambda *_: AHEAD.rates)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    rates.measured(torch.device("cpu"), torch.float32)
    assert not emptied
    rates.measured(torch.device("cuda"), torch.float32)
    assert emptied


@pytest.mark.slow
def test_the_budget_is_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """With auto; a number is taken as it is, with a warning. Losses are the same either way."""
    save_model(tmp_path / "model", hidden_size=256, intermediate_size=1024, num_hidden_layers=6)
    long_rows(tmp_path, 24)
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    common = words(tmp_path, "--rows_per_step=12", "--max_steps=1", "--logging_steps=1")
    common.append("--gradient_checkpointing=false")
    assert train.main([*common, "--output_dir=" + str(tmp_path / "roomy")]) == 0
    roomy = capsys.readouterr().out
    assert "so that it fits" not in roomy
    found = json.loads((tmp_path / "roomy" / "forecast.json").read_text())["forecast"]
    passes = found["memory"]["gradients and activations"]
    monkeypatch.setattr(forecasting, "_available", lambda device: found["peak"] - 0.4 * passes)
    assert train.main([*common, "--output_dir=" + str(tmp_path / "tight")]) == 0
    tight = capsys.readouterr().out
    assert "note: train.token_budget auto is " in tight
    less = json.loads((tmp_path / "tight" / "forecast.json").read_text())["forecast"]
    assert less["token_budget"] < found["token_budget"]
    assert less["microbatches"] > found["microbatches"]
    assert f"in {less['microbatches']} microbatches" in tight
    first, second = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0]) for name in ("roomy", "tight")
    )
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-6)
    assert train.main([*common, "--output_dir=" + str(tmp_path / "asked"), "--token_budget=1024", "--plan"]) == 0
    assert "warning: that is more memory than there is" in capsys.readouterr().out


@pytest.mark.slow
def test_activations_are_computed_again_where_they_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Not where there is room, not where it was refused; the loss is the same either way."""
    save_model(tmp_path / "model", hidden_size=256, intermediate_size=1024, num_hidden_layers=6)
    long_rows(tmp_path, 4)
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    common = words(tmp_path, "--rows_per_step=1", "--max_steps=2", "--logging_steps=1", "--token_budget=512")

    def outcome(name: str, *more: str) -> tuple[str, dict[str, Any], list[float]]:
        assert train.main([*common, f"--output_dir={tmp_path / name}", *more]) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        found = json.loads((tmp_path / name / "forecast.json").read_text())["forecast"]
        return capsys.readouterr().out, found, [json.loads(line)["loss"] for line in lines]

    told, roomy, losses = outcome("roomy")
    assert "activations kept" in told
    monkeypatch.setattr(forecasting, "_available", lambda device: roomy["peak"] - 2**20)
    told, tight, again = outcome("tight")
    assert "note: train.gradient_checkpointing auto is true here, because memory is short" in told
    assert tight["checkpointing"]
    assert tight["memory"]["gradients and activations"] < roomy["memory"]["gradients and activations"]
    assert again == pytest.approx(losses, rel=1e-6)
    told, refused, _ = outcome("refused", "--gradient_checkpointing=false")
    assert "warning: that is more memory than there is; lower train.token_budget, set train.gradient_checkp" in told
    assert not refused["checkpointing"]


@pytest.mark.parametrize(
    ("kept", "again", "chosen"),
    [
        ({"most": 300, "starting": 5.0}, {"starting": 1.0}, True),  # few positions at a time are slow
        ({"most": 300, "starting": 1.0}, {"starting": 5.0}, False),
        ({"available": 2e9}, {"available": 2e9, "memory": {"program": 1.9e9}, "starting": 9.0}, True),
        ({"available": 2e9}, {"available": 2e9, "memory": {"program": 2.5e9}}, True),  # neither fits: what needs less
        ({"available": 2e9}, {"available": 2e9, "memory": {"program": 3.5e9}}, False),
        ({}, {"memory": {"program": 1.0}, "starting": 0.0}, False),  # there is room
        ({"available": 3.2e9, "spare": 0.1}, {"memory": {"program": 1.0}}, True),  # 3 of 3.2 GB: a tenth stays free
        ({"available": 3.2e9}, {"memory": {"program": 1.0}}, False),
    ],
)
def test_when_activations_are_computed_again(
    kept: dict[str, Any], again: dict[str, Any], chosen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def budgeted(recipe: Any, config: Any, table: Any) -> Any:
        on = recipe.train.gradient_checkpointing
        return replace(AHEAD, checkpointing=on, **(again if on else kept))

    monkeypatch.setattr(forecasting, "_budgeted", budgeted)
    save_model(tmp_path / "model")
    long_rows(tmp_path, 2)
    recipe = read_recipe(None, words(tmp_path))
    found = look_ahead(recipe, None, random_table(LEGS, rows=2))
    assert (found.checkpointing, found.chosen) == (chosen, chosen)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba", *CONFIGS])
def test_every_architecture_is_told_beforehand(tmp_path: Path, name: str):
    """Those without attention included: sequences are then separate, as they will be in training."""
    config = (mamba if name == "mamba" else CONFIGS[name])()
    config.vocab_size = 96
    save_model(tmp_path / "model")
    long_rows(tmp_path, 4)
    recipe = read_recipe(None, words(tmp_path, "--rows_per_step=4"))
    table = random_table(LEGS, rows=8)
    ahead = look_ahead(recipe, config, table)
    assert ahead.arithmetic > 0
    assert ahead.memory["weights"] > 4 * 96 * 32
    assert ahead.share == (name != "mamba")
    assert (ahead.padding == 0) == (name not in ("mamba", "gemma2-window-softcaps"))
    assert ("own copy of the prompt" in ahead.lines()[0]) == (name == "mamba")


@pytest.mark.slow
def test_experts_arithmetic_by_hand():
    """Every token goes through two of four experts, each three products of 32 by 48, and the router."""
    with_experts = CONFIGS["mixtral-experts"]()
    dense = CONFIGS["mistral-window"]()
    dense.sliding_window = None
    batch = packed()
    found, plain = (
        trace(each, batch, make=full, dtype=torch.float32, checkpointing=False) for each in (with_experts, dense)
    )
    positions, layers = batch.input_ids.numel(), 4
    one = 3 * 2 * 32 * 48
    assert found.forward_flops - plain.forward_flops == layers * positions * (one + 2 * 32 * 4)


def waits_for_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llamas whose forward pass depends on a number that it computes."""
    plain = LlamaModel.forward

    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        found = plain(self, *arguments, **options)
        assert found.last_hidden_state.sum().item() < float("inf")
        return found

    monkeypatch.setattr(LlamaModel, "forward", forward)


@pytest.mark.slow
def test_a_model_that_cannot_be_traced_is_trained_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    save_model(tmp_path / "model")
    long_rows(tmp_path, 8)
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    waits_for_numbers(monkeypatch)
    assert train.main(words(tmp_path, "--rows_per_step=4", "--plan")) == 2
    assert "--plan: memory and speed of this model can't be told" in capsys.readouterr().err
    assert train.main(words(tmp_path, "--rows_per_step=4", "--max_steps=1")) == 0
    assert "forecast: not possible for this model (" in capsys.readouterr().out


@pytest.mark.slow
def test_a_model_without_attention_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    save_model(tmp_path / "model")
    config = mamba()
    config.vocab_size = 512
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    rows = [{"prompt": "a cat:", "chosen": f" sat{'.' * i}", "rejected": " ran."} for i in range(1, 5)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    assert train.main(words(tmp_path, "--rows_per_step=2", "--max_steps=2")) == 0
    told = capsys.readouterr().out
    assert "verdict: " in told
    assert "not possible for this model" not in told


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, pytest.param(True, marks=pytest.mark.all)], ids=["full", "lora"])
def test_memory_is_forecast_within_15_percent(tmp_path: Path, adapter: bool):
    """In a process of its own, with 20 million weights, so that they and not the program's own memory decide."""
    size = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8}
    save_model(tmp_path / "model", **size, num_key_value_heads=8, max_position_embeddings=512)
    long_rows(tmp_path, 36)
    more = ["--rows_per_step=12", *(["--lora={r: 8, target_modules: all-linear}"] if adapter else [])]
    done = subprocess.run(
        [sys.executable, "-m", "align.train", *words(tmp_path, *more)],
        env=None,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), "libraries said something that a run has to keep quiet"
    found = json.loads((tmp_path / "run" / "forecast.json").read_text())
    assert found["peak"] == pytest.approx(found["forecast"]["peak"], rel=0.15)
    assert found["forecast"]["padding"] == 0
    assert sum(found["shares"].values()) >= 0.99
