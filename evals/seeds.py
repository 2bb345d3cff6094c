"""What several training seeds say of a method, where the prompts of one checkpoint speak only of that checkpoint.

Seeds are drawn with replacement, then prompts, independently of one another (a hierarchical bootstrap of two crossed
factors); of the samples only the standard deviation is used, in a t interval, since quantiles of three to five seeds
are far too narrow.

References:
    Owen 2007, doi:10.1214/07-AOAS122 (crossed factors resampled independently: never too small a variance).
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import stdtr, stdtrit

from evals.bootstrap import DRAWS, SEED
from objectives.stats import Estimate

INTERVAL = "bootstrap-over-seeds-t"


def over_seeds(scores: np.ndarray, *, draws: int = DRAWS, seed: int = SEED) -> Estimate:
    """Mean score of a method with its 95 % interval.

    The standard error is the samples' standard deviation times √(S/(S − 1)), with S − 1 degrees of freedom, S being the
    number of seeds. ``n`` counts scores and ``clusters`` seeds.

    Args:
        scores: shape (seed, prompt), finite; the same prompts for every seed.
        draws: bootstrap samples.
        seed: of the random numbers.

    Raises:
        ValueError: fewer than two seeds, no prompt, or a score that is not finite.
    """
    table = _checked(scores)
    rng = np.random.default_rng(seed)
    samples = _samples(table, _shares(rng, draws, len(table)), _shares(rng, draws, table.shape[1]))
    return _estimate(
        samples, float(table.mean()), seeds=len(table), fewest=len(table), freedom=len(table) - 1, n=table.size
    )


def difference_over_seeds(
    first: np.ndarray, second: np.ndarray, *, draws: int = DRAWS, seed: int = SEED
) -> tuple[Estimate, float]:
    """First method minus second, with its 95 % interval, and a two-sided p-value.

    Seeds of either method are drawn independently and prompts jointly; degrees of freedom are S₁ + S₂ − 2.

    Args:
        first: scores of the first method, shape (seed, prompt).
        second: of the second: the same prompts in the same order, and any number of seeds.
        draws: bootstrap samples.
        seed: of the random numbers.

    Raises:
        ValueError: as ``over_seeds``, or where the numbers of prompts differ.
    """
    one, other = _checked(first), _checked(second)
    if one.shape[1] != other.shape[1]:
        raise ValueError(
            f"the methods were measured on {one.shape[1]} and {other.shape[1]} prompts; keep those that both have"
        )
    rng = np.random.default_rng(seed)
    prompts = _shares(rng, draws, one.shape[1])
    samples = _samples(one, _shares(rng, draws, len(one)), prompts)
    samples -= _samples(other, _shares(rng, draws, len(other)), prompts)
    seeds = len(one) + len(other)
    estimate = _estimate(
        samples,
        float(one.mean() - other.mean()),
        seeds=seeds,
        fewest=min(len(one), len(other)),
        freedom=seeds - 2,
        n=one.size + other.size,
    )
    if estimate.stderr == 0:
        return estimate, float(estimate.value == 0)
    return estimate, 2 * float(stdtr(seeds - 2, -abs(estimate.value) / estimate.stderr))


def _checked(scores: np.ndarray) -> np.ndarray:
    table = np.asarray(scores, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] < 2 or table.shape[1] < 1:
        raise ValueError(
            f"scores of shape {table.shape} say nothing of a method: give (seed, prompt) with two training seeds or "
            "more, or compare checkpoints by their prompts"
        )
    if not np.isfinite(table).all():
        raise ValueError("a score is not finite; leave its prompt out for every seed")
    return table


def _shares(rng: np.random.Generator, draws: int, number: int) -> np.ndarray:
    return rng.multinomial(number, np.full(number, 1 / number), size=draws) / number


def _samples(table: np.ndarray, seeds: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    return ((seeds @ table) * prompts).sum(axis=1)


def _estimate(samples: np.ndarray, value: float, *, seeds: int, fewest: int, freedom: int, n: int) -> Estimate:
    stderr = float(samples.std(ddof=1)) * math.sqrt(fewest / (fewest - 1))
    half = float(stdtrit(freedom, 0.975)) * stderr
    return Estimate(
        value=value, stderr=stderr, low=value - half, high=value + half, n=n, clusters=seeds, interval=INTERVAL
    )
