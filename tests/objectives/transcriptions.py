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


def tpo(
    chosen: Ragged,
    rejected: Ragged,
    gold: Ragged,
    *,
    beta: float,
    alpha: float,
    label_smoothing: float = 0.0,
    link: str = "sigmoid",
    gold_weight: Ragged | None = None,
) -> tuple[float, dict[str, Ragged]]:
    """Saeidi et al. 2024 (arXiv:2405.16681): preference of chosen over rejected without a reference, plus α·NLL(gold).

    ``sigmoid``: −(1−ε) log σ(β(s_w − s_l)) − ε log σ(−β(s_w − s_l)) with summed log-probs s.
    ``hinge``: max(0, 1 − β(s_w − s_l)), SLiC's form with the same sums.
    ``ipo``: (a_w − a_l − 1/(2β))² with a = s / length, the mean per token.
    ε is only defined for ``sigmoid``. Preference: mean over rows. NLL: mean over the tokens of all gold responses.
    """
    if link not in ("sigmoid", "hinge", "ipo"):
        raise ValueError(link)
    if link != "sigmoid" and label_smoothing:
        raise ValueError("label smoothing belongs to the sigmoid link")
    rows = len(chosen)
    nll, gold_grad = sft(gold, gold_weight)
    loss = alpha * nll
    grad: dict[str, Ragged] = {
        "chosen": [],
        "rejected": [],
        "gold": [[alpha * slope for slope in row] for row in gold_grad],
    }
    for i in range(rows):
        s_w = math.fsum(chosen[i])
        s_l = math.fsum(rejected[i])
        per_token_w = per_token_l = 1.0
        if link == "sigmoid":
            h = beta * (s_w - s_l)
            row_loss = (1.0 - label_smoothing) * minus_log_sigmoid(h) + label_smoothing * minus_log_sigmoid(-h)
            slope = beta * (label_smoothing * sigmoid(h) - (1.0 - label_smoothing) * sigmoid(-h))
        elif link == "hinge":
            room = 1.0 - beta * (s_w - s_l)
            row_loss = room if room > 0 else 0.0
            slope = -beta if room > 0 else 0.0
        else:
            per_token_w = 1.0 / max(len(chosen[i]), 1)
            per_token_l = 1.0 / max(len(rejected[i]), 1)
            off = s_w * per_token_w - s_l * per_token_l - 1.0 / (2.0 * beta)
            row_loss = off**2
            slope = 2.0 * off
        loss += row_loss / rows
        grad["chosen"].append([slope * per_token_w / rows for _ in chosen[i]])
        grad["rejected"].append([-slope * per_token_l / rows for _ in rejected[i]])
    return loss, grad


def tpo_l(
    chosen: Ragged,
    rejected: Ragged,
    gold: Ragged,
    *,
    beta: float,
    gamma: float,
    alpha: float,
    label_smoothing: float = 0.0,
    gold_weight: Ragged | None = None,
) -> tuple[float, dict[str, Ragged]]:
    """The length-normalised form of arXiv:2405.16681: −log σ(β(a_w − a_l) − γ) + α·NLL(gold), a = mean per token.

    γ is a margin in the units of the reward, so not divided by β. With ε the argument of the sigmoid, γ included,
    changes sign as a whole for the share ε of exchanged labels; the paper has no ε here.
    """
    rows = len(chosen)
    nll, gold_grad = sft(gold, gold_weight)
    loss = alpha * nll
    grad: dict[str, Ragged] = {
        "chosen": [],
        "rejected": [],
        "gold": [[alpha * slope for slope in row] for row in gold_grad],
    }
    for i in range(rows):
        length_w = max(len(chosen[i]), 1)
        length_l = max(len(rejected[i]), 1)
        h = beta * (math.fsum(chosen[i]) / length_w - math.fsum(rejected[i]) / length_l) - gamma
        loss += ((1.0 - label_smoothing) * minus_log_sigmoid(h) + label_smoothing * minus_log_sigmoid(-h)) / rows
        slope = beta * (label_smoothing * sigmoid(h) - (1.0 - label_smoothing) * sigmoid(-h)) / rows
        grad["chosen"].append([slope / length_w for _ in chosen[i]])
        grad["rejected"].append([-slope / length_l for _ in rejected[i]])
    return loss, grad


def bco(
    completion: Ragged,
    ref_completion: Ragged,
    labels: list[bool],
    *,
    beta: float,
    delta: float,
    density_ratio: list[float] | None = None,
    minimum: float = 0.5,
    maximum: float = 10.0,
) -> tuple[float, dict[str, Ragged]]:
    """Jung et al. 2024 (arXiv:2404.04656): a classifier of single responses whose logit is the shifted reward r − δ.

    Desirable: −log σ(r − δ); undesirable: −w log σ(−(r − δ)), r = β(log π − log π_ref) summed over tokens. w is 1, or
    with ``density_ratio``, p(x | desirable) / p(x | undesirable) per row, that ratio kept within [minimum, maximum];
    desirable rows ignore theirs. δ and w are constants of the gradient. Mean over rows, not divided by the sum of w.
    """
    rows = len(completion)
    loss = 0.0
    grad: Ragged = []
    for i in range(rows):
        reward = beta * (math.fsum(completion[i]) - math.fsum(ref_completion[i]))
        weight = 1.0
        if density_ratio is not None and not labels[i]:
            weight = min(max(density_ratio[i], minimum), maximum)
        sign = 1.0 if labels[i] else -1.0
        logit = sign * (reward - delta)
        loss += weight * minus_log_sigmoid(logit) / rows
        slope = -weight * sign * beta * sigmoid(-logit) / rows
        grad.append([slope for _ in completion[i]])
    return loss, {"completion": grad}


def bco_shift(history: list[list[float]]) -> list[float]:
    """δ used with each batch of rewards: the mean of all rewards seen so far, this batch's included.

    A plain mean over rewards of both labels; nothing decays and classes are not balanced.
    """
    shifts: list[float] = []
    seen: list[float] = []
    for rewards in history:
        seen = seen + rewards
        shifts.append(math.fsum(seen) / len(seen))
    return shifts


def kto(
    completion: Ragged,
    ref_completion: Ragged,
    labels: list[bool],
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
    kl: float,
) -> tuple[float, dict[str, Ragged]]:
    """Ethayarajh et al. 2024 (arXiv:2402.01306): λ_y − v(x, y), v the value function.

    Desirable: λ_D (1 − σ(β(r − z₀))); undesirable: λ_U (1 − σ(β(z₀ − r))), r = log π − log π_ref summed over tokens,
    in nats and so without β. z₀ ≥ 0 is a constant. One mean over all rows.
    """
    if kl < 0:
        raise ValueError("z₀ is at least 0")
    rows = len(completion)
    loss = 0.0
    grad: Ragged = []
    for i in range(rows):
        log_ratio = math.fsum(completion[i]) - math.fsum(ref_completion[i])
        sign = 1.0 if labels[i] else -1.0
        weight = desirable_weight if labels[i] else undesirable_weight
        value = sign * beta * (log_ratio - kl)
        # 1 − σ(v) = σ(−v), and its derivative is −σ(v) σ(−v).
        loss += weight * sigmoid(-value) / rows
        slope = -weight * sign * beta * sigmoid(value) * sigmoid(-value) / rows
        grad.append([slope for _ in completion[i]])
    return loss, {"completion": grad}


def kto_reference_point(mismatched: Ragged, ref_mismatched: Ragged) -> float:
    """z₀: mean over rows of log π(y′|x) − log π_ref(y′|x) for another row's response y′, and never below 0."""
    ratios = [math.fsum(a) - math.fsum(b) for a, b in zip(mismatched, ref_mismatched, strict=True)]
    return max(0.0, math.fsum(ratios) / len(ratios))


def rpo(
    chosen: Ragged,
    rejected: Ragged,
    ref_chosen: Ragged,
    ref_rejected: Ragged,
    *,
    beta: float,
    eta: float,
    form: str,
) -> tuple[float, dict[str, Ragged]]:
    """Liu et al. 2024 (arXiv:2405.16436): DPO plus an imitation term on the chosen response.

    ``cumulative``: DPO − η β log π(y_w), summed over tokens, mean over rows.
    ``average``: DPO − η log π(y_w) / |y_w|, mean over rows; β is not in it.
    """
    if form not in ("cumulative", "average"):
        raise ValueError(form)
    rows = len(chosen)
    loss, grad = dpo(chosen, rejected, ref_chosen, ref_rejected, beta=beta, label_smoothing=0.0)
    for i in range(rows):
        factor = eta * beta if form == "cumulative" else eta / max(len(chosen[i]), 1)
        loss -= factor * math.fsum(chosen[i]) / rows
        grad["chosen"][i] = [slope - factor / rows for slope in grad["chosen"][i]]
    return loss, grad


def irpo(
    chosen: Ragged,
    rejected: Ragged,
    ref_chosen: Ragged,
    ref_rejected: Ragged,
    *,
    beta: float,
    alpha: float,
    form: str,
    chosen_weight: Ragged | None = None,
) -> tuple[float, dict[str, Ragged]]:
    """Pang et al. 2024 (arXiv:2404.19733), since its second version: DPO + α·NLL(chosen), NLL divided by a length.

    ``sequence``: NLL of each row by that response's length, mean over rows, as printed (|c| + |y| there are the chain
    of thought and the answer, together the response). ``token``: NLL of all rows by the number of all their tokens.
    ``chosen_weight`` weighs tokens in the NLL only; a weight of zero also takes the token out of the length.
    """
    if form not in ("token", "sequence"):
        raise ValueError(form)
    rows = len(chosen)
    loss, grad = dpo(chosen, rejected, ref_chosen, ref_rejected, beta=beta, label_smoothing=0.0)
    weight = chosen_weight if chosen_weight is not None else [[1.0 for _ in row] for row in chosen]
    if form == "token":
        nll, nll_grad = sft(chosen, weight)
    else:
        alone = [sft([row], [w]) for row, w in zip(chosen, weight, strict=True)]
        nll = math.fsum(value for value, _ in alone) / rows
        nll_grad = [[slope / rows for slope in row_grad[0]] for _, row_grad in alone]
    loss += alpha * nll
    grad["chosen"] = [
        [a + alpha * b for a, b in zip(of_dpo, of_nll, strict=True)]
        for of_dpo, of_nll in zip(grad["chosen"], nll_grad, strict=True)
    ]
    return loss, grad
