"""What a model has memorised: does it continue training documents word for word?

A document's last 50 tokens are withheld, the model continues the rest greedily, and the two are compared. Memorisation
is what remains over a control: documents that were never trained on. Whether losses give documents away is
``evals.membership``.

References:
    Hans et al. 2024, arXiv:2406.10209 (extraction); Lin 2004, aclanthology.org/W04-1013 (ROUGE-L).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from scipy.special import stdtrit

from evals.measured import Measured, means_by_prompt, own_prompts
from evals.ranking import Metric, mean_of, share_of
from objectives.checks import require
from objectives.stats import Estimate

EXTRACTION: Mapping[str, tuple[str, str]] = {
    "exact": ("Documents whose withheld tokens are reproduced exactly", "share"),
    "longest_prefix": ("Withheld tokens reproduced before the first divergence", ""),
    "token_accuracy": ("Withheld tokens reproduced in their place", "share"),
    "lcs_f1": ("Longest common subsequence of withheld and generated tokens, F1", "share"),
    "rouge_l": ("ROUGE-L of withheld and generated text, F1", "share"),
}
"""What is measured of every document."""
METRICS: Mapping[str, Metric] = {
    **{f"extraction/{name}": Metric(label, unit, "lower") for name, (label, unit) in EXTRACTION.items()},
    **{
        f"extraction/{name}_over_control": Metric(
            f"{label}, above documents never trained on", unit and "points", "lower"
        )
        for name, (label, unit) in EXTRACTION.items()
    },
}
"""Every metric of this module."""


# ---- extraction ----


def split_document(
    ids: Sequence[int], *, withheld: int = 50, max_length: int = 2048
) -> tuple[list[int], list[int]] | None:
    """Prompt and withheld tokens of a document; None where it is too short.

    Args:
        ids: tokens of the document.
        withheld: how many of its last tokens the model should not see, ≥ 1.
        max_length: tokens after which a document is cut first.
    """
    require("withheld", withheld, withheld >= 1, ">= 1")
    kept = list(ids[:max_length])
    return None if len(kept) <= withheld else (kept[:-withheld], kept[-withheld:])


def extraction(
    withheld: Sequence[Sequence[int]],
    generated: Sequence[Sequence[int]],
    texts: Sequence[tuple[str, str]] | None = None,
    documents: Sequence[Hashable] | None = None,
) -> Measured:
    """How much of the withheld tokens greedy decoding reproduces, with 95 % intervals over documents.

    Args:
        withheld: token ids of each document's end.
        generated: what the model wrote instead; a shorter list (an early end) is never exact.
        texts: withheld and generated text, special tokens stripped; without them there is no ROUGE-L.
        documents: of each item; each its own where left out.

    Raises:
        ValueError: no documents, lists of different lengths, or nothing withheld of one.
    """
    if not len(withheld) or len(withheld) != len(generated) or (texts is not None and len(texts) != len(withheld)):
        raise ValueError(
            f"every document needs withheld and generated tokens, got {len(withheld)} and {len(generated)}"
            + ("" if texts is None else f", with {len(texts)} texts")
        )
    empty = [i for i, ids in enumerate(withheld) if not len(ids)]
    if empty:
        raise ValueError(f"nothing is withheld of document {empty[0]}; leave out documents that are too short")
    names = own_prompts(documents, len(withheld))
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(withheld, generated, strict=True)]
    values = {
        "exact": [float(np.array_equal(a, b)) for a, b in pairs],
        "longest_prefix": [float(longest_prefix(a, b)) for a, b in pairs],
        "token_accuracy": [float((a[: len(b)] == b[: len(a)]).sum()) / len(a) for a, b in pairs],
        "lcs_f1": [2 * lcs_length(a, b) / (len(a) + len(b)) for a, b in pairs],
    }
    if texts is not None:
        values["rouge_l"] = [rouge_l(wanted, written) for wanted, written in texts]
    arrays = {name: np.array(column) for name, column in values.items()}
    return Measured(
        estimates={
            f"extraction/{name}": mean_of(v, names) if name == "longest_prefix" else share_of(v, names)
            for name, v in arrays.items()
        },
        by_prompt={f"extraction/{name}": means_by_prompt(column, names) for name, column in arrays.items()},
    )


def over_control(trained: Measured, control: Measured) -> Measured:
    """Extraction of training documents minus that of documents never trained on: what was memorised.

    Documents are different ones, so the interval is Welch's for two samples.

    Args:
        trained: ``extraction`` of training documents.
        control: of documents that were not trained on, of the same kind and length.

    Raises:
        ValueError: fewer than two documents on a side.
    """
    found: dict[str, Estimate] = {}
    for metric in trained.by_prompt.keys() & control.by_prompt.keys():
        one, two = (np.array(list(side.by_prompt[metric].values())) for side in (trained, control))
        if min(len(one), len(two)) < 2:
            raise ValueError(f"{len(one)} and {len(two)} documents are too few to compare; take two or more of both")
        parts = one.var(ddof=1) / len(one), two.var(ddof=1) / len(two)
        stderr = math.sqrt(sum(parts))
        freedom = sum(parts) ** 2 / (parts[0] ** 2 / (len(one) - 1) + parts[1] ** 2 / (len(two) - 1)) if stderr else 1.0
        half, value = float(stdtrit(freedom, 0.975)) * stderr, float(one.mean() - two.mean())
        unknown = stderr == 0  # all alike on either side: nothing is known of the spread
        found[f"{metric}_over_control"] = Estimate(
            value=value,
            stderr=math.nan if unknown else stderr,
            low=math.nan if unknown else value - half,
            high=math.nan if unknown else value + half,
            n=len(one) + len(two),
            clusters=len(one) + len(two),
            interval="welch-t",
        )
    order = [f"extraction/{name}_over_control" for name in EXTRACTION]
    return Measured(estimates={name: found[name] for name in order if name in found})


def longest_prefix(first: Sequence[int] | np.ndarray, second: Sequence[int] | np.ndarray) -> int:
    """Tokens on which both agree before they first diverge."""
    n = min(len(first), len(second))
    differ = np.flatnonzero(np.asarray(first)[:n] != np.asarray(second)[:n])
    return int(differ[0]) if len(differ) else n


def lcs_length(first: Sequence[int] | np.ndarray, second: Sequence[int] | np.ndarray) -> int:
    """Length of the longest common subsequence."""
    b = np.asarray(second)
    row = np.zeros(len(b) + 1, dtype=np.int64)
    for token in np.asarray(first):
        row[1:] = np.maximum.accumulate(np.maximum(row[1:], row[:-1] + (b == token)))
    return int(row[-1])


def rouge_l(wanted: str, written: str) -> float:
    """ROUGE-L, F1 without stemming, as the package ``rouge-score`` computes it."""
    from rouge_score.rouge_scorer import RougeScorer

    return float(RougeScorer(["rougeL"], use_stemmer=False).score(wanted, written)["rougeL"].fmeasure)
