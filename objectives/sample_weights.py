"""Sample weights: how much each row of a step counts in likelihood terms, by how hard it is among the others.

The weights of a step come from the losses of all its rows, which a pass without gradient gives before: neither
accumulation nor the number of processes changes them. They are multiples of 1 and average to 1 over the step's rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from objectives.batch import Leg, masked_sum
from objectives.checks import require
from objectives.registry import TOKEN_WEIGHTS


@runtime_checkable
class SampleWeight(Protocol):
    """Weighs the rows of a step by their mean losses.

    ``row_weights`` maps the losses of all rows of the step, nats, NaN for empty responses, to their weights.
    """

    warmup_steps: int

    @property
    def legs(self) -> tuple[str, ...]: ...
    def row_weights(self, losses: Float[Tensor, " step"]) -> Float[Tensor, " step"]: ...


def row_losses(leg: Leg) -> Float[Tensor, " row"]:
    """Mean loss of each row's counted tokens under the policy, nats, detached; NaN where there are none."""
    counted = leg.counted()
    return masked_sum(-leg.logps.detach(), counted) / counted.sum(dim=-1)  # 0/0 is NaN


def _weights(
    losses: Float[Tensor, " step"], temperature: float, shape: Callable[[Tensor], Tensor]
) -> Float[Tensor, " step"]:
    """n·softmax(shape(h)/r) over the n rows that have a loss, with h the losses scaled linearly to [−1, 1]."""
    there = losses.isfinite()
    if not bool(there.any()):
        return torch.ones_like(losses)
    known = losses[there].double()
    low, high = known.min(), known.max()
    position = (2 * known - (high + low)) / (high - low).clamp(min=1e-6)
    scores = shape(position)
    shares = torch.softmax((scores - scores.max()) / temperature, dim=0)  # the difference: a quotient may be infinite
    weights = torch.ones_like(losses, dtype=torch.float64)
    weights[there] = shares * len(known)
    # In float32 an all but excluded row would be 0, and so a row less in the counts.
    return weights.clamp(min=1e-30).to(losses)


def _check(temperature: float, warmup_steps: int) -> None:
    require("temperature", temperature, 0 < temperature < math.inf, "> 0 and finite, 0.4 or 1 in the paper")
    require("warmup_steps", warmup_steps, warmup_steps >= 0, ">= 0, 1000 in the paper's pretraining")


@TOKEN_WEIGHTS.register("lin_upper")
@dataclass(frozen=True, slots=True, kw_only=True)
class LinUpper:
    """LinUpper: rows of low loss weigh less, from the upper middle on all weigh alike.

        weight_i = n·softmax_i(f/r),    f = min(h + 1, 1),    h_i = [2·L_i − (L_max + L_min)]/(L_max − L_min)

    with L_i the mean loss of row i's tokens and the softmax over the n rows of the optimizer step; detached. With a
    likelihood that is a mean over rows (``sft`` with ``per: sequence``) the loss is the paper's Σ softmax_i·L_i; with a
    mean over tokens, rows count by their length besides, as in the authors' training script.

    For the first ``warmup_steps`` steps all weights are 1. Needs steps of many rows; equal losses give equal weights.

    References:
        Sow et al. 2025, "Dynamic loss-based sample reweighting", ICLR 2025, arXiv:2502.06733 (id UNVERIFIED), Eq. 8.
    """

    temperature: float = 0.4
    """r > 0; larger is more uniform."""
    warmup_steps: int = 0
    """Optimizer steps without weights, ≥ 0; the paper's pretraining has 1000."""
    legs: tuple[str, ...] = ()
    """Legs it acts on; empty means every leg with a likelihood term."""

    over: ClassVar[str] = "rows"

    def __post_init__(self) -> None:
        _check(self.temperature, self.warmup_steps)

    def row_weights(self, losses: Float[Tensor, " step"]) -> Float[Tensor, " step"]:
        """Weights of all rows of a step, 1 on average."""
        return _weights(losses, self.temperature, lambda h: (h + 1).clamp(max=1))


@TOKEN_WEIGHTS.register("quadratic")
@dataclass(frozen=True, slots=True, kw_only=True)
class Quadratic:
    """Quadratic: rows of middling loss weigh most.

        weight_i = n·softmax_i(f/r),    f = 1 − h²,    h_i = [2·L_i − (L_max + L_min)]/(L_max − L_min)

    with L_i the mean loss of row i's tokens and the softmax over the n rows of the optimizer step; detached. See
    ``lin_upper``.

    References:
        Sow et al. 2025, "Dynamic loss-based sample reweighting", ICLR 2025, arXiv:2502.06733 (id UNVERIFIED), Eq. 9.
    """

    temperature: float = 0.4
    """r > 0; larger is more uniform."""
    warmup_steps: int = 0
    """Optimizer steps without weights, ≥ 0; the paper's pretraining has 1000."""
    legs: tuple[str, ...] = ()
    """Legs it acts on; empty means every leg with a likelihood term."""

    over: ClassVar[str] = "rows"

    def __post_init__(self) -> None:
        _check(self.temperature, self.warmup_steps)

    def row_weights(self, losses: Float[Tensor, " step"]) -> Float[Tensor, " step"]:
        """Weights of all rows of a step, 1 on average."""
        return _weights(losses, self.temperature, lambda h: 1 - h**2)


@TOKEN_WEIGHTS.register("extremes")
@dataclass(frozen=True, slots=True, kw_only=True)
class Extremes:
    """Extremes: rows of the lowest and of the highest loss weigh most.

        weight_i = n·softmax_i(f/r),    f = |h|,    h_i = [2·L_i − (L_max + L_min)]/(L_max − L_min)

    with L_i the mean loss of row i's tokens and the softmax over the n rows of the optimizer step; detached. See
    ``lin_upper``.

    References:
        Sow et al. 2025, "Dynamic loss-based sample reweighting", ICLR 2025, arXiv:2502.06733 (id UNVERIFIED), Eq. 10.
    """

    temperature: float = 0.4
    """r > 0; larger is more uniform."""
    warmup_steps: int = 0
    """Optimizer steps without weights, ≥ 0; the paper's pretraining has 1000."""
    legs: tuple[str, ...] = ()
    """Legs it acts on; empty means every leg with a likelihood term."""

    over: ClassVar[str] = "rows"

    def __post_init__(self) -> None:
        _check(self.temperature, self.warmup_steps)

    def row_weights(self, losses: Float[Tensor, " step"]) -> Float[Tensor, " step"]:
        """Weights of all rows of a step, 1 on average."""
        return _weights(losses, self.temperature, torch.abs)
