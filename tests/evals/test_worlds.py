"""Sampled answers in the embedded world, of the shipped policy itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.sampling import Sampling
from data.worlds import POLICY, answer_of, gold_score, problems
from evals.worlds import METRICS, Answers
from objectives.relabel import RewardAugmented

HOW = Sampling(n=4, max_tokens=48, seed=7)


@pytest.fixture(scope="module")
def policy() -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32), AutoTokenizer.from_pretrained(POLICY)


def values(results: list) -> dict[tuple[str, str], Any]:
    return {(result.split, result.metric): result for result in results}


@pytest.fixture(scope="module")
def measured(policy: tuple[Any, Any]) -> tuple[Answers, dict, dict]:
    """Two measurements of a policy that did not change."""
    asked = {"held_out": problems("held_out", 16, seed=3), "held_out_templates": problems("held_out_templates", 12)}
    answers = Answers(asked, HOW)
    return answers, values(answers(*policy, 0)), values(answers(*policy, 5))


@pytest.mark.slow
def test_the_start_compared_with_itself_is_near_one_half(measured: tuple[Answers, dict, dict]):
    _, start, _ = measured
    for split in ("held out", "held out templates"):
        win_rate = start[split, "answers/win_rate"]
        assert win_rate.low < 0.5 < win_rate.high
        assert win_rate.low < win_rate.value < win_rate.high
        assert win_rate.value != 0.5  # two draws, not one with itself


@pytest.mark.slow
def test_a_policy_that_did_not_change_gives_the_same_answers(measured: tuple[Answers, dict, dict]):
    """The same seed: the very samples of the start, so that what differs later is the policy's."""
    _, start, later = measured
    for key in ("answers/accuracy", "answers/score"):
        assert start["held out", key].value == later["held out", key].value
    assert later["held out", "answers/win_rate"].value == 0.5
    assert {result.step for result in start.values()} == {0}
    assert {result.step for result in later.values()} == {5}


def test_splits_are_reported_apart(measured: tuple[Answers, dict, dict]):
    answers, start, _ = measured
    assert start.keys() == {(s, m) for s in ("held out", "held out templates") for m in METRICS}
    assert set(answers.start) == {"held_out", "held_out_templates"}
    result, other = (start[split, "answers/accuracy"] for split in ("held out", "held out templates"))
    assert (result.n, result.clusters) == (16 * 4, 16)
    assert (other.n, other.clusters) == (12 * 4, 12)
    assert start["held out", "answers/win_rate"].n == 16
    assert result.extra["samples"] == 4
    assert result.extra["temperature"] == 1.0
    assert result.extra["seed"] == 7


@pytest.mark.slow
def test_shares_are_of_right_answers(measured: tuple[Answers, dict, dict], policy: tuple[Any, Any]):
    """Recounted from the samples themselves; the shipped policy gets some right and some wrong."""
    from align.sampling import sample

    answers, start, _ = measured
    asked = answers.problems["held_out"]
    texts = sample(*policy, [({"role": "user", "content": problem.question},) for problem in asked], HOW)
    right = [answer_of(text) == problem.answer for problem, drawn in zip(asked, texts, strict=True) for text in drawn]
    scores = [gold_score(problem, text) for problem, drawn in zip(asked, texts, strict=True) for text in drawn]
    assert start["held out", "answers/accuracy"].value == pytest.approx(sum(right) / len(right))
    assert start["held out", "answers/score"].value == pytest.approx(sum(scores) / len(scores))
    assert 0.1 < start["held out", "answers/accuracy"].value < 0.9


@pytest.mark.slow
def test_a_goal_reaches_the_samples(policy: tuple[Any, Any]):
    """The shipped policy has never seen a goal before a question, and answers otherwise."""
    asked = {"held_out": problems("held_out", 4, seed=3)}
    how = Sampling(n=1, temperature=0, max_tokens=32)
    plain = Answers(asked, how)
    plain(*policy, 0)
    aimed = Answers(asked, how, goal=RewardAugmented(lowest=0, highest=1))
    aimed(*policy, 0)
    assert plain.start != aimed.start
