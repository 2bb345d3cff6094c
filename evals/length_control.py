"""AlpacaEval 2's length-controlled win rate: what the win rate would be, were all answers as long as the baseline's.

A logistic regression of the judge's preference p_i on

    t_i = tanh(Δ_i/sd(Δ)),  Δ_i = characters of the baseline's answer − characters of the model's
    ψ_i = difficulty of the instruction, fixed in advance
    1   = what the model itself is worth

without another intercept. Two answerers that game length (the baseline told to be concise, and to be verbose) join
the fit with features (t, ψ, 0) and weight λ/2 each, so that t can't take what belongs to the model. The coefficients
minimise

    ‖w‖₁ + C·Σ_rows s·[softplus(u·w) − p·(u·w)]

and the length-controlled win rate is the mean of σ(w_ψ·ψ_i + w_1). For prompt sets of one's own there are neither ψ nor
gamed rows: then only t and 1 are used, and the raw win rate and mean lengths belong next to it.

References:
    Dubois et al. 2024, arXiv:2404.04475; github.com/tatsu-lab/alpaca_eval, ``length_controlled_v1``.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.special import expit

from evals.bootstrap import bootstrapped, numbers_of
from evals.measured import Measured, own_prompts
from evals.sparse_logistic import Fit, fit_logistic
from evals.win_rate import shares, win_rate
from objectives.stats import Estimate

C = 21.544347
"""Weight of the data against ‖w‖₁: one of AlpacaEval's grid, and what most published fits have (or 2.78)."""
GRID = np.logspace(-4, 4, 10)
"""Among which cross-validation chooses."""
FOLDS = 5
GAMED_WEIGHT = 0.1
"""λ/2 of each gamed row, λ = 0.2."""
DRAWS = 1000
"""Refits on bootstrap samples of prompts, C held fixed."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gamed:
    """One answerer that games length, against the same baseline on the same prompts."""

    length_model: np.ndarray
    """Characters of its answers, shape (prompt,)."""
    length_base: np.ndarray
    preference: np.ndarray
    """As for the model: in [1, 2], or NaN."""
    difficulty: np.ndarray | None = None
    """ψ of its prompts, where they are not those of the model."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LengthControlled:
    """A length-controlled win rate, and the fit it comes from."""

    estimate: Estimate
    """Share; the interval is a bootstrap over prompts that refits with C fixed."""
    spread: float
    """What AlpacaEval calls ``lc_standard_error``, a share: sd of the predictions over instructions, over √N. It says
    how instructions differ and nothing of sampling error."""
    weights: tuple[float, float, float]
    """Of length (negative: longer answers win), difficulty (0 where there is none) and the model."""
    C: float
    kkt_residual: float
    """How far the fit is from its optimum, in units of ‖w‖₁'s slope; at most 1e-8, or 1e-4 of the fallback."""
    raw: Measured
    """The plain win rate of the same verdicts."""
    mean_length: tuple[float, float]
    """Characters of the model's and of the baseline's answers."""
    warning: str | None
    """Where length control changes more than AlpacaEval thinks plausible."""

    def measured(self) -> Measured:
        """Ready for ``results.json``: the plain win rate and this one."""
        extra = {
            "length_controlled": {
                "weights": list(self.weights),
                "C": self.C,
                "kkt_residual": self.kkt_residual,
                "spread_over_instructions": self.spread,
                "draws": DRAWS,
                "seed": 0,
                **({} if self.warning is None else {"warning": self.warning}),
            },
            "mean_length_model": self.mean_length[0],
            "mean_length_base": self.mean_length[1],
        }
        return replace(
            self.raw,
            estimates={**self.raw.estimates, "win_rate/length_controlled": self.estimate},
            extra={**self.raw.extra, **extra},
        )


def length_controlled(
    preference: Sequence[float] | np.ndarray,
    length_model: Sequence[int] | np.ndarray,
    length_base: Sequence[int] | np.ndarray,
    prompts: Sequence[Hashable] | None = None,
    *,
    difficulty: Sequence[float] | np.ndarray | None = None,
    gamed: Sequence[Gamed] = (),
    C: float | Literal["cv"] = C,  # noqa: N803  # as the paper and scikit-learn call it
    draws: int = DRAWS,
) -> LengthControlled:
    """The length-controlled win rate of one model.

    Args:
        preference: of every prompt, coded as in ``win_rate``; prompts with NaN are not fitted but predicted.
        length_model: characters (Unicode code points) of the model's answers, as long as ``preference``.
        length_base: of the baseline's answers.
        prompts: of each item; each its own where left out.
        difficulty: ψ of each item's instruction (see ``difficulties``); without it that feature is left out.
        gamed: answerers that game length; none on prompt sets of one's own.
        C: weight of the data, > 0, or ``cv``: chosen from ``GRID`` by 5-fold cross-validation.
        draws: bootstrap refits for the interval; 0 makes none, and the interval NaN.

    Raises:
        ValueError: lengths that don't fit, no usable verdict, all lengths apart by the same, or gamed rows without ψ.
    """
    coded = np.asarray(preference, dtype=np.float64)
    raw = win_rate(coded, prompts)
    names = own_prompts(prompts, len(coded))
    model, base = (np.asarray(lengths, dtype=np.float64) for lengths in (length_model, length_base))
    own = _Rows.of("the model", coded, model, base, difficulty, len(coded), weight=1.0, is_model=True)
    others = [
        _Rows.of(f"gamed {i}", g.preference, g.length_model, g.length_base, _psi(g, difficulty), len(g.preference))
        for i, g in enumerate(gamed)
    ]
    if gamed and difficulty is None:
        raise ValueError("gamed rows are judged on AlpacaEval's instructions; give their difficulty too")
    parts = [own, *others]
    ones = [np.ones(len(part.p)) for part in parts]
    chosen_c = _cross_validated(parts) if C == "cv" else float(C)
    if not chosen_c > 0:
        raise ValueError(f"C must be above 0, got {C!r}")
    lengths = float(model.mean()), float(base.mean())
    same = bool((own.apart == 0).all() and (own.p[np.isfinite(own.p)] == 0.5).all())
    fit = Fit(np.zeros(3), 0.0) if same else _fit(parts, ones, chosen_c)  # the baseline itself
    predictions = expit(fit.weights[1] * own.psi + fit.weights[2])
    number = numbers_of(names)
    prompts_in = int(number.max()) + 1

    def refitted(drawn: np.ndarray) -> np.ndarray:
        found = np.empty(len(drawn))
        for i, times in enumerate(drawn):
            of_items = times[number]
            # Gamed rows of AlpacaEval are of the same instructions, drawn with them.
            share = [of_items if len(part.p) == len(of_items) else np.ones(len(part.p)) for part in parts]
            w = fit.weights if same or (times == 1).all() else _fit(parts, share, chosen_c, start=fit.weights).weights
            found[i] = np.average(expit(w[1] * own.psi + w[2]), weights=of_items)
        return found

    estimate = bootstrapped(refitted, n=len(coded), prompts=prompts_in, bounds=(0.0, 1.0), draws=max(draws, 1))
    spread = float(predictions.std(ddof=1) / np.sqrt(len(predictions))) if len(predictions) > 1 else 0.0
    weights = float(fit.weights[0]), float(fit.weights[1]), float(fit.weights[2])
    return LengthControlled(
        estimate=estimate,
        spread=spread,
        weights=weights,
        C=chosen_c,
        kkt_residual=fit.residual,
        raw=raw,
        mean_length=lengths,
        warning=_warning(float(predictions.mean()), raw.estimates["win_rate/raw"].value),
    )


def head_to_head(first: LengthControlled, second: LengthControlled, difficulty: np.ndarray | None = None) -> float:
    """Share of instructions on which the first model would beat the second at equal length: both terms are differences.

        mean of σ((b₁ − b₂) + (w_ψ,₁ − w_ψ,₂)·ψ_i)

    Args:
        first: fitted against a baseline.
        second: fitted against the same baseline.
        difficulty: ψ of the instructions; needed where the fits used it.
    """
    psi = np.zeros(1) if difficulty is None else np.asarray(difficulty, dtype=np.float64)
    slope, intercept = (first.weights[i] - second.weights[i] for i in (1, 2))
    return float(expit(intercept + slope * psi).mean())


def difficulties(instructions: Sequence[str], known: Mapping[str, float]) -> np.ndarray:
    """ψ of each instruction, looked up by its text: by position, a subset or another order silently gets wrong ones.

    Args:
        instructions: the prompts that were judged.
        known: ψ by instruction.

    Raises:
        ValueError: an instruction without a difficulty.
    """
    missing = [text for text in instructions if text not in known]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(instructions)} instructions have no difficulty, the first being "
            f"{missing[0][:60]!r}; leave difficulty out on prompts that are not AlpacaEval's"
        )
    return np.array([known[text] for text in instructions])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Rows:
    p: np.ndarray
    """NaN where the verdict can't be used."""
    apart: np.ndarray
    psi: np.ndarray
    weight: float
    is_model: bool

    @classmethod
    def of(
        cls,
        name: str,
        preference: np.ndarray,
        length_model: np.ndarray,
        length_base: np.ndarray,
        difficulty: Sequence[float] | np.ndarray | None,
        n: int,
        *,
        weight: float = GAMED_WEIGHT,
        is_model: bool = False,
    ) -> _Rows:
        psi = np.zeros(n) if difficulty is None else np.asarray(difficulty, dtype=np.float64)
        columns = {"length_model": length_model, "length_base": length_base, "difficulty": psi}
        for what, values in columns.items():
            if np.shape(values) != (n,) or not np.isfinite(values).all():
                raise ValueError(f"{what} of {name} needs {n} finite numbers, one for each verdict")
        apart = np.asarray(length_base, dtype=np.float64) - np.asarray(length_model, dtype=np.float64)
        if apart.any() and (n < 2 or np.ptp(apart) == 0):
            raise ValueError(
                f"all answers of {name} differ from the baseline's by {-apart[0]:g} characters, so that length can't "
                "be told from quality; report the raw win rate"
            )
        p = shares(np.asarray(preference, dtype=np.float64))
        return cls(p=p, apart=apart, psi=psi, weight=weight, is_model=is_model)

    def features(self, times: np.ndarray) -> np.ndarray:
        """(t, ψ, 1 or 0) of each row, with sd(Δ) of the rows as often as they were drawn, unparsed ones included."""
        t = np.zeros(len(self.apart))
        if self.apart.any():
            n = times.sum()
            mean = (times @ self.apart) / n
            spread = np.sqrt((times @ (self.apart - mean) ** 2) / (n - 1))
            t = np.tanh(self.apart / spread) if spread > 0 else np.sign(self.apart)
        return np.stack([t, self.psi, np.full(len(t), float(self.is_model))], axis=1)


def _psi(gamed: Gamed, own: Sequence[float] | np.ndarray | None) -> Sequence[float] | np.ndarray | None:
    return own if gamed.difficulty is None else gamed.difficulty


def _table(parts: Sequence[_Rows], times: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, labels and weights of all rows with a verdict."""
    keep = [np.isfinite(part.p) for part in parts]
    features = [part.features(t)[k] for part, t, k in zip(parts, times, keep, strict=True)]
    weights = [part.weight * t[k] for part, t, k in zip(parts, times, keep, strict=True)]
    labels = [part.p[k] for part, k in zip(parts, keep, strict=True)]
    return np.concatenate(features), np.concatenate(labels), np.concatenate(weights)


def _fit(parts: Sequence[_Rows], times: Sequence[np.ndarray], c: float, start: np.ndarray | None = None) -> Fit:
    features, labels, weights = _table(parts, times)
    return fit_logistic(features, labels, c * weights, start=start)


def _cross_validated(parts: Sequence[_Rows]) -> float:
    """The C of ``GRID`` with the least held-out cross-entropy, the smallest of several."""
    features, labels, weights = _table(parts, [np.ones(len(part.p)) for part in parts])
    if len(labels) < FOLDS:
        raise ValueError(f"{len(labels)} verdicts are too few to choose C by {FOLDS} folds; give C a number")
    from sklearn.model_selection import GroupKFold  # here: its import would be a tenth of the start of every run

    losses = np.zeros(len(GRID))
    for train, test in GroupKFold(FOLDS).split(features, groups=np.arange(len(labels))):
        w = None
        for i, c in enumerate(GRID):
            w = fit_logistic(features[train], labels[train], c * weights[train], start=w).weights
            p = np.clip(expit(features[test] @ w), 1e-15, 1 - 1e-15)
            loss = -(labels[test] * np.log(p) + (1 - labels[test]) * np.log1p(-p))
            losses[i] += float((weights[test] * loss).mean()) / FOLDS
    return float(GRID[int(np.argmin(losses))])


def _warning(controlled: float, raw: float) -> str | None:
    low, high = min(0.75 * raw, raw - 0.1), max(raw + 0.25 * (1 - raw), raw + 0.1)
    if low <= controlled <= high:
        return None
    return (
        f"length control changes the win rate from {100 * raw:.1f} to {100 * controlled:.1f} %: look at the lengths, "
        "and report both"
    )
