"""Statistics against numbers worked out elsewhere, and against what an interval promises: coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from objectives.stats import Z95, beats, clustered_stderr, clustered_wilson, macro_mean, mean_with_interval, wilson

SIX_PLACES = {"abs": 5.1e-7}  # numbers written with six places
ROUNDING = {"rel": 1e-12, "abs": 1e-15}  # the same float64 arithmetic in another order


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (45, 60, 0.627679, 0.842235),
        (0, 20, 0.0, 0.161125),
        (20, 20, 0.838875, 1.0),
        (58.5, 100, 0.487035, 0.676676),
    ],
)
def test_wilson(successes: float, n: int, low: float, high: float):
    assert wilson(successes, n) == (pytest.approx(low, **SIX_PLACES), pytest.approx(high, **SIX_PLACES))


def test_wilson_by_hand():
    """1 of 2 with z = 2: centre (0.5 + 1)/(1 + 2) = 0.5, half 2·√(0.125 + 0.25)/(1 + 2) = 0.4082482905."""
    low, high = wilson(1, 2, z=2.0)
    assert (low, high) == (pytest.approx(0.0917517095), pytest.approx(0.9082482905))


@given(n=st.integers(1, 500), share=st.floats(0, 1))
def test_wilson_limits_are_the_roots_of_the_score_test(n: int, share: float):
    """Its definition: at each limit q, (p − q)² = z²·q(1−q)/n."""
    p = round(share * n) / n
    low, high = wilson(round(share * n), n)
    assert 0 <= low <= p <= high <= 1
    for q in (low, high):
        assert (p - q) ** 2 == pytest.approx(Z95**2 * q * (1 - q) / n, abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (1, 0), (-1, 5), (6, 5), (math.nan, 5)])
def test_wilson_refuses_what_is_not_a_proportion(successes: float, n: int):
    with pytest.raises(ValueError, match="a proportion needs"):
        wilson(successes, n)


CLUSTERS = [0, 0, 0, 1, 1, 2, 2, 2, 2, 3]
SCORES = [1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]
BASELINE = [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]


def test_clustered_stderr():
    """Four prompts with 3, 2, 4 and 1 items, mean 0.7.

    residual sums 2 − 2.1 = −0.1, −1.4, 1.2, 0.3; squares 0.01 + 1.96 + 1.44 + 0.09 = 3.5
    √3.5/10 = 0.187083; times √(4/3) = 0.216025
    """
    assert clustered_stderr(SCORES, CLUSTERS) == pytest.approx(0.216025, **SIX_PLACES)


def test_clustered_stderr_of_paired_differences():
    differences = [a - b for a, b in zip(SCORES, BASELINE, strict=True)]
    estimate = mean_with_interval(differences, CLUSTERS)
    assert estimate.value == pytest.approx(0.3, **ROUNDING)
    assert estimate.stderr == pytest.approx(0.121106, **SIX_PLACES)
    assert estimate.stderr * math.sqrt(3 / 4) == pytest.approx(0.104881, **SIX_PLACES), "CR0, without G/(G − 1)"


def test_one_item_per_cluster_is_the_plain_standard_error():
    """sd/√n: 0.152753 for these scores, exactly, and the paired vector's 0.179435."""
    assert clustered_stderr(SCORES, range(10)) == pytest.approx(0.152753, **SIX_PLACES)
    first, second = [1, 1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1], [1, 0, 0, 1, 0, 0, 1, 0, 1, 1, 1, 0]
    differences = [float(a - b) for a, b in zip(first, second, strict=True)]
    estimate = mean_with_interval(differences, range(12))
    assert estimate.value == 0.25
    assert estimate.stderr == pytest.approx(0.179435, **SIX_PLACES)
    assert estimate.interval == "clustered-t"
    assert estimate.value / estimate.stderr == pytest.approx(1.393261, **SIX_PLACES)


@given(values=st.lists(st.floats(-100, 100), min_size=2, max_size=30))
def test_one_item_per_cluster_always_is(values: list[float]):
    plain = np.std(values, ddof=1) / math.sqrt(len(values))
    assert clustered_stderr(values, range(len(values))) == pytest.approx(plain, rel=1e-9, abs=1e-12)


def test_duplicated_items_teach_nothing():
    """Every item k times, in one cluster each: the same standard error, where the plain one would shrink by √k."""
    values = [0.1, 0.7, 0.4, 0.9]
    tripled = [value for value in values for _ in range(3)]
    prompts = [prompt for prompt in "abcd" for _ in range(3)]
    assert clustered_stderr(tripled, prompts) == pytest.approx(clustered_stderr(values, "abcd"), **ROUNDING)


def test_clusters_may_be_named_anything_and_lie_anywhere():
    """Names are not compared by order, and items of a cluster need not be neighbours."""
    names = {0: "b", 1: ("a", 1), 2: None, 3: 0}
    order = [9, 0, 4, 2, 7, 1, 3, 8, 5, 6]
    shuffled = clustered_stderr([SCORES[i] for i in order], [names[CLUSTERS[i]] for i in order])
    assert shuffled == pytest.approx(clustered_stderr(SCORES, CLUSTERS), **ROUNDING)


def test_one_cluster_has_no_standard_error():
    """Rather NaN than a number that means nothing."""
    assert math.isnan(clustered_stderr([1.0, 0.0], ["same", "same"]))
    estimate = mean_with_interval([0.5, 1.0], ["same", "same"])
    assert estimate.value == 0.75
    assert all(math.isnan(x) for x in (estimate.stderr, estimate.low, estimate.high))


def test_win_rate_with_ties():
    """Ties are one half and lead to a t interval, which is not clipped to [0, 1]."""
    estimate = mean_with_interval([1, 0.5, 0, 1, 1, 0.5, 1, 0, 1, 1], range(10))
    assert estimate.value == pytest.approx(0.7, **ROUNDING)
    assert estimate.stderr == pytest.approx(0.133333, **SIX_PLACES)
    assert (estimate.value - 0.5) / estimate.stderr == pytest.approx(1.5, **ROUNDING)
    assert estimate.low == pytest.approx(0.398379, **SIX_PLACES)
    assert estimate.high == pytest.approx(1.001621, **SIX_PLACES)
    assert (estimate.n, estimate.clusters, estimate.interval) == (10, 10, "clustered-t")


def test_independent_proportions_get_wilson():
    estimate = mean_with_interval([1.0] * 45 + [0.0] * 15, range(60))
    assert estimate.interval == "wilson"
    assert (estimate.value, estimate.n, estimate.clusters) == (0.75, 60, 60)
    assert (estimate.low, estimate.high) == wilson(45, 60)


def test_clustered_proportions_do_not():
    """Wilson would take the ten items for independent."""
    estimate = mean_with_interval(SCORES, CLUSTERS)
    assert (estimate.interval, estimate.n, estimate.clusters) == ("clustered-t", 10, 4)
    # t with 3 degrees of freedom: 3.182446 · 0.216025
    assert estimate.high - estimate.value == pytest.approx(0.687487, abs=2e-6)
    assert estimate.value - estimate.low == pytest.approx(0.687487, abs=2e-6)


@pytest.mark.parametrize(
    ("values", "clusters", "message"),
    [
        ([], [], "needs items"),
        ([1.0, 0.0], ["a"], "got 2 and 1"),
        ([1.0, math.nan], ["a", "b"], "item 1 is not finite"),
        ([-math.inf, 1.0], ["a", "b"], "item 0 is not finite"),
    ],
    ids=["none", "unequal", "nan", "infinite"],
)
def test_no_estimate_from_bad_items(values: list[float], clusters: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        mean_with_interval(values, clusters)


def test_ties_are_one_half():
    infinite = np.array([math.inf])
    assert beats(np.array([2.0, 1.0, 1.0]), np.array([1.0, 2.0, 1.0])).tolist() == [1.0, 0.0, 0.5]
    assert beats(infinite, infinite).tolist() == [0.5]


@pytest.mark.slow
@pytest.mark.parametrize("binary", [False, True], ids=["scores", "binary"])
def test_intervals_cover(binary: bool):
    """95 % of 4000 intervals, from 150 prompts with 1 to 4 correlated items each, contain the truth.

    Accepted is 94 to 96 %; by chance alone the share has a standard error of 0.34 %. Intervals that ignored the
    clusters would cover in about 85 %.
    """
    generator = np.random.default_rng(5)
    covered, prompts, trials = 0, 150, 4000
    for _ in range(trials):
        sizes = generator.integers(1, 5, prompts)
        clusters = np.repeat(np.arange(prompts), sizes)
        shared, own = generator.normal(size=prompts)[clusters], generator.normal(size=len(clusters))
        items = shared + 0.7 * own
        values = (items > 0).astype(float) if binary else items
        estimate = mean_with_interval(values.tolist(), clusters.tolist())
        covered += estimate.low <= (0.5 if binary else 0.0) <= estimate.high
    assert 0.94 <= covered / trials <= 0.96


@pytest.mark.slow
def test_wilson_intervals_cover():
    """The same for independent items; the average over true shares, since coverage of a proportion jumps with it."""
    generator = np.random.default_rng(6)
    covered, trials = 0, 4000
    for share in generator.uniform(0.1, 0.9, trials):
        items = (generator.random(100) < share).astype(float)
        estimate = mean_with_interval(items.tolist(), range(100))
        covered += estimate.low <= share <= estimate.high
    assert 0.94 <= covered / trials <= 0.96


# ---- mean over prompts ----


def test_macro_mean():
    """Prompt means 2/3, 0, 1, 1: mean 2/3; sd 0.471405, over √4 = 0.235702."""
    estimate = macro_mean(SCORES, CLUSTERS)
    assert estimate.value == pytest.approx(0.666667, **SIX_PLACES)
    assert estimate.stderr == pytest.approx(0.235702, **SIX_PLACES)
    assert (estimate.n, estimate.clusters, estimate.interval) == (10, 4, "clustered-t")


@given(values=st.lists(st.floats(-100, 100), min_size=2, max_size=30))
def test_macro_and_micro_are_one_where_prompts_are_equally_large(values: list[float]):
    doubled, prompts = [*values, *values[::-1]], [*range(len(values)), *range(len(values))[::-1]]
    macro, micro = macro_mean(doubled, prompts), mean_with_interval(doubled, prompts)
    assert macro.value == pytest.approx(micro.value, rel=1e-9, abs=1e-9)
    assert macro.stderr == pytest.approx(micro.stderr, rel=1e-9, abs=1e-9)


def test_macro_mean_of_one_answer_per_prompt_is_a_proportion():
    assert macro_mean([1.0] * 45 + [0.0] * 15, range(60)).interval == "wilson"
    with pytest.raises(ValueError, match="got 2 and 1"):
        macro_mean([1.0, 0.0], ["a"])
    with pytest.raises(ValueError, match="not finite"):
        macro_mean([1.0, math.nan], ["a", "b"])


def test_clustered_wilson_is_that_of_independent_items():
    """60 items in clusters of one: n_eff = p(1−p)/SE² = n − 1, since sd has n − 1 in it."""
    estimate = clustered_wilson([1.0] * 45 + [0.0] * 15, range(60))
    assert (estimate.low, estimate.high) == (
        pytest.approx(wilson(45 / 60 * 59, 59)[0], **ROUNDING),
        pytest.approx(wilson(45 / 60 * 59, 59)[1], **ROUNDING),
    )


def test_clustered_wilson_by_hand():
    """p = 0.7 and SE = 0.216025: n_eff = 0.21/0.0466667 = 4.5, and it stays in [0, 1] where t reaches 1.39."""
    estimate = clustered_wilson(SCORES, CLUSTERS)
    z, n, p = Z95, 4.5, 0.7
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    assert (estimate.low, estimate.high) == (pytest.approx(centre - half), pytest.approx(centre + half))
    assert mean_with_interval(SCORES, CLUSTERS).high > 1.3


def test_clustered_wilson_where_all_agree_counts_prompts():
    estimate = clustered_wilson([0.0] * 6, list("aabbcc"))
    assert (estimate.low, estimate.high) == wilson(0, 3)
    assert math.isnan(clustered_wilson([0.0, 1.0], ["a", "a"]).low)
    with pytest.raises(ValueError, match="0 or 1"):
        clustered_wilson([0.5, 1.0], ["a", "b"])


def test_differences_are_no_shares():
    """One prompt of a hundred got better: that nothing changed is not excluded."""
    changes = [1.0] + [0.0] * 99
    found = mean_with_interval(changes, range(100), shares=False)
    assert found.interval == "clustered-t"
    assert found.low < 0 < found.high
    assert mean_with_interval(changes, range(100)).interval == "wilson"
