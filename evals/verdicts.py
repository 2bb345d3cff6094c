"""A judge's verdicts on one model against another, and everything that is made of them.

Verdicts ─► win rate, length-controlled, WB-Reward, Arena score;  position, ties, length, failures of the judge
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from align.judge_prompts import PLAIN
from evals.agreement import agreement, both_orders, prefers_longer
from evals.arena import arena_score
from evals.bradley_terry import ELO, Strengths, bradley_terry
from evals.length_control import length_controlled
from evals.measured import Measured, kept_prompts
from evals.ranking import share_of
from evals.wildbench import MARGIN, reward, score
from evals.win_rate import win_rate
from objectives.stats import Estimate

KINDS = ("raw", "length_controlled", "wildbench", "arena")
"""What can be made of verdicts; the plain win rate always is."""
BIASED = 0.1
"""A judge whose first-position preference is further than this from one half, interval included, is warned of."""
_GRADES: Mapping[str, float] = {"A>>B": 1.0, "A>B": 0.5, "A=B": 0.0, "B>A": -0.5, "B>>A": -1.0}
"""WildBench's worth of a verdict to A."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Verdicts:
    """What one judge says of one model's answers against another's, one entry per pair of answers."""

    model: str
    baseline: str
    prompts: Sequence[str]
    """Ids; pairs of one prompt form a cluster."""
    share: np.ndarray
    """In [0, 1] from the model's point of view; NaN where there is no verdict. Shape (pair,)."""
    reasons: Sequence[str]
    """Why there is none, else empty."""
    length_model: np.ndarray
    """Characters of the model's answers, without what was thought before."""
    length_base: np.ndarray
    whole: np.ndarray
    """Where neither answer is empty or cut off."""
    identical: np.ndarray
    """Where both answers are the same, which ties without a question."""
    excluded: np.ndarray
    """Pairs that were not to be judged, for an answer that was cut off."""
    games: Sequence[tuple[str | None, str | None]] | None = None
    """Verdicts with the model's answer as A, and as B; None where it was not asked or not answered. None as a whole
    where the judge gives scores instead of verdicts."""
    ratings: np.ndarray | None = None
    """From 1 to 10, of the model's answers; of judges that rate."""

    def __len__(self) -> int:
        return len(self.share)

    @property
    def asked(self) -> np.ndarray:
        """Pairs that a judge had to look at; shape (pair,)."""
        return ~self.identical & ~self.excluded

    @property
    def unjudged(self) -> float:
        """Share of these without a verdict."""
        return float(np.isnan(self.share[self.asked]).mean()) if self.asked.any() else 0.0


def measure(
    verdicts: Verdicts, kinds: Sequence[str], *, both: bool, margin: int = MARGIN
) -> tuple[list[Measured], list[str]]:
    """Estimates of one model against one baseline, and what a reader has to know of them.

    What can't be made of these verdicts (a length-controlled win rate of one prompt, say) is left out with a warning.

    Args:
        verdicts: of one judge.
        kinds: of ``KINDS``.
        both: whether pairs were shown in both orders.
        margin: characters; see ``evals.wildbench``.
    Raises:
        ValueError: there is no verdict at all.
    """
    p, prompts = verdicts.share + 1, verdicts.prompts
    lengths = verdicts.length_model, verdicts.length_base
    warnings: list[str] = []
    found = [win_rate(p, prompts)]

    def add(what: str, make: Callable[[], Measured]) -> None:
        try:
            found.append(make())
        except ValueError as error:
            warnings.append(f"{what} is left out: {error}")

    if "length_controlled" in kinds:
        try:
            controlled = length_controlled(p, *lengths, prompts)
            found[0] = controlled.measured()
            warnings += [] if controlled.warning is None else [controlled.warning]
        except ValueError as error:
            warnings.append(f"win_rate/length_controlled is left out: {error}")
    add("judge/prefers_longer", lambda: prefers_longer(verdicts.share, *lengths, prompts))
    if verdicts.games is not None:
        asked = verdicts.asked
        if both and asked.any():
            add("the judge's position bias", lambda: _positions(verdicts, asked))
        elif asked.any():
            missing = np.isnan(verdicts.share[asked]).astype(np.float64)
            failures = share_of(missing, kept_prompts(prompts, asked))
            found.append(Measured(estimates={"judge/parse_failures": failures}))
    if "wildbench" in kinds and verdicts.games is not None:
        add("wildbench/reward", lambda: _wildbench(verdicts, margin))
    if "wildbench" in kinds and verdicts.ratings is not None:
        ratings = verdicts.ratings
        add("wildbench/score", lambda: score(ratings, prompts))
    if "arena" in kinds and verdicts.games is not None and not both:
        warnings.append("arena/score is left out: it takes every pair in both orders; set orders: both")
    elif "arena" in kinds and verdicts.games is not None:
        # Game 0 shows the baseline as A, game 1 the model; equal answers tie in both.
        games = [("A=B", "A=B") if same else (b, a)
                 for (a, b), same in zip(verdicts.games, verdicts.identical, strict=True)]  # fmt: skip
        add("arena/score", lambda: arena_score(games, prompts))
    return found, [*warnings, *_doubts(verdicts, found)]


def _doubts(verdicts: Verdicts, found: Sequence[Measured]) -> list[str]:
    told: list[str] = []
    known = verdicts.share[np.isfinite(verdicts.share)]
    same = int(verdicts.identical.sum())
    if (known == 0.5).all():
        of_them = f" ({same} of them because the answers are the same)" if same else ""
        told.append(f"all {len(known)} verdicts are ties{of_them}: they say nothing of which model is better")
    if len(set(verdicts.prompts)) == 1:
        told.append("there is one prompt only, so nothing has an interval; judge more prompts")
    first = next((each.estimates[name] for each in found if (name := "judge/first_position") in each.estimates), None)
    if first is not None and abs(first.value - 0.5) > BIASED and not first.low <= 0.5 <= first.high:
        told.append(
            f"the judge prefers the answer shown {'first' if first.value > 0.5 else 'second'}: "
            f"{100 * first.value:.0f} % of games go to the first; both orders cancel that, at the price of power"
        )
    return told


def _positions(verdicts: Verdicts, asked: np.ndarray) -> Measured:
    assert verdicts.games is not None
    games = [game for game, was in zip(verdicts.games, asked, strict=True) if was]
    prompts = kept_prompts(verdicts.prompts, asked)
    first = [np.nan if one is None else PLAIN[one] for one, _ in games]
    second = [np.nan if two is None else 1 - PLAIN[two] for _, two in games]
    found = both_orders(first, second, prompts)
    # The win rate stands elsewhere, with equal answers as ties.
    estimates = {name: each for name, each in found.estimates.items() if name != "judge/win_rate"}
    return replace(found, estimates=estimates, by_prompt={}, extra={})


def _wildbench(verdicts: Verdicts, margin: int) -> Measured:
    """Every game is an item; equal answers, which were not asked of, count as often as others."""
    assert verdicts.games is not None
    per_pair = max((sum(each is not None for each in game) for game in verdicts.games), default=1) or 1
    grades: list[float] = []
    items: list[int] = []
    for i, (game, same) in enumerate(zip(verdicts.games, verdicts.identical, strict=True)):
        as_a, as_b = game
        own = [0.0] * per_pair if same else [] if as_a is None else [_GRADES[as_a]]
        own += [] if as_b is None else [-_GRADES[as_b]]
        own = own if np.isfinite(verdicts.share[i]) else [np.nan]  # one order alone would bring its bias back
        grades += own
        items += [i] * len(own)
    at = np.array(items)
    return reward(
        grades,
        verdicts.length_model[at],
        verdicts.length_base[at],
        [verdicts.prompts[i] for i in items],
        margin=margin,
        skipped=~verdicts.whole[at],
    )


def compared(first: Verdicts, second: Verdicts) -> Measured:
    """Agreement of two judges on the same pairs: whom they prefer, ties being a class of their own.

    Raises:
        ValueError: no pair has verdicts of both.
    """
    one, two = (0.5 + 0.5 * np.sign(each.share - 0.5) for each in (first, second))
    return agreement(one, two, first.prompts)


def strengths(matches: Sequence[Verdicts], anchor: str) -> Strengths:
    """Bradley-Terry strengths from all verdicts of one judge; pairs without one are left out.

    Args:
        matches: of any two models each.
        anchor: the model whose strength is 0.
    Raises:
        ValueError: see ``evals.bradley_terry``.
    """
    first: list[str] = []
    second: list[str] = []
    scores: list[float] = []
    prompts: list[str] = []
    for match in matches:
        for share, prompt in zip(match.share.tolist(), match.prompts, strict=True):
            if np.isfinite(share):
                first.append(match.model)
                second.append(match.baseline)
                scores.append(share)
                prompts.append(prompt)
    return bradley_terry(first, second, scores, anchor=anchor, prompts=prompts)


def of_strengths(found: Strengths, model: str) -> Measured:
    """One model's strength, with those of all others beside it."""
    i = found.models.index(model)
    elo = found.elo()
    low, high = 1000 + ELO * found.low, 1000 + ELO * found.high
    estimate = Estimate(
        value=float(elo[i]),
        stderr=float("nan"),
        low=float(low[i]),
        high=float(high[i]),
        n=found.n,
        clusters=found.clusters,
        interval="bootstrap",
    )
    return Measured(
        estimates={"bradley_terry/win_rate": found.against_anchor()[model], "bradley_terry/elo": estimate},
        extra={
            "anchor": found.anchor,
            "elo": {name: round(float(value), 3) for name, value in zip(found.models, elo, strict=True)},
            "pseudo_games": found.pseudo_games,
        },
    )
