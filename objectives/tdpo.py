"""Token-level DPO: DPO that also watches how far the policy has moved at every token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import logsigmoid

from objectives.batch import LegBatch, masked_sum
from objectives.checks import require
from objectives.metrics import preference_metrics
from objectives.needs import Needs, PairForm
from objectives.output import Mean, Output, Term
from objectives.pairs import pair_of
from objectives.registry import OBJECTIVES


@OBJECTIVES.register("tdpo")
@dataclass(frozen=True, slots=True, kw_only=True)
class TDPO:
    """Token-level Direct Preference Optimization.

        loss = −log σ(β·[d − (K(rejected) − K(chosen))])         variant tdpo1
        loss = −log σ(β·[d − α·(K(rejected) − sg K(chosen))])    variant tdpo2
        d = logratio(chosen) − logratio(rejected),    K(y) = Σ_t KL(π_ref(·|x, y_<t) ‖ π_θ(·|x, y_<t))

    with logratio summed over tokens and sg a stopped gradient; averaged over rows. At π_θ = π_ref every row costs
    log 2.

    K compares whole distributions, so the reference is computed beside the policy in every step: ``reference.source``
    must be ``live`` or ``adapter_off``. It is made inside the chunked head; full logits never exist.

    References:
        Zeng et al. 2024, arXiv:2404.11999, Eq. 16–17; defaults as in the authors' code, whose configuration and
        function disagree on which variant is the default.
    """

    beta: float = 0.1
    """Inverse temperature of the implicit reward, > 0."""
    alpha: float = 0.5
    """α, ≥ 0: how strongly the difference of KL counts; variant tdpo2 only."""
    variant: str = "tdpo2"
    """``tdpo1`` or ``tdpo2``."""

    needs: ClassVar[Needs] = Needs(legs=("chosen", "rejected"), reference=True, extras=("ref_kl",))
    pair_form: ClassVar[PairForm] = PairForm(difference=False)
    step0: ClassVar[float] = math.log(2)

    def __post_init__(self) -> None:
        require("beta", self.beta, 0 < self.beta < math.inf, "> 0 and finite")
        require("alpha", self.alpha, 0 <= self.alpha < math.inf, ">= 0 and finite, 0.5 in the paper")
        require("variant", self.variant, self.variant in ("tdpo1", "tdpo2"), "'tdpo1' or 'tdpo2'")

    def idle(self) -> dict[str, str]:
        """Keys that have no effect beside the others, with the reason."""
        return {"alpha": "variant tdpo1 has none"} if self.variant == "tdpo1" else {}

    def __call__(self, batch: LegBatch) -> Output:
        pair = pair_of(batch, self.beta)
        kept, lost = (masked_sum(batch[leg].extra("ref_kl"), batch[leg].mask) for leg in ("chosen", "rejected"))
        apart = lost - kept if self.variant == "tdpo1" else self.alpha * (lost - kept.detach())
        losses = -logsigmoid(pair.beta * (pair.difference - apart))
        rewards = pair.chosen + pair.beta * kept.detach(), pair.rejected + pair.beta * lost.detach()
        metrics = preference_metrics(batch, *rewards, pair.beta)
        further = {"ref_kl/chosen": Mean.of(kept), "ref_kl/rejected": Mean.of(lost)}
        return Output(terms={"preference": Term(values=losses, per="row")}, metrics={**metrics, **further})
