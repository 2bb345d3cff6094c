"""Tests, corrections and power: vectors, brute force, and whether levels are kept."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import binom, stdtr

from evals.significance import (
    EXACT_UP_TO,
    benjamini_hochberg,
    holm,
    mcnemar,
    paired,
    prompts_needed,
    sign_flip,
    smallest_difference,
)

FIRST = [1, 1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1]
SECOND = [1, 0, 0, 1, 0, 0, 1, 0, 1, 1, 1, 0]
SIX = {"abs": 5.1e-7}


def test_the_paired_vector():
    found = paired(FIRST, SECOND)
    assert found.difference.value == 0.25
    assert found.difference.stderr == pytest.approx(0.179435, **SIX)
    assert found.p_t == pytest.approx(0.191054, **SIX)
    assert (found.better, found.worse, found.ties) == (4, 1, 7)
    assert (found.test, found.p_value, found.p_mid) == ("mcnemar", 0.375, pytest.approx(0.21875))
    assert found.unpaired_stderr == pytest.approx(0.199431, **SIX)
    assert found.correlation == pytest.approx(0.192450, **SIX)
    assert found.difference.value / found.difference.stderr == pytest.approx(1.393261, **SIX)
    assert sign_flip(np.subtract(FIRST, SECOND)) == 0.375, "the same test, for scores of 0 and 1"


def test_a_win_rate_against_one_half():
    """Scores 1, ½, 0, … of the vector: z = 1.5; ties contribute nothing and are not dropped."""
    scores = np.array([1, 0.5, 0, 1, 1, 0.5, 1, 0, 1, 1])
    # 6 wins and 2 losses: two-sided binomial of 2 of 8
    assert sign_flip(scores - 0.5) == pytest.approx(2 * sum(binom(8, k) for k in range(3)) / 2**8)
    found = paired(scores, np.full(10, 0.5))
    assert (found.better, found.worse, found.ties, found.test) == (6, 2, 2, "sign-flip-exact")
    assert found.difference.stderr == pytest.approx(0.133333, **SIX)


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
def test_exact_flips_are_all_flips(values: list[int]):
    d = np.array(values) / 10
    sums = [
        abs(sum(s * v for s, v in zip(signs, d, strict=True))) for signs in itertools.product((1, -1), repeat=len(d))
    ]
    assert sign_flip(d) == pytest.approx(np.mean([s >= abs(d.sum()) - 1e-12 for s in sums]))


@given(st.integers(0, 30), st.integers(0, 30))
def test_mcnemar_is_the_binomial_test(first: int, second: int):
    p, mid = mcnemar(first, second)
    total = first + second
    mass = [binom(total, k) / 2**total for k in range(total + 1)]
    far = abs(first - second)
    assert p == pytest.approx(sum(m for k, m in enumerate(mass) if abs(2 * k - total) >= far))
    at = sum(m for k, m in enumerate(mass) if abs(2 * k - total) == far)
    assert mid == pytest.approx(p - at / 2 if total else 1.0)
    assert (p, mid) == mcnemar(second, first)


def test_random_flips_come_close_to_all():
    d = np.random.default_rng(0).normal(0.3, 1, EXACT_UP_TO)
    exact = sign_flip(d)
    flipped = sign_flip(np.concatenate([d, [1e-12]]))  # one difference more than is tried in full
    assert flipped == pytest.approx(exact, abs=0.012)
    assert flipped == sign_flip(np.concatenate([d, [1e-12]]))
    assert flipped != sign_flip(np.concatenate([d, [1e-12]]), seed=1)
    assert sign_flip(np.full(200, 1.0)) == 1 / 10_001, "never 0"


def test_several_answers_of_a_prompt_are_averaged():
    found = paired([1, 0, 1, 1], [0, 0, 1, 0], ["a", "a", "b", "b"])
    assert found.difference.value == 0.5
    assert (found.difference.clusters, found.test) == (2, "sign-flip-exact")


def test_no_difference_anywhere():
    found = paired(FIRST, FIRST)
    assert (found.p_value, found.p_mid, found.p_t, found.ties) == (1.0, 1.0, None, 12)
    assert (found.difference.value, found.difference.low) == (0.0, 0.0)
    alike = paired([0.3, 0.5, 0.8], [0.2, 0.4, 0.7])
    assert math.isnan(alike.difference.low)
    assert (alike.p_value, alike.correlation) == (0.25, pytest.approx(1.0))
    assert paired([0.3, 0.3], [0.3, 0.5]).correlation is None


@pytest.mark.parametrize(
    ("first", "second", "prompts", "says"),
    [
        ([1, 0], [1], None, "same items twice"),
        ([], [], None, "0 prompts show no difference"),
        ([1, 0], [0, 0], "aa", "1 prompts show no difference"),
        ([1, math.nan], [0, 0], None, "not finite"),
    ],
)
def test_what_can_t_be_compared(first: list[float], second: list[float], prompts: str | None, says: str):
    with pytest.raises(ValueError, match=says):
        paired(first, second, prompts)
    with pytest.raises(ValueError, match="one finite difference"):
        sign_flip(np.array([]))


# ---- corrections ----


def test_corrections_of_the_vector():
    p = [0.01, 0.04, 0.03, 0.005]
    assert holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert benjamini_hochberg(p) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert holm([]) == benjamini_hochberg([]) == []
    with pytest.raises(ValueError, match="between 0 and 1, got nan"):
        holm([0.1, math.nan])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.001, 0.5))
def test_corrections_reject_what_the_procedures_do(p: list[float], level: float):
    """Holm steps down until a value fails; Benjamini-Hochberg rejects up to the last value that passes."""
    order, m = np.argsort(p, kind="stable"), len(p)
    passed = [p[i] * (m - rank) <= level for rank, i in enumerate(order)]
    held = {int(i) for rank, i in enumerate(order) if all(passed[: rank + 1])}
    assert {i for i, q in enumerate(holm(p)) if q <= level} == held
    last = max((rank for rank, i in enumerate(order) if p[i] * m / (rank + 1) <= level), default=-1)
    assert {i for i, q in enumerate(benjamini_hochberg(p)) if q <= level} == {int(i) for i in order[: last + 1]}


# ---- power ----


def test_power_of_the_vector():
    assert prompts_needed(0.5, 0.05) == 785
    assert prompts_needed(1.0, -1.0) == 8, "7.849 prompts"
    assert smallest_difference(0.5, 785) == pytest.approx(0.05, rel=1e-4)
    assert smallest_difference(1.0, 1) ** 2 == pytest.approx(7.849, abs=5e-4)
    assert prompts_needed(0.5, 0.05, level=0.05 / 3) > 1000


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"difference": 0.0}, "a finite number other than 0"),
        ({"difference": math.nan}, "a finite number"),
        ({"spread": -1.0}, "spread must be"),
        ({"power": 1.0}, "power must be"),
        ({"level": 0.0}, "level must be"),
    ],
)
def test_power_of_nonsense(keys: dict[str, float], says: str):
    with pytest.raises(ValueError, match=says):
        prompts_needed(**{"spread": 0.5, "difference": 0.1, **keys})


# ---- levels, by simulation ----

SIMULATIONS = 6000


def flipped_p(d: np.ndarray, flips: int) -> np.ndarray:
    """``sign_flip`` of many columns at once, with its own draws; shape (simulation,)."""
    signs = np.random.default_rng(0).integers(0, 2, (flips, len(d)), dtype=np.int8) * 2.0 - 1.0
    hits = np.zeros(d.shape[1])
    for part in np.array_split(signs, 20):
        hits += (np.abs(part @ d) >= np.abs(d.sum(axis=0)) - 1e-9).sum(axis=0)
    return (1 + hits) / (1 + flips)


def test_the_fast_path_of_the_simulation_is_the_function():
    d = np.random.default_rng(3).normal(size=(60, 3))
    assert flipped_p(d, 500).tolist() == [sign_flip(column, flips=500) for column in d.T]


@pytest.mark.parametrize("prompts", [25, 100])
def test_the_permutation_test_keeps_its_level(prompts: int):
    """Under no difference 5 % of p-values are at most 0.05; by chance that share has a standard error of 0.28 %."""
    rng = np.random.default_rng(1)
    hard = rng.normal(size=(prompts, SIMULATIONS))
    first, second = (1 / (1 + np.exp(-hard - rng.normal(size=hard.shape))) for _ in range(2))
    p = flipped_p(first - second, 999)
    for level in (0.01, 0.05, 0.1):
        assert (p <= level).mean() == pytest.approx(level, abs=3.5 * math.sqrt(level * (1 - level) / SIMULATIONS))
    d = first - second
    t = d.mean(axis=0) / d.std(axis=0, ddof=1) * math.sqrt(prompts)
    assert (2 * stdtr(prompts - 1, -np.abs(t)) <= 0.05).mean() == pytest.approx(0.05, abs=0.01)


@pytest.mark.slow
def test_mcnemar_never_exceeds_its_level_and_mid_p_comes_nearer():
    rng = np.random.default_rng(2)
    hard = rng.beta(1, 1, (150, SIMULATIONS))
    first, second = (rng.random(hard.shape) < hard for _ in range(2))
    only = (first & ~second).sum(axis=0), (second & ~first).sum(axis=0)
    found = np.array([mcnemar(int(a), int(b)) for a, b in zip(*only, strict=True)])
    exact, mid = (found <= 0.05).mean(axis=0)
    assert exact <= 0.05
    assert exact < mid <= 0.05 + 3.5 * math.sqrt(0.05 * 0.95 / SIMULATIONS)


def test_holm_keeps_the_family_wise_rate_and_is_not_idle():
    """Five comparisons of one baseline, none of which differs: 5 % of families hold a claim, uncorrected about 18 %."""
    rng = np.random.default_rng(4)
    baseline = rng.normal(size=(100, SIMULATIONS))
    found = []
    for _ in range(5):
        d = baseline - rng.normal(size=baseline.shape)
        found.append(2 * stdtr(99, -np.abs(d.mean(axis=0) / d.std(axis=0, ddof=1) * 10)))
    families = np.array(found).T
    corrected = np.array([holm(family.tolist()) for family in families])
    assert (corrected <= 0.05).any(axis=1).mean() <= 0.05 + 3.5 * math.sqrt(0.05 * 0.95 / SIMULATIONS)
    assert (corrected <= 0.05).any(axis=1).mean() > 0.03
    assert (families <= 0.05).any(axis=1).mean() > 0.15


def test_benjamini_hochberg_keeps_the_rate_of_false_discoveries():
    """Ten comparisons of which four differ: at most 6/10 of 5 % of the claims are false, on average."""
    rng = np.random.default_rng(5)
    z = rng.normal(size=(SIMULATIONS, 10)) + np.array([3.5] * 4 + [0.0] * 6)
    p = 2 * stdtr(10**6, -np.abs(z))
    claimed = np.array([benjamini_hochberg(row.tolist()) for row in p]) <= 0.05
    false = claimed[:, 4:].sum(axis=1) / np.maximum(claimed.sum(axis=1), 1)
    assert false.mean() == pytest.approx(0.03, abs=0.005)
    assert claimed[:, :4].mean() > 0.7


def test_power_is_what_it_says():
    """With as many prompts as needed, four in five evaluations find the difference."""
    rng = np.random.default_rng(6)
    prompts = prompts_needed(0.5, 0.1)
    d = rng.normal(0.1, 0.5, (prompts, SIMULATIONS))
    t = d.mean(axis=0) / d.std(axis=0, ddof=1) * math.sqrt(prompts)
    assert (2 * stdtr(prompts - 1, -np.abs(t)) <= 0.05).mean() == pytest.approx(0.8, abs=0.02)
