"""The data doctor on made-up rows: time, rows per second and memory, and whether what was planted is found.

    make bench_doctor        or: python -m launch.bench.doctor [--rows 10000,100000,1000000]

Pairs of about 125 words, made from a seed, of which known shares are copies, near copies (the last words exchanged),
contradictions, echoes and so on. Every size runs in a fresh process with a fresh cache, without a tokenizer, near
duplicates included. Memory is that of all processes together (PSS, so that pages they share count once), libraries
included.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.bench.processes import measured, tell

PLANTED = {
    "exact_duplicates": 0.01,
    "near_duplicates": 0.02,
    "identical_pairs": 0.002,
    "contradictions": 0.002,
    "echo": 0.005,
    "mojibake": 0.001,
    "html": 0.001,
}
"""Share of the rows that get each fault."""
VOCABULARY = 20_000
RECENT = 1000
"""Rows of which one is copied: those written last, without a fault of their own."""


def made_up(number: int, seed: int = 0) -> Iterator[tuple[dict[str, str], str]]:
    """Rows, each with the fault that was planted in it, or ""."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randint(2, 9))) for _ in range(VOCABULARY)]
    kinds, weights = ["", *PLANTED], [1 - sum(PLANTED.values()), *PLANTED.values()]

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(low, high)))

    recent: list[dict[str, str]] = []
    for _ in range(number):
        kind = rng.choices(kinds, weights)[0] if recent else ""
        row = {"prompt": f"{text(10, 40)}?", "chosen": f" {text(20, 80)}.", "rejected": f" {text(20, 80)}."}
        base = rng.choice(recent) if recent else row
        if kind == "exact_duplicates":
            row = base
        elif kind == "near_duplicates":
            row = {name: _altered(value, rng, words) for name, value in base.items()}
        elif kind == "identical_pairs":
            row["rejected"] = row["chosen"].upper()
        elif kind == "contradictions":
            row = {**base, "chosen": base["rejected"], "rejected": base["chosen"]}
        elif kind == "echo":
            row["chosen"] = f"{row['prompt']} {text(10, 20)}"
        elif kind == "mojibake":
            row["chosen"] += " cafÃ©"
        elif kind == "html":
            row["chosen"] += "<br/>"
        else:
            recent.append(row)
            del recent[:-RECENT]
        yield row, kind


def _altered(text: str, rng: random.Random, words: list[str]) -> str:
    """The text with its last word exchanged: similar at 0.8 in shingles of three words from 29 words on."""
    return " ".join([*text.split(" ")[:-1], rng.choice(words)])


def run(path: Path) -> dict[str, Any]:
    """One diagnosis, timed from the file to the findings."""
    from data.__main__ import from_words
    from data.doctor import examine

    spec, *_ = from_words([f"--dataset_name={path}"])
    start = time.perf_counter()
    diagnosis = examine(spec)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "found": {each.check: each.rows for each in diagnosis.findings}}


def measure(folder: Path, number: int) -> dict[str, Any]:
    """So many rows in a fresh process."""
    path, planted = folder / f"{number}.jsonl", Counter[str]()
    with path.open("w", encoding="utf-8") as file:
        for row, kind in made_up(number):
            file.write(json.dumps(row) + "\n")
            planted[kind] += 1
    env = {"ALIGN_CACHE": str(folder / f"cache-{number}")}
    found = measured("launch.bench.doctor", ["--file", str(path)], f"{number} rows", env)
    path.unlink()
    return {**found, "planted": dict(planted)}


def main() -> None:
    """Measures and prints a line for each number of rows, and what was found of what was planted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="10000,100000,1000000", help="how many, several with commas between")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.file:
        tell(run(options.file))
        return
    with tempfile.TemporaryDirectory() as folder:
        for number in (int(each) for each in options.rows.split(",")):
            found = measure(Path(folder), number)
            rate, peak = number / found["seconds"], found["peak_mib"]
            print(f"{number:>9,} rows {found['seconds']:8.1f} s {rate:9,.0f} rows/s   peak {peak:6,.0f} MiB")
            told = ", ".join(f"{name} {found['found'][name]}/{found['planted'].get(name, 0)}" for name in PLANTED)
            print(f"          found/planted: {told}", flush=True)


if __name__ == "__main__":
    main()
