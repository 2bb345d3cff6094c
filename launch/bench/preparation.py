"""Preparing rows against TRL: rows per second, memory, and how long a second start takes.

    make bench_preparation        or: python -m launch.bench.preparation [--rows 10000,100000,1000000]

The same made-up rows for both, prompts and responses as long as dialogues have them. Each side runs in a fresh process
with a fresh cache, in turns. Ours is timed from the file to mapped tables; of TRL only what its DPOTrainer does to the
dataset, not reading the file: at its defaults, which take one process, and with as many processes as there are cores.
Memory is that of all processes together (PSS, so that pages they share count once), libraries included. Quote medians:
machines are noisy.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from align.console import quiet_libraries
from launch.bench.processes import measured, tell
from launch.bench.workloads import COLUMNS, made_up, make_model

SIDES = ("ours", "again", "trl", "trl-best")
"""Our first start, our second one, TRL at its defaults, and TRL with a process for every core."""


def run_ours(model: Path, rows: Path) -> dict[str, Any]:
    """Our preparation, from a file to tables."""
    from align.assemble import data_spec
    from align.model import load_config, load_tokenizer, max_length
    from align.recipe import read_recipe
    from data.preparation import prepare

    keys = {"model_name_or_path": model, "dataset_name": rows, "output_dir": "none", "objective": "dpo"}
    recipe = read_recipe(None, [f"--{key}={value}" for key, value in {**keys, "eval_share": 0}.items()])
    config, tokenizer = load_config(recipe.model), load_tokenizer(recipe.model)
    spec = data_spec(recipe, max_length(recipe.data.max_length, config))
    start = time.perf_counter()
    prepared = prepare(spec, tokenizer)
    return {"seconds": time.perf_counter() - start, "rows": len(prepared.train.table)}


def run_trl(model: Path, rows: Path, processes: int | None = None) -> dict[str, Any]:
    """What TRL's DPOTrainer does to a dataset before it trains."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    taken: dict[str, Any] = {}

    class Timed(DPOTrainer):
        def _prepare_dataset(self, *arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            found = super()._prepare_dataset(*arguments, **options)
            taken.update(seconds=time.perf_counter() - start, rows=len(found))
            return found

    folder = rows.parent / "cache"
    args = DPOConfig(
        output_dir=str(folder / "run"), report_to="none", bf16=False, use_cpu=True, disable_tqdm=True,
        dataset_num_proc=processes,
    )  # fmt: skip
    Timed(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=args,
        train_dataset=load_dataset("json", data_files=str(rows), split="train", cache_dir=str(folder / "datasets")),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    return taken


def measure(side: str, folder: Path, rows: Path) -> dict[str, Any]:
    """One side in a fresh process; only a second start finds the cache of the run before."""
    if side != "again":
        shutil.rmtree(folder / "cache", ignore_errors=True)
    words = ["--side", side, "--file", str(rows)]
    return measured("launch.bench.preparation", words, side, {"ALIGN_CACHE": str(folder / "cache")})


def compare(folder: Path, number: int, rounds: int, sides: tuple[str, ...]) -> dict[str, Any]:
    """All sides on so many rows, in turns: medians."""
    rows = folder / f"{number}.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for row in made_up("hh", number):
            file.write(json.dumps({name: row[name] for name in COLUMNS["hh"]}) + "\n")
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            results[side].append(measure(side, folder, rows))
    rows.unlink()
    return {
        side: {name: statistics.median(run[name] for run in runs) for name in runs[0]} | {"runs": runs}
        for side, runs in results.items()
    }


def table(number: int, found: dict[str, Any]) -> str:
    """The medians, as text."""
    lines = [f"{number:,} rows, {len(found['ours']['runs'])} rounds: medians"]
    names_of = {"ours": "first start", "again": "second start", "trl": "TRL", "trl-best": "TRL, all cores"}
    for side, names in names_of.items():
        if side not in found:
            continue
        own = found[side]
        rate = number / own["seconds"]
        ratio = f"   ours is {own['seconds'] / found['ours']['seconds']:.2f}x" if side.startswith("trl") else ""
        lines.append(
            f"  {names:<15}{own['seconds']:9.2f} s {rate:12,.0f} rows/s   peak {own['peak_mib']:7,.0f} MiB{ratio}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures and prints a table for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="10000,100000,1000000", help="how many, several with commas between")
    parser.add_argument("--trl-up-to", type=int, default=100_000, help="rows beyond which TRL is left out")
    parser.add_argument("--rounds", type=int, default=3, help="times each side runs; above 100,000 rows once")
    parser.add_argument("--json", type=Path, help="file to write all numbers to")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet_libraries()
    if options.side:
        warnings.simplefilter("ignore")
        places = options.file.parent / "model", options.file
        if options.side.startswith("trl"):
            tell(run_trl(*places, processes=os.cpu_count() if options.side == "trl-best" else None))
        else:
            tell(run_ours(*places))
        return
    results: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        texts = (str(value) for row in made_up("hh", 200) for value in row.values())
        make_model(Path(folder) / "model", "tiny", texts)
        for number in (int(each) for each in options.rows.split(",")):
            sides = SIDES if number <= options.trl_up_to else SIDES[:2]
            rounds = options.rounds if number <= 100_000 else 1
            results[number] = compare(Path(folder), number, rounds, sides)
            print(table(number, results[number]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
