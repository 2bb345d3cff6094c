"""Kills a run again and again, at random moments, and compares what it comes to with a run that nobody disturbed.

    python -m launch.bench.chaos [--kills 50] [--processes 1] [--engine cpu_ddp] [--async_save] [--output chaos.json]

Every attempt is the same command with ``--resume_from_checkpoint auto``; its whole process group gets SIGKILL after a
random time, while it starts, trains, evaluates or writes a checkpoint. Runs that reach their end are compared with the
undisturbed one, weights and metrics bit for bit, and another is begun until all kills are used up; the last one is let
finish. Exits with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from launch.bench.workloads import made_up, make_model, write_rows

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS, SAVE_STEPS, ROWS = 60, 3, 120


def command(folder: Path, output: str, processes: int, engine: str, *more: str) -> list[str]:
    """What is started each time."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "accelerate.commands.launch", f"--config_file=launch/accelerate/{engine}.yaml"]
        launcher += [f"--num_processes={processes}", "--main_process_port=0"]
    keys = {
        "model_name_or_path": folder / "model", "dataset_name": folder / "rows.jsonl", "output_dir": folder / output,
        "objective": "dpo", "max_steps": STEPS, "rows_per_step": 4, "token_budget": 700, "learning_rate": 1e-3,
        "save_steps": SAVE_STEPS, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 10,
        "lr_scheduler_type": "cosine", "resume_from_checkpoint": "auto",
    }  # fmt: skip
    return [*launcher, "align/train.py", *(f"--{key}={value}" for key, value in keys.items()), *more]


def attempt(words: list[str], cache: Path, kill_after: float | None) -> tuple[int | None, str]:
    """Starts the run, and kills it after so many seconds; its exit status (None where it was killed) and output."""
    with tempfile.TemporaryFile("w+") as out:
        child = subprocess.Popen(
            words, cwd=REPOSITORY, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "ALIGN_CACHE": str(cache)},
        )  # fmt: skip
        status = None
        try:
            status = child.wait(kill_after)
        except subprocess.TimeoutExpired:
            # Launchers start their processes in sessions of their own.
            for process in [*psutil.Process(child.pid).children(recursive=True), psutil.Process(child.pid)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            child.wait()
        out.seek(0)
        return status, out.read()


def left(run: Path) -> dict[str, Any]:
    """What a finished run is compared by."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]
    return {"weights": (run / "model.safetensors").read_bytes(), "metrics": metrics}


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What is other, a line each."""
    told = [] if found["weights"] == wanted["weights"] else ["weights"]
    steps = [[line["step"] for line in each["metrics"]] for each in (found, wanted)]
    if steps[0] != steps[1]:
        return [*told, f"steps of metrics.jsonl: {steps[0]}, not {steps[1]}"]
    for mine, other in zip(found["metrics"], wanted["metrics"], strict=True):
        keys = [key for key in {**mine, **other} if mine.get(key) != other.get(key)]
        told += [f"step {mine['step']}: {key} is {mine.get(key)}, not {other.get(key)}" for key in keys[:4]]
    return told[:12]


def where(run: Path, printed: str) -> str:
    """What a killed run was doing, as far as its traces tell."""
    if list(run.glob(".partial/checkpoint-*")):
        return "writing a checkpoint"
    if "\nstep " in printed or "left 0:" in printed:
        return "training"
    return "starting" if "✓" not in printed else "between the checks and the first line"


def main() -> int:
    """Kills and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--engine", default="cpu_ddp", help="a file of launch/accelerate, for several processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="file for the numbers")
    parser.add_argument("--async_save", action="store_true", help="write checkpoints while training goes on")
    options = parser.parse_args()
    more = ["--async_save"] if options.async_save else []
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = list(made_up("hh", ROWS))
        make_model(folder / "model", "tiny", (str(value) for row in rows for value in row.values()))
        pairs = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
        write_rows(folder / "rows.jsonl", pairs, folder / "model", ROWS * 3 // 4)
        started = time.time()
        words = command(folder, "straight", options.processes, options.engine)
        status, printed = attempt(words, folder / "cache", None)
        if status != 0:
            raise SystemExit(f"the undisturbed run failed:\n{printed[-3000:]}")
        whole, wanted = time.time() - started, left(folder / "straight")
        print(f"undisturbed: {whole:.1f} s", flush=True)
        kills, finished, differing = 0, 0, 0
        moments: dict[str, int] = {}
        while kills < options.kills or not finished or (folder / "run").exists():
            words = command(folder, "run", options.processes, options.engine, *more)
            limit = rng.uniform(0.2, 1.0) * whole if kills < options.kills else None
            status, printed = attempt(words, folder / "cache", limit)
            if status is None:
                kills += 1
                moment = where(folder / "run", printed)
                moments[moment] = moments.get(moment, 0) + 1
            elif status != 0:
                print(f"an attempt failed with status {status}:\n{printed[-3000:]}")
                return 1
            else:
                finished += 1
                found = left(folder / "run")
                same = found == wanted
                differing += not same
                for line in [] if same else differences(found, wanted):
                    print(f"  {line}", flush=True)
                print(
                    f"run {finished} finished after {kills} kills in all: {'identical' if same else 'OTHER'}",
                    flush=True,
                )
                shutil.rmtree(folder / "run")
    print(f"{kills} kills ({', '.join(f'{count} while {name}' for name, count in sorted(moments.items()))})")
    print(f"{finished} runs finished, {finished - differing} identical to the undisturbed one in weights and metrics")
    if options.output:
        numbers = {"kills": kills, "moments": moments, "finished": finished, "differing": differing}
        options.output.write_text(json.dumps(vars(options) | numbers, indent=1, default=str) + "\n")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
