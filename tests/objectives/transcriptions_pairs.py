"""Losses of one pair with a reference once more, from papers and published code: plain floats, one row at a time.

Like ``transcriptions``, written without reading the classes they check. A loss is a function of one row: of its two
log-ratios u = log π(y_w)/π_ref(y_w) and v = log π(y_l)/π_ref(y_l), summed over tokens, and of the two lengths. It
returns its value and its derivatives by u and by v, all differentiated by hand. ``over_rows`` does the rest: sums over
tokens, the mean over rows, the chain rule down to every policy log-prob. Losses that need more than that of a row, or
more than one row, are written out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tests.objectives.transcriptions import Ragged, minus_log_sigmoid, sigmoid

OfRow = tuple[float, float, float]
"""Loss of a row, its derivative by u, its derivative by v."""

RowLoss = Callable[[float, float, int, int], OfRow]
"""Of u, v, length of the chosen response, length of the rejected one."""

Result = tuple[float, dict[str, Ragged]]
"""Loss, and its gradient by every token: of the log-probs under a leg's name, of other numbers under leg/name."""


def over_rows(row_loss: RowLoss, chosen: Ragged, rejected: Ragged, ref_chosen: Ragged, ref_rejected: Ragged) -> Result:
    """Mean over rows of a loss of each row; every token of a response enters its sum with slope 1."""
    rows = len(chosen)
    loss = 0.0
    grad: dict[str, Ragged] = {"chosen": [], "rejected": []}
    for i in range(rows):
        u = math.fsum(chosen[i]) - math.fsum(ref_chosen[i])
        v = math.fsum(rejected[i]) - math.fsum(ref_rejected[i])
        value, by_u, by_v = row_loss(u, v, len(chosen[i]), len(rejected[i]))
        loss += value / rows
        grad["chosen"].append([by_u / rows for _ in chosen[i]])
        grad["rejected"].append([by_v / rows for _ in rejected[i]])
    return loss, grad


def dpo(*, beta: float, label_smoothing: float = 0.0) -> RowLoss:
    """Rafailov et al. 2023 (arXiv:2305.18290), Eq. 7, with Mitchell's label smoothing (cDPO).

    −(1−ε) log σ(h) − ε log σ(−h), h = β(u − v).
    """

    def row(u: float, v: float, _n_w: int, _n_l: int) -> OfRow:
        h = beta * (u - v)
        value = (1 - label_smoothing) * minus_log_sigmoid(h) + label_smoothing * minus_log_sigmoid(-h)
        by_h = label_smoothing * sigmoid(h) - (1 - label_smoothing) * sigmoid(-h)
        return value, beta * by_h, -beta * by_h

    return row


def robust(*, beta: float, label_smoothing: float) -> RowLoss:
    """Chowdhury et al. 2024 (arXiv:2403.00409): unbiased if a share ε of the labels is exchanged.

    [−(1−ε) log σ(h) + ε log σ(−h)] / (1 − 2ε), h = β(u − v).
    """

    def row(u: float, v: float, _n_w: int, _n_l: int) -> OfRow:
        h = beta * (u - v)
        scale = 1 - 2 * label_smoothing
        value = ((1 - label_smoothing) * minus_log_sigmoid(h) - label_smoothing * minus_log_sigmoid(-h)) / scale
        # −log σ(h) falls with slope σ(−h); log σ(−h) falls with slope σ(h): both terms pull the same way.
        by_h = -((1 - label_smoothing) * sigmoid(-h) + label_smoothing * sigmoid(h)) / scale
        return value, beta * by_h, -beta * by_h

    return row


def hinge(*, beta: float) -> RowLoss:
    """Zhao et al. 2023 (arXiv:2305.10425), Liu et al. 2023 (arXiv:2309.06657): max(0, 1 − β(u − v))."""

    def row(u: float, v: float, _n_w: int, _n_l: int) -> OfRow:
        room = 1 - beta * (u - v)
        if room <= 0:
            return 0.0, 0.0, 0.0
        return room, -beta, beta

    return row


def ipo(*, beta: float, reduction: str) -> RowLoss:
    """Azar et al. 2023 (arXiv:2310.12036): (u − v − 1/(2β))², u and v ``sum`` as printed, or ``mean`` per token."""
    if reduction not in ("sum", "mean"):
        raise ValueError(reduction)

    def row(u: float, v: float, n_w: int, n_l: int) -> OfRow:
        share_w, share_l = (1 / n_w, 1 / n_l) if reduction == "mean" else (1.0, 1.0)
        off = u * share_w - v * share_l - 1 / (2 * beta)
        return off**2, 2 * off * share_w, -2 * off * share_l

    return row


def exo(*, beta: float, label_smoothing: float) -> RowLoss:
    """Ji et al. 2024 (arXiv:2402.00856), two responses: KL(q ‖ p) between Bernoullis, q = σ(h), p = 1 − ε.

    q (log q − log(1−ε)) + (1−q)(log(1−q) − log ε). By h: q(1−q) times the difference of the two brackets, and that
    difference is h − log((1−ε)/ε); what the brackets' own slopes add cancels, as they do in every entropy.
    """

    def row(u: float, v: float, _n_w: int, _n_l: int) -> OfRow:
        h = beta * (u - v)
        q, other = sigmoid(h), sigmoid(-h)
        value = q * (-minus_log_sigmoid(h) - math.log(1 - label_smoothing)) + other * (
            -minus_log_sigmoid(-h) - math.log(label_smoothing)
        )
        by_h = q * other * (h - math.log((1 - label_smoothing) / label_smoothing))
        return value, beta * by_h, -beta * by_h

    return row


def discopop(*, beta: float, tau: float) -> RowLoss:
    """Lu et al. 2024 (arXiv:2406.08414), log-ratio modulated loss: (1−m)(−log σ(h)) + m exp(−h), m = σ(h/τ).

    The exponential part is written exp(log m − h), which is finite where e^−h alone is not.
    By h: m′ = m(1−m)/τ, so m′(e^−h + log σ(h)) − (1−m) σ(−h) − m e^−h.
    """

    def row(u: float, v: float, _n_w: int, _n_l: int) -> OfRow:
        h = beta * (u - v)
        m, other = sigmoid(h / tau), sigmoid(-h / tau)
        exponential = math.exp(-minus_log_sigmoid(h / tau) - h)
        logistic = other * minus_log_sigmoid(h)
        by_h = other / tau * exponential - m / tau * logistic - other * sigmoid(-h) - exponential
        return logistic + exponential, beta * by_h, -beta * by_h

    return row


def dpo_norm(*, beta: float, label_smoothing: float = 0.0) -> RowLoss:
    """Lambert et al. 2024 (arXiv:2411.15124): DPO with each log-ratio divided by its response's length."""

    def row(u: float, v: float, n_w: int, n_l: int) -> OfRow:
        h = beta * (u / n_w - v / n_l)
        value = (1 - label_smoothing) * minus_log_sigmoid(h) + label_smoothing * minus_log_sigmoid(-h)
        by_h = label_smoothing * sigmoid(h) - (1 - label_smoothing) * sigmoid(-h)
        return value, beta * by_h / n_w, -beta * by_h / n_l

    return row


def dpop(*, beta: float, penalty: float) -> RowLoss:
    """Pal et al. 2024 (arXiv:2402.13228): −log σ(β(u − v − λ max(0, −u))); the slope of max at 0 is taken as 0."""

    def row(u: float, v: float, _n_w: int, _n_l: int) -> OfRow:
        fallen = -u if u < 0 else 0.0
        h = beta * (u - v - penalty * fallen)
        by_h = -sigmoid(-h)
        return minus_log_sigmoid(h), beta * by_h * (1 + (penalty if u < 0 else 0.0)), -beta * by_h

    return row


def nca(*, beta: float) -> RowLoss:
    """Chen et al. 2024 (arXiv:2402.05369), two responses: −log σ(βu) − ½ log σ(−βu) − ½ log σ(−βv)."""

    def row(u: float, v: float, _n_w: int, _n_l: int) -> OfRow:
        value = minus_log_sigmoid(beta * u) + 0.5 * minus_log_sigmoid(-beta * u) + 0.5 * minus_log_sigmoid(-beta * v)
        return value, beta * (0.5 * sigmoid(beta * u) - sigmoid(-beta * u)), beta * 0.5 * sigmoid(beta * v)

    return row


def bco_pair(*, beta: float, delta: float) -> RowLoss:
    """Jung et al. 2024 (arXiv:2404.04656) on pairs: −log σ(βu − δ) − log σ(−(βv − δ)); δ is a constant."""

    def row(u: float, v: float, _n_w: int, _n_l: int) -> OfRow:
        value = minus_log_sigmoid(beta * u - delta) + minus_log_sigmoid(delta - beta * v)
        return value, -beta * sigmoid(delta - beta * u), beta * sigmoid(beta * v - delta)

    return row


def sppo(*, beta: float) -> RowLoss:
    """Wu et al. 2024 (arXiv:2405.00675), hard labels: (u − 1/(2β))² + (v + 1/(2β))²."""

    def row(u: float, v: float, _n_w: int, _n_l: int) -> OfRow:
        off_w, off_l = u - 1 / (2 * beta), v + 1 / (2 * beta)
        return off_w**2 + off_l**2, 2 * off_w, 2 * off_l

    return row


def apo_zero(*, beta: float) -> RowLoss:
    """D'Oosterlinck et al. 2024 (arXiv:2408.06266): 1 − σ(βu) + σ(βv)."""

    def row(u: float, v: float, _n_w: int, _n_l: int) -> OfRow:
        p, q = sigmoid(beta * u), sigmoid(beta * v)
        return (1 - p) + q, -beta * p * (1 - p), beta * q * (1 - q)

    return row


def apo_down(*, beta: float) -> RowLoss:
    """D'Oosterlinck et al. 2024 (arXiv:2408.06266): σ(βu) + 1 − σ(β(u − v)); the margin only in the second part."""

    def row(u: float, v: float, _n_w: int, _n_l: int) -> OfRow:
        p, q = sigmoid(beta * u), sigmoid(beta * (u - v))
        bend = beta * q * (1 - q)
        return p + (1 - q), beta * p * (1 - p) - bend, bend

    return row


def cal_dpo(*, beta: float) -> RowLoss:
    """Xiao et al. 2024 (arXiv:2412.14516): −log σ(u − v) + ½[(u − 1/(2β))² + (v + 1/(2β))²].

    No β in the first part, as in the authors' code.
    """

    def row(u: float, v: float, _n_w: int, _n_l: int) -> OfRow:
        off_w, off_l = u - 1 / (2 * beta), v + 1 / (2 * beta)
        by_d = -sigmoid(v - u)
        return minus_log_sigmoid(u - v) + 0.5 * (off_w**2 + off_l**2), by_d + off_w, -by_d + off_l

    return row


def rpo_reward_aware(
    chosen: Ragged,
    rejected: Ragged,
    ref_chosen: Ragged,
    ref_rejected: Ragged,
    scores_chosen: Sequence[float],
    scores_rejected: Sequence[float],
    *,
    beta: float,
    scale: float,
    distance: str,
) -> Result:
    """NeMo-Aligner's reward-aware preference optimisation (arXiv:2406.11704): h = β(u − v) towards k = η(g_w − g_l).

    ``squared``: (h − k)². ``backward``: KL(Bern(σ(k)) ‖ Bern(σ(h))), by h σ(h) − σ(k).
    ``forward``: KL(Bern(σ(h)) ‖ Bern(σ(k))), by h σ(h)σ(−h)(h − k).
    """
    if distance not in ("squared", "backward", "forward"):
        raise ValueError(distance)
    rows = len(chosen)
    loss = 0.0
    grad: dict[str, Ragged] = {"chosen": [], "rejected": []}
    for i in range(rows):
        u = math.fsum(chosen[i]) - math.fsum(ref_chosen[i])
        v = math.fsum(rejected[i]) - math.fsum(ref_rejected[i])
        h = beta * (u - v)
        k = scale * (scores_chosen[i] - scores_rejected[i])
        if distance == "squared":
            value, by_h = (h - k) ** 2, 2 * (h - k)
        else:
            # log of each probability of the two Bernoullis, model's and data's
            model, data = (
                (-minus_log_sigmoid(h), -minus_log_sigmoid(-h)),
                (-minus_log_sigmoid(k), -minus_log_sigmoid(-k)),
            )
            first, second, by_h = (
                (data, model, sigmoid(h) - sigmoid(k))
                if distance == "backward"
                else (model, data, sigmoid(h) * sigmoid(-h) * (h - k))
            )
            value = math.fsum(math.exp(a) * (a - b) for a, b in zip(first, second, strict=True))
        loss += value / rows
        grad["chosen"].append([beta * by_h / rows for _ in chosen[i]])
        grad["rejected"].append([-beta * by_h / rows for _ in rejected[i]])
    return loss, grad


def aot(
    chosen: Ragged,
    rejected: Ragged,
    ref_chosen: Ragged,
    ref_rejected: Ragged,
    *,
    beta: float,
    label_smoothing: float,
    paired: bool,
) -> Result:
    """Melnyk et al. 2024 (arXiv:2406.05882): DPO's loss of the differences between two sorted lists.

    ``paired``: of s(y_w) − s(y_l) under the policy, and of the same under the reference. Otherwise: of u, and of v.
    Both lists ascending; the k-th of one is compared with the k-th of the other. A derivative goes back to the row
    that stood at place k, and which row that was is a constant.
    """
    rows = len(chosen)
    s_w, s_l = [math.fsum(row) for row in chosen], [math.fsum(row) for row in rejected]
    r_w, r_l = [math.fsum(row) for row in ref_chosen], [math.fsum(row) for row in ref_rejected]
    if paired:
        above = [a - b for a, b in zip(s_w, s_l, strict=True)]
        below = [a - b for a, b in zip(r_w, r_l, strict=True)]
    else:
        above = [a - b for a, b in zip(s_w, r_w, strict=True)]
        below = [a - b for a, b in zip(s_l, r_l, strict=True)]
    order_above = sorted(range(rows), key=lambda i: above[i])
    order_below = sorted(range(rows), key=lambda i: below[i])
    loss = 0.0
    by_chosen, by_rejected = [0.0] * rows, [0.0] * rows
    for i, j in zip(order_above, order_below, strict=True):
        h = beta * (above[i] - below[j])
        loss += ((1 - label_smoothing) * minus_log_sigmoid(h) + label_smoothing * minus_log_sigmoid(-h)) / rows
        slope = beta * (label_smoothing * sigmoid(h) - (1 - label_smoothing) * sigmoid(-h)) / rows
        by_chosen[i] += slope
        by_rejected[i if paired else j] -= slope
    return loss, {
        "chosen": [[slope for _ in row] for slope, row in zip(by_chosen, chosen, strict=True)],
        "rejected": [[slope for _ in row] for slope, row in zip(by_rejected, rejected, strict=True)],
    }


def tdpo(
    chosen: Ragged,
    rejected: Ragged,
    ref_chosen: Ragged,
    ref_rejected: Ragged,
    kl_chosen: Ragged,
    kl_rejected: Ragged,
    *,
    beta: float,
    alpha: float | None,
) -> Result:
    """Zeng et al. 2024 (arXiv:2404.11999); the KL of each position, reference to policy, is given.

    K = its sum over the response. ``alpha=None`` is TDPO1: −log σ(β(u − v − (K_l − K_w))). Otherwise TDPO2:
    −log σ(β(u − v − α(K_l − K_w))), through whose K_w nothing is differentiated.
    """
    rows = len(chosen)
    loss = 0.0
    grad: dict[str, Ragged] = {"chosen": [], "rejected": [], "chosen/ref_kl": [], "rejected/ref_kl": []}
    for i in range(rows):
        d = math.fsum(chosen[i]) - math.fsum(ref_chosen[i]) - math.fsum(rejected[i]) + math.fsum(ref_rejected[i])
        gap = math.fsum(kl_rejected[i]) - math.fsum(kl_chosen[i])
        h = beta * (d - (1.0 if alpha is None else alpha) * gap)
        loss += minus_log_sigmoid(h) / rows
        slope = -beta * sigmoid(-h) / rows
        grad["chosen"].append([slope for _ in chosen[i]])
        grad["rejected"].append([-slope for _ in rejected[i]])
        grad["chosen/ref_kl"].append([slope if alpha is None else 0.0 for _ in kl_chosen[i]])
        grad["rejected/ref_kl"].append([-slope * (1.0 if alpha is None else alpha) for _ in kl_rejected[i]])
    return loss, grad


def log_softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    log_sum = top + math.log(math.fsum(math.exp(each - top) for each in logits))
    return [each - log_sum for each in logits]


def kl_of_position(policy: Sequence[float], reference: Sequence[float]) -> float:
    """Σ_v π_ref(v)(log π_ref(v) − log π(v)) from the two positions' logits."""
    of_policy, of_reference = log_softmax(policy), log_softmax(reference)
    return math.fsum(math.exp(r) * (r - p) for p, r in zip(of_policy, of_reference, strict=True))


def beta_dpo(
    chosen: Ragged,
    rejected: Ragged,
    ref_chosen: Ragged,
    ref_rejected: Ragged,
    *,
    step_beta: float,
    selected: Sequence[int],
) -> Result:
    """Wu et al. 2024 (arXiv:2407.08639), for a β of the step and a selection already made: DPO's mean over those rows.

    Neither is differentiated through.
    """
    loss = 0.0
    grad: dict[str, Ragged] = {
        "chosen": [[0.0 for _ in row] for row in chosen],
        "rejected": [[0.0 for _ in row] for row in rejected],
    }
    for i in selected:
        d = math.fsum(chosen[i]) - math.fsum(ref_chosen[i]) - math.fsum(rejected[i]) + math.fsum(ref_rejected[i])
        loss += minus_log_sigmoid(step_beta * d) / len(selected)
        slope = -step_beta * sigmoid(-step_beta * d) / len(selected)
        grad["chosen"][i] = [slope for _ in chosen[i]]
        grad["rejected"][i] = [-slope for _ in rejected[i]]
    return loss, grad


def beta_dpo_moments(history: Sequence[Sequence[float]], *, decay: float = 0.9) -> list[tuple[float, float]]:
    """The threshold μ and spread σ that each step's log-ratio differences are judged with, from those of every step.

    Both begin at 0 and move by a tenth of the way, before they are used, to the step's mean and its standard deviation
    (with M − 1); no correction for where they began.
    """
    mu, sigma = 0.0, 0.0
    found: list[tuple[float, float]] = []
    for differences in history:
        number = len(differences)
        mean = math.fsum(differences) / number
        variance = math.fsum((each - mean) ** 2 for each in differences) / (number - 1)
        mu = decay * mu + (1 - decay) * mean
        sigma = decay * sigma + (1 - decay) * math.sqrt(variance)
        found.append((mu, sigma))
    return found


def beta_dpo_log_weights(differences: Sequence[float], *, mu: float, sigma: float) -> list[float]:
    """Logarithm of the weight with which each row is drawn: a Gaussian around μ."""
    return [-0.5 * ((each - mu) / sigma) ** 2 for each in differences]


def beta_dpo_beta(kept: Sequence[float], *, beta: float, a: float, mu: float) -> float:
    """β of the step from the differences of the rows drawn: β(1 + a(mean − μ)), at least 0.001."""
    return max(1e-3, beta * (1 + a * (math.fsum(kept) / len(kept) - mu)))
