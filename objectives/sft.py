"""Supervised fine-tuning: the likelihood of one leg."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from objectives.batch import LegBatch
from objectives.checks import require
from objectives.needs import Needs
from objectives.output import Mean, Output, Term
from objectives.registry import OBJECTIVES


@OBJECTIVES.register("sft")
@dataclass(frozen=True, slots=True, kw_only=True)
class SFT:
    """Supervised fine-tuning on one response of each row.

        loss = −Σ_rows Σ_t weight_t · log π_θ(y_t|x, y_<t) / N

    with N the tokens (of non-zero weight) of the **whole optimizer step**, not of a microbatch: every token counts the
    same however the step is split. Prompt tokens never count. A uniform model over V tokens costs log V.

    References:
        Token-mean cross-entropy on completions, the ``sft`` term of MPO (Wang et al. 2024, arXiv:2411.10442).
    """

    leg: str = "gold"
    """Which response is learned: ``gold`` (prompt-completion data, triples, scored lists) or ``chosen`` (pairs)."""

    step0: ClassVar[None] = None

    def __post_init__(self) -> None:
        require("leg", self.leg, self.leg in ("gold", "chosen"), "'gold' or 'chosen'")

    @property
    def needs(self) -> Needs:
        return Needs(legs=(self.leg,), likelihood=(self.leg,))

    def __call__(self, batch: LegBatch) -> Output:
        leg = batch[self.leg]
        return Output(
            terms={"likelihood": Term(total=leg.nll().sum(), per=f"{self.leg}.token")},
            metrics={f"logps/{self.leg}": Mean.of(leg.sum_logps())},
        )
