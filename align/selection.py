"""Which of many sampled answers to a prompt to give: best-of-N, votes, best-of-majority and what lies between.

    answers, rewards ─► group_samples ─► Samples ─► strategy ─► Choice

A strategy gives every answer a score and chooses the ``k`` highest. Samples whose answer could not be parsed are never
chosen, but count as samples. Scores are computed for many subsets at once, so that a formula is written once, for one
prompt as for the curves of ``align.selection_curves``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float

from align.groups import Pick, Samples, Table, group_samples, pick
from objectives.checks import require
from objectives.registry import Registry

__all__ = ["SELECTIONS", "Choice", "Pick", "Samples", "Scoring", "Selection", "group_samples"]

SELECTIONS = Registry(
    "selection",
    elsewhere={
        "bon": "best_of_n",
        "bom": "best_of_majority",
        "majority_vote": "majority",
        "self_consistency": "majority",
        "weighted_best_of_n": "weighted_majority",
        "soft_bon": "soft_best_of_n",
    },
)
"""Rules that choose among a prompt's samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a strategy chose, best first; nothing where no sample's answer could be parsed."""

    picks: tuple[Pick, ...]
    n_survivors: int
    """Answers there were to choose among, after the gate where the strategy has one."""
    fallback_used: bool = False
    """No answer passed the gate, and the most frequent ones were taken instead."""


class Scores(NamedTuple):
    """What a strategy thinks of the answers; the highest are chosen, of equal ones those seen first."""

    values: Float[np.ndarray, "subset group size"]
    """−∞ where an answer cannot be chosen."""
    fallback: Bool[np.ndarray, "subset size"] | None = None
    """Whether the gate let nothing pass; None for strategies without one."""


@runtime_checkable
class Selection(Protocol):
    """A frozen dataclass whose fields are its settings; called with samples, it chooses among them."""

    def __call__(self, samples: Samples) -> Choice:
        """Chooses answers, best first."""
        ...


@runtime_checkable
class Scoring(Selection, Protocol):
    """A selection that chooses the ``k`` answers of highest score."""

    @property
    def k(self) -> int:
        """Answers chosen, where there are that many."""
        ...

    def scores(self, table: Table) -> Scores:
        """The formula."""
        ...


def _highest(strategy: Scoring, samples: Samples) -> Choice:
    table = Table.whole(samples)
    scores = strategy.scores(table)
    values = scores.values[0, :, 0]
    survivors = int((values > -math.inf).sum())
    best = np.lexsort((table.first[0, :, 0], -values))[: min(strategy.k, survivors)]
    return Choice(
        picks=tuple(pick(samples, int(group)) for group in best),
        n_survivors=survivors,
        fallback_used=scores.fallback is not None and bool(scores.fallback[0, 0]),
    )


def _require_k(k: int) -> None:
    require("k", k, k >= 1, ">= 1")


def _require_aggregation(aggregation: str) -> None:
    require("aggregation", aggregation, aggregation in ("mean", "max", "sum"), "'mean', 'max' or 'sum'")


# ---- strategies ----


@SELECTIONS.register("best_of_n")
@dataclass(frozen=True, slots=True, kw_only=True)
class BestOfN:
    """The sample with the highest reward.

        i* = argmax_i r_i

    among samples with an answer; of equal ones the first. With a flawed reward it gets worse again as N grows.

    References:
        Stiennon et al. 2020, arXiv:2009.01325; Nakano et al. 2021, arXiv:2112.09332.
    """

    def __call__(self, samples: Samples) -> Choice:
        """Chooses one answer."""
        if not samples.answers:
            return Choice(picks=(), n_survivors=0)
        best = int(np.where(samples.group >= 0, samples.rewards, -math.inf).argmax())
        return Choice(picks=(pick(samples, int(samples.group[best])),), n_survivors=len(samples.answers))


@SELECTIONS.register("best_of_n_answers")
@dataclass(frozen=True, slots=True, kw_only=True)
class BestOfNAnswers:
    """The answers with the highest rewards, where an answer's reward is that of its samples taken together.

        score_a = mean of r_i over the samples i with answer a        (or their maximum, or their sum)

    Best-of-majority without its gate.

    References:
        Di et al. 2025 (the baseline called BoN there), arXiv:2510.03199.
    """

    k: int = 1
    """Answers to choose, ≥ 1."""
    aggregation: str = "mean"
    """``mean``, ``max`` or ``sum`` of an answer's rewards."""

    def __post_init__(self) -> None:
        _require_k(self.k)
        _require_aggregation(self.aggregation)

    def scores(self, table: Table) -> Scores:
        """The answers' rewards."""
        return Scores(table.aggregate(self.aggregation))

    def __call__(self, samples: Samples) -> Choice:
        """Chooses up to ``k`` answers."""
        return _highest(self, samples)


@SELECTIONS.register("majority")
@dataclass(frozen=True, slots=True, kw_only=True)
class Majority:
    """Majority vote, or self-consistency: the most frequent answers. Rewards do not matter.

        score_a = number of samples with answer a

    References:
        Wang et al. 2022, arXiv:2203.11171.
    """

    k: int = 1
    """Answers to choose, ≥ 1."""

    def __post_init__(self) -> None:
        _require_k(self.k)

    def scores(self, table: Table) -> Scores:
        """How many samples have each answer."""
        return Scores(np.where(table.count > 0, table.count, -math.inf))

    def __call__(self, samples: Samples) -> Choice:
        """Chooses up to ``k`` answers."""
        return _highest(self, samples)


@SELECTIONS.register("weighted_majority")
@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedMajority:
    """A vote in which samples with higher rewards weigh more; also called weighted best-of-N.

        score_a = Σ w_i over the samples i with answer a,    w_i = r_i    or    w = softmax(r/β)

    Rewards as weights must not be negative: a frequent answer would lose by every vote that it gets. Softmax takes any;
    answers whose weights differ by less than a billionth of themselves tie.

    References:
        Li et al. 2022 (rewards), arXiv:2206.02336; Faria and Smith 2025 (softmax), arXiv:2504.03790.
    """

    k: int = 1
    """Answers to choose, ≥ 1."""
    weights: str = "softmax"
    """``reward``, for rewards that are 0 or more; ``softmax``, for any."""
    beta: float = 1.0
    """β of softmax, in units of the reward, > 0. Small, and the best sample decides; large, and all weigh the same."""

    def __post_init__(self) -> None:
        _require_k(self.k)
        require("weights", self.weights, self.weights in ("reward", "softmax"), "'reward' or 'softmax'")
        require("beta", self.beta, 0 < self.beta < math.inf, "> 0 and finite")

    def idle(self) -> dict[str, str]:
        """Settings without effect, and why."""
        return {"beta": "the weights are rewards, not their softmax"} if self.weights == "reward" else {}

    def scores(self, table: Table) -> Scores:
        """The answers' weights; of softmax, their logarithms."""
        if self.weights == "reward":
            _refuse_negative(table.samples)
            return Scores(table.aggregate("sum"))
        # Sums in another order differ in their last digits, which must not decide between equal answers.
        return Scores(np.ldexp(np.rint(np.ldexp(table.log_sum_exp(self.beta), 30)), -30))

    def shares(self, samples: Samples) -> Float[np.ndarray, " group"]:
        """Each answer's part of the vote; they add up to 1 over the samples that have an answer."""
        values = self.scores(Table.whole(samples)).values[0, :, 0]
        weights = values if self.weights == "reward" else np.exp(values - values.max(initial=-math.inf))
        return weights / weights.sum()

    def __call__(self, samples: Samples) -> Choice:
        """Chooses up to ``k`` answers.

        Raises:
            ValueError: the weights are rewards, and one is negative.
        """
        return _highest(self, samples)


@SELECTIONS.register("soft_best_of_n")
@dataclass(frozen=True, slots=True, kw_only=True)
class SoftBestOfN:
    """Answers drawn without replacement, frequent and well rewarded ones more often.

        P(a) ∝ freq_a · exp(β · mean reward of a)

    The first is drawn from P, the next from P over those that are left, and so on. The same seed and prompt number
    give the same draw.

    References:
        Di et al. 2025 (in the authors' code, jkx19/PassAtK), arXiv:2510.03199.
    """

    k: int = 1
    """Answers to draw, ≥ 1."""
    beta: float = 1.0
    """β, per unit of the reward, ≥ 0. At 0 only frequency counts."""
    seed: int = 0
    """Of the draw, ≥ 0."""

    def __post_init__(self) -> None:
        _require_k(self.k)
        require("beta", self.beta, 0 <= self.beta < math.inf, ">= 0 and finite")
        require("seed", self.seed, self.seed >= 0, ">= 0")

    def scores(self, table: Table) -> Scores:
        """log P up to a constant, with noise: the highest is a draw from P, the highest k one without replacement."""
        return Scores(self._log_weights(table) + table.gumbel(self.seed))

    def probabilities(self, samples: Samples) -> Float[np.ndarray, " group"]:
        """P."""
        logs = self._log_weights(Table.whole(samples))[0, :, 0]
        weights = np.exp(logs - logs.max(initial=-math.inf))
        return weights / weights.sum()

    def _log_weights(self, table: Table) -> Float[np.ndarray, "subset group size"]:
        there = table.count > 0
        rewards = np.where(there, table.aggregate("mean"), 0.0)
        return np.where(there, np.log(np.maximum(table.count, 1)) + self.beta * rewards, -math.inf)

    def __call__(self, samples: Samples) -> Choice:
        """Draws up to ``k`` answers."""
        return _highest(self, samples)


@SELECTIONS.register("best_of_majority")
@dataclass(frozen=True, slots=True, kw_only=True)
class BestOfMajority:
    """The best rewarded among the answers that are frequent enough.

        S = {a : freq_a ≥ α},    the k answers of S with the largest mean reward

    with freq_a the share of all samples, unparsable ones included, that have answer a. Rare answers are where a flawed
    reward errs most; the gate keeps them out, so that the choice gets no worse as N grows. Fewer than k answers in S
    are all chosen; with none, α becomes the largest freq_a (ours: the authors' code fails there). At α = 0 it is
    ``best_of_n_answers``, and with k = 1 and α at the largest freq_a, if one answer alone has it, ``majority``.

    References:
        Di et al. 2025, Algorithm 3, arXiv:2510.03199.
    """

    alpha: float = 0.005
    """α, in [0, 1]. It has an effect from α·N > 1; 0.005 is the authors' for N = 500."""
    k: int = 1
    """Answers to choose, ≥ 1."""
    aggregation: str = "mean"
    """``mean``, ``max`` or ``sum`` of an answer's rewards."""

    def __post_init__(self) -> None:
        require("alpha", self.alpha, 0 <= self.alpha <= 1, "in [0, 1]")
        _require_k(self.k)
        _require_aggregation(self.aggregation)

    def scores(self, table: Table) -> Scores:
        """The rewards of the answers in S."""
        most = table.count.max(axis=1, keepdims=True, initial=0)
        closed = most / table.sizes < self.alpha
        passed = np.where(closed, table.count == most, table.count / table.sizes >= self.alpha)
        rewards = table.aggregate(self.aggregation)
        return Scores(np.where(passed, rewards, -math.inf), fallback=(closed & (most > 0))[:, 0])

    def __call__(self, samples: Samples) -> Choice:
        """Chooses up to ``k`` answers."""
        return _highest(self, samples)


def _refuse_negative(samples: Samples) -> None:
    # Only what votes: a penalty on samples without an answer is common and does no harm.
    negative = np.flatnonzero((samples.group >= 0) & (samples.rewards < 0))
    if len(negative):
        raise ValueError(
            f"weighted_majority with weights 'reward' needs rewards >= 0, and sample {negative[0]} has "
            f"{samples.rewards[negative[0]]}; give it σ of a logit, or use weights 'softmax'"
        )
