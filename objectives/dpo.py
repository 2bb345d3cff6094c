"""Direct Preference Optimization and its logistic relatives: for noisy labels, per token, positive, calibrated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import logsigmoid, relu

from objectives.batch import LegBatch
from objectives.checks import require
from objectives.needs import Needs, PairForm
from objectives.output import Mean, Output
from objectives.pairs import PAIR_AND_REFERENCE, pair_of, preference, smoothed
from objectives.registry import OBJECTIVES


@OBJECTIVES.register("dpo")
@dataclass(frozen=True, slots=True, kw_only=True)
class DPO:
    """Direct Preference Optimization; with ``label_smoothing`` its conservative form (cDPO).

        loss = −(1−ε)·log σ(m) − ε·log σ(−m),    m = β·[logratio(chosen) − logratio(rejected)]

    with logratio(y) = log π_θ(y|x) − log π_ref(y|x) summed over tokens; averaged over rows.
    At π_θ = π_ref every row costs log 2, whatever β and ε. With ε > 0 the optimum is finite: m = log((1−ε)/ε).

    TRL from 0.29 on accepts ``label_smoothing`` for its loss ``sigmoid`` and ignores it; here it acts.

    References:
        Rafailov et al. 2023, arXiv:2305.18290, Eq. 7; ε as in Mitchell 2023, "A note on DPO with noisy preferences".
    """

    beta: float = 0.1
    """Inverse temperature of the implicit reward, > 0. Larger stays closer to π_ref."""
    label_smoothing: float = 0.0
    """Assumed share ε of flipped preferences, in [0, 0.5)."""

    needs: ClassVar[Needs] = PAIR_AND_REFERENCE
    pair_form: ClassVar[PairForm] = PairForm(difference=True)
    step0: ClassVar[float] = math.log(2)

    def __post_init__(self) -> None:
        require("beta", self.beta, 0 < self.beta < math.inf, "> 0 and finite")
        require("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 0.5, "in [0, 0.5)")

    def __call__(self, batch: LegBatch) -> Output:
        pair = pair_of(batch, self.beta)
        return preference(batch, pair, smoothed(pair.margin, self.label_smoothing))


@OBJECTIVES.register("robust")
@dataclass(frozen=True, slots=True, kw_only=True)
class Robust:
    """Robust DPO: an unbiased estimate of the DPO loss when a known share of the labels is flipped.

        loss = [−(1−ε)·log σ(m) + ε·log σ(−m)] / (1 − 2ε),    m = β·[logratio(chosen) − logratio(rejected)]

    with logratio summed over tokens; averaged over rows. At π_θ = π_ref every row costs log 2.

    Unbiased only if ε is the true share of flipped labels. Unlike DPO's label smoothing it has no finite optimum: for
    a large margin the loss tends to −ε·m/(1−2ε), so it can be negative and falls without end.

    References:
        Chowdhury et al. 2024, arXiv:2403.00409, Eq. 10; defaults: the paper's ε, TRL's β.
    """

    beta: float = 0.1
    """Inverse temperature of the implicit reward, > 0."""
    label_smoothing: float = 0.1
    """Share ε of flipped preferences, in [0, 0.5); 0 is DPO."""

    needs: ClassVar[Needs] = PAIR_AND_REFERENCE
    pair_form: ClassVar[PairForm] = PairForm(difference=True)
    step0: ClassVar[float] = math.log(2)

    def __post_init__(self) -> None:
        require("beta", self.beta, 0 < self.beta < math.inf, "> 0 and finite")
        require("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 0.5, "in [0, 0.5)")

    def __call__(self, batch: LegBatch) -> Output:
        pair, flipped = pair_of(batch, self.beta), self.label_smoothing
        losses = (flipped * logsigmoid(-pair.margin) - (1 - flipped) * logsigmoid(pair.margin)) / (1 - 2 * flipped)
        return preference(batch, pair, losses)


@OBJECTIVES.register("dpo_norm")
@dataclass(frozen=True, slots=True, kw_only=True)
class DPONorm:
    """Length-normalised DPO: log-ratios per token.

        loss = −log σ(m),    m = β·[logratio(chosen)/|chosen| − logratio(rejected)/|rejected|]

    averaged over rows; |y| counts response tokens. At π_θ = π_ref every row costs log 2.

    Rewards are per token, so β is of the order of 1 to 10: a β that suits ``dpo`` would leave the loss at log 2.

    References:
        Lambert et al. 2024 (Tülu 3), arXiv:2411.15124, Eq. 6; default β as in open-instruct. TRL's ``sigmoid_norm``.
    """

    beta: float = 5.0
    """Scale of the log-ratio per token, > 0; below 0.5 it is almost certainly meant for summed log-ratios."""

    needs: ClassVar[Needs] = PAIR_AND_REFERENCE
    pair_form: ClassVar[PairForm] = PairForm(difference=True, per_token=True)
    step0: ClassVar[float] = math.log(2)

    def __post_init__(self) -> None:
        require("beta", self.beta, 0 < self.beta < math.inf, "> 0 and finite")

    def __call__(self, batch: LegBatch) -> Output:
        pair = pair_of(batch, self.beta, per_token=True)
        return preference(batch, pair, -logsigmoid(pair.margin))


@OBJECTIVES.register("dpop")
@dataclass(frozen=True, slots=True, kw_only=True)
class DPOP:
    """DPO-Positive: DPO that is fined when the chosen response becomes less likely than under the reference.

        loss = −log σ(m),    m = β·[logratio(chosen) − logratio(rejected) − λ·max(0, −logratio(chosen))]

    with logratio summed over tokens; averaged over rows. At π_θ = π_ref every row costs log 2, and the fine has no
    effect until the chosen response's likelihood falls. The fine stands inside β and inside σ; gradient flows through
    it (none where logratio(chosen) is exactly 0).

    The authors published no code; two independent re-implementations agree with this one, except that one of them lets
    the fine's gradient through where logratio(chosen) is exactly 0, which is every row of a first step. One public
    description puts the fine outside σ, which is another loss.

    References:
        Pal et al. 2024 (Smaug), arXiv:2402.13228, Eq. 3.
    """

    beta: float = 0.3
    """Inverse temperature of the implicit reward, > 0."""
    penalty: float = 50.0
    """λ, ≥ 0; the paper reports little difference between 5, 50 and 500."""

    needs: ClassVar[Needs] = PAIR_AND_REFERENCE
    pair_form: ClassVar[PairForm] = PairForm(difference=False)
    step0: ClassVar[float] = math.log(2)

    def __post_init__(self) -> None:
        require("beta", self.beta, 0 < self.beta < math.inf, "> 0 and finite")
        require("penalty", self.penalty, 0 <= self.penalty < math.inf, ">= 0 and finite")

    def __call__(self, batch: LegBatch) -> Output:
        pair = pair_of(batch, self.beta)
        fine = self.penalty * relu(-batch["chosen"].logratio())
        output = preference(batch, pair, -logsigmoid(pair.margin - pair.beta * fine))
        lost = (batch["chosen"].logratio() < 0).to(fine)
        further = {"penalty/mean": Mean.of(pair.beta * fine), "penalty/rows": Mean.of(lost)}
        return Output(terms=output.terms, metrics={**output.metrics, **further})


@OBJECTIVES.register("cal_dpo")
@dataclass(frozen=True, slots=True, kw_only=True)
class CalDPO:
    """Calibrated DPO: a contrastive term, and implicit rewards held to ±1/2.

        loss = −log σ(u − v) + ½·[(u − 1/(2β))² + (v + 1/(2β))²],    u = logratio(chosen), v = logratio(rejected)

    with logratio summed over tokens; averaged over rows. The contrastive term has no β. At π_θ = π_ref every row costs
    log 2 + 1/(4β²).

    With β = 0.001 the targets are ±500 nats and the square is nearly all of the loss: watch ``displacement/chosen`` and
    ``displacement/rejected`` against ±1/(2β). The authors' code adds the *batch mean* of the squares to each row's
    contrastive term, which has the same mean and other values per row.

    References:
        Xiao et al. 2024, arXiv:2412.14516; the factor ½ and β as in the authors' code.
    """

    beta: float = 0.001
    """Inverse temperature, > 0: the targets of the log-ratios are ±1/(2β) nats; 0.001 and 0.002 were published."""

    needs: ClassVar[Needs] = PAIR_AND_REFERENCE
    pair_form: ClassVar[PairForm] = PairForm(difference=False)

    def __post_init__(self) -> None:
        require("beta", self.beta, 0 < self.beta < math.inf, "> 0 and finite")

    @property
    def step0(self) -> float:
        return math.log(2) + 1 / (4 * self.beta**2)

    def __call__(self, batch: LegBatch) -> Output:
        pair = pair_of(batch, self.beta)
        up, down = batch["chosen"].logratio(), batch["rejected"].logratio()
        target = 1 / (2 * pair.beta)
        contrast = -logsigmoid(pair.difference)
        calibration = 0.5 * ((up - target) ** 2 + (down + target) ** 2)
        output = preference(batch, pair, contrast + calibration)
        further = {"loss/contrast": Mean.of(contrast), "loss/calibration": Mean.of(calibration)}
        return Output(terms=output.terms, metrics={**output.metrics, **further})
