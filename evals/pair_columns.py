"""The numbers of ``pairs.jsonl`` by column, for drawings: of every pair, whatever its texts weigh."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from evals.pair_rows import NUMBERS, PairRow
from evals.ranking import difficulty
from objectives.stats import beats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairColumns:
    """The pairs of one split at its last evaluation."""

    dataset: str
    split: str
    step: int
    numbers: Mapping[str, np.ndarray]
    """By the names of ``pair_rows.NUMBERS``, shape (pair,), NaN where a pair lacks one; columns of NaN are absent."""

    @property
    def n(self) -> int:
        """Pairs."""
        return len(next(iter(self.numbers.values()), ()))

    def has(self, *names: str) -> bool:
        """Whether there are columns of all these."""
        return all(name in self.numbers for name in names)

    @property
    def chosen_change(self) -> np.ndarray | None:
        """log π − log π_ref of the chosen responses, nats, shape (pair,); None without a policy or a reference."""
        if not self.has("policy_chosen", "ref_chosen"):
            return None
        return self.numbers["policy_chosen"] - self.numbers["ref_chosen"]

    @property
    def difficulty(self) -> np.ndarray | None:
        """c of each pair, nats, shape (pair,), as measured or else from the reference's log-probs; None without."""
        if "difficulty" in self.numbers:
            return self.numbers["difficulty"]
        if not self.has("ref_chosen", "ref_rejected"):
            return None
        return difficulty(self.numbers["ref_chosen"], self.numbers["ref_rejected"])

    @property
    def right(self) -> np.ndarray | None:
        """1 where the policy ranks a pair rightly, 0 wrongly, ½ for a tie, NaN unknown; None without a policy."""
        if not self.has("policy_chosen", "policy_rejected"):
            return None
        chosen, rejected = self.numbers["policy_chosen"], self.numbers["policy_rejected"]
        known = np.isfinite(chosen) & np.isfinite(rejected)
        found = np.full(len(chosen), np.nan)
        found[known] = beats(chosen[known], rejected[known])
        return found


def columns(rows: Iterable[PairRow]) -> list[PairColumns]:
    """Of every split, the pairs at the last step, in the order of the file."""
    found: dict[tuple[str, str], tuple[int, list[tuple[float, ...]]]] = {}
    for row in rows:
        step, kept = found.setdefault((row.dataset, row.split), (row.step, []))
        if row.step < step:
            continue
        if row.step > step:
            kept = []
            found[row.dataset, row.split] = row.step, kept
        kept.append(tuple(row.numbers.get(name, math.nan) for name in NUMBERS))
    made: list[PairColumns] = []
    for (dataset, split), (step, kept) in found.items():
        table = np.array(kept, dtype=np.float64)
        numbers = {name: table[:, i] for i, name in enumerate(NUMBERS) if np.isfinite(table[:, i]).any()}
        if numbers:
            made.append(PairColumns(dataset=dataset, split=split, step=step, numbers=numbers))
    return made
