"""Ranking accuracy, displacement and flow: does the policy itself prefer what people preferred?

    ranking accuracy = mean of 1[log π(chosen) > log π(rejected)]      (a tie counts one half)
    reward accuracy  = the same with log π − log π_ref in place of log π

The two answer different questions: a policy can raise every reward margin and still rank most pairs as its reference
did. Log-probs are summed over the response, end-of-turn included, in nats.

References:
    Chen et al. 2024, arXiv:2405.19534 (ranking accuracy Def. 2.3, difficulty Theorem 4.1; there a tie counts as right,
    which is ``ranking/strict`` + ``ranking/ties`` here); Razin et al. 2024, arXiv:2410.08847 (displacement Def. 1).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from scipy.special import stdtrit

from evals.results import Result
from objectives.stats import Estimate, beats, clustered_stderr, mean_with_interval, resolution, wilson


@dataclass(frozen=True, slots=True)
class Metric:
    """What a metric means, for those who read a table."""

    label: str
    unit: str
    """``share`` (0 to 1), ``points`` (a difference of shares) or ``nats``."""
    better: Literal["higher", "lower", ""] = ""
    """Which way a model is better; empty where the number says something else."""


METRICS: Mapping[str, Metric] = {
    "ranking/accuracy": Metric("Policy gives the chosen response more probability", "share", "higher"),
    "ranking/accuracy_per_token": Metric(
        "Policy gives the chosen response more probability per token", "share", "higher"
    ),
    "ranking/strict": Metric("As ranking/accuracy, with a tie counted as wrong", "share"),
    "ranking/strict_per_token": Metric("As ranking/accuracy_per_token, with a tie counted as wrong", "share"),
    "ranking/ties": Metric("Pairs the policy ties", "share"),
    "ranking/ties_per_token": Metric("Pairs the policy ties per token", "share"),
    "ranking/reference": Metric("Reference gives the chosen response more probability", "share"),
    "ranking/reference_per_token": Metric("Reference gives the chosen response more probability per token", "share"),
    "ranking/gain": Metric("Ranking accuracy, policy minus reference on the same pairs", "points"),
    "rewards/accuracies": Metric("Policy raised the chosen response more than the rejected one", "share", "higher"),
    "displacement/chosen": Metric("Change of log-prob of the chosen response", "nats"),
    "displacement/rejected": Metric("Change of log-prob of the rejected response", "nats"),
    "displacement/chosen_per_token": Metric("Change of log-prob of the chosen response per token", "nats"),
    "displacement/rejected_per_token": Metric("Change of log-prob of the rejected response per token", "nats"),
    "displacement/chosen_fell": Metric("Chosen responses that became less probable", "share"),
    "displacement/both_fell": Metric("Pairs of which both responses became less probable", "share"),
    "flow/right_to_right": Metric("Right with the reference, right with the policy", "share"),
    "flow/wrong_to_right": Metric("Wrong with the reference, right with the policy", "share"),
    "flow/right_to_wrong": Metric("Right with the reference, wrong with the policy", "share"),
    "flow/wrong_to_wrong": Metric("Wrong with the reference, wrong with the policy", "share"),
}
"""Every metric of this module."""
COMPARED = (
    "ranking/accuracy",
    "ranking/accuracy_per_token",
    "rewards/accuracies",
    "displacement/chosen",
    "displacement/rejected",
    "displacement/chosen_per_token",
)
"""Those of which runs keep every prompt's score."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Log-probs and lengths of pairs, one entry per pair.

    Raises:
        ValueError: on unequal lengths, or on one reference array without the other.
    """

    policy_chosen: np.ndarray
    """Summed log-probs of the chosen responses, nats, shape (pair,)."""
    policy_rejected: np.ndarray
    length_chosen: np.ndarray
    """Response tokens, end-of-turn included."""
    length_rejected: np.ndarray
    prompts: Sequence[Hashable]
    """Which prompt each pair belongs to; pairs of one prompt form a cluster."""
    ref_chosen: np.ndarray | None = None
    """The same under the reference; None where there is none."""
    ref_rejected: np.ndarray | None = None

    def __post_init__(self) -> None:
        if (self.ref_chosen is None) != (self.ref_rejected is None):
            raise ValueError("ref_chosen and ref_rejected come together or not at all")
        n = len(self.prompts)
        for name in ("policy_chosen", "policy_rejected", "length_chosen", "length_rejected", *_REFERENCE):
            values = getattr(self, name)
            if values is not None and values.shape != (n,):
                raise ValueError(f"{name} has shape {values.shape}, and there are {n} prompts")

    def usable(self) -> np.ndarray:
        """True where both legs have tokens and every log-prob is finite; shape (pair,)."""
        keep = (self.length_chosen > 0) & (self.length_rejected > 0)
        for name in ("policy_chosen", "policy_rejected", *_REFERENCE):
            values = getattr(self, name)
            if values is not None:
                keep &= np.isfinite(values)
        return keep


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Estimates by metric name, over the pairs that could be scored."""

    estimates: Mapping[str, Estimate] = field(default_factory=dict)
    n_dropped: int
    """Pairs left out: an empty response, or a log-prob that is not finite."""
    by_prompt: Mapping[str, Mapping[Hashable, float]] = field(default_factory=dict)
    """Mean score of each prompt's pairs, by metric of ``COMPARED``: for paired tests."""

    def results(self, *, dataset: str, split: str, step: int) -> list[Result]:
        """Ready for ``results.json``."""
        extra = {"n_dropped": self.n_dropped}
        return [
            Result.of(estimate, metric=metric, dataset=dataset, split=split, step=step, extra=extra)
            for metric, estimate in self.estimates.items()
        ]


def rank(pairs: Pairs) -> Ranking:
    """All metrics of ``METRICS`` that the arrays allow; those that need a reference are absent without one.

    Raises:
        ValueError: if no pair can be scored.
    """
    keep = pairs.usable()
    dropped = int(len(keep) - keep.sum())
    if not keep.any():
        raise ValueError(
            f"none of {len(keep)} pairs can be ranked: each has an empty response or a non-finite log-prob"
        )
    prompts = [prompt for prompt, kept in zip(pairs.prompts, keep, strict=True) if kept]
    chosen, rejected = _float(pairs.policy_chosen, keep), _float(pairs.policy_rejected, keep)
    tokens_chosen, tokens_rejected = _float(pairs.length_chosen, keep), _float(pairs.length_rejected, keep)

    policy = beats(chosen, rejected)
    policy_per_token = beats(chosen / tokens_chosen, rejected / tokens_rejected)
    shares = {
        "ranking/accuracy": policy,
        "ranking/accuracy_per_token": policy_per_token,
        "ranking/strict": _is(policy, 1.0),
        "ranking/strict_per_token": _is(policy_per_token, 1.0),
        "ranking/ties": _is(policy, 0.5),
        "ranking/ties_per_token": _is(policy_per_token, 0.5),
    }
    means: dict[str, np.ndarray] = {}
    if pairs.ref_chosen is not None and pairs.ref_rejected is not None:
        ref_chosen, ref_rejected = _float(pairs.ref_chosen, keep), _float(pairs.ref_rejected, keep)
        reference = beats(ref_chosen, ref_rejected)
        up_chosen, up_rejected = chosen - ref_chosen, rejected - ref_rejected
        shares |= {
            "ranking/reference": reference,
            "ranking/reference_per_token": beats(ref_chosen / tokens_chosen, ref_rejected / tokens_rejected),
            "rewards/accuracies": beats(up_chosen, up_rejected, resolution=resolution(chosen, rejected)),
            "displacement/chosen_fell": (up_chosen < 0).astype(np.float64),
            "displacement/both_fell": ((up_chosen < 0) & (up_rejected < 0)).astype(np.float64),
            **flow(reference, policy),
        }
        means = {
            "ranking/gain": policy - reference,
            "displacement/chosen": up_chosen,
            "displacement/rejected": up_rejected,
            "displacement/chosen_per_token": up_chosen / tokens_chosen,
            "displacement/rejected_per_token": up_rejected / tokens_rejected,
        }
    found = {name: share_of(values, prompts) for name, values in shares.items()}
    found |= {name: mean_of(values, prompts) for name, values in means.items()}
    by_pair = shares | means
    return Ranking(
        estimates={name: found[name] for name in METRICS if name in found},
        n_dropped=dropped,
        by_prompt={name: means_by_prompt(by_pair[name], prompts) for name in COMPARED if name in by_pair},
    )


def means_by_prompt(values: np.ndarray, prompts: Sequence[Hashable]) -> dict[Hashable, float]:
    """Each prompt's mean over its items.

    Args:
        values: one per item, finite.
        prompts: of each item.
    """
    first = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    number = np.array([first[prompt] for prompt in prompts])
    means = np.bincount(number, weights=np.asarray(values, dtype=np.float64)) / np.bincount(number)
    return dict(zip(first, means.tolist(), strict=True))


def flow(reference: np.ndarray, policy: np.ndarray) -> dict[str, np.ndarray]:
    """What became of each pair, from 1 (right), ½ (tie) or 0 (wrong) before and after; the four add up to 1 per pair.

    A pair moves by no more than it changed, so a lasting tie is half right-to-right and half wrong-to-wrong, and the
    shares add up to the two accuracies: right-to-right + wrong-to-right = policy's, with right-to-wrong = reference's.
    """
    return {
        "flow/right_to_right": np.minimum(reference, policy),
        "flow/wrong_to_right": np.maximum(policy - reference, 0.0),
        "flow/right_to_wrong": np.maximum(reference - policy, 0.0),
        "flow/wrong_to_wrong": 1.0 - np.maximum(reference, policy),
    }


def difficulty(ref_chosen: np.ndarray, ref_rejected: np.ndarray) -> np.ndarray:
    """c = log π_ref(rejected) − log π_ref(chosen), nats: above 0 the reference ranks the pair wrongly."""
    return ref_rejected - ref_chosen


def critical_loss(c: np.ndarray, beta: float) -> np.ndarray:
    """L* = −log σ(β·c): the pair is ranked rightly exactly when its DPO loss is at most this.

    c = 0 gives log 2; a difficult pair (large c) has to be driven to nearly e^(−β·c).
    """
    return np.logaddexp(0.0, -beta * c)


_REFERENCE = ("ref_chosen", "ref_rejected")


def _float(values: np.ndarray, keep: np.ndarray) -> np.ndarray:
    return values[keep].astype(np.float64)


def _is(values: np.ndarray, what: float) -> np.ndarray:
    return (values == what).astype(np.float64)


def share_of(values: np.ndarray, prompts: Sequence[Hashable]) -> Estimate:
    """Share with the interval that fits; where all pairs agree, Wilson over prompts.

    The clustered interval of values that are all 0 (or all 1) has no width, as if nothing else could ever be seen.
    """
    estimate = mean_with_interval(values.tolist(), prompts)
    if estimate.interval == "wilson" or estimate.value not in (0.0, 1.0):
        return estimate
    low, high = wilson(estimate.value * estimate.clusters, estimate.clusters)
    return replace(estimate, low=low, high=high, interval="wilson-over-prompts")


def mean_of(values: np.ndarray, prompts: Sequence[Hashable]) -> Estimate:
    """Mean with a clustered t interval, for quantities that are not shares.

    Not ``mean_with_interval``: at step 0 every displacement is exactly 0, which it would take for a proportion. There
    the model has not moved, and the interval is [0, 0].
    """
    clusters = len(set(prompts))
    value, stderr = float(values.mean()), clustered_stderr(values.tolist(), prompts)
    half = float(stdtrit(clusters - 1, 0.975)) * stderr if clusters > 1 else float("nan")
    if stderr == 0 and value != 0:  # all alike: the spread is unknown, not zero
        half = stderr = float("nan")
    return Estimate(
        value=value,
        stderr=stderr,
        low=value - half,
        high=value + half,
        n=len(values),
        clusters=clusters,
        interval="clustered-t",
    )
