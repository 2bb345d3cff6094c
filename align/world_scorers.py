"""Scorers of the embedded world, where everything can be known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from align.samples import Group, Sample
from align.scorers import SCORERS, Scored
from data.worlds import Problem, answer_of, gold_score, problem_of
from objectives.reward_transforms import asked

UNKNOWN = "not a question of the embedded world"


@SCORERS.register("gold")
@dataclass(frozen=True, slots=True, kw_only=True)
class Gold:
    """The gold score of the embedded world: right, to the point, well formed.

        score = 0.6·right + 0.2·to the point + 0.2·well formed,    in [0, 1]

    It takes no columns. Rows have the answer and the name of the story, but not the numbers; these stand in the
    question, which is read backwards (``data.worlds.problem_of``), so that samples of any rows of the world will do.

    References:
        ``data.worlds.gold_score``.
    """

    answers: ClassVar[bool] = True

    def __call__(self, groups: Sequence[Group]) -> list[Scored]:
        """Scores in [0, 1]; None where the prompt is no question of the world."""
        return [_scored(sample, right_only=False) for group in groups for sample in group.samples]


@SCORERS.register("world_answer")
@dataclass(frozen=True, slots=True, kw_only=True)
class WorldAnswer:
    """Whether the answer to a question of the embedded world is right.

        score = 1 if the last "The answer is N." is right, else 0

    Like ``gold`` it needs no columns.
    """

    answers: ClassVar[bool] = True

    def __call__(self, groups: Sequence[Group]) -> list[Scored]:
        """Scores in {0, 1}; None where the prompt is no question of the world."""
        return [_scored(sample, right_only=True) for group in groups for sample in group.samples]


def _scored(sample: Sample, *, right_only: bool) -> Scored:
    problem = _problem(asked(sample.prompt))
    if problem is None:
        return Scored(score=None, reason=UNKNOWN)
    answer = answer_of(sample.text)
    score = float(answer == problem.answer) if right_only else gold_score(problem, sample.text)
    return Scored(
        score=score,
        answer=None if answer is None else str(answer),
        counts={"no answer": 1} if answer is None else {},
    )


@lru_cache(maxsize=1024)
def _problem(question: str) -> Problem | None:
    try:
        return problem_of(question)
    except ValueError:
        return None
