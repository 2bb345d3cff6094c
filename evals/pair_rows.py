"""``pairs.jsonl``: what policy and reference make of every pair, for plots, drop-lists and the browser of responses.

    {"version": 1, "dataset": "acme/pairs", "split": "test", "step": 300, "row": "acme/pairs, row 17",
     "prompt_id": "5f0c…", "prompt": "…", "chosen": "…", "rejected": "…",
     "numbers": {"policy_chosen": -31.2, "policy_rejected": -40.1, "ref_chosen": -30.0, "ref_rejected": -33.8,
                 "length_chosen": 12, "length_rejected": 15, "difficulty": -3.8, "ches": -120.5, "ln_ches": -0.4}}

Texts are decoded from the tokens that were scored, so what truncation cut off is absent. One evaluation of a split at a
step replaces the lines of an earlier one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.lines import read_lines, write_lines

VERSION = 1
"""Of the file format; raised when a reader of the old one would misunderstand the new one."""
NAME = "pairs.jsonl"
NUMBERS: Mapping[str, str] = {
    "policy_chosen": "log π(chosen), nats, summed over the response",
    "policy_rejected": "log π(rejected)",
    "ref_chosen": "log π_ref(chosen)",
    "ref_rejected": "log π_ref(rejected)",
    "length_chosen": "tokens of the chosen response, end token included",
    "length_rejected": "tokens of the rejected response",
    "difficulty": "c = log π_ref(rejected) − log π_ref(chosen), nats; above 0 the reference ranks wrongly",
    "ches": "CHES under the reference",
    "ln_ches": "CHES per token under the reference",
    "last_hidden": "inner product of the states before the last tokens",
    "edit_similarity": "minus the share of tokens to edit to turn one response into the other",
}
"""Every number a line may hold, and what it is; absent where it was not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRow:
    """One pair under one policy.

    Raises:
        ValueError: a number that is not finite or not known.
    """

    dataset: str
    split: str
    step: int
    row: str
    """Where the pair stands in its dataset."""
    prompt_id: str
    """As ``align.samples.prompt_id`` gives it."""
    prompt: str
    chosen: str
    rejected: str
    numbers: Mapping[str, float]
    """Of ``NUMBERS``."""

    def __post_init__(self) -> None:
        for name, value in self.numbers.items():
            if name not in NUMBERS:
                raise ValueError(f"a pair has no number {name!r} (known: {', '.join(NUMBERS)})")
            if not math.isfinite(value):
                raise ValueError(f"{name} of {self.row} is {value}: leave the number out")


def write_pairs(run_dir: Path, rows: Iterable[PairRow], *, dataset: str, split: str, step: int) -> None:
    """Puts the pairs of one evaluation into a run's file, in place of those of an earlier one at the same step.

    Args:
        run_dir: where ``results.json`` lies.
        rows: all of one dataset, split and step.
        dataset: of the rows.
        split: of the rows.
        step: of the rows.
    """
    key = (dataset, split, step)
    write_lines(run_dir / NAME, rows, VERSION, lambda old: (old.dataset, old.split, old.step) == key, read=_pair)


def read_pairs(run_dir: Path) -> Iterator[PairRow]:
    """The pairs of a run, one at a time; none where there is no file.

    Raises:
        ValueError: in one sentence, if a line can't be read.
    """
    return read_lines(run_dir / NAME, VERSION, _pair)


def _pair(values: dict[str, Any]) -> PairRow:
    return PairRow(**values)
