"""Reward transforms: laws for all that are registered, the numbers of their papers, and each by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from objectives import REWARD_TRANSFORMS, Answers, Candidate, RewardTransform, Row
from objectives.registry import field_docs, formula, source
from objectives.reward_transforms import (
    R3,
    Clip,
    LengthPenalty,
    LogSigmoidCentered,
    Unlikeliness,
    ZScore,
    answers_of,
    distinct_trigrams,
    plain,
    with_scores,
)
from tests.objectives.transcriptions_online import unlikeliness
from tests.support import REPOSITORY
from tests.vectors.reading import contents

EXAMPLES: dict[str, Callable[[], RewardTransform]] = {
    "log_sigmoid_centered": LogSigmoidCentered,
    "z_score": ZScore,
    "clip": lambda: Clip(lowest=-0.5, highest=0.5),
    "length_penalty": lambda: LengthPenalty(alpha=0.1),
    "r3": lambda: R3(encoder="e"),
    "unlikeliness": Unlikeliness,
}
NOT_NEGATIVE = ("unlikeliness",)
"""Those that refuse scores below 0."""
every_transform = pytest.mark.parametrize("name", REWARD_TRANSFORMS.names())


def embed(texts: list[str]) -> np.ndarray:
    """How often each text has the letters a, b and c: relevance is what two texts share of them."""
    return np.array([[text.count(letter) for letter in "abc"] for text in texts], dtype=np.float32)


def answers(scores: Any, **changes: Any) -> Answers:
    array = np.array(scores, dtype=np.float64)
    array = array[:, None] if array.ndim == 1 else array
    names = ("score",) if array.shape[1] == 1 else tuple(f"r{i}" for i in range(array.shape[1]))
    responses = tuple(f"a b {'c ' * i}" for i in range(len(array)))
    logps = -1.0 * (np.arange(len(array)) % 3)  # of which some are equal
    given = Answers(
        prompt="abc", responses=responses, scores=array, names=names, mean_logps=logps, encoders={"e": embed}
    )
    return replace(given, **changes)


def random_answers(seed: int, responses: int, rewards: int, name: str = "") -> Answers:
    """With scores that the transform of that name takes."""
    scores = np.random.default_rng(seed).normal(size=(responses, rewards))
    return answers(abs(scores) if name in NOT_NEGATIVE else scores)


# ---- laws ----


@every_transform
@given(seed=st.integers(0, 99), responses=st.integers(1, 6), rewards=st.integers(1, 3))
def test_nothing_is_edited_and_every_score_is_finite(name: str, seed: int, responses: int, rewards: int):
    given_ = random_answers(seed, responses, rewards, name)
    before = given_.scores.copy()
    given_.scores.setflags(write=False)
    after = EXAMPLES[name]()(given_)
    assert np.array_equal(given_.scores, before)
    assert after.scores.shape == (responses, len(after.names))
    assert np.isfinite(after.scores).all()
    assert (after.prompt, after.responses, after.gold) == (given_.prompt, given_.responses, given_.gold)
    assert after.total().shape == (responses,)


@every_transform
@given(seed=st.integers(0, 99), responses=st.integers(2, 6), rewards=st.integers(1, 3))
def test_responses_may_come_in_any_order(name: str, seed: int, responses: int, rewards: int):
    given_ = random_answers(seed, responses, rewards, name)
    order = np.random.default_rng(seed).permutation(responses)
    logps = given_.mean_logps
    moved = replace(
        given_,
        responses=tuple(given_.responses[i] for i in order),
        scores=given_.scores[order],
        mean_logps=None if logps is None else logps[order],
    )
    transform = EXAMPLES[name]()
    np.testing.assert_allclose(transform(moved).scores, transform(given_).scores[order], rtol=1e-12, atol=1e-12)


@every_transform
def test_extreme_scores_stay_finite(name: str):
    for scores in ([1e30, -1e30, 0.0], [0.0, 0.0], [5.0], [1e-300, 0.0]):
        if name in NOT_NEGATIVE and min(scores) < 0:
            continue
        assert np.isfinite(EXAMPLES[name]()(answers(scores)).scores).all(), scores


@every_transform
def test_transforms_are_frozen_and_documented(name: str):
    transform, cls = EXAMPLES[name](), REWARD_TRANSFORMS[name]
    assert isinstance(transform, RewardTransform)
    assert formula(cls)
    assert "arXiv:" in source(cls)
    assert set(field_docs(cls)) >= {each.name for each in fields(cls)}
    if fields(cls):
        with pytest.raises(FrozenInstanceError):
            setattr(transform, fields(cls)[0].name, 1)


@pytest.mark.parametrize(
    ("cls", "keys", "named"),
    [
        (LogSigmoidCentered, {"quantile": -0.1}, "quantile"),
        (LogSigmoidCentered, {"quantile": 1.1}, "quantile"),
        (LogSigmoidCentered, {"quantile": math.nan}, "quantile"),
        (LogSigmoidCentered, {"value": math.inf}, "value"),
        (LogSigmoidCentered, {"value": {}}, "value"),
        (LogSigmoidCentered, {"value": {"helpful": math.nan}}, "value"),
        (Clip, {}, "lowest"),
        (Clip, {"lowest": math.nan}, "lowest"),
        (Clip, {"highest": math.inf}, "highest"),
        (Clip, {"lowest": 1.0, "highest": 1.0}, "highest"),
        (LengthPenalty, {"alpha": 0.0}, "alpha"),
        (LengthPenalty, {"alpha": -1.0}, "alpha"),
        (LengthPenalty, {"alpha": math.inf}, "alpha"),
        (R3, {"encoder": " "}, "encoder"),
        (R3, {"questions": "factual"}, "questions"),
        (R3, {"most_words": 0}, "most_words"),
        (R3, {"highest_relevance": 0.0}, "highest_relevance"),
        (Unlikeliness, {"beta_rank": 0.0}, "beta_rank"),
        (Unlikeliness, {"beta_rank": 1.01}, "beta_rank"),
        (Unlikeliness, {"beta_rank": math.nan}, "beta_rank"),
    ],
)
def test_keys_out_of_range_are_named(cls: type, keys: dict[str, Any], named: str):
    with pytest.raises(ValueError, match=f"^{named} must be "):
        cls(**keys)


def test_keys_without_effect_are_told():
    assert LogSigmoidCentered().idle() == {}
    assert set(LogSigmoidCentered(value=1.0).idle()) == {"quantile"}
    assert set(R3().idle()) == {"highest_relevance"}
    assert R3(questions="closed").idle() == R3(questions="mixed").idle() == {}


# ---- log-sigmoid-centred ----


def test_log_sigmoid_centered_by_hand():
    """r_ref = 1: log σ(1) = −0.313262, log σ(−2) = −2.126928, log σ(4) = −0.018150; at r_ref itself −log 2."""
    found = LogSigmoidCentered(value=1.0)(answers([2.0, -1.0, 5.0, 1.0])).scores[:, 0]
    np.testing.assert_allclose(found, [-0.313262, -2.126928, -0.018150, -math.log(2)], atol=5e-7)


def test_two_rewards_add_up_to_a_conjunction():
    """log σ(2 − 1) + log σ(0.5 − 1.5) = −0.313262 − 1.313262 = −1.626523; slopes 1 − σ = 0.268941 and 0.731059."""
    transform = LogSigmoidCentered(value={"helpful": 1.0, "harmless": 1.5})
    two = answers([[2.0, 0.5]], names=("helpful", "harmless"))
    assert transform(two).total()[0] == pytest.approx(-1.626523, abs=1e-6)
    other_way = answers([[0.5, 2.0]], names=("harmless", "helpful"))
    assert transform(other_way).total()[0] == transform(two).total()[0]
    step = 1e-6
    for reward, slope in ((0, 0.268941), (1, 0.731059)):
        up, down = (two.scores + sign * step * np.eye(2)[reward] for sign in (1, -1))
        rise = transform(replace(two, scores=up)).total()[0] - transform(replace(two, scores=down)).total()[0]
        assert rise / (2 * step) == pytest.approx(slope, abs=1e-5)


def test_failing_in_one_respect_is_not_saved_by_excelling_in_another():
    """Sums of rewards prefer (6, −3) to (1, 1); the conjunction prefers what is good in both."""
    both = answers([[6.0, -3.0], [1.0, 1.0]])
    assert both.total()[0] > both.total()[1]
    found = LogSigmoidCentered(value=0.0)(both).total()
    assert found[0] < found[1]


def test_it_saturates():
    """From good to excellent is worth next to nothing, from bad to good as much as before."""
    u = LogSigmoidCentered(value=0.0)(answers([20.0, 10.0, -10.0, -20.0])).scores[:, 0]
    assert u[0] - u[1] < 1e-4
    assert u[2] - u[3] == pytest.approx(10.0, abs=1e-4)
    assert (u <= 0).all()


@given(seed=st.integers(0, 99), responses=st.integers(1, 6), shift=st.floats(-50, 50))
def test_a_prompt_s_own_quantile_is_its_reference(seed: int, responses: int, shift: float):
    """Whatever a prompt's scores share cancels: prompts are centred one by one, never over a batch."""
    one = random_answers(seed, responses, 2)
    transform = LogSigmoidCentered()
    found = transform(one).scores
    np.testing.assert_allclose(transform(replace(one, scores=one.scores + shift)).scores, found, atol=1e-9)
    reference = np.quantile(one.scores, 0.85, axis=0)
    np.testing.assert_allclose(found, -np.log1p(np.exp(reference - one.scores)), rtol=1e-9)
    assert (np.argsort(found[:, 0]) == np.argsort(one.scores[:, 0])).all()


def test_quantiles_at_their_ends_are_the_worst_and_the_best():
    for quantile, place in ((0.0, 2), (1.0, 1)):
        found = LogSigmoidCentered(quantile=quantile)(answers([1.0, 4.0, -2.0])).scores[:, 0]
        assert found[place] == pytest.approx(-math.log(2))


def test_values_of_other_rewards_are_refused():
    transform = LogSigmoidCentered(value={"helpful": 1.0})
    with pytest.raises(ValueError, match=r"has a value of helpful, and the rewards are r0, r1; write one for each"):
        transform(answers([[1.0, 2.0]]))


# ---- z-score, clip, length ----


def test_z_score_by_hand():
    """1, 2, 6: mean 3, standard deviation √((4 + 1 + 9)/2) = √7."""
    found = ZScore()(answers([1.0, 2.0, 6.0])).scores[:, 0]
    np.testing.assert_allclose(found, np.array([-2, -1, 3]) / math.sqrt(7))


def test_z_score_of_what_does_not_vary_is_zero():
    assert ZScore()(answers([0.1, 0.1, 0.1])).scores.tolist() == [[0.0]] * 3
    assert ZScore()(answers([7.0])).scores.tolist() == [[0.0]]
    found = ZScore()(answers([[1.0, 5.0], [2.0, 5.0]])).scores
    np.testing.assert_allclose(found, [[-math.sqrt(0.5), 0.0], [math.sqrt(0.5), 0.0]])


def test_z_score_makes_scales_count_alike():
    found = ZScore()(answers([[1.0, 300.0], [3.0, 100.0], [2.0, 200.0]])).total()
    np.testing.assert_allclose(found, 0.0, atol=1e-12)


def test_clip_by_hand():
    scores = [-3.0, 0.2, 9.0]
    assert Clip(lowest=-1.0, highest=1.0)(answers(scores)).scores[:, 0].tolist() == [-1.0, 0.2, 1.0]
    assert Clip(lowest=0.0)(answers(scores)).scores[:, 0].tolist() == [0.0, 0.2, 9.0]
    assert Clip(highest=0.0)(answers(scores)).scores[:, 0].tolist() == [-3.0, 0.0, 0.0]


def test_length_penalty_by_hand():
    """0.5 a word: 3 words cost 1.5, 1 word 0.5, however they are spaced; the shorter one wins now."""
    two = answers([1.2, 0.6], responses=("one  two\nthree", "one"))
    found = LengthPenalty(alpha=0.5)(two)
    np.testing.assert_allclose(found.total(), [-0.3, 0.1])


@given(rewards=st.integers(1, 4))
def test_several_rewards_bear_a_length_once(rewards: int):
    two = answers(np.zeros((2, rewards)), responses=("one two three", "one"))
    np.testing.assert_allclose(LengthPenalty(alpha=0.5)(two).total(), [-1.5, -0.5])


# ---- unlikeliness ----


def test_unlikeliness_by_hand():
    """Ranks 2, 0, 3, 1 of four: 1 − 0.25·2/4, 1, 0, 1 − 0.25·1/4; the right answer that was least likely is best."""
    one = answers([1.0, 1.0, 0.0, 1.0], mean_logps=np.array([-0.5, -2.0, -0.1, -1.0]))
    assert Unlikeliness()(one).total().tolist() == [0.875, 1.0, 0.0, 0.9375]


def test_equal_log_probs_share_their_ranks():
    """Ranks 0.5, 0.5 and 2 of three with β = 1: neither order of the first two is preferred."""
    one = answers([3.0, 3.0, 3.0], mean_logps=np.array([-2.0, -2.0, -1.0]))
    np.testing.assert_allclose(Unlikeliness(beta_rank=1.0)(one).total(), [2.5, 2.5, 1.0])


def test_every_reward_of_a_response_shrinks_alike():
    one = answers([[1.0, 2.0], [3.0, 4.0]], mean_logps=np.array([-1.0, -2.0]))
    np.testing.assert_allclose(Unlikeliness(beta_rank=0.5)(one).scores, [[0.75, 1.5], [3.0, 4.0]])


@given(
    group=st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([-2.0, -1.5, -1.0, -0.1])), min_size=1),
    beta_rank=st.floats(0.01, 1),
)
def test_unlikeliness_is_the_paper_s(group: list[tuple[float, float]], beta_rank: float):
    scores, logps = ([pair[i] for pair in group] for i in (0, 1))
    found = Unlikeliness(beta_rank=beta_rank)(answers(scores, mean_logps=np.array(logps))).total()
    np.testing.assert_allclose(found, unlikeliness(scores, logps, beta_rank=beta_rank), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("case", contents("transforms/unlikeliness")["cases"], ids=lambda case: case["name"])
def test_advantages_of_the_authors(case: dict[str, Any]):
    """Their code normalises what it has multiplied, with 10⁻⁶ beside the standard deviation, as z_score has not."""
    one = answers(case["scores"], mean_logps=np.array(case["mean_logps"]))
    found = Unlikeliness(**case["config"])(one)
    scores = found.total()
    expected = (scores - scores.mean()) / (scores.std(ddof=1) + 1e-6)
    np.testing.assert_allclose(case["advantages"], expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(case["advantages"], ZScore()(found).total(), rtol=1e-4)


def test_vectors_of_transforms_have_their_provenance():
    vectors = contents("transforms/unlikeliness")
    assert vectors["source"].strip()
    assert vectors["versions"]
    assert (REPOSITORY / vectors["made_by"]).is_file()


def test_responses_without_log_probs_are_refused():
    with pytest.raises(ValueError, match="a response has no mean_logp; give each its mean log-prob per token"):
        Unlikeliness()(answers([1.0, 0.0], mean_logps=None))


def test_scores_that_would_turn_round_are_refused():
    with pytest.raises(ValueError, match=r"one is below 0, .* give scores >= 0, or put clip with lowest: 0 before it"):
        Unlikeliness()(answers([1.0, -1.0]))


# ---- R³ ----


def words_with(distinct: int, trigrams: int) -> str:
    """A text of ``trigrams`` + 2 words with this many distinct trigrams: its last word is repeated."""
    return " ".join([f"w{i}" for i in range(distinct - 1)] + ["w"] * (trigrams + 3 - distinct))


def of_relevance(relevance: float, dimensions: int = 2) -> Callable[[list[str]], np.ndarray]:
    """Vectors by which every response has this relevance to the text before it."""
    return lambda texts: np.array([[1.0] + [0.0] * (dimensions - 1)] + [[relevance, 0.0]] * (len(texts) - 1))


def test_r3_by_hand():
    """120 words, 100 of 118 trigrams distinct, relevance 0.6: 0.6 · 1.2 · 100/118 = 0.610169."""
    text = words_with(100, 118)
    assert len(text.split()) == 120
    assert distinct_trigrams(text.split()) == pytest.approx(100 / 118)
    one = answers([3.0], responses=(text,), encoders={"e": of_relevance(0.6)})
    found = R3(encoder="e")(one)
    assert found.total()[0] == pytest.approx(0.610169, abs=1e-6)
    assert found.names == ("r3",)


def test_r3_of_closed_questions_compares_with_the_gold_response():
    """F(rel) = rel/3.5 · 5.12 without a length incentive; a relevance of 3.5 is worth the longest response."""
    seen: list[list[str]] = []

    def embed(texts: list[str]) -> np.ndarray:
        seen.append(texts)
        return of_relevance(3.5)(texts)

    one = answers([0.0], responses=("Paris",), gold="It is Paris.", encoders={"e": embed})
    assert R3(encoder="e", questions="closed")(one).total()[0] == pytest.approx(5.12)
    assert R3(encoder="e", questions="mixed")(one).total()[0] == pytest.approx(5.12)
    assert seen == [["It is Paris.", "Paris"]] * 2
    low = R3(encoder="e", questions="closed", highest_relevance=7.0, most_words=100)
    assert low(one).total()[0] == pytest.approx(0.5)
    assert R3(encoder="e", questions="open")(one).total()[0] == pytest.approx(3.5 * 0.01)
    assert seen[-1][0] == "abc", "an open question is compared with the prompt"
    mixed = R3(encoder="e", questions="mixed")(replace(one, gold=None))
    assert mixed.total()[0] == pytest.approx(3.5 * 0.01)
    with pytest.raises(ValueError, match="compares answers to closed questions with a gold response"):
        R3(encoder="e", questions="closed")(replace(one, gold=None))


@pytest.mark.parametrize(("text", "share"), [("", 1.0), ("one", 1.0), ("one two", 1.0), ("a a a", 1.0)])
def test_short_answers_repeat_nothing(text: str, share: float):
    assert distinct_trigrams(text.split()) == share


def test_repetition_costs():
    assert distinct_trigrams(["a"] * 6) == 0.25
    assert distinct_trigrams(["a", "b"] * 3) == 0.5


def test_an_empty_response_is_worth_nothing():
    one = answers([1.0], responses=("",), encoders={"e": of_relevance(0.6)})
    assert R3(encoder="e")(one).total()[0] == 0.0


def test_words_beyond_the_cap_add_nothing():
    texts = tuple(" ".join(f"w{i}" for i in range(n)) for n in (50, 80, 5000))
    three = answers([0.0] * 3, responses=texts, encoders={"e": of_relevance(1.0)})
    np.testing.assert_allclose(R3(encoder="e", most_words=80)(three).total(), [0.5, 0.8, 0.8])


def test_punctuation_counts_as_words_as_the_authors_count():
    one = answers([0.0], responses=("Yes, it's so!",), encoders={"e": of_relevance(1.0)})  # Yes , it ' s so !
    assert R3(encoder="e")(one).total()[0] == pytest.approx(0.07)


def test_normalized_vectors_give_cosines():
    vectors = np.array([[2.0, 0.0], [3.0, 4.0], [0.0, 0.0]])
    two = answers([0.0, 0.0], responses=("w " * 100, "w " * 100), encoders={"e": lambda texts: vectors})
    repeated = 1 / 98
    np.testing.assert_allclose(R3(encoder="e", normalize=True)(two).total(), [0.6 * repeated, 0.0])
    np.testing.assert_allclose(R3(encoder="e")(two).total(), [6.0 * repeated, 0.0])


# ---- rows ----


def row(**changes: Any) -> Row:
    candidates = (
        Candidate(text=" good", score=2.0, rewards=MappingProxyType({"helpful": 1.5, "harmless": 0.5})),
        Candidate(text=" bad", score=1.0, rewards=MappingProxyType({"harmless": -1.0, "helpful": 2.0})),
    )
    return replace(Row(prompt="Q:", responses=MappingProxyType({}), candidates=candidates), **changes)


def test_rewards_are_columns_by_name():
    found = answers_of(row())
    assert found.names == ("helpful", "harmless")
    assert found.scores.tolist() == [[1.5, 0.5], [2.0, -1.0]]
    assert (found.prompt, list(found.responses), found.gold) == ("Q:", ["good", "bad"], None)
    scores_alone = row(candidates=(Candidate(text=" a", score=3.0),), responses={"gold": " g"})
    found = answers_of(scores_alone)
    assert (found.names, found.scores.tolist(), found.gold) == (("score",), [[3.0]], "g")


def test_log_probs_are_there_where_all_responses_have_one():
    some = tuple(Candidate(text=f" {i}", score=1.0, mean_logp=-float(i)) for i in range(3))
    found = answers_of(row(candidates=some)).mean_logps
    assert found is not None
    assert found.tolist() == [0.0, -1.0, -2.0]
    assert answers_of(row(candidates=(*some, Candidate(text=" x", score=1.0)))).mean_logps is None
    after = with_scores(row(candidates=some), [0.0, 2.0, 1.0])
    assert [each.mean_logp for each in after.candidates] == [-1.0, -2.0, 0.0]


def test_responses_with_different_rewards_are_refused():
    mixed = (row().candidates[0], Candidate(text=" bad", score=1.0))
    with pytest.raises(ValueError, match="one response has the rewards helpful, harmless, another a score only"):
        answers_of(row(candidates=mixed))


def test_messages_are_read_as_plain_text():
    said = ({"role": "assistant", "content": " yes "}, {"role": "assistant", "content": None, "tool_calls": [1]})
    prompt = (
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two"},
    )
    found = answers_of(row(prompt=prompt, candidates=(Candidate(text=said, score=1.0),)))
    assert (found.prompt, found.responses[0]) == ("One\nTwo", "yes")
    assert plain(({"role": "system", "content": "alone"},)) == "alone"


def test_new_scores_put_the_best_first_and_keep_equal_ones_in_order():
    before = row(candidates=tuple(Candidate(text=text, score=3.0 - i) for i, text in enumerate("abc")))
    after = with_scores(before, [0.0, 5.0, 0.0])
    assert [(each.text, each.score) for each in after.candidates] == [("b", 5.0), ("a", 0.0), ("c", 0.0)]
    assert [each.score for each in before.candidates] == [3.0, 2.0, 1.0]
    assert with_scores(row(), [1.0, 2.0]).candidates[0].rewards == {"helpful": 2.0, "harmless": -1.0}


def test_transforms_compose_in_the_order_listed():
    """z-scores of ±0.707 first, and clipping them at 0 then, is not clipping at 0 first."""
    two = answers([1.0, 3.0])
    first = Clip(highest=0.0)(ZScore()(two)).total().tolist()
    assert first == pytest.approx([-math.sqrt(0.5), 0.0])
    assert ZScore()(Clip(highest=0.0)(two)).total().tolist() == [0.0, 0.0]
