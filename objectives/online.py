"""Objectives on the policy's own samples, which rounds of sampling and scoring supply: XPO and Nash-MD.

Online DPO needs no objective of its own: it is ``dpo``, or ``ipo`` with ``reduction: sum``, on pairs of samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import logsigmoid

from objectives.batch import LegBatch, masked_sum
from objectives.checks import require
from objectives.needs import Needs, PairForm
from objectives.output import Mean, Output, Term
from objectives.pairs import pair_of, preference
from objectives.registry import OBJECTIVES


@OBJECTIVES.register("xpo")
@dataclass(frozen=True, slots=True, kw_only=True)
class XPO:
    """Exploratory Preference Optimization: online DPO that moves away from what the reference would have said.

        loss = −log σ(m) + α·log π_θ(y_ref|x),    m = β·[logratio(chosen) − logratio(rejected)]

    with y_ref the reference's sample, whichever of the two responses that is; log-probs are summed over tokens;
    averaged over rows. At π_θ = π_ref a row costs log 2 + α·log π_ref(y_ref|x): 0.692747 where y_ref has −40 nats and
    α = 1e-5.

    One response of every pair is a sample of the policy, the other of the reference; the column ``chosen_by`` says who
    wrote the chosen one, ``policy`` or ``reference``. The added term is a bonus for optimism. It makes y_ref less
    likely even where it won, and has no lower bound, so α has to be far below β. Token weights don't act on it, nor
    does a modifier that shortens sums.

    Samples are as fresh as their round: after its first step the policy's sample is of an earlier policy, and the pair
    one like any other. The paper sums over the pairs of all rounds so far; here a round's rows decide. TRL can put the
    square of ``ipo`` in the place of −log σ(m), which is not here. UNVERIFIED: the α of the paper's experiments.

    References:
        Xie et al. 2024, arXiv:2405.21046, Algorithm 1; defaults as in TRL's XPOTrainer (up to 1.10).
    """

    beta: float = 0.1
    """Inverse temperature of the implicit reward, > 0."""
    alpha: float = 1e-5
    """Weight α of the reference's sample, > 0, per nat of its summed log-prob."""

    needs: ClassVar[Needs] = Needs(legs=("chosen", "rejected"), reference=True, columns=("chosen_by",))
    pair_form: ClassVar[PairForm] = PairForm(difference=True)
    step0: ClassVar[None] = None

    def __post_init__(self) -> None:
        require("beta", self.beta, 0 < self.beta < math.inf, "> 0 and finite")
        require("alpha", self.alpha, 0 < self.alpha < math.inf, "> 0 and finite (without it, this is dpo)")

    def __call__(self, batch: LegBatch) -> Output:
        pair = pair_of(batch, self.beta)
        # Not sum_logps, of which LD-DPO would keep a share: what explores is the whole response.
        chosen, rejected = (masked_sum(batch[name].logps, batch[name].mask) for name in ("chosen", "rejected"))
        lost = batch.score("chosen_by") > 0.5  # the policy's sample
        reference = torch.where(lost, chosen, rejected)
        optimism = Term(values=reference, per="row", coef=self.alpha)
        output = preference(batch, pair, -logsigmoid(pair.margin), optimism=optimism)
        further = {
            "logps/reference_sample": Mean.of(reference),
            "logps/policy_sample": Mean.of(torch.where(lost, rejected, chosen)),
            "samples/policy_won": Mean.of((~lost).to(reference)),
        }
        return Output(terms=output.terms, metrics={**output.metrics, **further})


@OBJECTIVES.register("nash_md")
@dataclass(frozen=True, slots=True, kw_only=True)
class NashMD:
    """Nash Mirror Descent: a policy gradient towards the policy that no other one is preferred to.

        loss = −(p − ½)·log π_θ(y|x) + β·Σ_t stop[log π_θ(y_t) − log π_ref(y_t)]·log π_θ(y_t)

    with y a sample of the policy, p the probability that y is preferred to a sample of the opponent, and
    stop[] without gradient; averaged over rows. A row of two tokens with log-probs −0.5 and −1, under the reference
    −0.7 and −0.6, and p = 0.68997448 costs 0.1·0.3 + 0.18997448·1.5 = 0.31496172 at β = 0.1.

    The column ``preference`` is p, in [0, 1]; the opponent, in the paper the geometric mixture of policy and reference,
    is sampled and judged before. ½ is a control variate. The loss is made for its gradient, and its value means little:
    follow ``samples/preference`` and ``displacement/completion``, which estimates KL(π_θ‖π_ref).

    Rounds are not strictly on-policy. A policy gradient takes y to come from π_θ as it is, which holds at the first
    step of a round; later ones weigh the round's samples as if the policy had just drawn them. There is no importance
    weight, and nothing but β bounds how far a preferred sample is pushed. Train for one epoch a round, with few steps.
    Where p is ½ for every sample, the policy stays at the reference.

    As in TRL's trainer the divergence is taken token by token: a token's log-ratio multiplies that token's log-prob
    alone. The gradient of KL(π_θ‖π_ref) over whole responses would multiply it by the log-ratios of all later tokens
    too. UNVERIFIED: that the paper's gradient is of that second kind, and its β.

    References:
        Munos et al. 2023, arXiv:2312.00886; the loss and defaults as in TRL's NashMDTrainer (up to 1.10).
    """

    beta: float = 0.1
    """Weight β of the divergence from the reference, > 0 (τ in the paper)."""

    needs: ClassVar[Needs] = Needs(legs=("completion",), reference=True, columns=("preference",))
    step0: ClassVar[None] = None

    def __post_init__(self) -> None:
        require("beta", self.beta, 0 < self.beta < math.inf, "> 0 and finite")

    def __call__(self, batch: LegBatch) -> Output:
        leg = batch["completion"]
        logps, wins = leg.sum_logps(), batch.score("preference")
        divergence = masked_sum(leg.token_logratios().detach() * leg.logps, leg.mask)
        return Output(
            terms={
                "preference": Term(values=-(wins.to(logps) - 0.5) * logps, per="row"),
                "divergence": Term(values=divergence, per="row", coef=self.beta),
            },
            metrics={
                "samples/preference": Mean.of(wins),
                "displacement/completion": Mean.of(leg.logratio()),
                "logps/completion": Mean.of(logps),
            },
        )
