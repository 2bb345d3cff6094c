"""Pass@k and scaling curves of selections, from stored samples of the embedded world's policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from align.groups import Samples
from align.selection import (
    BestOfMajority,
    BestOfN,
    BestOfNAnswers,
    Majority,
    Selection,
    SoftBestOfN,
    WeightedMajority,
)
from align.selection_curves import Curve, pass_at_k_curve, selection_curve
from data.worlds import Problem
from launch.bench.selection_samples import ERRORS, Drawn, Numbers, aligned, drawn, grouped, of_the_start, paired
from objectives.stats import mean_with_interval

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CHOSEN = (1, 2, 3, 4, 6, 8)
"""Answers handed in, the k of selections."""
ALPHA = 0.05
"""Of best_of_majority."""


def up_to(sizes: Sequence[int], most: int) -> list[int]:
    """The sizes that there are samples for."""
    return [size for size in sizes if size <= most]


def estimates(curve: Curve) -> list[dict[str, Any]]:
    """A curve's points for JSON."""
    return [asdict(each) for each in curve.estimates]


# ---- pass@k ----


def pass_at_k(numbers: Numbers, folder: Path) -> dict[str, Any]:
    """Unbiased pass@k of the shipped policy and of those after the last round, and the paired difference."""
    asked, start = of_the_start(numbers, folder)
    sizes = up_to((1, 2, 4, 8, 16, 32, 64), numbers.pass_samples)
    base = _passed(asked, start, sizes)
    runs = []
    for seed in numbers.seeds:
        policy = aligned(folder, seed, numbers.rounds)
        if not policy.is_dir():
            raise SystemExit(f"{policy} is not there; measure rounds first, with the same --output_dir")
        after = _passed(
            asked, drawn(policy, asked, numbers.pass_samples, numbers.max_tokens, folder, f"aligned-{seed}"), sizes
        )
        changes = [paired(after.per_prompt[:, i], base.per_prompt[:, i]) for i in range(len(sizes))]
        runs.append({"seed": seed, "values": estimates(after), "changes": changes})
    return {
        "problems": len(asked),
        "samples": {"start": numbers.samples, "aligned": numbers.pass_samples},
        "k": sizes,
        "start": estimates(base),
        "runs": runs,
    }


def _passed(asked: Sequence[Problem], samples: Sequence[Drawn], sizes: Sequence[int]) -> Curve:
    return pass_at_k_curve(*grouped(asked, samples, 0.0), sizes)


# ---- scaling curves ----


def strategies(k: int = 1) -> Mapping[str, Selection]:
    """What is compared, each at its defaults but for α."""
    return {
        "best_of_n": BestOfN() if k == 1 else BestOfNAnswers(k=k),
        "majority": Majority(k=k),
        "weighted_majority": WeightedMajority(k=k),
        "best_of_majority": BestOfMajority(alpha=ALPHA, k=k),
        "soft_best_of_n": SoftBestOfN(k=k),
    }


def curves(numbers: Numbers, folder: Path) -> dict[str, Any]:
    """Accuracy by number of samples and by number of answers, under rewards of several errors."""
    asked, samples = of_the_start(numbers, folder)
    sizes = up_to(SIZES, numbers.samples)
    by_error = {}
    for name, size in ERRORS.items():
        groups, right = grouped(asked, samples, size)
        found = {each: selection_curve(rule, groups, right, sizes) for each, rule in strategies().items()}
        handed_in = {each: [_of_all(strategies(k)[each], groups, right) for k in CHOSEN] for each in found}
        gate = found["best_of_majority"].per_prompt[:, -1]
        gates = [
            paired(majority, best)
            for majority, best in zip(handed_in["best_of_majority"], handed_in["best_of_n"], strict=True)
        ]
        by_error[name] = {
            "size": size,
            "ranks_right_first": ranked_right(groups, right),
            "by_samples": {each: estimates(curve) for each, curve in found.items()},
            "by_answers": {
                each: [asdict(mean_with_interval(list(values), range(len(values)))) for values in listed]
                for each, listed in handed_in.items()
            },
            "gate_by_answers": gates,
            "since_peak": {each: since_peak(curve.per_prompt, sizes) for each, curve in found.items()},
            "since_middle": {each: since_middle(curve) for each, curve in found.items()},
            "best_of_majority_against": {
                each: paired(gate, found[each].per_prompt[:, -1])
                for each in ("best_of_n", "majority", "weighted_majority")
            },
            "open_gate": open_gate(found["best_of_majority"]),
        }
    distinct = [len(one.answers) for one in grouped(asked, samples, 0.0)[0]]
    return {
        "problems": len(asked),
        "samples": numbers.samples,
        "alpha": ALPHA,
        "subsets": 200,
        "n": sizes,
        "k": list(CHOSEN),
        "distinct_answers": {"median": float(np.median(distinct)), "most": max(distinct)},
        "errors": by_error,
    }


def open_gate(curve: Curve) -> dict[str, Any]:
    """How best_of_majority changes from 4 samples on as long as a single sample passes its gate, α·N ≤ 1."""
    start = curve.sizes.index(4)
    end = max(place for place, size in enumerate(curve.sizes) if size * ALPHA <= 1)
    return paired(curve.per_prompt[:, end], curve.per_prompt[:, start]) | {"from": 4, "to": curve.sizes[end]}


def _of_all(rule: Selection, samples: Sequence[Samples], right: Sequence[Sequence[bool]]) -> np.ndarray:
    """Of each problem, whether a right answer is among those chosen from all samples; what draws does so 200 times."""
    if isinstance(rule, SoftBestOfN):
        return selection_curve(rule, samples, right, [len(samples[0].rewards)]).per_prompt[:, 0]
    good = [
        {a for a, is_right in zip(one.answers, own, strict=True) if is_right}
        for one, own in zip(samples, right, strict=True)
    ]
    return np.array(
        [float(any(pick.answer in own for pick in rule(one).picks)) for one, own in zip(samples, good, strict=True)]
    )


def since_peak(values: np.ndarray, sizes: Sequence[int]) -> dict[str, Any]:
    """How accuracy at the largest size differs from that at its best size; values are (problem, size).

    The best one is looked for on one half of the problems and the difference measured on the other, both ways: where it
    is looked for, some size is best by luck, and any curve would seem to fall.
    """
    halves = np.arange(len(values)) % 2
    best = [int(values[halves == half].mean(axis=0).argmax()) for half in (0, 1)]
    peak = values[np.arange(len(values)), [best[1 - half] for half in halves]]
    return paired(values[:, -1], peak) | {"peak_at": [sizes[place] for place in best]}


def since_middle(curve: Curve) -> dict[str, Any]:
    """How accuracy at the largest N differs from that at the N halfway along the sizes."""
    place = len(curve.sizes) // 2
    return paired(curve.per_prompt[:, -1], curve.per_prompt[:, place]) | {"from": curve.sizes[place]}


def ranked_right(groups: Sequence[Samples], right: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """How often the reward puts the right answer above a wrong one, over all wrong answers that were sampled."""
    shares = []
    for one, good in zip(groups, right, strict=True):
        rewards = [float(one.rewards[one.group == group].mean()) for group in range(len(one.answers))]
        for reward, is_right in zip(rewards, good, strict=True):
            if is_right and len(rewards) > 1:
                others = [other for other, same in zip(rewards, good, strict=True) if not same]
                shares.append(float(np.mean([reward > other for other in others])))
    return asdict(mean_with_interval(shares, range(len(shares)))) if shares else {}
