"""Preference losses that hold on to the chosen response's likelihood: RPO (regularised) and IRPO (iterative)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import logsigmoid

from objectives.batch import LegBatch
from objectives.checks import require
from objectives.needs import Needs, PairForm
from objectives.output import Output, Term
from objectives.pairs import pair_of, preference
from objectives.registry import OBJECTIVES

PAIR = Needs(legs=("chosen", "rejected"), reference=True, likelihood=("chosen",))


@OBJECTIVES.register("rpo")
@dataclass(frozen=True, slots=True, kw_only=True)
class RPO:
    """Regularized Preference Optimization: DPO that keeps the chosen response likely.

        loss = −log σ(m) − η·β·log π_θ(chosen|x)        form cumulative: log-prob summed over tokens
        loss = −log σ(m) − η·log π_θ(chosen|x)/|chosen|    form average: log-prob per token

    with m = β·[logratio(chosen) − logratio(rejected)], logratio summed over tokens; averaged over rows. The cumulative
    form is the paper's main text (its authors prefer it for chat), the average one its appendix F (for reasoning). It
    is *not* DPO plus a token mean of the negative log-likelihood, which trainers with a list of losses offer under the
    name: the cumulative coefficient is η·β on the **summed** log-prob. With token weights, tokens of weight zero are
    left out of the likelihood, and of |chosen|.

    Two other losses are called RPO: ``irpo`` (arXiv:2404.19733), and NVIDIA's reward-aware preference optimization.

    References:
        Liu et al. 2024, arXiv:2405.16436, main text and appendix F; defaults are its settings for zephyr-7b-beta.
    """

    beta: float = 0.01
    """Inverse temperature of the implicit reward, > 0; published: 0.01 and 0.05 cumulative, 0.5 average."""
    eta: float = 0.005
    """Weight of the chosen response's likelihood, > 0; published: 0.005 cumulative, 0.2 average."""
    form: str = "cumulative"
    """``cumulative`` or ``average``; β and η of one do not suit the other."""

    needs: ClassVar[Needs] = PAIR
    pair_form: ClassVar[PairForm] = PairForm(difference=True)
    step0: ClassVar[None] = None

    def __post_init__(self) -> None:
        require("beta", self.beta, 0 < self.beta < math.inf, "> 0 and finite")
        require("eta", self.eta, 0 < self.eta < math.inf, "> 0 and finite (without it, this is dpo)")
        require("form", self.form, self.form in ("cumulative", "average"), "'cumulative' or 'average'")

    def __call__(self, batch: LegBatch) -> Output:
        leg, pair = batch["chosen"], pair_of(batch, self.beta)
        if self.form == "cumulative":
            likelihood = Term(values=pair.beta * leg.nll(), per="row", coef=self.eta)
        else:
            likelihood = Term(values=leg.mean_nll(), per="row", coef=self.eta)
        return preference(batch, pair, -logsigmoid(pair.margin), likelihood=likelihood)


@OBJECTIVES.register("irpo")
@dataclass(frozen=True, slots=True, kw_only=True)
class IRPO:
    """Iterative Reasoning Preference Optimization: DPO plus the chosen response's negative log-likelihood.

        loss = −log σ(m) + α·NLL(chosen),    m = β·[logratio(chosen) − logratio(rejected)]

    with logratio summed over tokens; the preference term is averaged over rows. ``form`` says what NLL is averaged
    over: ``token``, the chosen tokens of the whole step (TRL's ``rpo_alpha``, and the list [dpo, sft]), or
    ``sequence``, the tokens of each response and then the rows (the paper's second version, as its authors explain in
    TRL's pull request 1705; in the first one α multiplied the other term).

    References:
        Pang et al. 2024, arXiv:2404.19733; TRL up to 0.28 (``rpo_alpha``).
    """

    beta: float = 0.1
    """Inverse temperature of the implicit reward, > 0."""
    alpha: float = 1.0
    """Weight of the chosen response's likelihood, > 0."""
    form: str = "token"
    """``token`` or ``sequence``: what the likelihood is a mean over."""

    needs: ClassVar[Needs] = PAIR
    pair_form: ClassVar[PairForm] = PairForm(difference=True)
    step0: ClassVar[None] = None

    def __post_init__(self) -> None:
        require("beta", self.beta, 0 < self.beta < math.inf, "> 0 and finite")
        require("alpha", self.alpha, 0 < self.alpha < math.inf, "> 0 and finite (without it, this is dpo)")
        require("form", self.form, self.form in ("token", "sequence"), "'token' or 'sequence'")

    def __call__(self, batch: LegBatch) -> Output:
        leg = batch["chosen"]
        if self.form == "token":
            likelihood = Term(values=leg.nll(), per="chosen.token", coef=self.alpha)
        else:
            likelihood = Term(values=leg.mean_nll(), per="row", coef=self.alpha)
        pair = pair_of(batch, self.beta)
        return preference(batch, pair, -logsigmoid(pair.margin), likelihood=likelihood)
