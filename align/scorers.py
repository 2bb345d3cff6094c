"""Scorers: what a response to a prompt is worth, by what can be checked, by a reward model or by a judge.

    groups of samples ─► scorer ─► one ``Scored`` for each sample, in order

A scorer is a registered frozen dataclass whose fields are its recipe keys. What can't be scored has no score and a
reason; it never gets a number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

from align.errors import RunError
from align.samples import Group, Sample
from objectives.registry import Registry

SCORERS = Registry(
    "scorer",
    elsewhere={
        "math_verify": "math",
        "exact_match": "exact",
        "function": "python",
        "rm": "reward_model",
        "llm_judge": "judge",
        "gold_score": "gold",
    },
)
"""Every scorer that ``scorers`` can name."""


def _no_counts() -> Mapping[str, float]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """What a scorer says of one sample."""

    score: float | None
    """None where it could not be scored."""
    answer: str | None = None
    """The extracted answer, alike for answers that are the same; None where there is none, or none was looked for."""
    reason: str = ""
    """Why there is no score: of what kind, and after a colon the particulars."""
    counts: Mapping[str, float] = field(default_factory=_no_counts)
    """What else happened, in numbers that add up over samples."""


@runtime_checkable
class Scorer(Protocol):
    """What every scorer does. It may also have

    * ``free``: the keys that no score depends on (a time limit, a batch size);
    * ``check()``: raises ``RunError`` for what this machine lacks, at no cost;
    * ``fingerprint()``: a hash of what its scores depend on besides its keys, a model's weights, say; raises
      ``RunError`` for what can't work, before a sample is read;
    * ``equal(first, second)``: whether two answers are the same though they are written differently;
    * ``rates(counts)``: shares worth reporting, from the sum of all samples' counts;
    * ``close()``: ends what it started and frees what it loaded; the next call begins anew.
    """

    def __call__(self, groups: Sequence[Group]) -> list[Scored]:
        """Scores all samples of all groups, in order."""
        ...


def column_of(sample: Sample, column: str) -> Any:
    """What a sample's row has in a column.

    Raises:
        RunError: rows have no such column.
    """
    if column not in sample.columns:
        has = ", ".join(sample.columns) or "none"
        raise RunError(
            f"prompt {sample.prompt_id} has no column {column!r} (columns: {has}); keep it when sampling, or name "
            "another column"
        )
    return sample.columns[column]


def right_answers(sample: Sample, column: str) -> list[str]:
    """The right answers in a column, as text: one, several in a list of which each is right, none where it is empty.

    Raises:
        RunError: rows have no such column.
    """
    value = column_of(sample, column)
    listed = value if isinstance(value, list | tuple) else [value]
    return [text for each in listed if each is not None and (text := _written(each).strip())]


def _written(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


_THOUGHTS = (
    re.compile(r"<think>.*?</think>", re.DOTALL),
    re.compile(r"^.*</think>", re.DOTALL),  # some templates write the opening mark, so that the response lacks it
    re.compile(r"<think>.*$", re.DOTALL),  # cut off while thinking
)


def without_thoughts(text: str) -> str:
    """The text without what stands between ``<think>`` and ``</think>``, either of which may be missing."""
    for pattern in _THOUGHTS:
        text = pattern.sub("", text)
    return text
