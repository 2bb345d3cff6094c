"""What couples the rows of a step (a sort, a filter, a softmax over losses) sees all of them, however it is split."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from align.anchors import REFERENCE_FILE
from align.train import main
from objectives import OBJECTIVES, with_own_step
from tests.equivalence.runs import write_rows
from tests.equivalence.test_ranks import compare, launch
from tests.equivalence.test_resume import after_a_crash, command, lines, same_lines
from tests.objectives.batches import make_batch, rows_of

pytestmark = pytest.mark.usefixtures("plain_runs")

SFT = ["--objective={name: sft, leg: chosen, per: sequence}"]
COUPLED = {
    "aot": ["--objective={name: aot, beta: 0.5}"],
    "aot_unpaired": ["--objective={name: aot_unpaired, beta: 0.5, label_smoothing: 0.1}"],
    "beta_dpo": ["--objective={name: beta_dpo, beta: 0.5}"],
    "lin_upper": [*SFT, "--token_weights=[{name: lin_upper, warmup_steps: 2}]"],
    "quadratic": [*SFT, "--token_weights=[{name: quadratic}, {name: goldfish, k: 3}]"],
    "extremes": [*SFT, "--token_weights=[{name: extremes}]"],
    "list": [
        "--objective=[{name: aot, beta: 0.5}, {name: beta_dpo, weight: 0.5}, {name: sft, leg: chosen}]",
        "--token_weights=[{name: lin_upper}]",
    ],
    "bco_pair": ["--objective={name: bco_pair, beta: 0.5}"],
}


def words(folder: Path, output: str, name: str, *more: str, **keys: object) -> list[str]:
    base = command(folder, output, beta=None, **keys)
    return [*(word for word in base if not word.startswith("--objective.name")), *COUPLED[name], *more]


@pytest.mark.slow
@pytest.mark.parametrize("name", COUPLED)
def test_accumulation_changes_nothing(name: str, folder: Path):
    """Steps of one microbatch, which find what they need in their own forward, and steps of several."""
    assert main(words(folder, "whole", name, token_budget=10_000)) == 0
    assert main(words(folder, "split", name, token_budget=150)) == 0
    compare(lines(folder / "split"), lines(folder / "whole"))
    whole, split = (load_file(folder / run / "model.safetensors") for run in ("whole", "split"))
    for key, tensor in whole.items():
        torch.testing.assert_close(split[key], tensor, rtol=2e-3, atol=2e-4)  # Adam divides rounding by itself


@pytest.mark.slow
def test_two_processes_equal_one(folder: Path, monkeypatch: pytest.MonkeyPatch):
    found = []
    for name, processes in (("one", 1), ("two", 2)):
        monkeypatch.setenv("ALIGN_CACHE", str(folder / f"cache-of-{name}"))
        found.append(launch(folder, name, processes, "--num_train_epochs=1", objective=COUPLED["list"]))
    compare(found[1], found[0])


@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "beta_dpo"])
def test_a_step_of_its_own_for_each_microbatch_would_differ(name: str):
    """The mistake that a pass over the step prevents, made on purpose (it is what TRL's ``aot`` does)."""
    objective = OBJECTIVES[name]()
    batch = make_batch(objective, seed=3, rows=8)
    counts = batch.counts()
    parts = [rows_of(batch, slice(start, start + 4)) for start in (0, 4)]
    whole = objective(batch).loss(counts)
    split = sum(objective(part).loss(counts) for part in parts)
    alone = sum(
        objective(with_own_step(objective, replace(part, step=None, place=None))).loss(counts) for part in parts
    )
    assert float(abs(split - whole)) < 1e-12
    assert float(abs(alone - whole)) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["beta_dpo", "lin_upper", "bco_pair"])
def test_resumed_equals_straight(name: str, folder: Path):
    assert main(words(folder, "straight", name)) == 0
    _resume_and_compare(folder, words(folder, "resumed", name, "--resume_from_checkpoint=last"))


def _resume_and_compare(folder: Path, resume: Sequence[str]) -> None:
    shutil.copytree(folder / "straight", folder / "resumed")
    after_a_crash(folder / "resumed", step=5)
    assert main(resume) == 0
    same_lines(folder / "resumed", folder / "straight")
    straight, resumed = (load_file(folder / run / "model.safetensors") for run in ("straight", "resumed"))
    for key, tensor in straight.items():
        assert torch.equal(tensor, resumed[key]), key


# ---- a reference that moves ----

TR_DPO = ["--reference.source=live", "--modifiers={name: tr_dpo, sync_steps: 2}"]


@pytest.mark.slow
def test_a_moving_reference_is_in_the_checkpoint(folder: Path):
    """TRL leaves it out: a resumed run goes on against the first reference, with other losses and no warning."""
    assert main(command(folder, "straight", *TR_DPO)) == 0
    _resume_and_compare(folder, command(folder, "resumed", *TR_DPO, "--resume_from_checkpoint=last"))
    (folder / "straight" / "checkpoint-5" / REFERENCE_FILE).stat()
    assert main(command(folder, "still", "--reference.source=live")) == 0
    assert lines(folder / "still") != lines(folder / "straight")


@pytest.mark.slow
def test_a_reference_that_is_lost_stops_a_resumed_run(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(command(folder, "run", *TR_DPO)) == 0
    after_a_crash(folder / "run", step=5)
    (folder / "run" / "checkpoint-5" / REFERENCE_FILE).unlink()
    capsys.readouterr()
    assert main(command(folder, "run", *TR_DPO, "--resume_from_checkpoint=last")) == 2
    assert REFERENCE_FILE in capsys.readouterr().err


@pytest.mark.slow
def test_a_hard_update_leaves_policy_and_reference_equal(folder: Path):
    """α = 1 after every step: from the second on each step starts where policy and reference agree, at log 2."""
    more = ["--reference.source=live", "--modifiers={name: tr_dpo, sync_steps: 1, sync_alpha: 1}"]
    assert main(command(folder, "run", *more, logging_steps=1, eval_share=0, max_steps=4, num_train_epochs=None)) == 0
    assert [line["loss"] for line in lines(folder / "run")] == pytest.approx([0.693147] * 4, abs=1e-5)


# ---- weights that are held near the first ones ----


@pytest.mark.slow
def test_l2_to_init_holds_weights_back(folder: Path):
    initial = load_file(folder / "model" / "model.safetensors")

    def moved(run: str, *more: str) -> float:
        assert main(command(folder, run, *more)) == 0
        return sum(
            float(((value - initial[key]) ** 2).sum())
            for key, value in load_file(folder / run / "model.safetensors").items()
        )

    free = moved("free")
    held = moved("held", "--regularizers={name: l2_init, coef: 100000}")
    assert held < free / 3
    assert any("loss/l2_init" in line for line in lines(folder / "held"))


@pytest.mark.slow
def test_the_penalty_is_the_formula_s(folder: Path):
    """One step of plain gradient descent moves the weights by the loss's gradient; a second one by the penalty's too.

    θ₂ = θ₁ − η·(∇loss + 2λ/n·(θ₁ − θ₀)), so the two runs differ after two steps by η·2λ/n·(θ₁ − θ₀) exactly.
    """
    keys = {"max_steps": 2, "num_train_epochs": None, "logging_steps": 1, "eval_share": 0, "save_steps": 1}
    plain = ["--optim=sgd", "--max_grad_norm=0", "--lr_scheduler_type=constant", "--token_budget=150"]
    assert main(command(folder, "free", *plain, **keys)) == 0
    assert main(command(folder, "held", *plain, "--regularizers={name: l2_init, coef: 50}", **keys)) == 0
    start = load_file(folder / "model" / "model.safetensors")
    first = load_file(folder / "free" / "checkpoint-1" / "model.safetensors")
    free, held = (load_file(folder / run / "model.safetensors") for run in ("free", "held"))
    count = sum(value.numel() for value in start.values())
    for key in start:
        pulled = 1e-3 * 2 * 50 / count * (first[key] - start[key])
        torch.testing.assert_close(free[key] - held[key], pulled, rtol=0.05, atol=1e-8)  # of float32 weights
    penalty = 50 / count * sum(float(((first[key] - start[key]) ** 2).sum()) for key in start)
    logged = [line["loss/l2_init"] for line in lines(folder / "held") if "loss" in line]
    assert logged == pytest.approx([0.0, penalty], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--lora.r=4"]], ids=["full", "lora"])
def test_wise_ft_saves_the_average(folder: Path, more: list[str]):
    assert main(command(folder, "tuned", *more)) == 0
    assert main(command(folder, "half", *more, "--regularizers={name: wise_ft, tuned_share: 0.25}")) == 0
    if more:
        tuned, half = (load_file(folder / run / "adapter_model.safetensors") for run in ("tuned", "half"))
        for key, value in tuned.items():
            share = 0.25 if "lora_B" in key else 1.0
            torch.testing.assert_close(half[key], share * value)
        return
    initial = load_file(folder / "model" / "model.safetensors")
    tuned, half = (load_file(folder / run / "model.safetensors") for run in ("tuned", "half"))
    for key, value in tuned.items():
        torch.testing.assert_close(half[key], 0.25 * value + 0.75 * initial[key])
    from align import average

    arguments = [f"--initial={folder / 'model'}", f"--tuned={folder / 'tuned'}", "--tuned_share=0.25"]
    assert average.main([*arguments, f"--output_dir={folder / 'averaged'}"]) == 0
    averaged = load_file(folder / "averaged" / "model.safetensors")
    for key, value in half.items():
        torch.testing.assert_close(averaged[key], value)
    assert average.main([*arguments, f"--output_dir={folder / 'averaged'}"]) == 2  # not over what is there
    step = max(line["step"] for line in lines(folder / "half"))
    last = [line for line in lines(folder / "half") if line["step"] == step and "eval/loss" in line][-1]
    before = [line for line in lines(folder / "tuned") if line["step"] == step and "eval/loss" in line][-1]
    assert last["eval/loss"] != before["eval/loss"], "what is evaluated at the end is what is saved"


# ---- numbers per token beyond log-probs ----


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--lora.r=4", "--reference.source=adapter_off"]], ids=["live", "adapter-off"])
def test_tdpo_compares_with_a_reference_of_each_step(folder: Path, more: list[str]):
    base = command(folder, "run", *(more or ["--reference.source=live"]), beta=None)
    assert main([*(word for word in base if "objective" not in word), "--objective.name=tdpo"]) == 0
    logged = [line for line in lines(folder / "run") if "loss" in line]
    assert logged[0]["ref_kl/chosen"] < logged[-1]["ref_kl/chosen"]
    assert all(line["ref_kl/chosen"] >= -1e-6 for line in logged)


@pytest.mark.slow
def test_number_losses_do_not_depend_on_the_split(folder: Path):
    """Averaged over the number tokens of the whole step, of which microbatches hold unequally many."""
    rows = [{"prompt": f"{i} and {i} is", "completion": f" {'7' * (i % 5)} or {i}."} for i in range(48)]
    write_rows(folder / "rows.jsonl", rows)
    objective = "--objective=[{name: sft}, {name: ntl_was, weight: 0.3}, {name: ntl_mse, weight: 0.1}]"
    for run, budget in (("whole", 10_000), ("split", 120)):
        base = command(folder, run, beta=None, token_budget=budget)
        own = [word for word in base if not word.startswith(("--objective.name", "--dataset_name"))]
        assert main([*own, f"--dataset_name={folder / 'rows.jsonl'}", objective]) == 0
    compare(lines(folder / "split"), lines(folder / "whole"))
    first = json.loads((folder / "whole" / "metrics.jsonl").read_text().splitlines()[0])
    assert 0 < first["eval/numbers/share"] < 1
