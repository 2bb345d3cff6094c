"""The rows of a run as the doctor and the filters see them: all training sources together, and what is evaluated on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from data.rowstore import BATCH, RowView
from data.traits import MARKERS, Look, Traits, traits_batch
from data.workers import Workers


@dataclass(frozen=True, kw_only=True)
class Surveyed:
    """Rows as they were read, before rules and relabelers."""

    rows: RowView
    """Of all training sources, one after the other."""
    held: RowView | None
    """Of the evaluation set; None where a share of the prompts is held out instead, or nothing is."""
    workers: Workers
    specials: tuple[str, ...] = MARKERS
    """Control tokens to look for."""
    sources: Sequence[str] = field(default=())
    """Names of the training sources, in order."""

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def traits(self) -> Traits:
        """What can be seen of each row by itself."""
        jobs = self.rows.sources(BATCH)
        return Traits.joined(list(self.workers.map(traits_batch, Look(specials=self.specials), jobs)))

    @cached_property
    def pairs(self) -> np.ndarray:
        """Whether each row has a chosen and a rejected response, (row,)."""
        return self.rows.of_kinds(lambda kind: {"chosen", "rejected"} <= set(kind.legs))

    @cached_property
    def labelled(self) -> np.ndarray:
        """Whether each row has a label, (row,)."""
        return self.rows.of_kinds(lambda kind: kind.labelled)

    @cached_property
    def scored(self) -> np.ndarray:
        """Whether each row is a list of scored responses, (row,)."""
        return self.rows.of_kinds(lambda kind: kind.scored)

    def shared_prompts(self) -> np.ndarray:
        """Which training rows have a prompt of the evaluation set, (row,)."""
        if self.held is None:
            return np.zeros(len(self), dtype=bool)
        return np.isin(_whole(self.rows.prompts()), _whole(self.held.prompts()))

    def names(self, rows: np.ndarray, most: int) -> list[str]:
        """Names of the first rows for which this holds.

        Args:
            rows: whether, (row,).
            most: how many names are wanted.
        """
        return [row.where for row in self.rows.take(np.flatnonzero(rows)[:most])]

    def by_source(self, rows: np.ndarray) -> dict[str, int]:
        """How many rows there are of each source for which this holds, by name.

        Args:
            rows: whether, (row,).
        """
        return {
            source: int((rows & self.rows.of_kinds(lambda kind, name=source: kind.source == name)).sum())
            for source in dict.fromkeys(self.sources)
        }


def _whole(hashes: np.ndarray) -> np.ndarray:
    """128 bits as one value, (row, 2) to (row,)."""
    return np.ascontiguousarray(hashes).view(np.dtype((np.void, 16))).reshape(-1)


def joined(views: Sequence[RowView]) -> RowView:
    """Rows of one store, one after the other."""
    return RowView(views[0].store, np.concatenate([view.numbers for view in views]))
