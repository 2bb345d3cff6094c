"""Length, repetition, diversity and refusals by hand."""

import math

import numpy as np
import pytest

from evals.generation_measures import METRICS, distinct, is_refusal, measure, repetition

TEXTS = ["a b a b a b a b", "a c", "", "I'm sorry, but I can't help.", "a b"]
PROMPTS = ["p", "p", "q", "q", "r"]


def values(found):
    assert set(found.estimates) <= set(METRICS)
    return {name: each.value for name, each in found.estimates.items()}


def test_everything_by_hand():
    """8 + 2 + 0 + 6 + 2 words: 18 in all, of which a, b, c and the refusal's six are different. Runs of four words:
    five of the first (abab, baba, abab, baba, abab: three repeat), three of the refusal, none repeated."""
    found = measure(
        TEXTS,
        PROMPTS,
        tokens=[8, 2, 1, 9, 2],
        at_limit=[True, False, False, False, False],
        reference=["a b a b a b a b", "x", None, None, "a b "],
    )
    got = values(found)
    assert got["generations/tokens"] == 22 / 5
    assert got["generations/characters"] == (15 + 3 + 0 + 28 + 3) / 5
    assert got["generations/at_limit"] == 0.2
    assert got["generations/repetition"] == pytest.approx((3 / 5 + 0) / 2)
    assert got["generations/distinct_1"] == pytest.approx(9 / 18)
    assert got["generations/distinct_2"] == pytest.approx((2 + 1 + 5) / (7 + 1 + 5 + 1))
    assert got["generations/refusals"] == 0.2
    assert got["generations/empty"] == 0.2
    assert got["generations/same_as_reference"] == pytest.approx(1 / 3)
    assert found.extra["too_short_for_repetition"] == 3
    assert found.by_prompt["generations/empty"] == {"p": 0.0, "q": 0.5, "r": 0.0}


@pytest.mark.parametrize(
    ("text", "n", "share"),
    [("a b a b a b", 2, 0.6), ("a a a a", 1, 0.75), ("a b c d", 4, 0.0), ("one two", 4, math.nan)],
)
def test_repetition(text, n, share):
    assert repetition(text, n) == pytest.approx(share, nan_ok=True)


def test_distinct_interval_is_a_jackknife():
    """Words a b | a c | d e: 5 of 6. Without each prompt: a c d e, 4 of 4; a b d e, 4 of 4; a b c, 3 of 4."""
    found = distinct(["a b", "a c", "d e"], ["p", "q", "r"], 1)
    assert found is not None
    without = np.array([1, 1, 0.75])
    assert found.value == pytest.approx(5 / 6)
    assert found.stderr == pytest.approx(math.sqrt(2 / 3 * ((without - without.mean()) ** 2).sum()))
    assert (found.n, found.clusters, found.interval) == (6, 3, "jackknife-t")
    assert distinct(["", " "], ["p", "q"], 1) is None


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I\N{RIGHT SINGLE QUOTATION MARK}m sorry, but no.", True),
        ("  **I cannot** help with that.", True),
        ("As an AI, I have no opinions.", True),
        ("Sure! I cannot wait to help.", False),
        ("Once upon a time I couldn't sleep.", False),
        ("", False),
    ],
)
def test_refusals(text, refuses):
    assert is_refusal(text) == refuses


def test_thoughts_are_no_part_of_the_answer():
    got = values(measure(["<think>I cannot do this.</think>Yes.", "<think>still"]))
    assert (got["generations/refusals"], got["generations/characters"], got["generations/empty"]) == (0, 2, 0.5)


def test_shares_have_intervals_that_know_of_chance():
    found = measure(["yes"] * 20, list(range(20)))
    refusals = found.estimates["generations/refusals"]
    assert (refusals.low, round(refusals.high, 6)) == (0, 0.161125)  # Wilson, 0 of 20
    assert "generations/tokens" not in found.estimates
    assert "generations/repetition" not in found.estimates


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"texts": []}, "no answers to measure"),
        ({"texts": ["a"], "tokens": [1, 2]}, "tokens has 2 entries, and there are 1 answers"),
        ({"texts": ["a"], "prompts": ["p", "q"]}, "2 prompts were given for 1 items"),
    ],
)
def test_what_can_t_be_measured(keys, says):
    with pytest.raises(ValueError, match=says):
        measure(**keys)
