"""Frozen weights in 4 and 8 bits, optimizers with 8-bit state, as far as a CPU goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

from align import export
from align.model import load_config, load_weights
from align.sections import ModelSection
from align.train import main
from tests.equivalence.test_resume import command, lines
from tests.equivalence.worlds import save_model

pytestmark = pytest.mark.usefixtures("plain_runs")

pytest.importorskip("bitsandbytes")
KEYS = {"num_train_epochs": 1, "save_strategy": "no", "save_steps": None, "save_total_limit": None, "logging_steps": 1}


@pytest.fixture
def wide(folder: Path) -> Path:
    """The folder with a model whose rows are as long as bitsandbytes needs them on CPUs."""
    save_model(folder / "model", hidden_size=64, intermediate_size=128)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_on_quantized_weights(wide: Path, bits: int):
    assert main(command(wide, "run", f"--load_in_{bits}bit", "--lora.r=4", **KEYS)) == 0
    losses = [line["loss"] for line in lines(wide / "run") if "loss" in line]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < losses[0] - 0.01
    adapter = load_file(wide / "run" / "adapter_model.safetensors")
    assert adapter.keys()
    assert all("lora_" in name and value.dtype == torch.float32 for name, value in adapter.items())
    checks = json.loads((wide / "run" / "checks.json").read_text())
    assert "policy equals reference before training" in {check["check"] for check in checks}


def test_weights_are_in_four_bits(wide: Path):
    section = ModelSection(model_name_or_path=str(wide / "model"), load_in_4bit=True, use_bnb_nested_quant=True)
    model = load_weights(section, load_config(section), torch.float32)
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert kinds["model.layers.0.self_attn.q_proj.weight"] == torch.uint8
    assert kinds["model.embed_tokens.weight"] == torch.float32


@pytest.mark.slow
def test_the_reference_of_another_precision_is_another_one(wide: Path, capsys: pytest.CaptureFixture[str]):
    """What is cached under whole weights is not read under quantized ones."""
    assert main(command(wide, "whole", "--lora.r=4", **KEYS)) == 0
    capsys.readouterr()
    assert main(command(wide, "four", "--lora.r=4", "--load_in_4bit", **KEYS)) == 0
    assert "reference: 38 of 38 rows" in capsys.readouterr().out


@pytest.mark.slow
def test_a_merged_export_is_the_adapter_on_its_base(wide: Path):
    assert main(command(wide, "run", "--lora.r=4", **KEYS)) == 0
    assert export.main([str(wide / "run"), str(wide / "merged"), "--merge"]) == 0
    ids = torch.tensor([[0, 70, 80, 90, 100]])
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with torch.no_grad():
        wanted = AutoPeftModelForCausalLM.from_pretrained(wide / "run")(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(wide / "merged")(ids).logits
        base = AutoModelForCausalLM.from_pretrained(wide / "model")(ids).logits
    torch.testing.assert_close(merged, wanted, rtol=1e-5, atol=1e-5)
    assert float((merged - base).abs().max()) > 1e-3
    assert AutoTokenizer.from_pretrained(wide / "merged").eos_token == "</s>"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere", "out"], "there is no folder 'nowhere'"),
        (["model", "model"], "'model' is there already"),
        (["model", "out", "--merge"], "holds whole weights, no adapter"),
        (["empty", "out"], "empty holds no weights"),
    ],
)
def test_exports_that_make_no_sense(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], says: str
):
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir()
    assert export.main(words) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not (folder / "out").exists()


@pytest.mark.slow
def test_an_optimizer_with_state_in_8_bits(folder: Path):
    for optim in ("adamw_torch", "adamw_8bit"):
        assert main(command(folder, optim, f"--optim={optim}", **KEYS)) == 0
    whole, eight = (
        [line["loss"] for line in lines(folder / name) if "loss" in line] for name in ("adamw_torch", "adamw_8bit")
    )
    assert eight == pytest.approx(whole, rel=0.05)
    assert eight[-1] < eight[0] - 0.01


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has something to page to")
def test_paging_takes_a_gpu(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(command(folder, "run", "--optim=paged_adamw_8bit", **KEYS)) == 2
    assert "there is no GPU; use adamw_8bit" in " ".join(capsys.readouterr().err.split())
