"""Direct Coverage Optimization: training for pass@N rather than pass@1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from objectives.batch import LegBatch
from objectives.checks import require
from objectives.needs import Needs
from objectives.numerics import log1mexp
from objectives.output import Mean, Output, Term
from objectives.registry import OBJECTIVES

IMPROBABLE = -30.0
"""Below this log-prob N·p is exact enough for 1 − (1−p)^N, in float32 too (which ends where p underflows)."""


@OBJECTIVES.register("dco")
@dataclass(frozen=True, slots=True, kw_only=True)
class DCO:
    """Direct Coverage Optimization: the probability that one of N samples is the answer.

        loss = −log[1 − (1 − p)^N],    p = π_θ(gold|x)

    with p of the whole response (log-probs summed over tokens); averaged over rows. Its gradient is that of −log p
    times F = N·(1−p)^{N−1}·p / [1 − (1−p)^N]: 1 for improbable answers, 0 once p is well above 1/N, so the policy does
    not grow overconfident. N = 1 is supervised fine-tuning on sums.

    Meant for short answers: for a long chain of thought p underflows, F is 1, and this is the likelihood. The paper
    replaces rows of vanishing F in the batch; here they stay, and ``coverage/dead`` counts them.

    F agrees with the authors' code, whose truncated series for N·p < 0.1 is off by up to 1.3e-4. The paper's step-wise
    and chain-of-thought variants are not here.

    References:
        Chen et al. 2025, arXiv:2502.07154.
    """

    attempts: int = 8
    """N ≥ 1: how many samples will be drawn per problem when the model is used."""
    leg: str = "gold"
    """``gold`` or ``chosen``: the response to cover."""

    step0: ClassVar[None] = None

    def __post_init__(self) -> None:
        require("attempts", self.attempts, 1 <= self.attempts <= 2**20, "in [1, 2²⁰], the pass@N budget")
        require("leg", self.leg, self.leg in ("gold", "chosen"), "'gold' or 'chosen'")

    @property
    def needs(self) -> Needs:
        return Needs(legs=(self.leg,))

    def __call__(self, batch: LegBatch) -> Output:
        logps = batch[self.leg].sum_logps()
        losses = self.losses(logps)
        factor = self.factor(logps.detach())
        return Output(
            terms={"coverage": Term(values=losses, per="row")},
            metrics={
                f"logps/{self.leg}": Mean.of(logps),
                "coverage/probability": Mean.of(torch.exp(-losses)),
                "coverage/factor": Mean.of(factor),
                "coverage/dead": Mean.of((factor < 0.01).to(factor)),
            },
        )

    def losses(self, logps: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
        """−log[1 − (1−p)^N] from log p."""
        if self.attempts == 1:
            return -logps
        # A response that is certain has no loss; below IMPROBABLE 1 − (1−p)^N = N·p to rounding.
        within = logps.clamp(min=IMPROBABLE, max=-1e-6)
        covered = -log1mexp(self.attempts * log1mexp(within))
        return torch.where(logps < IMPROBABLE, -logps - math.log(self.attempts), covered)

    def factor(self, logps: Float[Tensor, " row"]) -> Float[Tensor, " row"]:
        """F: the gradient relative to that of −log p, in [0, 1]."""
        if self.attempts == 1:
            return torch.ones_like(logps)
        missed = log1mexp(logps)
        log_factor = math.log(self.attempts) + (self.attempts - 1) * missed + logps
        log_factor = log_factor - log1mexp(self.attempts * missed)
        return torch.where(logps < IMPROBABLE, 1.0, torch.exp(log_factor))
