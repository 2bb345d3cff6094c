"""Flaws: how the preferences, labels and scores of real data differ from the gold score, each with a knob."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, fields

USED: Mapping[str, tuple[str, ...]] = {
    "pairs": ("label_noise", "length_bias", "near_identical", "reward_error"),
    "triples": ("label_noise", "length_bias", "near_identical", "reward_error"),
    "labels": ("label_noise", "thumbs_up_share", "reward_error"),
    "scored": ("reward_error",),
    "gold": (),
}
"""The flaws that each kind of rows can have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flaws:
    """What is wrong with a dataset. By default nothing is."""

    label_noise: float = 0.0
    """Probability that a preference or label is flipped after all else, in [0, 1]. Scores stay with their responses."""
    length_bias: float = 0.0
    """Probability that the longer response of a pair, in characters, is preferred whatever the scores; in [0, 1]."""
    near_identical: float = 0.0
    """Share of pairs, in [0, 1], that are replaced by a right response and the same with one digit of its final number
    changed, which is one token of the shipped policy."""
    thumbs_up_share: float | None = None
    """Share of labels that are up, in (0, 1): surplus rows of the other label are left out. None: as it comes."""
    reward_error: float = 0.0
    """Standard deviation, ≥ 0, of a Gaussian error added to the gold score of each response before anything is
    preferred or labelled; rows hold the score with its error, as of a reward model. Gold scores spread by 0.35."""

    def __post_init__(self) -> None:
        for key in ("label_noise", "length_bias", "near_identical"):
            if not 0 <= (value := getattr(self, key)) <= 1:  # NaN too
                raise ValueError(f"{key} must be a number from 0 to 1, not {value}")
        if self.thumbs_up_share is not None and not 0 < self.thumbs_up_share < 1:
            raise ValueError(f"thumbs_up_share must be a number between 0 and 1, not {self.thumbs_up_share}")
        if not (math.isfinite(self.reward_error) and self.reward_error >= 0):
            raise ValueError(f"reward_error must be a number of at least 0, not {self.reward_error}")

    def refuse_unused(self, kind: str) -> None:
        """Raises ValueError if a flaw is set that rows of this kind can't have."""
        for field in fields(self):
            if getattr(self, field.name) != field.default and field.name not in USED[kind]:
                can = ", ".join(USED[kind]) or "none"
                raise ValueError(f"{field.name} has no effect on {kind} (flaws they can have: {can}); leave it out")

    def observed(self, score: float, rng: random.Random) -> float:
        """A gold score as the data shows it, to 6 decimals."""
        return round(score + rng.gauss(0.0, self.reward_error) if self.reward_error else score, 6)

    def prefers_first(self, first: tuple[str, float], second: tuple[str, float], rng: random.Random) -> bool:
        """Whether the first of two (response, observed score) is preferred."""
        longer = len(first[0]) - len(second[0])
        biased = rng.random() < self.length_bias
        preferred = longer > 0 if biased and longer else first[1] > second[1]
        return preferred != self.flips(rng)

    def flips(self, rng: random.Random) -> bool:
        """Whether this preference or label is one of the flipped ones."""
        return rng.random() < self.label_noise
