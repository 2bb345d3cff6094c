"""Preference losses without a reference model: CPO, SimPO, AlphaPO, ORPO."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from objectives.batch import LegBatch
from objectives.checks import require
from objectives.metrics import response_metrics
from objectives.needs import Needs, PairForm
from objectives.numerics import capped_exp, log1mexp
from objectives.output import Mean, Output, Term
from objectives.pairs import PAIR, Pair, pair_of, preference, smoothed
from objectives.registry import OBJECTIVES

LEGS = ("chosen", "rejected")
WITH_LIKELIHOOD = Needs(legs=LEGS, likelihood=("chosen",))


@OBJECTIVES.register("cpo")
@dataclass(frozen=True, slots=True, kw_only=True)
class CPO:
    """Contrastive Preference Optimization: DPO's loss with a uniform reference, plus the chosen likelihood.

        loss = −(1−ε)·log σ(m) − ε·log σ(−m) + α·NLL(chosen),    m = β·[log π_θ(chosen|x) − log π_θ(rejected|x)]

    with log-probs summed over tokens. The preference term is averaged over rows, NLL(chosen) over the chosen tokens of
    the whole step. Two equally probable responses cost log 2 beside the likelihood term.

    ``link`` replaces the preference term: ``hinge`` is max(0, 1 − m), ``ipo`` is [log π_θ(chosen|x)/|chosen| −
    log π_θ(rejected|x)/|rejected| − 1/(2β)]², per token. Without a reference m grows with the difference in length.

    References:
        Xu et al. 2024, arXiv:2401.08417, Eq. 7; defaults and links as in TRL's CPOTrainer.
    """

    beta: float = 0.1
    """Inverse temperature of the preference, > 0."""
    cpo_alpha: float = 1.0
    """Weight of the chosen response's likelihood, ≥ 0."""
    label_smoothing: float = 0.0
    """Assumed share ε of flipped preferences, in [0, 0.5); with link sigmoid only."""
    link: str = "sigmoid"
    """``sigmoid``, ``hinge`` or ``ipo``."""

    step0: ClassVar[None] = None

    def __post_init__(self) -> None:
        require("beta", self.beta, 0 < self.beta < math.inf, "> 0 and finite")
        require("cpo_alpha", self.cpo_alpha, 0 <= self.cpo_alpha < math.inf, ">= 0 and finite, 1 in the paper")
        require("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 0.5, "in [0, 0.5)")
        require("link", self.link, self.link in ("sigmoid", "hinge", "ipo"), "'sigmoid', 'hinge' or 'ipo'")
        if self.link != "sigmoid" and self.label_smoothing:
            raise ValueError(f"label_smoothing has no meaning with link {self.link}; use link sigmoid, or leave it out")

    @property
    def needs(self) -> Needs:
        return WITH_LIKELIHOOD if self.cpo_alpha else PAIR

    @property
    def pair_form(self) -> PairForm:
        return PairForm(difference=True, per_token=self.link == "ipo")

    def __call__(self, batch: LegBatch) -> Output:
        pair = pair_of(batch, self.beta, reference=False, per_token=self.link == "ipo")
        if self.link == "ipo":
            losses = (pair.difference - 1 / (2 * pair.beta)) ** 2
        elif self.link == "hinge":
            losses = relu(1 - pair.margin)
        else:
            losses = smoothed(pair.margin, self.label_smoothing)
        likelihood = Term(values=batch["chosen"].nll(), per="chosen.token", coef=self.cpo_alpha)
        output = preference(batch, pair, losses, **({"likelihood": likelihood} if self.cpo_alpha else {}))
        return Output(terms=output.terms, metrics={**output.metrics, **response_metrics(batch, LEGS)})


@OBJECTIVES.register("simpo")
@dataclass(frozen=True, slots=True, kw_only=True)
class SimPO:
    """Simple Preference Optimization: log-probs per token and a target margin, no reference.

        loss = −(1−ε)·log σ(m) − ε·log σ(−m)
        m = β·[log π_θ(chosen|x)/|chosen| − log π_θ(rejected|x)/|rejected|] − γ

    averaged over rows. Two responses of equal log-prob per token cost log(1 + e^γ) (for ε = 0).

    Rewards are per token, so β is of the order of 2 to 10; a γ beside a β of 0.01 saturates the loss. γ is absolute
    here, as TRL's ``simpo_gamma``; the authors' ``gamma_beta_ratio`` is γ/β. Published (β, γ/β, learning rate):
    Mistral-Base 2, 0.8, 3e-7; Mistral-Instruct 2.5, 0.1, 5e-7; Llama-3-Base 2, 0.5, 6e-7; Llama-3-Instruct 2.5, 0.55,
    1e-6 (v0.2: 10, 0.3); Gemma-2 10, 0.5, 8e-7. A prompt with two BOS tokens changes results noticeably.

    References:
        Meng et al. 2024, arXiv:2405.14734, Eq. 6; default β and γ as in the authors' code.
    """

    beta: float = 2.0
    """Scale of the log-prob per token, > 0."""
    gamma: float = 0.5
    """Target margin γ, ≥ 0, in units of β times nats per token."""
    label_smoothing: float = 0.0
    """Assumed share ε of flipped preferences, in [0, 0.5)."""

    needs: ClassVar[Needs] = PAIR
    pair_form: ClassVar[PairForm] = PairForm(difference=True, per_token=True)
    step0: ClassVar[None] = None

    def __post_init__(self) -> None:
        require("beta", self.beta, 0 < self.beta < math.inf, "> 0 and finite")
        require("gamma", self.gamma, 0 <= self.gamma < math.inf, ">= 0 and finite")
        require("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 0.5, "in [0, 0.5)")

    def __call__(self, batch: LegBatch) -> Output:
        pair = pair_of(batch, self.beta, reference=False, per_token=True)
        output = preference(batch, pair, smoothed(pair.margin - self.gamma, self.label_smoothing))
        reached = (pair.margin > self.gamma).to(pair.margin)
        further = {**response_metrics(batch, LEGS), "rewards/above_target": Mean.of(reached)}
        return Output(terms=output.terms, metrics={**output.metrics, **further})


@OBJECTIVES.register("alpha_po")
@dataclass(frozen=True, slots=True, kw_only=True)
class AlphaPO:
    """AlphaPO: SimPO with a reward whose shape α bends.

        loss = −log σ(m),    m = β·[r(chosen) − r(rejected)] − γ
        r(y) = [1 − exp(−α·log π_θ(y|x)/|y|)] / α        (α → 0: the log-prob per token, and this is SimPO)

    averaged over rows. Two responses of equal log-prob per token cost log(1 + e^γ).

    With α > 0 improbable responses lie further apart, with α < 0 closer together. The exponent is capped at 80, beyond
    which float32 overflows; TRL's exp(a) to the power −α gives NaN once exp(a) underflows.

    References:
        Gupta et al. 2025, arXiv:2501.03884, Eq. 4–5; defaults are the paper's for Llama-3-8B-Instruct.
    """

    beta: float = 2.5
    """Scale of the reward, > 0."""
    alpha: float = 0.25
    """Shape α of the reward, in [−10, 10]; 0 is SimPO."""
    gamma: float = 0.1
    """Target margin γ, ≥ 0."""

    needs: ClassVar[Needs] = PAIR
    pair_form: ClassVar[PairForm] = PairForm(difference=True, per_token=True)
    step0: ClassVar[None] = None

    def __post_init__(self) -> None:
        require("beta", self.beta, 0 < self.beta < math.inf, "> 0 and finite")
        require("alpha", self.alpha, -10 <= self.alpha <= 10, "in [-10, 10], 0.25 in the paper")
        require("gamma", self.gamma, 0 <= self.gamma < math.inf, ">= 0 and finite")

    def __call__(self, batch: LegBatch) -> Output:
        pair = pair_of(batch, self.beta, reference=False, per_token=True)
        bent = self.reward(batch["chosen"].mean_logps()) - self.reward(batch["rejected"].mean_logps())
        output = preference(batch, pair, -logsigmoid(pair.beta * bent - self.gamma))
        return Output(terms=output.terms, metrics={**output.metrics, **response_metrics(batch, LEGS)})

    def reward(self, mean_logps: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
        """r(y), of the log-prob per token."""
        if abs(self.alpha) < 1e-6:
            return mean_logps
        return (1 - capped_exp(-self.alpha * mean_logps)) / self.alpha


@OBJECTIVES.register("orpo")
@dataclass(frozen=True, slots=True, kw_only=True)
class ORPO:
    """Odds Ratio Preference Optimization: supervised fine-tuning and a preference on odds, in one stage.

        loss = NLL(chosen) + β·[−log σ(o)],    o = log odds(chosen) − log odds(rejected)
        log odds(y) = a − log(1 − e^a),    a = log π_θ(y|x)/|y|

    The odds term is averaged over rows; NLL(chosen) over the chosen tokens of the whole step (``nll: token``) or over
    the tokens of each response and then rows (``sequence``). Two responses of equal log-prob per token cost β·log 2
    beside the likelihood term.

    NLL covers the response, as in the paper's formula. TRL's ORPOTrainer takes it over prompt *and* response, which is
    another loss. a is held at most −1e-6, where a response is certain and its odds infinite.

    References:
        Hong et al. 2024, arXiv:2403.07691, Eq. 6–7; β is the paper's λ, named and set as in TRL.
    """

    beta: float = 0.1
    """Weight of the odds term (the paper's λ), > 0."""
    nll: str = "token"
    """``token`` or ``sequence``: what the likelihood is a mean over."""

    needs: ClassVar[Needs] = WITH_LIKELIHOOD
    pair_form: ClassVar[PairForm] = PairForm(difference=False, per_token=True, own_beta=True)
    step0: ClassVar[None] = None

    def __post_init__(self) -> None:
        require("beta", self.beta, 0 < self.beta < math.inf, "> 0 and finite")
        require("nll", self.nll, self.nll in ("token", "sequence"), "'token' or 'sequence'")

    def __call__(self, batch: LegBatch) -> Output:
        chosen, rejected = (batch[leg].mean_logps().clamp(max=-1e-6) for leg in LEGS)
        odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
        leg = batch["chosen"]
        likelihood = (
            Term(values=leg.nll(), per="chosen.token")
            if self.nll == "token"
            else Term(values=leg.mean_nll(), per="row")
        )
        pair = Pair(
            chosen=self.beta * chosen, rejected=self.beta * rejected, difference=odds, beta=self.beta, per_token=True
        )
        output = preference(batch, pair, -logsigmoid(odds))
        terms = {
            "preference": Term(values=output.terms["preference"].values, per="row", coef=self.beta),
            "likelihood": likelihood,
        }
        further = {"odds/log_ratio": Mean.of(odds), **response_metrics(batch, LEGS)}
        return Output(terms=terms, metrics={**output.metrics, **further})
