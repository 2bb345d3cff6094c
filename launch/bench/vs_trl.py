"""Speed and memory against TRL: same model, same rows, same global batch, same optimizer, taking turns in one run.

    make bench        or: .venv/bin/python -m launch.bench.vs_trl [--case hh] [--shape 16m] [--lora] [--whole] ...

Three sides, each in a process of its own, in the order A B C A B C: ours at its defaults; TRL at its defaults (the
reference model in every step, activations checkpointed, all rows of a step at once); and TRL at its best: reference
precomputed, no checkpointing, the number of rows per microbatch that is fastest here, which is tried out first.

Without ``--whole`` optimizer steps after the first two are timed. With it, whole runs over one epoch from the start of
the process to its end: imports, preparation, reference pass, steps and saving. Losses of all sides must agree, or
nothing is printed. Quote medians: machines are noisy. ``make bench`` runs what ``docs/performance.md`` shows.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launch.bench.workloads import CASES, SHAPES, make_model, rows_of, write_rows

SIDES = ("ours", "trl", "trl-best")
WARM_UP = 2
MICRO_BATCHES = (1, 2, 4, 8)
TOLERANCE = 1e-3
"""How far losses may be apart: float32 sums in another order, after some steps of both."""
SPLIT_TOLERANCE = 0.01
"""The same, as a share, where TRL's loss depends on how a step is split into microbatches."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is compared."""

    case: str = "hh"
    shape: str = "16m"
    lora: bool = False
    whole: bool = False
    rounds: int = 2
    steps: int = 6
    batch: int = 8

    def __str__(self) -> str:
        kind = "whole runs" if self.whole else "steps"
        return f"{self.case}, {self.shape}, {'LoRA' if self.lora else 'full'}, {kind}"


TABLE = (
    Setup(case="hh", shape="135m", steps=4, batch=4),
    Setup(case="hh", steps=5),
    Setup(case="long", steps=5),
    Setup(case="tpo", steps=5),
    Setup(case="hh", whole=True, steps=26),
    Setup(case="long", whole=True, steps=26),
    Setup(case="turns", steps=5),
    Setup(case="unpaired", steps=5),
    Setup(case="hh", lora=True, steps=5),
    Setup(case="tpo", whole=True, steps=26),
    Setup(case="hh", shape="stories260k", steps=12),
    Setup(case="long", shape="135m", steps=4, batch=4),
    Setup(case="hh", shape="135m", lora=True, steps=4, batch=4),
)
"""What ``make bench`` measures, the most telling first."""


def measure(folder: Path, name: str, setup: Setup, micro: int = 0) -> dict[str, Any]:
    """One side in a fresh process with a fresh cache."""
    for each in ("ours", "trl", "cache"):
        shutil.rmtree(folder / each, ignore_errors=True)
    words = ["--folder", folder, "--case", setup.case, "--steps", setup.steps, "--batch", setup.batch]
    words += ["--micro", micro, *(["--lora"] if setup.lora else []), *(["--whole"] if setup.whole else [])]
    started = time.time()
    with open(folder / "out.txt", "w+") as out, open(folder / "err.txt", "w+") as err:
        child = subprocess.Popen(
            [sys.executable, "-m", "launch.bench.sides", name, *map(str, words)],
            env={**os.environ, "ALIGN_CACHE": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "false"},
            stdout=out, stderr=err,
        )  # fmt: skip
        _, status, used = os.wait4(child.pid, 0)
        taken = time.time() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        lines = [line for line in out.read().splitlines() if line.startswith("RESULT ")]
        if not lines:
            err.seek(0)
            raise SystemExit(f"{name} failed:\n{err.read()[-3000:]}")
    result = json.loads(lines[0].removeprefix("RESULT "))
    ends = result["ends"]
    result |= {"first_step": ends[0] - started, "whole": taken, "peak_mib": used.ru_maxrss / 1024}
    result["seconds"] = [after - before for before, after in itertools.pairwise(ends[WARM_UP - 1 :])]
    return result


def fastest_micro(folder: Path, setup: Setup) -> int:
    """TRL's rows per microbatch under which it is fastest, by one step each after a first one."""
    found: dict[int, float] = {}
    for micro in MICRO_BATCHES:
        if micro <= setup.batch and (setup.case != "unpaired" or micro > 1):
            short = replace(setup, steps=WARM_UP + 1, whole=False)
            found[micro] = min(measure(folder, "trl-best", short, micro)["seconds"])
    return min(found, key=lambda micro: found[micro])


def compare(setup: Setup) -> dict[str, Any]:
    """All rounds; what each side did in each, and TRL's fastest microbatch.

    Raises:
        SystemExit: the sides computed other losses, or one failed.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder, rows = Path(temporary), rows_of(setup.case)
        texts = (str(value) for row in rows for value in row.values())
        make_model(folder / "model", setup.shape, texts)
        write_rows(folder / "rows.jsonl", rows, folder / "model", setup.steps * setup.batch)
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
        measure(folder, "ours", replace(setup, steps=WARM_UP + 1, whole=False))  # leaves the order of rows
        micro = fastest_micro(folder, setup)
        for _ in range(setup.rounds):
            for name, runs in results.items():
                runs.append(measure(folder, name, setup, micro if name == "trl-best" else 0))
    losses = {name: runs[0]["losses"] for name, runs in results.items()}
    for name in list(losses)[1:]:
        worst = max(abs(a - b) for a, b in zip(losses["ours"], losses[name], strict=True))
        # TRL's TPO averages a mean over tokens over microbatches, so with several of them its loss is a little another.
        split = setup.case == "tpo" and name == "trl-best" and micro < setup.batch
        if worst > (SPLIT_TOLERANCE * max(losses["ours"]) if split else TOLERANCE):
            raise SystemExit(f"{setup}: {name} computes other losses (up to {worst:.2g} apart): {losses}")
    useful = results["ours"][0]["filled"] / (setup.steps * setup.batch)
    summary = {name: summarised(setup, runs, useful) for name, runs in results.items()}
    return {"setup": asdict(setup), "micro": micro, "useful_tokens_per_row": useful, "sides": summary}


def summarised(setup: Setup, runs: list[dict[str, Any]], useful: float) -> dict[str, Any]:
    """Rates (rows/s), peak memory (MiB), padding share and seconds to the first step, over the rounds."""
    if setup.whole:
        rates = [setup.steps * setup.batch / run["whole"] for run in runs]
    else:
        rates = [setup.batch / seconds for run in runs for seconds in run["seconds"]]
    return {
        "rows_per_second": [statistics.median(rates), min(rates), max(rates)],
        "useful_tokens_per_second": statistics.median(rates) * useful,
        "padding": 1 - runs[0]["filled"] / runs[0]["positions"],
        "peak_mib": statistics.median(run["peak_mib"] for run in runs),
        "first_step": statistics.median(run["first_step"] for run in runs),
    }


def told(result: dict[str, Any]) -> str:
    """The table of one comparison."""
    setup = Setup(**result["setup"])
    ours = result["sides"]["ours"]["rows_per_second"][0]
    lines = [
        f"{setup}: {setup.batch} rows a step, {setup.rounds} rounds; rows/s: median [least, most]; TRL at its best "
        f"takes {result['micro']} rows at a time"
    ]
    for name, side in result["sides"].items():
        median, low, high = side["rows_per_second"]
        ratio = "" if name == "ours" else f"   ours {ours / median:.2f}x"
        lines.append(
            f"  {name:<9}{median:8.2f} [{low:.2f}, {high:.2f}]  {side['useful_tokens_per_second']:7.0f} useful "
            f"tokens/s  padding {side['padding']:5.1%}  peak {side['peak_mib']:6,.0f} MiB  "
            f"first step {side['first_step']:5.1f} s{ratio}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures and prints tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    standard = Setup()
    parser.add_argument("--case", choices=CASES, default=standard.case)
    parser.add_argument("--shape", choices=[*SHAPES, "stories260k"], default=standard.shape)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--whole", action="store_true", help="time whole runs, from the start of the process")
    parser.add_argument("--rounds", type=int, default=standard.rounds)
    parser.add_argument(
        "--steps", type=int, default=standard.steps, help=f"optimizer steps; the first {WARM_UP} warm up"
    )
    parser.add_argument("--batch", type=int, default=standard.batch, help="rows per optimizer step")
    parser.add_argument("--table", action="store_true", help="run everything docs/performance.md shows")
    parser.add_argument(
        "--into", type=Path, help="file to keep the numbers in, in place of older ones of the same kind"
    )
    options = vars(parser.parse_args())
    table, into = options.pop("table"), options.pop("into")
    for setup in TABLE if table else (Setup(**options),):
        result = compare(setup)
        print(told(result), flush=True)
        if into:  # after each, so that a run that is cut off leaves what it has
            keep(into, result)


def keep(path: Path, result: dict[str, Any]) -> None:
    """Puts a comparison among those of the same machine, in the order of ``TABLE``."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"results": []}
    named = {
        str(Setup(**each["setup"])): each for each in (*found["results"], result | {"date": time.strftime("%Y-%m-%d")})
    }
    order = {str(setup): i for i, setup in enumerate(TABLE)}
    results = sorted(named.values(), key=lambda each: order.get(str(Setup(**each["setup"])), len(order)))
    path.write_text(json.dumps(about_here() | {"results": results}, indent=1) + "\n", encoding="utf-8")


def about_here() -> dict[str, str]:
    """Machine, versions and date, as the page tells them."""
    names = ("torch", "transformers", "trl")
    return {
        "machine": f"{os.cpu_count()} cores of a {platform.machine()} machine",
        "versions": ", ".join(f"{name} {importlib.metadata.version(name).partition('+')[0]}" for name in names),
    }


if __name__ == "__main__":
    main()
