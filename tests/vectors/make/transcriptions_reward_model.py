"""Losses of reward models once more, from the papers: plain floats and loops, derivatives by hand.

What scripts check other implementations with, and ``test_reward_model`` ours. Each function returns the loss and its
gradient by every output of the head: by leg, or by attribute.
"""

from __future__ import annotations

import math

from tests.objectives.transcriptions import minus_log_sigmoid, sigmoid

Result = tuple[float, dict[str, list[float]]]


def bradley_terry(chosen: list[float], rejected: list[float], *, center: float = 0.0) -> Result:
    """Ouyang et al. 2022 (arXiv:2203.02155), Eq. 1: −E log σ(r_w − r_l), of one pair per prompt.

    Plus c·E (r_w + r_l)² as in Eisenstein et al. 2023 (arXiv:2312.09244).
    """
    rows = len(chosen)
    loss = 0.0
    grad: dict[str, list[float]] = {"chosen": [], "rejected": []}
    for r_w, r_l in zip(chosen, rejected, strict=True):
        loss += (minus_log_sigmoid(r_w - r_l) + center * (r_w + r_l) ** 2) / rows
        # −log σ has the slope −σ(−D) by D; the square has the same slope by both rewards.
        apart = -sigmoid(r_l - r_w)
        together = 2.0 * center * (r_w + r_l)
        grad["chosen"].append((apart + together) / rows)
        grad["rejected"].append((-apart + together) / rows)
    return loss, grad


def margin_bt(chosen: list[float], rejected: list[float], strength: list[float]) -> Result:
    """Wang et al. 2024 (arXiv:2410.01257), Eq. 2: −E log σ(r_w − r_l − m)."""
    moved = [r_w - m for r_w, m in zip(chosen, strength, strict=True)]
    return bradley_terry(moved, rejected)


def scaled_bt(chosen: list[float], rejected: list[float], strength: list[float]) -> Result:
    """The same paper, Eq. 3: −E m·log σ(r_w − r_l), the mean over rows; m below 0 counts as 0."""
    rows = len(chosen)
    loss = 0.0
    grad: dict[str, list[float]] = {"chosen": [], "rejected": []}
    for r_w, r_l, m in zip(chosen, rejected, strength, strict=True):
        weight = m if m > 0 else 0.0
        loss += weight * minus_log_sigmoid(r_w - r_l) / rows
        slope = weight * sigmoid(r_l - r_w) / rows
        grad["chosen"].append(-slope)
        grad["rejected"].append(slope)
    return loss, grad


def reward_regression(values: dict[str, list[float]], ratings: dict[str, list[float]]) -> Result:
    """Wang et al. 2024 (arXiv:2406.08673): mean squared error of the rated attributes (NaN is none) of each row.

    The mean over attributes is within a row, the mean over rows is of those.
    """
    rows = len(next(iter(values.values())))
    loss = 0.0
    grad: dict[str, list[float]] = {name: [] for name in values}
    for i in range(rows):
        rated = [name for name in values if not math.isnan(ratings[name][i])]
        for name in values:
            if name in rated:
                off = values[name][i] - ratings[name][i]
                loss += off * off / len(rated) / rows
                grad[name].append(2.0 * off / len(rated) / rows)
            else:
                grad[name].append(0.0)
    return loss, grad
