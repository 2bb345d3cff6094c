"""Triple Preference Optimization: a preference between two responses, the likelihood of a third, no reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import relu

from objectives.batch import LegBatch
from objectives.checks import require
from objectives.metrics import response_metrics
from objectives.needs import Needs, PairForm
from objectives.output import Output, Term
from objectives.pairs import PAIR, Pair, pair_of, preference, smoothed
from objectives.registry import OBJECTIVES

TRIPLE = Needs(legs=("chosen", "rejected", "gold"), likelihood=("gold",))


@OBJECTIVES.register("tpo")
@dataclass(frozen=True, slots=True, kw_only=True)
class TPO:
    """Triple Preference Optimization.

        loss = −(1−ε)·log σ(m) − ε·log σ(−m) + α·NLL(gold),    m = β·[log π_θ(chosen|x) − log π_θ(rejected|x)]

    with log-probs summed over tokens. The preference term is averaged over rows, NLL(gold) over the gold tokens of the
    whole step. No reference model. Two equally probable responses cost log 2 beside the likelihood term.

    ``link`` replaces the preference term: ``hinge`` is max(0, 1 − m), ``ipo`` is [log π_θ(chosen|x)/|chosen| −
    log π_θ(rejected|x)/|rejected| − 1/(2β)]², per token.

    Without a reference m grows with the difference in length: look at ``lengths/chosen`` and ``lengths/rejected``.
    Where gold is the chosen response, TPO is CPO.

    References:
        Saeidi et al. 2024, arXiv:2405.16681; α, β as in TRL's TPOTrainer; links and ε from the authors' code.
    """

    beta: float = 0.01
    """Inverse temperature of the preference, > 0; 0.01 (v2) to 0.2 (v1) were published."""
    alpha: float = 1.0
    """Weight of the gold response's likelihood, ≥ 0; 1 for base models, 0.05 for instruction-tuned ones. At 0 no gold
    response is needed, or computed."""
    label_smoothing: float = 0.0
    """Assumed share ε of flipped preferences, in [0, 0.5); with link sigmoid only."""
    link: str = "sigmoid"
    """``sigmoid``, ``hinge`` or ``ipo``."""

    step0: ClassVar[None] = None

    @property
    def needs(self) -> Needs:
        return TRIPLE if self.alpha else PAIR

    @property
    def pair_form(self) -> PairForm:
        return PairForm(difference=True, per_token=self.link == "ipo")

    def __post_init__(self) -> None:
        require("beta", self.beta, 0 < self.beta < math.inf, "> 0 and finite")
        require("alpha", self.alpha, 0 <= self.alpha < math.inf, ">= 0 and finite")
        require("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 0.5, "in [0, 0.5)")
        require("link", self.link, self.link in ("sigmoid", "hinge", "ipo"), "'sigmoid', 'hinge' or 'ipo'")
        if self.link != "sigmoid" and self.label_smoothing:
            raise ValueError(f"label_smoothing has no meaning with link {self.link}; use link sigmoid, or leave it out")

    def __call__(self, batch: LegBatch) -> Output:
        pair = pair_of(batch, self.beta, reference=False, per_token=self.link == "ipo")
        if self.link == "ipo":
            losses = (pair.difference - 1 / (2 * pair.beta)) ** 2
        elif self.link == "hinge":
            losses = relu(1 - pair.margin)
        else:
            losses = smoothed(pair.margin, self.label_smoothing)
        return _output(batch, pair, losses, self.alpha)


@OBJECTIVES.register("tpo_l")
@dataclass(frozen=True, slots=True, kw_only=True)
class TPOL:
    """TPO-L: Triple Preference Optimization on length-normalised log-probs, with a target margin.

        loss = −(1−ε)·log σ(m) − ε·log σ(−m) + α·NLL(gold)
        m = β·[log π_θ(chosen|x)/|chosen| − log π_θ(rejected|x)/|rejected|] − γ

    The preference term is averaged over rows, NLL(gold) over the gold tokens of the whole step. No reference model.
    Two responses of equal log-prob per token cost log(1 + e^γ) beside the likelihood term.

    Rewards are per token, so β is of the order of 1 to 10: with the β = 0.01 that suits ``tpo`` the preference has a
    hundredth of the weight of the likelihood, and training is all but supervised fine-tuning on gold.

    References:
        Saeidi et al. 2024, arXiv:2405.16681 (v2); defaults are its settings for Mistral-v0.3-Base.
    """

    beta: float = 2.0
    """Scale of the log-prob per token, > 0; 2 to 10 were published for instruction-tuned models."""
    gamma: float = 1.6
    """Target margin, ≥ 0, in units of β times nats per token."""
    alpha: float = 0.05
    """Weight of the gold response's likelihood, ≥ 0; 1 for base models, 0.05 for instruction-tuned ones. At 0 no gold
    response is needed, or computed."""
    label_smoothing: float = 0.0
    """Assumed share ε of flipped preferences, in [0, 0.5)."""

    pair_form: ClassVar[PairForm] = PairForm(difference=True, per_token=True)
    step0: ClassVar[None] = None

    @property
    def needs(self) -> Needs:
        return TRIPLE if self.alpha else PAIR

    def __post_init__(self) -> None:
        require("beta", self.beta, 0 < self.beta < math.inf, "> 0 and finite")
        require("gamma", self.gamma, 0 <= self.gamma < math.inf, ">= 0 and finite")
        require("alpha", self.alpha, 0 <= self.alpha < math.inf, ">= 0 and finite")
        require("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 0.5, "in [0, 0.5)")

    def __call__(self, batch: LegBatch) -> Output:
        pair = pair_of(batch, self.beta, reference=False, per_token=True)
        return _output(batch, pair, smoothed(pair.margin - self.gamma, self.label_smoothing), self.alpha)


def _output(batch: LegBatch, pair: Pair, losses: Float[Tensor, " row"], alpha: float) -> Output:
    likelihood = {"likelihood": Term(values=batch["gold"].nll(), per="gold.token", coef=alpha)} if alpha else {}
    output = preference(batch, pair, losses, **likelihood)
    legs = (TRIPLE if alpha else PAIR).legs
    return Output(terms=output.terms, metrics={**output.metrics, **response_metrics(batch, legs)})
