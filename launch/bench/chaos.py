"""Kills a run again and again, at random moments, and compares what it comes to with a run that nobody disturbed.

    python -m launch.bench.chaos [--kills 50] [--processes 1] [--engine cpu_ddp] [--async_save] [--output chaos.json]

Every attempt is the same command with ``--resume_from_checkpoint auto``; its whole process group gets SIGKILL a random
time after it has begun to start (a fifth of the kills), to train (half) or to write a checkpoint (the rest). Runs that
reach their end are compared with the undisturbed one, weights and metrics bit for bit, and another is begun until all
kills are used up; the last one is let finish. Exits with 1 where anything differs.
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
from dataclasses import dataclass
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


MOMENTS = {"starting": (0.2, 20.0), "training": (0.5, 6.0), "writing": (0.3, 0.05)}
"""Shares of kills by what the run has begun to do, and most seconds from there."""


@dataclass(frozen=True)
class Kill:
    """When to end an attempt: so many seconds after it has begun to do something."""

    moment: str
    after: float

    @classmethod
    def drawn(cls, rng: random.Random) -> Kill:
        """At random."""
        (moment,) = rng.choices(list(MOMENTS), [share for share, _ in MOMENTS.values()])
        return cls(moment, rng.uniform(0.0, MOMENTS[moment][1]))

    def has_begun(self, now: Traces, *, moved: bool, tidied: bool) -> bool:
        """Whether the run does it.

        Args:
            now: what the run directory tells.
            moved: its metrics were written to in this attempt.
            tidied: what an earlier kill left half written is no longer there.
        """
        if self.moment == "training":  # a step after the one it went on from, whether or not it was made before
            return moved and now.last_step > now.checkpoint
        return self.moment == "starting" or (tidied and now.writes)


@dataclass(frozen=True)
class Traces:
    """What a run directory tells of where its run is."""

    metrics: tuple[int, int]
    last_step: int
    checkpoint: int
    writes: bool

    @classmethod
    def of(cls, run: Path) -> Traces:
        """As they are now; files may go away meanwhile."""
        path, metrics, last = run / "metrics.jsonl", (0, 0), 0
        with contextlib.suppress(OSError, ValueError, IndexError):
            metrics = (path.stat().st_mtime_ns, path.stat().st_size)
            last = json.loads(path.read_text().splitlines()[-1])["step"]
        steps = [int(folder.name.rpartition("-")[2]) for folder in run.glob("checkpoint-*")]
        return cls(metrics, last, max(steps, default=0), any(run.glob(".partial/checkpoint-*")))


def attempt(words: list[str], cache: Path, run: Path, kill: Kill | None) -> tuple[int | None, str]:
    """Starts the run, and kills it; its exit status (None where it was killed) and output."""
    with tempfile.TemporaryFile("w+") as out:
        before, begun, tidied = Traces.of(run), None, False
        child = subprocess.Popen(
            words, cwd=REPOSITORY, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "ALIGN_CACHE": str(cache)},
        )  # fmt: skip
        while (status := child.poll()) is None:
            if kill is not None and begun is None:
                now = Traces.of(run)
                tidied = tidied or not now.writes
                if kill.has_begun(now, moved=now.metrics != before.metrics, tidied=tidied):
                    begun = time.monotonic()
            if kill is not None and begun is not None and time.monotonic() - begun >= kill.after:
                # Launchers start their processes in sessions of their own.
                for process in [*psutil.Process(child.pid).children(recursive=True), psutil.Process(child.pid)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
                child.wait()
                break
            time.sleep(0.002 if kill is not None else 0.1)
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
        words = command(folder, "straight", options.processes, options.engine)
        status, printed = attempt(words, folder / "cache", folder / "straight", None)
        if status != 0:
            raise SystemExit(f"the undisturbed run failed:\n{printed[-3000:]}")
        wanted = left(folder / "straight")
        kills, finished, differing = 0, 0, 0
        moments = dict.fromkeys(MOMENTS, 0)
        while kills < options.kills or not finished or (folder / "run").exists():
            words = command(folder, "run", options.processes, options.engine, *more)
            kill = Kill.drawn(rng) if kills < options.kills else None
            status, printed = attempt(words, folder / "cache", folder / "run", kill)
            if status is None and kill is not None:
                kills += 1
                moments[kill.moment] += 1
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
    print(f"{kills} kills ({', '.join(f'{count} while {name}' for name, count in moments.items())})")
    print(f"{finished} runs finished, {finished - differing} identical to the undisturbed one in weights and metrics")
    if options.output:
        numbers = {"kills": kills, "moments": moments, "finished": finished, "differing": differing}
        options.output.write_text(json.dumps(vars(options) | numbers, indent=1, default=str) + "\n")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
