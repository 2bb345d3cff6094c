"""An objective with state, for tests: the margin is taken against its running mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from objectives import LegBatch, Mean, Needs, Output, Term


@dataclass(frozen=True, slots=True, kw_only=True)
class Centred:
    """loss = −log σ(m − shift), shift the mean of all margins before this step."""

    needs: ClassVar[Needs] = Needs(legs=("chosen", "rejected"), reference=True)
    step0: ClassVar[None] = None

    def __call__(self, batch: LegBatch) -> Output:
        shift = batch.state["sum"] / batch.state["count"].clamp(min=1)
        losses = -logsigmoid(self._margin(batch) - shift)
        return Output(
            terms={"preference": Term(values=losses, per="row")},
            metrics={"shift": Mean(total=shift.detach() * batch.rows, count=float(batch.rows))},
        )

    @staticmethod
    def _margin(batch: LegBatch) -> Tensor:
        return batch["chosen"].logratio() - batch["rejected"].logratio()

    def init_state(self) -> Mapping[str, Tensor]:
        return {"sum": torch.zeros(()), "count": torch.zeros(())}

    def observe(self, batch: LegBatch) -> Mapping[str, Tensor]:
        margin = self._margin(batch)
        return {"sum": margin.sum(), "count": torch.tensor(float(batch.rows))}

    def update(self, state: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: state[name] + observed[name] for name in state}
