"""Reward models: do scores tell better responses from worse ones, and can their differences be believed?

    d = score(chosen) − score(rejected),    P = σ(d),    confidence = max(P, 1 − P)

Of pairs: accuracy, margin, and how well P is calibrated. The label of a pair always says "chosen", so calibration is
that of the predicted winner: of pairs with a confidence of 0.8, four in five should be ranked right. Of ratings: errors
and rank correlation. Prompts are the clusters throughout.

Differences of scores are log-odds only in models trained by Bradley-Terry, and those of two such models can be compared
after dividing each by its ``reward_model/temperature``.

References:
    Guo et al. 2017, arXiv:1706.04599 (calibration error and temperature); Brier 1950,
    doi:10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, stdtrit

from evals.bootstrap import DRAWN, bootstrapped, numbers_of
from evals.correlation import rank_correlation
from evals.ranking import Metric, mean_of, share_of
from evals.results import Result
from objectives.stats import Estimate, beats, clustered_stderr

METRICS: Mapping[str, Metric] = {
    "reward_model/accuracy": Metric("Reward model scores the chosen response higher", "share", "higher"),
    "reward_model/ties": Metric("Pairs whose responses it scores alike", "share"),
    "reward_model/margin": Metric("Score of the chosen response minus that of the rejected one", ""),
    "reward_model/nll": Metric("−log σ(margin): 0.693 for a model that knows nothing", "nats", "lower"),
    "reward_model/brier": Metric("(1 − σ(margin))²: 0.25 for a model that knows nothing", "", "lower"),
    "reward_model/ece": Metric("How far accuracy is from confidence, over bins of confidence (ECE)", "share", "lower"),
    "reward_model/temperature": Metric("Divisor of scores that fits these pairs best; above 1: overconfident", ""),
    "reward_model/absolute_error": Metric("Absolute error of predicted ratings", "", "lower"),
    "reward_model/rmse": Metric("Root mean squared error of predicted ratings", "", "lower"),
    "reward_model/spearman": Metric("Rank correlation of predicted with given ratings", "", "higher"),
}
"""Every metric of this module. Where there is no unit, it is that of the scores or ratings, or a pure number."""

WHOLE = ("reward_model/ties", "reward_model/brier", "reward_model/ece", "reward_model/temperature")
"""Measured on all rows together and not on parts of them: few pairs say next to nothing about calibration."""
BINS = 10
"""Bins of confidence, equally wide on [0.5, 1]."""
LOWEST, HIGHEST = 0.05, 50.0
"""Where the temperature is looked for."""
MOST_STRENGTHS = 12
"""With more strengths of preference than this, pairs are not split by them."""


@dataclass(frozen=True, slots=True)
class Found:
    """An estimate, and what else belongs to it."""

    estimate: Estimate
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Pairs that were scored."""

    margin: np.ndarray
    """d: score of the chosen response minus that of the rejected one, shape (pair,)."""
    prompts: Sequence[Hashable]
    strength: np.ndarray
    """Rating of the chosen response minus that of the rejected one, shape (pair,); NaN where there is none."""
    dropped: int = 0
    """Pairs that could not be scored: an empty response, or a score that is not finite."""

    def where(self, members: np.ndarray) -> Pairs:
        """The pairs of a mask."""
        prompts = [prompt for prompt, member in zip(self.prompts, members, strict=True) if member]
        return Pairs(margin=self.margin[members], prompts=prompts, strength=self.strength[members])


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratings:
    """Completions with a rating of one attribute, and the rating that was predicted."""

    predicted: np.ndarray
    given: np.ndarray
    prompts: Sequence[Hashable]
    dropped: int = 0


# ---- from the rows of an evaluation ----


def measure(
    by_row: Mapping[str, np.ndarray],
    prompts: Sequence[Hashable],
    *,
    dataset: str,
    split: str,
    step: int,
    part: bool = False,
) -> list[Result]:
    """Metrics of rows: of their pairs by the head's first output, of their ratings over all attributes together.

    Args:
        by_row: ``value_<leg>/<output>`` (scores), ``length_<leg>`` (tokens) and, where rows have ratings,
            ``score_<name>``, each of shape (row,) and NaN where a row has none.
        prompts: of each row.
        dataset: where the rows come from.
        split: what they are called.
        step: optimizer steps taken.
        part: whether these are some of the rows only: without ``WHOLE``, and nothing where none can be scored.

    Raises:
        ValueError: not one row can be scored.
    """
    found: dict[str, Found] = {}
    every, ratings = pairs_in(by_row, prompts), ratings_in(by_row, prompts)
    if every:
        output, pairs = next(iter(every.items()))
        more = {"output": output} if len(every) > 1 else {}
        found |= _noted(of_pairs(pairs), n_dropped=pairs.dropped, **more)
    if ratings:
        dropped = sum(each.dropped for each in ratings.values())
        found |= _noted(of_ratings(list(ratings.values())), n_dropped=dropped, attributes=list(ratings))
    if not found and not part:
        raise ValueError(
            f"none of {len(prompts)} rows can be scored: each has an empty response, a score that is not finite, or no "
            "rating"
        )
    kept = {metric: each for metric, each in found.items() if not (part and metric in WHOLE)}
    return _results(kept, dataset=dataset, split=split, step=step)


def apart(
    by_row: Mapping[str, np.ndarray], prompts: Sequence[Hashable], *, dataset: str, split: str, step: int
) -> list[Result]:
    """The same rows looked at in parts, each a split of its own.

    Pairs by strength of preference, rounded to whole numbers (``held out, strength 2``); by each further output of the
    head (``held out, correctness``); and ratings by attribute, where there are several.
    """
    where = {"dataset": dataset, "step": step}
    results: list[Result] = []
    every, ratings = pairs_in(by_row, prompts), ratings_in(by_row, prompts)
    for output in list(every)[1:]:
        found = _noted(of_pairs(every[output]), output=output)
        results += _results(found, split=f"{split}, {output}", **where)
    for strength, pairs in _by_strength(next(iter(every.values()), None)):
        found = {metric: each for metric, each in of_pairs(pairs).items() if metric not in WHOLE}
        written = f"{strength}".replace("-", "−")
        results += _results(found, split=f"{split}, strength {written}", **where)
    for attribute, each in ratings.items() if len(ratings) > 1 else ():
        found = _noted(of_ratings([each]), attributes=[attribute], n_dropped=each.dropped)
        results += _results(found, split=f"{split}, {attribute}", **where)
    return results


def pairs_in(by_row: Mapping[str, np.ndarray], prompts: Sequence[Hashable]) -> dict[str, Pairs]:
    """The pairs of an evaluation's rows by output of the head; outputs by which no pair could be scored are absent."""
    found: dict[str, Pairs] = {}
    for output in (name.removeprefix("value_chosen/") for name in by_row if name.startswith("value_chosen/")):
        chosen, rejected = (_scored(by_row, leg, output) for leg in ("chosen", "rejected"))
        if chosen is None or rejected is None:
            continue
        kept = np.isfinite(chosen) & np.isfinite(rejected)
        if kept.any():
            nothing = np.full(len(kept), np.nan)
            high, low = (by_row.get(f"score_{leg}", nothing).astype(np.float64) for leg in ("chosen", "rejected"))
            pairs = Pairs(margin=chosen - rejected, prompts=prompts, strength=high - low).where(kept)
            found[output] = Pairs(
                margin=pairs.margin, prompts=pairs.prompts, strength=pairs.strength, dropped=int((~kept).sum())
            )
    return found


def ratings_in(by_row: Mapping[str, np.ndarray], prompts: Sequence[Hashable]) -> dict[str, Ratings]:
    """The rated completions of an evaluation's rows by attribute; attributes without any are absent."""
    found: dict[str, Ratings] = {}
    for name in (name.removeprefix("value_completion/") for name in by_row if name.startswith("value_completion/")):
        predicted, given = _scored(by_row, "completion", name), by_row.get(f"score_{name}")
        if predicted is None or given is None:
            continue
        rated, kept = np.isfinite(given), np.isfinite(given) & np.isfinite(predicted)
        if kept.any():
            found[name] = Ratings(
                predicted=predicted[kept],
                given=given[kept].astype(np.float64),
                prompts=[prompt for prompt, keep in zip(prompts, kept, strict=True) if keep],
                dropped=int((rated & ~kept).sum()),
            )
    return found


def _scored(by_row: Mapping[str, np.ndarray], leg: str, output: str) -> np.ndarray | None:
    """Scores in float64, NaN for empty responses; None where there are none at all."""
    values, lengths = by_row.get(f"value_{leg}/{output}"), by_row.get(f"length_{leg}")
    if values is None:
        return None
    return np.where(True if lengths is None else lengths > 0, values.astype(np.float64), np.nan)


def _by_strength(pairs: Pairs | None) -> Iterator[tuple[int, Pairs]]:
    if pairs is None:
        return
    rounded = np.round(pairs.strength)
    strengths = np.unique(rounded[np.isfinite(rounded)])
    if 2 <= len(strengths) <= MOST_STRENGTHS:
        for strength in strengths:
            yield int(strength), pairs.where(rounded == strength)


def _noted(found: Mapping[str, Found], **extra: Any) -> dict[str, Found]:
    return {metric: Found(each.estimate, {**extra, **each.extra}) for metric, each in found.items()}


def _results(found: Mapping[str, Found], *, dataset: str, split: str, step: int) -> list[Result]:
    return [
        Result.of(each.estimate, metric=metric, dataset=dataset, split=split, step=step, extra=each.extra)
        for metric, each in found.items()
    ]


# ---- pairs ----


def of_pairs(pairs: Pairs) -> dict[str, Found]:
    """Accuracy, ties, margin, NLL, Brier score, calibration error and (unless all are ties) temperature of pairs.

        accuracy = mean of 1[d > 0]    (a tie counts one half)
        nll      = mean of −log σ(d),    brier = mean of (1 − σ(d))²

    The unit of d is that of scores; nll is in nats.
    """
    d, prompts = pairs.margin, pairs.prompts
    right = beats(d, np.zeros(len(d)))
    found = {
        "reward_model/accuracy": Found(share_of(right, prompts)),
        "reward_model/ties": Found(share_of((d == 0).astype(np.float64), prompts)),
        "reward_model/margin": Found(mean_of(d, prompts)),
        "reward_model/nll": Found(mean_of(np.logaddexp(0.0, -d), prompts)),
        "reward_model/brier": Found(mean_of(expit(-d) ** 2, prompts)),
        "reward_model/ece": calibration_error(pairs),
    }
    if d.any():
        found["reward_model/temperature"] = temperature(pairs)
    return found


def reliability(margin: np.ndarray, bins: int = BINS) -> list[dict[str, float]]:
    """Pairs by the confidence of the predicted winner, in equally wide bins on [0.5, 1] that hold their upper end.

    The first bin holds 0.5 too. Empty bins are left out.

    Args:
        margin: d of each pair.
        bins: how many.
    Returns:
        For each bin its ends ``low`` and ``high``, the number ``n`` of pairs, and their mean ``confidence`` and
        ``accuracy``.
    """
    confidence, right = expit(np.abs(margin)), beats(margin, np.zeros(len(margin)))
    edges, of_pair = _binned(confidence, bins)
    return [
        {
            "low": round(float(edges[i]), 12),
            "high": round(float(edges[i + 1]), 12),
            "n": int((of_pair == i).sum()),
            "confidence": float(confidence[of_pair == i].mean()),
            "accuracy": float(right[of_pair == i].mean()),
        }
        for i in np.unique(of_pair)
    ]


def calibration_error(pairs: Pairs, bins: int = BINS) -> Found:
    """Expected calibration error: how far accuracy is from confidence, a share.

        ECE = Σ_b n_b/n · |mean correct in b − mean confidence in b|

    over the bins of ``reliability``, which ``extra`` keeps. It is biased upwards where bins hold few pairs, and so are
    its bootstrap samples: with few pairs a perfectly calibrated model has an error too. There is no interval where all
    pairs are right, or all wrong: no sample of them shows what was not seen.
    """
    d = pairs.margin
    confidence, right = expit(np.abs(d)), beats(d, np.zeros(len(d)))
    _, of_pair = _binned(confidence, bins)
    number = numbers_of(pairs.prompts)
    prompts = int(number.max()) + 1
    # A bin's part of the error is |Σ (correct − confidence)| / n, so sums by prompt are all that a sample needs.
    gaps = np.bincount(number * bins + of_pair, weights=right - confidence, minlength=prompts * bins)
    gaps, sizes = gaps.reshape(prompts, bins), np.bincount(number, minlength=prompts)

    def error(drawn: np.ndarray) -> np.ndarray:
        return np.abs(drawn @ gaps).sum(axis=1) / (drawn @ sizes)

    estimate = bootstrapped(error, n=len(d), prompts=prompts, bounds=(0.0, 1.0))
    if np.ptp(right) == 0:
        estimate = replace(estimate, stderr=math.nan, low=math.nan, high=math.nan)
    return Found(estimate, {"bins": reliability(d, bins), **DRAWN})


def temperature(pairs: Pairs) -> Found:
    """The divisor of scores under which the pairs are likeliest; above 1, the model is overconfident.

        τ* = argmin over τ of mean −log σ(d/τ),    τ in [0.05, 50]

    Where the best is at an end (every pair ranked right: 0.05; more wrong than right: 50) the end is the value,
    ``extra`` says which, and there is no interval. Else the interval is that of log τ*, by the sandwich formula with
    prompts as clusters: s = 1/τ is the coefficient of a logistic regression, and each pair moves it by
    d·σ(−s·d) / Σ d²·σ(s·d)·σ(−s·d).
    """
    d, prompts = pairs.margin, pairs.prompts

    def slope(log_s: float) -> float:
        return float(-(d * expit(-math.exp(log_s) * d)).sum())  # of the summed loss in s: it rises with s

    ends = -math.log(HIGHEST), -math.log(LOWEST)
    at_end = "highest" if slope(ends[0]) >= 0 else "lowest" if slope(ends[1]) <= 0 else None
    if at_end is not None:
        value, stderr, half = (HIGHEST if at_end == "highest" else LOWEST), math.nan, math.nan
    else:
        log_s: Any = brentq(slope, *ends, xtol=1e-13)
        value, s = math.exp(-log_s), math.exp(log_s)
        moves = len(d) * d * expit(-s * d) / float((d**2 * expit(s * d) * expit(-s * d)).sum())
        stderr = clustered_stderr(moves.tolist(), prompts) / s  # of log τ = −log s
        clusters = len(set(prompts))
        half = float(stdtrit(clusters - 1, 0.975)) * stderr if clusters > 1 else math.nan
    estimate = Estimate(
        value=value,
        stderr=value * stderr,
        low=value * math.exp(-half),
        high=_finite(value * math.exp(half) if half < 700 else math.inf),
        n=len(d),
        clusters=len(set(prompts)),
        interval="clustered-t of the logarithm",
    )
    nll = float(np.logaddexp(0.0, -d / value).mean())
    return Found(estimate, {"nll": nll} | ({} if at_end is None else {"boundary": at_end}))


def _binned(confidence: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    edges = np.linspace(0.5, 1.0, bins + 1)
    return edges, np.digitize(confidence, edges[1:-1], right=True)


# ---- ratings ----


def of_ratings(parts: Sequence[Ratings]) -> dict[str, Found]:
    """Errors and rank correlation of at least one rating.

        absolute_error = mean of |predicted − given|,    rmse = √(mean of (predicted − given)²)

    over the ratings of all parts together, in units of the ratings; spearman is the correlation of the ranks (equal
    ones share their mean rank), averaged over parts. It is absent where in no part both vary.

    Args:
        parts: one for each attribute.
    """
    errors = np.concatenate([part.predicted - part.given for part in parts])
    prompts = [prompt for part in parts for prompt in part.prompts]
    number = numbers_of(prompts)
    squares, sizes = np.bincount(number, weights=errors**2), np.bincount(number)

    def root(drawn: np.ndarray) -> np.ndarray:
        return np.sqrt(drawn @ squares / (drawn @ sizes))

    among: dict[str, Any] = {"n": len(errors), "prompts": len(sizes)}
    found = {
        "reward_model/absolute_error": Found(mean_of(np.abs(errors), prompts)),
        "reward_model/rmse": Found(bootstrapped(root, **among, bounds=(0.0, math.inf)), DRAWN),
    }
    ends = np.cumsum([len(part.given) for part in parts])
    varying = [
        (part, rows)
        for part, rows in zip(parts, np.split(number, ends[:-1]), strict=True)
        if np.ptp(part.predicted) > 0 and np.ptp(part.given) > 0
    ]
    if varying:

        def correlation(drawn: np.ndarray) -> np.ndarray:
            each = [rank_correlation(part.predicted, part.given, drawn[:, rows]) for part, rows in varying]
            return np.mean(each, axis=0)

        found["reward_model/spearman"] = Found(bootstrapped(correlation, **among, bounds=(-1.0, 1.0)), DRAWN)
    return found


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan
