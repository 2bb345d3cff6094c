"""Whether rounds, selection and QAlign do what they promise, on the embedded world: numbers with 95 % intervals.

    make selection             or: python -m launch.bench.selection --into docs/selection.json
    --parts rounds,qalign      only these; others of the file are kept
    --quick                    tiny numbers that say nothing, in under a minute: whether it runs

Samples are stored under ``--output_dir``, and what is there is not drawn again. ``python -m launch.selection_page``
makes docs/selection.md of the numbers. Rounds are in ``selection_rounds`` beside this file, pass@k and curves in
``selection_parts``, chains in ``selection_chains``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers

from align.console import quiet_libraries
from launch.bench.selection_chains import chains
from launch.bench.selection_parts import curves, pass_at_k
from launch.bench.selection_rounds import rounds
from launch.bench.selection_samples import Numbers
from launch.pages import ROOT

PARTS: Mapping[str, Callable[[Numbers, Path], dict[str, Any]]] = {
    "rounds": rounds,
    "pass_at_k": pass_at_k,
    "curves": curves,
    "qalign": chains,
}
QUICK = Numbers(
    seeds=(0,),
    rounds=1,
    train_problems=24,
    held_out=6,
    held_out_n=2,
    problems=6,
    samples=16,
    pass_samples=8,
    chain_problems=2,
    steps=3,
    epochs=1,
)


def rounded(value: Any) -> Any:
    """Numbers with six decimals, which is more than any interval resolves."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value


def main(arguments: list[str] | None = None) -> int:
    """Measures the parts that are asked for and puts them into the file; returns the exit status."""
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m launch.bench.selection", description=about)
    parser.add_argument("--parts", default=",".join(PARTS), help="which to measure")
    parser.add_argument("--quick", action="store_true", help="tiny numbers")
    parser.add_argument("--into", type=Path, default=ROOT / "docs" / "selection.json", help="file of the numbers")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/selection"), help="samples and policies")
    options = parser.parse_args(arguments)
    names = options.parts.split(",")
    for name in names:
        if name not in PARTS:
            parser.error(f"unknown part {name!r} (known: {', '.join(PARTS)})")
    if options.quick and options.into.resolve() == (ROOT / "docs" / "selection.json").resolve():
        parser.error("--quick measures nothing that could be published; give another --into")
    quiet_libraries()
    numbers = QUICK if options.quick else Numbers()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    found = json.loads(options.into.read_text(encoding="utf-8")) if options.into.is_file() else {"parts": {}}
    found["versions"] = {
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
    }
    for name in names:
        began = time.perf_counter()
        print(f"{name} …", file=sys.stderr, flush=True)
        measured = PARTS[name](numbers, options.output_dir)
        seconds = time.perf_counter() - began
        told = {"date": datetime.date.today().isoformat(), "quick": options.quick}
        found["parts"][name] = rounded(measured) | told
        options.into.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"  {seconds:.0f} s", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
