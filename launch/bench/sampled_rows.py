"""Rows as a round of sampling leaves them, made of scored responses: for recipes that learn from a policy's samples.

Who wrote what is made up: every other chosen response passes for the policy's. A score in [0, 1] passes for the
probability that a response is preferred to the opponent's.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def sampled(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Of scored lists, rows with these columns of ``objectives.columns``.

    ``chosen_by``: the best response against the worst. ``preference``: every response alone.
    """
    made: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        ranked = sorted(row["responses"], key=lambda each: -each["score"])
        if "chosen_by" in columns:
            best, worst = ranked[0]["text"], ranked[-1]["text"]
            who = ("policy", "reference")[number % 2]
            made.append({"prompt": row["prompt"], "chosen": best, "rejected": worst, "chosen_by": who})
        else:
            made += [
                {"prompt": row["prompt"], "completion": each["text"], "preference": each["score"]} for each in ranked
            ]
    return made


def write_sampled(source: Path, target: Path, columns: Sequence[str], most: int) -> Path:
    """The same from a gzipped file of scored lists, of which the first so many are read."""
    with gzip.open(source, "rt", encoding="utf-8") as file:
        listed = [json.loads(line) for line, _ in zip(file, range(most), strict=False)]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(json.dumps(row) + "\n" for row in sampled(listed, columns)), encoding="utf-8")
    return target
