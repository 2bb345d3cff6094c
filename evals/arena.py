"""Arena-Hard: two games per prompt against a baseline, in either order, with strong verdicts counting three times.

    A>>B: 1, 1, 1    A>B: 1    A=B: ½    B>A: 0    B>>A: 0, 0, 0        from the point of view of A

Game 0 shows the baseline as A, game 1 the model. The score is the mean over all expanded games of the model; intervals
are a bootstrap over prompts. With one common baseline the Bradley-Terry win rate is the same number (``bradley_terry``
is for models that also play each other).

References:
    Li et al. 2024, arXiv:2406.11939; github.com/lmarena/arena-hard-auto.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from evals.bootstrap import bootstrapped, numbers_of
from evals.measured import Measured, kept_prompts, own_prompts
from evals.ranking import Metric

METRICS: Mapping[str, Metric] = {
    "arena/score": Metric(
        "Mean score over both orders against the baseline, clear verdicts weighing three", "share", "higher"
    ),
}
"""Every metric of this module."""

EXPANDED: Mapping[str, tuple[float, ...]] = {
    "A>>B": (1.0, 1.0, 1.0),
    "A>B": (1.0,),
    "A=B": (0.5,),
    "B>A": (0.0,),
    "B>>A": (0.0, 0.0, 0.0),
}
"""Scores of A by verdict; ``A<B``, ``A<<B``, ``B=A``, ``B<A`` and ``B<<A`` are read as what they mean."""
_MIRRORED = {"A<<B": "B>>A", "A<B": "B>A", "B=A": "A=B", "B<A": "A>B", "B<<A": "A>>B"}
_PATTERNS = re.compile(r"\[\[([AB<>=]+)\]\]"), re.compile(r"\[([AB<>=]+)\]")


def parsed(judgement: str) -> str | None:
    """The last verdict in a judgement, ``[[A>>B]]`` or ``[A>>B]``; None where there is none that is known.

    Args:
        judgement: what the judge wrote.
    """
    for pattern in _PATTERNS:
        found = pattern.findall(judgement.upper())
        if found:
            verdict = _MIRRORED.get(found[-1], found[-1])
            return verdict if verdict in EXPANDED else None
    return None


def expanded(game0: str, game1: str) -> list[float]:
    """Scores of the model in both games of a prompt: those of game 1, then 1 minus those of game 0.

    Args:
        game0: verdict with the baseline as A.
        game1: verdict with the model as A.

    Raises:
        ValueError: an unknown verdict.
    """
    for game in (game0, game1):
        if _MIRRORED.get(game, game) not in EXPANDED:
            raise ValueError(f"unknown verdict {game!r}; it is one of {', '.join(EXPANDED)}")
    first, second = (EXPANDED[_MIRRORED.get(game, game)] for game in (game0, game1))
    return [*second, *(1 - score for score in first)]


def arena_score(games: Sequence[tuple[str | None, str | None]], prompts: Sequence[Hashable] | None = None) -> Measured:
    """Score against the baseline, a share; ties alone give ½.

    Args:
        games: of each prompt, the verdicts of game 0 (baseline as A) and game 1 (model as A); None where the judge gave
            none, which drops the prompt.
        prompts: of each; each its own where left out.

    Raises:
        ValueError: an unknown verdict, or no prompt with both.
    """
    names = own_prompts(prompts, len(games))
    keep = np.array([None not in pair for pair in games], dtype=bool)
    if not keep.any():
        raise ValueError(f"none of {len(games)} prompts has a verdict in both games; see how the judge is parsed")
    kept = kept_prompts(names, keep)
    rows = [expanded(a, b) for a, b in games if a is not None and b is not None]
    number = numbers_of(kept)
    clusters = int(number.max()) + 1
    sums = np.bincount(number, weights=[sum(row) for row in rows])
    sizes = np.bincount(number, weights=[len(row) for row in rows])
    estimate = bootstrapped(
        lambda drawn: (drawn @ sums) / (drawn @ sizes), n=int(sizes.sum()), prompts=clusters, bounds=(0.0, 1.0)
    )
    own = (sums / sizes).tolist()
    return Measured(
        estimates={"arena/score": estimate},
        n_dropped=int((~keep).sum()),
        by_prompt={"arena/score": dict(zip(dict.fromkeys(kept), own, strict=True))},
    )
