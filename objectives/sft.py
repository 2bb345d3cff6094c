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

    ``per`` says what the loss is a mean over: ``token`` as above; ``sequence``, the mean over rows of each row's mean
    over tokens; ``row``, the mean over rows of sums.

    References:
        Token-mean cross-entropy on completions, the ``sft`` term of MPO (Wang et al. 2024, arXiv:2411.10442).
    """

    leg: str = "gold"
    """Which response is learned: ``gold`` (prompt-completion data, triples, scored lists) or ``chosen`` (pairs)."""

    per: str = "token"
    """``token``, ``sequence`` or ``row``."""

    step0: ClassVar[None] = None

    def __post_init__(self) -> None:
        require("leg", self.leg, self.leg in ("gold", "chosen"), "'gold' or 'chosen'")
        require("per", self.per, self.per in ("token", "sequence", "row"), "'token', 'sequence' or 'row'")

    @property
    def needs(self) -> Needs:
        return Needs(legs=(self.leg,), likelihood=(self.leg,))

    def __call__(self, batch: LegBatch) -> Output:
        leg = batch[self.leg]
        return Output(
            terms={
                "likelihood": Term(
                    values=leg.mean_nll() if self.per == "sequence" else leg.nll(),
                    per=f"{self.leg}.token" if self.per == "token" else "row",
                )
            },
            metrics={f"logps/{self.leg}": Mean.of(leg.sum_logps())},
        )
