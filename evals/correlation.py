"""Correlations of samples in which each item occurs some number of times: a bootstrap of them is a few products.

References:
    Spearman 1904, doi:10.2307/1412159.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np

from evals.bootstrap import bootstrapped, numbers_of
from objectives.stats import Estimate


def pearson(first: np.ndarray, second: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Pearson's r of samples in which each item occurs some number of times; NaN where one of the two is constant.

    Args:
        first: shape (item,), or (sample, item).
        second: of the same shape.
        times: shape (sample, item).

    Returns:
        Shape (sample,).
    """
    n = times.sum(axis=1, keepdims=True)
    x, y = (values - (times * values).sum(axis=1, keepdims=True) / n for values in (first, second))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (times * x * y).sum(axis=1) / np.sqrt((times * x**2).sum(axis=1) * (times * y**2).sum(axis=1))


def rank_correlation(first: np.ndarray, second: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Spearman's ρ, the correlation of ranks (equal ones share their mean rank); arguments are those of ``pearson``."""
    n = times.sum(axis=1, keepdims=True)
    x, y = (_ranks(values, times) - (n + 1) / 2 for values in (first, second))  # (n + 1)/2 is the mean rank
    with np.errstate(invalid="ignore", divide="ignore"):
        return (times * x * y).sum(axis=1) / np.sqrt((times * x**2).sum(axis=1) * (times * y**2).sum(axis=1))


def correlations(first: np.ndarray, second: np.ndarray, prompts: Sequence[Hashable]) -> dict[str, Estimate]:
    """``spearman`` and ``pearson`` of two columns, with 95 % intervals by a bootstrap over prompts.

    Args:
        first: shape (item,), finite.
        second: shape (item,), finite.
        prompts: of each item.

    Raises:
        ValueError: fewer than three items, a value that is not finite, or a column that does not vary.
    """
    x, y = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if x.shape != (len(prompts),) or y.shape != x.shape or len(x) < 3:
        raise ValueError(
            f"a correlation needs two columns of the same three items or more, got shapes {x.shape} and {y.shape} for "
            f"{len(prompts)} prompts"
        )
    for name, values in (("first", x), ("second", y)):
        if not np.isfinite(values).all():
            raise ValueError(f"the {name} column holds a value that is not finite; leave that item out of both")
        if np.ptp(values) == 0:
            raise ValueError(f"every value of the {name} column is {values[0]:g}: nothing correlates with a constant")
    number = numbers_of(prompts)
    clusters = int(number.max()) + 1

    def estimate(of: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> Estimate:
        return bootstrapped(lambda drawn: of(x, y, drawn[:, number]), n=len(x), prompts=clusters, bounds=(-1.0, 1.0))

    return {"spearman": estimate(rank_correlation), "pearson": estimate(pearson)}


def _ranks(values: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Mean ranks, from 1, of each item among all copies of all items; shape (sample, item)."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    first = np.searchsorted(group[order], np.arange(int(group.max()) + 1))
    totals = np.add.reduceat(times[:, order], first, axis=1)
    return (np.cumsum(totals, axis=1) - (totals - 1) / 2)[:, group]
