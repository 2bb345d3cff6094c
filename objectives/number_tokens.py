"""Number token losses: a wrong digit costs more the further off it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from objectives.batch import Leg, LegBatch, masked_sum
from objectives.checks import require
from objectives.needs import Needs
from objectives.output import Mean, Output, Term
from objectives.registry import OBJECTIVES


@OBJECTIVES.register("ntl_mse")
@dataclass(frozen=True, slots=True, kw_only=True)
class NTLMSE:
    """Number token loss, mean squared error: the expected value of the next number token is led to the target's.

        loss = mean over number tokens of [Σ_j p_j·value_j − value(y_t)]²

    with p the policy's distribution renormalised over number tokens alone; averaged over the number tokens of the whole
    step (a step without any contributes 0). Meant beside the likelihood: [{name: sft}, {name: ntl_mse, weight: 0.3}].

    A number token is one whose text, without surrounding blanks, consists of the digits 0 to 9; its value is that
    integer, so a tokenizer that splits numbers into digits suits it best. Signs, points and separators are tokens of
    their own. Half of the mass on 0 and half on 8 costs nothing where the target is 4: ``ntl_was`` has no such optimum.

    The authors' code looks the value of masked labels (−100) up in its table, which picks an arbitrary token, and gives
    NaN for a batch without numbers.

    References:
        Zausinger et al. 2024, arXiv:2411.02083 (id UNVERIFIED), Eq. 2; weight 0.3 as in the authors' configurations.
    """

    leg: str = "gold"
    """Which response is learned: ``gold`` or ``chosen``."""

    step0: ClassVar[None] = None

    def __post_init__(self) -> None:
        require("leg", self.leg, self.leg in ("gold", "chosen"), "'gold' or 'chosen'")

    @property
    def needs(self) -> Needs:
        return Needs(legs=(self.leg,), extras=("number_value", "number_mean"))

    def __call__(self, batch: LegBatch) -> Output:
        leg = batch[self.leg]
        numbers, value = _targets(leg)
        error = (leg.extra("number_mean") - value).where(numbers, 0.0) ** 2
        return _output(leg, self.leg, numbers, error.sum(dim=-1))


@OBJECTIVES.register("ntl_was")
@dataclass(frozen=True, slots=True, kw_only=True)
class NTLWAS:
    """Number token loss, Wasserstein: the expected distance of the next number token from the target.

        loss = mean over number tokens of Σ_j p_j·|value_j − value(y_t)|

    with p the policy's distribution renormalised over number tokens alone; averaged over the number tokens of the whole
    step (a step without any contributes 0). This is the Wasserstein-1 distance to the one-hot target. Meant beside the
    likelihood: [{name: sft}, {name: ntl_was, weight: 0.3}]. What a number token is, stands at ``ntl_mse``.

    References:
        Zausinger et al. 2024, arXiv:2411.02083 (id UNVERIFIED), Eq. 3; weight 0.3 as in the authors' configurations.
    """

    leg: str = "gold"
    """Which response is learned: ``gold`` or ``chosen``."""

    step0: ClassVar[None] = None

    def __post_init__(self) -> None:
        require("leg", self.leg, self.leg in ("gold", "chosen"), "'gold' or 'chosen'")

    @property
    def needs(self) -> Needs:
        return Needs(legs=(self.leg,), extras=("number_value", "number_distance"))

    def __call__(self, batch: LegBatch) -> Output:
        leg = batch[self.leg]
        numbers, _ = _targets(leg)
        return _output(leg, self.leg, numbers, masked_sum(leg.extra("number_distance"), numbers))


def _targets(leg: Leg) -> tuple[Bool[Tensor, "row token"], Float[Tensor, "row token"]]:
    """Which tokens are numbers, and their values (NaN elsewhere)."""
    value = leg.extra("number_value").detach()
    numbers = leg.mask & value.isfinite()
    return numbers, value


def _output(leg: Leg, name: str, numbers: Bool[Tensor, "row token"], losses: Float[Tensor, " row"]) -> Output:
    count = float(numbers.sum())
    share = Mean(total=numbers.sum().to(losses), count=float(leg.mask.sum()))
    return Output(
        terms={"numbers": Term(values=losses, per=f"{name}.number")},
        metrics={"numbers/loss": Mean(total=losses.detach().sum(), count=count), "numbers/share": share},
    )
