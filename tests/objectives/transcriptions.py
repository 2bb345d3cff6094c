"""Objectives once more, from the papers alone: plain Python floats and loops, one row at a time.

Written without reading the classes they check, and deliberately unlike them: no tensors, no masks (a leg is a list of
rows, a row a list of token log-probs), no shared arithmetic. Speed is of no concern. Each function returns the loss and
its gradient, differentiated by hand, with respect to every policy log-prob.
"""

from __future__ import annotations

import math

Ragged = list[list[float]]
"""One list of token numbers per row."""


def sigmoid(x: float) -> float:
    if x >= 0:
        return 1.0 / (1.0 + math.exp(-x))
    return math.exp(x) / (1.0 + math.exp(x))


def minus_log_sigmoid(x: float) -> float:
    if x >= 0:
        return math.log1p(math.exp(-x))
    return -x + math.log1p(math.exp(x))


def dpo(
    chosen: Ragged,
    rejected: Ragged,
    ref_chosen: Ragged,
    ref_rejected: Ragged,
    *,
    beta: float,
    label_smoothing: float,
) -> tuple[float, dict[str, Ragged]]:
    """Rafailov et al. 2023 (arXiv:2305.18290), Eq. 7; gradient as below Eq. 7, for labels flipped with probability ε.

    Eq. 7: −E log σ(β log π(y_w)/π_ref(y_w) − β log π(y_l)/π_ref(y_l)). Mitchell's note on noisy preferences (cDPO)
    takes the expectation over the label: (1−ε) of it as it is, ε with y_w and y_l exchanged.
    """
    rows = len(chosen)
    loss = 0.0
    grad: dict[str, Ragged] = {"chosen": [], "rejected": []}
    for i in range(rows):
        log_pi_w = math.fsum(chosen[i])
        log_pi_l = math.fsum(rejected[i])
        log_ref_w = math.fsum(ref_chosen[i])
        log_ref_l = math.fsum(ref_rejected[i])
        h = beta * (log_pi_w - log_ref_w) - beta * (log_pi_l - log_ref_l)
        as_labelled = minus_log_sigmoid(h)
        exchanged = minus_log_sigmoid(-h)
        loss += ((1.0 - label_smoothing) * as_labelled + label_smoothing * exchanged) / rows
        # d/dh of −log σ(h) is −σ(−h); of −log σ(−h) it is +σ(h). Every token of a response enters its sum with slope 1.
        slope = (-(1.0 - label_smoothing) * sigmoid(-h) + label_smoothing * sigmoid(h)) * beta / rows
        grad["chosen"].append([slope for _ in chosen[i]])
        grad["rejected"].append([-slope for _ in rejected[i]])
    return loss, grad


def sft(response: Ragged, weight: Ragged | None = None) -> tuple[float, Ragged]:
    """Cross-entropy per token over the whole batch; a weight of zero takes a token out of sum and count.

    L = −(1/N) Σ_i Σ_t w_it log π(y_it | x_i, y_i,<t), N = number of tokens with w_it ≠ 0, in all rows together: a mean
    over tokens, not a mean of row means.
    """
    weights = weight if weight is not None else [[1.0 for _ in row] for row in response]
    number = sum(1 for row in weights for w in row if w != 0)
    loss = 0.0
    grad: Ragged = []
    for row, row_weights in zip(response, weights, strict=True):
        slopes: list[float] = []
        for log_pi, w in zip(row, row_weights, strict=True):
            if w != 0:
                loss -= w * log_pi / max(number, 1)
            slopes.append(-w / max(number, 1))
        grad.append(slopes)
    return loss, grad
