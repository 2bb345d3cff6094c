"""Responses without a model: right ones and five kinds of flawed ones, mixed as in what people write."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from data.worlds.problems import Problem, calculate, result_of, written

BEFORE = ("Let me think about it.", "This is a nice question.", "I like such questions.", "We can do this.")
BETWEEN = ("That is not hard.", "So far so good.", "We go on.", "Let me check that.")
AFTER = ("I hope this helps.", "That was fun.", "Ask me more.")
ELSEWHERE = (
    "It is a nice day.",
    "I like milk and bread.",
    "The train is old.",
    "My friend has a cat.",
    "On Monday it was cold.",
    "We can go to the sea.",
)


def right(problem: Problem, rng: random.Random) -> str:
    """The worked answer. Gold score 1."""
    del rng
    return problem.worked


def slip(problem: Problem, rng: random.Random) -> str:
    """One step miscalculated and gone on with. A wrong answer, to the point and closed."""
    slipped = rng.randrange(len(problem.operations))
    value, steps = problem.operands[0], list[str]()
    for i, (operation, operand) in enumerate(zip(problem.operations, problem.operands[1:], strict=True)):
        result = calculate(value, operation, operand)
        if i == slipped:
            # Nothing becomes negative, whatever is taken away later.
            floor = problem.operands[-1] if problem.operations[i + 1 :] == "-" else 0
            result = rng.choice([r for d in (-10, -2, -1, 1, 2, 10) if (r := result + d) >= floor])
        steps.append(f"{value} {operation} {operand} = {result}")
        value = result
    return written(steps, value)


def wrong_operation(problem: Problem, rng: random.Random) -> str:
    """The last operation misread: + for −, − for +, + for ×. True steps to a wrong answer, to the point and closed."""
    del rng
    value = ([problem.operands[0], *result_of(problem.operands, problem.operations)])[-2]
    last = problem.operands[-1]
    operation = "-" if problem.operations[-1] == "+" else "+"
    left, other = (value, last) if operation == "+" or value >= last else (last, value)
    result = calculate(left, operation, other)
    if result == problem.answer:  # 2 + 2 for 2 × 2
        operation, result = "-", 0
    return written([*problem.steps[:-1], f"{left} {operation} {other} = {result}"], result)


def rambling(problem: Problem, rng: random.Random) -> str:
    """Right, with one to three sentences around it that nobody needs."""
    places = rng.sample(["before", "between", "after"], rng.choice([1, 2, 2, 3]))
    *steps, final = [f"{step}." for step in problem.steps] + [f"The answer is {problem.answer}."]
    return " ".join(
        [
            *([rng.choice(BEFORE)] if "before" in places else []),
            *steps,
            *([rng.choice(BETWEEN)] if "between" in places else []),
            final,
            *([rng.choice(AFTER)] if "after" in places else []),
        ]
    )


def ill_formed(problem: Problem, rng: random.Random) -> str:
    """The steps without a final answer, or the bare number. No checkable answer, so wrong."""
    return " ".join(f"{step}." for step in problem.steps) if rng.random() < 0.7 else f"{problem.answer}."


def off_topic(problem: Problem, rng: random.Random) -> str:
    """One to three sentences about something else. Gold score 0."""
    del problem
    return " ".join(rng.sample(ELSEWHERE, rng.choice([1, 2, 2, 3])))


KINDS: Mapping[str, Callable[[Problem, random.Random], str]] = {
    kind.__name__: kind for kind in (right, slip, wrong_operation, rambling, ill_formed, off_topic)
}
"""Every kind of response by name."""

USUAL: Mapping[str, float] = {
    "right": 0.48,
    "slip": 0.12,
    "wrong_operation": 0.08,
    "rambling": 0.14,
    "ill_formed": 0.10,
    "off_topic": 0.08,
}
"""Shares of the kinds in what people write."""

MISREAD: Mapping[str, float] = {
    "right": 0.26,
    "slip": 0.04,
    "wrong_operation": 0.52,
    "rambling": 0.10,
    "ill_formed": 0.04,
    "off_topic": 0.04,
}
"""The same where a question is tricky: the misreading is the most common response."""


def respond(problem: Problem, kind: str, rng: random.Random) -> str:
    """A response of one kind.

    Raises:
        ValueError: no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of response {kind!r} (known: {', '.join(KINDS)})")
    return KINDS[kind](problem, rng)


def candidates(problems: Sequence[Problem], number: int = 8, seed: int = 0) -> list[list[str]]:
    """Responses to each problem, of kinds drawn with the shares ``USUAL`` or, to tricky questions, ``MISREAD``.

    Args:
        problems: what to respond to.
        number: responses to each, ≥ 1; some may be equal.
        seed: of the draw.
    """
    if number < 1:
        raise ValueError(f"number of responses must be at least 1, not {number}")
    rng = random.Random(f"candidates/{seed}")
    drawn = []
    for problem in problems:
        shares = MISREAD if problem.tricky else USUAL
        kinds = rng.choices(list(shares), list(shares.values()), k=number)
        drawn.append([respond(problem, kind, rng) for kind in kinds])
    return drawn
