"""ψ by a joint fit: against scipy's minimiser of the same objective, and against what was put in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from evals.difficulty import fit_difficulties
from evals.length_control import difficulties, length_controlled


def judged(seed: int, models: int, instructions: int, soft: float = 0.05) -> tuple[dict[str, Any], np.ndarray]:
    """Verdicts on every model and instruction, in any order, and the ψ they were made with."""
    rng = np.random.default_rng(seed)
    psi = rng.normal(0, 1.2, instructions)
    psi -= psi[0]
    a, b = rng.normal(-1, 0.3, models), rng.normal(-0.3, 0.8, models)
    base = rng.integers(200, 2000, instructions)
    own = (base * rng.lognormal(0, 0.5, (models, instructions))).round()
    apart = base - own
    t = np.tanh(apart / apart.std(axis=1, ddof=1, keepdims=True))
    p = expit(a[:, None] * t + b[:, None] + psi)
    won = np.where(rng.random(p.shape) < p, 1 - soft, soft)
    order = rng.permutation(models * instructions)
    who, which = np.divmod(order, instructions)
    keys = {
        "models": [f"m{i}" for i in who],
        "instructions": [f"q{i}" for i in which],
        "preference": 1 + won.ravel()[order],
        "length_model": own.ravel()[order],
        "length_base": base[which],
    }
    return keys, psi


@pytest.mark.parametrize("ridge", [0.0, 0.1, 2.0])
def test_the_fit_is_scipy_s(ridge: float):
    """The objective written out again: full table of dummies, L-BFGS with numerical start at 0, float64."""
    keys, _ = judged(0, models=4, instructions=12, soft=0.2)
    found = fit_difficulties(**keys, ridge=ridge, draws=0)
    names, asked = list(dict.fromkeys(keys["models"])), list(dict.fromkeys(keys["instructions"]))
    rows: list[np.ndarray] = []
    for name, text, own, base in zip(
        keys["models"], keys["instructions"], keys["length_model"], keys["length_base"], strict=True
    ):
        all_of_model = np.array(
            [
                b - o
                for n, o, b in zip(keys["models"], keys["length_model"], keys["length_base"], strict=True)
                if n == name
            ]
        )
        row = np.zeros(2 * len(names) + len(asked))
        row[names.index(name)] = np.tanh((base - own) / np.std(all_of_model, ddof=1))
        row[len(names) + names.index(name)] = 1
        row[2 * len(names) + asked.index(text)] = 1
        rows.append(row)
    table, p = np.array(rows), keys["preference"] - 1
    kept = np.arange(table.shape[1]) != (2 * len(names) if ridge == 0 else -1)

    def objective(free: np.ndarray) -> tuple[float, np.ndarray]:
        w = np.zeros(table.shape[1])
        w[kept] = free
        eta, psi = table @ w, w[2 * len(names) :]
        slope = table.T @ (expit(eta) - p)
        slope[2 * len(names) :] += ridge * (psi - psi.mean())
        penalty = 0.5 * ridge * ((psi - psi.mean()) ** 2).sum()
        return float(np.logaddexp(0, eta).sum() - p @ eta + penalty), slope[kept]

    free = minimize(objective, np.zeros(int(kept.sum())), jac=True, method="BFGS", options={"gtol": 1e-9}).x
    w = np.zeros(table.shape[1])
    w[kept] = free
    psi = w[2 * len(names) :]
    assert list(found.psi.values()) == pytest.approx(psi - psi[0], abs=1e-5)
    assert list(found.length.values()) == pytest.approx(w[: len(names)], abs=1e-5)
    assert list(found.quality.values()) == pytest.approx(w[len(names) : 2 * len(names)] + psi[0], abs=1e-5)
    assert found.slope < 1e-10
    assert found.psi[asked[0]] == 0


def test_what_was_put_in_comes_out():
    keys, psi = judged(1, models=30, instructions=150)
    found = fit_difficulties(**keys, draws=0)
    ours = np.array([found.psi[f"q{i}"] for i in range(150)])
    assert np.corrcoef(ours, psi)[0, 1] > 0.9
    assert max(found.length.values()) < 0, "longer answers win, and were made to"
    assert found.warning is None
    # Frozen, it is what length control looks up by text.
    mine = [i for i, name in enumerate(keys["models"]) if name == "m3"]
    texts = [keys["instructions"][i] for i in mine]
    columns = (np.asarray(keys[name])[mine] for name in ("preference", "length_model", "length_base"))
    controlled = length_controlled(*columns, difficulty=difficulties(texts, found.psi), draws=0)
    assert controlled.estimate.value == pytest.approx(found.win_rate["m3"].value, abs=0.04)
    assert controlled.weights[1] > 0.5


@pytest.mark.slow
def test_the_bootstrap_is_over_instructions_and_covers():
    """Win rates at equal length of models whose quality is known: 95 % of limits should hold them."""
    held = total = 0
    for seed in range(6):
        keys, psi = judged(10 + seed, models=4, instructions=60, soft=0.0)
        rng = np.random.default_rng(10 + seed)
        rng.normal(0, 1.2, 60)
        rng.normal(-1, 0.3, 4)
        b = rng.normal(-0.3, 0.8, 4)
        found = fit_difficulties(**keys, draws=80)
        assert found.warning is not None
        for i in range(4):
            each = found.win_rate[f"m{i}"]
            assert each.low < each.value < each.high
            assert each.clusters == 60
            held += each.low - 0.01 <= float(expit(b[i] + psi).mean()) <= each.high + 0.01
            total += 1
    assert held / total > 0.8


def test_what_has_no_difficulty():
    keys, _ = judged(2, models=3, instructions=5)
    sure = {**keys, "preference": np.where(np.array(keys["instructions"]) == "q1", 2.0, keys["preference"])}
    with pytest.raises(ValueError, match="the joint fit has no maximum"):
        fit_difficulties(**sure, ridge=0.0, draws=0)
    assert fit_difficulties(**sure, draws=0).psi["q1"] > 1
    for changed, says in (
        ({"preference": np.full(15, 3.0)}, r"verdicts lie in \[1, 2\]"),
        ({"models": ["m0"] * 15}, "1 model says nothing"),
        ({"length_model": keys["length_base"]}, "by the same length"),
        ({"models": ["m0"]}, "a model, an instruction and two lengths"),
        ({"ridge": -1.0}, "ridge must be"),
    ):
        with pytest.raises(ValueError, match=says):
            fit_difficulties(**{**keys, "draws": 0, **changed})
