"""Pass@k and the accuracy of answers chosen from k: what sampling more would give, with and without a way to choose.

    samples, which are right, rewards ─► Judged of each prompt ─► pass@k and a curve for each strategy

See ``align.selection_curves`` for the formulas; both average over subsets of the samples that there are.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.groups import Samples, group_samples
from align.selection import SELECTIONS, Selection
from align.selection_curves import Curve, pass_at_k_curve, selection_curve
from evals.measured import Measured
from evals.ranking import Metric, share_of

METRICS: Mapping[str, Metric] = {
    "pass_at_k/any": Metric("One of k answers is right (unbiased pass@k)", "share", "higher"),
    **{
        f"pass_at_k/{name}": Metric(f"The answer that {name} chooses from k is right", "share", "higher")
        for name in SELECTIONS.names()
    },
}
"""Every metric of this module; results add the number of answers, ``pass_at_k/any@8``."""
REWARDLESS = ("majority",)
"""Strategies that read no rewards."""
VOTES = ("majority", "weighted_majority", "best_of_majority", "soft_best_of_n", "best_of_n_answers")
"""Strategies that take equal answers together, so that answers have to be found in responses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """The samples of one prompt."""

    prompt: str
    """Its id."""
    answers: Sequence[Hashable | None]
    """Extracted from each sample; None where none was found."""
    right: Sequence[bool]
    """By sample."""
    rewards: Sequence[float] | None = None
    """By sample; None where nothing scored them, or one could not be scored."""


def pass_at_k(tried: Sequence[Tried], ks: Sequence[int]) -> Measured:
    """Unbiased pass@k, ``pass_at_k/any@k``: 3 right of 10 give 0.3 at 1 and 0.533333 at 2.

    Args:
        tried: one per prompt.
        ks: increasing, none above the smallest number of samples.
    Raises:
        ValueError: no prompts, or a k that some prompt has too few samples for.
    """
    each_own = [group_samples(range(len(one.right)), [0.0] * len(one.right)) for one in tried]
    return _measured("any", pass_at_k_curve(each_own, [list(one.right) for one in tried], ks), tried)


def chosen_at_k(
    strategy: Selection,
    tried: Sequence[Tried],
    ks: Sequence[int],
    *,
    same: Callable[[Any, Any], bool] | None = None,
    subsets: int = 200,
    seed: int = 0,
) -> Measured:
    """Accuracy of what a strategy chooses from k samples, ``pass_at_k/NAME@k``.

    An answer is right if the first sample that has it is; samples without an answer are never chosen. Prompts without
    rewards are dropped, and counted, where the strategy reads them.

    Args:
        strategy: of ``align.selection.SELECTIONS``.
        tried: one per prompt.
        ks: as for ``pass_at_k``.
        same: whether answers that are written differently are the same one.
        subsets: random subsets of each prompt and k, for strategies without a formula.
        seed: of these.
    Raises:
        ValueError: as for ``pass_at_k``, or no prompt has rewards.
    """
    name = SELECTIONS.name_of(strategy)
    used = [one for one in tried if one.rewards is not None or name in REWARDLESS]
    if not used:
        raise ValueError(f"{name} chooses by rewards, and none of {len(tried)} prompts has one for each of its samples")
    grouped: list[Samples] = []
    right: list[list[bool]] = []
    for number, one in enumerate(used):
        rewards = [0.0] * len(one.right) if one.rewards is None else one.rewards
        samples = group_samples(one.answers, rewards, same, number=number)
        first = [int(np.flatnonzero(samples.group == group)[0]) for group in range(len(samples.answers))]
        grouped.append(samples)
        right.append([one.right[i] for i in first])
    curve = selection_curve(strategy, grouped, right, ks, subsets=subsets, seed=seed)
    return _measured(name, curve, used, dropped=len(tried) - len(used))


def _measured(name: str, curve: Curve, tried: Sequence[Tried], dropped: int = 0) -> Measured:
    prompts = [one.prompt for one in tried]
    last = len(curve.sizes) - 1
    return Measured(
        estimates={
            f"pass_at_k/{name}@{k}": share_of(curve.per_prompt[:, i], prompts) for i, k in enumerate(curve.sizes)
        },
        n_dropped=dropped,
        extra={} if curve.subsets is None else {"subsets": curve.subsets},
        by_prompt={
            f"pass_at_k/{name}@{curve.sizes[last]}": dict(zip(prompts, curve.per_prompt[:, last].tolist(), strict=True))
        },
    )
