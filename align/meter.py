"""Sums and counts of metrics between two log lines, over microbatches and ranks: never a mean of means."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from objectives.output import Mean, Output

Reduce = Callable[[Tensor], Tensor]


class Meter:
    """Adds up what objectives return until it is read.

    Terms are counted per their own unit, so ``loss/<term>`` is the term's mean before its coefficient, over everything
    since the last log line.
    """

    def __init__(self) -> None:
        # Totals stay tensors on the device: turning each into a number would wait for the accelerator every time.
        self.totals: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}

    def add(self, output: Output, counts: Mapping[str, float]) -> None:
        """Adds one microbatch.

        Args:
            output: of the objective.
            counts: what this microbatch holds, by unit.
        """
        for name, term in output.terms.items():
            self._add(f"loss/{name}", Mean(total=term.total.detach(), count=counts[term.per]))
        for name, metric in output.metrics.items():
            self._add(name, metric)

    def _add(self, name: str, mean: Mean) -> None:
        total = mean.total.detach().double()
        self.totals[name] = self.totals[name] + total if name in self.totals else total
        self.counts[name] = self.counts.get(name, 0.0) + mean.count

    def add_mean(self, name: str, total: Tensor, count: float) -> None:
        """Adds one sum and its count under any name."""
        self._add(name, Mean(total=total, count=count))

    def sums(self, reduce: Reduce | None = None) -> tuple[list[str], Tensor]:
        """Names, and a ``(2, name)`` float64 matrix of totals and counts, summed over ranks."""
        names = sorted(self.totals)
        totals = torch.stack([self.totals[name].cpu() for name in names]) if names else torch.zeros(0).double()
        matrix = torch.stack([totals, torch.tensor([self.counts[name] for name in names], dtype=torch.float64)])
        return names, reduce(matrix) if reduce is not None and names else matrix

    def read(self, reduce: Reduce | None = None) -> dict[str, float]:
        """Means by name, and starts anew.

        Args:
            reduce: maps a float64 tensor to its sum over ranks; None on one process.
        """
        names, (totals, counts) = self.sums(reduce)
        self.totals, self.counts = {}, {}
        return {name: float(totals[i] / counts[i]) for i, name in enumerate(names) if counts[i] > 0}

    def state_dict(self, reduce: Reduce | None = None) -> dict[str, dict[str, float]]:
        """For checkpoints, summed over ranks: a resumed run's next log line covers what the interrupted one had."""
        names, (totals, counts) = self.sums(reduce)
        return {
            "totals": {name: float(totals[i]) for i, name in enumerate(names)},
            "counts": {name: float(counts[i]) for i, name in enumerate(names)},
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]], *, first_rank: bool = True) -> None:
        """Restores what ``state_dict`` gave: the first rank holds the sums, the others zeros of the same names."""
        share = 1.0 if first_rank else 0.0
        self.totals = {
            name: torch.tensor(value * share, dtype=torch.float64) for name, value in state["totals"].items()
        }
        self.counts = {name: value * share for name, value in state["counts"].items()}
