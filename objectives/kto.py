"""Kahneman-Tversky Optimization: learns from thumbs up and thumbs down, with a saturating value function."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from objectives.batch import LegBatch
from objectives.checks import require
from objectives.metrics import label_metrics
from objectives.needs import Needs
from objectives.output import Mean, Output, Term
from objectives.registry import OBJECTIVES


@OBJECTIVES.register("kto")
@dataclass(frozen=True, slots=True, kw_only=True)
class KTO:
    """Kahneman-Tversky Optimization.

        loss = w_D·[1 − σ(β·(logratio(completion) − z))]      for a desirable response
        loss = w_U·[1 − σ(β·(z − logratio(completion)))]      for an undesirable one

    averaged over all rows (one mean, not one per class); logratio is summed over tokens. At π_θ = π_ref a row costs
    half its weight.

    z ≥ 0 estimates KL(π_θ ‖ π_ref): the mean log-ratio of ``mismatched`` responses, which belong to other prompts, at
    least 0 and without gradient. A step uses the estimate of the step before it (0 in the first), so that no loss
    depends on how its step is split; TRL's trainer takes the mean of the same microbatch.

    References:
        Ethayarajh et al. 2024, arXiv:2402.01306; weights as in TRL's KTOTrainer.
    """

    beta: float = 0.1
    """Inverse temperature, > 0."""
    desirable_weight: float = 1.0
    """w_D, > 0. Choose both so that w_D·n_D : w_U·n_U lies between 1 and 4/3 when the classes are unequal."""
    undesirable_weight: float = 1.0
    """w_U, > 0."""

    needs: ClassVar[Needs] = Needs(legs=("completion", "mismatched"), reference=True, labels=True)

    def __post_init__(self) -> None:
        for key in ("beta", "desirable_weight", "undesirable_weight"):
            require(key, getattr(self, key), 0 < getattr(self, key) < math.inf, "> 0 and finite")

    @property
    def step0(self) -> float | None:
        return 0.5 * self.desirable_weight if self.desirable_weight == self.undesirable_weight else None

    def __call__(self, batch: LegBatch) -> Output:
        desirable = batch.known("labels")
        rewards = self.beta * batch["completion"].logratio()
        z = batch.state["kl"].to(rewards)
        gain = torch.where(desirable, rewards - self.beta * z, self.beta * z - rewards)
        losses = torch.sigmoid(-gain)  # 1 − σ(gain), without cancellation
        losses = torch.where(desirable, self.desirable_weight * losses, self.undesirable_weight * losses)
        metrics = label_metrics(batch, rewards, self.beta * z, self.beta)
        metrics["kl/mismatched"] = Mean.of(batch["mismatched"].logratio())
        return Output(terms={"preference": Term(values=losses, per="row")}, metrics=metrics)

    def init_state(self) -> dict[str, Tensor]:
        """Policy and reference are the same."""
        return {"kl": torch.zeros((), dtype=torch.float64)}

    def observe(self, batch: LegBatch) -> dict[str, Tensor]:
        """Log-ratios of the mismatched responses, nats, summed and counted."""
        ratios = batch["mismatched"].logratio().detach().double()
        return {"kl_total": ratios.sum(), "kl_count": ratios.new_tensor(float(batch.rows))}

    def update(self, state: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This step's estimate, at least 0."""
        mean = observed["kl_total"] / observed["kl_count"].clamp(min=1)
        return {"kl": mean.clamp(min=0).to(state["kl"])}


@OBJECTIVES.register("apo_zero_unpaired")
@dataclass(frozen=True, slots=True, kw_only=True)
class APOZeroUnpaired:
    """Anchored Preference Optimization, zero, on labelled responses: KTO without its KL estimate.

        loss = w_D·[1 − σ(r)]      for a desirable response,      r = β·logratio(completion)
        loss = w_U·σ(r)            for an undesirable one

    averaged over all rows; logratio is summed over tokens. At π_θ = π_ref a row costs half its weight.

    References:
        D'Oosterlinck et al. 2024, arXiv:2408.06266; TRL's KTOTrainer with ``apo_zero_unpaired``.
    """

    beta: float = 0.1
    """Inverse temperature, > 0."""
    desirable_weight: float = 1.0
    """w_D, > 0."""
    undesirable_weight: float = 1.0
    """w_U, > 0."""

    needs: ClassVar[Needs] = Needs(legs=("completion",), reference=True, labels=True)

    def __post_init__(self) -> None:
        for key in ("beta", "desirable_weight", "undesirable_weight"):
            require(key, getattr(self, key), 0 < getattr(self, key) < math.inf, "> 0 and finite")

    @property
    def step0(self) -> float | None:
        return 0.5 * self.desirable_weight if self.desirable_weight == self.undesirable_weight else None

    def __call__(self, batch: LegBatch) -> Output:
        desirable = batch.known("labels")
        rewards = self.beta * batch["completion"].logratio()
        up, down = self.desirable_weight * torch.sigmoid(-rewards), self.undesirable_weight * torch.sigmoid(rewards)
        metrics = label_metrics(batch, rewards, rewards.new_zeros(()), self.beta)
        return Output(terms={"preference": Term(values=torch.where(desirable, up, down), per="row")}, metrics=metrics)
