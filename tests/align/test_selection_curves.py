"""Curves over the number of samples: exact ones against all subsets, the others against one selection at a time."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align import selection_curves
from align.selection import (
    SELECTIONS,
    BestOfMajority,
    BestOfN,
    BestOfNAnswers,
    Majority,
    Samples,
    Scoring,
    Selection,
    SoftBestOfN,
    WeightedMajority,
    group_samples,
)
from align.selection_curves import best_of_n_weights, pass_at_k, pass_at_k_curve, random_orders, selection_curve
from objectives.stats import mean_with_interval

ANSWERS = [7, 12, 7, 9, 12, 7, 5, 9, 12, 7]
REWARDS = [0.2, 0.9, 0.3, 2.5, 0.8, 0.1, 1.9, -1.0, 0.7, 0.4]


def right_of(samples: Samples, *truths: Any) -> list[bool]:
    return [answer in truths for answer in samples.answers]


def with_only(samples: Samples, members: tuple[int, ...]) -> Samples:
    """The samples as if no others had been drawn, in their order."""
    answers = [None if samples.group[i] < 0 else samples.answers[samples.group[i]] for i in members]
    return group_samples(answers, samples.rewards[list(members)].tolist())


def hit(strategy: Selection, samples: Samples, truths: set[Any]) -> bool:
    return any(each.answer in truths for each in strategy(samples).picks)


# ---- closed forms ----


def test_best_of_n_by_the_sheet():
    samples = group_samples(ANSWERS, REWARDS)
    curve = selection_curve(BestOfN(), [samples], [right_of(samples, 12)], [1, 2, 4, 10])
    np.testing.assert_allclose(curve.per_prompt, [[0.3, 0.4, 0.309524, 0.0]], atol=5e-7)
    assert curve.sizes == (1, 2, 4, 10)
    assert curve.subsets is None


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [(10, 3, 1, 0.3), (10, 3, 2, 0.533333), (10, 3, 5, 0.916667), (200, 3, 100, 0.876884), (10, 8, 3, 1.0)],
)
def test_pass_at_k(n: int, c: int, k: int, expected: float):
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=5e-7)


@given(n=st.integers(1, 40), data=st.data())
def test_pass_at_k_is_a_share_of_all_subsets(n: int, data: st.DataObject):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    assert pass_at_k(n, c, k) == pytest.approx(1 - math.comb(n - c, k) / math.comb(n, k), rel=1e-12, abs=1e-15)


some_samples = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c", None]), st.integers(0, 4).map(lambda n: n / 4)), min_size=1, max_size=7
)


@given(drawn=some_samples)
def test_exact_curves_are_averages_over_all_subsets(drawn: list[tuple[str | None, float]]):
    """Ties and unparsable samples included: each subset of each size, one selection at a time."""
    samples = group_samples([answer for answer, _ in drawn], [reward for _, reward in drawn])
    sizes = range(1, len(drawn) + 1)
    best, any_right = [], []
    for size in sizes:
        subsets = [with_only(samples, members) for members in itertools.combinations(range(len(drawn)), size)]
        best.append(np.mean([hit(BestOfN(), subset, {"a", "c"}) for subset in subsets]))
        any_right.append(np.mean([bool({"a", "c"} & set(subset.answers)) for subset in subsets]))
    correct = [right_of(samples, "a", "c")]
    np.testing.assert_allclose(selection_curve(BestOfN(), [samples], correct, sizes).per_prompt, [best], atol=1e-12)
    np.testing.assert_allclose(pass_at_k_curve([samples], correct, sizes).per_prompt, [any_right], atol=1e-12)


def test_best_of_n_weights_are_ratios_of_binomials():
    found = best_of_n_weights(60, range(1, 61))
    for m, rank in itertools.product(range(1, 61), range(60)):
        expected = math.comb(rank, m - 1) / math.comb(60, m)
        assert found[m - 1, rank] == pytest.approx(expected, rel=1e-12)
    many = best_of_n_weights(2000, [1, 7, 1000, 2000])  # C(2000, 1000) is beyond float64
    np.testing.assert_allclose(many.sum(axis=1), 1.0, rtol=1e-12)
    assert best_of_n_weights(1, [1]).tolist() == [[1.0]]


# ---- random subsets ----

STRATEGIES: list[Scoring] = [
    Majority(),
    Majority(k=2),
    BestOfNAnswers(),
    BestOfNAnswers(k=2, aggregation="max"),
    BestOfNAnswers(aggregation="sum"),
    WeightedMajority(weights="reward"),
    WeightedMajority(weights="softmax", beta=0.2),
    BestOfMajority(alpha=0.2),
    BestOfMajority(alpha=0.3, k=2, aggregation="sum"),
    BestOfMajority(alpha=0.9, aggregation="max"),
]


def drawn_samples(seed: int, n: int, number: int = 0) -> Samples:
    """Some answers are frequent, some not; quarters tie; one in eight cannot be parsed."""
    draws = np.random.default_rng([seed, number])
    answers = [None if draws.random() < 0.125 else "abcdef"[int(6 * draws.random() ** 2)] for _ in range(n)]
    return group_samples(answers, (draws.integers(0, 9, n) / 4).tolist())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_curves_agree_with_one_selection_at_a_time(strategy: Scoring, monkeypatch: pytest.MonkeyPatch):
    """The same 200 subsets of two prompts at three sizes, one selection after the other; in pieces of any size."""
    pool = [drawn_samples(1, 24, number) for number in range(2)]
    truths, sizes = {"b", "d"}, [2, 7, 24]
    right = [right_of(one, *truths) for one in pool]
    curve = selection_curve(strategy, pool, right, sizes, seed=5)
    assert curve.subsets == 200
    for number, one in enumerate(pool):
        orders = random_orders(24, 200, (5, number))
        for column, size in enumerate(sizes):
            hits = [hit(strategy, with_only(one, tuple(sorted(order[:size]))), truths) for order in orders]
            assert curve.per_prompt[number, column] == pytest.approx(np.mean(hits)), (number, size)
    monkeypatch.setattr(selection_curves, "CELLS", 100)
    np.testing.assert_allclose(selection_curve(strategy, pool, right, sizes, seed=5).per_prompt, curve.per_prompt)


def test_random_orders_are_uniform_and_seeded():
    orders = random_orders(4, 24_000, (1, 2))
    places = np.unique(orders, axis=0, return_counts=True)
    assert len(places[0]) == 24
    assert (abs(places[1] - 1000) < 5 * math.sqrt(1000)).all()
    assert np.array_equal(orders, random_orders(4, 24_000, (1, 2)))
    assert not np.array_equal(orders, random_orders(4, 24_000, (1, 3)))


@pytest.mark.slow
def test_random_subsets_come_near_all_subsets():
    """20,000 subsets against all of them: within 0.02, more than five standard errors."""
    samples = drawn_samples(2, 9)
    sizes = range(1, 10)
    curve = selection_curve(Majority(), [samples], [right_of(samples, "a")], sizes, subsets=20_000)
    exact = [
        np.mean(
            [hit(Majority(), with_only(samples, members), {"a"}) for members in itertools.combinations(range(9), size)]
        )
        for size in sizes
    ]
    np.testing.assert_allclose(curve.per_prompt[0], exact, atol=0.02)


def test_soft_best_of_n_in_a_curve_draws_as_it_does_alone():
    """All samples each time, so only the draw varies: the share of draws with a right answer among them."""
    samples = group_samples(ANSWERS, REWARDS)
    p = dict(zip(samples.answers, SoftBestOfN().probabilities(samples), strict=True))
    for k, expected in ((1, p[12]), (2, p[12] + sum(p[a] * p[12] / (1 - p[a]) for a in p if a != 12))):
        curve = selection_curve(SoftBestOfN(k=k), [samples], [right_of(samples, 12)], [10], subsets=20_000, seed=1)
        assert curve.per_prompt[0, 0] == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("name", SELECTIONS.names())
def test_a_single_sample_is_right_as_often_as_the_policy(name: str):
    """Whatever selects, there is nothing to select from."""
    samples = drawn_samples(3, 40)
    right = right_of(samples, "a")
    curve = selection_curve(SELECTIONS[name](), [samples], [right], [1], subsets=4000)
    assert curve.per_prompt[0, 0] == pytest.approx(pass_at_k_curve([samples], [right], [1]).per_prompt[0, 0], abs=0.04)


@pytest.mark.parametrize("name", SELECTIONS.names())
def test_no_curve_passes_pass_at_k_and_where_nothing_is_right_all_are_zero(name: str):
    pool = [drawn_samples(4, 16, number) for number in range(4)]
    right = [right_of(one, "b") for one in pool]
    sizes = [1, 4, 16]
    found = selection_curve(SELECTIONS[name](), pool, right, sizes, subsets=1000).per_prompt
    assert (found <= pass_at_k_curve(pool, right, sizes).per_prompt + 0.06).all()
    nothing = [[False] * len(one.answers) for one in pool]
    assert not selection_curve(SELECTIONS[name](), pool, nothing, sizes).per_prompt.any()


def test_a_prompt_without_any_answer_counts_as_wrong():
    pool = [group_samples([None, None], [1.0, 2.0]), group_samples(["a", "a"], [1.0, 2.0])]
    for strategy in (BestOfN(), Majority(), BestOfMajority()):
        curve = selection_curve(strategy, pool, [[], [True]], [1, 2])
        assert curve.per_prompt.tolist() == [[0.0, 0.0], [1.0, 1.0]]
        assert [each.value for each in curve.estimates] == [0.5, 0.5]


def test_curves_are_repeatable_and_need_few_sizes():
    """A size's number does not depend on which others are asked for."""
    pool = [drawn_samples(5, 20, number) for number in range(2)]
    right = [right_of(one, "a") for one in pool]
    every = selection_curve(BestOfMajority(alpha=0.2), pool, right, range(1, 21), seed=3)
    some = selection_curve(BestOfMajority(alpha=0.2), pool, right, [3, 11], seed=3)
    assert np.array_equal(every.per_prompt[:, [2, 10]], some.per_prompt)
    other = selection_curve(BestOfMajority(alpha=0.2), pool, right, [3, 11], seed=4)
    assert not np.array_equal(other.per_prompt, some.per_prompt)


# ---- intervals ----


def test_intervals_take_prompts_as_clusters():
    pool = [drawn_samples(6, 12, number) for number in range(6)]
    right = [right_of(one, "a") for one in pool]
    curve = selection_curve(Majority(), pool, right, [4, 12])
    for column in range(2):
        assert curve.estimates[column] == mean_with_interval(curve.per_prompt[:, column].tolist(), range(6))
    assert curve.estimates[1].interval == "wilson"  # all samples: each prompt is right or wrong
    twice = selection_curve(Majority(), pool, right, [4, 12], prompts=["x", "x", "y", "y", "z", "z"])
    assert [each.clusters for each in twice.estimates] == [3, 3]
    assert twice.estimates[0].value == curve.estimates[0].value


# ---- bad input ----


def test_what_does_not_fit_is_told():
    one, two = drawn_samples(7, 6), drawn_samples(7, 4, 1)
    right = [right_of(one, "a"), right_of(two, "a")]
    for curve in (lambda *given: selection_curve(Majority(), *given), pass_at_k_curve):
        with pytest.raises(ValueError, match="needs prompts and which of their answers are right, got 0 and 0"):
            curve([], [], [1])
        with pytest.raises(ValueError, match="got 2 and 1"):
            curve([one, two], right[:1], [1])
        with pytest.raises(ValueError, match=r"prompt 1 has \d answers, and correct has 0 values for it"):
            curve([one, two], [right[0], []], [1])
        with pytest.raises(ValueError, match="prompt 1 has 4 samples, and the curve goes to 5; sample more"):
            curve([one, two], right, [1, 5])
        for sizes in ([], [0, 1], [2, 1], [2, 2]):
            with pytest.raises(ValueError, match=r"^sizes must be increasing, and 1 or more"):
                curve([one, two], right, sizes)
    with pytest.raises(ValueError, match=r"^subsets must be >= 200, got 199"):
        selection_curve(Majority(), [one], right[:1], [1], subsets=199)
    with pytest.raises(ValueError, match=r"^seed must be >= 0"):
        selection_curve(Majority(), [one], right[:1], [1], seed=-1)
    for n, c, k, named in ((0, 0, 1, "n"), (3, 4, 1, "c"), (3, -1, 1, "c"), (3, 1, 4, "k"), (3, 1, 0, "k")):
        with pytest.raises(ValueError, match=f"^{named} must be "):
            pass_at_k(n, c, k)
