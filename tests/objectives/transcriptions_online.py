"""Objectives on samples once more, from the papers and published formulas: plain floats, one row at a time.

Like ``transcriptions``, written without reading the classes they check: no tensors, no masks, derivatives by hand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tests.objectives.transcriptions import Ragged, minus_log_sigmoid, sigmoid

Result = tuple[float, dict[str, Ragged]]
"""Loss, and its gradient by every policy log-prob under the leg's name."""


def xpo(
    chosen: Ragged,
    rejected: Ragged,
    ref_chosen: Ragged,
    ref_rejected: Ragged,
    chosen_by: Sequence[str],
    *,
    beta: float,
    alpha: float,
) -> Result:
    """Xie et al. 2024 (arXiv:2405.21046), Algorithm 1, as a mean over pairs.

    −log σ(β log π(y₊)/π_ref(y₊) − β log π(y₋)/π_ref(y₋)) + α log π(ỹ), with ỹ the response that the reference wrote.
    """
    rows = len(chosen)
    loss = 0.0
    grad: dict[str, Ragged] = {"chosen": [], "rejected": []}
    for i in range(rows):
        h = 0.0
        for log_pi, log_ref in zip(chosen[i], ref_chosen[i], strict=True):
            h += beta * (log_pi - log_ref)
        for log_pi, log_ref in zip(rejected[i], ref_rejected[i], strict=True):
            h -= beta * (log_pi - log_ref)
        loss += minus_log_sigmoid(h)
        slope_chosen, slope_rejected = -beta * sigmoid(-h), beta * sigmoid(-h)
        if chosen_by[i] == "reference":
            loss += alpha * math.fsum(chosen[i])
            slope_chosen += alpha
        elif chosen_by[i] == "policy":
            loss += alpha * math.fsum(rejected[i])
            slope_rejected += alpha
        else:
            raise ValueError(chosen_by[i])
        grad["chosen"].append([slope_chosen / rows for _ in chosen[i]])
        grad["rejected"].append([slope_rejected / rows for _ in rejected[i]])
    return loss / rows, grad


def nash_md(completion: Ragged, ref_completion: Ragged, preference: Sequence[float], *, beta: float) -> Result:
    """Munos et al. 2023 (arXiv:2312.00886) as TRL has it: β Σ_t sp[lp_t − ref_t] lp_t − (p − ½) Σ_t lp_t, mean of rows.

    sp[] is a constant to the gradient, so a token's slope is β (lp_t − ref_t) − (p − ½).
    """
    rows = len(completion)
    loss = 0.0
    grad: Ragged = []
    for row, ref_row, p in zip(completion, ref_completion, preference, strict=True):
        slopes = []
        for log_pi, log_ref in zip(row, ref_row, strict=True):
            factor = beta * (log_pi - log_ref) - (p - 0.5)
            loss += factor * log_pi / rows
            slopes.append(factor / rows)
        grad.append(slopes)
    return loss, {"completion": grad}


def unlikeliness(rewards: Sequence[float], logps: Sequence[float], *, beta_rank: float) -> list[float]:
    """arXiv:2506.02355: r_i = R_i (1 − β ρ_i / G), ρ_i how many of the G responses are less likely.

    Of equal log-probs each takes the mean of the ranks that any order would give them.
    """
    group = len(rewards)
    found = []
    for i in range(group):
        lower = upper = 0
        for j in range(group):
            if logps[j] < logps[i]:
                lower += 1
                upper += 1
            elif logps[j] == logps[i] and j != i:
                upper += 1
        found.append(rewards[i] * (1.0 - beta_rank * (lower + upper) / 2.0 / group))
    return found
