"""Verifiers: what follows from the text alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.errors import RunError
from align.sampling import Sampling, sample
from align.scorers import without_thoughts
from align.verifiers import Exact, Python, Regex
from align.world_scorers import Gold, WorldAnswer
from data.worlds import POLICY, SPLITS, gold_score, problem_of, problems
from tests.align.sampled import chat, group


def scores(found: list) -> list[float | None]:
    return [each.score for each in found]


# ---- exact and regex ----


def test_exact():
    texts = ["Paris", " paris\n", "<think>London?</think>Paris", "London", ""]
    asked = [chat("Capital of France?", texts, {"answer": "Paris"})]
    assert scores(Exact()(asked)) == [1, 0, 1, 0, 0]
    assert scores(Exact(case=False)(asked)) == [1, 1, 1, 0, 0]
    assert scores(Exact(strip=False, case=False)(asked)) == [1, 0, 1, 0, 0]
    assert [each.answer for each in Exact(case=False)(asked)] == ["paris", "paris", "paris", "london", ""]


@pytest.mark.parametrize(("right", "score"), [(["London", "Paris"], 1), (3, 0), ([], None), ("", None), (None, None)])
def test_right_answers_may_be_several_numbers_or_absent(right: Any, score: float | None):
    (found,) = Exact()([chat("?", ["Paris"], {"answer": right})])
    assert found.score == score
    assert found.reason == ("no right answer in the column answer" if score is None else "")
    assert scores(Exact()([chat("?", ["3"], {"answer": 3.0})])) == [1]


def test_a_column_that_is_not_there_stops():
    with pytest.raises(RunError, match=r"has no column 'answer' \(columns: gold, level\); keep it when sampling"):
        Exact()([chat("?", ["Paris"], {"gold": "Paris", "level": 3})])


def test_regex_takes_the_last_match():
    asked = [chat("?", ["Answer: 3. No: Answer: 4", "answer: 4", "4", "<think>Answer: 4</think>"], {"answer": 4})]
    found = Regex(pattern=r"Answer:\s*(\d+)", column="answer")(asked)
    assert scores(found) == [1, 0, 0, 0]
    assert [each.answer for each in found] == ["4", None, None, None]
    assert found[1].counts == {"no answer": 1}
    assert scores(Regex(pattern=r"Answer:\s*(\d+)", column="answer", case=False)(asked)) == [1, 1, 0, 0]
    assert scores(Regex(pattern=r"Answer:\s*(\d+)")(asked)) == [1, 0, 0, 0]
    named = Regex(pattern=r"(Answer|Result): (?P<answer>\w+)", case=False)([chat("?", ["Result: Yes"])])
    assert [(each.score, each.answer) for each in named] == [(1, "yes")]


@pytest.mark.parametrize("pattern", ["Answer: 4", r"(a)(b)", "(", ""])
def test_patterns_that_find_no_answer_are_refused(pattern: str):
    with pytest.raises(ValueError, match=r"^pattern (must be a pattern with one group|is no regular expression)"):
        Regex(pattern=pattern)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a", "a"),
        ("<think>b</think>a", "a"),
        ("b</think>a", "a"),
        ("a<think>b", "a"),
        ("<think>b</think>a<think>c</think>d", "ad"),
        ("<think>b", ""),
    ],
)
def test_thoughts_are_passed_over(text: str, said: str):
    assert without_thoughts(text) == said


# ---- a function of one's own ----

REWARDS = """
import math
from dataclasses import dataclass


@dataclass
class Limits:
    most: int = 3


def brevity(*, prompt, text, columns):
    assert prompt[0]["role"] == "user"
    return -len(text) / columns["unit"]


def picky(prompt, text, columns):
    if text == "none":
        return None
    if text == "text":
        return "three"
    if text == "nan":
        return math.nan
    if text == "boom":
        raise KeyError("what")
    return len(text) < Limits().most


number = 3
"""


@pytest.fixture
def rewards(tmp_path: Path) -> Path:
    path = tmp_path / "rewards.py"
    path.write_text(REWARDS)
    return path


def test_a_function_of_a_file(rewards: Path):
    found = Python(function=f"{rewards}:brevity")([chat("?", ["four", ""], {"unit": 2})])
    assert scores(found) == [-2, 0]


def test_a_function_of_a_module(rewards: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(rewards.parent)
    assert scores(Python(function="rewards:picky")([chat("?", ["ab", "abcd"])])) == [1, 0]


def test_what_a_function_can_t_score_has_a_reason(rewards: Path):
    found = Python(function=f"{rewards}:picky")([chat("?", ["none", "text", "boom", "a"])])
    assert scores(found) == [None, None, None, 1]
    assert [each.reason for each in found] == [
        "the function gave None",
        "the function gave no number but str: 'three'",
        "raised KeyError: 'what'",
        "",
    ]


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("{folder}/nothing.py:f", "there is no file"),
        ("{folder}/rewards.py:absent", "has no attribute 'absent'"),
        ("{folder}/broken.py:f", "nothing works"),
        ("no_such_module_anywhere:f", "No module named"),
    ],
)
def test_functions_that_are_not_there(rewards: Path, function: str, why: str):
    (rewards.parent / "broken.py").write_text("raise RuntimeError('nothing works')")
    with pytest.raises(RunError, match=r"^python: can't import .*give module:function") as error:
        Python(function=function.format(folder=rewards.parent)).fingerprint()
    assert why in str(error.value)


def test_what_is_no_function_is_refused(rewards: Path):
    with pytest.raises(RunError, match=r"is no function but int; name a function$"):
        Python(function=f"{rewards}:number").fingerprint()
    for written in ("rewards", "rewards:", ":f", "rewards:f()"):
        with pytest.raises(ValueError, match=r"^function must be module:function or file.py:function, got"):
            Python(function=written)


def test_a_function_that_changes_has_another_fingerprint(rewards: Path):
    before = Python(function=f"{rewards}:picky").fingerprint()
    assert Python(function=f"{rewards}:picky").fingerprint() == before
    rewards.write_text(REWARDS.replace("most: int = 3", "most: int = 4"))
    assert Python(function=f"{rewards}:picky").fingerprint() != before


# ---- the embedded world ----


@given(split=st.sampled_from(SPLITS), seed=st.integers(0, 10_000))
def test_a_question_tells_its_problem(split: str, seed: int):
    for problem in problems(split, 20, seed=seed):
        assert problem_of(problem.question) == problem


@pytest.mark.parametrize(
    "question",
    [
        "",
        "What is 3 + 4?",
        "Ann has 3 apples and buys 4 more. How many pears does Ann have now?",
        "Ann has 3 apples and buys 4 more. How many apples does Ben have now?",
        "Zoe has 3 apples and buys 4 more. How many apples does Zoe have now?",
        "Ann has three apples and buys 4 more. How many apples does Ann have now?",
    ],
)
def test_other_questions_have_no_gold_score(question: str):
    with pytest.raises(ValueError, match="not a question of the embedded world"):
        problem_of(question)
    (found,) = Gold()([chat(question, ["The answer is 7."])])
    assert (found.score, found.reason) == (None, "not a question of the embedded world")


def test_samples_of_the_policy_are_scored_as_the_world_does():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = problems("held_out", 6, seed=2)
    prompts = [({"role": "user", "content": problem.question},) for problem in asked]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(POLICY), AutoTokenizer.from_pretrained(POLICY)
    drawn = sample(model, tokenizer, prompts, Sampling(n=4, max_tokens=40, seed=3))
    groups = [group(prompt, texts) for prompt, texts in zip(prompts, drawn, strict=True)]
    expected = [gold_score(problem, text) for problem, texts in zip(asked, drawn, strict=True) for text in texts]
    gold, right = Gold()(groups), WorldAnswer()(groups)
    assert scores(gold) == expected
    assert len(set(expected)) > 2
    assert scores(right) == [float(score >= 0.6) for score in expected]
    found = [each.answer for each in right]
    numbers = [str(problem.answer) for problem in asked for _ in range(4)]
    assert [answer == number for answer, number in zip(found, numbers, strict=True)] == [s == 1 for s in scores(right)]
    assert all(each.counts == ({"no answer": 1} if each.answer is None else {}) for each in gold)
