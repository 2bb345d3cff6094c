"""Alignment via Optimal Transport: compares how rewards are distributed, not pair by pair."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from objectives.batch import LegBatch
from objectives.checks import require
from objectives.needs import Needs, PairForm
from objectives.output import Output
from objectives.pairs import PAIR_AND_REFERENCE, pair_of, preference, smoothed
from objectives.registry import OBJECTIVES

SORTED = PairForm(difference=True, coupled=True)


@OBJECTIVES.register("aot")
@dataclass(frozen=True, slots=True, kw_only=True)
class AOT:
    """Alignment via Optimal Transport, paired: the policy's margins as a whole are led above the reference's.

        loss = −(1−ε)·log σ(β·D_j) − ε·log σ(−β·D_j),    D_j = a_(j) − b_(j)
        a = log π_θ(chosen|x) − log π_θ(rejected|x),    b = the same under π_ref

    with a_(j) the j-th smallest of **all rows of the optimizer step**; log-probs summed over tokens; averaged over
    rows. At π_θ = π_ref every row costs log 2. A step of one row is DPO.

    The sort takes a pass over the step without gradient, before its losses; so neither accumulation nor the number of
    processes changes what is sorted. TRL sorts within a microbatch of one device, where its loss depends on both.

    References:
        Melnyk et al. 2024, arXiv:2406.05882, Eq. 5 (paired); TRL's ``aot``.
    """

    beta: float = 0.1
    """Inverse temperature of the implicit reward, > 0; the paper's is 0.01."""
    label_smoothing: float = 0.0
    """Assumed share ε of flipped preferences, in [0, 0.5)."""

    needs: ClassVar[Needs] = PAIR_AND_REFERENCE
    pair_form: ClassVar[PairForm] = SORTED
    step0: ClassVar[float] = math.log(2)

    def __post_init__(self) -> None:
        require("beta", self.beta, 0 < self.beta < math.inf, "> 0 and finite")
        require("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 0.5, "in [0, 0.5)")

    def step_pass(self, batch: LegBatch) -> dict[str, Tensor]:
        """Margins of policy and reference, nats."""
        reference = batch["chosen"].ref_sum_logps() - batch["rejected"].ref_sum_logps()
        return {"policy": _policy_margin(batch).detach(), "reference": reference}

    def __call__(self, batch: LegBatch) -> Output:
        step, place = batch.whole_step()
        partner = step["reference"].sort().values[_rank(step["policy"])[place]]
        losses = smoothed(self.beta * (_policy_margin(batch) - partner), self.label_smoothing)
        return preference(batch, pair_of(batch, self.beta), losses)


@OBJECTIVES.register("aot_unpaired")
@dataclass(frozen=True, slots=True, kw_only=True)
class AOTUnpaired:
    """Alignment via Optimal Transport, unpaired: chosen rewards as a whole are led above rejected ones.

        loss = −(1−ε)·log σ(β·D_j) − ε·log σ(−β·D_j),    D_j = u_(j) − v_(j)

    with u and v the log-ratios of chosen and rejected responses, u_(j) the j-th smallest of **all rows of the optimizer
    step**; summed over tokens; averaged over rows. At π_θ = π_ref every row costs log 2. A step of one row is DPO.

    The sort takes a pass over the step without gradient, before its losses. A row's u meets the v of another row; each
    row carries the loss at its own u, and the gradient at its own v, so rows add up to the step's loss and gradient
    wherever they are computed. TRL sorts within a microbatch of one device.

    References:
        Melnyk et al. 2024, arXiv:2406.05882, Eq. 7 (unpaired); TRL's ``aot_unpaired``, called ``aot_pair`` before 0.29.
    """

    beta: float = 0.1
    """Inverse temperature of the implicit reward, > 0; the paper's is 0.01."""
    label_smoothing: float = 0.0
    """Assumed share ε of flipped preferences, in [0, 0.5)."""

    needs: ClassVar[Needs] = PAIR_AND_REFERENCE
    pair_form: ClassVar[PairForm] = SORTED
    step0: ClassVar[float] = math.log(2)

    def __post_init__(self) -> None:
        require("beta", self.beta, 0 < self.beta < math.inf, "> 0 and finite")
        require("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 0.5, "in [0, 0.5)")

    def step_pass(self, batch: LegBatch) -> dict[str, Tensor]:
        """Log-ratios of both legs, nats."""
        return {name: batch[name].logratio().detach() for name in ("chosen", "rejected")}

    def __call__(self, batch: LegBatch) -> Output:
        step, place = batch.whole_step()
        above = step["rejected"].sort().values[_rank(step["chosen"])[place]]
        below = step["chosen"].sort().values[_rank(step["rejected"])[place]]
        losses = self._losses(batch["chosen"].logratio() - above)
        pushed = self._losses(below - batch["rejected"].logratio())
        return preference(batch, pair_of(batch, self.beta), losses + (pushed - pushed.detach()))

    def _losses(self, difference: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
        return smoothed(self.beta * difference, self.label_smoothing)


def _policy_margin(batch: LegBatch) -> Float[Tensor, " row"]:
    return batch["chosen"].sum_logps() - batch["rejected"].sum_logps()


def _rank(values: Float[Tensor, " step"]) -> Int[Tensor, " step"]:
    """How many of the values come before each, in ascending order."""
    order = values.argsort(stable=True)
    return torch.empty_like(order).index_put_((order,), torch.arange(len(order), device=order.device))
