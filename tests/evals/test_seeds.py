"""Several training seeds: by hand, by analysis of variance, and by coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evals.seeds import difference_over_seeds, over_seeds


def simulated(
    rng: np.random.Generator, seeds: int, prompts: int, *, hard: np.ndarray, shift: float = 0.0
) -> np.ndarray:
    """Seeds differ by 0.03, prompts by ``hard``, answers by 0.3."""
    return 0.5 + shift + rng.normal(0, 0.03, (seeds, 1)) + hard + rng.normal(0, 0.3, (seeds, prompts))


def test_seeds_that_agree_leave_the_spread_of_prompts():
    scores = np.tile(np.random.default_rng(0).normal(size=400), (3, 1))
    found = over_seeds(scores)
    assert found.value == pytest.approx(scores.mean())
    # sd/√400, times √(3/2) for the three seeds
    assert found.stderr == pytest.approx(scores[0].std() / 20 * math.sqrt(1.5), rel=0.06)
    assert (found.n, found.clusters, found.interval) == (1200, 3, "bootstrap-over-seeds-t")


def test_prompts_that_agree_leave_the_spread_of_seeds():
    """Seed means 0.4, 0.5, 0.6: sd 0.1, over √3; the bootstrap's variance is (S − 1)/S of that, which is put right."""
    found = over_seeds(np.repeat([[0.4], [0.5], [0.6]], 50, axis=1))
    assert found.stderr == pytest.approx(0.1 / math.sqrt(3), rel=0.05)
    assert found.high - found.value == pytest.approx(4.302653 * found.stderr)


@pytest.mark.slow
def test_coverage_with_five_seeds():
    rng = np.random.default_rng(1)
    covered = differences = false = 0
    trials = 600
    for trial in range(trials):
        hard = rng.normal(0, 0.3, 100)
        one, two = simulated(rng, 5, 100, hard=hard), simulated(rng, 5, 100, hard=hard)
        found = over_seeds(one, draws=400, seed=trial)
        covered += found.low <= 0.5 <= found.high
        estimate, p = difference_over_seeds(one, two, draws=400, seed=trial)
        differences += estimate.low <= 0 <= estimate.high
        false += p <= 0.05
    # Crossed resampling never gives too small a variance, and t with few degrees of freedom is wide: from 94 % up.
    assert covered / trials >= 0.94
    assert differences / trials >= 0.94
    assert false == trials - differences, "p-value and interval say the same"


def test_differences_are_paired_by_prompt():
    rng = np.random.default_rng(2)
    hard = rng.normal(0, 3, 200)
    one, two = simulated(rng, 4, 200, hard=hard, shift=0.3), simulated(rng, 3, 200, hard=hard)
    estimate, p = difference_over_seeds(one, two)
    assert estimate.value == pytest.approx(0.3, abs=0.1)
    assert estimate.stderr < 0.1, "prompts differ by 3, which both methods share"
    assert p < 0.01
    assert difference_over_seeds(one, one[:, ::-1])[0].stderr > 0.2
    same, certain = difference_over_seeds(np.ones((2, 3)), np.ones((2, 3)))
    assert (same.value, same.stderr, certain) == (0, 0, 1.0)


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        (np.ones((1, 5)), "two training seeds or more"),
        (np.ones(5), "shape \\(5,\\)"),
        (np.ones((2, 0)), "say nothing"),
        (np.array([[1.0, math.nan], [1, 1]]), "not finite"),
    ],
)
def test_what_says_nothing_of_a_method(scores: np.ndarray, says: str):
    with pytest.raises(ValueError, match=says):
        over_seeds(scores)


def test_methods_share_their_prompts():
    with pytest.raises(ValueError, match="3 and 2 prompts"):
        difference_over_seeds(np.ones((2, 3)), np.ones((2, 2)))
