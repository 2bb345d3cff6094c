"""Filters applied to what was read: the one way by which rows leave, in a run and in ``data check --write``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from data.errors import DataError
from data.filters import FILTERS
from data.formats import RowProblem
from data.rowstore import RowView
from data.sources import LoadedRows
from data.surveyed import Surveyed, joined
from data.workers import Workers


def leaving(filters: Sequence[Any], rows: Surveyed) -> np.ndarray:
    """For each row the number of the filter that removes it, −1 where it stays, (row,).

    Raises:
        DataError: a filter can have no effect on these rows, or needs a model.
    """
    by = np.full(len(rows), -1, dtype=np.int32)
    for number, each in enumerate(filters):
        name = FILTERS.name_of(each)
        names = ", ".join(dict.fromkeys(rows.sources))
        if each.needs_model:
            raise DataError(
                f"filter {name} needs numbers of a model, which there is none of when {names} is read; give it to a "
                "recipe, or to python -m data check --with_model --write"
            )
        if (why := each.refuse(rows)) is not None:
            raise DataError(f"filter {name} has no effect on {names}: {why}; leave it out")
        by[each.leaving(rows, by < 0)] = number
    return by


def filtered(
    filters: Sequence[Any], loaded: Sequence[LoadedRows], held: Sequence[LoadedRows], workers: Workers
) -> list[LoadedRows]:
    """The training sources without the rows that filters remove, which become problems with their reason.

    Args:
        filters: instances of what ``FILTERS`` holds.
        loaded: the training sources; their rows are in one store.
        held: the evaluation set, or nothing; it stays as it is.
        workers: look at large datasets.
    Raises:
        DataError: see ``leaving``; or no row of a source stays.
    """
    if not filters:
        return list(loaded)
    rows = surveyed(loaded, held, workers)
    by = leaving(filters, rows)
    reasons = [f"filter {FILTERS.name_of(each)}: {each.reason}" for each in filters]
    found: list[LoadedRows] = []
    for each, own in zip(loaded, np.split(by, np.cumsum([len(one.rows) for one in loaded])[:-1]), strict=True):
        view = _view(each)
        if len(view) and (own >= 0).all():
            names = ", ".join(FILTERS.name_of(one) for one in filters)
            raise DataError(f"{each.source}: filter ({names}) leaves none of its {len(view)} rows; change or remove it")
        gone = np.flatnonzero(own >= 0)
        problems = [
            RowProblem(source=row.source, index=row.index, reason=reasons[int(own[place])])
            for place, row in zip(gone.tolist(), view.take(gone), strict=True)
        ]
        found.append(replace(each, rows=view.take(np.flatnonzero(own < 0)), problems=[*each.problems, *problems]))
    return found


def surveyed(loaded: Sequence[LoadedRows], held: Sequence[LoadedRows], workers: Workers, **also: Any) -> Surveyed:
    """What was read, as filters and doctor see it.

    Args:
        loaded: the training sources.
        held: the evaluation set, or nothing.
        workers: look at large datasets.
        also: further fields of ``Surveyed``.
    """
    return Surveyed(
        rows=joined([_view(each) for each in loaded]),
        held=joined([_view(each) for each in held]) if held else None,
        workers=workers,
        sources=[each.source for each in loaded],
        **also,
    )


def _view(loaded: LoadedRows) -> RowView:
    assert isinstance(loaded.rows, RowView)
    return loaded.rows
