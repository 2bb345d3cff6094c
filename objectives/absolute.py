"""Pairwise losses in which each response has a target of its own, not only the difference of the two."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from objectives.batch import LegBatch
from objectives.checks import require
from objectives.needs import Needs, PairForm
from objectives.output import Mean, Output
from objectives.pairs import PAIR_AND_REFERENCE, pair_of, preference
from objectives.registry import OBJECTIVES

EACH = PairForm(difference=False)


@OBJECTIVES.register("nca")
@dataclass(frozen=True, slots=True, kw_only=True)
class NCA:
    """Noise Contrastive Alignment on pairs: raises the chosen response's own likelihood, not only the gap.

        loss = −log σ(r_w) − ½·log σ(−r_w) − ½·log σ(−r_l),    r = β·logratio

    with logratio summed over tokens, r_w of the chosen and r_l of the rejected response; averaged over rows. At
    π_θ = π_ref every row costs 2·log 2.

    References:
        Chen et al. 2024, arXiv:2402.05369; K = 2, as TRL's ``nca_pair``. The paper's β is 0.01.
    """

    beta: float = 0.01
    """Inverse temperature of the implicit reward, > 0."""

    needs: ClassVar[Needs] = PAIR_AND_REFERENCE
    pair_form: ClassVar[PairForm] = EACH
    step0: ClassVar[float] = 2 * math.log(2)

    def __post_init__(self) -> None:
        require("beta", self.beta, 0 < self.beta < math.inf, "> 0 and finite")

    def __call__(self, batch: LegBatch) -> Output:
        pair = pair_of(batch, self.beta)
        losses = -logsigmoid(pair.chosen) - 0.5 * (logsigmoid(-pair.chosen) + logsigmoid(-pair.rejected))
        return preference(batch, pair, losses)


@OBJECTIVES.register("bco_pair")
@dataclass(frozen=True, slots=True, kw_only=True)
class BCOPair:
    """Binary Classifier Optimization on pairs: chosen against rejected responses, with a common reward shift.

        loss = −log σ(r_w − δ) − log σ(δ − r_l),    r = β·logratio

    with logratio summed over tokens, r_w of the chosen and r_l of the rejected response; averaged over rows. At
    π_θ = π_ref every row costs 2·log 2.

    δ is the mean of all rewards seen so far, both legs, as in ``bco``; a step uses the δ after the step before it, so
    that no loss depends on how its step is split. TRL dropped the shift in 0.29 (``shift: none``) and updated it, with
    the rows of one microbatch, before use until then. MPO's and BCO's papers have it.

    References:
        Jung et al. 2024, arXiv:2404.04656; TRL's ``bco_pair``. The paper's β is 0.01.
    """

    beta: float = 0.1
    """Inverse temperature of the implicit reward, > 0."""
    shift: str = "mean"
    """``mean``: δ as above. ``none``: δ = 0, as TRL from 0.29 on."""

    needs: ClassVar[Needs] = PAIR_AND_REFERENCE
    pair_form: ClassVar[PairForm] = EACH
    step0: ClassVar[float] = 2 * math.log(2)

    def __post_init__(self) -> None:
        require("beta", self.beta, 0 < self.beta < math.inf, "> 0 and finite")
        require("shift", self.shift, self.shift in ("mean", "none"), "'mean' or 'none'")

    def __call__(self, batch: LegBatch) -> Output:
        pair = pair_of(batch, self.beta)
        if self.shift == "none":
            return preference(batch, pair, -logsigmoid(pair.chosen) - logsigmoid(-pair.rejected))
        shift = (batch.state["reward_total"] / batch.state["reward_count"].clamp(min=1)).to(pair.chosen)
        output = preference(batch, pair, -logsigmoid(pair.chosen - shift) - logsigmoid(shift - pair.rejected))
        further = {"rewards/shift": Mean(total=shift * batch.rows, count=float(batch.rows))}
        return Output(terms=output.terms, metrics={**output.metrics, **further})

    def init_state(self) -> dict[str, Tensor]:
        """No reward seen yet; δ is then 0."""
        kinds = ("reward_total", "reward_count") if self.shift == "mean" else ()
        return {kind: torch.zeros((), dtype=torch.float64) for kind in kinds}

    def observe(self, batch: LegBatch) -> dict[str, Tensor]:
        """Rewards of both legs, summed and counted."""
        if self.shift == "none":
            return {}
        pair = pair_of(batch, self.beta)
        total = (pair.chosen + pair.rejected).detach().double().sum()
        return {"reward_total": total, "reward_count": total.new_tensor(2.0 * batch.rows)}

    def update(self, state: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All rewards so far."""
        return {name: state[name] + observed[name].to(state[name].device) for name in state}


@OBJECTIVES.register("sppo")
@dataclass(frozen=True, slots=True, kw_only=True)
class SPPO:
    """Self-Play Preference Optimization, hard labels: both log-ratios are led to targets of opposite sign.

        loss = [logratio(chosen) − 1/(2β)]² + [logratio(rejected) + 1/(2β)]²

    with logratio summed over tokens; averaged over rows. At π_θ = π_ref every row costs 1/(2β²).

    The winner is taken to beat the policy with probability 1 and the loser with 0; the paper estimates these
    probabilities with a preference model. At the paper's β = 0.001 the targets are ±500 nats and losses of the order of
    10⁵: gradients are clipped throughout, which sets the step size.

    References:
        Wu et al. 2024, arXiv:2405.00675, Eq. 4.7 with P in {0, 1}; TRL's ``sppo_hard``.
    """

    beta: float = 0.001
    """The paper's 1/η, > 0: targets are ±1/(2β) nats."""

    needs: ClassVar[Needs] = PAIR_AND_REFERENCE
    pair_form: ClassVar[PairForm] = EACH

    def __post_init__(self) -> None:
        require("beta", self.beta, 0 < self.beta < math.inf, "> 0 and finite")

    @property
    def step0(self) -> float:
        return 1 / (2 * self.beta**2)

    def __call__(self, batch: LegBatch) -> Output:
        pair = pair_of(batch, self.beta)
        up, down = batch["chosen"].logratio(), batch["rejected"].logratio()
        target = 1 / (2 * pair.beta)
        return preference(batch, pair, (up - target) ** 2 + (down + target) ** 2)


@OBJECTIVES.register("apo_zero")
@dataclass(frozen=True, slots=True, kw_only=True)
class APOZero:
    """Anchored Preference Optimization, zero: chosen responses up, rejected ones down, each against the reference.

        loss = 1 − σ(r_w) + σ(r_l),    r = β·logratio

    with logratio summed over tokens, r_w of the chosen and r_l of the rejected response; averaged over rows. At
    π_θ = π_ref every row costs 1. For data whose chosen responses are better than what the model says itself; where
    they are worse, take ``apo_down``.

    References:
        D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7; TRL's ``apo_zero``.
    """

    beta: float = 0.1
    """Inverse temperature of the implicit reward, > 0."""

    needs: ClassVar[Needs] = PAIR_AND_REFERENCE
    pair_form: ClassVar[PairForm] = EACH
    step0: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        require("beta", self.beta, 0 < self.beta < math.inf, "> 0 and finite")

    def __call__(self, batch: LegBatch) -> Output:
        pair = pair_of(batch, self.beta)
        return preference(batch, pair, torch.sigmoid(-pair.chosen) + torch.sigmoid(pair.rejected))


@OBJECTIVES.register("apo_down")
@dataclass(frozen=True, slots=True, kw_only=True)
class APODown:
    """Anchored Preference Optimization, down: both responses become less likely, the rejected one more so.

        loss = σ(r_w) + 1 − σ(r_w − r_l),    r = β·logratio

    with logratio summed over tokens, r_w of the chosen and r_l of the rejected response; averaged over rows. At
    π_θ = π_ref every row costs 1. For data whose chosen responses are worse than what the model says itself.

    References:
        D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 8; TRL's ``apo_down``.
    """

    beta: float = 0.1
    """Inverse temperature of the implicit reward, > 0."""

    needs: ClassVar[Needs] = PAIR_AND_REFERENCE
    pair_form: ClassVar[PairForm] = EACH
    step0: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        require("beta", self.beta, 0 < self.beta < math.inf, "> 0 and finite")

    def __call__(self, batch: LegBatch) -> Output:
        pair = pair_of(batch, self.beta)
        return preference(batch, pair, torch.sigmoid(pair.chosen) + torch.sigmoid(-pair.margin))
