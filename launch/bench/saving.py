"""What saving costs a run: no checkpoints, checkpoints that training waits for, and ``train.async_save``.

    python -m launch.bench.saving [--shape 16m] [--steps 24] [--every 4] [--rounds 3] [--lora] [--output saving.json]

The three take turns, in one process each time anew, so that what else the machine does meets all alike. Per side:
seconds from the first step's end to the last checkpoint's renaming, the share of it that the loop spent in saving
(copying or writing, and waiting for the write before), and how much longer that is than without checkpoints.
Medians over rounds. Numbers of a machine that does something else at the time say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from launch.bench.workloads import SHAPES, made_up, make_model, write_rows

REPOSITORY = Path(__file__).resolve().parents[2]
SIDES = {
    "no checkpoints": ("--save_strategy=no",),
    "waits": (),
    "async_save": ("--async_save",),
}


def inner(words: list[str], output: Path) -> int:
    """Trains in this process, and writes how long it took and how much of that was saving."""
    from align.train import main
    from align.trainer import ObjectiveTrainer, _Bookkeeping

    ends: list[float] = []
    saving: list[float] = []

    def timed(name: str) -> None:
        original = getattr(ObjectiveTrainer, name)

        def call(self: Any, *arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return original(self, *arguments, **options)
            finally:
                if sys._getframe(1).f_code.co_name != "_save_checkpoint":  # which has counted it already
                    saving.append(time.perf_counter() - started)
                    ends.append(time.perf_counter())

        setattr(ObjectiveTrainer, name, call)

    timed("_save_checkpoint")
    timed("finish_writing")
    step_end = _Bookkeeping.on_step_end

    def on_step_end(self: Any, *arguments: Any, **options: Any) -> None:
        step_end(self, *arguments, **options)
        ends.append(time.perf_counter())

    _Bookkeeping.on_step_end = on_step_end
    status = main(words)
    output.write_text(json.dumps({"seconds": max(ends) - min(ends), "saving": sum(saving)}))
    return status


def measured(folder: Path, side: str, options: argparse.Namespace) -> dict[str, float]:
    """One run of one side."""
    keys = {
        "model_name_or_path": folder / "model", "dataset_name": folder / "rows.jsonl", "output_dir": folder / "run",
        "objective": "dpo", "max_steps": options.steps, "rows_per_step": 4, "eval_share": 0, "learning_rate": 1e-5,
        "logging_steps": 1000,
    }  # fmt: skip
    words = [f"--{key}={value}" for key, value in keys.items()]
    words += [f"--save_steps={options.every}"] if side != "no checkpoints" else []
    words += [*SIDES[side], *(["--lora.r=16"] if options.lora else [])]
    found = folder / "found.json"
    done = subprocess.run(
        [sys.executable, "-m", "launch.bench.saving", "--inner", str(found), *words],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
        env={**os.environ, "ALIGN_CACHE": str(folder / "cache"), "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    shutil.rmtree(folder / "run")
    return json.loads(found.read_text())


def main() -> int:
    """Measures the sides in turn and prints a table."""
    if sys.argv[1:2] == ["--inner"]:
        return inner(sys.argv[3:], Path(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="16m")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--every", type=int, default=4, help="steps between checkpoints")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lora", action="store_true", help="train an adapter")
    parser.add_argument("--output", type=Path, help="file for the numbers")
    options = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = list(made_up("hh", 200))
        make_model(folder / "model", options.shape, (str(value) for row in rows for value in row.values()))
        pairs = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
        write_rows(folder / "rows.jsonl", pairs, folder / "model", min(len(pairs), 4 * options.steps))
        for _ in range(options.rounds):
            for side in SIDES:
                runs[side].append(measured(folder, side, options))
    plain = statistics.median(run["seconds"] for run in runs["no checkpoints"])
    print("| checkpoints | seconds | in saving | longer than without |\n|---|---|---|---|")
    for side, found in runs.items():
        seconds = statistics.median(run["seconds"] for run in found)
        share = statistics.median(run["saving"] / run["seconds"] for run in found)
        print(f"| {side} | {seconds:.2f} | {share:.1%} | {seconds / plain - 1:+.1%} |")
    if options.output:
        options.output.write_text(json.dumps(vars(options) | {"runs": runs}, indent=1, default=str) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
