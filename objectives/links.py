"""Other functions of DPO's margin than the logistic one: hinge, square, KL, a discovered one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid, relu

from objectives.batch import LegBatch
from objectives.checks import require
from objectives.needs import Needs, PairForm
from objectives.numerics import square
from objectives.output import Output
from objectives.pairs import PAIR_AND_REFERENCE, pair_of, preference
from objectives.registry import OBJECTIVES


@OBJECTIVES.register("hinge")
@dataclass(frozen=True, slots=True, kw_only=True)
class Hinge:
    """Hinge loss on DPO's margin: a pair that is apart by 1 is left alone.

        loss = max(0, 1 − m),    m = β·[logratio(chosen) − logratio(rejected)]

    with logratio summed over tokens; averaged over rows. At π_θ = π_ref every row costs 1; from m = 1 on there is no
    gradient.

    This is the form of RSO, with a reference. SLiC-HF itself has none: ``cpo`` with ``link: hinge`` and a small
    ``cpo_alpha`` is close to it.

    References:
        Zhao et al. 2023 (SLiC-HF), arXiv:2305.10425; Liu et al. 2023 (RSO), arXiv:2309.06657, Eq. 10. TRL's ``hinge``.
    """

    beta: float = 0.1
    """Scale of the margin, > 0: a pair is done when its log-ratios differ by 1/β nats."""

    needs: ClassVar[Needs] = PAIR_AND_REFERENCE
    pair_form: ClassVar[PairForm] = PairForm(difference=True)
    step0: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        require("beta", self.beta, 0 < self.beta < math.inf, "> 0 and finite")

    def __call__(self, batch: LegBatch) -> Output:
        pair = pair_of(batch, self.beta)
        return preference(batch, pair, relu(1 - pair.margin))


@OBJECTIVES.register("ipo")
@dataclass(frozen=True, slots=True, kw_only=True)
class IPO:
    """Identity Preference Optimization: the margin is led to a finite target.

        loss = [logratio(chosen)/|chosen| − logratio(rejected)/|rejected| − 1/(2β)]²      form mean
        loss = [logratio(chosen) − logratio(rejected) − 1/(2β)]²                          form sum

    averaged over rows; logratio is summed over tokens, |y| counts them. At π_θ = π_ref every row costs 1/(4β²).

    The paper writes sums; its authors confirmed to TRL that their results come from means, which do not grow with
    length. β is the paper's τ. The target 1/(2β) is *per token* with means: at β = 0.1 five nats a token, which is
    aggressive. A β that suits one form does not suit the other, nor ``dpo``. Trainers disagree: OpenRLHF takes sums.

    References:
        Azar et al. 2023, arXiv:2310.12036, Eq. 17; means as in TRL's ``ipo``.
    """

    beta: float = 0.1
    """The paper's τ, > 0: the target is 1/(2β) nats."""
    reduction: str = "mean"
    """``mean`` (per token) or ``sum`` (per response)."""

    needs: ClassVar[Needs] = PAIR_AND_REFERENCE

    def __post_init__(self) -> None:
        require("beta", self.beta, 0 < self.beta < math.inf, "> 0 and finite")
        require("reduction", self.reduction, self.reduction in ("mean", "sum"), "'mean' or 'sum'")

    @property
    def pair_form(self) -> PairForm:
        return PairForm(difference=True, per_token=self.reduction == "mean")

    @property
    def step0(self) -> float:
        return 1 / (4 * self.beta**2)

    def __call__(self, batch: LegBatch) -> Output:
        pair = pair_of(batch, self.beta, per_token=self.reduction == "mean")
        return preference(batch, pair, square(pair.difference - 1 / (2 * pair.beta)))


@OBJECTIVES.register("exo")
@dataclass(frozen=True, slots=True, kw_only=True)
class EXO:
    """Efficient Exact Optimization on pairs: reverse KL between the policy's and the smoothed preference.

        loss = σ(m)·[log σ(m) − log(1−ε)] + σ(−m)·[log σ(−m) − log ε],    m = β·[logratio(chosen) − logratio(rejected)]

    with logratio summed over tokens; averaged over rows. Its minimum, 0, is at m = log((1−ε)/ε): 6.9 for ε = 0.001.
    At π_θ = π_ref every row costs −log 2 − ½·log(ε·(1−ε)).

    References:
        Ji et al. 2024, arXiv:2402.00856, Eq. 16; ε as in TRL's ``exo_pair``.
    """

    beta: float = 0.1
    """Inverse temperature of the implicit reward, > 0."""
    label_smoothing: float = 1e-3
    """Probability ε that the preference gives to the rejected response, in (0, 0.5)."""

    needs: ClassVar[Needs] = PAIR_AND_REFERENCE
    pair_form: ClassVar[PairForm] = PairForm(difference=True)

    def __post_init__(self) -> None:
        require("beta", self.beta, 0 < self.beta < math.inf, "> 0 and finite")
        within = 0 < self.label_smoothing < 0.5
        require("label_smoothing", self.label_smoothing, within, "in (0, 0.5), 0.001 in TRL; at 0 the loss is infinite")

    @property
    def step0(self) -> float:
        return -math.log(2) - 0.5 * (math.log1p(-self.label_smoothing) + math.log(self.label_smoothing))

    def __call__(self, batch: LegBatch) -> Output:
        pair = pair_of(batch, self.beta)
        prefers, rejects = logsigmoid(pair.margin), logsigmoid(-pair.margin)
        kept, flipped = math.log1p(-self.label_smoothing), math.log(self.label_smoothing)
        return preference(batch, pair, prefers.exp() * (prefers - kept) + rejects.exp() * (rejects - flipped))


@OBJECTIVES.register("discopop")
@dataclass(frozen=True, slots=True, kw_only=True)
class DiscoPOP:
    """Discovered Preference Optimization (LRML): a blend of logistic and exponential loss, found by a language model.

        loss = (1−g)·[−log σ(m)] + g·exp(−m),    g = σ(m/τ),    m = β·[logratio(chosen) − logratio(rejected)]

    with logratio summed over tokens; averaged over rows. At π_θ = π_ref every row costs (log 2 + 1)/2. Gradient flows
    through g; as g switches near m = 0, the loss is not convex there: at τ = 0.05 it *rises* with m at m = 0 (slope
    0.78), so the first step lowers margins, as published.

    g·exp(−m) is computed as exp(log g − m): in the product the second factor overflows where the first is 0.

    References:
        Lu et al. 2024, arXiv:2406.08414, Eq. 5; default β is the paper's. TRL's ``discopop``.
    """

    beta: float = 0.05
    """Inverse temperature of the implicit reward, > 0."""
    tau: float = 0.05
    """Temperature τ of the gate, in (0, 1]."""

    needs: ClassVar[Needs] = PAIR_AND_REFERENCE
    pair_form: ClassVar[PairForm] = PairForm(difference=True)
    step0: ClassVar[float] = (math.log(2) + 1) / 2

    def __post_init__(self) -> None:
        require("beta", self.beta, 0 < self.beta < math.inf, "> 0 and finite")
        # With τ > 1 the gate would close more slowly than exp(−m) grows, and the loss overflow.
        require("tau", self.tau, 0 < self.tau <= 1, "in (0, 1], 0.05 in the paper")

    def __call__(self, batch: LegBatch) -> Output:
        pair = pair_of(batch, self.beta)
        exponential = torch.exp(logsigmoid(pair.margin / self.tau) - pair.margin)
        logistic = -torch.sigmoid(-pair.margin / self.tau) * logsigmoid(pair.margin)
        return preference(batch, pair, logistic + exponential)
