"""What an objective returns: sums, and what they are sums over.

    loss = Σ_terms coef · total / count

where ``count`` is taken over the whole optimizer step (all microbatches, all ranks), so that accumulation and
world size change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

Counts = Mapping[str, float]
"""``"row"`` and ``"<leg>.token"`` to how many of them a step holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One differentiable part of a loss: what is summed, and the unit the sum is averaged over."""

    values: Float[Tensor, ...]
    """What is summed, nats (or the objective's own unit), with graph: one per row wherever a row's part can be told."""
    per: str
    """``"row"`` or ``"<leg>.token"``."""
    coef: float = 1.0
    """Weight of the averaged term in the loss."""

    @property
    def total(self) -> Float[Tensor, ""]:
        """Σ over this microbatch."""
        return self.values.sum()

    def value(self, counts: Counts) -> Float[Tensor, ""]:
        """coef · total / count; a step that holds none of the unit contributes zero."""
        if self.per not in counts:
            raise KeyError(f"a term is per {self.per!r}, but the step counts only {sorted(counts)}")
        return self.coef * self.total / max(counts[self.per], 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """A metric that adds up over microbatches and ranks: never a mean of means. Carries no graph."""

    total: Float[Tensor, ""]
    count: float

    @staticmethod
    def of(values: Float[Tensor, "*shape"]) -> Mean:
        """The mean of all elements, detached."""
        return Mean(total=values.detach().sum(), count=float(values.numel()))


def _no_metrics() -> Mapping[str, Mean]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Terms to differentiate and metrics to log, both by name."""

    terms: Mapping[str, Term]
    metrics: Mapping[str, Mean] = field(default_factory=_no_metrics)

    def loss(self, counts: Counts) -> Float[Tensor, ""]:
        """This microbatch's share of the step's loss; shares of all microbatches add up to it.

        Args:
            counts: what the whole step holds, by unit.
        """
        return torch.stack([term.value(counts) for term in self.terms.values()]).sum()
