"""What a run leaves: files, weights that load elsewhere, trackers, each key's effect."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.train import main
from objectives import OBJECTIVES
from tests.equivalence.test_resume import command, lines
from tests.equivalence.worlds import write_rows

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("plain_runs")]


@pytest.mark.whole_runs
def test_a_run_directory_holds_everything(folder: Path, capsys: pytest.CaptureFixture):
    assert main(command(folder, "run")) == 0
    run = folder / "run"
    for name in (
        "recipe.yaml", "metrics.jsonl", "results.json", "report.html", "README.md", "model.safetensors", "config.json",
        "tokenizer.json", "data_report.json", "checks.json", "example.txt", "checkpoint-5", "checkpoint-10",
    ):  # fmt: skip
        assert (run / name).exists(), name
    assert not list(run.rglob("*.bin"))  # no pickles among what is shared
    assert not (run / ".partial").exists()
    before = AutoModelForCausalLM.from_pretrained(folder / "model")
    after = AutoModelForCausalLM.from_pretrained(run)
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(moved)
    assert (
        AutoTokenizer.from_pretrained(run)("abc")["input_ids"]
        == AutoTokenizer.from_pretrained(folder / "model")("abc")["input_ids"]
    )
    assert all(check["passed"] for check in json.loads((run / "checks.json").read_text()))
    metrics = lines(run)
    assert [line["step"] for line in metrics if "loss" in line] == [2, 4, 6, 8, 10]
    assert metrics[0]["step"] == 0
    assert metrics[-1]["eval/loss"] < metrics[0]["eval/loss"]
    said = capsys.readouterr().out
    for words in ("48 rows read", "5 steps an epoch", "rows/s", "useful tokens/s", "left 0:00:0", "⟦", "report.html"):
        assert words in said, words
    # The resolved recipe runs again as it is.
    again = yaml.safe_load((run / "recipe.yaml").read_text())
    again["train"]["output_dir"] = str(folder / "again")
    (folder / "again.yaml").write_text(yaml.safe_dump(again))
    assert main(["--config", str(folder / "again.yaml")]) == 0
    assert lines(folder / "again") == lines(run)


@pytest.mark.parametrize(
    "keys",
    [[], ["--use_rslora"], ["--use_dora"], ["--target_modules=[q_proj]", "--modules_to_save=[lm_head]"]],
    ids=str,
)
def test_adapters_load_with_peft(folder: Path, keys: list[str]):
    assert main(command(folder, "run", "--lora.r=4", *keys, save_strategy="no", save_steps=None)) == 0
    model = AutoPeftModelForCausalLM.from_pretrained(folder / "run")
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    ids = torch.tensor([[0, 40, 50, 60]])
    with torch.no_grad():
        assert not torch.allclose(model(input_ids=ids).logits, base(input_ids=ids).logits)
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids=ids).logits, base(input_ids=ids).logits)
    assert lines(folder / "run")[-1]["eval/loss"] < 0.69


def trained(folder: Path, name: str, *more: str, **keys: object) -> tuple[list[dict], dict]:
    assert main(command(folder, name, *more, **{"save_strategy": "no", "save_steps": None, **keys})) == 0
    return lines(folder / name), load_file(folder / name / "model.safetensors")


def test_gradient_checkpointing_and_token_budget_change_nothing_but_memory(folder: Path):
    plain, weights = trained(folder, "plain")
    for name, keys in (("checkpointing", {"gradient_checkpointing": True}), ("budget", {"token_budget": 150})):
        metrics, same = trained(folder, name, **keys)
        for key, tensor in weights.items():
            torch.testing.assert_close(same[key], tensor, rtol=1e-3, atol=1e-5)  # float32 after ten updates
        assert metrics[-1]["eval/loss"] == pytest.approx(plain[-1]["eval/loss"], rel=1e-4)


def test_bfloat16_computes_in_bfloat16_and_keeps_weights_in_float32(folder: Path):
    single, _ = trained(folder, "single")
    half, weights = trained(folder, "half", dtype="bfloat16")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert half[-1]["eval/loss"] == pytest.approx(single[-1]["eval/loss"], abs=0.03)
    assert half[-1]["eval/loss"] != single[-1]["eval/loss"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", 5e-4),
        ("beta", 0.1),
        ("seed", 1),
        ("warmup_steps", 0.3),
        ("lr_scheduler_type", "cosine"),
        ("weight_decay", 0.5),
        ("adam_beta1", 0.5),
        ("adam_beta2", 0.5),
        ("adam_epsilon", 1e-3),
        ("max_grad_norm", 0.01),
        ("optim", "sgd"),
        ("rows_per_step", 5),
        ("max_length", 60),
        ("truncation", "drop"),
        ("eval_share", 0.4),
        ("as_chat", True),
        ("max_rows", 30),
        ("num_train_epochs", 1),
        ("label_smoothing", 0.2),
    ],
)
def test_no_key_is_accepted_and_ignored(folder: Path, key: str, value: object):
    """Each of these must change the weights that come out."""
    base = {"max_length": 70} if key == "truncation" else {}
    _, before = trained(folder, "before", **base)
    _, after = trained(folder, "after", **{**base, key: value})
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_max_steps_and_fractional_epochs_end_where_they_say(folder: Path):
    assert trained(folder, "three", max_steps=3, num_train_epochs=None)[0][-1]["step"] == 3
    assert trained(folder, "half", num_train_epochs=0.5)[0][-1]["step"] == 3  # of five, rounded up


def test_evaluation_every_few_steps_and_not_at_all(folder: Path):
    metrics, _ = trained(folder, "steps", eval_strategy="steps", eval_steps=4)
    assert [line["step"] for line in metrics if "eval/loss" in line] == [0, 4, 8, 10]
    metrics, _ = trained(folder, "none", eval_share=0)
    assert not [line for line in metrics if "eval/loss" in line]


def test_workers_prepare_the_same_batches(folder: Path):
    plain, _ = trained(folder, "plain")
    with_workers, _ = trained(folder, "workers", dataloader_num_workers=2)
    assert with_workers == plain


def test_supervised_rows_and_a_mixture_with_pairs(folder: Path):
    rows = [{"prompt": f"{i} says", "completion": " the cat sat."} for i in range(24)]
    write_rows(folder / "sft.jsonl", rows)
    words = [w for w in command(folder, "sft", beta=None) if not w.startswith(("--dataset_name", "--objective"))]
    assert main([*words, f"--dataset_name={folder / 'sft.jsonl'}", "--objective=sft"]) == 0
    metrics = lines(folder / "sft")
    assert metrics[-1]["eval/loss"] < metrics[0]["eval/loss"] - 0.05
    words = [word for word in command(folder, "both", beta=None) if not word.startswith("--objective")]
    both = '--objective=[{"name":"dpo"},{"name":"sft","leg":"chosen","weight":0.5}]'
    assert main([*words, both]) == 0
    first, last = lines(folder / "both")[0], lines(folder / "both")[-1]
    assert first["eval/loss"] == pytest.approx(0.693147 + 0.5 * first["eval/loss/likelihood"], abs=1e-4)
    assert last["eval/loss/likelihood"] < first["eval/loss/likelihood"]


def test_objective_state_is_updated_once_a_step_and_resumed(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """A running mean of margins, registered for this test: seen in the loss, kept in checkpoints."""
    from tests.align.stateful import Centred

    monkeypatch.setitem(OBJECTIVES._classes, "centred", Centred)
    import shutil

    from tests.equivalence.test_resume import after_a_crash, same_lines

    words = [word for word in command(folder, "straight", beta=None) if not word.startswith("--objective")]
    assert main([*words, "--objective=centred"]) == 0
    shutil.copytree(folder / "straight", folder / "resumed")
    after_a_crash(folder / "resumed", 5)
    words = [word for word in command(folder, "resumed", beta=None) if not word.startswith("--objective")]
    assert main([*words, "--objective=centred", "--resume_from_checkpoint=last"]) == 0
    same_lines(folder / "resumed", folder / "straight")
    shifts = [line["shift"] for line in lines(folder / "straight") if "shift" in line]
    assert shifts[0] != shifts[-1]
