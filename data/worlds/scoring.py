"""Scoring: the checkable answer of a response, and how good the response is."""

from __future__ import annotations

import re
from dataclasses import dataclass

from data.worlds.problems import Problem, calculate

RIGHT, TO_THE_POINT, WELL_FORMED = 0.6, 0.2, 0.2
"""Weights of the parts of the gold score. With ``RIGHT`` above one half, any right answer beats any wrong one."""

_FINAL = re.compile(r"The answer is (\d{1,9})\.", re.ASCII)
_STEP = re.compile(r"(\d{1,9}) ([-+×]) (\d{1,9}) = (\d{1,9})\.", re.ASCII)
_SENTENCE = re.compile(r"[^.?!]*[.?!]+|[^.?!]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the gold score is made of, each in [0, 1]."""

    right: float
    to_the_point: float
    well_formed: float

    @property
    def score(self) -> float:
        """The weighted sum, in [0, 1]."""
        return RIGHT * self.right + TO_THE_POINT * self.to_the_point + WELL_FORMED * self.well_formed


def answer_of(text: str) -> int | None:
    """The number in the last "The answer is N." of a response; None where there is none."""
    found = _FINAL.findall(text)
    return int(found[-1]) if found else None


def gold_score(problem: Problem, text: str) -> float:
    """How good a response is, in [0, 1].

        score = 0.6·right + 0.2·to the point + 0.2·well formed

    Right is 1 if ``answer_of`` is the problem's answer, else 0. To the point is the share of sentences that are steps
    or the final answer, counting no more of them than the problem takes. Well formed is one half for the share of the
    problem's number of steps that are there and true (if not what the question asks for), one half for ending with the
    only "The answer is N.". The worked answer scores 1, any right answer at least 0.6, any wrong one at most 0.4.
    """
    return gold_parts(problem, text).score


def gold_parts(problem: Problem, text: str) -> Parts:
    """The parts of ``gold_score``."""
    sentences = [sentence.strip() for sentence in _SENTENCE.findall(text) if sentence.strip()]
    steps = [match for sentence in sentences if (match := _STEP.fullmatch(sentence))]
    finals = [sentence for sentence in sentences if _FINAL.fullmatch(sentence)]
    needed = len(problem.operations)
    useful = min(len(steps), needed) + min(len(finals), 1)
    true = sum(calculate(int(left), operation, int(right)) == int(result) for left, operation, right, result in
               (match.groups() for match in steps))  # fmt: skip
    worked = min(true, needed) / max(needed, len(steps))
    closed = len(_FINAL.findall(text)) == 1 and bool(finals) and sentences[-1] == finals[0]
    return Parts(
        right=float(answer_of(text) == problem.answer),
        to_the_point=useful / max(len(sentences), 1),
        well_formed=(worked + closed) / 2,
    )
