"""Intervals by resampling prompts: a prompt is drawn with everything it has, and the whole statistic is made anew.

A statistic is a function of how often each prompt was drawn, (sample, prompt) to (sample,), so that thousands of
samples are one matrix product. The difference of two models' statistics under the same draws is their paired bootstrap.
Measured coverage stands in docs/intervals.md.

References:
    Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapters 13 and 14 (percentile, BCa).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

from objectives.stats import Estimate

DRAWS, SEED = 2000, 0
"""Bootstrap samples of an interval, and the seed they are drawn with. Decisions deserve 10000."""
FEW = 20
"""With fewer prompts than this, quantiles of bootstrap samples are too narrow to be an interval."""
DRAWN = {"draws": DRAWS, "seed": SEED}
"""What belongs to a result whose interval was made with the defaults."""

Statistic = Callable[[np.ndarray], np.ndarray]
Method = Literal["auto", "percentile", "t", "bca"]
_NAMES = {"percentile": "bootstrap", "t": "bootstrap-stderr-t", "bca": "bootstrap-bca"}


def bootstrapped(
    statistic: Statistic,
    *,
    n: int,
    prompts: int,
    bounds: tuple[float, float] = (-math.inf, math.inf),
    draws: int = DRAWS,
    seed: int = SEED,
    method: Method = "auto",
) -> Estimate:
    """A statistic with its 95 % interval by a bootstrap over prompts.

    ``percentile`` (``bootstrap`` in results) lies between the 2.5 % and 97.5 % quantiles of the samples, linearly
    interpolated, and is wide enough to hold the value itself; ``t`` (``bootstrap-stderr-t``) is a t interval around the
    value with the samples' standard deviation and prompts − 1 degrees of freedom, cut to ``bounds``; ``bca``
    (``bootstrap-bca``) corrects the quantiles for bias and skewness. ``auto`` is ``percentile`` from ``FEW`` prompts
    on and ``t`` below. Samples in which the statistic is undefined (NaN) are left out; with one prompt, or where fewer
    than half of the samples are defined, there is no interval (NaN).

    Args:
        statistic: maps how often each prompt was drawn, (sample, prompt), to values (sample,).
        n: items.
        prompts: how many there are.
        bounds: lowest and highest value the statistic can have.
        draws: bootstrap samples.
        seed: of numpy's PCG64; samples are ``default_rng(seed).integers(0, prompts, (draws, prompts))``.
        method: how the interval is made of the samples.
    """
    value = float(statistic(np.ones((1, prompts)))[0])
    kind = method if method != "auto" else "percentile" if prompts >= FEW else "t"
    samples = [statistic(drawn) for drawn in drawn_blocks(prompts, draws, seed, max(n, prompts))] if prompts > 1 else []
    values = np.concatenate([np.empty(0), *samples])
    values = values[np.isfinite(values)]
    stderr = low = high = math.nan
    if len(values) > draws / 2 and np.ptp(values) > 0:
        stderr = float(values.std(ddof=1))
        without = _without_each(statistic, prompts)[:, None] if kind == "bca" else None
        ends = interval_of(values[:, None], np.array([value]), kind, prompts=prompts, without=without)
        low, high = (float(end[0]) for end in ends)
        if kind == "t":
            low, high = max(bounds[0], low), min(bounds[1], high)
    return Estimate(value=value, stderr=stderr, low=low, high=high, n=n, clusters=prompts, interval=_NAMES[kind])


def interval_of(
    samples: np.ndarray,
    value: np.ndarray,
    method: Literal["percentile", "t", "bca"],
    *,
    prompts: int,
    without: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper 95 % limits from bootstrap samples, of several statistics at once.

    Of ``bca``, with z0 = Φ⁻¹(share of samples below the value, ties one half), a = Σ(m̄ − m_g)³ / 6(Σ(m̄ − m_g)²)^1.5
    over the values m_g without prompt g, the limits are the quantiles Φ(z0 + (z0 + z)/(1 − a(z0 + z))) for z = ∓1.96.

    Args:
        samples: shape (sample, statistic).
        value: of the data as they are, shape (statistic,).
        method: as in ``bootstrapped``.
        prompts: how many there are; gives ``t`` its degrees of freedom.
        without: values with one prompt left out each, shape (prompt, statistic); only ``bca`` needs them.
    """
    if method == "t":
        half = float(stdtrit(prompts - 1, 0.975)) * samples.std(axis=0, ddof=1)
        return value - half, value + half
    if method == "percentile":
        low, high = np.quantile(samples, (0.025, 0.975), axis=0)
        return np.minimum(low, value), np.maximum(high, value)
    assert without is not None, "BCa needs the values without each prompt"
    below = (samples < value).mean(axis=0) + 0.5 * (samples == value).mean(axis=0)
    bias = ndtri(np.clip(below, 0.5 / len(samples), 1 - 0.5 / len(samples)))
    apart = without.mean(axis=0) - without
    with np.errstate(invalid="ignore", divide="ignore"):
        skew = np.nan_to_num((apart**3).sum(axis=0) / (6 * (apart**2).sum(axis=0) ** 1.5))
    ordered = np.sort(samples, axis=0)
    limits = []
    for z in (float(ndtri(0.025)), float(ndtri(0.975))):
        at = ndtr(bias + (bias + z) / (1 - skew * (bias + z))) * (len(samples) - 1)
        floor = np.floor(at).astype(np.int64)
        first, second = (
            np.take_along_axis(ordered, np.minimum(floor + step, len(samples) - 1)[None], axis=0)[0] for step in (0, 1)
        )
        limits.append(first + (at - floor) * (second - first))
    return limits[0], limits[1]


def drawn_blocks(prompts: int, draws: int = DRAWS, seed: int = SEED, width: int = 1) -> Iterator[np.ndarray]:
    """How often each prompt was drawn, (sample, prompt), in blocks of which ``width`` columns are a million numbers."""
    rng = np.random.default_rng(seed)
    block = max(1, min(draws, 1_000_000 // max(width, prompts)))
    for start in range(0, draws, block):
        samples = min(block, draws - start)
        drawn = rng.integers(0, prompts, (samples, prompts)) + prompts * np.arange(samples)[:, None]
        yield np.bincount(drawn.ravel(), minlength=samples * prompts).reshape(samples, prompts).astype(np.float64)


def mean_of_items(values: Sequence[float] | np.ndarray, prompts: Iterable[Hashable]) -> Statistic:
    """The mean over items as a statistic of drawn prompts: a ratio of sums, since prompts differ in items.

    Args:
        values: one per item.
        prompts: of each item.
    """
    number = numbers_of(prompts)
    sums, sizes = np.bincount(number, weights=np.asarray(values, dtype=np.float64)), np.bincount(number)
    return lambda drawn: (drawn @ sums) / (drawn @ sizes)


def difference(first: Statistic, second: Statistic) -> Statistic:
    """The paired difference of two statistics: both see the same draws."""
    return lambda drawn: first(drawn) - second(drawn)


def numbers_of(prompts: Iterable[Hashable]) -> np.ndarray:
    """Prompts as numbers from 0, in the order in which they come."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(prompt, len(numbers)) for prompt in prompts], dtype=np.int64)


def _without_each(statistic: Statistic, prompts: int) -> np.ndarray:
    block = max(1, 1_000_000 // prompts)
    return np.concatenate(
        [statistic(1.0 - np.eye(min(block, prompts - start), prompts, k=start)) for start in range(0, prompts, block)]
    )
