"""Do a model's losses give away what it was trained on? What an attacker would look at, and how well that would work.

A control are scores that have not seen the trained model at all: where those tell members from others, the two sets of
documents differ by themselves, and the others prove nothing.

References:
    Carlini et al. 2021, arXiv:2012.07805 (zlib); Carlini et al. 2022, arXiv:2112.03570 (true positives at a low rate of
    false ones); Shi et al. 2024, arXiv:2310.16789 (the least probable tokens); Hans et al. 2024, arXiv:2406.10209.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from evals.bootstrap import bootstrapped
from evals.labelled import auc
from evals.measured import Measured
from evals.ranking import Metric
from objectives.checks import require
from objectives.stats import Estimate

RATES: Mapping[str, float] = {"tpr_at_1": 0.01, "tpr_at_01": 0.001}
"""Rates of false positives at which true ones are reported."""
ATTACKS: Mapping[str, str] = {
    "loss": "mean loss",
    "zlib": "loss per zlib byte",
    "mean_zlib": "mean loss per zlib byte",
    "reference": "loss against a reference model's",
    "min_k": "log-prob of the least probable fifth of the tokens",
}
CONTROLS: Mapping[str, str] = {
    "reference_alone": "a reference model's loss alone",
    "zlib_alone": "zlib bytes alone",
}
MIN_K = 0.2
"""Share of a document's tokens that ``least_probable`` averages: the best one of its paper."""
METRICS: Mapping[str, Metric] = {
    **{
        f"membership/auc_{k}": Metric(f"Members told from others by {v} (AUC)", "share", "lower")
        for k, v in ATTACKS.items()
    },
    **{
        f"membership/auc_{k}": Metric(f"Control: members told from others by {v}", "share") for k, v in CONTROLS.items()
    },
    **{
        f"membership/{kind}_{name}": Metric(f"{label} by {what}", "share")
        for kind, label in (
            ("balanced_accuracy", "Best balanced accuracy"),
            ("tpr_at_1", "Members found at 1 % false positives"),
            ("tpr_at_01", "Members found at 0.1 % false positives"),
        )
        for name, what in {**ATTACKS, **CONTROLS}.items()
    },
}
"""Every metric of this module."""


def zlib_bytes(text: str) -> int:
    """Bytes of a text compressed at zlib's default level: how predictable it is without any model."""
    return len(zlib.compress(text.encode()))


def attack_scores(
    mean_nll: np.ndarray,
    tokens: np.ndarray,
    compressed: np.ndarray,
    reference_nll: np.ndarray | None = None,
    min_k: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """What may tell members from others, of every document; higher means "member".

        loss = −mean NLL,  zlib = −Σ NLL/bytes,  mean_zlib = −mean NLL/bytes,  reference = mean NLL_ref − mean NLL

    and the controls ``zlib_alone`` = −bytes and ``reference_alone`` = −mean NLL_ref, which know nothing of the model.

    Args:
        mean_nll: of each document's tokens under the trained model, nats, shape (document,).
        tokens: in each document.
        compressed: ``zlib_bytes`` of each.
        reference_nll: mean NLL under a model that has not seen the documents.
        min_k: ``least_probable`` of each; that attack is left out without it.
    """
    nll, bytes_ = np.asarray(mean_nll, dtype=np.float64), np.asarray(compressed, dtype=np.float64)
    found = {
        "loss": -nll,
        "zlib": -nll * np.asarray(tokens) / bytes_,
        "mean_zlib": -nll / bytes_,
        "zlib_alone": -bytes_,
    }
    if reference_nll is not None:
        before = np.asarray(reference_nll, dtype=np.float64)
        found |= {"reference": before - nll, "reference_alone": -before}
    if min_k is not None:
        found["min_k"] = np.asarray(min_k, dtype=np.float64)
    return found


def least_probable(logps: Tensor, mask: Tensor, share: float = MIN_K) -> Tensor:
    """Mean log-prob of the least probable tokens of each document ("Min-K % Prob"); higher means "member".

    Args:
        logps: of each document's tokens, nats, shape (document, token).
        mask: true where there is a token; each document has one.
        share: of its tokens that are averaged, rounded up to whole tokens, in (0, 1].
    """
    require("share", share, 0 < share <= 1, "in (0, 1]")
    count = (mask.sum(dim=1).double() * share - 1e-9).ceil().clamp(min=1).long()
    ordered = torch.where(mask, logps.double(), torch.inf).sort(dim=1).values
    taken = torch.arange(ordered.shape[1], device=ordered.device)[None, :] < count[:, None]
    return torch.where(taken, ordered, 0.0).sum(dim=1) / count


def membership(members: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray]) -> Measured:
    """How well each score tells members from others: AUC, best balanced accuracy, true positives at few false ones.

    With K others the smallest rate of false positives that can be seen is 1/K (``extra``); at lower ones no false
    positive at all is allowed.

    Args:
        members: ``attack_scores`` of documents that were trained on.
        others: of documents of the same kind that were not.

    Raises:
        ValueError: different scores on either side, no document on one, or a score that is not finite.
    """
    if members.keys() != others.keys() or not members:
        raise ValueError(
            f"members have the scores {sorted(members)}, and the others {sorted(others)}; give both the same"
        )
    found: dict[str, Estimate] = {}
    outside = 0
    for name in members:
        one, two = np.asarray(members[name], dtype=np.float64), np.asarray(others[name], dtype=np.float64)
        if not len(one) or not len(two):
            raise ValueError(f"{len(one)} members and {len(two)} others: membership needs documents of both kinds")
        scores = np.concatenate([one, two])
        if not np.isfinite(scores).all():
            raise ValueError(f"a {name} score is not finite; leave that document out")
        is_member, outside = np.arange(len(scores)) < len(one), len(two)
        found[f"membership/auc_{name}"] = auc(scores, is_member, range(len(scores)))
        for kind in ("balanced_accuracy", *RATES):
            found[f"membership/{kind}_{name}"] = _of_roc(scores, is_member, kind)
    return Measured(estimates=found, extra={"smallest_fpr": 1 / outside})


def _of_roc(scores: np.ndarray, is_member: np.ndarray, kind: str) -> Estimate:
    order = np.argsort(-scores, kind="stable")
    ordered, member = scores[order], is_member[order]
    ends = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)  # thresholds lie between different scores

    def statistic(drawn: np.ndarray) -> np.ndarray:
        times = drawn[:, order]
        with np.errstate(invalid="ignore", divide="ignore"):  # samples of one kind of document only
            true, false = (
                np.cumsum(times * mine, axis=1)[:, ends] / (times @ mine.astype(np.float64))[:, None]
                for mine in (member, ~member)
            )
        if kind == "balanced_accuracy":
            return np.maximum(0.5, (0.5 * (1 + true - false)).max(axis=1))
        return np.where(np.isnan(false[:, 0]), np.nan, np.where(false <= RATES[kind], true, 0.0).max(axis=1))

    return bootstrapped(statistic, n=len(scores), prompts=len(scores), bounds=(0.0, 1.0))


def true_positives_at(members: np.ndarray, others: np.ndarray, rate: float) -> float:
    """Largest share of members found while at most this share of the others is taken for members.

    Args:
        members: scores, higher means member.
        others: scores of documents that were not trained on.
        rate: of false positives, in [0, 1].
    """
    require("rate", rate, 0 <= rate <= 1, "in [0, 1]")
    thresholds = np.unique(np.concatenate([members, others]))
    found = [float((members >= t).mean()) for t in thresholds if (others >= t).mean() <= rate]
    return max(found, default=0.0)
