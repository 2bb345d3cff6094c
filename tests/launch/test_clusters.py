"""Scripts for clusters, with stand-ins for what only clusters have."""

from __future__ import annotations

import itertools
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support import REPOSITORY

ENGINES = REPOSITORY / "launch" / "accelerate"


def stand_in(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


def submitted(folder: Path, accelerate: str, *words: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """What the job script does, and what Slurm was asked for."""
    (folder / "bin").mkdir()
    stand_in(
        folder / "bin", "scontrol", f'echo "$@" >> {folder}/asked; [ "$1" = show ] && printf "first\\nsecond\\n"; true'
    )
    stand_in(folder / "bin", "srun", '[ "$1" = --kill-on-bad-exit=1 ] && shift; "$@"')
    stand_in(folder / "bin", "accelerate", f'printf "%s\\n" "$@" > {folder}/launched\n{accelerate}')
    environment = {
        **os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "17",
        "LAUNCHER": str(folder / "bin" / "accelerate"),
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "launch/slurm/train.sbatch", *words],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    asked = folder / "asked"
    return done, asked.read_text() if asked.is_file() else ""


@pytest.mark.parametrize("form", ["--output_dir {}", "--output_dir={}"])
def test_a_job_that_has_got_further_is_requeued(tmp_path: Path, form: str):
    run = tmp_path / "run of mine"
    output = [word.format(run) for word in form.split(" ")]
    saves = f'sleep 0.1; mkdir -p "{run}/checkpoint-5"; touch "{run}/checkpoint-5/manifest.json"; exit 1'
    done, asked = submitted(tmp_path, saves, "fsdp2_nodes.yaml", "--config", "a recipe.yaml", *output)
    assert done.returncode == 1, done.stderr
    assert "requeue 17" in asked
    launched = (tmp_path / "launched").read_text().splitlines()
    assert launched[:3] == ["launch", "--config_file", "launch/accelerate/fsdp2_nodes.yaml"]
    pairs = dict(itertools.pairwise(launched))
    assert pairs["--num_machines"] == "2"
    assert pairs["--num_processes"] == "8"
    assert pairs["--machine_rank"] == "1"
    assert pairs["--main_process_ip"] == "first"
    assert pairs["--config"] == "a recipe.yaml"
    assert launched[-2:] == ["--resume_from_checkpoint", "auto"]


def test_a_job_that_fails_at_once_is_not(tmp_path: Path):
    done, asked = submitted(tmp_path, "exit 2", "ddp_nodes.yaml", "--output_dir", str(tmp_path / "run"))
    assert done.returncode == 2
    assert "requeue" not in asked


def test_a_job_that_succeeds_is_not(tmp_path: Path):
    done, asked = submitted(tmp_path, "exit 0", "ddp_nodes.yaml", "--output_dir", str(tmp_path / "run"))
    assert done.returncode == 0
    assert "requeue" not in asked


def test_a_job_without_a_folder_says_so(tmp_path: Path):
    done, _ = submitted(tmp_path, "exit 0", "ddp_nodes.yaml", "--config", "recipe.yaml")
    assert done.returncode == 2
    assert "name --output_dir" in done.stderr


def test_engines_differ_from_their_rehearsals_in_processes_only():
    """What a laptop rehearses is what a cluster runs."""
    for path in ENGINES.glob("cpu_*.yaml"):
        own, real = (yaml.safe_load(p.read_text()) for p in (path, ENGINES / path.name.removeprefix("cpu_")))
        assert own.pop("num_processes") == 2
        assert own.pop("use_cpu") in (True, False)
        real.pop("num_processes")
        assert own == real, path.name


def test_every_engine_is_told_how_it_is_launched():
    for path in ENGINES.glob("*.yaml"):
        head = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert any(f"--config_file launch/accelerate/{path.name} " in line for line in head), path.name
        assert yaml.safe_load(path.read_text())["num_machines"] in (1, 2)
