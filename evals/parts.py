"""Parts of an evaluation's rows that are reported apart: each dataset where there are several, each group of rows.

A part's results carry ``part_of`` in their ``extra``, by which reports and cards give them a line of one table instead
of a table each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from data.preparation import Split
from evals.results import Result

PART_OF = "part_of"
"""Key of ``Result.extra``: dataset and split of all the rows."""
MOST_GROUPS = 100
"""Groups of rows that are reported apart, the largest ones: a page of more is read by nobody."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """Some of the rows, under a name of their own."""

    dataset: str
    split: str
    members: np.ndarray
    """Which rows, (row,)."""


def parts_of(split: Split, rows: Sequence[int] | np.ndarray, dataset: str, name: str) -> tuple[list[Part], int]:
    """Each dataset and each group, where there are several, and how many groups are left out.

    Args:
        split: knows where rows come from, and their groups.
        rows: numbers of those that were evaluated, in the order of the masks.
        dataset: what results call all of them.
        name: what results call their split.
    """
    numbers = [int(row) for row in rows]
    sources = np.array([split.where[row][0] for row in numbers])
    datasets = list(dict.fromkeys(sources.tolist()))
    found = [Part(dataset=each, split=name, members=sources == each) for each in datasets] if len(datasets) > 1 else []
    groups = np.array([split.groups[row] for row in numbers] if len(split.groups) else [])
    sizes = Counter(groups.tolist())
    if len(sizes) < 2:
        return found, 0
    largest = {group for group, _ in sizes.most_common(MOST_GROUPS)}
    found += [
        Part(dataset=dataset, split=f"{name}, {group or 'other'}", members=groups == group)
        for group in sizes
        if group in largest
    ]
    return found, len(sizes) - len(largest)


def marked(results: Iterable[Result], dataset: str, split: str) -> list[Result]:
    """Results of a part, which say of what.

    Args:
        results: of some of the rows.
        dataset: of all of them.
        split: of all of them.
    """
    return [replace(each, extra={**each.extra, PART_OF: [dataset, split]}) for each in results]


def of_part(result: Result) -> bool:
    """Whether a result is over a part of the rows only."""
    return PART_OF in result.extra
