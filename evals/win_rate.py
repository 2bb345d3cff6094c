"""Win rates: in which share of prompts does a judge prefer the model's answer to a baseline's?

    win rate = mean of p,    p = 1 where the model wins, 0 where the baseline wins, ½ for a tie, anything between

Preferences come coded as AlpacaEval writes them: 1 for the baseline, 2 for the model, 1.5 (formerly 0) for a tie, soft
values between, NaN for a verdict that could not be parsed. Shares times 100 are the leaderboard's numbers.

References:
    Li et al. 2023, github.com/tatsu-lab/alpaca_eval.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from evals.bootstrap import numbers_of
from evals.measured import Measured, kept_prompts, means_by_prompt, own_prompts
from evals.ranking import Metric, share_of
from objectives.stats import beats

METRICS: Mapping[str, Metric] = {
    "win_rate/raw": Metric("Judge prefers the model's answer to the baseline's", "share", "higher"),
    "win_rate/discrete": Metric("As win_rate/raw, with every soft verdict rounded to a win or a loss", "share"),
    "win_rate/ties": Metric("Prompts on which the judge has no preference", "share"),
    "win_rate/length_controlled": Metric(
        "As win_rate/raw, were all answers as long as the baseline's", "share", "higher"
    ),
}
"""Every metric of this module and of ``length_control``."""


def win_rate(preference: Sequence[float] | np.ndarray, prompts: Sequence[Hashable] | None = None) -> Measured:
    """Plain win rate, with 95 % intervals clustered by prompt.

    ``win_rate/raw`` is the mean of preference − 1, and its standard error sd/√n; ``win_rate/discrete`` rounds every
    verdict but exact ties first; ``extra`` counts wins, losses and ties. Verdicts that are NaN or outside [1, 2] are
    dropped and counted.

    Args:
        preference: one per judged answer, coded as above, shape (item,).
        prompts: of each item; each its own where left out.

    Raises:
        ValueError: no usable verdict, or a number of prompts that is not that of the items.
    """
    coded = np.asarray(preference, dtype=np.float64)
    names = own_prompts(prompts, len(coded))
    p = shares(coded)
    keep = np.isfinite(p)
    if not keep.any():
        raise ValueError(
            f"none of {len(coded)} verdicts can be used: a win rate needs numbers in [1, 2], 1 for the baseline and 2 "
            "for the model"
        )
    p, kept = p[keep], kept_prompts(names, keep)
    discrete = np.where(p == 0.5, 0.5, np.round(p))
    return Measured(
        estimates={
            "win_rate/raw": share_of(p, kept),
            "win_rate/discrete": share_of(discrete, kept),
            "win_rate/ties": share_of((p == 0.5).astype(np.float64), kept),
        },
        n_dropped=int(len(coded) - len(p)),
        extra={"n_wins": int((p > 0.5).sum()), "n_wins_base": int((p < 0.5).sum()), "n_draws": int((p == 0.5).sum())},
        by_prompt={"win_rate/raw": means_by_prompt(p, kept), "win_rate/discrete": means_by_prompt(discrete, kept)},
    )


def shares(preference: np.ndarray) -> np.ndarray:
    """p = preference − 1 in [0, 1], a legacy 0 being a tie; NaN where the verdict can't be used."""
    coded = np.asarray(preference, dtype=np.float64)
    coded = np.where(coded == 0, 1.5, coded)
    with np.errstate(invalid="ignore"):
        return np.where((coded >= 1) & (coded <= 2), coded - 1, np.nan)


def soft_preference(first: float | None, second: float | None, *, model_first: bool = False) -> float | None:
    """Preference from the log-probs of a one-token verdict, as ``weighted_alpaca_eval_gpt4_turbo`` reads it.

        preference = 2 − P(first)/(P(first) + P(second)),    3 minus that where the model's answer was shown first

    Log-probs of −4.048847 and −0.017597131 give 1.982558. None where the judge offered neither token.

    Args:
        first: log-prob, in nats, of the token for the answer shown first; None where it is not among the likeliest.
        second: of the one for the answer shown second.
        model_first: whether the model's answer was shown first; else the baseline's was.
    """
    if first is None and second is None:
        return None
    share = 0.0 if first is None else 1.0 if second is None else 1 / (1 + math.exp(second - first))
    return 1 + share if model_first else 2 - share


def win_rate_of_scores(
    model: Sequence[float] | np.ndarray,
    baseline: Sequence[float] | np.ndarray,
    prompts: Sequence[Hashable] | None = None,
) -> Measured:
    """Win rate by the scores of a reward model or checker: of every answer against every baseline answer of its prompt.

    Args:
        model: score of each of the model's answers; NaN where there is none.
        baseline: of the baseline's answers, one for each of the model's.
        prompts: of each; several answers of a prompt are compared in all combinations.

    Raises:
        ValueError: lengths that differ, or nothing to compare.
    """
    ours, theirs = np.asarray(model, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"{len(ours)} answers need as many baseline answers, got {len(theirs)}")
    names = own_prompts(prompts, len(ours))
    keep = np.isfinite(ours) & np.isfinite(theirs)
    if not keep.any():
        raise ValueError(
            f"none of {len(ours)} pairs of answers has two finite scores; score the baseline's answers too"
        )
    kept = kept_prompts(names, keep)
    number, wins = numbers_of(kept), np.empty(int(keep.sum()))
    ours, theirs = ours[keep], theirs[keep]
    for prompt in range(int(number.max()) + 1):
        mine = number == prompt
        wins[mine] = beats(ours[mine][:, None], theirs[mine][None, :]).mean(axis=1)
    return Measured(
        estimates={"win_rate/raw": share_of(wins, kept)},
        n_dropped=int(len(keep) - keep.sum()),
        by_prompt={"win_rate/raw": means_by_prompt(wins, kept)},
    )
