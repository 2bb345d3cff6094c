"""Mathematical answers: found in a response, written in one way, compared, and never waited for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from align import math_answers
from align.bounded import Failed, Pool
from align.math_answers import answer_of, boxed, canonical
from align.verifiers import Math
from tests.align.sampled import chat


@pytest.fixture(scope="module")
def scorer() -> Iterator[Math]:
    math = Math(processes=1, timeout=20)
    yield math
    math.close()


def written(text: str) -> str | None:
    values = answer_of(text)
    return None if values is None else canonical(values)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 12.", "12"),
        ("Answer: 12", "12"),
        ("So 3 + 4 = 7, and the answer is 1,234 apples.", "1234"),
        (r"So we get \boxed{\frac{1}{2}}.", "1/2"),
        (r"So we get $\boxed{\dfrac12}$.", "1/2"),
        (r"The answer is 0.5, that is, $\boxed{0.5}$", "1/2"),
        (r"\boxed{-\frac{3}{4}}", "-3/4"),
        (r"\boxed{2\frac{1}{2}}", "5/2"),
        ("The answer is 2 1/2.", "5/2"),
        ("The answer is 1/2", "1/2"),
        (r"The answer is 12. No: the final answer is $\frac{1}{3}$.", "1/3"),
        ("1e5", "100000"),
        ("The answer is -0.50.", "-1/2"),
        ("The answer is 1e5.", "100000"),
        (r"\boxed{1.5\times10^3}", "1500"),
        ("9 + 33 is 42\n#### 42", "42"),
        (r"\boxed{1/2} or rather \boxed{2/3}", "2/3"),
        (r"\boxed{12\text{ cm}}", "12"),
        (r"\boxed{5 dollars}", "5"),
        (r"\boxed{\$12.50}", "25/2"),
        (r"\boxed{50\%}", r"50\%"),
        ("The answer is 50%.", r"50\%"),
        (r"\boxed{\sqrt{8}}", r"2 \sqrt{2}"),
        (r"\boxed{x = 5}", "5"),
        (r"\boxed{x+x}", "2 x"),
        (r"\boxed{3,1,2}", r"\left\{1, 2, 3\right\}"),
        (r"\boxed{[1,2)}", r"\left[1, 2\right)"),
        (r"\boxed{30^\circ}", "30"),
        (r"\boxed{−3}", "-3"),
        (r"\boxed{\text{Paris}}", "paris"),
        (r"\boxed{Paris}", "paris"),
        (r"<think>It may be \boxed{3}.</think> The answer is 4.", "4"),
        ("I can't tell.", None),
        ("", None),
        (r"\boxed{}", None),
        (r"<think>It may be \boxed{3}, or", None),
    ],
)
def test_the_final_answer_is_found_and_written_in_one_way(text: str, answer: str | None):
    assert written(text) == answer
    if answer is not None:  # as an answer it reads back as itself
        values = answer_of(answer, whole=True)
        assert values is not None
        assert canonical(values) == answer


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("1/2", "0.5"),
        ("0.5", r"\frac{1}{2}"),
        ("1/3", "0.333333"),
        ("1,000", "1000"),
        ("12 cm", "12"),
        ("50%", "0.5"),
        ("50%", "50"),
        (r"2\sqrt{2}", r"\sqrt{8}"),
        (r"\{1, 2\}", "2, 1"),
        ("x = 5", "5"),
        ("3+4i", "4i+3"),
        (r"(x+1)^2", r"x^2+2x+1"),
        ("Paris", "paris"),
        (r"(-\infty, 2) \cup (3, \infty)", r"(-\infty,2)\cup(3,\infty)"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}"),
    ],
)
def test_equal_answers(first: str, second: str):
    assert math_answers.equal(first, second)
    assert math_answers.equal(second, first)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("1/2", "1/3"),
        ("0.33", "1/3"),
        ("12", "-12"),
        ("[1, 2)", "[1, 2]"),
        (r"\{1, 2\}", r"\{1, 3\}"),
        ("(1, 2)", "(2, 1)"),
        ("x^2", "x^3"),
        ("Paris", "pairs"),  # as products of letters they would be equal
        ("listen", "silent"),
        ("no", "on"),
        ("1e5", "1"),
        ("2 1/2", "1"),
        ("junk", "12"),
        ("", "12"),
    ],
)
def test_different_answers(first: str, second: str):
    assert not math_answers.equal(first, second)
    assert not math_answers.equal(second, first)


def test_the_last_complete_box_counts():
    assert boxed(r"\boxed{1} then \boxed{\frac{1}{2}} then \boxed{3") == r"\frac{1}{2}"
    assert boxed(r"\boxed{\{1, 2\}}") == r"\{1, 2\}"
    assert boxed("no box") is None


@pytest.mark.slow
def test_scores_and_answers_of_a_group(scorer: Math):
    texts = [r"\boxed{0.5}", "The answer is 1/2.", r"\boxed{\frac{2}{3}}", "I can't tell.", r"\boxed{(((}"]
    found = scorer([chat("What is half of one?", texts, {"answer": "1/2"})])
    assert [each.score for each in found] == [1, 1, 0, 0, 0]
    assert [each.answer for each in found] == ["1/2", "1/2", "2/3", None, "((("]
    assert found[3].counts == {"no answer": 1}
    assert scorer.equal("1/3", "0.333333")
    assert not scorer.equal("1/3", "0.3")


@pytest.mark.slow
@pytest.mark.parametrize(
    "right", [12, 12.0, "12", "$12$", r"\boxed{12}", "3 · 4 is twelve.\n#### 12", ["eleven", "12"], "12 apples"]
)
def test_right_answers_come_in_many_forms(scorer: Math, right: object):
    found = scorer([chat("3 · 4?", ["The answer is 12.", "The answer is 13."], {"answer": right})])
    assert [each.score for each in found] == [1, 0]


def test_a_row_without_right_answer_has_no_score(scorer: Math):
    (found,) = scorer([chat("?", ["The answer is 12."], {"answer": None})])
    assert (found.score, found.reason) == (None, "no right answer in the column answer")


@pytest.mark.slow
@pytest.mark.parametrize("text", [r"\boxed{9^{9^{9^{9}}}}", "So it is 9**9**9**9, I think."])
def test_what_never_ends_is_ended_and_the_next_is_scored(text: str):
    """A power of this size is one step for Python: no signal interrupts it. Nor need this be the main thread."""
    found: list = []

    def work() -> None:
        scorer = Math(processes=1, timeout=1.5)
        found.extend(scorer([chat("?", [text, "The answer is 3."], {"answer": "3"})]))
        scorer.close()

    thread = threading.Thread(target=work)
    start = time.monotonic()
    thread.start()
    thread.join()
    assert time.monotonic() - start < 60
    assert [each.score for each in found] == [None, 1]
    assert found[0].reason in ("took longer than 1.5 s", "ran out of memory")


@pytest.mark.slow
def test_what_happens_in_a_process_stays_there():
    pool = Pool("tests.align.calls", seconds=20, number=2)
    calls = [("double", (4,)), ("fail", ()), ("end", ()), ("fill", ()), ("talk", ()), ("double", (5,))]
    found = [pool.map(name, [arguments])[0] for name, arguments in calls]
    pool.close()
    assert found[0] == 8
    assert found[1] == Failed("raised ValueError: not like this")
    assert found[2] == Failed("its process ended")
    assert found[3] == Failed("ran out of memory")
    assert found[4:] == ["said", 10]


@pytest.mark.slow
def test_results_come_in_order():
    pool = Pool("tests.align.calls", seconds=20, number=2)
    assert pool.map("double", [(i,) for i in range(20)]) == [2 * i for i in range(20)]
    pool.close()
