"""Strengths: the vector, the gradient, minorise-maximise, and when there are none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit

from evals.bradley_terry import Strengths, bradley_terry


def games(*results: tuple[str, str, float, int]) -> tuple[list[str], list[str], list[float]]:
    """First, second and score of each, so many times."""
    rows = [(a, b, score) for a, b, score, times in results for _ in range(times)]
    return [a for a, _, _ in rows], [b for _, b, _ in rows], [score for *_, score in rows]


VECTOR = games(
    *(("a", "b", 1, 7), ("a", "b", 0, 3), ("a", "c", 1, 9), ("a", "c", 0, 1)),
    *(("b", "c", 1, 6), ("c", "b", 1, 3), ("b", "c", 0.5, 1)),
)


def strength(found: Strengths, model: str) -> float:
    return float(found.theta[found.models.index(model)])


def test_the_vector():
    """a-b 7:3, a-c 9:1, b-c 6.5:3.5."""
    found = bradley_terry(*VECTOR, anchor="c", draws=0)
    assert found.models == ("a", "b", "c")
    assert found.theta == pytest.approx([1.829414, 0.792221, 0], abs=6e-7)
    assert found.elo() == pytest.approx([1317.801815, 1137.622911, 1000], abs=1e-4)
    p = found.win_probability()
    assert (p[0, 1], p[0, 2], p[1, 2]) == pytest.approx((0.738308, 0.861692, 0.688308), abs=6e-7)
    assert p + p.T == pytest.approx(np.ones((3, 3)))
    assert (found.pseudo_games, found.n) == (0, 30)


def test_one_baseline_is_the_mean_score():
    """Expanded games of the Arena-Hard vector: 0.7, so log-odds 0.847298 and 147.19 Elo."""
    rows = [1, 1, 1, 1, 1, 0.5, 0, 0, 0.5, 1]
    found = bradley_terry(["m"] * 10, ["b"] * 10, rows, anchor="b", draws=0)
    assert strength(found, "m") == pytest.approx(0.847298, abs=6e-7)
    assert found.elo()[0] - 1000 == pytest.approx(147.190714, abs=1e-4)
    assert found.against_anchor()["m"].value == pytest.approx(0.7)


@pytest.mark.slow
@given(st.integers(0, 10_000), st.integers(2, 6))
def test_wins_are_as_many_as_expected(seed: int, models: int):
    """The condition of the maximum, for every model; and minorise-maximise, another algorithm, comes to the same."""
    rng = np.random.default_rng(seed)
    names = [f"m{i}" for i in range(models)]
    pairs = [(i, j) for i in range(models) for j in range(i)]
    rows = [(names[i], names[j], s) for i, j in pairs for s in (1, 0, float(rng.choice([0, 0.5, 1])))]
    found = bradley_terry(*map(list, zip(*rows, strict=True)), anchor="m0", draws=0)
    at = {name: strength(found, name) for name in names}
    for name in names:
        won = sum(s if a == name else 1 - s for a, b, s in rows if name in (a, b))
        expected = sum(expit(at[name] - at[b if a == name else a]) for a, b, _ in rows if name in (a, b))
        assert won == pytest.approx(expected, abs=1e-8)
    pi = dict.fromkeys(names, 1.0)
    for _ in range(3000):
        pi = {
            name: sum(s if a == name else 1 - s for a, b, s in rows if name in (a, b))
            / sum(1 / (pi[a] + pi[b]) for a, b, _ in rows if name in (a, b))
            for name in names
        }
        pi = {name: value / pi["m0"] for name, value in pi.items()}
    assert {name: np.log(value) for name, value in pi.items()} == pytest.approx(at, abs=1e-5)


@pytest.mark.slow
def test_ties_everywhere_are_equal_strengths():
    found = bradley_terry(*games(("a", "b", 0.5, 4), ("b", "c", 0.5, 4)), anchor="a")
    assert found.theta == pytest.approx([0, 0, 0])
    assert found.pseudo_games == 0


def test_a_model_that_never_loses_has_a_finite_strength():
    """3:0 and half a win each way: 3.5 to 0.5."""
    found = bradley_terry(*games(("a", "b", 1, 3)), anchor="b", draws=0)
    assert strength(found, "a") == pytest.approx(np.log(7))
    assert found.pseudo_games == 1
    # Two groups, each of equals, of which one always beats the other.
    divided = games(*(("a", "b", 0.5, 2), ("c", "d", 0.5, 2), ("a", "c", 1, 5)))
    found = bradley_terry(*divided, anchor="d", draws=0)
    assert np.isfinite(found.theta).all()
    assert strength(found, "a") == pytest.approx(strength(found, "b"))
    assert strength(found, "a") - strength(found, "c") == pytest.approx(np.log(11))


@pytest.mark.slow
def test_intervals_are_over_prompts():
    rng = np.random.default_rng(0)
    n = 300
    easy = rng.normal(size=n)
    won = (rng.random((2, n)) < expit(1 + 2 * easy)).astype(float)
    prompts = list(range(n)) * 2
    found = bradley_terry(["a"] * 2 * n, ["b"] * 2 * n, won.ravel(), anchor="b", prompts=prompts, draws=400)
    each = bradley_terry(["a"] * 2 * n, ["b"] * 2 * n, won.ravel(), anchor="b", draws=400)
    assert found.low[0] < found.theta[0] < found.high[0]
    assert found.high[0] - found.low[0] > 1.1 * (each.high[0] - each.low[0]), "games of a prompt are alike"
    assert (found.low[1], found.high[1]) == (0, 0)
    p = won.mean(axis=0)
    wanted = 1.96 * p.std() / np.sqrt(n) / (p.mean() * (1 - p.mean()))
    assert (found.high[0] - found.low[0]) / 2 == pytest.approx(wanted, rel=0.15)


@pytest.mark.slow
def test_samples_that_games_do_not_connect_are_counted():
    found = bradley_terry(*games(("a", "b", 1, 4), ("a", "b", 0, 4), ("b", "c", 1, 2), ("b", "c", 0, 1)), anchor="a")
    assert 0 < found.unconnected < 500
    assert np.isfinite(found.low).all()


@pytest.mark.parametrize(
    ("rows", "anchor", "says"),
    [
        (games(), "a", "every game has two models"),
        (games(("a", "b", 1, 1), ("c", "d", 1, 1)), "a", "no games connect a, b / c, d"),
        (games(("a", "b", 1, 1)), "c", "anchor 'c' plays no game"),
        (games(("a", "a", 1, 1), ("a", "b", 1, 1)), "a", "'a' plays against itself"),
        (games(("a", "b", 2, 1)), "a", "between 0 and 1, got 2"),
        (games(("a", "b", float("nan"), 1)), "a", "between 0 and 1, got nan"),
    ],
)
def test_what_has_no_strengths(rows: tuple[list[str], list[str], list[float]], anchor: str, says: str):
    with pytest.raises(ValueError, match=says):
        bradley_terry(*rows, anchor=anchor)
