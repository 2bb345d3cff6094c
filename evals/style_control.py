"""Arena style control: what the win rate would be, were answers as long as the baseline's and as rich in markdown.

A logistic regression of game scores on which model played and on how its answer's style differs from the baseline's:

    P(model beats baseline) = σ(θ_m + Σ_k w_k·x_k)
    x of length  = (ℓ_m − ℓ_b)/(ℓ_m + ℓ_b)                                 ℓ in tokens
    x of headers, lists, bold = (d_m − d_b)/(d_m + d_b + 1),  d = count/(ℓ + 1)

each column standardised over all games, the baseline's θ being 0. σ(θ_m) is the style-controlled win rate: at the mean
difference of style over all models, as Arena-Hard has it, or (``centred=False``) at no difference. All columns that
were asked for are used: the released code slices the wrong ones where only some are.

Of one model alone the mean difference is its own, so that centring gives its win rate back; ``at_equal_style`` does not
centre.

Without a penalty there is no maximum where style or a model decides every game; a model that won (or lost) all of its
games gets half a win each way at style 0, as in ``bradley_terry``.

References:
    Li et al. 2024, arXiv:2406.11939; github.com/lmarena/arena-hard-auto.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, stdtrit

from evals.bootstrap import SEED, drawn_blocks, interval_of, numbers_of
from evals.measured import own_prompts
from evals.ranking import Metric
from objectives.stats import Estimate

METRICS: Mapping[str, Metric] = {
    "arena/style_controlled": Metric("As arena/score, were length and markdown alike", "share", "higher"),
}
"""Every metric of this module."""
FEATURES = ("length", "headers", "lists", "bold")
DRAWS, STEPS = 1000, 100
_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_PATTERNS = {
    "headers": re.compile(r"^#{1,6}\s", re.MULTILINE),
    "lists": re.compile(r"^\s*(?:\d+\.|[-*+])\s", re.MULTILINE),
    "bold": re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__"),
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StyleControlled:
    """Win rates at equal style, and what style is worth."""

    win_rate: Mapping[str, Estimate]
    """σ(θ) of each model, with its interval by a bootstrap over prompts."""
    theta: Mapping[str, float]
    weights: Mapping[str, float]
    """Of each style feature, for one standard deviation of it, in log-odds; 0 for one that never differs."""
    pseudo_games: int
    """Models that got half a win each way, having won or lost all of their games."""
    undefined: int
    """Bootstrap samples without a maximum; they are left out."""


def style_of(text: str, tokens: int) -> dict[str, float]:
    """What is counted of an answer: ``length`` in tokens, markdown ``headers``, ``lists`` and ``bold`` outside code.

    Args:
        text: the answer.
        tokens: of it.
    """
    prose = _CODE.sub("", text)
    return {"length": float(tokens), **{name: float(len(found.findall(prose))) for name, found in _PATTERNS.items()}}


def differences(
    own: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray], features: Sequence[str] = FEATURES
) -> np.ndarray:
    """Style of the model's answers against the baseline's, not standardised; shape (game, feature).

    Args:
        own: ``style_of`` the model's answers by name, each (game,).
        base: of the baseline's.
        features: which, of ``FEATURES``.

    Raises:
        ValueError: an unknown feature, or counts that are negative or not finite.
    """
    columns: list[np.ndarray] = []
    for name in features:
        if name not in FEATURES:
            raise ValueError(f"unknown style feature {name!r}; it is one of {', '.join(FEATURES)}")
        a, b, la, lb = (np.asarray(side[key], dtype=np.float64) for key in (name, "length") for side in (own, base))
        if not all(np.isfinite(each).all() and (each >= 0).all() for each in (a, b, la, lb)):
            raise ValueError(f"{name} of an answer is negative or not finite; count it again")
        if name == "length":
            columns.append((a - b) / np.maximum(a + b, 1.0))
        else:
            da, db = a / (la + 1), b / (lb + 1)
            columns.append((da - db) / (da + db + 1))
    return np.stack(columns, axis=1) if columns else np.empty((len(own["length"]), 0))


def style_controlled(
    models: Sequence[str],
    scores: Sequence[float] | np.ndarray,
    style: np.ndarray,
    prompts: Sequence[Hashable] | None = None,
    *,
    features: Sequence[str] = FEATURES,
    centred: bool = True,
    draws: int = DRAWS,
    seed: int = SEED,
) -> StyleControlled:
    """Style-controlled win rates of models that all played one baseline.

    Args:
        models: of each game, the model that played; a strong verdict counts as several games (``arena.expanded``).
        scores: of the model against the baseline, in [0, 1], ties ½; (game,).
        style: ``differences`` of the answers; (game, feature).
        prompts: of each game, by which it is resampled; each game its own where left out.
        features: names of the columns.
        centred: whether the mean difference is subtracted, as Arena-Hard does.
        draws: bootstrap samples; 0 makes no intervals.
        seed: they are drawn with.

    Raises:
        ValueError: lengths that differ, a score outside [0, 1], or games that style or models decide altogether.
    """
    won = np.asarray(scores, dtype=np.float64)
    if not len(won) or len(models) != len(won) or style.shape != (len(won), len(features)):
        raise ValueError(f"every game has a model, a score and {len(features)} features, got {len(won)} scores")
    if not ((won >= 0) & (won <= 1)).all():
        raise ValueError(f"scores lie between 0 and 1, got {won[~((won >= 0) & (won <= 1))][0]:g}; drop such games")
    names = list(dict.fromkeys(models))
    who = np.array([names.index(model) for model in models])
    number = numbers_of(own_prompts(prompts, len(won)))
    clusters = int(number.max()) + 1
    whole, pseudo = _fitted(who, won, style, np.ones(len(won)), len(names), centred)
    if whole is None:
        raise ValueError("style or models decide every game, so that their worth is not finite; use arena/score")
    samples: list[np.ndarray] = []
    undefined = 0
    for drawn in drawn_blocks(clusters, draws, seed, len(won)) if draws and clusters > 1 else ():
        for times in drawn:
            found, _ = _fitted(who, won, style, times[number], len(names), centred, start=whole)
            if found is None:
                undefined += 1
            else:
                samples.append(found[: len(names)])
    theta = whole[: len(names)]
    low = high = stderr = np.full(len(names), np.nan)
    if len(samples) > draws / 2:
        ends = interval_of(np.array(samples), theta, "percentile", prompts=clusters)
        low, high = expit(ends[0]), expit(ends[1])
        stderr = expit(np.array(samples)).std(axis=0, ddof=1)
    return StyleControlled(
        win_rate={
            name: Estimate(
                value=float(expit(theta[i])),
                stderr=float(stderr[i]),
                low=float(low[i]),
                high=float(high[i]),
                n=int((who == i).sum()),
                clusters=len(np.unique(number[who == i])),
                interval="bootstrap",
            )
            for i, name in enumerate(names)
        },
        theta={name: float(theta[i]) for i, name in enumerate(names)},
        weights={name: float(whole[len(names) + i]) for i, name in enumerate(features)},
        pseudo_games=pseudo,
        undefined=undefined,
    )


def at_equal_style(
    scores: Sequence[float] | np.ndarray,
    style: np.ndarray,
    prompts: Sequence[Hashable] | None = None,
    *,
    features: Sequence[str] = FEATURES,
) -> tuple[Estimate, dict[str, float]]:
    """One model's win rate were its answers and the baseline's alike in style, and what style is worth.

        V = H⁻¹·(Σ_g s_g·s_gᵀ)·H⁻¹ · G/(G − k)
        s_g = Σ over games i of prompt g: (p_i − σ(η_i))·u_i,    H = Σ_i σ(η_i)·(1 − σ(η_i))·u_i·u_iᵀ

    with u the k features, a 1 for the model among them, and G prompts. The interval is σ(θ ± t_{G−k}·√V_θθ): of 50 to
    200 prompts it covers 95 to 96 %, where the percentiles of a bootstrap cover 90 to 93 %.

    Args:
        scores: of the model against the baseline, in [0, 1], ties ½; (game,).
        style: ``differences`` of the answers; (game, feature).
        prompts: of each game, which are the clusters; each game its own where left out.
        features: names of the columns.
    Returns:
        The win rate, and the weight of each feature as ``StyleControlled.weights`` has it.

    Raises:
        ValueError: as ``style_controlled``; no more prompts than coefficients; or a model that won or lost every game.
    """
    whole = style_controlled(["model"] * len(scores), scores, style, prompts, features=features, centred=False, draws=0)
    won = np.asarray(scores, dtype=np.float64)
    if whole.pseudo_games:
        raise ValueError(
            f"the model {'won' if won[0] else 'lost'} every game, which says nothing of style; see win_rate/raw"
        )
    number = numbers_of(own_prompts(prompts, len(won)))
    clusters = int(number.max()) + 1
    weights = np.array([whole.weights[name] for name in features])
    spread = style.std(axis=0, ddof=1) if len(won) > 1 else np.zeros(style.shape[1])
    free = spread > 1e-12
    columns = np.concatenate([np.ones((len(won), 1)), style[:, free] / spread[free]], axis=1)
    if clusters <= columns.shape[1]:
        raise ValueError(f"{clusters} prompts are too few for {columns.shape[1]} coefficients; judge more")
    theta = whole.theta["model"]
    p = expit(columns @ np.concatenate([[theta], weights[free]]))
    curvature = (columns * (p * (1 - p))[:, None]).T @ columns
    sums = np.zeros((clusters, columns.shape[1]))
    np.add.at(sums, number, columns * (won - p)[:, None])
    half_way = np.linalg.solve(curvature, sums.T)
    variance = float((half_way[0] ** 2).sum()) * clusters / (clusters - columns.shape[1])
    half = float(stdtrit(clusters - columns.shape[1], 0.975)) * np.sqrt(variance)
    value = float(expit(theta))
    estimate = Estimate(
        value=value,
        stderr=float(np.sqrt(variance)) * value * (1 - value),
        low=float(expit(theta - half)),
        high=float(expit(theta + half)),
        n=len(won),
        clusters=clusters,
        interval="clustered-t of the log-odds",
    )
    return estimate, dict(whole.weights)


def _fitted(
    who: np.ndarray,
    won: np.ndarray,
    style: np.ndarray,
    times: np.ndarray,
    models: int,
    centred: bool,
    start: np.ndarray | None = None,
) -> tuple[np.ndarray | None, int]:
    """θ of every model and the weights of style; None where there is no maximum. And how many models were helped."""
    total = times.sum()
    mean = (times @ style) / total
    spread = np.sqrt((times @ (style - mean) ** 2) / max(total - 1, 1))
    varies = spread > 1e-12
    scaled = np.where(varies, (style - (mean if centred else 0.0)) / np.where(varies, spread, 1.0), 0.0)
    features = np.concatenate([np.eye(models)[who], scaled], axis=1)
    labels, weights = won, times
    played, points = np.bincount(who, times, models), np.bincount(who, times * won, models)
    helped = np.flatnonzero((points <= 0) | (points >= played))
    if len(helped):
        extra = np.eye(features.shape[1])[helped]
        features = np.concatenate([features, extra])
        labels = np.concatenate([labels, np.full(len(helped), 0.5)])
        weights = np.concatenate([weights, np.ones(len(helped))])
    free = np.concatenate([np.ones(models, dtype=bool), varies])
    w = np.zeros(features.shape[1]) if start is None else np.where(free, start, 0.0)
    for _ in range(STEPS):
        p = expit(features @ w)
        slope = (features.T @ (weights * (labels - p)))[free]
        if np.abs(slope).max() < 1e-10 * max(weights.sum(), 1.0):
            return w, len(helped)
        columns = features[:, free]
        curvature = (columns * (weights * p * (1 - p))[:, None]).T @ columns
        try:
            step = np.linalg.solve(curvature, slope)
        except np.linalg.LinAlgError:
            return None, len(helped)
        w = w.copy()
        w[free] += step * min(1.0, 2 / max(np.abs(step).max(), 1e-300))
        if np.abs(w).max() > 30:  # games that are decided: the maximum is at infinity
            return None, len(helped)
    return None, len(helped)
