"""Bootstrap intervals: vectors, plain resampling, and what BCa is by its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import bootstrap as scipy_bootstrap

from evals.bootstrap import bootstrapped, difference, drawn_blocks, mean_of_items, numbers_of
from evals.correlation import correlations, pearson, rank_correlation

CLUSTERS = [0, 0, 0, 1, 1, 2, 2, 2, 2, 3]
SCORES = [1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_cluster_bootstrap_of_the_vector():
    """Draws of default_rng(12345).integers(0, 4, (10000, 4)), ratio of sums."""
    statistic = mean_of_items(SCORES, CLUSTERS)
    found = bootstrapped(statistic, n=10, prompts=4, draws=10_000, seed=12345, method="percentile")
    assert (found.value, found.interval) == (pytest.approx(0.7), "bootstrap")
    assert (found.low, found.high) == (pytest.approx(0.222222, abs=5.1e-7), 1.0)
    assert found.stderr == pytest.approx(0.196416, abs=1.1e-5)


def test_draws_do_not_depend_on_blocks():
    whole = np.concatenate(list(drawn_blocks(7, 100, 3)))
    blocks = np.concatenate(list(drawn_blocks(7, 100, 3, width=100_000)))
    plain = np.random.default_rng(3).integers(0, 7, (100, 7))
    assert (whole == blocks).all()
    assert (whole == [[(row == i).sum() for i in range(7)] for row in plain]).all()


def test_the_paired_bootstrap_sees_the_same_draws():
    other = [1.0, 0, 0, 0, 0, 1, 0, 1, 0, 1]
    pair = difference(mean_of_items(SCORES, CLUSTERS), mean_of_items(other, CLUSTERS))
    direct = mean_of_items(np.subtract(SCORES, other), CLUSTERS)
    one, two = (bootstrapped(s, n=10, prompts=4, method="percentile") for s in (pair, direct))
    assert one.value == pytest.approx(0.3)
    assert (one.low, one.high, one.stderr) == pytest.approx((two.low, two.high, two.stderr))


def test_bca_is_scipy_s():
    """Of a skewed sample; scipy draws other samples, so ends agree up to the noise of 20000 draws."""
    values = np.random.default_rng(4).lognormal(size=15)
    theirs = scipy_bootstrap(
        (values,), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    ours = bootstrapped(mean_of_items(values, range(15)), n=15, prompts=15, draws=20_000, method="bca")
    assert ours.interval == "bootstrap-bca"
    assert (ours.low, ours.high) == (pytest.approx(theirs.low, rel=0.02), pytest.approx(theirs.high, rel=0.02))
    plain = bootstrapped(mean_of_items(values, range(15)), n=15, prompts=15, draws=20_000, method="percentile")
    assert ours.low > plain.low
    assert ours.high > plain.high, "the long tail is to the right"


def test_one_prompt_has_no_interval_and_samples_without_a_value_are_left_out():
    assert math.isnan(bootstrapped(mean_of_items([1.0, 0.0], "aa"), n=2, prompts=1).low)

    def fragile(drawn: np.ndarray) -> np.ndarray:
        values = drawn @ np.arange(30.0) / 30
        return np.where(drawn[:, 0] > 1, np.nan, values)

    assert bootstrapped(fragile, n=30, prompts=30).stderr > 0
    few = bootstrapped(lambda drawn: np.where(drawn.max(axis=1) > 1, np.nan, drawn[:, 0]), n=9, prompts=9)
    assert few.value == 1
    assert math.isnan(few.low), "hardly any sample has a value"


def test_prompts_are_numbered_as_they_come():
    assert numbers_of(["b", None, "b", ("a",), None]).tolist() == [0, 1, 0, 2, 1]


# ---- correlations ----


def test_correlations_of_repeated_items():
    """As numpy and scipy give them of the repeated columns."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=12).round(1), rng.normal(size=12)
    times = rng.integers(0, 4, (5, 12)).astype(float)
    for i, row in enumerate(times.astype(int)):
        many_x, many_y = np.repeat(x, row), np.repeat(y, row)
        assert pearson(x, y, times)[i] == pytest.approx(np.corrcoef(many_x, many_y)[0, 1])
        ranks = [np.array([(np.sum(v < u) + np.sum(v <= u) + 1) / 2 for u in v]) for v in (many_x, many_y)]
        assert rank_correlation(x, y, times)[i] == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_correlations_have_intervals_over_prompts():
    rng = np.random.default_rng(2)
    x = rng.normal(size=200)
    found = correlations(x, x + rng.normal(size=200), range(200))
    for name in ("spearman", "pearson"):
        assert found[name].low < 0.7 < found[name].high
        assert found[name].high - found[name].low < 0.25
    doubled = correlations(np.tile(x, 2), np.tile(-x, 2), list(range(200)) * 2)
    assert doubled["pearson"].value == pytest.approx(-1)
    assert doubled["pearson"].clusters == 200


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        ([1.0, 2], [1.0, 2], "three items or more"),
        ([1.0, 2, 3], [1.0, 2], "three items or more"),
        ([1.0, 2, math.nan], [1.0, 2, 3], "first column holds a value that is not finite"),
        ([1.0, 2, 3], [2.0, 2, 2], "every value of the second column is 2"),
    ],
)
def test_what_has_no_correlation(x: list[float], y: list[float], says: str):
    with pytest.raises(ValueError, match=says):
        correlations(np.array(x), np.array(y), range(len(x)))
