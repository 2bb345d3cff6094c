"""Difficulty ψ of one's own instructions for length-controlled win rates: a joint fit over many judged models.

    logit P(model m beats the baseline on instruction i) = a_m·t_mi + b_m + ψ_i,      t = tanh(Δ/sd(Δ)) of model m

over all models and instructions (``length_control`` says what Δ is), dummy-coded: ψ of the first instruction is 0. With
the verdicts of a handful of models an instruction that all of them win has no finite ψ, so that ψ is drawn to its mean:

    minimise  Σ [softplus(η) − p·η] + ridge/2·Σ_i (ψ_i − ψ̄)²

``ridge=0`` is the plain joint regression of AlpacaEval. It is for ten or more models, and then frozen: a ψ that changes
with every new model makes win rates of different days incomparable.

References:
    Dubois et al. 2024, arXiv:2404.04475.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from evals.bootstrap import bootstrapped
from objectives.checks import require
from objectives.stats import Estimate

ENOUGH = 10
"""Models from which on ψ says something of instructions rather than of models."""
RIDGE = 0.1
STEPS = 200
FARTHEST = 20.0
"""Coefficients beyond this are on their way to infinity."""
DRAWS = 200


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Difficulties:
    """A joint fit."""

    psi: Mapping[str, float]
    """By instruction; what ``length_control.difficulties`` looks up."""
    length: Mapping[str, float]
    """a of each model; negative: longer answers win."""
    quality: Mapping[str, float]
    """b of each model, where ψ is 0."""
    win_rate: Mapping[str, Estimate]
    """mean over instructions of σ(b_m + ψ_i), with a bootstrap over instructions that makes the whole fit anew."""
    slope: float
    """Largest derivative that is left, per row: how far the fit is from its optimum."""
    warning: str | None


def fit_difficulties(
    models: Sequence[str],
    instructions: Sequence[str],
    preference: Sequence[float] | np.ndarray,
    length_model: Sequence[int] | np.ndarray,
    length_base: Sequence[int] | np.ndarray,
    *,
    ridge: float = RIDGE,
    draws: int = DRAWS,
) -> Difficulties:
    """ψ of every instruction from the verdicts on several models.

    Args:
        models: of each verdict, shape (row,).
        instructions: the same, by text.
        preference: of each, in [1, 2] as in ``win_rate``, 2 for the model.
        length_model: characters of the model's answer.
        length_base: of the baseline's.
        ridge: weight of the penalty on ψ, ≥ 0.
        draws: bootstrap samples for win rates; 0 makes no intervals.

    Raises:
        ValueError: lengths that differ, a verdict that can't be used, a model whose answers all differ in length by
            the same, fewer than two models, or no maximum (with ridge 0, where an instruction is always won).
    """
    require("ridge", ridge, ridge >= 0, ">= 0")
    coded = np.asarray(preference, dtype=np.float64)
    apart = np.asarray(length_base, dtype=np.float64) - np.asarray(length_model, dtype=np.float64)
    if not (len(models) == len(instructions) == len(coded) == len(apart)):
        raise ValueError(f"every verdict has a model, an instruction and two lengths, got {len(coded)} verdicts")
    if not ((coded >= 1) & (coded <= 2)).all() or not np.isfinite(apart).all():
        raise ValueError("verdicts lie in [1, 2] and lengths are finite numbers; leave the others out")
    names, asked = list(dict.fromkeys(models)), list(dict.fromkeys(instructions))
    if len(names) < 2:
        raise ValueError(f"{len(names)} model says nothing of instructions; judge more (ten or so)")
    places = {name: i for i, name in enumerate(names)}, {text: i for i, text in enumerate(asked)}
    who = np.array([places[0][name] for name in models])
    which = np.array([places[1][text] for text in instructions])
    for i, name in enumerate(names):
        if np.ptp(apart[who == i]) == 0:
            raise ValueError(f"all answers of {name} differ from the baseline's by the same length; leave it out")
    problem = _Joint(who=who, which=which, p=coded - 1, apart=apart, models=len(names), ridge=ridge)
    fit, slope = problem.fit(np.ones(len(asked)))
    m = len(names)

    def rates(drawn: np.ndarray) -> np.ndarray:
        found = np.full((len(drawn), m), np.nan)
        for i, times in enumerate(drawn):
            try:
                w, _ = (fit, slope) if (times == 1).all() else problem.fit(times, fit)
            except ValueError:
                continue
            found[i] = times @ expit(w[None, m : 2 * m] + w[2 * m :, None]) / times.sum()
        return found

    cache: dict[bytes, np.ndarray] = {}

    def of_model(j: int, drawn: np.ndarray) -> np.ndarray:
        key = drawn.tobytes()
        if key not in cache:
            cache[key] = rates(drawn)
        return cache[key][:, j]

    win_rate = {
        name: bootstrapped(
            lambda drawn, j=j: of_model(j, drawn),
            n=int((who == j).sum()),
            prompts=len(asked),
            bounds=(0.0, 1.0),
            draws=max(draws, 1),
        )
        for j, name in enumerate(names)
    }
    few = f"ψ comes from {m} models, and fewer than {ENOUGH} say more of the models than of instructions"
    return Difficulties(
        psi=dict(zip(asked, (fit[2 * m :] - fit[2 * m]).tolist(), strict=True)),
        length=dict(zip(names, fit[:m].tolist(), strict=True)),
        quality=dict(zip(names, (fit[m : 2 * m] + fit[2 * m]).tolist(), strict=True)),
        win_rate=win_rate,
        slope=slope,
        warning=few if m < ENOUGH else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Joint:
    """Rows of the regression: coefficients are a (model,), b (model,) and ψ (instruction,), one after the other."""

    who: np.ndarray
    which: np.ndarray
    p: np.ndarray
    apart: np.ndarray
    models: int
    ridge: float

    def fit(self, times: np.ndarray, start: np.ndarray | None = None) -> tuple[np.ndarray, float]:
        """Newton's method; ψ is eliminated, its block of the curvature being diagonal.

        Args:
            times: how often each instruction counts, with its penalty; (instruction,).
            start: coefficients to start from.
        """
        m, n = self.models, len(times)
        weights = times[self.which]
        t = self._t(weights)
        w = np.zeros(2 * m + n) if start is None else start.copy()
        rows = np.arange(len(self.p))
        x = np.zeros((len(self.p), 2 * m))
        x[rows, self.who], x[rows, m + self.who] = t, 1.0
        # Without a penalty the first instruction that counts holds ψ in place; with it, ψ has mean 0 at the optimum.
        held = int(np.flatnonzero(times)[0]) if self.ridge == 0 else -1
        for _ in range(STEPS):
            eta = x @ w[: 2 * m] + w[2 * m + self.which]
            p = expit(eta)
            left, curved = weights * (self.p - p), weights * p * (1 - p)
            psi = w[2 * m :]
            g_psi = np.bincount(self.which, left, n) - self.ridge * times * psi
            g = x.T @ left
            free = times > 0
            if held >= 0:
                free[held] = False
            slope = float(max(np.abs(g).max(), np.abs(g_psi[free]).max(initial=0.0))) / len(self.p)
            if slope < 1e-12:
                return w, slope
            d = np.where(free, np.bincount(self.which, curved, n) + self.ridge * times, 1.0)
            across = np.zeros((n, 2 * m))
            np.add.at(across, self.which, x * curved[:, None])
            across[~free] = 0.0
            g_psi = np.where(free, g_psi, 0.0)
            whole = (x * curved[:, None]).T @ x - across.T @ (across / d[:, None])
            try:
                first = np.linalg.solve(whole, g - across.T @ (g_psi / d))
            except np.linalg.LinAlgError:
                break
            second = (g_psi - across @ first) / d
            step = np.concatenate([first, second])
            w = w + step * min(1.0, 2 / np.abs(step).max())
            if not np.isfinite(w).all() or np.abs(w).max() > FARTHEST:
                break
        raise ValueError("the joint fit has no maximum: an instruction or a model is always won; give ridge a value")

    def _t(self, weights: np.ndarray) -> np.ndarray:
        """tanh(Δ/sd(Δ)), sd of each model's rows as often as they count."""
        t = np.zeros(len(self.p))
        for model in range(self.models):
            mine = self.who == model
            own, times = self.apart[mine], weights[mine]
            mean = (times @ own) / times.sum()
            spread = np.sqrt((times @ (own - mean) ** 2) / max(times.sum() - 1, 1e-12))
            t[mine] = np.tanh(own / spread) if spread > 0 else np.sign(own)
        return t
