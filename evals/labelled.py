"""Held-out responses with labels: does the policy raise desirable responses more than undesirable ones?

    AUC = P(raised(desirable) > raised(undesirable)) over all pairs of one of each      (a tie counts one half)

with raised(y) = log π(y|x) − log π_ref(y|x), summed over the response, nats. It needs no threshold and does not depend
on how unequal the classes are.

References:
    Obuchowski 1997, doi:10.2307/2533958 (standard error of an AUC with several rows of one prompt).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from scipy.special import stdtrit

from evals.ranking import Metric, mean_of
from evals.results import Result
from objectives.stats import FLOAT32_SUM, Estimate, beats

METRICS: Mapping[str, Metric] = {
    "labels/auc": Metric("Policy raised a desirable response more than an undesirable one", "share", "higher"),
    "displacement/desirable": Metric("Change of log-prob of desirable responses", "nats"),
    "displacement/undesirable": Metric("Change of log-prob of undesirable responses", "nats"),
}
"""Every metric of this module."""


def measure(
    policy: np.ndarray,
    reference: np.ndarray,
    labels: np.ndarray,
    prompts: Sequence[Hashable],
    *,
    dataset: str,
    split: str,
    step: int,
) -> list[Result]:
    """All metrics of ``METRICS`` that the labels allow: with one class only, that class's displacement.

    Args:
        policy: log-probs summed over each response, nats.
        reference: the same under the reference.
        labels: True for desirable responses.
        prompts: of each response; responses of one prompt form a cluster.
        dataset: where the rows come from.
        split: its name.
        step: optimizer steps taken.
    """
    raised = policy - reference
    found: dict[str, Estimate] = {}
    if labels.any() and not labels.all():
        found["labels/auc"] = auc(raised, labels, prompts, resolution=FLOAT32_SUM * np.abs(policy))
    for name, members in (("desirable", labels), ("undesirable", ~labels)):
        if members.any():
            own = [prompt for prompt, member in zip(prompts, members, strict=True) if member]
            found[f"displacement/{name}"] = mean_of(raised[members], own)
    return [
        Result.of(estimate, metric=metric, dataset=dataset, split=split, step=step)
        for metric, estimate in found.items()
    ]


def auc(
    scores: np.ndarray, labels: np.ndarray, prompts: Sequence[Hashable], resolution: np.ndarray | float = 0.0
) -> Estimate:
    """Area under the ROC curve with a 95 % interval, prompts as clusters.

    Args:
        scores: one per response.
        labels: True for desirable ones; both classes must occur.
        prompts: of each response.
        resolution: of each score; differences up to the sum of two are ties.
    """
    noise = np.broadcast_to(np.asarray(resolution, dtype=np.float64), scores.shape)
    wins = beats(
        scores[labels][:, None], scores[~labels][None, :], resolution=noise[labels][:, None] + noise[~labels][None, :]
    )
    value = float(wins.mean())
    influence = np.empty(len(scores))
    influence[labels] = (wins.mean(axis=1) - value) / labels.sum()
    influence[~labels] = (wins.mean(axis=0) - value) / (~labels).sum()
    numbers: dict[Hashable, int] = {}
    cluster = np.array([numbers.setdefault(prompt, len(numbers)) for prompt in prompts])
    groups = len(numbers)
    if groups < 2:
        stderr = math.nan
    else:
        sums = np.bincount(cluster, weights=influence, minlength=groups)
        stderr = math.sqrt(float((sums**2).sum()) * groups / (groups - 1))
    half = float(stdtrit(groups - 1, 0.975)) * stderr if groups > 1 else math.nan
    return Estimate(
        value=value,
        stderr=stderr,
        low=max(0.0, value - half),
        high=min(1.0, value + half),
        n=len(scores),
        clusters=groups,
        interval="clustered-t",
    )
