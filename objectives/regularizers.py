"""Regularizers: what holds the trained weights near the initial ones. They see parameters, not log-probs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from objectives.checks import require
from objectives.registry import REGULARIZERS


@runtime_checkable
class Penalty(Protocol):
    """Adds ``coef``/n · Σ penalty(θ − θ₀) to the loss, over the n trained parameters."""

    coef: float

    def penalty(self, moved: Float[Tensor, ...]) -> Float[Tensor, ""]: ...


@runtime_checkable
class Averaging(Protocol):
    """Replaces the trained weights at the end of a run."""

    def averaged(self, tuned: Float[Tensor, ...], initial: Float[Tensor, ...]) -> Float[Tensor, ...]: ...


@REGULARIZERS.register("l2_init")
@dataclass(frozen=True, slots=True, kw_only=True)
class L2Init:
    """L2 (or L1) to the initial weights.

        loss' = loss + λ/n·Σ (θ − θ₀)²    norm l2        loss' = loss + λ/n·Σ |θ − θ₀|    norm l1

    over the n trained parameters, with θ₀ their values before training (on a resumed run too). Costs one copy of the
    trained parameters. With an adapter θ is the adapter's own parameters, whose size is not that of the change they
    make, so it is for full fine-tuning.

    References:
        The baseline of Sanyal et al. 2025, arXiv:2502.02797, and its authors' code; L2-SP of Li et al. 2018,
        arXiv:1802.01483.
    """

    coef: float = 0.01
    """λ > 0."""
    norm: str = "l2"
    """``l2`` or ``l1``."""

    full_fine_tuning_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require("coef", self.coef, 0 < self.coef < math.inf, "> 0 and finite, 0.01 in the authors' code")
        require("norm", self.norm, self.norm in ("l2", "l1"), "'l2' or 'l1'")

    def penalty(self, moved: Float[Tensor, ...]) -> Float[Tensor, ""]:
        """Σ of one parameter's squared (or absolute) differences, before λ/n."""
        return (moved**2).sum() if self.norm == "l2" else moved.abs().sum()


@REGULARIZERS.register("wise_ft")
@dataclass(frozen=True, slots=True, kw_only=True)
class WiseFT:
    """Weight averaging: the saved model lies between the initial and the tuned one.

        θ = α·θ_tuned + (1 − α)·θ₀

    tensor by tensor in float32, once, after training. α = 1 would be the tuned model. With an adapter that starts as
    nothing its second factor is scaled by α, which is the same average of the merged weights. To sweep α, train once
    without it and average with ``python -m align.average``.

    References:
        Wortsman et al. 2021, arXiv:2109.01903, Eq. 1.
    """

    tuned_share: float = 0.5
    """α, in (0, 1): the tuned model's share; the paper sweeps 0.1 to 0.9 and finds 0.5 close to optimal."""

    full_fine_tuning_only: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require("tuned_share", self.tuned_share, 0 < self.tuned_share < 1, "in (0, 1), 0.5 in the paper")

    def averaged(self, tuned: Float[Tensor, ...], initial: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """α·θ_tuned + (1 − α)·θ₀ of one tensor, in float32, returned in the tuned one's type."""
        mean = self.tuned_share * tuned.float() + (1 - self.tuned_share) * initial.float().to(tuned.device)
        return mean.to(tuned.dtype)
