"""A run that stops and goes on is the run that never stopped, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from align.train import main
from tests.support import REPOSITORY

pytestmark = pytest.mark.usefixtures("plain_runs")

KEYS = {
    "rows_per_step": 8,
    "token_budget": 400,
    "num_train_epochs": 2,
    "learning_rate": 1e-3,
    "logging_steps": 2,
    "save_steps": 5,  # between two log lines, so that half a line's sums are in the checkpoint
    "save_total_limit": 10,
    "eval_share": 0.2,
    "beta": 0.5,
}


def command(folder: Path, output: str, *more: str, **keys: object) -> list[str]:
    values = {key: value for key, value in {**KEYS, **keys}.items() if value is not None}
    return [
        "--objective.name=dpo",
        f"--model_name_or_path={folder / 'model'}",
        f"--dataset_name={folder / 'pairs.jsonl'}",
        f"--output_dir={folder / output}",
        *(f"--{key}={value}" for key, value in values.items()),
        *more,
    ]


def same_lines(first: Path, second: Path) -> None:
    """Asserts equality and, where it fails, names the values that differ."""
    pairs = list(zip(lines(first), lines(second), strict=True))
    differing = {
        (a["step"], key): (a.get(key), b.get(key)) for a, b in pairs for key in {**a, **b} if a.get(key) != b.get(key)
    }
    assert not differing


def lines(run: Path) -> list[dict]:
    """Metrics without what a clock says."""
    parsed = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in parsed]


def after_a_crash(run: Path, step: int) -> None:
    """What is left when a process dies some time after a checkpoint: later files gone, a line half written."""
    for checkpoint in run.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    for name in ("model.safetensors", "adapter_model.safetensors", "README.md", "report.html"):
        (run / name).unlink(missing_ok=True)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')


@pytest.mark.slow
@pytest.mark.whole_runs
@pytest.mark.parametrize(
    "more",
    [
        ["--lr_scheduler_type=cosine", "--warmup_steps=0.2"],
        ["--lora.r=4", "--lora.lora_dropout=0.1", "--allow_dropout"],
        ["--lora.r=4", "--reference.source=adapter_off"],
    ],
    ids=["full", "lora-dropout", "adapter-off"],
)
def test_resumed_equals_straight(folder: Path, more: list[str]):
    assert main(command(folder, "straight", *more)) == 0
    shutil.copytree(folder / "straight", folder / "resumed")
    after_a_crash(folder / "resumed", step=5)
    assert main(command(folder, "resumed", *more, "--resume_from_checkpoint=last")) == 0
    same_lines(folder / "resumed", folder / "straight")
    name = "adapter_model.safetensors" if "--lora.r=4" in more else "model.safetensors"
    straight, resumed = (load_file(folder / run / name) for run in ("straight", "resumed"))
    assert straight.keys() == resumed.keys()
    for key, tensor in straight.items():
        assert torch.equal(tensor, resumed[key]), key
    results = [json.loads((folder / run / "results.json").read_text())["results"] for run in ("straight", "resumed")]
    assert results[0] == results[1]
    assert "resumed from step 5" in (folder / "resumed" / "README.md").read_text()


@pytest.mark.slow
def test_the_last_step_of_an_epoch_resumes_in_the_next(folder: Path):
    """The plan's position is (epoch, step): a checkpoint at an epoch's end goes on with the next epoch's order."""
    assert main(command(folder, "straight", save_strategy="epoch", save_steps=None)) == 0
    shutil.copytree(folder / "straight", folder / "resumed")
    step = sorted(int(path.name.split("-")[1]) for path in (folder / "straight").glob("checkpoint-*"))[0]
    after_a_crash(folder / "resumed", step=step)
    keys = {"save_strategy": "epoch", "save_steps": None}
    assert main(command(folder, "resumed", "--resume_from_checkpoint=last", **keys)) == 0
    same_lines(folder / "resumed", folder / "straight")


@pytest.mark.slow
def test_reference_is_read_and_never_recomputed_from_a_trained_policy(folder: Path, capsys: pytest.CaptureFixture):
    assert main(command(folder, "run")) == 0
    after_a_crash(folder / "run", step=5)
    shutil.rmtree(folder / "cache" / "reference")
    assert main(command(folder, "run", "--resume_from_checkpoint=last")) == 2
    assert "reference log-probs of this run are no longer in the cache" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_killed_in_the_middle_and_started_again(folder: Path):
    """A real process, launched as users launch it, killed with SIGKILL once it has a checkpoint."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--cpu", "align/train.py"]
    keys = {"num_train_epochs": 10, "save_steps": 3}

    def run(output: str, *more: str) -> subprocess.Popen:
        return subprocess.Popen(
            [*launch, *command(folder, output, *more, **keys)],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )

    assert main(command(folder, "straight", **keys)) == 0
    killed = run("killed")
    deadline = time.monotonic() + 120
    while not list((folder / "killed").glob("checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (folder / "killed" / "model.safetensors").exists()
    again = run("killed", "--resume_from_checkpoint=last")
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    same_lines(folder / "killed", folder / "straight")
