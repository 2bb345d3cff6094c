"""Which rows are computed together, decided before training.

All lengths are known, so every optimizer step is planned: its rows are split into ``world × G`` bins of nearly equal
cost under the token budget. G, the microbatches per step, is one number for the run: the smallest that always fits.
A plan depends only on its arguments, so resuming recomputes it, and every rank computes the same one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np

from data.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How many positions a bin of rows takes.

    ``bucket``: one row per line, padded to the longest (dense attention masks). ``pack``: rows end to end.
    """

    kind: str
    multiple: int = 1
    """Lines are padded to a multiple of this: kernels that work on blocks see fewer shapes, and are compiled once."""

    def __post_init__(self) -> None:
        assert self.kind in ("bucket", "pack"), self.kind

    def padded(self, length: int) -> int:
        """Positions of a line that holds ``length`` tokens."""
        return -(-length // self.multiple) * self.multiple

    def bins_under(self, lengths: np.ndarray, budget: int) -> list[int]:
        """Greedy split of ascending ``lengths`` into runs that take at most ``budget`` positions.

        Returns:
            The end of each run. Longer rows come last, so a run's width is its last length.
        """
        budget = budget // self.multiple * self.multiple
        ends: list[int] = []
        start = total = 0
        for i, length in enumerate(lengths.tolist()):
            total += length
            taken = (i + 1 - start) * length if self.kind == "bucket" else total
            if taken > budget and i > start:
                ends.append(i)
                start, total = i, length
        ends.append(len(lengths))
        return ends


def steps_of(rows: int, rows_per_step: int, epoch: int, seed: int | None) -> Iterator[np.ndarray]:
    """Row numbers of each optimizer step of an epoch, (row,): lengths, budget and processes have no say in them.

    Args:
        rows: how many there are.
        rows_per_step: of a step; the last one may hold fewer.
        epoch: from 0.
        seed: of the run; None keeps the order of the rows.
    """
    order = np.arange(rows)
    if seed is not None:
        order = np.random.default_rng([seed, epoch]).permutation(order)
    return (order[start : start + rows_per_step] for start in range(0, rows, rows_per_step))


def times_trained(rows: int, rows_per_step: int, steps: int, seed: int) -> np.ndarray:
    """How often each row has been trained on after so many optimizer steps, int64, (row,).

    Args:
        rows: that a run trains on.
        rows_per_step: of the run.
        steps: it has taken.
        seed: of the run.
    """
    found, epoch = np.zeros(rows, dtype=np.int64), 0
    while rows and steps > 0:
        for step in islice(steps_of(rows, rows_per_step, epoch, seed), steps):
            found[step] += 1
            steps -= 1
        epoch += 1
    return found


@dataclass(frozen=True)
class Plan:
    """Rows of every epoch, step, microbatch and rank."""

    lengths: np.ndarray
    """Positions each row takes when its prompt is shared by its responses."""
    rows_per_step: int
    token_budget: int
    """Positions of one microbatch on one rank, at most."""
    epochs: int
    world: int
    layout: Layout
    seed: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        longest = int(self.lengths.max(initial=0))
        if longest > self.token_budget:
            raise DataError(
                f"train.token_budget {self.token_budget} is smaller than the longest row ({longest} positions, its "
                f"prompt counted once); set it to at least {longest} or lower data.max_length"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch; the last one may hold fewer rows."""
        return -(-len(self.lengths) // self.rows_per_step)

    @cached_property
    def microbatches(self) -> int:
        """G: microbatches per step on every rank."""
        needed = 1
        for epoch in range(self.epochs):
            for rows in self._steps(epoch):
                ends = self.layout.bins_under(self.lengths[rows], self.token_budget)
                needed = max(needed, -(-len(ends) // self.world))
        return needed

    def _steps(self, epoch: int) -> Iterator[np.ndarray]:
        """Row numbers of each step, by ascending length."""
        seed = self.seed if self.shuffle else None
        for rows in steps_of(len(self.lengths), self.rows_per_step, epoch, seed):
            yield rows[np.argsort(self.lengths[rows], kind="stable")]

    def epoch(self, number: int) -> list[list[list[np.ndarray]]]:
        """``[step][microbatch][rank]`` to row numbers; bins that stay empty are empty arrays.

        Neighbouring bins hold rows of similar length and are computed at the same time on different ranks.
        """
        plan: list[list[list[np.ndarray]]] = []
        for rows in self._steps(number):
            bins = self._balanced(rows)
            plan.append([bins[g * self.world : (g + 1) * self.world] for g in range(self.microbatches)])
        return plan

    def _balanced(self, rows: np.ndarray) -> list[np.ndarray]:
        """Exactly ``world × G`` bins, the most expensive one as cheap as a split by length allows."""
        lengths, most = self.lengths[rows], self.world * self.microbatches
        low, high = int(lengths.max()), self.token_budget
        while low < high:  # the smallest budget under which the greedy split needs no more bins than there are
            middle = (low + high) // 2
            if len(self.layout.bins_under(lengths, middle)) <= most:
                high = middle
            else:
                low = middle + 1
        ends = self.layout.bins_under(lengths, low)
        bins = [rows[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        return bins + [rows[:0]] * (most - len(bins))

    def costliest(self) -> np.ndarray:
        """The bin that takes the most positions in any epoch: run it first, and memory fails then or never."""
        epochs = (self.epoch(number) for number in range(self.epochs))
        bins = (rows for plan in epochs for step in plan for microbatch in step for rows in microbatch if len(rows))
        return max(bins, key=self.positions)

    def positions(self, rows: Sequence[int] | np.ndarray) -> int:
        """Positions a bin takes, padding included."""
        lengths = self.lengths[np.asarray(rows)]
        if self.layout.kind == "bucket":
            return self.layout.padded(int(lengths.max())) * len(lengths)
        return self.layout.padded(int(lengths.sum()))
