"""Legs: per-token log-probabilities of the responses, after the model is gone.

The forward pass packs; what arrives here is dense ``(row, token)`` matrices, so that an objective is written as if
batches were simply padded. What lies outside ``mask`` is never read, NaN included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from objectives.output import Counts


def masked_sum(values: Float[Tensor, "row token"], mask: Bool[Tensor, "row token"]) -> Float[Tensor, " row"]:
    """Sums over tokens where ``mask`` holds; what lies elsewhere, NaN included, has no effect."""
    return torch.where(mask, values, 0.0).sum(dim=-1)  # not values * mask: NaN * 0 is NaN


def _nothing() -> Mapping[str, Tensor]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """One kind of response (chosen, rejected, gold, …) for every row of a batch."""

    logps: Float[Tensor, "row token"]
    """Policy log-probabilities, nats, float32 (float64 in tests)."""
    mask: Bool[Tensor, "row token"]
    """True on response tokens, the end-of-turn token included."""
    tokens: Int[Tensor, "row token"]
    """Token ids, for token weights that hash them."""
    ref_logps: Float[Tensor, "row token"] | None = None
    """Log-probabilities under the frozen reference; None unless the objective needs them."""
    weight: Float[Tensor, "row token"] | None = None
    """Weight of each token in likelihood terms, ≥ 0; None means 1 everywhere."""
    share: Float[Tensor, "row token"] | None = None
    """How much of each token's log-prob enters sums, in [0, 1] (LD-DPO); None means all. Likelihood terms ignore it."""
    ref_share: Float[Tensor, "row token"] | None = None
    """The same for the reference's log-probs."""
    extras: Mapping[str, Tensor] = field(default_factory=_nothing)
    """Further numbers per token, (row, token) each; only what was declared in ``Needs(extras=...)``."""
    values: Mapping[str, Tensor] = field(default_factory=_nothing)
    """Outputs of a scalar head at the last token, by name, (row,) each; only for reward models."""

    def length(self) -> Float[Tensor, " row"]:
        """Response tokens of each row."""
        return self.mask.sum(dim=-1).to(self.logps.dtype)

    def sum_logps(self) -> Float[Tensor, " row"]:
        """log π_θ(y|x), summed over tokens, nats."""
        return _shared_sum(self.logps, self.share, self.mask)

    def mean_logps(self) -> Float[Tensor, " row"]:
        """log π_θ(y|x) / |y|; 0 for an empty response."""
        return self.sum_logps() / self.length().clamp(min=1)

    def ref_sum_logps(self) -> Float[Tensor, " row"]:
        """log π_ref(y|x), summed over tokens, nats, without gradient."""
        return _shared_sum(self._reference(), self.ref_share, self.mask)

    def logratio(self) -> Float[Tensor, " row"]:
        """log π_θ(y|x) − log π_ref(y|x), summed over tokens, nats."""
        return self.sum_logps() - self.ref_sum_logps()

    def token_logratios(self) -> Float[Tensor, "row token"]:
        """log π_θ(y_t) − log π_ref(y_t) of every response token, nats; 0 elsewhere."""
        return torch.where(self.mask, self.logps - self._reference(), 0.0)

    def _reference(self) -> Float[Tensor, "row token"]:
        if self.ref_logps is None:
            raise ValueError("this leg has no reference log-probs; the objective must declare Needs(reference=True)")
        return self.ref_logps.detach()

    def nll(self) -> Float[Tensor, " row"]:
        """−Σ_t weight_t · log π_θ(y_t|x, y_<t), nats: the likelihood terms' sum."""
        if self.weight is None:
            return -masked_sum(self.logps, self.mask)
        # A weight of zero also drops tokens whose log-prob is −inf: 0 · inf would be NaN.
        counted = self.counted()
        return -masked_sum(torch.where(counted, self.logps, 0.0) * self.weight, counted)

    def counted(self) -> Bool[Tensor, "row token"]:
        """The tokens that likelihood terms average over: those of ``mask`` whose weight is not zero."""
        return self.mask if self.weight is None else self.mask & (self.weight != 0)

    def mean_nll(self) -> Float[Tensor, " row"]:
        """``nll`` per counted token of the row, nats; 0 where none is counted."""
        return self.nll() / self.counted().sum(dim=-1).to(self.logps.dtype).clamp(min=1)

    def extra(self, name: str) -> Float[Tensor, "row token"]:
        """A number per token that the objective declared.

        Raises:
            ValueError: it was not supplied.
        """
        if name not in self.extras:
            raise ValueError(f"this leg has no {name!r}; the objective must declare it in Needs(extras=...)")
        return self.extras[name]

    def value(self, name: str) -> Float[Tensor, " row"]:
        """One output of the scalar head.

        Raises:
            ValueError: the head has no such output.
        """
        if name not in self.values:
            raise ValueError(f"this leg has no value {name!r}; the objective must declare it in Needs(values=...)")
        return self.values[name]


def _shared_sum(
    logps: Float[Tensor, "row token"], share: Float[Tensor, "row token"] | None, mask: Bool[Tensor, "row token"]
) -> Float[Tensor, " row"]:
    if share is None:
        return masked_sum(logps, mask)
    # A share of zero also drops tokens whose log-prob is −inf: 0 · inf would be NaN.
    mask = mask & (share != 0)
    return masked_sum(torch.where(mask, logps, 0.0) * share, mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adjustment:
    """What modifiers do to the pairs of a batch (see ``objectives.pairs``)."""

    beta: Float[Tensor, " row"] | None = None
    """Factor of each pair's β, > 0."""
    margin: Float[Tensor, " row"] | None = None
    """Added to each pair's margin, in units of reward."""
    divergence: Callable[[Tensor], Tensor] | None = None
    """f′ of the divergence that holds policy and reference together, as a function of the log-ratio."""


AS_IT_IS = Adjustment()


@dataclass(frozen=True, slots=True, kw_only=True)
class LegBatch:
    """The legs of some rows, what is known of each row, and the objective's state after the step before."""

    legs: Mapping[str, Leg]
    labels: Bool[Tensor, " row"] | None = None
    """True for desirable rows; None unless the objective needs labels."""
    density_ratio: Float[Tensor, " row"] | None = None
    """p(prompt | desirable) / p(prompt | undesirable), > 0; None unless the objective needs it."""
    scores: Mapping[str, Tensor] = field(default_factory=_nothing)
    """Scores of responses by leg or attribute, and columns by name, (row,) each; NaN where a row has no rating of an
    attribute. Only what was declared."""
    state: Mapping[str, Tensor] = field(default_factory=_nothing)
    """The objective's state after the step before."""
    step: Mapping[str, Tensor] | None = None
    """What ``step_pass`` found of **all** rows of the optimizer step, one number per row; None without such a pass."""
    place: Int[Tensor, " row"] | None = None
    """Where in the arrays of ``step`` each row of this batch stands."""
    adjust: Adjustment = AS_IT_IS
    """What modifiers do to its pairs."""

    def __getitem__(self, name: str) -> Leg:
        if name not in self.legs:
            raise KeyError(f"no leg {name!r} here, only {list(self.legs)}: declare it in Needs(legs=...)")
        return self.legs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.legs)

    def known(self, name: str) -> Tensor:
        """``labels`` or ``density_ratio``.

        Raises:
            ValueError: it was not supplied.
        """
        values = getattr(self, name)
        if values is None:
            raise ValueError(f"the rows have no {name} here; the objective must declare it in Needs")
        return values

    def score(self, name: str) -> Float[Tensor, " row"]:
        """Scores of one leg or attribute, or a column of ``objectives.columns``, without gradient.

        Raises:
            ValueError: they were not supplied.
        """
        if name not in self.scores:
            raise ValueError(f"the rows have no score {name!r} here; the objective must declare it in Needs")
        return self.scores[name].detach()

    def whole_step(self) -> tuple[Mapping[str, Tensor], Int[Tensor, " row"]]:
        """What is known of all rows of the step, without gradient, and where this batch's rows stand in it.

        Raises:
            ValueError: there was no such pass.
        """
        if self.step is None or self.place is None:
            raise ValueError("this objective couples the rows of a step: give it batch.step and batch.place")
        return {name: values.detach() for name, values in self.step.items()}, self.place

    @property
    def rows(self) -> int:
        """How many rows the batch holds."""
        return next(iter(self.legs.values())).logps.shape[0]

    def counts(self) -> Counts:
        """What this batch holds of each unit a term can be averaged over."""
        sums = {f"{name}.token": leg.counted().sum() for name, leg in self.legs.items()}
        sums |= {
            f"{name}.number": (leg.mask & leg.extras["number_value"].isfinite()).sum()
            for name, leg in self.legs.items()
            if "number_value" in leg.extras
        }
        found = torch.stack([*sums.values()]).cpu()  # a device is asked once
        return {"row": float(self.rows), **{name: float(each) for name, each in zip(sums, found, strict=True)}}
