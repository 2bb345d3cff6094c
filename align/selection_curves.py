"""How well a selection does with N of the stored samples, for every N at once: exactly where there is a formula.

    Samples of many prompts, which answers are right ─► selection_curve, pass_at_k_curve ─► Curve

Accuracy is the share of prompts of which one of the chosen answers is right (selection pass@k). Unbiased pass@k is
another quantity: the chance that one of k samples is right, with nothing to select. Both are estimated for N samples
from all of them, as averages over subsets: of best-of-N and pass@k over all subsets, by a formula; of other rules over
random ones.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from align.groups import Samples, Table
from align.selection import BestOfN, Scoring, Selection
from objectives.checks import require
from objectives.stats import Estimate, mean_with_interval

CELLS = 2**20
"""Subsets × answers × sizes worked on together: 8 MB an array."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Curve:
    """Accuracy by number of samples."""

    sizes: tuple[int, ...]
    estimates: tuple[Estimate, ...]
    """For each size: mean over prompts with its 95 % interval, prompts as clusters."""
    per_prompt: Float[np.ndarray, "prompt size"]
    """Expected accuracy of each prompt, in [0, 1]."""
    subsets: int | None
    """Random subsets that a prompt's numbers are averages of; None where they are exact."""


def selection_curve(
    strategy: Selection,
    samples: Sequence[Samples],
    correct: Sequence[Sequence[bool]],
    sizes: Sequence[int],
    *,
    subsets: int = 200,
    seed: int = 0,
    prompts: Sequence[Hashable] | None = None,
) -> Curve:
    """Accuracy of a strategy that has N samples of each prompt, for N in ``sizes``.

    ``best_of_n`` is exact: it averages over all subsets of N samples. Other rules are averaged over ``subsets`` random
    ones; those of one prompt grow from size to size, so that a curve is smoother than its points are certain. Groups
    are those of all samples.

    Args:
        strategy: any of ``SELECTIONS``.
        samples: one per prompt.
        correct: for each prompt, whether each of ``samples.answers`` is right. Unparsable answers are wrong.
        sizes: increasing, from 1 to the smallest number of samples.
        subsets: random subsets of each prompt and size, ≥ 200.
        seed: of the subsets, ≥ 0.
        prompts: what the intervals take as clusters, where several ``samples`` are of one prompt.
    Raises:
        ValueError: on no prompts, on lengths that do not fit, or on a size that some prompt has too few samples for.
    """
    wanted = _checked(samples, correct, sizes)
    require("subsets", subsets, subsets >= 200, ">= 200")
    require("seed", seed, seed >= 0, ">= 0")
    right = [np.array(each, dtype=bool) for each in correct]
    values = np.zeros((len(samples), len(wanted)))
    if isinstance(strategy, BestOfN):
        for number, one in enumerate(samples):
            values[number] = _best_of_n(one, right[number], wanted)
        return _curve(wanted, values, prompts, None)
    assert isinstance(strategy, Scoring), "a strategy without a formula for its curve has scores"
    for number, one in enumerate(samples):
        values[number] = _averaged(strategy, one, right[number], wanted, (seed, number), subsets)
    return _curve(wanted, values, prompts, subsets)


def pass_at_k_curve(
    samples: Sequence[Samples],
    correct: Sequence[Sequence[bool]],
    sizes: Sequence[int],
    *,
    prompts: Sequence[Hashable] | None = None,
) -> Curve:
    """Unbiased pass@k for k in ``sizes``: the chance that one of k samples is right, whatever could select it.

    Arguments and errors are those of ``selection_curve``. It is what no selection exceeds.
    """
    wanted = _checked(samples, correct, sizes)
    values = np.zeros((len(samples), len(wanted)))
    for number, one in enumerate(samples):
        right = int(_right_samples(one, np.array(correct[number], dtype=bool)).sum())
        values[number] = [pass_at_k(len(one.rewards), right, int(k)) for k in wanted]
    return _curve(wanted, values, prompts, None)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, c of them right, hold a right one.

        pass@k = 1 − C(n−c, k)/C(n, k) = 1 − Π_{i=n−c+1}^{n} (1 − k/i)

    Of 10 samples with 3 right, pass@2 is 0.533333. The product is the form that does not overflow.

    References:
        Chen et al. 2021, arXiv:2107.03374.

    Args:
        n: samples, ≥ 1.
        c: right ones, in [0, n].
        k: in [1, n].
    """
    require("n", n, n >= 1, ">= 1")
    require("c", c, 0 <= c <= n, f"in [0, {n}], the number of samples")
    require("k", k, 1 <= k <= n, f"in [1, {n}], the number of samples")
    if n - c < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def best_of_n_weights(n: int, sizes: Sequence[int]) -> Float[np.ndarray, "size sample"]:
    """Probability that the sample of rank i, of n in ascending order of reward, is the best of m random ones.

        w_i = C(i, m−1) / C(n, m)

    for each m of ``sizes``; rows add up to 1. Made from above, w_{n−1} = m/n and w_{i−1} = w_i·(i−m+1)/i, so that
    nothing overflows.
    """
    m = np.asarray(sizes)[:, None]
    rank = np.arange(n - 1, 0, -1)
    steps = np.maximum(rank - m + 1, 0) / rank  # 0 once fewer than m − 1 samples are below
    return (np.cumprod(np.hstack([m / n, steps]), axis=1))[:, ::-1]


# ---- one prompt ----


def _best_of_n(samples: Samples, right: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    # Unparsable samples are chosen only where there is nothing else, and then nothing is: they rank below all. Of equal
    # rewards the first sample wins, as in BestOfN; a stable ascending sort alone would let the last one win.
    rewards = np.where(samples.group >= 0, samples.rewards, -np.inf)
    ascending = np.lexsort((-np.arange(len(rewards)), rewards))
    return best_of_n_weights(len(rewards), sizes.tolist()) @ _right_samples(samples, right)[ascending]


def _averaged(
    strategy: Scoring, samples: Samples, right: np.ndarray, sizes: np.ndarray, seed: tuple[int, int], subsets: int
) -> np.ndarray:
    if not right.any():
        return np.zeros(len(sizes))
    orders = random_orders(len(samples.rewards), subsets, seed)
    per_chunk = max(1, CELLS // (len(right) * len(sizes)))
    hits = np.zeros(len(sizes))
    for start in range(0, subsets, per_chunk):
        order = orders[start : start + per_chunk]
        table = Table(samples=samples, order=order, sizes=sizes, stream=(*seed, start))
        hits += _hits(strategy, table, right).sum(axis=0)
    return hits / subsets


def random_orders(n: int, subsets: int, seed: tuple[int, int]) -> np.ndarray:
    """The orders, (subset, sample), whose first N samples are a prompt's random subsets of N."""
    return np.random.default_rng(seed).permuted(np.tile(np.arange(n), (subsets, 1)), axis=1)


def _hits(strategy: Scoring, table: Table, right: np.ndarray) -> Bool[np.ndarray, "subset size"]:
    """Whether a right answer is among the k highest: one that fewer than k others precede."""
    values, first = strategy.scores(table).values, table.first
    hit = np.zeros((values.shape[0], values.shape[2]), dtype=bool)
    for group in np.flatnonzero(right):
        mine, since = values[:, group, None], first[:, group, None]
        before = ((values > mine) | ((values == mine) & (first < since))).sum(axis=1)
        hit |= (before < strategy.k) & (mine[:, 0] > -np.inf)
    return hit


def _right_samples(samples: Samples, right: np.ndarray) -> np.ndarray:
    return np.append(right, False)[samples.group]  # −1, unparsable, is the last


# ---- many prompts ----


def _checked(samples: Sequence[Samples], correct: Sequence[Sequence[bool]], sizes: Sequence[int]) -> np.ndarray:
    if len(samples) != len(correct) or len(samples) == 0:
        raise ValueError(
            f"a curve needs prompts and which of their answers are right, got {len(samples)} and {len(correct)}"
        )
    for number, (one, right) in enumerate(zip(samples, correct, strict=True)):
        if len(right) != len(one.answers):
            raise ValueError(
                f"prompt {number} has {len(one.answers)} answers, and correct has {len(right)} values for it; "
                "write one for each of samples.answers"
            )
    wanted = np.array(sizes, dtype=np.int64)
    holds = len(wanted) > 0 and bool((np.diff(wanted, prepend=0) > 0).all())
    require("sizes", list(sizes), holds, "increasing, and 1 or more")
    fewest = min(range(len(samples)), key=lambda number: len(samples[number].rewards))
    if wanted[-1] > len(samples[fewest].rewards):
        raise ValueError(
            f"prompt {fewest} has {len(samples[fewest].rewards)} samples, and the curve goes to {wanted[-1]}; "
            "sample more, or leave out larger sizes"
        )
    return wanted


def _curve(sizes: np.ndarray, values: np.ndarray, prompts: Sequence[Hashable] | None, subsets: int | None) -> Curve:
    clusters = range(len(values)) if prompts is None else prompts
    estimates = tuple(mean_with_interval(column.tolist(), clusters) for column in values.T)
    return Curve(sizes=tuple(sizes.tolist()), estimates=estimates, per_prompt=values, subsets=subsets)
