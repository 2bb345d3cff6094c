"""Losses without a reference, and of single responses, once more: plain floats, differentiated by hand.

Like ``transcriptions`` and ``transcriptions_pairs``, written without reading the classes they check.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Sequence
from decimal import Decimal

from tests.objectives.transcriptions import Ragged, minus_log_sigmoid, sft, sigmoid
from tests.objectives.transcriptions_pairs import Result, log_softmax


def _add_nll(result: Result, chosen: Ragged, coef: float, form: str, weight: Ragged | None = None) -> Result:
    """With coef · NLL(chosen): a mean over all tokens (``token``), or of rows' means (``sequence``) or sums (``row``).

    A weight of zero takes a token out of the sums and of the lengths.
    """
    loss, grad = result
    rows = len(chosen)
    weights = weight if weight is not None else [[1.0 for _ in row] for row in chosen]
    if form == "token":
        nll, slopes = sft(chosen, weights)
    elif form == "sequence":
        alone = [sft([row], [w]) for row, w in zip(chosen, weights, strict=True)]
        nll = math.fsum(value for value, _ in alone) / rows
        slopes = [[slope / rows for slope in of_row[0]] for _, of_row in alone]
    elif form == "row":
        nll = math.fsum(
            -w * log_pi
            for row, of_row in zip(chosen, weights, strict=True)
            for log_pi, w in zip(row, of_row, strict=True)
        )
        nll /= rows
        slopes = [[-w / rows for w in of_row] for of_row in weights]
    else:
        raise ValueError(form)
    added = [
        [a + coef * b for a, b in zip(of_pair, of_nll, strict=True)]
        for of_pair, of_nll in zip(grad["chosen"], slopes, strict=True)
    ]
    return loss + coef * nll, {**grad, "chosen": added}


def cpo(
    chosen: Ragged,
    rejected: Ragged,
    *,
    beta: float,
    alpha: float,
    link: str = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_weight: Ragged | None = None,
) -> Result:
    """Xu et al. 2024 (arXiv:2401.08417): a preference without reference, plus α·NLL(chosen) per token.

    ``sigmoid`` and ``hinge`` of β(s_w − s_l) with sums s; ``ipo`` of a_w − a_l with means per token a.
    """
    rows = len(chosen)
    loss = 0.0
    grad: dict[str, Ragged] = {"chosen": [], "rejected": []}
    for i in range(rows):
        share_w, share_l = (1 / len(chosen[i]), 1 / len(rejected[i])) if link == "ipo" else (1.0, 1.0)
        d = math.fsum(chosen[i]) * share_w - math.fsum(rejected[i]) * share_l
        if link == "sigmoid":
            value = (1 - label_smoothing) * minus_log_sigmoid(beta * d) + label_smoothing * minus_log_sigmoid(-beta * d)
            by_d = beta * (label_smoothing * sigmoid(beta * d) - (1 - label_smoothing) * sigmoid(-beta * d))
        elif link == "hinge":
            value, by_d = (1 - beta * d, -beta) if beta * d < 1 else (0.0, 0.0)
        elif link == "ipo":
            value, by_d = (d - 1 / (2 * beta)) ** 2, 2 * (d - 1 / (2 * beta))
        else:
            raise ValueError(link)
        loss += value / rows
        grad["chosen"].append([by_d * share_w / rows for _ in chosen[i]])
        grad["rejected"].append([-by_d * share_l / rows for _ in rejected[i]])
    return _add_nll((loss, grad), chosen, alpha, "token", chosen_weight)


def simpo(
    chosen: Ragged,
    rejected: Ragged,
    *,
    beta: float,
    gamma: float,
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
    chosen_weight: Ragged | None = None,
) -> Result:
    """Meng et al. 2024 (arXiv:2405.14734): −log σ(β(a_w − a_l) − γ), a = mean log-prob per token, γ not over β.

    With ε the argument, γ included, changes sign as a whole for the share ε of exchanged labels.
    """
    rows = len(chosen)
    loss = 0.0
    grad: dict[str, Ragged] = {"chosen": [], "rejected": []}
    for i in range(rows):
        n_w, n_l = len(chosen[i]), len(rejected[i])
        h = beta * (math.fsum(chosen[i]) / n_w - math.fsum(rejected[i]) / n_l) - gamma
        loss += ((1 - label_smoothing) * minus_log_sigmoid(h) + label_smoothing * minus_log_sigmoid(-h)) / rows
        slope = beta * (label_smoothing * sigmoid(h) - (1 - label_smoothing) * sigmoid(-h)) / rows
        grad["chosen"].append([slope / n_w for _ in chosen[i]])
        grad["rejected"].append([-slope / n_l for _ in rejected[i]])
    return _add_nll((loss, grad), chosen, sft_weight, "token", chosen_weight)


def alpha_po(
    chosen: Ragged,
    rejected: Ragged,
    *,
    beta: float,
    gamma: float,
    alpha: float,
    label_smoothing: float = 0.0,
) -> Result:
    """Gupta et al. 2025 (arXiv:2501.03884): SimPO with r = (1 − p^−α)/α in place of log p, p = e^a; dr/da = e^−αa."""
    rows = len(chosen)
    loss = 0.0
    grad: dict[str, Ragged] = {"chosen": [], "rejected": []}
    for i in range(rows):
        n_w, n_l = len(chosen[i]), len(rejected[i])
        stretch_w = math.exp(-alpha * math.fsum(chosen[i]) / n_w)
        stretch_l = math.exp(-alpha * math.fsum(rejected[i]) / n_l)
        h = beta * ((1 - stretch_w) / alpha - (1 - stretch_l) / alpha) - gamma
        loss += ((1 - label_smoothing) * minus_log_sigmoid(h) + label_smoothing * minus_log_sigmoid(-h)) / rows
        slope = beta * (label_smoothing * sigmoid(h) - (1 - label_smoothing) * sigmoid(-h)) / rows
        grad["chosen"].append([slope * stretch_w / n_w for _ in chosen[i]])
        grad["rejected"].append([-slope * stretch_l / n_l for _ in rejected[i]])
    return loss, grad


def orpo(
    chosen: Ragged,
    rejected: Ragged,
    *,
    weight: float,
    form: str,
    chosen_weight: Ragged | None = None,
) -> Result:
    """Hong et al. 2024 (arXiv:2403.07691): NLL(chosen) − λ log σ(log odds(y_w) − log odds(y_l)), odds p/(1 − p).

    p = e^a, a the mean log-prob per token, taken as at most −10⁻⁶. d/da log odds = 1/(1 − e^a).
    ``form`` is the NLL's: ``token``, all rows together, or ``sequence``, the mean of the rows' means.
    """
    rows = len(chosen)
    loss = 0.0
    grad: dict[str, Ragged] = {"chosen": [], "rejected": []}
    for i in range(rows):
        log_odds: list[float] = []
        slopes: list[float] = []
        for response in (chosen[i], rejected[i]):
            mean = math.fsum(response) / len(response)
            certain = mean > -1e-6
            a = -1e-6 if certain else mean
            log_odds.append(a - math.log(-math.expm1(a)))
            slopes.append(0.0 if certain else -1 / math.expm1(a) / len(response))
        h = log_odds[0] - log_odds[1]
        loss += weight * minus_log_sigmoid(h) / rows
        slope = -weight * sigmoid(-h) / rows
        grad["chosen"].append([slope * slopes[0] for _ in chosen[i]])
        grad["rejected"].append([-slope * slopes[1] for _ in rejected[i]])
    return _add_nll((loss, grad), chosen, 1.0, form, chosen_weight)


def apo_zero_unpaired(
    completion: Ragged,
    ref_completion: Ragged,
    labels: Sequence[bool],
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Result:
    """D'Oosterlinck et al. 2024 (arXiv:2408.06266) on single responses: 1 − σ(βr) if desirable, σ(βr) if not."""
    rows = len(completion)
    loss = 0.0
    grad: Ragged = []
    for i in range(rows):
        p = sigmoid(beta * (math.fsum(completion[i]) - math.fsum(ref_completion[i])))
        if labels[i]:
            loss += desirable_weight * (1 - p) / rows
            slope = -desirable_weight * beta * p * (1 - p) / rows
        else:
            loss += undesirable_weight * p / rows
            slope = undesirable_weight * beta * p * (1 - p) / rows
        grad.append([slope for _ in completion[i]])
    return loss, {"completion": grad}


def coverage_of(log_p: float, attempts: int) -> tuple[float, float]:
    """−log(1 − (1−p)^N) and F = N(1−p)^(N−1) p / (1 − (1−p)^N), by definition, in two hundred decimal digits."""
    with decimal.localcontext() as context:
        context.prec = 200
        p = Decimal(log_p).exp()
        all_fail = (1 - p) ** attempts
        loss = -(1 - all_fail).ln()
        factor = attempts * (1 - p) ** (attempts - 1) * p / (1 - all_fail)
        return float(loss), float(factor)


def dco(gold: Ragged, *, attempts: int) -> Result:
    """Chen et al. 2025 (arXiv:2502.07154): −log of the chance that one of N attempts is the answer, mean over rows.

    p is the probability of the whole answer. Below log p = −30 the chance is N p: the loss is −log p − log N.
    """
    rows = len(gold)
    loss = 0.0
    grad: Ragged = []
    for row in gold:
        log_p = math.fsum(row)
        value, factor = (-log_p - math.log(attempts), 1.0) if log_p < -30 else coverage_of(log_p, attempts)
        loss += value / rows
        grad.append([-factor / rows for _ in row])
    return loss, {"gold": grad}


def number_moments(logits: Sequence[float], values: Sequence[float], answer: float) -> tuple[float, float]:
    """Under a softmax over the number tokens alone: the mean of their values, and the mean distance to the answer."""
    p = [math.exp(each) for each in log_softmax(logits)]
    mean = math.fsum(each * value for each, value in zip(p, values, strict=True))
    distance = math.fsum(each * abs(value - answer) for each, value in zip(p, values, strict=True))
    return mean, distance


def ntl_mse(answers: Ragged, means: Ragged) -> tuple[float, Ragged]:
    """Zausinger et al. 2025 (arXiv:2411.02083): (E_p[value] − value(y))², mean over number tokens of all rows.

    The answer of a token that is no number is NaN. The gradient is by the expected values.
    """
    number = sum(1 for row in answers for answer in row if not math.isnan(answer))
    loss = 0.0
    grad: Ragged = []
    for row, of_row in zip(answers, means, strict=True):
        slopes: list[float] = []
        for answer, mean in zip(row, of_row, strict=True):
            if math.isnan(answer):
                slopes.append(0.0)
            else:
                loss += (mean - answer) ** 2 / number
                slopes.append(2 * (mean - answer) / number)
        grad.append(slopes)
    return loss, grad


def ntl_was(answers: Ragged, distances: Ragged) -> tuple[float, Ragged]:
    """Zausinger et al. 2025 (arXiv:2411.02083): E_p|value − value(y)|, mean over number tokens; by those distances."""
    number = sum(1 for row in answers for answer in row if not math.isnan(answer))
    loss = 0.0
    grad: Ragged = []
    for row, of_row in zip(answers, distances, strict=True):
        slopes: list[float] = []
        for answer, distance in zip(row, of_row, strict=True):
            if math.isnan(answer):
                slopes.append(0.0)
            else:
                loss += distance / number
                slopes.append(1 / number)
        grad.append(slopes)
    return loss, grad
