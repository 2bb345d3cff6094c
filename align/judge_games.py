"""Games between answers: who meets whom, what two orders are worth, what is counted of a judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from align.judge_prompts import PLAIN

LONGER = 30
"""Answers whose lengths differ by more characters than this are of different length."""


class Shown(NamedTuple):
    """An answer as the judge sees it."""

    text: str
    cut_off: bool


class Question(NamedTuple):
    """What the judge is asked; equal ones are asked once."""

    prompt: str
    reference: str | None
    answers: tuple[Shown, ...]


class Judged(NamedTuple):
    """What came of a question: a verdict or rating, or why there is none."""

    said: Any
    replies: int = 0
    """Without a verdict."""
    reason: str = ""


class Pair(NamedTuple):
    """Two answers that meet: two samples of a prompt, or a sample and the baseline."""

    first: int
    second: int | None
    """None is the baseline."""
    answers: tuple[Shown, Shown]

    @property
    def orders(self) -> tuple[tuple[Shown, Shown], ...]:
        """Both orders in which they are shown; none of equal answers, which tie unasked."""
        one, other = self.answers
        return () if one.text == other.text else ((one, other), (other, one))


class Outcome(NamedTuple):
    """What a pair is worth to the first of the two, in [0, 1]; None, and why, where an order has no verdict."""

    value: float | None
    counts: Mapping[str, float]
    reason: str = ""


class Meeting(NamedTuple):
    """What is said of two answers to one prompt."""

    value: float | None
    """What it is worth to the first of the two, in [0, 1]; None where it could not be told."""
    verdicts: tuple[str | None, ...]
    """By order: the first answer shown as A, then the second one. Empty where nothing was asked: equal answers, and
    excluded ones."""
    reason: str = ""
    """Why there is no value."""
    identical: bool = False


def round_robin(listed: Sequence[Shown | None], opponents: int | None) -> list[Pair]:
    """Every sample with as many of those after it, in a circle, as it has opponents; None is with every other."""
    present = [(i, shown) for i, shown in enumerate(listed) if shown is not None]
    n = len(present)
    reach = min(opponents or n, n // 2)
    met = {(min(i, (i + d) % n), max(i, (i + d) % n)) for i in range(n) for d in range(1, reach + 1)}
    return [Pair(present[i][0], present[j][0], (present[i][1], present[j][1])) for i, j in sorted(met)]


def outcome(pair: Pair, games: Sequence[Judged], worth: Mapping[str, float], policy: str) -> Outcome:
    """What comes of a pair.

    Args:
        pair: two answers.
        games: what was said of its ``orders``.
        worth: of a verdict to A, who is shown first.
        policy: see ``debiased``.
    """
    if not pair.orders:
        return Outcome(0.5, {"identical": 1})
    counts: dict[str, float] = {"pairs": 1, "replies without a verdict": sum(game.replies for game in games)}
    to_first = [None if game.said is None else worth[game.said] for game in games]
    value = debiased(to_first[0], None if to_first[1] is None else 1 - to_first[1], policy)
    if value is None:
        return Outcome(None, _some(counts | {"unjudged": 1}), next(game.reason for game in games if game.said is None))
    plain = [PLAIN[game.said] for game in games]
    counts |= {"judged": 1, "games": 2, "first": sum(plain), "consistent": float(plain[0] == 1 - plain[1])}
    counts["ties"] = sum(each == 0.5 for each in plain)
    longer = len(pair.answers[0].text) - len(pair.answers[1].text)
    if abs(longer) > LONGER and value != 0.5:
        counts |= {"longer": 1, "longer preferred": float((longer > 0) == (value > 0.5))}
    return Outcome(value, _some(counts))


def meeting(pair: Pair, games: Sequence[Judged], worth: Mapping[str, float], policy: str) -> Meeting:
    """What comes of a pair that was shown in both orders, or in one.

    Args:
        pair: two answers.
        games: what was said of its ``orders``, or of the first of them.
        worth: of a verdict to A, who is shown first.
        policy: see ``debiased``.
    """
    if not pair.orders:
        return Meeting(0.5, (), identical=True)
    verdicts = tuple(game.said for game in games)
    reason = next((game.reason for game in games if game.said is None), "")
    if len(games) == 1:
        value = None if games[0].said is None else worth[games[0].said]
    else:
        value = outcome(pair, games, worth, policy).value
    return Meeting(value, verdicts, reason)


def debiased(first: float | None, second: float | None, policy: str) -> float | None:
    """What two games are worth to an answer that was shown first in one and second in the other.

    Args:
        first: what the first game is worth to it, in [0, 1]; None where there was no verdict.
        second: the same of the second game.
        policy: ``mean`` of the two; ``strict``: 1 where it won both, 0 where it lost both, else 0.5.
    Returns:
        None where either is missing: one order alone would bring back the bias.
    """
    if first is None or second is None:
        return None
    if policy == "mean":
        return (first + second) / 2
    return 1.0 if min(first, second) > 0.5 else 0.0 if max(first, second) < 0.5 else 0.5


def rated(judged: Judged) -> Mapping[str, float]:
    """What is counted of a rating."""
    missing = {"unrated": 1} if judged.said is None else {}
    return _some({"ratings": 1, "replies without a verdict": judged.replies, **missing})


def rates(counts: Mapping[str, float]) -> dict[str, float]:
    """Shares that tell how far a judge can be trusted, from sums of counts; those of nothing are absent."""
    shares = {
        "pairs without a verdict": ("unjudged", "pairs"),
        "ratings missing": ("unrated", "ratings"),
        "position consistency": ("consistent", "judged"),
        "first-position preference": ("first", "games"),
        "ties": ("ties", "games"),
        "longer preferred": ("longer preferred", "longer"),
    }
    return {name: counts.get(of, 0) / counts[among] for name, (of, among) in shares.items() if counts.get(among)}


def _some(counts: Mapping[str, float]) -> dict[str, float]:
    return {name: number for name, number in counts.items() if number}
