"""CHES: which pairs are so alike in the model's eyes that training on them takes probability from *both* responses?

    S = Σ of the final hidden states that predict a response's tokens, n of them
    CHES    = ⟨S⁺, S⁻ − S⁺⟩                      LN-CHES = ⟨m⁺, m⁻ − m⁺⟩,  m = S/n

Higher means more alike, and more likelihood displacement to be expected. Raw CHES grows with the length of the
rejected response, so pairs are chosen by LN-CHES. The states are those the unembedding multiplies (after the final
norm), under the initial policy in eval mode, at the positions whose logits score the response: the last prompt token
included, the response's last token (its end token) excluded.

References:
    Razin et al. 2024, arXiv:2410.08847 (Def. 1 to 3, section 6).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from data.pack import PackedBatch
from evals.correlation import correlations
from evals.measured import Measured, kept_prompts, own_prompts
from evals.ranking import Metric, mean_of
from objectives.checks import require

SIMILARITIES: Mapping[str, str] = {
    "ches": "CHES: how alike the hidden states of both responses are",
    "ln_ches": "CHES per token",
    "last_hidden": "Inner product of the states before the last tokens",
    "edit_similarity": "Minus the share of tokens to edit to turn one response into the other",
}
"""What may predict displacement, by name."""
METRICS: Mapping[str, Metric] = {
    **{f"ches/{name}": Metric(label, "") for name, label in SIMILARITIES.items()},
    **{
        f"ches/{name}_{kind}": Metric(f"{label}: {word} with how far the chosen response fell", "")
        for name, label in SIMILARITIES.items()
        for kind, word in (("spearman", "rank correlation"), ("pearson", "correlation"))
    },
    "displacement/chosen_probability": Metric("Change of probability of the chosen response", "points"),
    "displacement/rejected_probability": Metric("Change of probability of the rejected response", "points"),
}
"""Every metric of this module."""

KEPT = 0.05
"""Share of pairs that the paper's safety experiment keeps: those with the lowest LN-CHES."""


# ---- hidden states, in a stream ----


def sums_of_states(states: Tensor, batch: PackedBatch, leg: str) -> tuple[Tensor, Tensor]:
    """Sum of the states that predict a leg's tokens, and the last of them, of every row.

    Args:
        states: of all response tokens of the batch, (response, hidden), any floating type.
        batch: knows which are whose.
        leg: one of its legs.
    Returns:
        Sums in float64, (row, hidden), and the states that predict the last token, the same.
    """
    place = batch.legs[leg]
    lengths = place.mask.sum(dim=1)
    own = states[place.slot[place.mask]].double()
    rows = torch.repeat_interleave(torch.arange(len(lengths), device=own.device), lengths)
    sums = own.new_zeros(len(lengths), own.shape[1]).index_add_(0, rows, own)
    return sums, own[lengths.cumsum(0) - 1]


def predicting(is_label: Bool[Tensor, "row position"]) -> Bool[Tensor, "row position"]:
    """Positions whose logits score a response token, from the tokens that are labels: one step to the left.

    Padding on either side needs no care, unlike in the paper's code, which is wrong with padding on the right.

    Args:
        is_label: True on response tokens, the end token included where it is trained on.
    """
    shifted = torch.zeros_like(is_label)
    shifted[:, :-1] = is_label[:, 1:]
    return shifted


class StateSums:
    """S, n and the last predicting state of every row, from hidden states that come in chunks of positions.

    Sums are linear over positions, so that only one vector per row is ever kept. States may be bfloat16; they are added
    in ``dtype``, since a sum of hundreds of states in bfloat16 is off by a percent.

    Args:
        dtype: of the sums, ``torch.float32`` or ``torch.float64``.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"sums of hidden states are kept in float32 or float64, not {dtype}")
        self.dtype = dtype
        self.sums: Tensor | None = None
        self.counts: Tensor | None = None
        self.last: Tensor | None = None

    def add(self, hidden: Float[Tensor, "row position hidden"], mask: Bool[Tensor, "row position"]) -> None:
        """Adds the next chunk of positions of all rows; what lies outside the mask, NaN included, has no effect.

        Args:
            hidden: final hidden states of the chunk.
            mask: ``predicting`` of the same positions.
        """
        if self.sums is None or self.counts is None or self.last is None:
            rows, width = hidden.shape[0], hidden.shape[2]
            self.sums = torch.zeros(rows, width, dtype=self.dtype, device=hidden.device)
            self.last = torch.zeros_like(self.sums)
            self.counts = torch.zeros(rows, dtype=torch.int64, device=hidden.device)
        states = torch.where(mask[..., None], hidden.detach().to(self.dtype), 0.0)
        self.sums += states.sum(dim=1)
        self.counts += mask.sum(dim=1)
        positions = torch.arange(mask.shape[1], device=mask.device)
        final = torch.where(mask, positions, -1).max(dim=1).values
        rows_here = torch.arange(len(final), device=final.device)
        self.last = torch.where((final >= 0)[:, None], states[rows_here, final.clamp(min=0)], self.last)

    def result(self) -> dict[str, np.ndarray]:
        """``sum`` and ``last``, (row, hidden), and ``n``, (row,); float64 and int64.

        Raises:
            ValueError: nothing was added.
        """
        if self.sums is None or self.counts is None or self.last is None:
            raise ValueError("no hidden states were added, so there are no sums")
        return {
            "sum": self.sums.double().cpu().numpy(),
            "n": self.counts.cpu().numpy(),
            "last": self.last.double().cpu().numpy(),
        }


def of_batch(states: Float[Tensor, "response hidden"], batch: PackedBatch) -> dict[str, Tensor]:
    """The scores of a batch's pairs while its states are there: what one pass keeps of them.

    Args:
        states: final hidden states that predict the response tokens, in the batch's order.
        batch: with the legs chosen and rejected.
    Returns:
        ``ches``, ``ln_ches`` and ``last_hidden``, float64, (row,).
    """
    (chosen, last_chosen), (rejected, last_rejected) = (
        sums_of_states(states, batch, leg) for leg in ("chosen", "rejected")
    )
    n_chosen, n_rejected = (batch.legs[leg].mask.sum(dim=1)[:, None].double() for leg in ("chosen", "rejected"))
    mean_chosen = chosen / n_chosen
    return {
        "ches": (chosen * (rejected - chosen)).sum(dim=1),
        "ln_ches": (mean_chosen * (rejected / n_rejected - mean_chosen)).sum(dim=1),
        "last_hidden": (last_chosen * last_rejected).sum(dim=1),
    }


# ---- scores of pairs ----


def ches(sum_chosen: np.ndarray, sum_rejected: np.ndarray) -> np.ndarray:
    """⟨S⁺, S⁻ − S⁺⟩ of each pair, shape (pair,).

    Not ⟨S⁺, S⁻⟩ − ‖S⁺‖², two large numbers of which the difference loses digits.

    Args:
        sum_chosen: S⁺, shape (pair, hidden), float32 or wider.
        sum_rejected: S⁻.
    """
    chosen = np.asarray(sum_chosen, dtype=np.float64)
    return (chosen * (np.asarray(sum_rejected, dtype=np.float64) - chosen)).sum(axis=-1)


def ln_ches(
    sum_chosen: np.ndarray, n_chosen: np.ndarray, sum_rejected: np.ndarray, n_rejected: np.ndarray
) -> np.ndarray:
    """⟨m⁺, m⁻ − m⁺⟩ with means m = S/n, shape (pair,); NaN where a response is empty.

    Args:
        sum_chosen: S⁺, shape (pair, hidden).
        n_chosen: states in it, shape (pair,).
        sum_rejected: S⁻.
        n_rejected: states in it.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        chosen = np.asarray(sum_chosen, dtype=np.float64) / np.asarray(n_chosen, dtype=np.float64)[:, None]
        rejected = np.asarray(sum_rejected, dtype=np.float64) / np.asarray(n_rejected, dtype=np.float64)[:, None]
        return ches(chosen, rejected)


def edit_distance(first: Sequence[int], second: Sequence[int]) -> float:
    """Levenshtein distance of token ids over the longer length, in [0, 1]: [5, 6, 7, 8] and [5, 7, 8] give 0.25.

    Args:
        first: ids of one response.
        second: of the other.

    Raises:
        ValueError: both are empty.
    """
    if not len(first) and not len(second):
        raise ValueError("two empty responses have no edit distance; drop the pair")
    a, b = np.asarray(first), np.asarray(second)
    steps = np.arange(len(b) + 1)
    row = steps.copy()
    for i, token in enumerate(a, start=1):
        best = np.minimum(row[1:] + 1, row[:-1] + (b != token))
        # Insertions run along the row: the least of best[j] + (distance walked), as a running minimum.
        row = np.minimum.accumulate(np.concatenate([[i], best]) - steps) + steps
    return float(row[-1]) / max(len(a), len(b))


def similarities(
    chosen: Mapping[str, np.ndarray],
    rejected: Mapping[str, np.ndarray],
    tokens: Sequence[tuple[Sequence[int], Sequence[int]]] | None = None,
) -> dict[str, np.ndarray]:
    """The four scores of ``SIMILARITIES`` for every pair, NaN for pairs with an empty response.

    Args:
        chosen: ``StateSums.result`` of the chosen responses.
        rejected: of the rejected ones.
        tokens: ids of both responses of each pair; without them there is no ``edit_similarity``.
    """
    usable = (chosen["n"] > 0) & (rejected["n"] > 0)
    found = {
        "ches": ches(chosen["sum"], rejected["sum"]),
        "ln_ches": ln_ches(chosen["sum"], chosen["n"], rejected["sum"], rejected["n"]),
        "last_hidden": (chosen["last"] * rejected["last"]).sum(axis=-1),
    }
    if tokens is not None:
        found["edit_similarity"] = np.array([-edit_distance(a, b) if len(a) and len(b) else np.nan for a, b in tokens])
    return {name: np.where(usable, values, np.nan) for name, values in found.items()}


# ---- subsets ----


def keep_mask(scores: np.ndarray, share: float = KEPT) -> np.ndarray:
    """True for the pairs with the lowest scores, at least one; of equal ones the first in the dataset; shape (pair,).

    Args:
        scores: LN-CHES of each pair; NaN (an empty response) is never kept.
        share: of the pairs with a score to keep, in (0, 1].

    Raises:
        ValueError: a share out of range, or no pair with a score.
    """
    require("share", share, 0 < share <= 1, "in (0, 1]")
    order = _ascending(scores)
    kept = np.zeros(len(scores), dtype=bool)
    kept[order[: max(1, round(share * len(order)))]] = True
    return kept


def percentile_subset(scores: np.ndarray, size: int, quantile: float) -> np.ndarray:
    """Indices of ``size`` pairs around a quantile of the scores, in ascending order of score.

        i = round(q·(N − 1)),  from i − size//2, moved inwards at the ends

    Args:
        scores: of each pair; NaN is left out.
        size: pairs to return, ≥ 1; all where there are fewer.
        quantile: in [0, 1].

    Raises:
        ValueError: a size or quantile out of range, or no pair with a score.
    """
    require("size", size, size >= 1, ">= 1")
    require("quantile", quantile, 0 <= quantile <= 1, "in [0, 1]")
    order = _ascending(scores)
    start = max(0, round(quantile * (len(order) - 1)) - size // 2)
    if start + size > len(order):
        start = max(0, len(order) - size)
    return order[start : start + size]


def _ascending(scores: np.ndarray) -> np.ndarray:
    order = np.argsort(scores, kind="stable")
    order = order[np.isfinite(scores[order])]
    if not len(order):
        raise ValueError(f"none of {len(scores)} pairs has a score; each has an empty response")
    return order


# ---- does it predict displacement? ----


def measure(
    scores: Mapping[str, np.ndarray],
    change_chosen: np.ndarray | None = None,
    prompts: Sequence[Hashable] | None = None,
) -> Measured:
    """Mean of every score, and where it is known how log-probs changed, how well each score foretold the fall.

    Correlations are with −Δ⁺, how far the chosen response *fell*: positive means that the score foretells displacement.

    Args:
        scores: as ``similarities`` gives them.
        change_chosen: Δ⁺ = log π_θ(chosen) − log π_ref(chosen) of each pair after training, nats.
        prompts: of each pair.

    Raises:
        ValueError: no pair with all scores; with ``change_chosen``, fewer than three, or a column that does not vary.
    """
    keep = np.all([np.isfinite(values) for values in scores.values()], axis=0)
    if change_chosen is not None:
        keep &= np.isfinite(change_chosen)
    if not keep.any():
        raise ValueError(f"none of {keep.size} pairs has scores; each has an empty response or a non-finite number")
    kept = kept_prompts(own_prompts(prompts, len(keep)), keep)
    found = {f"ches/{name}": mean_of(values[keep], kept) for name, values in scores.items()}
    for name, values in scores.items() if change_chosen is not None else ():
        for kind, estimate in correlations(values[keep], -np.asarray(change_chosen)[keep], kept).items():
            found[f"ches/{name}_{kind}"] = estimate
    return Measured(estimates=found, n_dropped=int((~keep).sum()))


def displacement(
    policy_chosen: np.ndarray,
    policy_rejected: np.ndarray,
    ref_chosen: np.ndarray,
    ref_rejected: np.ndarray,
    prompts: Sequence[Hashable] | None = None,
    *,
    loss_fell: bool | None = None,
) -> Measured:
    """Change of log-prob and of probability of both responses since the reference.

        displaced (Def. 1): the loss fell, and so did the mean log-prob of the chosen response

    Args:
        policy_chosen: summed log-probs, end token included, nats, shape (pair,).
        policy_rejected: of the rejected responses.
        ref_chosen: the same under the reference.
        ref_rejected: the same under the reference.
        prompts: of each pair.
        loss_fell: whether the training loss fell; where known, ``extra`` says whether likelihood was displaced.

    Raises:
        ValueError: shapes that differ, or no pair with finite log-probs.
    """
    columns = [np.asarray(v, dtype=np.float64) for v in (policy_chosen, policy_rejected, ref_chosen, ref_rejected)]
    if len({values.shape for values in columns}) > 1:
        raise ValueError(f"log-probs of the same pairs are needed, got shapes {[v.shape for v in columns]}")
    keep = np.asarray(np.isfinite(np.stack(columns)).all(axis=0))
    if not keep.any():
        raise ValueError(f"none of {keep.size} pairs has four finite log-probs")
    kept = kept_prompts(own_prompts(prompts, len(keep)), keep)
    chosen, rejected, before_chosen, before_rejected = (values[keep] for values in columns)
    up = mean_of(chosen - before_chosen, kept)
    extra: dict[str, Any] = {} if loss_fell is None else {"displaced": bool(loss_fell and up.value < 0)}
    return Measured(
        estimates={
            "displacement/chosen": up,
            "displacement/rejected": mean_of(rejected - before_rejected, kept),
            "displacement/chosen_probability": mean_of(np.exp(chosen) - np.exp(before_chosen), kept),
            "displacement/rejected_probability": mean_of(np.exp(rejected) - np.exp(before_rejected), kept),
        },
        n_dropped=int((~keep).sum()),
        extra=extra,
    )
