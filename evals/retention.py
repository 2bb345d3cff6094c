"""Has the model become better at what it was trained for without losing what it could do before?

    GenAvg = mean over general tasks of the score,    ΔGen = GenAvg after − before
    Ret    = mean over tasks of after/before,          WorstRet = the least of these

The same prompts, decoding and seeds before and after, so that tests are paired.

References:
    arXiv:2509.20758 (domain against general scores, as points in a plane).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from evals.measured import Measured
from evals.ranking import Metric, mean_of
from evals.significance import Paired, holm, paired
from objectives.stats import Estimate

METRICS: Mapping[str, Metric] = {
    "retention/general": Metric("Mean score on general tasks", "share", "higher"),
    "retention/general_change": Metric("Mean score on general tasks, after minus before", "points", "higher"),
    "retention/retained": Metric("Score kept, mean over general tasks of after/before", "share", "higher"),
    "retention/worst": Metric("Score kept on the general task that lost most", "share", "higher"),
    "retention/domain_change": Metric("Score on the tasks trained for, after minus before", "points", "higher"),
    "retention/score": Metric("Score on one task", "share", "higher"),
    "retention/score_change": Metric("Score on one task, after minus before", "points", "higher"),
}
"""Every metric of this module."""

ALLOWED_LOSS = 0.01
"""General loss that ``best_within`` allows: one point."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """General tasks before and after, one number each."""

    general_before: float
    general_after: float
    change: float
    """ΔGen, the headline."""
    retained: float
    """Ret: mean of after/before over the tasks that were not 0 before."""
    ratio_of_means: float | None
    """None where the mean was at chance, or below, before."""
    worst: float
    worst_task: str
    excluded: tuple[str, ...]
    """Tasks that were 0 before (or at chance), which have no ratio."""


def retention(
    before: Mapping[str, float],
    after: Mapping[str, float],
    *,
    chance: Mapping[str, float] | None = None,
    clip: bool = False,
) -> Retention:
    """General scores of tasks before and after.

    Args:
        before: score in [0, 1] by task.
        after: of the same tasks.
        chance: score of a guess by task; those tasks count as (s − chance)/(1 − chance).
        clip: whether a task that became better counts as kept, and no more.

    Raises:
        ValueError: no tasks, tasks on one side only, a score outside [0, 1], or no task above 0 (or chance) before.
    """
    _check_tasks(before, after)
    tasks = list(before)
    old, new = (_above_chance(side, tasks, chance) for side in (before, after))
    usable = old > 0
    if not usable.any():
        raise ValueError(f"every task scored 0 (or at chance) before: {', '.join(tasks)}; nothing could be lost")
    ratios = new[usable] / old[usable]
    ratios = np.minimum(ratios, 1.0) if clip else ratios
    named = [task for task, has in zip(tasks, usable, strict=True) if has]
    return Retention(
        general_before=float(old.mean()),
        general_after=float(new.mean()),
        change=float(new.mean() - old.mean()),
        retained=float(ratios.mean()),
        ratio_of_means=float(new.mean() / old.mean()) if old.mean() > 0 else None,
        worst=float(ratios.min()),
        worst_task=named[int(ratios.argmin())],
        excluded=tuple(task for task, has in zip(tasks, usable, strict=True) if not has),
    )


def retention_of_scores(
    before: Mapping[str, Mapping[Hashable, float]],
    after: Mapping[str, Mapping[Hashable, float]],
    domain: Sequence[str] = (),
) -> tuple[Measured, dict[str, Paired]]:
    """The same from every prompt's score, with intervals, and a paired test of each task.

        SE(ΔGen) = √(Σ_t SE_t²)/M,    SE_t of the paired differences of task t's prompts

    with a t interval whose degrees of freedom are Welch and Satterthwaite's. Retained shares carry the interval of a
    ratio by the delta method. ``extra`` has the p-value of every task, corrected by Holm.

    Args:
        before: by task, score of every prompt in [0, 1].
        after: of the same tasks and prompts.
        domain: tasks that were trained for; all others are general.

    Raises:
        ValueError: as ``retention``, prompts that differ, or no general task.
    """
    _check_tasks(before, after)
    unknown = sorted(set(domain) - set(before))
    if unknown:
        raise ValueError(f"domain tasks {unknown} were not evaluated; the tasks are {', '.join(before)}")
    general = [task for task in before if task not in domain]
    if not general:
        raise ValueError("every task is one that was trained for; evaluate general tasks too")
    tests: dict[str, Paired] = {}
    for task in before:
        old, new = before[task], after[task]
        if old.keys() != new.keys():
            raise ValueError(
                f"{task} was evaluated on {len(old)} prompts before and {len(new)} after; use the same ones"
            )
        tests[task] = paired([new[p] for p in old], [old[p] for p in old])
    means = {
        side: {t: float(np.mean(list(s[t].values()))) for t in s} for side, s in (("before", before), ("after", after))
    }
    kept = retention({t: means["before"][t] for t in general}, {t: means["after"][t] for t in general})
    ratios = {t: _ratio(before[t], after[t]) for t in general if t not in kept.excluded}
    corrected = holm([test.p_value for test in tests.values()])
    finals = [_estimate_of(list(after[t].values())) for t in general]
    estimates = {
        "retention/general": _mean_of_tasks(finals),
        "retention/general_change": _mean_of_tasks([tests[t].difference for t in general]),
        "retention/retained": _mean_of_tasks(list(ratios.values())),
        "retention/worst": ratios[kept.worst_task],
    }
    if domain:
        estimates["retention/domain_change"] = _mean_of_tasks([tests[t].difference for t in domain])
    extra = {
        "before": means["before"],
        "after": means["after"],
        "p_holm": dict(zip(tests, corrected, strict=True)),
        "worst_task": kept.worst_task,
        "excluded": list(kept.excluded),
    }
    return Measured(estimates=estimates, extra=extra), tests


def pareto_front(domain: Sequence[float] | np.ndarray, general: Sequence[float] | np.ndarray) -> np.ndarray:
    """True for checkpoints that no other beats: at least as good in both and better in one; shape (checkpoint,).

    Args:
        domain: score of what was trained for, finite.
        general: score of everything else.

    Raises:
        ValueError: no checkpoints, lengths that differ, or a score that is not finite.
    """
    points = np.stack([_finite(domain, "domain"), _finite(general, "general")], axis=1)
    at_least = (points[None, :, :] >= points[:, None, :]).all(axis=2)
    better = (points[None, :, :] > points[:, None, :]).any(axis=2)
    return np.logical_not(np.any(np.asarray(at_least & better), axis=1))


def best_within(
    domain: Sequence[float] | np.ndarray,
    general_change: Sequence[float] | np.ndarray,
    *,
    allowed: float = ALLOWED_LOSS,
) -> int | None:
    """The checkpoint with the best domain score among those that lost at most ``allowed``; None where all lost more.

    Args:
        domain: score of what was trained for, by checkpoint.
        general_change: ΔGen of each.
        allowed: general loss, ≥ 0, in the unit of scores.
    """
    scores, change = _finite(domain, "domain"), _finite(general_change, "general")
    within = change >= -allowed - 1e-12
    return int(np.where(within, scores, -np.inf).argmax()) if within.any() else None


def _check_tasks(before: Mapping[str, object], after: Mapping[str, object]) -> None:
    if not before or before.keys() != after.keys():
        missing = sorted(before.keys() ^ after.keys())
        raise ValueError(
            "retention needs the same tasks before and after training; "
            + (f"only one side has {', '.join(missing)}: evaluate the other too" if missing else "there are none")
        )


def _above_chance(scores: Mapping[str, float], tasks: Sequence[str], chance: Mapping[str, float] | None) -> np.ndarray:
    values = np.array([scores[task] for task in tasks], dtype=np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"scores lie between 0 and 1, got {values[~((values >= 0) & (values <= 1))][0]:g}")
    guess = np.array([(chance or {}).get(task, 0.0) for task in tasks])
    return (values - guess) / (1 - guess)


def _finite(values: Sequence[float] | np.ndarray, what: str) -> np.ndarray:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found) or not np.isfinite(found).all():
        raise ValueError(f"{what} scores need one finite number for each checkpoint, got shape {found.shape}")
    return found


def _estimate_of(values: Sequence[float]) -> Estimate:
    return mean_of(np.asarray(values, dtype=np.float64), range(len(values)))


def _ratio(before: Mapping[Hashable, float], after: Mapping[Hashable, float]) -> Estimate:
    """after/before of two means over the same prompts: the residuals (a − r·b)/mean(b) have its sampling error."""
    b = np.array(list(before.values()), dtype=np.float64)
    a = np.array([after[prompt] for prompt in before], dtype=np.float64)
    ratio = float(a.mean() / b.mean())
    stderr = float(((a - ratio * b) / b.mean()).std(ddof=1)) / math.sqrt(len(b))
    half = float(stdtrit(len(b) - 1, 0.975)) * stderr
    return Estimate(
        value=ratio,
        stderr=stderr,
        low=ratio - half,
        high=ratio + half,
        n=len(b),
        clusters=len(b),
        interval="ratio-t",
    )


def _mean_of_tasks(parts: Sequence[Estimate]) -> Estimate:
    """Unweighted mean over tasks; tasks whose spread is unknown leave that of the mean unknown."""
    value = float(np.mean([part.value for part in parts]))
    squares = np.array([part.stderr**2 for part in parts])
    stderr, n = math.sqrt(float(squares.sum())) / len(parts), sum(part.n for part in parts)
    freedom = math.inf
    if stderr > 0:
        freedom = float(squares.sum()) ** 2 / sum(s**2 / (part.n - 1) for s, part in zip(squares, parts, strict=True))
    half = float(stdtrit(min(freedom, 1e9), 0.975)) * stderr if stderr == stderr else math.nan
    return Estimate(
        value=value,
        stderr=stderr,
        low=value - half,
        high=value + half,
        n=n,
        clusters=n,
        interval="welch-t over tasks",
    )
