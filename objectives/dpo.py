"""Direct Preference Optimization, with label smoothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import logsigmoid

from objectives.batch import LegBatch
from objectives.checks import require
from objectives.metrics import preference_metrics
from objectives.needs import Needs
from objectives.output import Output, Term
from objectives.registry import OBJECTIVES


@OBJECTIVES.register("dpo")
@dataclass(frozen=True, slots=True, kw_only=True)
class DPO:
    """Direct Preference Optimization; with ``label_smoothing`` its conservative form (cDPO).

        loss = −(1−ε)·log σ(m) − ε·log σ(−m),    m = β·[logratio(chosen) − logratio(rejected)]

    with logratio(y) = log π_θ(y|x) − log π_ref(y|x) summed over tokens; averaged over rows.
    At π_θ = π_ref every row costs log 2, whatever β and ε. With ε > 0 the optimum is finite: m = log((1−ε)/ε).

    References:
        Rafailov et al. 2023, arXiv:2305.18290, Eq. 7; ε as in Mitchell 2023, "A note on DPO with noisy preferences".
    """

    beta: float = 0.1
    """Inverse temperature of the implicit reward, > 0. Larger stays closer to π_ref."""
    label_smoothing: float = 0.0
    """Assumed share ε of flipped preferences, in [0, 0.5)."""

    needs: ClassVar[Needs] = Needs(legs=("chosen", "rejected"), reference=True)
    step0: ClassVar[float] = math.log(2)

    def __post_init__(self) -> None:
        require("beta", self.beta, 0 < self.beta < math.inf, "> 0 and finite")
        require("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 0.5, "in [0, 0.5)")

    def __call__(self, batch: LegBatch) -> Output:
        chosen = self.beta * batch["chosen"].logratio()
        rejected = self.beta * batch["rejected"].logratio()
        margin = chosen - rejected
        losses = -(1 - self.label_smoothing) * logsigmoid(margin) - self.label_smoothing * logsigmoid(-margin)
        return Output(
            terms={"preference": Term(total=losses.sum(), per="row")},
            metrics=preference_metrics(batch, chosen, rejected, self.beta),
        )
