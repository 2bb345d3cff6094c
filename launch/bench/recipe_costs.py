"""What every recipe costs, relative to DPO's: time of a step, peak memory, and the share of the loss's own arithmetic.

    make recipe_costs         or: python -m launch.bench.recipe_costs [--only dpo,tdpo]

Each recipe trains stories260k in a process of its own, on the same 48 prompts of ``alpaca_eval_scored`` (in
``ALIGN_SHARED``, default ``../shared``), twelve steps of sixteen rows; DPO runs again after every eight others. A
ratio is a recipe's median step over the median of the DPO runs around it. The first line that begins with
``# Measured`` in a recipe is replaced. The share of the own arithmetic is the time of formula and backward pass down
to log-probs, on the last step's legs, over the time of a step; a larger model only makes it smaller.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.bench.promises import shared
from launch.bench.promises import words as settings
from launch.recipes import FOLDER, training_recipes

STEPS = 12
MEASURED = "# Measured"


def one(name: str, folder: Path) -> dict[str, float]:
    """Median seconds of a step (the first three left out), peak MiB, share of the own arithmetic: in a new process."""
    done = subprocess.run(
        [sys.executable, "-m", "launch.bench.recipe_costs", "--measure", name, "--folder", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stdout[-1000:]}{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, folder: Path) -> dict[str, float]:
    """The same, in this process."""
    import torch

    from align.train import main as train
    from align.trainer import ObjectiveTrainer

    torch.set_num_threads(1)
    taken: list[float] = []
    own: list[float] = []
    compute = ObjectiveTrainer.training_step

    def timed(self: Any, *arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        loss = compute(self, *arguments, **options)
        taken.append(time.perf_counter() - started)
        if len(taken) > 3:
            own.append(_own_time(self, arguments[1]))
        return loss

    ObjectiveTrainer.training_step = timed  # type: ignore[method-assign]
    more = ["--eval_share=0", "--max_length=256", "--logging_steps=1", "--token_budget=16384"]
    words = [*settings(name, "alpaca_eval_scored", folder, STEPS), *more]
    words = [word for word in words if not word.startswith(("--eval_dataset", "--eval_strategy", "--eval_steps"))]
    with open(os.devnull, "w") as nowhere:
        before, sys.stdout = sys.stdout, nowhere
        try:
            status = train(words)
        finally:
            sys.stdout = before
    if status:
        raise SystemExit(status)
    step = statistics.median(taken[3:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"step": step, "peak": peak, "own": statistics.median(own) / step}


def _own_time(trainer: Any, batch: Any) -> float:
    """Seconds of the objective's formula and its backward pass, without the model."""
    import torch

    batch = batch.to(trainer.args.device)
    with torch.no_grad():
        legs = trainer.losses.legs(batch, *trainer.losses.scored(trainer.wrapped, batch))
    if trainer.losses.couples:
        legs = trainer.losses.as_own_step(legs, weigh=True)
    free = {name: _free(leg) for name, leg in legs.legs.items()}
    from dataclasses import replace

    legs = replace(legs, legs=free)
    started = time.perf_counter()
    trainer.losses.mixture(legs).loss(batch.counts).backward()
    return time.perf_counter() - started


def _free(leg: Any) -> Any:
    from dataclasses import replace

    return replace(
        leg,
        logps=leg.logps.detach().requires_grad_(),
        extras={key: values.detach().requires_grad_(key != "number_value") for key, values in leg.extras.items()},
        values={key: values.detach().requires_grad_() for key, values in leg.values.items()},
    )


def write(name: str, text: str) -> None:
    """Puts the line into the recipe, after its other leading comments."""
    path = FOLDER / f"{name}.yaml"
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith(MEASURED)]
    at = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    path.write_text("\n".join([*lines[:at], text, *lines[at:]]) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the bench; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="recipes, with commas between; nothing is written then")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder)))
        return 0
    shared()
    only = [name for name in options.only.split(",") if name]
    names = only or [path.stem for path in training_recipes()]
    worst = ("", 0.0)
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["ALIGN_CACHE"] = str(Path(temporary) / "cache")
        folder = Path(temporary)
        bases = [one("dpo", folder)["step"]]
        for start in range(0, len(names), 8):
            found = {name: one(name, folder) for name in names[start : start + 8]}
            bases.append(one("dpo", folder)["step"])
            base = statistics.median(bases[-2:])
            for name, each in found.items():
                worst = max(worst, (name, each["own"]), key=lambda pair: pair[1])
                costs = f"{each['step'] / base:.2f} × dpo's step, {each['peak']:.0f} MiB at most"
                line = f"{MEASURED}: {costs}, own arithmetic {each['own']:.2%} of a step (make recipe_costs)"
                print(f"{name:24} {re.sub('^# ', '', line)}", flush=True)
                if not only:
                    write(name, line)
    spread = (max(bases) - min(bases)) / statistics.median(bases)
    print(
        f"largest share of own arithmetic: {worst[1]:.2%} ({worst[0]}); dpo's step varied by {spread:.0%} over the run"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
