"""Binary Classifier Optimization: learns from thumbs up and thumbs down, one response at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from objectives.batch import LegBatch
from objectives.checks import require
from objectives.metrics import label_metrics
from objectives.needs import Needs
from objectives.output import Mean, Output, Term
from objectives.registry import OBJECTIVES


@OBJECTIVES.register("bco")
@dataclass(frozen=True, slots=True, kw_only=True)
class BCO:
    """Binary Classifier Optimization, with reward shift and underlying-distribution matching.

        loss = −log σ(r − δ)            for a desirable response,      r = β·logratio(completion)
        loss = −w·log σ(δ − r)          for an undesirable one
        w = clamp(p(x | desirable) / p(x | undesirable), w_min, w_max)     with ``prompt_encoder``, else 1

    averaged over rows (not over weights); logratio is summed over tokens. At π_θ = π_ref every row costs w·log 2.

    δ, the reward shift, is the mean of all rewards seen so far, each row once: a cumulative mean that does not decay
    and, unless ``shift`` is ``balanced``, does not balance the classes. A step uses the shift after the step before it,
    so that no loss depends on how its step is split; TRL's trainer updates it first, with the rows of one microbatch.
    Evaluation does not move it. UNVERIFIED: the paper writes δ as the mean of the two classes' expectations, which is
    ``balanced``.

    The density ratio corrects for prompts that get thumbs up and thumbs down unequally often. It comes from a logistic
    regression (balanced classes) that tells the two kinds of prompts apart by their embeddings, fitted once before
    training on ``prompt_sample_size`` prompts of each.

    References:
        Jung et al. 2024, arXiv:2404.04656; defaults as in TRL's BCOTrainer.
    """

    beta: float = 0.1
    """Inverse temperature of the implicit reward, > 0."""
    prompt_encoder: str | None = None
    """Whose embeddings of prompts the density ratio is estimated on: ``policy`` (mean of its last hidden states), or
    an encoder's Hub id or folder. Null turns distribution matching off."""
    shift: str = "mean"
    """``mean``: of all rewards, as in TRL. ``balanced``: midpoint of the two classes' means, for unequal classes: the
    mean of all is then next to the larger class's own, which is pushed away from itself without end."""
    min_density_ratio: float = 0.5
    """Least weight w_min of an undesirable row, ≥ 0."""
    max_density_ratio: float = 10.0
    """Greatest weight w_max, at least w_min."""
    prompt_sample_size: int = 1024
    """Prompts of each class that the regression is fitted on, drawn with replacement; ≥ 1."""

    def __post_init__(self) -> None:
        require("beta", self.beta, 0 < self.beta < math.inf, "> 0 and finite")
        encoder = self.prompt_encoder
        require("prompt_encoder", encoder, encoder is None or bool(encoder.strip()), "null, 'policy' or an encoder")
        require("shift", self.shift, self.shift in ("mean", "balanced"), "'mean' or 'balanced'")
        low, high = self.min_density_ratio, self.max_density_ratio
        require("min_density_ratio", low, 0 <= low < math.inf, ">= 0 and finite")
        require("max_density_ratio", high, low <= high < math.inf, f"at least min_density_ratio ({low:g}) and finite")
        require("prompt_sample_size", self.prompt_sample_size, self.prompt_sample_size >= 1, ">= 1")

    @property
    def needs(self) -> Needs:
        return Needs(legs=("completion",), reference=True, labels=True, density_ratio=self.prompt_encoder)

    @property
    def step0(self) -> float | None:
        return math.log(2) if self.prompt_encoder is None else None

    def idle(self) -> dict[str, str]:
        """Keys that have no effect beside the others, with the reason."""
        if self.prompt_encoder is not None:
            return {}
        reason = "there is no prompt_encoder, so no density ratio"
        return dict.fromkeys(("min_density_ratio", "max_density_ratio", "prompt_sample_size"), reason)

    def __call__(self, batch: LegBatch) -> Output:
        desirable = batch.known("labels")
        rewards = self.beta * batch["completion"].logratio()
        shift = self._shift(batch.state).to(rewards)
        losses = -torch.where(desirable, logsigmoid(rewards - shift), logsigmoid(shift - rewards))
        metrics = label_metrics(batch, rewards, shift, self.beta)
        if self.prompt_encoder is not None:
            ratio = batch.known("density_ratio").detach().to(rewards)
            weights = ratio.clamp(self.min_density_ratio, self.max_density_ratio)
            losses = torch.where(desirable, losses, weights * losses)
            metrics["weights/undesirable"] = Mean.of(weights[~desirable])
        return Output(terms={"preference": Term(values=losses, per="row")}, metrics=metrics)

    def _shift(self, state: Mapping[str, Tensor]) -> Tensor:
        total, count = state["reward_total"], state["reward_count"]
        if self.shift == "mean":
            return total / count.clamp(min=1)
        up, ups = state["desirable_total"], state["desirable_count"]
        return (up / ups.clamp(min=1) + (total - up) / (count - ups).clamp(min=1)) / 2

    def init_state(self) -> dict[str, Tensor]:
        """No reward seen yet; δ is then 0, and so is the mean of a class that has not been seen."""
        kinds = ("reward", "desirable") if self.shift == "balanced" else ("reward",)
        return {f"{kind}_{what}": torch.zeros((), dtype=torch.float64) for kind in kinds for what in ("total", "count")}

    def observe(self, batch: LegBatch) -> dict[str, Tensor]:
        """The rewards of a microbatch, summed and counted."""
        rewards = self.beta * batch["completion"].logratio().detach().double()
        seen = {"reward_total": rewards.sum(), "reward_count": rewards.new_tensor(float(batch.rows))}
        if self.shift == "balanced":
            up = rewards[batch.known("labels")]
            seen |= {"desirable_total": up.sum(), "desirable_count": rewards.new_tensor(float(len(up)))}
        return seen

    def update(self, state: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All rewards so far."""
        return {name: state[name] + observed[name].to(state[name].device) for name in state}
