"""Problems: short word problems over small numbers, in splits that share no combination of operands."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

from data.worlds.stories import NAMES, THINGS, TRAINED, UNTRAINED, Story

SPLITS = ("train", "held_out", "held_out_templates")
HELD_OUT_SHARE = 0.25
"""Share of the combinations of operands that training never has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One word problem with its answer."""

    question: str
    template: str
    """Name of the story it is told with."""
    operands: tuple[int, ...]
    """Two or three numbers, in the order of the question."""
    operations: str
    """What is done with them from left to right, e.g. ``+-`` for a + b − c."""
    tricky: bool
    """Whether people often misread such a question; see ``Story``."""

    @property
    def steps(self) -> tuple[str, ...]:
        """The calculation, one step each: ``7 + 5 = 12``, ``12 - 4 = 8``."""
        return steps_of(self.operands, self.operations)

    @property
    def answer(self) -> int:
        """The final answer, at least 1."""
        return result_of(self.operands, self.operations)[-1]

    @property
    def worked(self) -> str:
        """The worked answer: ``7 + 5 = 12. 12 - 4 = 8. The answer is 8.``"""
        return written(self.steps, self.answer)

    @property
    def combination(self) -> str:
        """Operands and operations, the same for every order that makes no difference.

        3 + 5 is 5 + 3, and 9 + 2 − 4 is 9 − 4 + 2, but 9 − 4 is not 4 − 9.
        """
        return combination(self.operands, self.operations)


def problems(split: str, number: int, seed: int = 0) -> list[Problem]:
    """Problems of one split, no question twice, the same for the same seed.

    A combination of operands (see ``Problem.combination``) belongs to training or to the held-out splits by a hash of
    it alone. A held-out combination is unseen as a whole: one of its two steps may well occur in training.

    Args:
        split: ``train``; ``held_out``, the same stories with other combinations; ``held_out_templates``, other stories
            with combinations that training never has.
        number: how many, ≥ 1.
        seed: of the draw.
    Raises:
        ValueError: no such split, or fewer problems in it than asked for.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} (known: {', '.join(SPLITS)})")
    if number < 1:
        raise ValueError(f"number of problems must be at least 1, not {number}")
    stories = UNTRAINED if split == "held_out_templates" else TRAINED
    rng = random.Random(f"problems/{split}/{seed}")
    found: dict[str, Problem] = {}
    repeats = 0
    while len(found) < number:
        story = rng.choice(stories)
        operands = rng.choice(operands_of(story.operations, held_out=split != "train"))
        problem = _told(story, operands, rng)
        repeats = repeats + 1 if problem.question in found else 0
        found[problem.question] = problem
        if repeats > 1000:  # in a row: nearly every problem there is has been drawn
            raise ValueError(f"split {split} has few more than {len(found)} problems, not {number}; ask for fewer")
    return list(found.values())


def problem_of(question: str) -> Problem:
    """The problem that a question tells, whatever else is known of it: the stories, read backwards.

    Raises:
        ValueError: no story tells such a question.
    """
    for story, pattern in _patterns():
        if found := pattern.fullmatch(question.strip()):
            gaps = found.groupdict()
            operands = tuple(int(gaps[gap]) for gap in "abc" if gap in gaps)
            return _problem(story, found[0], operands)
    raise ValueError("not a question of the embedded world")


@cache
def _patterns() -> Sequence[tuple[Story, re.Pattern[str]]]:
    """Each story as a pattern; a gap that occurs again is filled with the same again."""
    fillings = {"n": "|".join(NAMES), "m": "|".join(NAMES), "t": "|".join(THINGS)}
    patterns: list[tuple[Story, re.Pattern[str]]] = []
    for story in (*TRAINED, *UNTRAINED):
        text = re.escape(story.text).replace(r"\{", "{").replace(r"\}", "}")
        for gap in "nmtabc":
            text = text.replace(f"{{{gap}}}", f"(?P<{gap}>{fillings.get(gap, '[0-9]{1,4}')})", 1)
            text = text.replace(f"{{{gap}}}", f"(?P={gap})")
        patterns.append((story, re.compile(text)))
    return patterns


@cache
def operands_of(operations: str, *, held_out: bool) -> Sequence[tuple[int, ...]]:
    """Every choice of operands for these operations that is in training, or every one that is held out."""
    small = range(2, 16)
    first = range(2, 6) if operations[0] == "×" else range(2, 31) if operations[0] == "-" else small
    second = range(2, 10) if operations[0] == "×" else small
    ranges = [first, second, small][: len(operations) + 1]
    return [
        operands
        for operands in product(*ranges)
        if min(result_of(operands, operations)) >= 1 and is_held_out(combination(operands, operations)) == held_out
    ]


def is_held_out(combined: str) -> bool:
    """Whether a combination of operands is kept from training; a stable hash of it decides."""
    digest = hashlib.sha256(combined.encode()).digest()
    return int.from_bytes(digest[:4]) < HELD_OUT_SHARE * 2**32


def combination(operands: Sequence[int], operations: str) -> str:
    """See ``Problem.combination``."""
    product_first = operations[0] == "×"
    if product_first:
        head, rest = ["×".join(map(str, sorted(operands[:2])))], zip(operations[1:], operands[2:], strict=True)
    else:
        head, rest = [], zip("+" + operations, operands, strict=True)
    signed = sorted(f"{sign}{operand:02d}" for sign, operand in rest)
    return " ".join(head + signed)


def result_of(operands: Sequence[int], operations: str) -> list[int]:
    """What each step results in, from left to right."""
    results: list[int] = []
    value = operands[0]
    for operation, operand in zip(operations, operands[1:], strict=True):
        value = calculate(value, operation, operand)
        results.append(value)
    return results


def calculate(left: int, operation: str, right: int) -> int:
    """One step of ``+``, ``-`` or ``×``."""
    return left * right if operation == "×" else left + right if operation == "+" else left - right


def steps_of(operands: Sequence[int], operations: str) -> tuple[str, ...]:
    """The steps as they are written."""
    return tuple(_steps(operands, operations))


def _steps(operands: Sequence[int], operations: str) -> Iterator[str]:
    left = operands[0]
    for operation, right, result in zip(operations, operands[1:], result_of(operands, operations), strict=True):
        yield f"{left} {operation} {right} = {result}"
        left = result


def written(steps: Sequence[str], answer: int) -> str:
    """Steps and final answer as a response."""
    return " ".join([*(f"{step}." for step in steps), f"The answer is {answer}."])


def _told(story: Story, operands: tuple[int, ...], rng: random.Random) -> Problem:
    one, other = rng.sample(NAMES, 2)
    gaps = dict(zip("abc", operands, strict=False))
    question = story.text.format(n=one, m=other, t=rng.choice(THINGS), **gaps)
    return _problem(story, question, operands)


def _problem(story: Story, question: str, operands: tuple[int, ...]) -> Problem:
    return Problem(
        question=question,
        template=story.name,
        operands=operands,
        operations=story.operations,
        tricky=story.tricky,
    )
