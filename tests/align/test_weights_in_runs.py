"""Token weights in whole runs: evaluation knows none of them, and TALR's τ comes from where it should."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from align.saving import STATE
from align.train import main
from tests.equivalence.runs import write_rows
from tests.equivalence.test_resume import command, lines

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("plain_runs")]


def run(folder: Path, output: str, *more: str, token_budget: int) -> list[dict]:
    rows = [{"prompt": f"{i} says", "completion": f" {'so ' * (i % 9)}{i}."} for i in range(24)]
    write_rows(folder / "rows.jsonl", rows)
    words = command(folder, output, *more, beta=None, token_budget=token_budget, logging_steps=1, save_steps=1)
    own = [word for word in words if not word.startswith(("--objective", "--dataset_name"))]
    assert main([*own, "--objective=sft", f"--dataset_name={folder / 'rows.jsonl'}"]) == 0
    return lines(folder / output)


def tau_after(run: Path, step: int) -> float:
    stored = json.loads((run / f"checkpoint-{step}" / STATE).read_text())
    return float(stored["weight_state"]["talr/gold"]["values"][0])


def test_evaluation_uses_no_weights(folder: Path):
    """Before the first step the policy is the same, so its loss must be."""
    weights = "--token_weights=[{name: goldfish, k: 2, h: 3}, {name: talr}, {name: flow}]"
    plain, weighted = run(folder, "plain", token_budget=200), run(folder, "weighted", weights, token_budget=200)
    assert weighted[0]["eval/loss"] == plain[0]["eval/loss"]
    training = [next(line for line in each if "loss" in line) for each in (plain, weighted)]
    assert training[1]["loss"] < 0.8 * training[0]["loss"]
    for metric in ("goldfish/dropped", "talr/weight", "flow/weight", "likelihood/unweighted"):
        assert metric in training[1]
        assert metric not in training[0]
    assert 0.2 < training[1]["goldfish/dropped"] < 0.95
    assert not any("goldfish" in key or "talr" in key for key in weighted[0])


def test_talr_is_of_the_step_itself_or_of_the_step_before(folder: Path):
    """In one microbatch τ is the step's own median; in several it is that of the step before, and none in the first."""
    talr = "--token_weights=talr"
    whole, split = run(folder, "whole", talr, token_budget=10_000), run(folder, "split", talr, token_budget=150)
    whole, split = ([line for line in each if "loss" in line] for each in (whole, split))
    for number, line in enumerate(whole, start=1):
        assert line["talr/tau"] == pytest.approx(tau_after(folder / "whole", number), rel=1e-5)
    assert "talr/tau" not in split[0]
    assert split[0]["talr/weight"] == 1.0
    assert split[0]["loss"] == pytest.approx(split[0]["likelihood/unweighted"])
    for number, line in enumerate(split[1:], start=1):
        assert line["talr/tau"] == pytest.approx(tau_after(folder / "split", number), rel=1e-5)
        assert line["loss"] < 0.6 * line["likelihood/unweighted"]
    # The same rows under the same policy: the first step's median does not depend on the split.
    assert tau_after(folder / "split", 1) == pytest.approx(tau_after(folder / "whole", 1), rel=1e-5)
    assert math.isfinite(tau_after(folder / "split", 1))
