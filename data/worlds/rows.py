"""Rows: datasets of the world in the formats that ``data.formats`` reads, ready for JSON.

Every row also has the columns ``template`` and ``answer`` of its problem.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.worlds.flaws import Flaws
from data.worlds.problems import Problem
from data.worlds.scoring import answer_of, gold_score

NO_FLAWS = Flaws()
UP = 0.5
"""A response whose observed score is above this is thumbs up: without reward error, if and only if it is right."""

Responses = Sequence[Sequence[str]]
"""Responses to each problem: of ``data.worlds.candidates``, or samples of a policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """Rows, and how many there might have been more."""

    rows: list[dict[str, Any]]
    left_out: int = 0
    """Pairs, triples, scored: problems whose responses all have the same score. Labels: rows of the label that there
    were too many of. Gold: 0."""


def pairs(problems: Sequence[Problem], responses: Responses, *, flaws: Flaws = NO_FLAWS, seed: int = 0) -> Made:
    """Prompt, chosen and rejected with their scores: of each problem the best and the worst response.

    Best and worst are so by observed score; then which is chosen is decided by that score or what ``flaws`` say.

    Args:
        problems: without repetition.
        responses: a list for each problem.
        flaws: what is wrong with the preferences.
        seed: of everything drawn.
    Raises:
        ValueError: a flaw that pairs can't have, or not one list of responses for each problem.
    """
    flaws.refuse_unused("pairs")
    return _paired(problems, responses, flaws, seed)


def triples(problems: Sequence[Problem], responses: Responses, *, flaws: Flaws = NO_FLAWS, seed: int = 0) -> Made:
    """Pairs with the worked answer as gold response, which flaws do not touch."""
    flaws.refuse_unused("triples")
    made = _paired(problems, responses, flaws, seed)
    worked = {problem.question: problem.worked for problem in problems}
    rows = [row | {"gold": _assistant(worked[row["prompt"][0]["content"]])} for row in made.rows]
    return Made(rows=rows, left_out=made.left_out)


def labels(problems: Sequence[Problem], responses: Responses, *, flaws: Flaws = NO_FLAWS, seed: int = 0) -> Made:
    """Prompt, completion and label, one row for each different response: true where its observed score is above 0.5."""
    flaws.refuse_unused("labels")
    rng = random.Random(f"labels/{seed}")
    rows = []
    for problem, listed in _observed(problems, responses, flaws, rng):
        for text, score in listed:
            label = (score > UP) != flaws.flips(rng)
            rows.append({"prompt": _user(problem), "completion": _assistant(text), "label": label} | _columns(problem))
    kept = _with_share(rows, flaws.thumbs_up_share, rng)
    return Made(rows=kept, left_out=len(rows) - len(kept))


def scored(problems: Sequence[Problem], responses: Responses, *, flaws: Flaws = NO_FLAWS, seed: int = 0) -> Made:
    """Prompt and its different responses with their observed scores, in the order given."""
    flaws.refuse_unused("scored")
    rows = []
    for problem, listed in _observed(problems, responses, flaws, random.Random(f"scored/{seed}")):
        if len({score for _, score in listed}) > 1:
            entries = [{"text": text, "score": score} for text, score in listed]
            rows.append({"prompt": _user(problem), "responses": entries} | _columns(problem))
    return Made(rows=rows, left_out=len(problems) - len(rows))


def gold(problems: Sequence[Problem]) -> Made:
    """Prompt and completion: the worked answer, for supervised training."""
    return Made(rows=[{"prompt": _user(p), "completion": _assistant(p.worked)} | _columns(p) for p in problems])


MAKERS: Mapping[str, Callable[..., Made]] = {"pairs": pairs, "triples": triples, "labels": labels, "scored": scored}
"""What makes rows from responses, by kind."""

ROW_KINDS = (*MAKERS, "gold")


def _paired(problems: Sequence[Problem], responses: Responses, flaws: Flaws, seed: int) -> Made:
    rng = random.Random(f"pairs/{seed}")
    rows = []
    for problem, listed in _observed(problems, responses, flaws, rng):
        if len({score for _, score in listed}) < 2:
            continue
        best, worst = (extreme(listed, key=lambda entry: entry[1]) for extreme in (max, min))
        if rng.random() < flaws.near_identical:
            base = best[0] if answer_of(best[0]) == problem.answer else problem.worked
            best, worst = (
                (text, flaws.observed(gold_score(problem, text), rng)) for text in (base, other_digit(base, rng))
            )
        chosen, rejected = (best, worst) if flaws.prefers_first(best, worst, rng) else (worst, best)
        rows.append(
            {
                "prompt": _user(problem),
                "chosen": _assistant(chosen[0]),
                "rejected": _assistant(rejected[0]),
                "score_chosen": chosen[1],
                "score_rejected": rejected[1],
            }
            | _columns(problem)
        )
    return Made(rows=rows, left_out=len(problems) - len(rows))


def other_digit(text: str, rng: random.Random) -> str:
    """The text with the last digit of the last "The answer is N." changed: one token, and another answer."""
    last = list(re.finditer(r"The answer is \d*(\d)\.", text))[-1]
    digit = rng.choice([d for d in "0123456789" if d != last[1]])
    return text[: last.start(1)] + digit + text[last.end(1) :]


def _observed(
    problems: Sequence[Problem], responses: Responses, flaws: Flaws, rng: random.Random
) -> list[tuple[Problem, list[tuple[str, float]]]]:
    """Each problem with its different responses and their observed scores."""
    if len(problems) != len(responses):
        raise ValueError(f"there are {len(problems)} problems and {len(responses)} lists of responses; give one each")
    # One error for each text: a reward model gives equal responses equal scores.
    return [
        (problem, [(text, flaws.observed(gold_score(problem, text), rng)) for text in dict.fromkeys(texts)])
        for problem, texts in zip(problems, responses, strict=True)
    ]


def _with_share(rows: list[dict[str, Any]], share: float | None, rng: random.Random) -> list[dict[str, Any]]:
    """As many rows as can be kept, in their order, of which ``share`` are up, to the nearest row."""
    if share is None:
        return rows
    by_label = {label: [i for i, row in enumerate(rows) if row["label"] is label] for label in (True, False)}
    total = min(len(by_label[True]) / share, len(by_label[False]) / (1 - share))
    kept = set(rng.sample(by_label[True], min(round(total * share), len(by_label[True]))))
    kept |= set(rng.sample(by_label[False], min(round(total * (1 - share)), len(by_label[False]))))
    return [row for i, row in enumerate(rows) if i in kept]


def _user(problem: Problem) -> list[dict[str, str]]:
    return [{"role": "user", "content": problem.question}]


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _columns(problem: Problem) -> dict[str, Any]:
    return {"template": problem.template, "answer": problem.answer}
