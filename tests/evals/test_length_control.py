"""AlpacaEval 2's length-controlled win rate: a synthetic vector, the published leaderboard, and scikit-learn."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from evals.length_control import GRID, Gamed, LengthControlled, difficulties, head_to_head, length_controlled
from evals.sparse_logistic import fit_logistic

BASE = np.array([100, 200, 150, 300, 120, 80, 260, 90])
MODEL = np.array([180, 190, 400, 250, 300, 60, 500, 95])
P = np.array([0.9, 0.2, 0.95, 0.3, 0.8, 0.1, 0.85, 0.4])
PSI = np.array([0, -1, 0.5, 1.2, -0.4, 0.3, -2, 0.8])
GAMED = [
    Gamed(
        length_base=np.array([100, 200, 150, 300]),
        length_model=np.array(lengths),
        preference=1 + np.array(labels),
        difficulty=PSI[:4],
    )
    for lengths, labels in (
        ([60, 90, 100, 180], [0.1, 0.3, 0.2, 0.4]),
        ([150, 260, 260, 330], [0.7, 0.6, 0.8, 0.55]),
    )
]
SIX = {"abs": 6e-7}


def synthetic(**keys: Any) -> LengthControlled:
    return length_controlled(1 + P, MODEL, BASE, **{"difficulty": PSI, "gamed": GAMED, "draws": 0, **keys})


@pytest.mark.parametrize(
    ("c", "weights", "lc", "spread"),
    [
        (21.544347, (-2.449174, 0.204908, -0.465680), 38.317631, 1.735451),
        (100.0, (-2.631930, 0.280590, -0.536583), 36.656901, 2.299914),
        (2.782559, (-1.454762, 0.0, -0.011872), 49.703213, 0.0),
    ],
)
def test_the_synthetic_vector(c: float, weights: tuple[float, ...], lc: float, spread: float):
    found = synthetic(C=c)
    assert found.weights == pytest.approx(weights, **SIX)
    assert 100 * found.estimate.value == pytest.approx(lc, abs=2e-6)
    assert 100 * found.spread == pytest.approx(spread, **SIX)
    assert found.kkt_residual <= 1e-8
    assert 100 * found.raw.estimates["win_rate/raw"].value == pytest.approx(56.25)


def test_a_coefficient_of_zero_is_the_minimum():
    """|g| of the difficulty's, by the sum written out: 0.048734, where anything up to 1 keeps it at 0."""
    c, w = 2.782559, np.array(synthetic(C=2.782559).weights)
    slope = 0.0
    parts = [(MODEL, BASE, PSI, P, 1.0, 1.0)]
    parts += [(g.length_model, g.length_base, g.difficulty, g.preference - 1, 0.0, 0.1) for g in GAMED]
    for own, base, psi, labels, one, weight in parts:
        t = np.tanh((base - own) / np.std(base - own, ddof=1))
        eta = t * w[0] + psi * w[1] + one * w[2]
        slope += c * weight * float(((1 / (1 + np.exp(-eta)) - labels) * psi).sum())
    assert abs(slope) == pytest.approx(0.048734, abs=2e-6)


def test_a_change_that_is_hard_to_believe_is_told():
    """From 56.25 down to less than three quarters of it."""
    warning = synthetic().warning
    assert warning is not None
    assert "from 56.2 to 38.3 %" in warning
    assert synthetic(C=2.782559).warning is None


def test_without_gamed_rows_and_penalty():
    found = synthetic(C=1e6, gamed=())
    assert found.weights == pytest.approx((-3.419700, 0.518575, -0.734939), abs=3e-5)
    assert 100 * found.estimate.value == pytest.approx(32.584879, abs=2e-4)


def test_features_of_the_vector():
    from evals.length_control import _Rows

    rows = _Rows.of("the model", 1 + P, MODEL, BASE, PSI, 8, is_model=True)
    t = [-0.573877, 0.081480, -0.966846, 0.387031, -0.899557, 0.161884, -0.961079, -0.040808]
    assert rows.features(np.ones(8))[:, 0] == pytest.approx(t, **SIX)
    assert np.std(rows.apart, ddof=1) == pytest.approx(122.458083, **SIX)
    for gamed, wanted in zip(
        GAMED,
        ([0.752978, 0.990907, 0.841048, 0.994419], [-0.899407, -0.942829, -0.996888, -0.707152]),
        strict=True,
    ):
        rows = _Rows.of("gamed", gamed.preference, gamed.length_model, gamed.length_base, PSI[:4], 4)
        assert rows.features(np.ones(4))[:, 0] == pytest.approx(wanted, **SIX)
    doubled = _Rows.of("the model", 1 + np.tile(P, 2), np.tile(MODEL, 2), np.tile(BASE, 2), np.tile(PSI, 2), 16)
    of_doubled = doubled.features(np.ones(16))[:8]
    assert _Rows.of("the model", 1 + P, MODEL, BASE, PSI, 8).features(np.full(8, 2.0)) == pytest.approx(of_doubled)


# ---- the published leaderboard ----

BOARD = {
    # WR, SE, wins/base/draws, discrete, LC at 2.782559 and 21.544347 with their spreads, LC on the board, its fit's C
    "FuseChat-Gemma-2-9B-Instruct": (
        *(70.497135, 1.342639, (575, 225, 5), 71.739130),
        *((70.1811, 0.5941), (70.2274, 0.5953), 70.1811, 2.782559),
    ),
    "vicuna-13b-v1.5": (
        *(6.722122, 0.767417, (48, 753, 4), 6.211180),
        *((10.5475, 0.5958), (10.4837, 0.5981), 10.4844, 21.544347),
    ),
    "claude-2": (
        *(17.188240, 1.174828, (131, 673, 1), 16.335404),
        *((28.1556, 0.8779), (28.1143, 0.8798), 28.1552, 2.782559),
    ),
}


@pytest.fixture(scope="module")
def leaderboard(shared: Path) -> dict[str, np.ndarray]:
    with (shared / "data" / "alpaca_eval_lc.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0]}


def of_board(columns: dict[str, np.ndarray], model: str, **keys: Any) -> LengthControlled:
    gamed = [
        Gamed(
            length_model=columns[f"len_{kind}"],
            length_base=columns["len_base"],
            preference=1 + columns[f"y_{kind}_sur"],
        )
        for kind in ("concise", "verbose")
    ]
    keys = {"draws": 0, **keys}
    lengths = columns[f"len|{model}"], columns["len_base"]
    return length_controlled(columns[f"pref|{model}"], *lengths, difficulty=columns["psi"], gamed=gamed, **keys)


@pytest.mark.parametrize("model", BOARD)
def test_published_numbers(leaderboard: dict[str, np.ndarray], model: str):
    win, error, counts, discrete, low_c, high_c, board, its_c = BOARD[model]
    found = {c: of_board(leaderboard, model, C=c) for c in (2.782559, 21.544347)}
    raw = found[21.544347].raw
    assert 100 * raw.estimates["win_rate/raw"].value == pytest.approx(win, abs=1e-6)
    assert 100 * raw.estimates["win_rate/raw"].stderr == pytest.approx(error, abs=1e-6)
    assert 100 * raw.estimates["win_rate/discrete"].value == pytest.approx(discrete, abs=1e-6)
    assert tuple(raw.extra[name] for name in ("n_wins", "n_wins_base", "n_draws")) == counts
    for c, (lc, spread) in ((2.782559, low_c), (21.544347, high_c)):
        assert 100 * found[c].estimate.value == pytest.approx(lc, abs=0.001)
        assert 100 * found[c].spread == pytest.approx(spread, abs=0.0001)
        assert found[c].kkt_residual <= 1e-8
        assert 100 * found[c].estimate.value == pytest.approx(board, abs=0.12)
    assert 100 * found[its_c].estimate.value == pytest.approx(board, abs=0.02)


def test_cross_validation_comes_near_the_board(leaderboard: dict[str, np.ndarray]):
    found = of_board(leaderboard, "claude-2", C="cv")
    assert found.C in GRID
    assert 100 * found.estimate.value == pytest.approx(BOARD["claude-2"][6], abs=0.12)


def test_the_interval_is_of_prompts(leaderboard: dict[str, np.ndarray]):
    """A sampling error, near that of the raw win rate, where the published ``lc_standard_error`` says 0.88."""
    found = of_board(leaderboard, "claude-2", draws=150)
    assert 1.0 < 100 * found.estimate.stderr < 2.5
    assert found.estimate.low < found.estimate.value < found.estimate.high
    assert (found.estimate.clusters, found.estimate.interval) == (805, "bootstrap")
    assert found.warning is None, "28.1 is not more than a quarter of the way from 17.2 to 100"
    results = found.measured().results(dataset="alpaca_eval", split="eval", step=0)
    assert [each.metric for each in results][-1] == "win_rate/length_controlled"
    assert results[0].extra["length_controlled"]["C"] == pytest.approx(21.544347)


# ---- what must hold of any fit ----


@given(st.integers(0, 10_000), st.sampled_from([0.4, 2.78, 21.5]))
def test_the_fit_is_scikit_learn_s(seed: int, c: float):
    """Soft labels as duplicated rows with weights; liblinear's own tolerance limits how close it comes."""
    rng = np.random.default_rng(seed)
    u = np.stack([np.tanh(rng.normal(size=60)), rng.normal(size=60), np.ones(60)], axis=1)
    p, s = rng.random(60), rng.choice([1.0, 0.1], 60)
    ours = fit_logistic(u, p, c * s)
    theirs = LogisticRegression(
        C=c, l1_ratio=1.0, solver="liblinear", fit_intercept=False, tol=1e-8, max_iter=10_000, random_state=0
    ).fit(np.tile(u, (2, 1)), np.repeat([1, 0], 60), sample_weight=np.concatenate([s * p, s * (1 - p)]))
    assert ours.weights == pytest.approx(theirs.coef_[0], abs=2e-3)
    assert ours.residual <= 1e-8


def test_swapping_model_and_baseline_mirrors_the_win_rate():
    there, back = (
        length_controlled(p, first, second, draws=0)
        for p, first, second in ((1 + P, MODEL, BASE), (2 - P, BASE, MODEL))
    )
    assert there.estimate.value == pytest.approx(1 - back.estimate.value, abs=1e-9)
    assert there.weights[1] == 0, "without difficulties only length and the model"
    assert head_to_head(there, there) == 0.5
    assert head_to_head(there, back) == pytest.approx(1 - head_to_head(back, there))
    assert head_to_head(synthetic(), there, PSI) != 0.5


def test_the_baseline_against_itself():
    found = length_controlled(np.full(8, 1.5), BASE, BASE, draws=20)
    assert (found.estimate.value, found.weights, found.kkt_residual) == (0.5, (0, 0, 0), 0)


def test_unparsed_verdicts_are_predicted_and_not_fitted():
    prefs = 1 + P
    prefs[2] = np.nan
    found = length_controlled(prefs, MODEL, BASE, difficulty=PSI, draws=0)
    assert found.raw.n_dropped == 1
    assert found.estimate.n == 8


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"preference": [np.nan] * 8}, "none of 8 verdicts can be used"),
        ({"length_model": MODEL[:3]}, "length_model of the model needs 8 finite numbers"),
        ({"length_model": BASE + 5}, "differ from the baseline's by 5 characters"),
        ({"difficulty": np.full(8, np.nan)}, "difficulty of the model needs 8"),
        ({"difficulty": None, "gamed": GAMED}, "give their difficulty too"),
        ({"C": 0.0}, "C must be above 0"),
        ({"preference": [1.5], "length_model": [3], "length_base": [4]}, "can't be told from quality"),
        ({"C": "cv", "preference": [1.2, 1.9], "length_model": [3, 9], "length_base": [4, 5]}, "too few to choose C"),
    ],
)
def test_what_can_t_be_controlled(keys: dict[str, Any], says: str):
    given_ = {"preference": 1 + P, "length_model": MODEL, "length_base": BASE, **keys}
    with pytest.raises(ValueError, match=says):
        length_controlled(**given_)


def test_difficulties_are_looked_up_by_text():
    assert difficulties(["b", "a"], {"a": 1.0, "b": 2.0}).tolist() == [2.0, 1.0]
    with pytest.raises(ValueError, match="1 of 2 instructions have no difficulty, the first being 'c'"):
        difficulties(["a", "c"], {"a": 1.0})
