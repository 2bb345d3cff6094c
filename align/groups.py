"""Samples of one prompt grouped by answer, and what can be said of each answer in many subsets of them at once.

    answers, rewards ─► group_samples ─► Samples ─► Table ─► counts and rewards of answers

Samples with the same answer form a group, in the order in which answers were first seen. Samples whose answer could not
be parsed are in no group, but count as samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """The samples of one prompt, grouped by answer; made by ``group_samples``."""

    answers: tuple[Hashable, ...]
    """Of each group: its first member's, in the order in which they came."""
    group: Int[np.ndarray, " sample"]
    """Each sample's group; −1 where its answer could not be parsed."""
    rewards: Float[np.ndarray, " sample"]
    number: int = 0
    """The prompt's among others: strategies that draw do so independently for prompts of different numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """One chosen answer."""

    answer: Hashable
    index: int
    """The sample to show for it: the one with the highest reward, of equal ones the first."""
    count: int
    """Samples with this answer."""
    mean_reward: float
    """Of these samples."""


def group_samples(
    answers: Sequence[Hashable],
    rewards: Sequence[float],
    same: Callable[[Any, Any], bool] | None = None,
    *,
    number: int = 0,
) -> Samples:
    """Groups samples greedily by answer, in their order.

    A sample joins the first group whose first member's answer is equal to its own, or opens a new one. ``same`` need
    not be transitive, so the order matters. It is asked once for each answer and group at most.

    Args:
        answers: one per sample, in a canonical form (``"1/2"``, not ``" .5"``); None where it could not be parsed.
            Where responses have no answer that could be compared, let each be its own: ``range(N)``.
        rewards: one per sample, finite; higher is better.
        same: says of two answers that differ whether they mean the same; without it, only equal ones do.
        number: of the prompt, for strategies that draw.
    Raises:
        ValueError: on no samples, on unequal lengths, or on a reward that is not finite.
    """
    if len(answers) != len(rewards) or len(answers) == 0:
        raise ValueError(f"a selection needs samples and a reward for each, got {len(answers)} and {len(rewards)}")
    values = np.array(rewards, dtype=np.float64)
    if not np.isfinite(values).all():
        broken = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"the reward of sample {broken} is {values[broken]}; leave the sample out, or score it anew")
    groups: dict[Hashable, int] = {}  # of every answer seen, also those that joined the group of another
    firsts: list[Hashable] = []
    for answer in answers:
        if answer is None or answer in groups:
            continue
        joined = (g for g, first in enumerate(firsts) if same is not None and same(first, answer))
        groups[answer] = next(joined, len(firsts))
        if groups[answer] == len(firsts):
            firsts.append(answer)
    numbers = [-1 if answer is None else groups[answer] for answer in answers]
    return Samples(answers=tuple(firsts), group=np.array(numbers), rewards=values, number=number)


def pick(samples: Samples, group: int) -> Pick:
    """One group as a choice."""
    members = np.flatnonzero(samples.group == group)
    rewards = samples.rewards[members]
    return Pick(
        answer=samples.answers[group],
        index=int(members[rewards.argmax()]),
        count=len(members),
        mean_reward=float(rewards.mean()),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """What strategies know of a prompt's answers, for many subsets of its samples at once; (subset, group, size).

    Subset s at size n holds the first n samples of ``order[s]``. An answer's statistics change only when a sample with
    this answer is added. So they are computed for samples, sorted by subset, answer and place in the order, and copied
    to all sizes up to the next change; before its first sample an answer has a blank entry.
    """

    samples: Samples
    order: Int[np.ndarray, "subset sample"]
    """Sample numbers, without repetition."""
    sizes: Int[np.ndarray, " size"]
    """Increasing, ≥ 1."""
    stream: tuple[int, ...]
    """Tells draws for one table from those for another; whole numbers ≥ 0."""

    @staticmethod
    def whole(samples: Samples) -> Table:
        """The table of one subset: all samples."""
        n = len(samples.rewards)
        return Table(samples=samples, order=np.arange(n)[None], sizes=np.array([n]), stream=(samples.number,))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Subsets, groups, sizes."""
        return len(self.order), len(self.samples.answers), len(self.sizes)

    @cached_property
    def count(self) -> Int[np.ndarray, "subset group size"]:
        """Samples with each answer."""
        cells = self._sorted.line * self.shape[2] + self._sorted.size
        return np.bincount(cells, minlength=math.prod(self.shape)).reshape(self.shape).cumsum(axis=2)

    @cached_property
    def first(self) -> Int[np.ndarray, "subset group size"]:
        """Number of the first sample with each answer: who came earlier wins ties."""
        return self._at_sizes(self._running(np.minimum, self._sorted.number), len(self.samples.rewards))

    def aggregate(self, how: str) -> Float[np.ndarray, "subset group size"]:
        """Rewards of the samples with each answer: their ``mean``, ``max`` or ``sum``; −∞ where there are none."""
        unit = _unit(self.samples.rewards)
        rewards = np.rint(self.samples.rewards / unit)[self._sorted.number]
        together = self._running(np.maximum if how == "max" else np.add, rewards)
        if how == "mean":
            together = together / self._sorted.rank
        return self._at_sizes(together * unit, -math.inf)

    def log_sum_exp(self, beta: float) -> Float[np.ndarray, "subset group size"]:
        """log Σ exp(r/β) over the samples with each answer, up to a constant; −∞ where there are none."""
        logs = (self.samples.rewards - self.samples.rewards.max()) / beta
        return self._at_sizes(self._running(np.logaddexp, logs[self._sorted.number]), -math.inf)

    def gumbel(self, seed: int) -> Float[np.ndarray, "subset group size"]:
        """Standard Gumbel noise: the order of log-weights with it added is that of a draw without replacement."""
        return -np.log(np.random.default_rng([seed, *self.stream]).standard_exponential(self.shape))

    @cached_property
    def _sorted(self) -> _Sorted:
        ordered = self.order[:, : self.sizes[-1]]
        group = self.samples.group[ordered]
        by_group = np.argsort(group, axis=1, kind="stable")
        line = np.take_along_axis(group, by_group, axis=1) + np.arange(len(ordered))[:, None] * self.shape[1]
        held = np.take_along_axis(group, by_group, axis=1) >= 0
        line, place = line[held], by_group[held]
        samples = np.bincount(line, minlength=self.shape[0] * self.shape[1])
        return _Sorted(
            line=line,
            size=np.searchsorted(self.sizes, place + 1),
            number=np.take_along_axis(ordered, by_group, axis=1)[held],
            rank=np.arange(len(line)) - (samples.cumsum() - samples)[line] + 1,
            blank=np.arange(len(samples)) + samples.cumsum() - samples,
        )

    def _running(self, what: np.ufunc, values: np.ndarray) -> np.ndarray:
        """``what`` over a subset's samples with the same answer up to each, in steps of 1, 2, 4, …"""
        state, step = values.copy(), 1
        while len(later := np.flatnonzero(self._sorted.rank > step)):
            state[later] = what(state[later - step], state[later])
            step *= 2
        return state

    def _at_sizes(self, states: np.ndarray, nothing: float) -> np.ndarray:
        entries = np.full(len(states) + len(self._sorted.blank), nothing, dtype=states.dtype)
        entries[np.arange(len(states)) + self._sorted.line + 1] = states
        return entries[self.count + self._sorted.blank.reshape(*self.shape[:2], 1)]


class _Sorted(NamedTuple):
    """Samples that have an answer, sorted by subset, answer and place in the subset's order."""

    line: np.ndarray
    """Subset · groups + group."""
    size: np.ndarray
    """The first size that includes it."""
    number: np.ndarray
    rank: np.ndarray
    """1 for the first of its line."""
    blank: np.ndarray
    """Of each line: where its blank entry lies among all entries, one blank and its samples for each line."""


def _unit(rewards: np.ndarray) -> float:
    """A power of two so small that rewards are whole multiples of it, and so large that their sums stay exact.

    Three rewards of 0.1 have a mean of 0.10000000000000002 in float64, which would beat a single one. In whole units
    equal rewards have that mean however many they are, and no sum depends on the order of samples. Up to 2,048 samples,
    a unit is less than 10⁻¹² of the largest reward.
    """
    largest = math.frexp(float(np.abs(rewards).max()))[1]
    return math.ldexp(1.0, max(largest + math.ceil(math.log2(len(rewards))) - 52, -1000))
