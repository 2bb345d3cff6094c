"""What each engine takes on two CPU processes: memory of a process, seconds and our own communication per step.

    python -m launch.bench.engines [--shape 16m] [--steps 8] [--into docs/scale.json]

Memory is the most a process has had: when the model is there and not yet divided, and at the end. Counted are the
operations that our code starts from Python (sums, gathers, broadcasts), between the first step and the last; what
engines do inside (gradients, shards) is theirs. A step should take one small sum and nothing else; the last step logs
and evaluates, and is left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from launch.bench.workloads import SHAPES, made_up, make_model, write_rows

REPOSITORY = Path(__file__).resolve().parents[2]
ENGINES = ("single", "cpu_ddp", "cpu_zero1", "cpu_zero2", "cpu_zero3", "cpu_fsdp2")
OPERATIONS = ("all_reduce", "all_gather_object", "broadcast", "all_gather", "gather_object", "broadcast_object_list")
SERVED = ("deepspeed", "torch/distributed", "torch/nn/parallel", "accelerate")
"""Callers that are an engine, by a part of their path."""


def counted(started: Counter[str], sizes: Counter[str]) -> None:
    """Wraps what ``torch.distributed`` offers, so that what is called from our code is counted."""
    import torch.distributed as dist

    def wrap(name: str) -> None:
        original = getattr(dist, name)

        def call(*arguments: Any, **options: Any) -> Any:
            caller = sys._getframe(1).f_code.co_filename
            if not any(part in caller for part in SERVED):
                started[name] += 1
                sizes[name] += sum(each.nbytes for each in arguments if hasattr(each, "nbytes"))
            return original(*arguments, **options)

        setattr(dist, name, call)

    for name in OPERATIONS:
        wrap(name)


def peak() -> float:
    """Most memory this process has had, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def inner(words: list[str], output: Path) -> int:
    """Trains in this process, as one of several, and writes what it took."""
    from transformers import TrainerCallback, trainer

    from align.train import main

    started: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    marks: list[tuple[float, dict[str, int], dict[str, int]]] = []

    read = [0.0]

    class Marks(TrainerCallback):
        def on_init_end(self, *arguments: Any, **options: Any) -> None:
            read[0] = peak()

        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            marks.append((time.perf_counter(), dict(started), dict(sizes)))

    trainer.DEFAULT_CALLBACKS.append(Marks)
    counted(started, sizes)
    status = main(words)
    first, last = marks[1], marks[-2]
    steps = len(marks) - 3
    taken = [after[0] - before[0] for before, after in itertools.pairwise(marks[1:-1])]
    found = {
        "read_mib": read[0],
        "peak_mib": peak(),
        "seconds": statistics.median(taken),
        "operations_per_step": {name: (n - first[1].get(name, 0)) / steps for name, n in last[1].items()},
        "bytes_per_step": {name: (n - first[2].get(name, 0)) / steps for name, n in last[2].items()},
    }
    rank = os.environ.get("RANK", "0")
    output.with_suffix(f".{rank}").write_text(json.dumps(found))
    return status


def measured(folder: Path, engine: str, steps: int) -> dict[str, Any]:
    """One engine, in processes of its own: the first one's numbers, and memory of all."""
    keys = {
        "model_name_or_path": folder / "model", "dataset_name": folder / "rows.jsonl", "output_dir": folder / engine,
        "objective": "kto", "max_steps": steps, "rows_per_step": 8, "save_strategy": "no", "logging_steps": 1000,
        "eval_share": 0, "learning_rate": 1e-5,
    }  # fmt: skip
    words = [f"--{key}={value}" for key, value in keys.items()]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port=0"]
    launch += [f"--config_file=launch/accelerate/{engine}.yaml", "-m", "launch.bench.engines", "--inner"]
    done = subprocess.run(
        [*launch, str(folder / f"{engine}.found"), *words],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ALIGN_CACHE": str(folder / "cache"), "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"{engine} failed:\n{done.stderr[-3000:]}")
    ranks = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{engine}.[0-9]"))]
    return ranks[0] | {key: [each[key] for each in ranks] for key in ("read_mib", "peak_mib")}


def main() -> int:
    """Measures every engine and prints a table."""
    if sys.argv[1:2] == ["--inner"]:
        return inner(sys.argv[3:], Path(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="16m")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--into", type=Path, help="file to keep the numbers in")
    options = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = list(made_up("hh", 200))
        make_model(folder / "model", options.shape, (str(value) for row in rows for value in row.values()))
        pairs = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
        write_rows(folder / "rows.jsonl", pairs, folder / "model", min(len(pairs), 8 * options.steps))
        for engine in ENGINES:
            found = results[engine] = measured(folder, engine, options.steps)
            ours = ", ".join(
                f"{count:g} {name} of {found['bytes_per_step'].get(name, 0):g} bytes"
                for name, count in found["operations_per_step"].items()
                if count
            )
            read, most = (" and ".join(f"{mib:,.0f}" for mib in found[key]) for key in ("read_mib", "peak_mib"))
            took = f"read {read} MiB, peak {most} MiB  {found['seconds']:6.3f} s a step"
            print(f"{engine:<10} {took}  ours: {ours or '–'}", flush=True)
    if options.into:
        setup = {"shape": options.shape, "steps": options.steps}
        options.into.write_text(json.dumps(setup | {"engines": results}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
