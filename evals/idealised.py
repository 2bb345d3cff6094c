"""How well could this objective rank at best? Accuracy of the exact optimum, and how far training stays behind it.

The optimum π* of DPO, and of KL-regularised RLHF under Bradley-Terry, ranks a pair by

    log π*(chosen)/π*(rejected) = log π_ref(chosen) − log π_ref(rejected) + (1/β)·logit α

where a share α of the raters prefers "chosen". The idealised ranking accuracy is the share of pairs in which that is
above 0 (a tie counts one half); per token, log-probs are divided by lengths and logit α is not. Everything is computed
from differences of log-probs; nothing is exponentiated.

References:
    Chen et al. 2024, arXiv:2405.19534 (Theorem 3.1, section 3.2, App. C; Def. A.8 and C.1).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evals.bootstrap import bootstrapped, numbers_of
from evals.measured import Measured, kept_prompts, own_prompts
from evals.ranking import Metric, share_of
from objectives.checks import require
from objectives.stats import Estimate, beats

METRICS: Mapping[str, Metric] = {
    f"ranking/{what}{suffix}": Metric(label + per, unit)
    for suffix, per in (("", ""), ("_per_token", ", per token"))
    for what, label, unit in (
        ("idealised_min", "Ranking accuracy of the optimum, lowest over a grid of β", "share"),
        ("idealised", "Ranking accuracy of the optimum, median over a grid of β", "share"),
        ("idealised_max", "Ranking accuracy of the optimum, highest over a grid of β", "share"),
        ("gap", "Ranking accuracy of the optimum minus the policy's", "points"),
    )
}
"""Every metric of this module."""

BETAS = (0.01, 0.1, 1.0, 5.0, 10.0)
"""The paper's grid."""
LOSING = 1e-3
"""Share that the losing side gets where raters are unanimous; logit α is then 6.907755."""
SIMULATED_ALPHA = 0.75
"""The share assumed where a dataset has none; results then say ``simulated_alpha``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Idealised:
    """The idealised accuracy by β, over pairs that people do not tie."""

    per_beta: Mapping[float, Estimate]
    minimum: float
    median: float
    maximum: float
    n_dropped: int
    """Pairs left out: tied by people, empty, or with a log-prob that is not finite."""


def logit(alpha: np.ndarray | float, losing: float = LOSING) -> np.ndarray:
    """log α − log(1 − α), with either side at least ``losing``: 0.75 gives 1.098612, and 1 gives 6.907755.

    Args:
        alpha: share of raters that prefer the chosen response, in [0, 1].
        losing: in (0, ½).

    Raises:
        ValueError: a share outside [0, 1].
    """
    share = np.asarray(alpha, dtype=np.float64)
    if not ((share >= 0) & (share <= 1)).all():
        raise ValueError("shares of raters lie between 0 and 1; leave out pairs without raters")
    # Only the side that has nothing is lifted: log(1/0.001), as in the paper's code.
    return np.asarray(np.log(np.maximum(share, losing)) - np.log(np.maximum(1 - share, losing)))


def log_odds(
    ref_chosen: np.ndarray,
    ref_rejected: np.ndarray,
    alpha: np.ndarray | float,
    beta: float,
    length_chosen: np.ndarray | None = None,
    length_rejected: np.ndarray | None = None,
) -> np.ndarray:
    """log π*(chosen)/π*(rejected) of each pair, nats; per token where lengths are given.

    Args:
        ref_chosen: summed log-probs of the chosen responses under the reference, shape (pair,).
        ref_rejected: of the rejected ones.
        alpha: share of raters that prefer "chosen", of each pair or for all.
        beta: of the objective, > 0.
        length_chosen: tokens of the chosen responses, > 0.
        length_rejected: of the rejected ones.
    """
    require("beta", beta, beta > 0, "> 0")
    chosen = ref_chosen if length_chosen is None else ref_chosen / length_chosen
    rejected = ref_rejected if length_rejected is None else ref_rejected / length_rejected
    return chosen - rejected + logit(alpha) / beta


def idealised(
    ref_chosen: np.ndarray,
    ref_rejected: np.ndarray,
    alpha: np.ndarray | float = SIMULATED_ALPHA,
    *,
    length_chosen: np.ndarray | None = None,
    length_rejected: np.ndarray | None = None,
    betas: Sequence[float] = BETAS,
    prompts: Sequence[Hashable] | None = None,
) -> Idealised:
    """Idealised ranking accuracy for every β; arguments are those of ``log_odds``.

    Args:
        ref_chosen: shape (pair,).
        ref_rejected: shape (pair,).
        alpha: pairs with exactly ½ are left out.
        length_chosen: for the accuracy per token.
        length_rejected: for the accuracy per token.
        betas: at least one, each > 0.
        prompts: of each pair.

    Raises:
        ValueError: shapes that differ, no β, or no pair left.
    """
    if not betas:
        raise ValueError(f"no β to idealise for; the paper's grid is {BETAS}")
    lengths = length_chosen, length_rejected
    keep = _usable(alpha, lengths, ref_chosen, ref_rejected)
    kept = kept_prompts(own_prompts(prompts, len(keep)), keep)
    best = _wins(ref_chosen, ref_rejected, alpha, lengths, betas, keep)
    per_beta = {float(beta): share_of(column, kept) for beta, column in zip(betas, best.T, strict=True)}
    found = [estimate.value for estimate in per_beta.values()]
    return Idealised(
        per_beta=per_beta,
        minimum=min(found),
        median=float(np.median(found)),
        maximum=max(found),
        n_dropped=int((~keep).sum()),
    )


def alignment_gap(
    policy_chosen: np.ndarray,
    policy_rejected: np.ndarray,
    ref_chosen: np.ndarray,
    ref_rejected: np.ndarray,
    alpha: np.ndarray | float = SIMULATED_ALPHA,
    *,
    length_chosen: np.ndarray | None = None,
    length_rejected: np.ndarray | None = None,
    betas: Sequence[float] = BETAS,
    prompts: Sequence[Hashable] | None = None,
) -> Measured:
    """Lowest, median and highest idealised accuracy, and how far the policy's own stays behind the median.

    With the one β that was trained with as ``betas``, the gap is the honest one. Without raters' shares every pair has
    ``SIMULATED_ALPHA``, and ``extra`` says so.

    Args:
        policy_chosen: summed log-probs of the chosen responses under the policy, nats, shape (pair,).
        policy_rejected: of the rejected ones.
        ref_chosen: the same under the reference.
        ref_rejected: the same under the reference.
        alpha: share of raters that prefer "chosen"; pairs with exactly ½ are left out.
        length_chosen: tokens, for everything per token.
        length_rejected: tokens, for everything per token.
        betas: at least one.
        prompts: of each pair; they are the clusters of the bootstrap.

    Raises:
        ValueError: as ``idealised``.
    """
    if not betas:
        raise ValueError(f"no β to idealise for; the paper's grid is {BETAS}")
    lengths = length_chosen, length_rejected
    keep = _usable(alpha, lengths, ref_chosen, ref_rejected, policy_chosen, policy_rejected)
    kept = kept_prompts(own_prompts(prompts, len(keep)), keep)
    best = _wins(ref_chosen, ref_rejected, alpha, lengths, betas, keep)
    ours = beats(
        *(
            (values[keep] / (1 if n is None else n[keep])).astype(np.float64)
            for values, n in zip((policy_chosen, policy_rejected), lengths, strict=True)
        )
    )
    number = numbers_of(kept)
    prompts_in = int(number.max()) + 1
    sums = np.zeros((prompts_in, len(betas)))
    np.add.at(sums, number, best)
    mine, sizes = np.bincount(number, weights=ours), np.bincount(number)

    def over_betas(quantile: float, minus: float = 0.0) -> Estimate:
        def statistic(drawn: np.ndarray) -> np.ndarray:
            n = drawn @ sizes
            return np.quantile((drawn @ sums) / n[:, None], quantile, axis=1) - minus * (drawn @ mine) / n

        return bootstrapped(statistic, n=len(ours), prompts=prompts_in, bounds=(-1.0 if minus else 0.0, 1.0))

    suffix = "" if length_chosen is None else "_per_token"
    simulated = isinstance(alpha, float) and alpha == SIMULATED_ALPHA
    return Measured(
        estimates={
            f"ranking/idealised_min{suffix}": over_betas(0.0),
            f"ranking/idealised{suffix}": over_betas(0.5),
            f"ranking/idealised_max{suffix}": over_betas(1.0),
            f"ranking/gap{suffix}": over_betas(0.5, minus=1.0),
        },
        n_dropped=int((~keep).sum()),
        extra={
            "betas": list(betas),
            "per_beta": best.mean(axis=0).tolist(),
            **({"simulated_alpha": alpha} if simulated else {}),
        },
    )


def rankable_below(ref_chosen: np.ndarray, ref_rejected: np.ndarray, alpha: np.ndarray | float) -> np.ndarray:
    """The β below which the optimum ranks each pair rightly.

        β < logit α / (log π_ref(rejected) − log π_ref(chosen))

    inf where the reference already ranks it rightly.

    Args:
        ref_chosen: summed log-probs under the reference, nats, shape (pair,).
        ref_rejected: of the rejected responses.
        alpha: share of raters that prefer "chosen", > ½.
    """
    c = np.asarray(ref_rejected, dtype=np.float64) - ref_chosen
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(c > 0, logit(alpha) / c, np.inf)


# ---- people who tie, and more than two responses ----


def as_people(first: np.ndarray, second: np.ndarray, alpha: np.ndarray, *, tie: float = 0.01) -> np.ndarray:
    """1 where the policy orders a pair as people do, ties included, else 0; shape (pair,).

        α = ½: |π̃(first) − π̃(second)| < tie        α > ½: π̃(first) > π̃(second)        α < ½: the reverse

    with π̃ = exp of the mean log-prob per token. Of summed log-probs both probabilities are nearly 0, and every tie
    would count as right.

    Args:
        first: mean log-probs per token, nats, shape (pair,).
        second: of the other responses.
        alpha: share of people that prefer the first.
        tie: on probabilities.

    References:
        Chen et al. 2024, Def. C.1.
    """
    one, two = np.exp(np.asarray(first, dtype=np.float64)), np.exp(np.asarray(second, dtype=np.float64))
    return np.where(alpha == 0.5, np.abs(one - two) < tie, np.where(alpha > 0.5, one > two, one < two)).astype(
        np.float64
    )


def competition_ranks(scores: np.ndarray) -> np.ndarray:
    """Ranks from 1 for the highest; equal ones share the best: [3.1, 2.0, 3.1, 1.0] gives [1, 3, 1, 4].

    Args:
        scores: shape (…, response).
    """
    from scipy.stats import rankdata  # a third of a second, which a run would begin with

    return (scores.shape[-1] + 1 - rankdata(scores, method="max", axis=-1)).astype(np.int64)


def exact_rankings(model: np.ndarray, people: np.ndarray) -> np.ndarray:
    """1 where the whole ranking of a prompt's responses is that of people, else 0; shape (prompt,).

    Args:
        model: score of every response, e.g. log-probs, shape (prompt, response).
        people: theirs, of the same shape.

    References:
        Chen et al. 2024, Def. A.8.
    """
    return (competition_ranks(model) == competition_ranks(people)).all(axis=-1).astype(np.float64)


Lengths = tuple[np.ndarray | None, np.ndarray | None]


def _wins(
    chosen: np.ndarray,
    rejected: np.ndarray,
    alpha: np.ndarray | float,
    lengths: Lengths,
    betas: Sequence[float],
    keep: np.ndarray,
) -> np.ndarray:
    """1, ½ or 0 of the optimum by pair and β, shape (kept pair, β)."""
    share = np.broadcast_to(np.asarray(alpha, dtype=np.float64), keep.shape)[keep]
    own = [None if n is None else n[keep] for n in lengths]
    odds = [log_odds(chosen[keep], rejected[keep], share, beta, *own) for beta in betas]
    return np.stack([beats(each, np.zeros_like(each)) for each in odds], axis=1)


def _usable(alpha: np.ndarray | float, lengths: Lengths, *logps: np.ndarray) -> np.ndarray:
    if (lengths[0] is None) != (lengths[1] is None):
        raise ValueError("length_chosen and length_rejected come together or not at all")
    n = len(logps[0])
    keep = np.broadcast_to(np.asarray(alpha, dtype=np.float64), (n,)) != 0.5
    for values in logps:
        if np.shape(values) != (n,):
            raise ValueError(f"log-probs of the same {n} pairs are needed, got shape {np.shape(values)}")
        keep = keep & np.isfinite(values)
    for each in lengths:
        keep = keep if each is None else keep & (each > 0)
    if not keep.any():
        raise ValueError(
            f"none of {n} pairs can be idealised: each is tied by its raters, empty, or has a non-finite log-prob"
        )
    return keep
