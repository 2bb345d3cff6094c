"""QAlign: the numbers of its paper, its stationary distribution by enumeration, and what it asks of a sampler."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare  # pyright: ignore[reportMissingTypeStubs]

from align.qalign import Chain, Request, acceptance, minimum_bayes_risk, qalign, rouge1_f1, vote

STOP = 0


# ---- acceptance ----


@pytest.mark.parametrize(
    ("proposed", "now", "beta", "proposed_length", "length", "expected"),
    [
        (1.2, 1.0, 0.5, 80, 100, 1.0),
        (0.4, 1.0, 0.5, 80, 100, 0.376493),
        (1.0, 1.0, 0.5, 150, 100, 0.666667),
        (-30.0, 10.0, 0.5, 10, 10, 2.061154e-09),  # clipped at −20
        (1.0, 1.0, 1.0, 100, 150, 1.0),
    ],
)
def test_acceptance(proposed: float, now: float, beta: float, proposed_length: int, length: int, expected: float):
    found = acceptance(proposed, now, beta, proposed_length, length)
    assert found == pytest.approx(expected, rel=1e-6, abs=0)


def test_acceptance_survives_any_reward():
    assert acceptance(1e308, -1e308, 1e-3, 1, 1) == 1.0
    assert acceptance(-1e308, 1e308, 1e-3, 1, 1) == math.exp(-20)


# ---- a toy language model: tokens 1, 2 and the stop token 0, at most three of them ----

LONGEST = 3
SEQUENCES: list[tuple[int, ...]] = [
    (*head, last)
    for length in (1, 2, 3)
    for head in itertools.product((1, 2), repeat=length - 1)
    for last in ((0, 1, 2) if length == LONGEST else (0,))
]
"""All responses: those that stop, and those cut off at the limit."""


def next_token(prefix: Sequence[int]) -> list[float]:
    """Probabilities of 0, 1 and 2 after a prefix; they depend on all of it."""
    weights = [0.6 + 0.3 * len(prefix), 1.0 + 0.7 * prefix.count(2), 0.5 + 0.4 * prefix.count(1)]
    return [weight / sum(weights) for weight in weights]


def probability(sequence: tuple[int, ...], kept: int = 0) -> float:
    """Of what follows the first ``kept`` tokens."""
    return math.prod(next_token(sequence[:i])[sequence[i]] for i in range(kept, len(sequence)))


def toy_reward(sequence: Sequence[int]) -> float:
    return 0.8 * sequence.count(2) - 0.5 * sequence.count(1) + 0.3 * (sequence[-1] == STOP)


BETA = 0.7
TARGET = np.array([probability(one) * math.exp(toy_reward(one) / BETA) for one in SEQUENCES])
TARGET /= TARGET.sum()


def transitions(accept: Callable[[float, float, float, int, int], float]) -> np.ndarray:
    """Exact probability of going from each response to each in one step."""
    matrix = np.zeros((len(SEQUENCES), len(SEQUENCES)))
    for row, y in enumerate(SEQUENCES):
        for kept in range(len(y)):
            for column, other in enumerate(SEQUENCES):
                if other[:kept] == y[:kept] and len(other) > kept:
                    chance = accept(toy_reward(other), toy_reward(y), BETA, len(other), len(y))
                    matrix[row, column] += probability(other, kept) / len(y) * chance
        matrix[row, row] += 1 - matrix[row].sum()  # rejections
    return matrix


def without_lengths(proposed: float, now: float, beta: float, proposed_length: int, length: int) -> float:
    return acceptance(proposed, now, beta, 1, 1)


def stationary(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.matrix_power(matrix, 4096)[0]


def test_the_toy_model_is_a_distribution():
    assert len(SEQUENCES) == len(set(SEQUENCES)) == 15
    assert sum(probability(one) for one in SEQUENCES) == pytest.approx(1, abs=1e-14)


def test_the_target_is_stationary():
    """π P = π, and even π_y P_yz = π_z P_zy: the chain is reversible."""
    matrix = transitions(acceptance)
    assert (matrix >= 0).all()
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-14)
    np.testing.assert_allclose(TARGET @ matrix, TARGET, rtol=0, atol=1e-12)
    flow = TARGET[:, None] * matrix
    np.testing.assert_allclose(flow, flow.T, rtol=0, atol=1e-12)
    np.testing.assert_allclose(stationary(matrix), TARGET, rtol=0, atol=1e-12)  # and there is no other


def test_the_target_is_not_stationary_without_the_ratio_of_lengths():
    matrix = transitions(without_lengths)
    assert np.abs(TARGET @ matrix - TARGET).max() > 1e-3
    assert np.abs(stationary(matrix) - TARGET).sum() / 2 > 0.02


class ToySampler:
    """Draws from the toy model and notes what it was asked."""

    def __init__(self, seed: int) -> None:
        self.draws = np.random.default_rng(seed)
        self.asked: list[list[Request]] = []

    def __call__(self, requests: list[Request]) -> list[list[int]]:
        self.asked.append(requests)
        drawn = []
        for _, kept, most in requests:
            sequence = list(kept)
            while len(sequence) < len(kept) + most and (len(sequence) == len(kept) or sequence[-1] != STOP):
                chances = np.cumsum(next_token(sequence))
                sequence.append(int(np.searchsorted(chances, self.draws.random() * chances[-1], side="right")))
            drawn.append(sequence[len(kept) :])
        return drawn


def toy_rewards(responses: list[tuple[int, Sequence[int]]]) -> list[float]:
    return [toy_reward(response) for _, response in responses]


@pytest.mark.slow
def test_the_sampler_s_own_chains_reach_the_target():
    """3,000 independent chains: where they end is a sample of π*, by chi-square, and none of what differs from it."""
    sampler = ToySampler(1)
    (chains,) = qalign(sampler, toy_rewards, [[7, 8]], steps=20, beta=BETA, chains=3000, t_max=LONGEST, seed=2)
    places = {sequence: number for number, sequence in enumerate(SEQUENCES)}
    ends = np.bincount([places[chain.states[-1]] for chain in chains], minlength=len(SEQUENCES))
    starts = np.bincount([places[chain.states[0]] for chain in chains], minlength=len(SEQUENCES))
    model = np.array([probability(one) for one in SEQUENCES])
    assert chisquare(ends, TARGET * len(chains)).pvalue > 0.01
    assert chisquare(starts, model / model.sum() * len(chains)).pvalue > 0.01
    for other in (model / model.sum(), stationary(transitions(without_lengths))):
        assert chisquare(ends, other * len(chains)).pvalue < 1e-4
    rate = np.mean([chain.accepts[-10:] for chain in chains])  # the first states are not yet of π*
    assert rate == pytest.approx(TARGET @ accepted(acceptance), abs=0.01)


def accepted(accept: Callable[[float, float, float, int, int], float]) -> np.ndarray:
    """Probability that the next proposal is accepted, from each response."""
    return np.array(
        [
            sum(
                probability(other, kept) / len(y) * accept(toy_reward(other), toy_reward(y), BETA, len(other), len(y))
                for kept in range(len(y))
                for other in SEQUENCES
                if other[:kept] == y[:kept] and len(other) > kept
            )
            for y in SEQUENCES
        ]
    )


@pytest.mark.slow
def test_one_long_chain_spends_its_time_as_the_target_says():
    """Over time, too: one chain of 20,000 steps, whose states depend on each other, within 0.02 for each response."""
    (((chain),),) = qalign(ToySampler(3), toy_rewards, [[7]], steps=20_000, beta=BETA, t_max=LONGEST, burn_in=20)
    times = Counter(chain.counted)
    shares = np.array([times[one] for one in SEQUENCES]) / len(chain.counted)
    np.testing.assert_allclose(shares, TARGET, rtol=0, atol=0.02)


# ---- the chain ----


class Script:
    """A sampler that returns what it was given, one after the other."""

    def __init__(self, *continuations: list[int]) -> None:
        self.left = list(continuations)
        self.asked: list[Request] = []

    def __call__(self, requests: list[Request]) -> list[list[int]]:
        self.asked += requests
        return [self.left.pop(0) for _ in requests]


def by_first_token(values: dict[int, float]) -> Callable[[list[tuple[int, Sequence[int]]]], list[float]]:
    return lambda responses: [values[response[0]] for _, response in responses]


A, B, C, D = 1, 2, 3, 4


def test_rejections_repeat_the_state_and_count_in_the_vote():
    """(A, accepted) (B, 1) (C, 0) (C, 0) (A, 1) (D, 0): states A B B B A A, a tie of 3, and A was there first."""
    reward = by_first_token({A: 5.0, B: 5.0, C: -35.0, D: -35.0})
    ((chain,),) = qalign(Script([A], [B], [C], [C], [A], [D]), reward, [[9]], steps=5, beta=0.5)
    assert chain.states == ((A,), (B,), (B,), (B,), (A,), (A,))
    assert chain.rewards == (5.0,) * 6
    assert chain.accepts == (True, True, False, False, True, False)
    assert chain.acceptance_rate == 2 / 5
    assert chain.tokens == 6
    choice = vote([chain], lambda prompt, state: "ABCD"[state[0] - 1])
    assert [(each.answer, each.index, each.count) for each in choice.picks] == [("A", 0, 3)]


def test_votes_leave_out_the_burn_in_and_what_has_no_answer():
    reward = by_first_token({A: 5.0, B: 5.0, C: -35.0})
    ((chain,),) = qalign(Script([A], [B], [C], [A], [B]), reward, [[9]], steps=4, beta=0.5, burn_in=1)
    assert chain.states == ((A,), (B,), (B,), (A,), (B,))
    assert chain.counted == ((B,), (B,), (A,), (B,))
    asked: list[tuple[int, tuple[int, ...]]] = []

    def answer(prompt: int, state: tuple[int, ...]) -> str | None:
        asked.append((prompt, state))
        return None if state == (B,) else "a"

    assert [(each.answer, each.index, each.count) for each in vote([chain, chain], answer).picks] == [("a", 2, 2)]
    assert asked == [(0, (B,)), (0, (A,))]
    assert vote([chain], lambda prompt, state: None).picks == ()


def test_a_continuation_gets_what_its_prefix_leaves():
    sampler = ToySampler(0)
    prompts = [[5], [6, 6]]
    chains = qalign(sampler, toy_rewards, prompts, steps=30, beta=1.0, chains=3, t_max=LONGEST)
    assert [[chain.prompt for chain in each] for each in chains] == [[0] * 3, [1] * 3]
    assert len(sampler.asked) == 31
    assert all(len(requests) == 6 for requests in sampler.asked)
    for step, requests in enumerate(sampler.asked):
        for (prompt, kept, most), chain in zip(requests, itertools.chain(*chains), strict=True):
            assert prompt is prompts[chain.prompt]
            assert most == LONGEST - len(kept) >= 1
            if step == 0:
                assert tuple(kept) == ()
            else:
                before = chain.states[step - 1]
                assert len(kept) < len(before)
                assert before[: len(kept)] == tuple(kept)
    assert {len(kept) for requests in sampler.asked[1:] for _, kept, _ in requests} == {0, 1, 2}
    for chain in itertools.chain(*chains):
        assert all(len(state) <= LONGEST for state in chain.states)
        assert chain.rewards == tuple(toy_reward(state) for state in chain.states)


def test_prefixes_are_uniform():
    """From a response of four tokens each of 0 to 3 is kept equally often."""
    kept: Counter[int] = Counter()

    def sampler(requests: list[Request]) -> list[list[int]]:
        kept.update(len(prefix) for _, prefix, _ in requests)
        return [([1, 1, 1, STOP])[len(prefix) :] for _, prefix, _ in requests]

    qalign(sampler, lambda responses: [0.0] * len(responses), [[9]], steps=2000, beta=1.0, chains=2)
    kept[0] -= 2  # the first draws
    assert chisquare([kept[i] for i in range(4)]).pvalue > 0.01


def test_an_empty_continuation_is_rejected_and_costs_no_reward():
    """Nothing after a prefix cannot be undone: no prefix of the shorter response leads back."""
    rewarded: list[int] = []

    def reward(responses: list[tuple[int, Sequence[int]]]) -> list[float]:
        rewarded.append(len(responses))
        return [1.0] * len(responses)

    ((chain,),) = qalign(Script([A, STOP], [], []), reward, [[9]], steps=2, beta=1.0)
    assert chain.states == ((A, STOP),) * 3
    assert chain.accepts == (True, False, False)
    assert rewarded == [1]


def test_a_chain_does_not_depend_on_its_companions():
    """With a sampler that is a function of what it is asked, the same chain alone and among others."""

    def sampler(requests: list[Request]) -> list[list[int]]:
        return [
            [1 + (sum(prompt) + 3 * len(kept) + len(kept) ** 2) % 4] * (3 - len(kept) % 3)
            for prompt, kept, _ in requests
        ]

    def reward(responses: list[tuple[int, Sequence[int]]]) -> list[float]:
        return [sum(response) % 5 / 5 for _, response in responses]

    options: dict[str, Any] = {"steps": 40, "beta": 0.5, "t_max": 50, "seed": 4}
    together = qalign(sampler, reward, [[1], [2, 2]], chains=3, **options)
    alone = qalign(sampler, reward, [[1]], chains=1, **options)
    assert alone[0][0].states == together[0][0].states
    assert alone[0][0].accepts == together[0][0].accepts
    assert together[0][0].accepts != together[0][1].accepts
    assert qalign(sampler, reward, [[1], [2, 2]], chains=3, **options)[1][2].states == together[1][2].states
    assert qalign(sampler, reward, [], **options) == []


def test_rewards_beyond_the_limit_count_as_the_limit():
    """100 and 50 are the same at a limit of 40, and e⁻²⁰ apart without one; what is on record is what was given."""
    options: dict[str, Any] = {"steps": 1, "beta": 1.0}
    reward = by_first_token({A: 100.0, B: 50.0})
    ((limited,),) = qalign(Script([A], [B]), reward, [[9]], **options)
    assert limited.states == ((A,), (B,))
    assert limited.rewards == (100.0, 50.0)
    ((free,),) = qalign(Script([A], [B]), reward, [[9]], reward_limit=None, **options)
    assert free.states == ((A,), (A,))


# ---- bad input ----


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"steps": 0}, "steps"),
        ({"beta": 0.0}, "beta"),
        ({"beta": math.nan}, "beta"),
        ({"chains": 0}, "chains"),
        ({"t_max": 0}, "t_max"),
        ({"seed": -1}, "seed"),
        ({"burn_in": 4}, "burn_in"),
        ({"burn_in": -1}, "burn_in"),
        ({"reward_limit": 0.0}, "reward_limit"),
    ],
)
def test_values_out_of_range_are_named(options: dict[str, Any], named: str):
    with pytest.raises(ValueError, match=f"^{named} must be "):
        qalign(ToySampler(0), toy_rewards, [[1]], **{"steps": 3, "beta": 1.0, **options})


def test_what_does_not_fit_is_told():
    options: dict[str, Any] = {"steps": 2, "beta": 1.0, "t_max": 2}
    with pytest.raises(ValueError, match="returned nothing for prompt 1; it must return the stop token"):
        qalign(Script([A], []), lambda responses: [0.0] * len(responses), [[1], [2]], **options)
    with pytest.raises(ValueError, match="asked for at most 2 tokens and returned 3"):
        qalign(Script([A, A, A]), toy_rewards, [[1]], **options)
    with pytest.raises(ValueError, match="asked for 1 continuations and returned 0"):
        qalign(lambda requests: [], toy_rewards, [[1]], **options)
    with pytest.raises(ValueError, match="asked about 1 responses and returned 2 numbers"):
        qalign(Script([A]), lambda responses: [0.0, 0.0], [[1]], **options)
    for broken in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"reward of a response to prompt 0 is {broken}; it must be a finite"):
            qalign(Script([A]), lambda responses, broken=broken: [broken], [[1]], **options)


# ---- minimum Bayes risk ----


def test_minimum_bayes_risk():
    """Row means .5625, .5625, .5 and .25: the first of two equal ones."""
    states = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6, 7], [8, 9]]
    means = [sum(rouge1_f1(one, other) for other in states) / 4 for one in states]
    assert means == pytest.approx([0.5625, 0.5625, 0.5, 0.25])
    assert minimum_bayes_risk(states) == 0
    assert minimum_bayes_risk(states[::-1]) == 2


def test_rouge_counts_repetitions():
    """[7, 7, 7] and [7, 7, 8, 8] share two sevens: 2·2/(3 + 4)."""
    assert rouge1_f1([7, 7, 7], [7, 7, 8, 8]) == pytest.approx(4 / 7)
    assert rouge1_f1([1], [2]) == 0
    assert rouge1_f1([3, 1, 2], [1, 2, 3]) == 1


def likeness(first: Sequence[int], second: Sequence[int]) -> float:
    """ROUGE-1 F1 from precision and recall."""
    rest, shared = list(second), 0
    for token in first:
        if token in rest:
            rest.remove(token)
            shared += 1
    if shared == 0:
        return 0.0
    precision, recall = shared / len(first), shared / len(second)
    return 2 * precision * recall / (precision + recall)


@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6), min_size=1, max_size=8), st.integers(0, 99))
def test_minimum_bayes_risk_by_plain_loops(states: list[list[int]], seed: int):
    repeats = np.random.default_rng(seed).integers(1, 4, len(states))
    repeated = [state for state, times in zip(states, repeats, strict=True) for _ in range(times)]
    means = [sum(likeness(one, other) for other in repeated) / len(repeated) for one in repeated]
    found = minimum_bayes_risk(repeated)
    assert means[found] == pytest.approx(max(means))
    assert all(mean < means[found] - 1e-12 for mean in means[:found]), "of equal ones the lowest index"


def test_minimum_bayes_risk_needs_responses():
    with pytest.raises(ValueError, match="no responses"):
        minimum_bayes_risk([])
    with pytest.raises(ValueError, match="an empty response"):
        minimum_bayes_risk([[1], []])
    with pytest.raises(ValueError, match="an empty response"):
        rouge1_f1([], [1])


def test_the_states_of_a_chain_can_be_asked_for_the_most_typical():
    chain = Chain(
        prompt=0,
        states=((1, 2), (1, 2), (3, 4), (1, 2, 5)),
        rewards=(0.0,) * 4,
        accepts=(True, False, True, True),
        tokens=7,
    )
    assert minimum_bayes_risk(chain.counted) == 0
