"""Rows of a store converted and given their legs, batch by batch, in workers where there are many.

What ``data.formats`` and ``data.shapes`` do to one row is done to a batch here, and what they look up in all rows is
read off the few kinds of rows that a store knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from data.formats import FORMATS, RowProblem, to_row
from data.rowstore import BATCH, Packed, RowView, numbered, pack_rows, rows_from
from data.shapes import (
    COMPLETION,
    MISMATCHED,
    Rule,
    arrange_each,
    attributes_in,
    compares_scores,
    no_attribute,
    other_prompts,
    refuse_equal_scores,
    require,
)
from data.workers import Workers
from objectives.rows import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """How raw rows become rows."""

    source: str
    format: str
    columns: Mapping[str, str]
    as_chat: bool
    attributes: tuple[str, ...]

    def rows(self, first: int, raws: Iterable[Any]) -> Iterator[Row | RowProblem]:
        """Rows and problems, in order; ``first`` is the number of the first."""
        form, also = FORMATS[self.format], {"as_chat": self.as_chat, "attributes": self.attributes}
        for index, raw in enumerate(raws, start=first):
            yield to_row(renamed(raw, self.columns), form, source=self.source, index=index, **also)


def renamed(raw: Any, columns: Mapping[str, str]) -> Any:
    """The row under our column names; a column of theirs that already has one of our names gives way."""
    if not columns or not isinstance(raw, Mapping):
        return raw
    theirs = set(columns.values())
    rest = {name: value for name, value in raw.items() if name not in theirs}
    return rest | {ours: raw.get(name) for ours, name in columns.items()}


def convert_batch(how: Conversion, job: tuple[int, list[Any]]) -> tuple[Packed, list[RowProblem]]:
    """Converts raw rows, of which the first has the number given."""
    made = list(how.rows(*job))
    return pack_rows(row for row in made if isinstance(row, Row)), [row for row in made if not isinstance(row, Row)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrangement:
    """What ``arrange_each`` takes."""

    wanted: tuple[str, ...]
    labels: bool
    rule: Rule
    seed: int


def arrange_batch(how: Arrangement, source: Any) -> tuple[Packed, list[RowProblem]]:
    """Arranges rows that ``RowView.sources`` tell of."""
    rows, problems = arrange_each(rows_from(source), how.wanted, labels=how.labels, rule=how.rule, seed=how.seed)
    return pack_rows(rows), problems


def arrange_view(
    rows: RowView,
    *,
    legs: Sequence[str],
    labels: bool,
    rule: Rule,
    seed: int,
    scores: Sequence[str],
    workers: Workers,
) -> tuple[RowView, list[RowProblem]]:
    """``data.shapes.arrange`` of a store's rows."""
    wanted = tuple(leg for leg in legs if leg != MISMATCHED)
    require(rows.first_of_kinds(), wanted, labels=labels, scores=scores)
    kinds = rows.kinds()
    scored = any(kind.scored for kind in kinds)
    if scored and compares_scores(wanted, rule, labels=labels):
        _refuse_equal_scores(rows)
    problems: list[RowProblem] = []
    if scored or (COMPLETION in wanted and not all(COMPLETION in kind.legs for kind in kinds)):
        how = Arrangement(wanted=wanted, labels=labels, rule=rule, seed=seed)
        made = []
        for packed, lost in workers.map(arrange_batch, how, rows.sources(BATCH)):
            made.append(rows.store.add(packed).numbers)
            problems += lost
        rows = RowView(rows.store, np.concatenate([np.arange(0), *made]))
    return _with_attributes(rows, attributes_in(scores), problems), problems


def _refuse_equal_scores(rows: RowView) -> None:
    """Looks at no more rows than it takes to find two scores of every source."""
    for source in dict.fromkeys(kind.source for kind in rows.kinds()):
        own = rows.take(np.flatnonzero(rows.of_kinds(lambda kind, name=source: kind.source == name)))
        seen = {each.score for each in own[0].candidates}
        if len(seen) == 1:  # of the others, one with another score is enough
            others = (row for row in own if {each.score for each in row.candidates} != seen)
            refuse_equal_scores([own[0], *islice(others, 1)])


def _with_attributes(rows: RowView, attributes: Sequence[str], problems: list[RowProblem]) -> RowView:
    """The rows that have a score for some attribute, of those that are wanted; every attribute must be somewhere."""
    if not attributes or not len(rows):
        return rows
    kinds = rows.kinds()
    for name in attributes:
        if not any(name in kind.scores for kind in kinds):
            raise no_attribute(rows[0].source, name, (key for kind in kinds for key in kind.scores))
    has = rows.of_kinds(lambda kind: any(name in kind.scores for name in attributes))
    problems += [
        RowProblem(source=row.source, index=row.index, reason="no score of any attribute")
        for row in rows.take(np.flatnonzero(~has))
    ]
    return rows.take(np.flatnonzero(has))


def mismatched_view(rows: RowView, seed: int) -> RowView:
    """``data.shapes.with_mismatched`` of a store's rows."""
    other = other_prompts(numbered(rows.prompts()), rows.of_kinds(lambda kind: kind.text), rows, seed)
    return RowView(rows.store, rows.numbers, rows.numbers[other])
