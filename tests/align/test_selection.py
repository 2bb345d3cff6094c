"""Selections: the numbers of their papers, the same rules as plain loops, and laws that hold for all of them."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import FrozenInstanceError, fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare  # pyright: ignore[reportMissingTypeStubs]

from align.selection import (
    SELECTIONS,
    BestOfMajority,
    BestOfN,
    BestOfNAnswers,
    Choice,
    Majority,
    Samples,
    Selection,
    SoftBestOfN,
    WeightedMajority,
    group_samples,
)
from objectives.registry import field_docs, formula, source

every_strategy = pytest.mark.parametrize("name", SELECTIONS.names())

ANSWERS = [7, 12, 7, 9, 12, 7, 5, 9, 12, 7]
REWARDS = [0.2, 0.9, 0.3, 2.5, 0.8, 0.1, 1.9, -1.0, 0.7, 0.4]


def chosen(choice: Choice) -> list[Hashable]:
    return [each.answer for each in choice.picks]


def vector() -> Samples:
    return group_samples(ANSWERS, REWARDS)


def group(samples: Sequence[tuple[str | None, float]]) -> Samples:
    return group_samples([answer for answer, _ in samples], [reward for _, reward in samples])


# ---- the same rules as plain loops ----


def plain(
    name: str, settings: dict[str, Any], answers: Sequence[Hashable], rewards: Sequence[float]
) -> tuple[list[Hashable], list[int]]:
    """Chosen answers and the samples to show for them, in the words of the papers."""
    members: dict[Hashable, list[int]] = {}
    for i in range(len(answers)):
        if answers[i] is not None:
            if answers[i] not in members:
                members[answers[i]] = []
            members[answers[i]].append(i)
    if name == "best_of_n":
        best = None
        for i in range(len(answers)):
            if answers[i] is not None and (best is None or rewards[i] > rewards[best]):
                best = i
        return ([], []) if best is None else ([answers[best]], [best])

    def together(a: Hashable) -> float:
        of = [rewards[i] for i in members[a]]
        how = settings.get("aggregation", "mean")
        return sum(of) / len(of) if how == "mean" else max(of) if how == "max" else sum(of)

    scores: dict[Hashable, float] = {}
    if name == "majority":
        scores = {a: len(of) for a, of in members.items()}
    elif name == "weighted_majority" and settings["weights"] == "reward":
        scores = {a: sum(rewards[i] for i in of) for a, of in members.items()}
    elif name == "weighted_majority":
        top = max(rewards)
        scores = {
            a: math.fsum(math.exp((rewards[i] - top) / settings["beta"]) for i in of) for a, of in members.items()
        }
    elif name == "best_of_n_answers":
        scores = {a: together(a) for a in members}
    elif name == "best_of_majority":
        gate = settings["alpha"]
        frequency = {a: len(of) / len(answers) for a, of in members.items()}
        if members and max(frequency.values()) < gate:
            gate = max(frequency.values())
        scores = {a: together(a) for a in members if frequency[a] >= gate}
    ordered = sorted(scores, key=lambda a: -scores[a])  # stable, and dictionaries keep the order of first members
    best_answers = ordered[: settings["k"]]
    show = []
    for a in best_answers:
        index = members[a][0]
        for i in members[a]:
            if rewards[i] > rewards[index]:
                index = i
        show.append(index)
    return best_answers, show


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("best_of_n", {}),
    *[("majority", {"k": k}) for k in (1, 3)],
    *[
        ("best_of_n_answers", {"k": k, "aggregation": how})
        for k, how in ((1, "mean"), (2, "mean"), (2, "max"), (1, "sum"))
    ],
    *[("weighted_majority", {"k": k, "weights": "reward"}) for k in (1, 2)],
    *[("weighted_majority", {"k": k, "weights": "softmax", "beta": beta}) for k, beta in ((1, 0.5), (2, 4.0))],
    *[
        ("best_of_majority", {"k": k, "alpha": alpha, "aggregation": how})
        for k, alpha, how in (
            (1, 0.0, "mean"),
            (2, 0.2, "mean"),
            (1, 0.25, "max"),
            (9, 0.3, "mean"),
            (2, 0.5, "sum"),
            (1, 1.0, "mean"),
        )
    ],
]
every_setting = pytest.mark.parametrize(
    ("name", "settings"),
    SETTINGS,
    ids=lambda each: each if isinstance(each, str) else "-".join(map(str, each.values())),
)

# Quarters: sums and means of a few of them are exact or nearly so, and ties are frequent.
some_samples = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c", "d", None]), st.integers(0, 6).map(lambda n: n / 4)),
    min_size=1,
    max_size=12,
)


@pytest.mark.slow
@every_setting
@given(samples=some_samples)
def test_rules_agree_with_plain_loops(name: str, settings: dict[str, Any], samples: list[tuple[str | None, float]]):
    answers, rewards = [a for a, _ in samples], [r for _, r in samples]
    choice = SELECTIONS[name](**settings)(group_samples(answers, rewards))
    expected, show = plain(name, settings, answers, rewards)
    assert chosen(choice) == expected
    assert [each.index for each in choice.picks] == show
    for each in choice.picks:
        of = [r for a, r in samples if a == each.answer]
        assert each.count == len(of)
        assert each.mean_reward == pytest.approx(sum(of) / len(of))


# ---- the numbers of the sheet ----


def test_groups():
    samples = vector()
    assert samples.answers == (7, 12, 9, 5)
    every = BestOfNAnswers(k=4)(samples).picks
    found = {each.answer: (each.count / 10, each.mean_reward, each.index) for each in every}
    assert found == {
        7: (0.4, pytest.approx(0.25), 9),
        12: (0.3, pytest.approx(0.8), 1),
        9: (0.2, pytest.approx(0.75), 3),
        5: (0.1, pytest.approx(1.9), 6),
    }


@pytest.mark.parametrize(
    ("alpha", "expected", "survivors", "fallback"),
    [(0.0, [5, 12], 4, False), (0.15, [12, 9], 3, False), (0.25, [12, 7], 2, False), (0.5, [7], 1, True)],
)
def test_best_of_majority(alpha: float, expected: list[int], survivors: int, fallback: bool):
    choice = BestOfMajority(alpha=alpha, k=2)(vector())
    assert chosen(choice) == expected
    assert (choice.n_survivors, choice.fallback_used) == (survivors, fallback)


def test_best_of_majority_by_maximum():
    assert chosen(BestOfMajority(alpha=0.15, k=2, aggregation="max")(vector())) == [9, 12]


def test_best_of_n_and_votes():
    assert chosen(BestOfN()(vector())) == [9]
    assert BestOfN()(vector()).picks[0].index == 3
    assert chosen(Majority()(vector())) == [7]
    assert chosen(Majority(k=3)(vector())) == [7, 12, 9]


def test_weighted_majority():
    """12 has 0.9 + 0.8 + 0.7 = 2.4. One reward is negative, so as weights they are refused; as sums they are not."""
    best = BestOfNAnswers(aggregation="sum")(vector()).picks[0]
    assert best.answer == 12
    assert best.mean_reward * best.count == pytest.approx(2.4)
    raised = group_samples(ANSWERS, [max(reward, 0.0) for reward in REWARDS])
    assert chosen(WeightedMajority(weights="reward", k=2)(raised)) == [9, 12]  # 9 without its −1
    np.testing.assert_allclose(
        WeightedMajority(weights="reward").shares(raised), np.array([1.0, 2.4, 2.5, 1.9]) / 7.8, rtol=1e-12
    )


def test_softmax_weights():
    strategy = WeightedMajority(weights="softmax", beta=1.0)
    np.testing.assert_allclose(strategy.shares(vector()), [0.166164, 0.215375, 0.403505, 0.214957], atol=5e-7)
    assert chosen(strategy(vector())) == [9]


def test_soft_best_of_n_probabilities():
    found = SoftBestOfN(beta=1.0).probabilities(vector())
    np.testing.assert_allclose(found, [0.225935, 0.293702, 0.186252, 0.294110], atol=5e-7)


# ---- grouping ----


def test_the_same_answer_in_other_words():
    """Greedy: with "differs by at most one", 1 takes 0 and 2; from 0 on, 2 is too far and opens a group."""

    def near(first: int, answer: int) -> bool:
        return abs(first - answer) <= 1

    assert group_samples([1, 0, 2], [0.0] * 3, near).answers == (1,)
    samples = group_samples([0, 1, 2, 1, 2], [0.0] * 5, near)
    assert samples.answers == (0, 2)
    assert samples.group.tolist() == [0, 0, 1, 0, 1]


@given(st.lists(st.one_of(st.none(), st.integers(0, 9)), min_size=1, max_size=30))
def test_grouping_by_plain_loops(answers: list[int | None]):
    """Scan in order, join the first group whose first member is the same; asked once for an answer and a group."""
    asked: Counter[tuple[int, int]] = Counter()

    def same(first: int, answer: int) -> bool:
        asked[first, answer] += 1
        return abs(first - answer) <= 2

    groups: list[list[int]] = []
    for i, answer in enumerate(answers):
        if answer is not None:
            for members in groups:
                if abs((answers[members[0]] or 0) - answer) <= 2:
                    members.append(i)
                    break
            else:
                groups.append([i])
    found = group_samples(answers, [0.0] * len(answers), same)
    assert [np.flatnonzero(found.group == g).tolist() for g in range(len(found.answers))] == groups
    assert found.answers == tuple(answers[members[0]] for members in groups)
    assert not asked or max(asked.values()) == 1


def test_unparsable_samples_count_but_are_never_chosen():
    """2 of 5 have the answer a: a share of 0.4, where of the parsable ones it would be 1."""
    samples = group_samples([None, "a", None, "a", None], [9.0, 1.0, 9.0, 2.0, 9.0])
    for name in SELECTIONS.names():
        assert chosen(SELECTIONS[name]()(samples)) == ["a"], name
    assert not BestOfMajority(alpha=0.4)(samples).fallback_used
    assert BestOfMajority(alpha=0.41)(samples).fallback_used


@every_strategy
def test_nothing_parsable_nothing_chosen(name: str):
    choice = SELECTIONS[name]()(group_samples([None, None], [1.0, 2.0]))
    assert choice == Choice(picks=(), n_survivors=0, fallback_used=False)


def test_responses_without_answers_are_their_own():
    assert BestOfN()(group_samples(range(3), [0.0, 5.0, 5.0])).picks[0].index == 1


# ---- laws ----


@every_strategy
def test_strategies_are_frozen_and_documented(name: str):
    cls = SELECTIONS[name]
    strategy = cls()
    assert isinstance(strategy, Selection)
    assert SELECTIONS.name_of(strategy) == name
    assert formula(cls)
    assert "arXiv:" in source(cls)
    assert set(field_docs(cls)) >= {each.name for each in fields(cls)}
    if fields(cls):
        with pytest.raises(FrozenInstanceError):
            setattr(strategy, fields(cls)[0].name, 1)


@pytest.mark.slow
@every_setting
@given(samples=some_samples, seed=st.integers(0, 99))
def test_equal_samples_may_change_places(
    name: str, settings: dict[str, Any], samples: list[tuple[str | None, float]], seed: int
):
    """Rewards move among samples with the same answer: the same answers are chosen, with the same samples' rewards."""
    strategy = SELECTIONS[name](**settings)
    moved = list(samples)
    for answer in {a for a, _ in samples}:
        places = [i for i, (a, _) in enumerate(samples) if a == answer]
        for place, origin in zip(places, np.random.default_rng(seed).permutation(places), strict=True):
            moved[place] = samples[origin]
    before = strategy(group(samples))
    after = strategy(group(moved))
    if name == "best_of_n":  # of equal rewards the first sample wins, whichever answer it has
        assert [samples[each.index][1] for each in before.picks] == [moved[each.index][1] for each in after.picks]
        return
    assert chosen(before) == chosen(after)
    assert [samples[each.index][1] for each in before.picks] == [moved[each.index][1] for each in after.picks]


@given(samples=some_samples, k=st.integers(1, 5), how=st.sampled_from(["mean", "max", "sum"]))
def test_without_a_gate_best_of_majority_is_best_of_n_over_answers(
    samples: list[tuple[str | None, float]], k: int, how: Any
):
    grouped = group(samples)
    assert BestOfMajority(alpha=0.0, k=k, aggregation=how)(grouped) == BestOfNAnswers(k=k, aggregation=how)(grouped)


@given(samples=some_samples)
def test_with_the_gate_at_the_top_best_of_majority_is_a_vote(samples: list[tuple[str | None, float]]):
    """Where one answer alone is the most frequent; among several, rewards decide where a vote takes the first."""
    answers = Counter(a for a, _ in samples if a is not None)
    grouped = group(samples)
    if not answers:
        return
    most = max(answers.values())
    modal = {a for a, count in answers.items() if count == most}
    choice = BestOfMajority(alpha=most / len(samples))(grouped)
    assert choice.n_survivors == len(modal)
    assert not choice.fallback_used
    assert chosen(choice)[0] in modal
    if len(modal) == 1:
        assert chosen(choice) == chosen(Majority()(grouped))
    beyond = BestOfMajority(alpha=1.0)(grouped)
    assert chosen(beyond) == chosen(choice)
    assert beyond.fallback_used == (most < len(samples))


@given(samples=some_samples, seed=st.integers(0, 99))
def test_votes_do_not_look_at_rewards(samples: list[tuple[str | None, float]], seed: int):
    answers = [a for a, _ in samples]
    other = np.random.default_rng(seed).normal(size=len(answers)).tolist()
    for k in (1, 3):
        by_rewards = Majority(k=k)(group_samples(answers, [r for _, r in samples]))
        assert chosen(by_rewards) == chosen(Majority(k=k)(group_samples(answers, other)))


@every_strategy
@given(samples=some_samples)
def test_with_more_asked_for_than_there_are_all_survivors_come_once(name: str, samples: list[tuple[str | None, float]]):
    if name == "best_of_n":
        return
    choice = SELECTIONS[name](k=99)(group(samples))
    assert len(choice.picks) == choice.n_survivors == len(set(chosen(choice)))
    fewer = SELECTIONS[name](k=2)(group(samples))
    assert fewer.picks == choice.picks[:2]


@pytest.mark.parametrize("reward", [0.1, 1e-5, 1e12 / 3])
@pytest.mark.parametrize("strategy", [BestOfNAnswers(), BestOfMajority(alpha=0.1)], ids=["answers", "majority"])
def test_equal_rewards_have_equal_means(strategy: Selection, reward: float):
    """Three times 0.1 is 0.30000000000000004: its third would beat a single 0.1, which came first."""
    assert chosen(strategy(group_samples(["one", "three", "three", "three"], [reward] * 4))) == ["one"]


@pytest.mark.parametrize(
    "strategy",
    [BestOfNAnswers(), BestOfNAnswers(aggregation="sum"), WeightedMajority(weights="softmax", beta=0.3)],
    ids=["mean", "sum", "softmax"],
)
def test_sums_do_not_depend_on_their_order(strategy: Selection):
    """0.1 + 0.2 + 0.3 and 0.3 + 0.2 + 0.1 differ in float64; answers with the same rewards tie, and the first wins."""
    values = [0.1, 0.2, 0.3, 0.7, 1.9]
    for order in itertools.permutations(values):
        assert chosen(strategy(group_samples(["a"] * 5 + ["b"] * 5, [*order, *values]))) == ["a"]


def test_softmax_from_one_sample_to_a_vote():
    """At a small β the best sample decides, at a large one all weigh the same; neither overflows."""
    samples = group_samples(["a", "a", "b"], [0.0, 100.0, 101.0])
    assert chosen(WeightedMajority(weights="softmax", beta=1e-3, k=2)(samples)) == ["b", "a"]
    assert chosen(WeightedMajority(weights="softmax", beta=1e6)(samples)) == ["a"]
    far = group_samples(["a", "b", "c"], [-3.0, 0.0, -2.0])
    assert chosen(WeightedMajority(weights="softmax", beta=1e-4, k=3)(far)) == ["b", "c", "a"]


# ---- soft best-of-N ----


@pytest.mark.slow
def test_soft_best_of_n_draws_from_its_distribution():
    """4,000 prompts with the same samples: first answers as P says, pairs as P says of what is left."""
    first: Counter[Hashable] = Counter()
    pairs: Counter[tuple[Hashable, ...]] = Counter()
    strategy = SoftBestOfN(k=2, seed=3)
    for number in range(4000):
        drawn = chosen(strategy(group_samples(ANSWERS, REWARDS, number=number)))
        first[drawn[0]] += 1
        pairs[tuple(drawn)] += 1
    answers = vector().answers
    p = dict(zip(answers, strategy.probabilities(vector()), strict=True))
    assert chisquare([first[a] for a in answers], [4000 * p[a] for a in answers]).pvalue > 0.01
    expected = {(a, b): 4000 * p[a] * p[b] / (1 - p[a]) for a in answers for b in answers if a != b}
    assert chisquare([pairs[each] for each in expected], list(expected.values())).pvalue > 0.01


def test_soft_best_of_n_is_repeatable():
    strategy = SoftBestOfN(k=4)
    assert strategy(vector()) == strategy(vector())
    drawn = {tuple(chosen(SoftBestOfN(k=4, seed=seed)(vector()))) for seed in range(20)}
    assert len(drawn) > 1
    assert all(set(each) == {5, 7, 9, 12} for each in drawn)


def test_soft_best_of_n_at_beta_zero_counts_frequency_only():
    np.testing.assert_allclose(SoftBestOfN(beta=0.0).probabilities(vector()), [0.4, 0.3, 0.2, 0.1], rtol=1e-12)


# ---- bad input ----


@pytest.mark.parametrize(
    ("cls", "keys", "named"),
    [
        *[(cls, {"k": 0}, "k") for cls in (BestOfNAnswers, Majority, WeightedMajority, SoftBestOfN, BestOfMajority)],
        (BestOfNAnswers, {"aggregation": "median"}, "aggregation"),
        (BestOfMajority, {"aggregation": "median"}, "aggregation"),
        (BestOfMajority, {"alpha": -0.1}, "alpha"),
        (BestOfMajority, {"alpha": 1.1}, "alpha"),
        (BestOfMajority, {"alpha": math.nan}, "alpha"),
        (WeightedMajority, {"weights": "logit"}, "weights"),
        (WeightedMajority, {"beta": 0.0}, "beta"),
        (WeightedMajority, {"beta": math.inf}, "beta"),
        (SoftBestOfN, {"beta": -1.0}, "beta"),
        (SoftBestOfN, {"beta": math.nan}, "beta"),
        (SoftBestOfN, {"seed": -1}, "seed"),
    ],
)
def test_settings_out_of_range_are_named(cls: Callable[..., Any], keys: dict[str, Any], named: str):
    with pytest.raises(ValueError, match=f"^{named} must be "):
        cls(**keys)


def test_settings_without_effect_are_told():
    assert WeightedMajority().idle() == {}
    assert set(WeightedMajority(weights="reward").idle()) == {"beta"}


def test_samples_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="needs samples and a reward for each, got 0 and 0"):
        group_samples([], [])
    with pytest.raises(ValueError, match="needs samples and a reward for each, got 2 and 1"):
        group_samples(["a", "b"], [1.0])
    for broken in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=f"^the reward of sample 1 is {broken}; leave the sample out"):
            group_samples(["a", None], [1.0, broken])


def test_negative_rewards_are_no_weights():
    with pytest.raises(ValueError, match=r"needs rewards >= 0, and sample 7 has -1\.0; give it σ of a logit"):
        WeightedMajority(weights="reward")(vector())
    # A penalty on what has no answer does not vote.
    assert chosen(WeightedMajority(weights="reward")(group_samples([None, "a"], [-1.0, 1.0]))) == ["a"]


def test_other_names_are_answered():
    with pytest.raises(ValueError, match="it is called 'majority' here"):
        SELECTIONS["self_consistency"]
    with pytest.raises(ValueError, match="did you mean 'best_of_n'"):
        SELECTIONS["best_of_nn"]
