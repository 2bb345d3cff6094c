"""Logistic regression with an L1 penalty and few coefficients, to the last digit and without a random number.

    minimise  ‖w‖₁ + Σ_rows s·[softplus(u·w) − p·(u·w)]

Newton's method among coefficients of fixed sign; where one is 0 or changes sign, cyclic coordinate descent. That it is
the minimum is verified: with g = Σ s(σ(u·w) − p)·u, g_j = −sign(w_j) where w_j ≠ 0 and |g_j| ≤ 1 where w_j = 0.

References:
    Friedman, Hastie and Tibshirani 2010, doi:10.18637/jss.v033.i01 (coordinate descent).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import expit

SWEEPS = 400
"""Most sweeps over the coefficients; more would not see decreases below the resolution of float64."""
STEPS = 60
"""Most Newton steps; a handful is what it takes."""
EXACT, ENOUGH = 1e-10, 1e-4
"""Residuals at which Newton stops, and above which a fit is refused."""


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """Coefficients, and how far they are from the minimum: the largest violation of its conditions."""

    weights: np.ndarray
    residual: float


def fit_logistic(
    features: np.ndarray, labels: np.ndarray, weights: np.ndarray, *, start: np.ndarray | None = None
) -> Fit:
    """The coefficients that minimise the penalised loss above.

    Args:
        features: u of each row, shape (row, coefficient).
        labels: p of each row, in [0, 1], soft ones included.
        weights: s of each row, ≥ 0; C is part of them.
        start: coefficients to start from, of a similar fit.

    Raises:
        ValueError: the minimum was not reached.
    """
    problem = _Problem(features, labels, weights)
    w = problem.descend(np.zeros(features.shape[1]), sweeps=5) if start is None else start.astype(np.float64)
    found = problem.newton(w)
    if found is None:
        # Rounds of both: descent finds which coefficients are 0, Newton the others to the last digit.
        for _ in range(SWEEPS // 20):
            w = problem.descend(w, sweeps=20)
            found = problem.newton(w)
            if found is not None:
                break
    w = w if found is None else found
    residual = problem.residual(w)
    if not residual <= ENOUGH:
        raise ValueError(
            f"the logistic regression did not converge (residual {residual:.1e}); look at verdicts and features"
        )
    return Fit(w, residual)


@dataclass(frozen=True, slots=True, eq=False)
class _Problem:
    features: np.ndarray
    labels: np.ndarray
    weights: np.ndarray

    def slope(self, w: np.ndarray) -> np.ndarray:
        return self.features.T @ (self.weights * (expit(self.features @ w) - self.labels))

    def objective(self, w: np.ndarray) -> float:
        eta = self.features @ w
        return float(np.abs(w).sum() + self.weights @ (np.logaddexp(0, eta) - self.labels * eta))

    def residual(self, w: np.ndarray) -> float:
        g = self.slope(w)
        return float(np.where(w != 0, np.abs(g + np.sign(w)), np.maximum(np.abs(g) - 1, 0)).max())

    def newton(self, w: np.ndarray) -> np.ndarray | None:
        """The minimum with these signs and zeros; None where it is not the minimum of all, or not reached."""
        signs, active = np.sign(w), w != 0
        w = w.copy()
        columns = self.features[:, active]
        for _ in range(STEPS):
            if not active.any():
                break
            p = expit(columns @ w[active])
            slope = columns.T @ (self.weights * (p - self.labels)) + signs[active]
            if np.abs(slope).max() < EXACT:
                break
            curvature = (columns * (self.weights * p * (1 - p))[:, None]).T @ columns
            try:
                step = np.linalg.solve(curvature, slope)
            except np.linalg.LinAlgError:
                return None
            w[active] -= step
            if not np.isfinite(w).all() or np.abs(w).max() > 1e4:
                return None
        if (np.sign(w) != signs).any() or self.residual(w) > 1e-8:
            return None
        return w

    def descend(self, w: np.ndarray, *, sweeps: int) -> np.ndarray:
        """Cyclic coordinate descent with steps halved until the objective does not rise."""
        w, best = w.copy(), self.objective(w)
        for _ in range(sweeps):
            for j, column in enumerate(self.features.T):
                p = expit(self.features @ w)
                g = float(column @ (self.weights * (p - self.labels)))
                h = float((self.weights * p * (1 - p)) @ column**2) + 1e-12
                aim = w[j] - g / h
                step = float(np.sign(aim) * max(abs(aim) - 1 / h, 0)) - w[j]
                for _ in range(40):
                    trial = w.copy()
                    trial[j] += step
                    value = self.objective(trial)
                    if value <= best:
                        w, best = trial, value
                        break
                    step /= 2
        return w
