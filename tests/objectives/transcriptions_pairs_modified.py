"""What modifies a loss of a pair, once more: on top of ``transcriptions_pairs``, plain floats, derivatives by hand.

Written without reading the classes they check.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tests.objectives.transcriptions import Ragged, minus_log_sigmoid, sigmoid
from tests.objectives.transcriptions_pairs import OfRow, Result, RowLoss


def r_dpo(row_loss: RowLoss, *, beta: float, alpha: float) -> RowLoss:
    """Park et al. 2024 (arXiv:2403.19159): a reward of β·u + α|y|, so u is replaced by u + (α/β)|y|, and v likewise.

    In −log σ: β(u − v) + α(|y_w| − |y_l|). Lengths are constants.
    """

    def row(u: float, v: float, n_w: int, n_l: int) -> OfRow:
        return row_loss(u + alpha / beta * n_w, v + alpha / beta * n_l, n_w, n_l)

    return row


def f_divergence(row_loss: RowLoss, *, kind: str, alpha: float = 0.5) -> RowLoss:
    """Wang et al. 2023 (arXiv:2309.16240): f′(e^u) in place of u, and f′(e^v) of v, up to what cancels.

    ``forward_kl`` 1 − e^−r, slope e^−r. ``js`` log 2 + log σ(r), slope σ(−r). ``alpha`` (e^((α−1)r) − 1)/(α − 1), slope
    e^((α−1)r), r itself at α = 1. ``reverse_kl`` r.
    """

    def score(r: float) -> tuple[float, float]:
        if kind == "forward_kl":
            return 1 - math.exp(-r), math.exp(-r)
        if kind == "js":
            return math.log(2) - minus_log_sigmoid(r), sigmoid(-r)
        if kind == "alpha" and abs(alpha - 1) >= 1e-6:
            return (math.exp((alpha - 1) * r) - 1) / (alpha - 1), math.exp((alpha - 1) * r)
        if kind in ("alpha", "reverse_kl"):
            return r, 1.0
        raise ValueError(kind)

    def row(u: float, v: float, n_w: int, n_l: int) -> OfRow:
        score_w, slope_w = score(u)
        score_l, slope_l = score(v)
        value, by_u, by_v = row_loss(score_w, score_l, n_w, n_l)
        return value, by_u * slope_w, by_v * slope_l

    return row


def ld_dpo(
    row_loss: RowLoss,
    chosen: Ragged,
    rejected: Ragged,
    ref_chosen: Ragged,
    ref_rejected: Ragged,
    *,
    alpha: float,
    reference: bool,
) -> Result:
    """Liu et al. 2024 (arXiv:2409.06411): what is longer than the other response counts only α.

    s(y) = sum of the first k = min(|y_w|, |y_l|) log-probs + α · sum of the rest. With ``reference`` its log-probs too,
    else those are summed in full.
    """
    rows = len(chosen)
    loss = 0.0
    grad: dict[str, Ragged] = {"chosen": [], "rejected": []}
    for i in range(rows):
        k = min(len(chosen[i]), len(rejected[i]))

        def reduced(values: Sequence[float], k: int = k) -> float:
            return math.fsum(values[:k]) + alpha * math.fsum(values[k:])

        of_reference: Callable[[Sequence[float]], float] = reduced if reference else math.fsum
        u = reduced(chosen[i]) - of_reference(ref_chosen[i])
        v = reduced(rejected[i]) - of_reference(ref_rejected[i])
        value, by_u, by_v = row_loss(u, v, len(chosen[i]), len(rejected[i]))
        loss += value / rows
        grad["chosen"].append([by_u / rows * (1.0 if t < k else alpha) for t in range(len(chosen[i]))])
        grad["rejected"].append([by_v / rows * (1.0 if t < k else alpha) for t in range(len(rejected[i]))])
    return loss, grad


def wpo_weights(
    chosen: Ragged, rejected: Ragged, log_sum_p2_chosen: Ragged, log_sum_p2_rejected: Ragged, *, clamped: bool
) -> list[float]:
    """Zhou et al. 2024 (arXiv:2406.11827): w(y) = exp(mean over tokens of log p − log Σ_v p²); w(y_w) w(y_l) per row.

    ``clamped``, as in the authors' code: at most 1. A constant of the gradient.
    """
    weights: list[float] = []
    for w, l, p_w, p_l in zip(chosen, rejected, log_sum_p2_chosen, log_sum_p2_rejected, strict=True):  # noqa: E741
        log_weight = (math.fsum(w) - math.fsum(p_w)) / len(w) + (math.fsum(l) - math.fsum(p_l)) / len(l)
        weights.append(min(1.0, math.exp(log_weight)) if clamped else math.exp(log_weight))
    return weights


def mm_dpo_beta(delta: float, *, beta: float, weight: float, rate: float) -> float:
    """Zhang et al. 2025 (arXiv:2502.10391): β(1 + w(1 − e^−kδ)), δ ≥ 0 what a reward model puts between the two."""
    return beta * (1 + weight * (1 - math.exp(-rate * delta)))


def of_each_row(
    row_losses: Sequence[RowLoss],
    weights: Sequence[float],
    chosen: Ragged,
    rejected: Ragged,
    ref_chosen: Ragged,
    ref_rejected: Ragged,
) -> Result:
    """Mean over rows of weight · loss, each row with its own weight and loss: WPO's weights, MM-DPO's β."""
    rows = len(chosen)
    loss = 0.0
    grad: dict[str, Ragged] = {"chosen": [], "rejected": []}
    for i in range(rows):
        u = math.fsum(chosen[i]) - math.fsum(ref_chosen[i])
        v = math.fsum(rejected[i]) - math.fsum(ref_rejected[i])
        value, by_u, by_v = row_losses[i](u, v, len(chosen[i]), len(rejected[i]))
        loss += weights[i] * value / rows
        grad["chosen"].append([weights[i] * by_u / rows for _ in chosen[i]])
        grad["rejected"].append([weights[i] * by_v / rows for _ in rejected[i]])
    return loss, grad
