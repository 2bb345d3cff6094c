"""Reward-aware Preference Optimization: the margin follows how much better the chosen response is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from objectives.batch import LegBatch
from objectives.checks import require
from objectives.needs import Needs, PairForm
from objectives.numerics import square
from objectives.output import Mean, Output
from objectives.pairs import pair_of, preference
from objectives.registry import OBJECTIVES

LEGS = ("chosen", "rejected")


@OBJECTIVES.register("rpo_reward_aware")
@dataclass(frozen=True, slots=True, kw_only=True)
class RewardAwareRPO:
    """Reward-aware Preference Optimization (NVIDIA's RPO): implicit margins follow the margins of scores.

        loss = KL(Bern(σ(k)) ‖ Bern(σ(m)))    distance bwd_kl
        loss = KL(Bern(σ(m)) ‖ Bern(σ(k)))    distance fwd_kl
        loss = (m − k)²                       distance sq
        m = β·[logratio(chosen) − logratio(rejected)],    k = s·[score(chosen) − score(rejected)]

    with logratio summed over tokens; averaged over rows. Every distance is 0 where m = k, so pairs that are nearly
    equal are not driven apart. At π_θ = π_ref a row costs the distance of 0 and k. A negative k (chosen scored lower)
    is a target like any other.

    Names of the distances are NeMo-Aligner's: "bwd" puts the scores' distribution first. Every row needs both scores;
    NeMo-Aligner falls back to configured defaults where they are missing.

    References:
        Nemotron-4 340B report 2024, arXiv:2406.11704 (id UNVERIFIED), section 3.3.2; NeMo-Aligner's ``rpo_*`` losses.
    """

    beta: float = 0.2
    """Inverse temperature of the implicit reward, > 0."""
    reward_scale: float = 1.0
    """s, > 0: how many units of reward a unit of score is."""
    distance: str = "bwd_kl"
    """``bwd_kl``, ``fwd_kl`` or ``sq``."""

    needs: ClassVar[Needs] = Needs(legs=LEGS, reference=True, scores=LEGS)
    pair_form: ClassVar[PairForm] = PairForm(difference=True)
    step0: ClassVar[None] = None

    def __post_init__(self) -> None:
        require("beta", self.beta, 0 < self.beta < math.inf, "> 0 and finite")
        require("reward_scale", self.reward_scale, 0 < self.reward_scale < math.inf, "> 0 and finite")
        known = self.distance in ("bwd_kl", "fwd_kl", "sq")
        require("distance", self.distance, known, "'bwd_kl', 'fwd_kl' or 'sq'")

    def __call__(self, batch: LegBatch) -> Output:
        pair = pair_of(batch, self.beta)
        target = self.reward_scale * (batch.score("chosen") - batch.score("rejected")).to(pair.margin)
        if self.distance == "sq":
            losses = square(pair.margin - target)
        elif self.distance == "bwd_kl":
            losses = bernoulli_kl(target, pair.margin)
        else:
            losses = bernoulli_kl(pair.margin, target)
        output = preference(batch, pair, losses)
        return Output(terms=output.terms, metrics={**output.metrics, "rewards/target_margins": Mean.of(target)})


def bernoulli_kl(first: Float[Tensor, " row"], second: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
    """KL(Bern(σ(first)) ‖ Bern(σ(second))), from logits, nats."""
    up = logsigmoid(first).exp() * (logsigmoid(first) - logsigmoid(second))
    return up + logsigmoid(-first).exp() * (logsigmoid(-first) - logsigmoid(-second))
