"""Bradley-Terry: strengths of models from games between them.

    P(i beats j) = σ(θ_i − θ_j),    minimise  Σ_{i<j} w_ij·softplus(θ_j − θ_i) + w_ji·softplus(θ_i − θ_j)

with w_ij the games that i won against j, a tie being half a win for both. Strengths are compared only where games
connect models; a model that never loses (or never wins) against the rest has no finite strength, so that half a win
each way is added to every pairing across such a divide.

References:
    Bradley and Terry 1952, doi:10.2307/2334029; Ford 1957, doi:10.2307/2308513 (when strengths exist); Hunter 2004,
    doi:10.1214/aos/1079120141.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse.csgraph import connected_components
from scipy.special import expit

from evals.bootstrap import SEED, drawn_blocks, interval_of, numbers_of
from evals.measured import own_prompts
from evals.ranking import Metric
from objectives.stats import Estimate

METRICS: Mapping[str, Metric] = {
    "bradley_terry/win_rate": Metric(
        "Chance to beat the first baseline, from the games of all models", "share", "higher"
    ),
    "bradley_terry/elo": Metric("Strength from the games of all models; the first baseline has 1000", "Elo", "higher"),
}
"""Every metric of this module."""
ELO = 400 / np.log(10)
"""Elo points per unit of θ."""
DRAWS = 1000
STEPS = 200


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Strengths:
    """Fitted strengths, 0 for the anchor."""

    models: tuple[str, ...]
    theta: np.ndarray
    """In log-odds, shape (model,)."""
    low: np.ndarray
    """95 % limits of ``theta`` by a bootstrap over prompts; NaN with fewer than two prompts, or without draws."""
    high: np.ndarray
    anchor: str
    pseudo_games: int
    """Pairings that half a win each way was added to, because one side never lost."""
    unconnected: int
    """Bootstrap samples in which games did not connect all models; they are left out."""
    n: int
    """Games."""
    clusters: int
    """Prompts."""

    def elo(self, anchor: float = 1000.0) -> np.ndarray:
        """Strengths in Elo points, with the anchor's; 400 points are ten to one."""
        return anchor + ELO * self.theta

    def win_probability(self) -> np.ndarray:
        """P(row beats column), shape (model, model)."""
        return expit(self.theta[:, None] - self.theta[None, :])

    def against_anchor(self) -> dict[str, Estimate]:
        """Win rate of every other model against the anchor, σ(θ), with the interval of θ."""
        return {
            model: Estimate(
                value=float(expit(t)),
                stderr=float("nan"),
                low=float(expit(low)),
                high=float(expit(high)),
                n=self.n,
                clusters=self.clusters,
                interval="bootstrap",
            )
            for model, t, low, high in zip(self.models, self.theta, self.low, self.high, strict=True)
            if model != self.anchor
        }


def bradley_terry(
    first: Sequence[str],
    second: Sequence[str],
    scores: Sequence[float] | np.ndarray,
    *,
    anchor: str,
    prompts: Sequence[Hashable] | None = None,
    draws: int = DRAWS,
    seed: int = SEED,
) -> Strengths:
    """Strengths of all models that play.

    Args:
        first: of each game, the name of one model.
        second: of the other.
        scores: of the first: 1 won, 0 lost, ½ tie, or anything between; shape (game,).
        anchor: the model whose strength is 0.
        prompts: of each game, by which it is resampled; each game its own where left out.
        draws: bootstrap samples; 0 makes no intervals.
        seed: they are drawn with.

    Raises:
        ValueError: no games, a model against itself, a score outside [0, 1], an unknown anchor, or models that no chain
            of games connects.
    """
    won = np.asarray(scores, dtype=np.float64)
    if not len(won) or not len(first) == len(second) == len(won):
        raise ValueError(f"every game has two models and a score, got {len(first)}, {len(second)} and {len(won)}")
    if not ((won >= 0) & (won <= 1)).all():
        raise ValueError(f"scores lie between 0 and 1, got {won[~((won >= 0) & (won <= 1))][0]:g}; drop such games")
    models = tuple(dict.fromkeys([*first, *second]))
    if anchor not in models:
        raise ValueError(f"anchor {anchor!r} plays no game; it is one of {', '.join(models)}")
    index = {model: i for i, model in enumerate(models)}
    i, j = (np.array([index[name] for name in names]) for names in (first, second))
    if (i == j).any():
        raise ValueError(f"{models[int(i[i == j][0])]!r} plays against itself; leave such games out")
    number = numbers_of(own_prompts(prompts, len(won)))
    clusters, m = int(number.max()) + 1, len(models)
    wins = np.zeros((clusters, m, m))
    np.add.at(wins, (number, i, j), won)
    np.add.at(wins, (number, j, i), 1 - won)
    whole = wins.sum(axis=0)
    parts, part_of = connected_components(whole + whole.T > 0, directed=False)
    if parts > 1:
        groups = [[name for name, part in zip(models, part_of, strict=True) if part == k] for k in range(parts)]
        raise ValueError(
            f"no games connect {' / '.join(', '.join(group) for group in groups)}; let them play a common opponent"
        )
    padded, pseudo = _with_pseudo_games(whole)
    theta = _fitted(padded, index[anchor], np.zeros(m))
    samples, unconnected = [], 0
    flat = wins.reshape(clusters, m * m)
    for drawn in drawn_blocks(clusters, draws, seed) if draws and clusters > 1 else ():
        for sample in (drawn @ flat).reshape(-1, m, m):
            if connected_components(sample + sample.T > 0, directed=False)[0] > 1:
                unconnected += 1
            else:
                samples.append(_fitted(_with_pseudo_games(sample)[0], index[anchor], theta))
    low = high = np.full(m, np.nan)
    if len(samples) > draws / 2:
        low, high = interval_of(np.array(samples), theta, "percentile", prompts=clusters)
    return Strengths(
        models=models,
        theta=theta,
        low=low,
        high=high,
        anchor=anchor,
        pseudo_games=pseudo,
        unconnected=unconnected,
        n=len(won),
        clusters=clusters,
    )


def _with_pseudo_games(wins: np.ndarray) -> tuple[np.ndarray, int]:
    """Half a win each way for pairings between groups of which one never lost to the other."""
    _, group = connected_components(wins > 0, directed=True, connection="strong")
    across = (group[:, None] != group[None, :]) & (wins + wins.T > 0)
    return wins + 0.5 * across, int(across.sum()) // 2


def _fitted(wins: np.ndarray, anchor: int, start: np.ndarray) -> np.ndarray:
    """Newton's method with steps of at most 2, which these convex problems need in extreme cases only."""
    free = np.arange(len(wins)) != anchor
    theta, games = start - start[anchor], wins + wins.T
    for _ in range(STEPS):
        p = expit(theta[:, None] - theta[None, :])
        slope = (wins.sum(axis=1) - (games * p).sum(axis=1))[free]
        if np.abs(slope).max(initial=0.0) < 1e-11 * games.sum():
            return theta
        weight = games * p * (1 - p)
        curvature = (np.diag(weight.sum(axis=1)) - weight)[np.ix_(free, free)]
        step = np.linalg.solve(curvature, slope)
        theta = theta.copy()
        theta[free] += step * min(1.0, 2 / np.abs(step).max())
    raise ValueError("Bradley-Terry did not converge; are there games with almost no weight?")
