"""Columns: what data says of a row beside its responses, as numbers that an objective can read.

An objective names those it reads in ``Needs(columns=...)``; then every row must have them, and ``batch.score(name)`` is
the number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


def _no_words() -> Mapping[str, float]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One number about each row: one of a few words, or a number within a range."""

    about: str
    """What it says, for messages."""
    leg: str
    """The response that it is about. A row must have this one itself: made of others by a conversion, it is another."""
    words: Mapping[str, float] = field(default_factory=_no_words)
    """What may stand in the column, and the number it becomes; none where it holds numbers."""
    lowest: float = -math.inf
    """Least number."""
    highest: float = math.inf
    """Greatest number."""

    @property
    def expects(self) -> str:
        """What may stand in it, for messages."""
        return " or ".join(self.words) if self.words else f"a number in [{self.lowest:g}, {self.highest:g}]"


COLUMNS: Mapping[str, Column] = {
    "rater_share": Column(
        about="the share of raters who prefer the chosen response",
        leg="chosen",
        lowest=0.0,
        highest=1.0,
    ),
    "chosen_by": Column(
        about="who wrote the chosen response",
        leg="chosen",
        words={"policy": 0.0, "reference": 1.0},
    ),
    "preference": Column(
        about="the probability that the completion is preferred to the opponent's",
        leg="completion",
        lowest=0.0,
        highest=1.0,
    ),
}
"""Every column that an objective can declare, by its name in the data."""
