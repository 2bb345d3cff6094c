"""Can a judge be believed? Both orders of two answers, agreement with people, and a taste for length.

References:
    Zheng et al. 2023, arXiv:2306.05685 (position bias); Dubois et al. 2023, arXiv:2305.14387 (agreement, bias and
    variance of annotators); Cohen 1960, doi:10.1177/001316446002000104.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Literal

import numpy as np

from evals.bootstrap import bootstrapped, numbers_of
from evals.measured import Measured, kept_prompts, means_by_prompt, own_prompts
from evals.ranking import Metric, share_of

METRICS: Mapping[str, Metric] = {
    "judge/win_rate": Metric("Judge prefers the model's answer, over both orders", "share", "higher"),
    "judge/consistency": Metric("Prompts judged alike in both orders", "share"),
    "judge/first_position": Metric("Games won by the answer shown first: 50 % for a judge without bias", "share"),
    "judge/parse_failures": Metric("Prompts without a usable verdict in one of the orders", "share"),
    "judge/prefers_longer": Metric(
        "Pairs of clearly different length in which the longer answer is preferred", "share"
    ),
    "judge/agreement": Metric("Same verdict as the other annotator", "share"),
    "judge/kappa": Metric("Agreement beyond chance (Cohen's κ): 0 for chance, 1 for the same verdicts", ""),
}
"""Every metric of this module."""

LONGER = 30
"""Answers that differ by no more characters than this are equally long."""


def both_orders(
    model_first: Sequence[float] | np.ndarray,
    model_second: Sequence[float] | np.ndarray,
    prompts: Sequence[Hashable] | None = None,
    *,
    policy: str = "mean",
) -> Measured:
    """Win rate of the model from verdicts in both orders, free of a preference for a position.

        mean:    (s₁ + s₂)/2
        strict:  1 where both say the model, 0 where both say the other, ½ elsewhere

    A prompt with a verdict missing in either order is dropped: one order alone would bring the bias back.

    Args:
        model_first: s₁, where the model's answer was shown first: 1 it wins, 0 it loses, ½ tie, soft values between,
            NaN where the verdict could not be parsed.
        model_second: s₂, where it was shown second; also from the model's point of view.
        prompts: of each item; each its own where left out.
        policy: how two verdicts become one score, ``mean`` or ``strict``.

    Raises:
        ValueError: lengths that differ, a verdict outside [0, 1], or no prompt with both verdicts.
    """
    one, two = np.asarray(model_first, dtype=np.float64), np.asarray(model_second, dtype=np.float64)
    if one.shape != two.shape or one.ndim != 1:
        raise ValueError(f"both orders need a verdict for the same items, got {one.shape} and {two.shape}")
    if policy not in ("mean", "strict"):
        raise ValueError(f"policy must be mean or strict, got {policy!r}")
    for verdicts in (one, two):
        off = verdicts[np.isfinite(verdicts) & ((verdicts < 0) | (verdicts > 1)) | np.isinf(verdicts)]
        if len(off):
            raise ValueError(f"verdicts lie between 0 (the model loses) and 1 (it wins), got {off[0]:g}")
    names = own_prompts(prompts, len(one))
    keep = np.isfinite(one) & np.isfinite(two)
    if not keep.any():
        raise ValueError(
            f"none of {len(one)} prompts has a verdict in both orders; see what the judge wrote, and how it is parsed"
        )
    kept = kept_prompts(names, keep)
    s1, s2 = one[keep], two[keep]
    strict = np.where((s1 == 1) & (s2 == 1), 1.0, np.where((s1 == 0) & (s2 == 0), 0.0, 0.5))
    scores = (s1 + s2) / 2 if policy == "mean" else strict
    return Measured(
        estimates={
            "judge/win_rate": share_of(scores, kept),
            "judge/consistency": share_of((s1 == s2).astype(np.float64), kept),
            "judge/first_position": share_of((s1 + 1 - s2) / 2, kept),
            "judge/parse_failures": share_of((~keep).astype(np.float64), names),
        },
        n_dropped=int((~keep).sum()),
        extra={"policy": policy},
        by_prompt={"judge/win_rate": means_by_prompt(scores, kept)},
    )


def prefers_longer(
    first_wins: Sequence[float] | np.ndarray,
    first_length: Sequence[int] | np.ndarray,
    second_length: Sequence[int] | np.ndarray,
    prompts: Sequence[Hashable] | None = None,
) -> Measured:
    """Share of pairs in which the longer answer is preferred, among those whose lengths differ by more than ``LONGER``.

    Args:
        first_wins: 1 where the first answer is preferred, 0 the second, ½ tie, NaN unknown.
        first_length: characters of the first answers.
        second_length: of the second ones.
        prompts: of each pair.

    Raises:
        ValueError: lengths that don't fit, or no pair of clearly different length.
    """
    wins = np.asarray(first_wins, dtype=np.float64)
    apart = np.asarray(first_length, dtype=np.float64) - np.asarray(second_length, dtype=np.float64)
    if apart.shape != wins.shape:
        raise ValueError(f"{len(wins)} verdicts need as many lengths, got {len(apart)}")
    names = own_prompts(prompts, len(wins))
    keep = np.isfinite(wins) & (np.abs(apart) > LONGER)
    if not keep.any():
        raise ValueError(
            f"none of {len(wins)} pairs differs by more than {LONGER} characters; there is no longer answer"
        )
    longer = np.where(apart > 0, wins, 1 - wins)[keep]
    return Measured(
        estimates={"judge/prefers_longer": share_of(longer, kept_prompts(names, keep))},
        n_dropped=int((~keep).sum()),
    )


def agreement(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    prompts: Sequence[Hashable] | None = None,
    *,
    kind: str = "zero_one",
) -> Measured:
    """Agreement of two annotators, and Cohen's κ of their verdicts as classes.

        zero_one:  mean of 1[a = b], ties being a class of their own
        absolute:  1 − mean of |a − b|, on the coding 1 to 2 (or 0 to 1)
        κ = (p_o − p_e)/(1 − p_e),    p_e = Σ_class share_a·share_b

    κ is absent where both give one and the same verdict everywhere.

    Args:
        first: verdicts of one annotator; NaN where there is none.
        second: of the other, on the same items.
        prompts: of each item.
        kind: how agreement is counted, ``zero_one`` or ``absolute``.

    Raises:
        ValueError: lengths that differ, or no item that both have judged.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"agreement needs two verdicts on the same items, got {a.shape} and {b.shape}")
    if kind not in ("zero_one", "absolute"):
        raise ValueError(f"kind must be zero_one or absolute, got {kind!r}")
    names = own_prompts(prompts, len(a))
    keep = np.isfinite(a) & np.isfinite(b)
    if not keep.any():
        raise ValueError(f"none of {len(a)} items has a verdict of both annotators")
    a, b, kept = a[keep], b[keep], kept_prompts(names, keep)
    same = (a == b).astype(np.float64) if kind == "zero_one" else 1 - np.abs(a - b)
    estimates = {"judge/agreement": share_of(same, kept)}
    classes, codes = np.unique(np.concatenate([a, b]), return_inverse=True)
    if len(classes) > 1:
        number = numbers_of(kept)
        prompts_kept = int(number.max()) + 1
        hot = np.eye(len(classes))[codes]
        of_first, of_second = (_sums(half, number, prompts_kept) for half in (hot[: len(a)], hot[len(a) :]))
        equal, sizes = np.bincount(number, weights=a == b), np.bincount(number)

        def kappa(drawn: np.ndarray) -> np.ndarray:
            n = drawn @ sizes
            observed = (drawn @ equal) / n
            expected = ((drawn @ of_first) * (drawn @ of_second)).sum(axis=1) / n**2
            with np.errstate(invalid="ignore", divide="ignore"):
                return np.where(expected < 1, (observed - expected) / (1 - expected), np.nan)

        estimates["judge/kappa"] = bootstrapped(kappa, n=len(a), prompts=prompts_kept, bounds=(-1.0, 1.0))
    return Measured(estimates=estimates, n_dropped=int((~keep).sum()), extra={"kind": kind})


def mode(verdicts: Sequence[float], rng: np.random.Generator) -> float:
    """The most frequent verdict; of several, one at random.

    Args:
        verdicts: at least one.
        rng: decides ties.

    Raises:
        ValueError: no verdicts.
    """
    if not len(verdicts):
        raise ValueError("no verdicts have no mode; leave out items that nobody has judged")
    classes, counts = np.unique(np.asarray(verdicts, dtype=np.float64), return_counts=True)
    return float(rng.choice(classes[counts == counts.max()]))


def leave_one_out(
    annotations: Sequence[Sequence[float]], *, others: Literal["mode", "each"] = "mode", seed: int = 123
) -> float:
    """How well one annotation of an item agrees with the others of it, a mean over annotations and then items.

    Of a judge's own annotations and against their mode, 1 minus it is the judge's *variance*; of people's annotations
    and against each other one, it is human agreement.

    Args:
        annotations: of each item, its verdicts; items with fewer than two are left out.
        others: whether the mode of the others is what to agree with, or each of them.
        seed: of the random choice among equally frequent verdicts.

    Raises:
        ValueError: no item has two annotations.
    """
    rng, found = np.random.default_rng(seed), []
    for verdicts in annotations:
        if len(verdicts) > 1:
            rest = [[*verdicts[:i], *verdicts[i + 1 :]] for i in range(len(verdicts))]
            compared = [[mode(each, rng)] if others == "mode" else each for each in rest]
            found.append(np.mean([np.mean([v == w for w in each]) for v, each in zip(verdicts, compared, strict=True)]))
    if not found:
        raise ValueError("no item has two annotations; have at least some items judged twice")
    return float(np.mean(found))


def bias(judge: Sequence[Sequence[float]], people: Sequence[Sequence[float]], *, seed: int = 123) -> float:
    """1 − agreement of the judge's mode with people's mode, over items.

    Args:
        judge: of each item, the judge's verdicts.
        people: of each item, people's verdicts.
        seed: of the random choice among equally frequent verdicts.

    Raises:
        ValueError: no items, or lengths that differ.
    """
    if len(judge) != len(people) or not judge:
        raise ValueError(f"bias compares the same items, got {len(judge)} and {len(people)}")
    rng = np.random.default_rng(seed)
    return 1 - float(np.mean([mode(a, rng) == mode(b, rng) for a, b in zip(judge, people, strict=True)]))


def _sums(values: np.ndarray, number: np.ndarray, prompts: int) -> np.ndarray:
    found = np.zeros((prompts, values.shape[1]))
    np.add.at(found, number, values)
    return found
