"""Plain statistics: proportions, means and their intervals, with prompts as clusters.

Formulas and vectors: Wilson 1927; CR1 cluster-robust standard errors (Liang and Zeger 1986). Everything takes and
returns Python floats or numpy arrays; nothing here knows of models.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

Z95 = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A value with its uncertainty: nothing is reported without one."""

    value: float
    stderr: float
    low: float
    high: float
    n: int
    """Items."""
    clusters: int
    """Prompts; equal to ``n`` where each item has its own."""
    interval: str
    """How ``low`` and ``high`` were made: ``wilson``, ``wilson-clustered``, ``clustered-t``, …; all at 95 %."""


def wilson(successes: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval for a proportion.

        centre = (p + z²/2n) / (1 + z²/n),    half = z·√(p(1−p)/n + z²/4n²) / (1 + z²/n)

    Args:
        successes: in [0, n]; a fraction only as an approximation.
        n: trials, ≥ 1.
        z: quantile of the normal distribution; the default gives 95 %.
    Returns:
        Lower and upper limit, in [0, 1].
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"a proportion needs 0 <= successes <= n and n >= 1, got {successes} of {n}")
    return _wilson(successes / n, n, z)


def _wilson(p: float, n: float, z: float) -> tuple[float, float]:
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def clustered_stderr(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """CR1 standard error of the mean of all items, with items of one prompt forming a cluster.

        SE = √(Σ_g (Σ_{i∈g} (s_i − s̄))²) / n · √(G / (G−1))

    With one item per cluster it equals sd/√n. NaN with fewer than two clusters.
    """
    items = np.asarray(values, dtype=np.float64)
    _, group = np.unique(_codes(clusters), return_inverse=True)
    number = int(group.max()) + 1 if len(group) else 0
    if number < 2:
        return math.nan
    sums = np.bincount(group, weights=items - items.mean(), minlength=number)
    return float(np.sqrt((sums**2).sum()) / len(items) * math.sqrt(number / (number - 1)))


def mean_with_interval(values: Sequence[float], clusters: Sequence[Hashable], *, shares: bool = True) -> Estimate:
    """Mean over items with the 95 % interval that fits: Wilson for 0/1 items with one per prompt, else clustered t.

    Args:
        values: one per item; ties count as 0.5 and lead to the clustered interval.
        clusters: prompt of each item, same length.
        shares: whether 0 and 1 mean wrong and right; differences may be 0 or 1 too, and take clustered t.
    Raises:
        ValueError: on no items, on unequal lengths, or on a value that is not finite.
    """
    items = np.asarray(values, dtype=np.float64)
    if len(items) == 0 or len(items) != len(clusters):
        raise ValueError(f"an estimate needs items and a cluster for each, got {len(items)} and {len(clusters)}")
    if not np.isfinite(items).all():
        raise ValueError(f"item {int(np.flatnonzero(~np.isfinite(items))[0])} is not finite")
    n, groups = len(items), len(set(clusters))
    value, stderr = float(items.mean()), clustered_stderr(values, clusters)
    if shares and groups == n and np.isin(items, (0.0, 1.0)).all():
        low, high = wilson(float(items.sum()), n)
        return Estimate(value=value, stderr=stderr, low=low, high=high, n=n, clusters=groups, interval="wilson")
    from scipy.special import stdtrit  # pyright: ignore[reportMissingTypeStubs]  # training needs none

    half = float(stdtrit(groups - 1, 0.975)) * stderr if groups > 1 else math.nan
    return Estimate(
        value=value, stderr=stderr, low=value - half, high=value + half, n=n, clusters=groups, interval="clustered-t"
    )


def macro_mean(values: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """Mean over prompts of each prompt's mean, so that a prompt with many items counts as much as one with few.

        SE = sd(prompt means) / √G

    ``mean_with_interval`` of the prompts' means, with ``n`` counting items.

    Args:
        values: one per item.
        clusters: prompt of each item, same length.
    Raises:
        ValueError: as ``mean_with_interval``.
    """
    items = np.asarray(values, dtype=np.float64)
    if len(items) == 0 or len(items) != len(clusters):
        raise ValueError(f"an estimate needs items and a cluster for each, got {len(items)} and {len(clusters)}")
    group = _codes(clusters)
    means = np.bincount(group, weights=items) / np.bincount(group)
    return replace(mean_with_interval(means.tolist(), range(len(means))), n=len(items))


def clustered_wilson(values: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """Share of items that are 1, with the Wilson interval of as many independent items as the clusters are worth.

        n_eff = p(1 − p)/SE²        with the CR1 standard error of ``clustered_stderr``

    Unlike a t interval it stays in [0, 1]. Where all items agree, n_eff is the number of prompts.

    Args:
        values: 0 or 1, one per item.
        clusters: prompt of each item, same length.
    Raises:
        ValueError: as ``mean_with_interval``, or on a value other than 0 and 1.
    """
    estimate = mean_with_interval(values, clusters)
    if not np.isin(np.asarray(values), (0.0, 1.0)).all():
        raise ValueError("a Wilson interval is for items that are 0 or 1; use mean_with_interval where there are ties")
    p, effective = estimate.value, float(estimate.clusters)
    if 0 < p < 1 and estimate.clusters > 1 and estimate.stderr > 0:
        effective = p * (1 - p) / estimate.stderr**2
    elif 0 < p < 1:
        return replace(estimate, interval="wilson-clustered")  # one prompt, or prompts exactly alike: spread unknown
    low, high = _wilson(p, effective, Z95)
    return replace(estimate, low=low, high=high, interval="wilson-clustered")


FLOAT32_SUM = 1e-6
"""Relative error of a float32 sum of log-probs that is computed twice, in batches of other shapes."""


def resolution(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """How small a difference of log-ratios is rounding, in nats.

    Where policy and reference are the same model, margins are not zero but noise, because the two were computed in
    batches of other shapes; counted as wins and losses they would hide that nothing has happened.

    Args:
        chosen: summed log-probs of the chosen responses, nats.
        rejected: of the rejected ones.
    """
    return FLOAT32_SUM * (np.abs(chosen) + np.abs(rejected))


def beats(first: np.ndarray, second: np.ndarray, resolution: np.ndarray | float = 0.0) -> np.ndarray:
    """1 where first > second, one half where equal, 0 elsewhere: the way ties are counted everywhere here.

    Args:
        first: any numbers.
        second: of the same shape.
        resolution: differences up to this are ties.
    """
    with np.errstate(invalid="ignore"):  # −inf − −inf
        tie = (first == second) | (np.abs(first - second) <= resolution)
    return np.where(tie, 0.5, np.where(first > second, 1.0, 0.0))


def _codes(clusters: Sequence[Hashable]) -> np.ndarray:
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], dtype=np.int64)
