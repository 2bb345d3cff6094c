"""WildBench: a judge says how much better an answer is (WB-Reward), or how good (WB-Score).

    WB-Reward = mean of  +1 much better | +½ slightly | 0 tie | −½ slightly worse | −1 much worse
    WB-Score  = (mean rating − 5)·2,  ratings from 1 to 10

A slight win by an answer that is more than K characters longer than the loser counts as a tie; a clear one stands.
Times 100 (WB-Reward) and times 10 (WB-Score) these are the leaderboard's numbers.

References:
    Lin et al. 2024, arXiv:2406.04770; github.com/allenai/WildBench.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np

from evals.bootstrap import bootstrapped, numbers_of
from evals.measured import Measured, kept_prompts, means_by_prompt, own_prompts
from evals.ranking import Metric, mean_of
from objectives.checks import require

METRICS: Mapping[str, Metric] = {
    "wildbench/reward": Metric("How much better the judge finds the model's answers, −1 to 1", "points", "higher"),
    "wildbench/score": Metric("Judge's rating of the model's answers, from −8 to 10", "", "higher"),
    "wildbench/task_macro": Metric("Weighted mean of the means of task categories", "", "higher"),
}
"""Every metric of this module."""

VERDICTS: Mapping[str, float] = {"A++": 1.0, "A+": 0.5, "A=B": 0.0, "B+": -0.5, "B++": -1.0}
"""How much better A is."""
MARGIN = 500
"""K, characters; −1 turns the rule off. The leaderboard's tables have −1, 500, 1000 and 1500."""
TASKS: Mapping[str, float] = {
    "Creative Tasks": 0.5,
    "Planning & Reasoning": 1.25,
    "Math & Data Analysis": 1.0,
    "Information/Advice seeking": 0.75,
    "Coding & Debugging": 1.25,
}
"""Weights of the categories in the task-macro mean."""


def reward(
    verdicts: Sequence[float] | np.ndarray,
    length_model: Sequence[int] | np.ndarray,
    length_reference: Sequence[int] | np.ndarray,
    prompts: Sequence[Hashable] | None = None,
    *,
    margin: int = MARGIN,
    skipped: Sequence[bool] | np.ndarray | None = None,
    strict: bool = False,
) -> Measured:
    """WB-Reward against one reference model; the leaderboard averages three.

    Args:
        verdicts: from the model's point of view, one of the values of ``VERDICTS``; NaN where there is none.
        length_model: characters of the model's answers.
        length_reference: of the reference's.
        prompts: of each item; each its own where left out.
        margin: K; a slight win that is longer by more than this (strictly) counts 0; −1 turns that off.
        skipped: items with a truncated or empty answer, which are left out.
        strict: as the released code does, counts skipped items in the denominator all the same.

    Raises:
        ValueError: lengths that don't fit, an unknown verdict, or nothing to average.
    """
    require("margin", margin, margin >= -1, ">= 0, or -1 for no rule")
    scores = np.asarray(verdicts, dtype=np.float64)
    n = len(scores)
    names = own_prompts(prompts, n)
    ours, theirs = np.asarray(length_model, dtype=np.float64), np.asarray(length_reference, dtype=np.float64)
    out = np.zeros(n, dtype=bool) if skipped is None else np.asarray(skipped, dtype=bool)
    for what, values in (("length_model", ours), ("length_reference", theirs), ("skipped", out)):
        if values.shape != (n,):
            raise ValueError(f"{what} has shape {values.shape}, and there are {n} verdicts")
    known = np.isnan(scores) | np.isin(scores, list(VERDICTS.values()))
    if not known.all():
        raise ValueError(f"a verdict is one of {sorted(VERDICTS.values())}, got {scores[~known][0]:g}")
    keep = ~np.isnan(scores) & (~out | strict)
    if not keep.any():
        raise ValueError(f"none of {n} items has a verdict on two whole answers; nothing can be averaged")
    longer = np.where(scores > 0, ours - theirs, theirs - ours)
    slight = np.abs(scores) == 0.5
    ruled = np.where(slight & (margin >= 0) & (longer > margin), 0.0, scores)
    ruled = np.where(out, 0.0, ruled)[keep]
    kept = kept_prompts(names, keep)
    return Measured(
        estimates={"wildbench/reward": mean_of(ruled, kept)},
        n_dropped=int((~keep).sum()),
        extra={"margin": margin, "strict": strict},
        by_prompt={"wildbench/reward": means_by_prompt(ruled, kept)},
    )


def score(ratings: Sequence[float] | np.ndarray, prompts: Sequence[Hashable] | None = None) -> Measured:
    """WB-Score, (mean − 5)·2: 7.3 gives 4.6.

    Args:
        ratings: from 1 to 10; NaN where there is none.
        prompts: of each item.

    Raises:
        ValueError: a rating outside its range, or none at all.
    """
    rated = np.asarray(ratings, dtype=np.float64)
    names = own_prompts(prompts, len(rated))
    off = rated[~np.isnan(rated) & ~((rated >= 1) & (rated <= 10))]
    if len(off):
        raise ValueError(f"ratings go from 1 to 10, got {off[0]:g}")
    keep = ~np.isnan(rated)
    if not keep.any():
        raise ValueError(f"none of {len(rated)} items has a rating")
    scaled, kept = (rated[keep] - 5) * 2, kept_prompts(names, keep)
    return Measured(
        estimates={"wildbench/score": mean_of(scaled, kept)},
        n_dropped=int((~keep).sum()),
        by_prompt={"wildbench/score": means_by_prompt(scaled, kept)},
    )


def task_macro(
    values: Sequence[float] | np.ndarray,
    categories: Sequence[Iterable[str]],
    prompts: Sequence[Hashable] | None = None,
    *,
    weights: Mapping[str, float] = TASKS,
) -> Measured:
    """Σ_category weight·mean / Σ weight; an item counts in every category it is tagged with.

    Args:
        values: score of each item, finite.
        categories: of each item.
        prompts: of each item.
        weights: by category; items of other categories only are dropped.

    Raises:
        ValueError: a value that is not finite, lengths that differ, or a category without any item.
    """
    scores = np.asarray(values, dtype=np.float64)
    if len(scores) != len(categories) or not np.isfinite(scores).all():
        raise ValueError(f"{len(scores)} scores, all finite, need the categories of each, got {len(categories)}")
    names = own_prompts(prompts, len(scores))
    member = np.array([[category in set(tags) for category in weights] for tags in categories]).reshape(
        -1, len(weights)
    )
    missing = [category for category, count in zip(weights, member.sum(axis=0).tolist(), strict=True) if not count]
    if missing:
        raise ValueError(f"no item of the categories {missing}; give weights for those there are")
    number = numbers_of(names)
    clusters, each = int(number.max()) + 1, np.array(list(weights.values()))
    sums, sizes = np.zeros((clusters, len(weights))), np.zeros((clusters, len(weights)))
    np.add.at(sums, number, member * scores[:, None])
    np.add.at(sizes, number, member)

    def macro(drawn: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):  # samples without any item of a category
            return ((drawn @ sums) / (drawn @ sizes)) @ each / each.sum()

    return Measured(
        estimates={"wildbench/task_macro": bootstrapped(macro, n=len(scores), prompts=clusters)},
        n_dropped=int((~member.any(axis=1)).sum()),
        extra={"categories": {name: float(m) for name, m in zip(weights, sums.sum(0) / sizes.sum(0), strict=True)}},
    )
