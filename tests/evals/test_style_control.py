"""Style control: counts by hand, scikit-learn's fit of the same table, and what style hides."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from evals.bradley_terry import bradley_terry
from evals.style_control import FEATURES, at_equal_style, differences, style_controlled, style_of


def games(seed: int, n: int = 300, models: int = 3) -> tuple[list[str], np.ndarray, np.ndarray, list[int]]:
    """Two games of each prompt and model, of which style decides a good part."""
    rng = np.random.default_rng(seed)
    style = rng.normal(0, [0.4, 0.2, 0.3, 0.1], (2 * n * models, 4)) + 0.1
    who = np.tile(np.repeat(np.arange(models), n), 2)
    p = expit(np.array([0.8, 0.0, -0.7])[who] + style @ np.array([2.0, 0.5, 0.0, 1.0]))
    won = np.where(rng.random(len(p)) < 0.1, 0.5, rng.random(len(p)) < p)
    return [f"m{i}" for i in who], won, style, np.tile(np.arange(n), 2 * models).tolist()


def test_counts_of_an_answer():
    text = "# One\n\n- two **three**\n* four\n1. five __six__\n\n## Seven\n```\n# code\n- code\n```\n#none"
    assert style_of(text, 30) == {"length": 30, "headers": 2, "lists": 3, "bold": 2}


def test_differences_by_hand():
    """Of 30 and 10 tokens ½; of 3 headers in 30 tokens and none, d = 3/31 and 0."""
    own = {"length": np.array([30.0]), "headers": np.array([3.0]), "lists": np.array([0.0]), "bold": np.array([2.0])}
    base = {"length": np.array([10.0]), "headers": np.array([0.0]), "lists": np.array([0.0]), "bold": np.array([2.0])}
    bold = (2 / 31 - 2 / 11) / (2 / 31 + 2 / 11 + 1)
    assert differences(own, base)[0] == pytest.approx([0.5, (3 / 31) / (3 / 31 + 1), 0.0, bold])
    assert differences(own, base, ("bold",))[0] == pytest.approx([bold]), "the columns that were asked for"
    assert differences(base, own)[0] == pytest.approx(-differences(own, base)[0])


@pytest.mark.parametrize("features", [FEATURES, ("length",), FEATURES[1:]])
def test_the_fit_is_scikit_learn_s(features: tuple[str, ...]):
    """Ties as one game won and one lost at half weight; columns standardised as Arena-Hard does."""
    who, won, style, prompts = games(0)
    chosen = style[:, [FEATURES.index(name) for name in features]]
    found = style_controlled(who, won, chosen, prompts, features=features, draws=0)
    scaled = (chosen - chosen.mean(axis=0)) / chosen.std(axis=0, ddof=1)
    table = np.concatenate([np.eye(3)[[int(name[1]) for name in who]], scaled], axis=1)
    theirs = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=10_000).fit(
        np.tile(table, (2, 1)), np.repeat([1, 0], len(won)), sample_weight=np.concatenate([won, 1 - won])
    )
    ours = [*found.theta.values(), *found.weights.values()]
    assert ours == pytest.approx(theirs.coef_[0], abs=1e-4)
    assert {name: each.value for name, each in found.win_rate.items()} == pytest.approx(
        {name: expit(theta) for name, theta in found.theta.items()}
    )


def test_without_style_it_is_bradley_terry():
    who, won, style, prompts = games(1)
    found = style_controlled(who, won, np.zeros_like(style), prompts, draws=0)
    plain = bradley_terry(who, ["base"] * len(who), won, anchor="base", draws=0)
    assert found.theta == pytest.approx({name: t for name, t in zip(plain.models, plain.theta, strict=True) if t})
    assert set(found.weights.values()) == {0.0}, "what never differs decides nothing"


def test_equal_style_is_not_mean_style():
    """A model that wins by writing more: at equal style it is the baseline's equal, and at mean style it still wins."""
    rng = np.random.default_rng(2)
    style = rng.normal(0.3, 0.3, (4000, 1))
    won = (rng.random(4000) < expit(3 * style[:, 0])).astype(float)
    keys = {"features": ("length",), "draws": 0}
    equal = style_controlled(["m"] * 4000, won, style, centred=False, **keys).win_rate["m"].value
    mean = style_controlled(["m"] * 4000, won, style, **keys).win_rate["m"].value
    assert equal == pytest.approx(0.5, abs=0.03)
    assert mean == pytest.approx(expit(0.9), abs=0.03)


def test_intervals_are_over_prompts():
    """Games of a prompt are alike, here because each stands there three times: that must not narrow the interval."""
    who, won, style, prompts = games(3, n=80)
    once = style_controlled(who, won, style, prompts, draws=300).win_rate
    thrice = style_controlled(who * 3, np.tile(won, 3), np.tile(style, (3, 1)), prompts * 3, draws=300).win_rate
    for name, each in once.items():
        assert each.low < each.value < each.high
        assert (each.clusters, thrice[name].n) == (80, 3 * each.n)
        assert thrice[name].high - thrice[name].low == pytest.approx(each.high - each.low, rel=0.05)


def test_a_model_that_never_loses_is_helped():
    found = style_controlled(["m"] * 3, [1.0, 1.0, 1.0], np.zeros((3, 1)), features=("length",), draws=0)
    assert found.theta["m"] == pytest.approx(np.log(7))
    assert found.pseudo_games == 1


def test_one_model_at_equal_style_by_hand():
    """The value is the regression's; the variance is worked out game by game from its formula."""
    who, won, style, prompts = games(5, n=60, models=1)
    found, weights = at_equal_style(won, style, prompts)
    whole = style_controlled(who, won, style, prompts, centred=False, draws=0)
    assert (found.value, weights) == (whole.win_rate["m0"].value, whole.weights)
    u = np.concatenate([np.ones((len(won), 1)), style / style.std(axis=0, ddof=1)], axis=1)
    w = np.array([whole.theta["m0"], *whole.weights.values()])
    curvature, spread = np.zeros((5, 5)), np.zeros((5, 5))
    for g in range(60):
        s = np.zeros(5)
        for i in (i for i, prompt in enumerate(prompts) if prompt == g):
            p = float(expit(u[i] @ w))
            s += (won[i] - p) * u[i]
            curvature += p * (1 - p) * np.outer(u[i], u[i])
        spread += np.outer(s, s)
    inverse = np.linalg.inv(curvature)
    half = 2.004045 * np.sqrt((inverse @ spread @ inverse)[0, 0] * 60 / 55)  # t of 55 degrees of freedom
    ends = found.low, found.high
    assert ends == pytest.approx([expit(w[0] - half), expit(w[0] + half)], abs=1e-6)
    assert (found.n, found.clusters) == (120, 60)


@pytest.mark.slow
@pytest.mark.parametrize("theta", [0.0, 0.8])
def test_the_interval_at_equal_style_covers(theta: float):
    """Two games of each of 100 prompts, decided together; 5,000 times."""
    held = 0
    for seed in range(5000):
        rng = np.random.default_rng([seed, int(10 * theta)])
        style = rng.normal(0.1, [0.4, 0.2], (200, 2))
        won = (np.repeat(rng.random(100), 2) < expit(theta + style @ np.array([2.0, 0.5]))).astype(float)
        found, _ = at_equal_style(won, style, np.repeat(np.arange(100), 2).tolist(), features=("length", "bold"))
        held += found.low <= expit(theta) <= found.high
    assert 0.94 <= held / 5000 <= 0.965


def test_what_has_no_win_rate_at_equal_style():
    style = np.random.default_rng(0).normal(size=(12, 1))
    for won, says in ((np.ones(12), "the model won every game"), (np.zeros(12), "the model lost every game")):
        with pytest.raises(ValueError, match=says):
            at_equal_style(won, style, features=("length",))
    with pytest.raises(ValueError, match="2 prompts are too few for 2 coefficients"):
        at_equal_style([1, 0, 0.5] * 4, style, [0, 1] * 6, features=("length",))


def test_what_has_no_style():
    ramp = np.linspace(-1, 1, 40)[:, None]
    with pytest.raises(ValueError, match="style or models decide every game"):
        style_controlled(["m"] * 40, (ramp[:, 0] > 0).astype(float), ramp, features=("length",), draws=0)
    with pytest.raises(ValueError, match="unknown style feature 'colour'"):
        differences({"length": np.ones(1)}, {"length": np.ones(1)}, ("colour",))
    with pytest.raises(ValueError, match="got nan"):
        style_controlled(["m"], [np.nan], np.zeros((1, 4)), draws=0)
    with pytest.raises(ValueError, match="a model, a score and 4 features"):
        style_controlled(["m"], [1.0], np.zeros((1, 2)), draws=0)
    with pytest.raises(ValueError, match="negative or not finite"):
        differences({"length": -np.ones(1)}, {"length": np.ones(1)}, ("length",))
