"""Two processes give the trajectory of one: unequal bins, an uneven last step, likelihood terms included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from align.saving import STATE
from tests.equivalence.test_resume import command
from tests.equivalence.worlds import save_model, save_pairs, write_rows
from tests.support import REPOSITORY

# float32 sums over two processes are added in another order; ten updates at 1e-3 carry that along.
FLOAT32_TRAJECTORY = {"rtol": 2e-4, "atol": 2e-5}
OBJECTIVE = '--objective=[{"name":"dpo","beta":0.5},{"name":"sft","leg":"chosen","weight":0.5}]'
REMEMBERING = [
    '--objective=[{"name":"bco","beta":0.5,"prompt_encoder":"policy"},{"name":"kto"},{"name":"sft","weight":0.5}]',
    '--token_weights=[{"name":"talr"},{"name":"flow"},{"name":"goldfish","k":3}]',
]


def launch(
    folder: Path, output: str, processes: int, *more: str, objective: Sequence[str] = (OBJECTIVE,)
) -> list[dict]:
    words = [word for word in command(folder, output, *more, rows_per_step=7) if not word.startswith("--objective")]
    words = [word for word in words if not word.startswith("--beta")]
    config = ["--config_file=launch/accelerate/cpu_ddp.yaml", f"--num_processes={processes}"]
    if processes == 1:
        config = ["--config_file=launch/accelerate/single.yaml"]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *config, "align/train.py", *objective, *words],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"on each of {processes} processes" in done.stdout  # else the test compares a thing with itself
    return [json.loads(line) for line in (folder / output / "metrics.jsonl").read_text().splitlines()]


def compare(found: list[dict], wanted: list[dict]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in wanted]
    for a, b in zip(found, wanted, strict=True):
        assert a.keys() == b.keys()
        for key in b:
            if not key.startswith("time/"):
                np.testing.assert_allclose(a[key], b[key], err_msg=f"step {b['step']}, {key}", **FLOAT32_TRAJECTORY)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], pytest.param(["--lora.r=4"], marks=pytest.mark.all)], ids=["full", "lora"])
def test_two_processes_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]):
    save_model(tmp_path / "model")
    save_pairs(tmp_path / "pairs.jsonl")
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache-of-one"))
    one = launch(tmp_path, "one", 1, *more)
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache-of-two"))  # so that the reference pass is shared out too
    two = launch(tmp_path, "two", 2, *more)
    compare(two, one)
    assert one[-1]["eval/loss/likelihood"] < one[0]["eval/loss/likelihood"]


@pytest.mark.slow
def test_what_is_remembered_is_of_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Reward shift and KL are means, and τ a median, over the rows of both; density ratios are one regression's."""
    save_model(tmp_path / "model")
    save_pairs(tmp_path / "pairs.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    # Unequal lengths of gold, so that the median of one process would be another.
    write_rows(tmp_path / "pairs.jsonl", [row | {"gold": f" {'so ' * (i % 9)}{i}."} for i, row in enumerate(rows)])
    states, metrics = [], []
    for name, processes in (("one", 1), ("two", 2)):
        monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / f"cache-of-{name}"))
        metrics.append(launch(tmp_path, name, processes, "--num_train_epochs=0.5", objective=REMEMBERING))
        stored = json.loads((tmp_path / name / "checkpoint-5" / STATE).read_text())
        states.append({**stored["objective_state"], **stored["weight_state"]})
    compare(metrics[1], metrics[0])
    of_one, of_two = states
    assert set(of_one) == set(of_two) == {"bco/reward_total", "bco/reward_count", "kto/kl", "talr/gold", "flow/gold"}
    for key, entry in of_one.items():
        found, wanted = (np.array([float(value) for value in each["values"]]) for each in (of_two[key], entry))
        np.testing.assert_allclose(found, wanted, err_msg=key, **FLOAT32_TRAJECTORY)
    assert float(of_one["bco/reward_count"]["values"][0]) == 5 * 7
