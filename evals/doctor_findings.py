"""Findings about pairs that take a model: how hard they are, how alike, and which are labelled against it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.special import expit

from align.errors import RunError
from data.doctor import BINS
from data.findings import EXAMPLES, Finding, graded
from data.preparation import Split
from evals.ranking import critical_loss, share_of
from evals.reward_model import HIGHEST, Pairs, temperature
from objectives.stats import beats

MARGIN = 0.5
"""From how many nats per token on the reference's preference for the rejected response is called noise. Ours: each of
its tokens is then e^0.5 = 1.6 times as probable on average, more than wording usually does."""
SURE = 0.9
"""From which calibrated probability on a reward model is called sure. Ours."""
ALIKE = 0.05
"""Share of the pairs, those with the highest LN-CHES, that is named: the default of ``filter: ches``."""
FOLDS = 5
"""Parts of the prompts; the confidence in a pair is calibrated on the others."""


def of_policy(split: Split, columns: Mapping[str, np.ndarray], beta: float) -> list[Finding]:
    """``difficulty``, ``ches`` and ``label_noise`` against the initial policy.

    Args:
        split: training rows.
        columns: of ``evals.row_scores.columns``.
        beta: of the loss that pairs have to reach.
    """
    return [
        _difficulty(split, columns["difficulty"], beta),
        _ches(split, columns["ln_ches"]),
        _label_noise(split, columns["reference_margin"]),
    ]


def _difficulty(split: Split, c: np.ndarray, beta: float) -> Finding:
    """How often the reference ranks a pair wrongly, ties one half, clustered by prompt, and how far it is off."""
    own, values, missing = _finite(c)
    wrong = share_of(beats(values, np.zeros(len(values))), split.prompts[own].tolist())
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    loss, loss_of_most = critical_loss(np.array([values.max(), high]), beta).tolist()
    known = np.isfinite([wrong.low, wrong.high]).all()
    worse = bool(known and wrong.low > 0.5)
    return Finding(
        check="difficulty",
        verdict="remark" if worse else "fine",
        text=f"the initial policy ranks {wrong.value:.1%} of {len(values)} pairs wrongly; c = log π(rejected) − "
        f"log π(chosen) has the quantiles {low:.1f} (5 %), {middle:.1f} (half) and {high:.1f} (95 %) nats. With β = "
        f"{beta:g} the hardest pair is ranked rightly once its loss is below {loss:.2g}, "
        f"and 95 % of them below {loss_of_most:.2g}{_left(missing)}.",
        key="train longer or with a larger objective.beta, or a likelihood term: [{name: dpo}, {name: sft}]"
        if worse
        else "",
        value=wrong.value,
        low=max(0.0, wrong.low) if known else None,
        high=min(1.0, wrong.high) if known else None,
        n=len(values),
        rows=int((values > 0).sum()),
        examples=_names(split, own[_descending(values)]) if values.max() > 0 else (),
        by_source=_by_source(split, own[values > 0]),
    )


def _ches(split: Split, scores: np.ndarray) -> Finding:
    """The pairs that are most alike; there is no limit from which on they are too much so, only an order."""
    own, values, missing = _finite(scores)
    low, middle, high = np.quantile(values, [0.05, 0.5, 1 - ALIKE])
    order = own[_descending(values)][: max(1, round(ALIKE * len(values)))]
    return Finding(
        check="ches",
        verdict="remark",
        text=f"LN-CHES of {len(values)} pairs has the quantiles {low:.3g} (5 %), {middle:.3g} (half) and {high:.3g} "
        f"(95 %), at most {values.max():.3g}; the {len(order)} highest are listed, and training on such pairs was "
        f"found to take probability from both responses (arXiv:2410.08847){_left(missing)}.",
        key=f"filter: {{name: ches, share: {ALIKE:g}}}, or --write with --drop ches",
        value=float(middle),
        n=len(values),
        rows=len(order),
        examples=_names(split, order),
        by_source=_by_source(split, order),
    )


def _label_noise(split: Split, margin: np.ndarray) -> Finding:
    """Pairs of which the reference finds the rejected response by far the likelier one, per token."""
    own, values, missing = _finite(margin)
    order = own[_descending(values)][: int((values > MARGIN).sum())]
    verdict = graded("label_noise", len(order), len(values))
    return Finding(
        check="label_noise",
        verdict=verdict,
        text=f"of {len(values)} pairs {len(order)} ({len(order) / len(values):.1%}) have a rejected response that the "
        f"initial policy finds likelier by more than {MARGIN:g} nats per token: a wrong label, or a chosen response "
        f"unlike anything it writes{_left(missing)}.",
        key=f"look at the rows; filter: {{name: label_noise, share: 1, margin: {MARGIN:g}}}"
        if verdict != "fine"
        else "",
        value=len(order) / len(values),
        n=len(values),
        rows=len(order),
        examples=_names(split, order),
        by_source=_by_source(split, order),
    )


def of_reward_model(split: Split, columns: Mapping[str, np.ndarray], name: str) -> list[Finding]:
    """How often a reward model disagrees with the labels, how often it should, and where it is sure.

        expected = mean of σ(−|d|/τ),    P(label wrong) = σ(s/τ),    s = −d = score(rejected) − score(chosen)

    with τ fitted for each fifth of the prompts on the other four, so that no pair calibrates the confidence in itself.

    Args:
        split: training rows.
        columns: of ``evals.row_scores.columns``.
        name: of the reward model.
    """
    own, values, missing = _finite(columns["reward_margin"])
    prompts = split.prompts[own]
    against = share_of(beats(values, np.zeros(len(values))), prompts.tolist())
    tau = cross_fitted(-values, prompts)
    confidence = expit(np.abs(values) / tau)
    wrong = expit(values / tau)
    sure = confidence >= SURE
    order = own[_descending(wrong)][: int((wrong >= SURE).sum())]
    expected = float((1 - confidence[sure]).sum())
    verdict = graded("label_noise_reward_model", len(order), len(values))
    useless = bool((tau >= HIGHEST).any())
    known = np.isfinite([against.low, against.high]).all()
    text = (
        f"{name} disagrees with {against.value:.1%} of {len(values)} labels; its own confidence says "
        f"{float((1 - expit(np.abs(values))).mean()):.1%}, calibrated on other pairs (τ {np.median(tau):.2g}) "
        f"{float((1 - confidence).mean()):.1%}. Where it is at least {SURE:.0%} sure ({int(sure.sum())} pairs) it "
        f"disagrees with {len(order)}, and {expected:.1f} were to be expected{_left(missing)}."
    )
    if useless:
        text += " It is no better than chance on them, so it says nothing about noise."
    return [
        Finding(
            check="label_noise_reward_model",
            verdict="remark" if useless else verdict,
            text=text,
            key="another reward model"
            if useless
            else f"look at the rows; filter: {{name: label_noise, reward_model: {name}}}"
            if verdict != "fine"
            else "",
            value=against.value,
            low=max(0.0, against.low) if known else None,
            high=min(1.0, against.high) if known else None,
            n=len(values),
            rows=len(order),
            examples=_names(split, order),
            by_source=_by_source(split, order),
        )
    ]


def cross_fitted(margin: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """The temperature of each pair, fitted on the pairs of other prompts, (pair,); 1 where there are no others.

    Args:
        margin: score of the chosen response minus that of the rejected one, (pair,).
        prompts: number of each pair's prompt; its rank among those that occur, modulo ``FOLDS``, is its fold.
    """
    fold = np.unique(prompts, return_inverse=True)[1] % FOLDS
    found = np.ones(len(margin))
    for number in range(FOLDS):
        others = fold != number
        if (margin[others] != 0).any():
            pairs = Pairs(
                margin=margin[others], prompts=prompts[others].tolist(), strength=np.full(int(others.sum()), np.nan)
            )
            found[~others] = temperature(pairs).estimate.value
    return found


def histograms(columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Counts of every number, as ``doctor.json`` holds them."""
    found = {}
    for name, values in columns.items():
        counts, edges = np.histogram(_finite(values)[1], bins=BINS)
        found[name] = {"edges": [float(f"{each:.6g}") for each in edges], "counts": counts.tolist()}
    return found


def _finite(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Rows with a number, their numbers, and how many have none."""
    own = np.flatnonzero(np.isfinite(scores))
    if not len(own):
        raise RunError(f"the model gave none of {len(scores)} pairs a finite number; look for NaN in its weights")
    return own, scores[own], len(scores) - len(own)


def _left(missing: int) -> str:
    return f"; {missing} pairs have no finite number" if missing else ""


def _descending(values: np.ndarray) -> np.ndarray:
    """Highest first; of equal ones the last in the dataset, as filters remove them."""
    return np.argsort(values, kind="stable")[::-1]


def _names(split: Split, rows: np.ndarray) -> tuple[str, ...]:
    return tuple(split.name(row) for row in rows[:EXAMPLES].tolist())


def _by_source(split: Split, rows: np.ndarray) -> dict[str, int]:
    """Rows by dataset, where there are several."""
    counts = Counter(split.where[row][0] for row in rows.tolist())
    several = len({source for source, _ in split.where}) > 1
    return dict(counts.most_common()) if several else {}
