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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launch.bench.workloads import CASES, SHAPES, has_real_rows, make_model, rows_of, write_rows

SIDES = ("ours", "trl", "trl-best")
WARM_UP = 2
TRIED_STEPS = 3
MICRO_BATCHES = (1, 2, 4, 8)
TOLERANCE = 1e-4
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
    Setup(case="hh", whole=True, steps=52),
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


def command(folder: Path, name: str, setup: Setup, micro: int = 0) -> list[str]:
    """The words that start one side."""
    words = ["--folder", folder, "--case", setup.case, "--steps", setup.steps, "--batch", setup.batch]
    words += ["--micro", micro, *(["--lora"] if setup.lora else []), *(["--whole"] if setup.whole else [])]
    return [sys.executable, "-m", "launch.bench.sides", name, *map(str, words)]


def environment(folder: Path) -> dict[str, str]:
    """Of all sides: a cache of their own."""
    return {**os.environ, "ALIGN_CACHE": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "false"}


def measure(folder: Path, name: str, setup: Setup, micro: int = 0) -> dict[str, Any]:
    """One side in a fresh process with a fresh cache."""
    for each in ("ours", "trl", "cache"):
        shutil.rmtree(folder / each, ignore_errors=True)
    started = time.time()
    with open(folder / "out.txt", "w+") as out, open(folder / "err.txt", "w+") as err:
        child = subprocess.Popen(command(folder, name, setup, micro), env=environment(folder), stdout=out, stderr=err)
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


def tried_out(folder: Path, setup: Setup) -> list[dict[str, Any]]:
    """TRL without checkpointing, by rows per microbatch: seconds of a step after two, and peak memory (MiB)."""
    found = []
    for micro in MICRO_BATCHES:
        if micro <= setup.batch and (setup.case != "unpaired" or micro > 1):
            short = replace(setup, steps=min(WARM_UP + TRIED_STEPS, setup.steps), whole=False)
            run = measure(folder, "trl-best", short, micro)
            found.append({"micro": micro, "seconds": statistics.median(run["seconds"]), "peak_mib": run["peak_mib"]})
    return found


def compare(setup: Setup) -> dict[str, Any]:
    """All rounds; what each side did in each, TRL's fastest microbatch, and the others that were tried.

    Raises:
        SystemExit: the sides computed other losses, or one failed.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder, rows = Path(temporary), rows_of(setup.case)
        texts = (str(value) for row in rows for value in row.values())
        make_model(folder / "model", setup.shape, texts)
        write_rows(folder / "rows.jsonl", rows, folder / "model", setup.steps * setup.batch)
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
        subprocess.run(command(folder, "plan", setup), check=True, env=environment(folder), stdout=subprocess.DEVNULL)
        tried = tried_out(folder, setup)
        micro = min(tried, key=lambda run: run["seconds"])["micro"]
        for _ in range(setup.rounds):
            for name, runs in results.items():
                runs.append(measure(folder, name, setup, micro if name == "trl-best" else 0))
    apart = max(largest_difference(setup, micro, runs) for runs in zip(*results.values(), strict=True))
    first = results["ours"][0]
    useful = first["filled"] / (setup.steps * setup.batch)
    summary = {name: summarised(setup, runs, useful) for name, runs in results.items()}
    return {
        "setup": asdict(setup), "micro": micro, "tried": tried, "useful_tokens_per_row": useful, "sides": summary,
        "losses": first["losses"], "losses_apart": apart, "rows": "real" if has_real_rows() else "made up",
    }  # fmt: skip


def averages_means(setup: Setup, micro: int) -> bool:
    """Whether TRL averages means over tokens over microbatches, so that its loss is a little another: with TPO."""
    return setup.case == "tpo" and micro < setup.batch


def largest_difference(setup: Setup, micro: int, runs: Sequence[dict[str, Any]]) -> float:
    """Between our losses and those of another side in the same round, step by step.

    Args:
        setup: what is compared.
        micro: rows per microbatch of TRL at its best.
        runs: of ``SIDES``.
    Raises:
        SystemExit: they are not the same losses.
    """
    ours, *others = (run["losses"] for run in runs)
    found = []
    for name, theirs in zip(SIDES[1:], others, strict=True):
        found.append(max(abs(a - b) for a, b in zip(ours, theirs, strict=True)))
        split = name == "trl-best" and averages_means(setup, micro)
        if found[-1] > (SPLIT_TOLERANCE * max(ours) if split else TOLERANCE):
            raise SystemExit(f"{setup}: {name} computes other losses (up to {found[-1]:.2g} apart): {ours}, {theirs}")
    return max(found)


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
        f"{setup}: {setup.batch} {result['rows']} rows a step, {setup.rounds} rounds; rows/s: median [least, most]; "
        f"TRL at its best takes rows {result['micro']} at a time"
    ]
    for name, side in result["sides"].items():
        median, low, high = side["rows_per_second"]
        ratio = "" if name == "ours" else f"   ours {ours / median:.2f}x"
        lines.append(
            f"  {name:<9}{median:8.2f} [{low:.2f}, {high:.2f}]  {side['useful_tokens_per_second']:7.0f} useful "
            f"tokens/s  padding {side['padding']:5.1%}  peak {side['peak_mib']:6,.0f} MiB  "
            f"first step {side['first_step']:5.1f} s{ratio}"
        )
    moved = max(result["losses"]) - min(result["losses"])
    lines.append(f"  losses moved by {moved:.2g}, and are at most {result['losses_apart']:.1g} apart")
    tried = (f"{run['micro']} at a time {run['seconds']:.1f} s {run['peak_mib']:,.0f} MiB" for run in result["tried"])
    return "\n".join([*lines, f"  TRL without checkpointing, a step: {', '.join(tried)}"])


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
    parser.add_argument("--missing", action="store_true", help="with --table: only what the file of --into lacks")
    parser.add_argument(
        "--into", type=Path, help="file to keep the numbers in, in place of older ones of the same kind"
    )
    options = vars(parser.parse_args())
    table, missing, into = options.pop("table"), options.pop("missing"), options.pop("into")
    if missing and not (table and into):
        parser.error("--missing goes with --table and --into: it measures what that file lacks")
    known = {str(Setup(**each["setup"])) for each in kept(into)} if missing else set()
    for setup in [each for each in TABLE if str(each) not in known] if table else (Setup(**options),):
        result = compare(setup)
        print(told(result), flush=True)
        if into:  # after each, so that a run that is cut off leaves what it has
            keep(into, result)


def kept(path: Path) -> list[dict[str, Any]]:
    """The comparisons of a file that ``keep`` wrote; none where it is not there."""
    return json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else []


def keep(path: Path, result: dict[str, Any]) -> None:
    """Puts a comparison among those of the same machine, in the order of ``TABLE``."""
    dated = result | {"date": time.strftime("%Y-%m-%d")}
    named = {str(Setup(**each["setup"])): each for each in (*kept(path), dated)}
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
