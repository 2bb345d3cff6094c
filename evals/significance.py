"""Is one checkpoint better than another, or is it chance? Paired tests on the same prompts, corrections, and power.

Two checkpoints that answered the same prompts are compared prompt by prompt, which is sharper than comparing two means:
what is hard for one is hard for the other. Two intervals that overlap do not imply "no difference".

References:
    McNemar 1947, doi:10.1007/BF02295996; Lancaster 1961, doi:10.1080/01621459.1961.10482105 (mid-p); Good 2005,
    doi:10.1007/b138696 (permutation tests); Phipson and Smyth 2010, doi:10.2202/1544-6115.1585 (1 + hits of 1 + flips);
    Holm 1979, doi:10.2307/4615733; Benjamini and Hochberg 1995, doi:10.1111/j.2517-6161.1995.tb02031.x.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import bdtr, ndtri, stdtr

from evals.bootstrap import numbers_of
from evals.ranking import mean_of
from objectives.checks import require
from objectives.stats import Estimate

EXACT_UP_TO = 20
"""With at most this many differences that are not zero, all sign flips are tried."""
FLIPS, SEED = 10_000, 0
"""Random sign flips where there are more, and the seed they are drawn with."""
ROUNDING = 1e-9
"""Sums of differences closer than this, relative to the sum of their sizes, are equal: float64 adds in some order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """Two checkpoints on the same prompts."""

    difference: Estimate
    """First minus second: mean over prompts with its 95 % t interval, NaN where all differences are alike and not 0."""
    p_value: float
    """Two-sided; of ``test``."""
    test: str
    """``mcnemar`` where every score is 0 or 1, else ``sign-flip``, or ``sign-flip-exact`` with few differences."""
    p_mid: float | None
    """McNemar's mid-p, less conservative; None for other tests."""
    p_t: float | None
    """Of the paired t test, as a quick look; None where all differences are alike."""
    spread: float
    """sd of the differences, in units of the score: what power is computed with."""
    unpaired_stderr: float
    """What the standard error would be had the prompts not been the same."""
    correlation: float | None
    """Of the two checkpoints' scores over prompts; None where one of them does not vary."""
    better: int
    """Prompts on which the first scores higher."""
    worse: int
    ties: int


def paired(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    prompts: Sequence[Hashable] | None = None,
    *,
    flips: int = FLIPS,
    seed: int = SEED,
) -> Paired:
    """Compares two checkpoints by d = first − second of each prompt; several items of a prompt are averaged first.

    Args:
        first: scores of the first checkpoint, one per item.
        second: of the second, for the same items in the same order.
        prompts: of each item; each item its own where left out.
        flips: random sign flips where not all are tried.
        seed: they are drawn with.

    Raises:
        ValueError: lengths that differ, a score that is not finite, or fewer than two prompts.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    number = np.arange(len(a)) if prompts is None else numbers_of(prompts)
    if a.ndim != 1 or a.shape != b.shape or len(number) != len(a):
        raise ValueError(
            f"a paired comparison needs the same items twice, got {a.shape} and {b.shape} scores of {len(number)} "
            "items; keep those that both have"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("a score is not finite; leave that item out on both sides")
    if len(np.unique(number)) < 2:
        raise ValueError(f"{len(np.unique(number))} prompts show no difference between checkpoints; evaluate on more")
    sizes = np.bincount(number)
    a, b = (np.bincount(number, weights=values) / sizes for values in (a, b))
    d = a - b
    estimate, alike = mean_of(d, range(len(d))), bool(np.ptp(d) <= ROUNDING * np.abs(d).max())
    if alike and d[0] != 0:  # the spread is unknown; float64 would call it 1e-17
        estimate = replace(estimate, stderr=math.nan, low=math.nan, high=math.nan)
    binary = bool(np.isin(a, (0.0, 1.0)).all() and np.isin(b, (0.0, 1.0)).all())
    better, worse = int((d > 0).sum()), int((d < 0).sum())
    spread, p_mid = 0.0 if alike else float(d.std(ddof=1)), None
    if binary:
        test, (p_value, p_mid) = "mcnemar", mcnemar(better, worse)
    else:
        test = "sign-flip-exact" if better + worse <= EXACT_UP_TO else "sign-flip"
        p_value = sign_flip(d, flips=flips, seed=seed)
    varies = np.ptp(a) > 0 and np.ptp(b) > 0
    stderr = spread / math.sqrt(len(d))
    return Paired(
        difference=estimate,
        p_value=p_value,
        test=test,
        p_mid=p_mid,
        p_t=2 * float(stdtr(len(d) - 1, -abs(float(d.mean())) / stderr)) if stderr > 0 else None,
        spread=spread,
        unpaired_stderr=math.sqrt((a.var(ddof=1) + b.var(ddof=1)) / len(d)),
        correlation=float(np.corrcoef(a, b)[0, 1]) if varies else None,
        better=better,
        worse=worse,
        ties=len(d) - better - worse,
    )


def sign_flip(differences: np.ndarray, *, flips: int = FLIPS, seed: int = SEED) -> float:
    """Two-sided p-value of "the signs of the differences are chance", for scores of any kind.

        p = #{|Σ ±d| ≥ |Σ d|} / 2^m              over all sign flips of the m differences that are not 0, m ≤ 20
        p = (1 + #{|Σ ±d| ≥ |Σ d|}) / (1 + B)    over B random flips, m > 20

    Without any difference p = 1. Of a win rate against one half, give scores − 0.5: ties contribute 0 and stay.

    Args:
        differences: one per prompt, shape (prompt,), finite.
        flips: B, ≥ 1.
        seed: of the random flips.

    Raises:
        ValueError: no differences, or one that is not finite.
    """
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim != 1 or len(d) == 0 or not np.isfinite(d).all():
        raise ValueError(f"a sign-flip test needs one finite difference per prompt, got shape {d.shape}")
    require("flips", flips, flips >= 1, ">= 1")
    d = d[d != 0]
    least = abs(float(d.sum())) - ROUNDING * float(np.abs(d).sum())
    if len(d) <= EXACT_UP_TO:
        sums = np.zeros(1)
        for value in d:
            sums = np.concatenate([sums + value, sums - value])
        return float((np.abs(sums) >= least).mean())
    rng, hits = np.random.default_rng(seed), 0
    block = max(1, 2_000_000 // len(d))
    for start in range(0, flips, block):
        signs = rng.integers(0, 2, (min(block, flips - start), len(d)), dtype=np.int8) * 2.0 - 1.0
        hits += int((np.abs(signs @ d) >= least).sum())
    return (1 + hits) / (1 + flips)


def mcnemar(first_only: int, second_only: int) -> tuple[float, float]:
    """Exact two-sided p-value, and mid-p, of two checkpoints that are right or wrong on each prompt.

        p = min(1, 2·Σ_{k ≤ min} C(N, k)/2^N),    mid-p = p − C(N, min)/2^N,    N = first_only + second_only

    Of 4 and 1, p = 0.375 and mid-p = 0.21875. Without prompts on which they differ both are 1; with equally many on
    either side p = 1 and mid-p = 1 − ½·C(N, N/2)/2^N.

    Args:
        first_only: prompts that only the first gets right, ≥ 0.
        second_only: that only the second gets right, ≥ 0.
    """
    require("first_only and second_only", (first_only, second_only), min(first_only, second_only) >= 0, ">= 0")
    from scipy.stats import binom  # a third of a second, which a run would begin with

    total, fewer = first_only + second_only, min(first_only, second_only)
    if total == 0:
        return 1.0, 1.0
    tail, here = 2 * float(bdtr(fewer, total, 0.5)), float(binom.pmf(fewer, total, 0.5))
    return (1.0, 1 - here / 2) if first_only == second_only else (min(1.0, tail), tail - here)


# ---- several comparisons ----


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected so that the chance of *any* false claim is at most the level (Holm), in the same order.

        p̃_(i) = max over j ≤ i of min(1, (m − j + 1)·p_(j))

    For a handful of claims. [.01, .04, .03, .005] becomes [.03, .06, .06, .02].

    Raises:
        ValueError: a value outside [0, 1].
    """
    p, order = _ordered(p_values)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return corrected.tolist()


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """p-values corrected so that on average at most that share of claims is false, in the same order.

        p̃_(i) = min over j ≥ i of min(1, m·p_(j)/j)

    For sweeps. [.01, .04, .03, .005] becomes [.02, .04, .04, .02].

    Raises:
        ValueError: a value outside [0, 1].
    """
    p, order = _ordered(p_values)
    corrected = np.empty(len(p))
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    corrected[order] = np.minimum(1.0, np.minimum.accumulate(scaled[::-1])[::-1])
    return corrected.tolist()


def _ordered(p_values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    p = np.asarray(p_values, dtype=np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p-values lie between 0 and 1, got {p[~((p >= 0) & (p <= 1))][0]:g}")
    return p, np.argsort(p, kind="stable")


# ---- power ----


def prompts_needed(spread: float, difference: float, *, power: float = 0.8, level: float = 0.05) -> int:
    """Prompts with which a difference would be found.

        G = (z_{1 − level/2} + z_power)²·spread²/difference²      = 7.849·spread²/difference² at 5 % and 80 %

    A spread of 0.5 and a difference of 0.05 need 785 prompts.

    Args:
        spread: sd of the paired differences over prompts (``Paired.spread``), ≥ 0.
        difference: to be found, not 0, in the same unit.
        power: chance to find it, in (0, 1).
        level: of the two-sided test, in (0, 1); divide it by the number of comparisons that are corrected for.
    """
    require("spread", spread, spread >= 0, ">= 0")
    require("difference", difference, math.isfinite(difference) and difference != 0, "a finite number other than 0")
    return max(2, math.ceil(_factor(power, level) * (spread / difference) ** 2 - 1e-9))


def smallest_difference(spread: float, prompts: int, *, power: float = 0.8, level: float = 0.05) -> float:
    """The smallest difference that this many prompts can be expected to show, in the unit of ``spread``.

        δ = (z_{1 − level/2} + z_power)·spread/√G

    Arguments are those of ``prompts_needed``.
    """
    require("spread", spread, spread >= 0, ">= 0")
    require("prompts", prompts, prompts >= 1, ">= 1")
    return math.sqrt(_factor(power, level) / prompts) * spread


def _factor(power: float, level: float) -> float:
    require("power", power, 0 < power < 1, "in (0, 1)")
    require("level", level, 0 < level < 1, "in (0, 1)")
    return float(ndtri(1 - level / 2) + ndtri(power)) ** 2
