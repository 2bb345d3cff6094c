"""What a run chooses where there are GPUs, as far as a machine without one can tell."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments

from align import assemble, build, checks
from align.checks import choose_path
from align.console import many_imports
from align.engines import on_gpu
from align.forward import bind, causal_lm
from align.fused import unfuse
from align.model import attention, compute_dtype, keep_input_dtype, load_config
from align.segments import NAME
from data.pack import pack
from tests.align.tiny import CONFIGS, model_of, random_table
from tests.equivalence.runs import recipe_for

CPU = torch.device("cpu")


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)


@pytest.mark.parametrize(("told", "expected"), [("true", False), ("1", False), ("false", True), (None, True)])
def test_rehearsals_on_cpus_leave_a_gpu_alone(
    told: str | None, expected: bool, with_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """``use_cpu`` of accelerate's file reaches a process as this variable; attention and types have to follow it."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if told is not None:
        monkeypatch.setenv("ACCELERATE_USE_CPU", told)
    section = recipe_for(tmp_path, "model", tmp_path / "rows.jsonl").model
    assert on_gpu() is expected
    assert compute_dtype(section) == (torch.bfloat16 if expected else torch.float32)
    assert attention(section, CONFIGS["llama"]()) == ("flex_attention" if expected else NAME)


def test_one_process_takes_one_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Else transformers wraps the model for all of them, and every one computes the same batch."""

    class SeesFour(TrainingArguments):
        def __post_init__(self) -> None:
            super().__post_init__()
            self._n_gpu = 4

    monkeypatch.setattr(assemble, "TrainingArguments", SeesFour)
    recipe = recipe_for(tmp_path, "model", tmp_path / "rows.jsonl")
    assert assemble.training_arguments(recipe, 1, evaluate=False).n_gpu == 1


def test_a_divided_model_keeps_the_attention_that_was_asked_for(tmp_path: Path):
    """It was found out on a part of the model, which had another one."""
    model = model_of(CONFIGS["llama"](), torch.float32)
    causal_lm(model).save_pretrained(tmp_path / "model")
    recipe = recipe_for(tmp_path, tmp_path / "model", tmp_path / "rows.jsonl", "--attn_implementation", "eager")
    causal_lm(model).set_attn_implementation("eager")
    share, _ = build._path_of_a_part(recipe, load_config(recipe.model), model, random_table(), torch.float32, CPU)
    assert share
    assert causal_lm(model).config._attn_implementation == "eager"


@pytest.mark.parametrize("compiled", [False, True])
def test_attention_whose_backward_pass_fails_is_not_chosen(compiled: bool, monkeypatch: pytest.MonkeyPatch):
    """Where it is compiled apart: a kernel may exist forward and not backward."""

    class NoWayBack(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, states: torch.Tensor) -> torch.Tensor:
            return states.clone()

        @staticmethod
        def backward(ctx: Any, *slopes: Any) -> Any:
            raise RuntimeError("out of shared memory")

    model = model_of(CONFIGS["llama"](), torch.float32)
    causal_lm(model).model.norm.register_forward_hook(lambda module, inputs, output: NoWayBack.apply(output))
    monkeypatch.setattr(checks, "COMPILES", {"cpu"} if compiled else {"cuda"})
    share, check = choose_path(model, random_table(), torch.float32, CPU)
    assert share is not compiled
    assert ("out of shared memory" in check.detail) is compiled
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_keep_no_copies_of_their_inputs(dora: bool):
    """bfloat16 to float32 and back is the same number, and was kept for the backward pass of every adapted layer.

    Where they are fused there are none in any case; where weights are divided they are not fused.
    """
    torch.manual_seed(0)
    base = causal_lm(model_of(CONFIGS["llama"](), torch.float32)).to(torch.bfloat16)
    settings = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear", use_dora=dora)
    model: Any = get_peft_model(base, settings, autocast_adapter_dtype=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    bind(model)
    unfuse(model)
    batch = pack(random_table(), [0, 1], share=True, counts={})

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def passed() -> tuple[torch.Tensor, list[torch.Tensor], int]:
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast("cpu"):
            logps = model(packed=batch)["logps"]
        logps.sum().backward()
        return logps.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None], sum(kept.values())

    wanted, slopes, before = passed()
    keep_input_dtype(model)
    found, again, after = passed()
    assert torch.equal(found, wanted)
    for one, other in zip(again, slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert after > 0.95 * before if dora else after < 0.85 * before, (before, after)
    with torch.no_grad():  # and outside autocast, as in generation
        assert model(input_ids=batch.input_ids).logits.isfinite().all()


def test_imports_leave_the_collector_as_it_was():
    with contextlib.suppress(ImportError), many_imports():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
