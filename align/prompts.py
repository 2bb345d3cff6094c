"""Prompts to sample from: any dataset that can be trained on, and datasets of prompts alone; each prompt once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from align.prompt_settings import PromptSection
from align.samples import prompt_id
from data.arranging import renamed
from data.cells import RowError, text_in
from data.convert import Draft, checked, string_to_chat
from data.errors import DataError
from data.formats import recognise, to_row
from data.reading import read
from data.sources import HEAD, Source
from objectives.registry import did_you_mean
from objectives.rows import Row, Text

__all__ = ["Prompt", "PromptSection", "Prompts", "read_prompts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt of a dataset."""

    id: str
    text: Text
    row: int
    columns: Mapping[str, Any]


@dataclass(slots=True, kw_only=True)
class Prompts:
    """The prompts of a dataset, and what became of its rows."""

    source: str
    found: list[Prompt]
    rows: int
    repeated: int
    """Rows whose prompt an earlier row had."""
    problems: dict[str, list[int]]
    """Rows without a usable prompt, by reason."""


def read_prompts(section: PromptSection) -> Prompts:
    """Every different prompt, in the order of the rows.

    Raises:
        DataError: the dataset can't be read, has no prompts, or lacks a column that is to be kept.
    """
    name = section.dataset_name
    source = Source(
        dataset_name=name,
        split=section.split,
        config=section.dataset_config,
        columns=section.columns,
        format=section.format,
        as_chat=section.as_chat,
    )
    raws = read(name, split=section.split, config=section.dataset_config, streaming=False, limit=section.max_rows)
    head = list(islice(raws, HEAD))
    if not head:
        raise DataError(f"{name}: the dataset has no rows in split {section.split!r}; name one that has")
    _check_keep(section, head)
    result = Prompts(source=name, found=[], rows=0, repeated=0, problems={})
    seen: set[str] = set()
    for index, row in enumerate(_rows(source, head, chain(head, raws))):
        result.rows += 1
        if not isinstance(row, tuple):
            result.problems.setdefault(row, []).append(index)
            continue
        prompt, raw = row
        key = prompt_id(prompt)
        if key in seen:
            result.repeated += 1
            continue
        seen.add(key)
        columns = {column: _kept(raw.get(column), column, name, index) for column in section.keep}
        result.found.append(Prompt(id=key, text=prompt, row=index, columns=columns))
    if not result.found:
        reason, rows = next(iter(result.problems.items()))
        raise DataError(f"{name}: none of {result.rows} rows has a usable prompt; row {rows[0]}: {reason}")
    return result


def _rows(source: Source, head: Sequence[Any], raws: Iterator[Any]) -> Iterator[tuple[Text, Mapping[str, Any]] | str]:
    """Prompt and raw row, or the reason why a row has none."""
    first = [renamed(raw, source.columns) for raw in head]
    form = None
    if source.format != "auto" or not _are_prompts_alone(first):
        form = recognise(first, where=source.dataset_name, name=source.format)
    for index, raw in enumerate(raws):
        own = renamed(raw, source.columns)
        if form is None:
            yield _alone(own, raw, as_chat=source.as_chat)
            continue
        row = to_row(own, form, source=source.dataset_name, index=index, as_chat=source.as_chat)
        yield (row.prompt, raw) if isinstance(row, Row) else row.reason


def _are_prompts_alone(head: Sequence[Any]) -> bool:
    """Whether rows have a prompt and no response that a format would read."""
    columns = {str(column) for raw in head if isinstance(raw, Mapping) for column in raw}
    responses = {"chosen", "rejected", "completion", "responses"}
    return "prompt" in columns and not columns & responses


def _alone(row: Any, raw: Any, *, as_chat: bool) -> tuple[Text, Mapping[str, Any]] | str:
    try:
        if not isinstance(row, Mapping):
            raise RowError("not an object with columns")
        draft = checked(Draft(prompt=text_in(row.get("prompt"), "prompt"), responses={}))
        return (string_to_chat(draft) if as_chat else draft).prompt, raw
    except RowError as error:
        return str(error)


def _kept(value: Any, column: str, source: str, row: int) -> Any:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise DataError(
            f"{source}, row {row}: data.keep names the column {column!r}, and a {type(value).__name__} like this one "
            "can't be written as JSON; leave it out, or turn it into text or a finite number"
        ) from None
    return value


def _check_keep(section: PromptSection, head: Sequence[Any]) -> None:
    found = list(dict.fromkeys(str(name) for raw in head if isinstance(raw, Mapping) for name in raw))
    for column in section.keep:
        if column not in found:
            raise DataError(
                f"{section.dataset_name}: data.keep names the column {column!r}, which is not there"
                f"{did_you_mean(column, found)} (columns: {', '.join(found)})"
            )
