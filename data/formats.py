"""Formats: recognises how a dataset is written from its columns and first rows, and says what is wrong if it can't."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.cells import RowError, column_in, group_in
from data.convert import (
    ASSISTANT,
    Draft,
    checked,
    messages,
    paired,
    paired_implicit,
    prompt_completion,
    scored,
    string_to_chat,
    transcript_to_chat,
    transcripts,
    unpaired,
)
from data.errors import DataError
from objectives.rows import Row

Kinds = Mapping[str, set[str]]
"""By column, the kinds of value seen in the first rows (see ``kind_of``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowProblem:
    """A row that can't be used, and why."""

    source: str
    index: int
    reason: str
    """Names no content of the row, so that problems can be counted by reason."""

    def __str__(self) -> str:
        return f"{self.source}, row {self.index}: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A way in which datasets are written."""

    name: str
    needs: tuple[str, ...]
    """Columns without which it can't be read."""
    expects: str
    """The columns and their types, for messages."""
    fits: Callable[[Kinds, Sequence[Mapping[str, Any]]], bool]
    """Whether columns and first rows look like it."""
    read: Callable[[Mapping[str, Any]], Draft]
    """Content of one raw row, or RowError."""
    to_chat: Callable[[Draft], Draft] = string_to_chat


def to_row(
    raw: Any, form: Format, *, source: str, index: int, as_chat: bool = False, attributes: Sequence[str] = ()
) -> Row | RowProblem:
    """Converts one raw row, which is not changed; never raises because of what is in it."""
    try:
        if not isinstance(raw, Mapping):
            raise RowError("not an object with columns")
        draft = checked(form.read(raw))
        if as_chat:
            draft = checked(form.to_chat(draft))
        own = {name: column_in(raw[name], name) for name in attributes if raw.get(name) not in (None, "")}
        group = group_in(raw.get("group"))
    except RowError as error:
        return RowProblem(source=source, index=index, reason=str(error))
    return Row(
        prompt=draft.prompt,
        responses=draft.responses,
        scores={**draft.scores, **own},
        label=draft.label,
        candidates=draft.candidates,
        group=group,
        source=source,
        index=index,
    )


def recognise(head: Sequence[Any], *, where: str, name: str = "auto") -> Format:
    """The format that the first rows have.

    Args:
        head: the first raw rows.
        where: the dataset, for messages.
        name: a format's name, to use it whatever the rows look like; only its columns must be there.
    Raises:
        DataError: nothing fits; shows what was found, what is expected and the mapping that would help.
    """
    rows = [raw for raw in head if isinstance(raw, Mapping)]
    kinds: dict[str, set[str]] = {}
    for raw in rows:
        for column, value in raw.items():
            kinds.setdefault(str(column), set()).add(kind_of(value))
    if name != "auto":
        if set(FORMATS[name].needs) <= kinds.keys():
            return FORMATS[name]
        raise DataError(_nothing_fits(where, rows, kinds, expected=f"{FORMATS[name].expects} for format {name}"))
    for form in FORMATS.values():
        if form.fits(kinds, rows):
            return form
    raise DataError(_nothing_fits(where, rows, kinds, expected=_EXPECTED))


def kind_of(value: Any) -> str:
    """What a value is, in words that messages can use."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return "text"
    if isinstance(value, bool):
        return "true/false"
    if isinstance(value, (int, float)):
        return "number"
    if isinstance(value, Mapping):
        return "messages" if {"role", "content"} <= value.keys() else "{" + ", ".join(map(str, value)) + "}"
    if isinstance(value, list):
        if not value:
            return "empty list"
        if isinstance(value[0], Mapping) and {"role", "content"} & value[0].keys():
            return "messages"
        return f"list of {kind_of(value[0])}"
    return type(value).__name__


def _could_be(kinds: Kinds, column: str, *wanted: str) -> bool:
    """Whether a column is there with one of the wanted kinds, or with nothing in any row seen."""
    seen = kinds.get(column, set())
    return bool(seen.intersection(wanted)) or (bool(seen) and seen <= {"nothing", "empty list"})


def _fits_columns(*columns: str) -> Callable[[Kinds, Sequence[Mapping[str, Any]]], bool]:
    return lambda kinds, _: all(_could_be(kinds, column, "text", "messages") for column in columns)


def _fits_unpaired(kinds: Kinds, _: Sequence[Mapping[str, Any]]) -> bool:
    fits = all(_could_be(kinds, column, "text", "messages") for column in ("prompt", "completion"))
    return fits and _could_be(kinds, "label", "true/false", "number", "text")


def _fits_implicit(kinds: Kinds, _: Sequence[Mapping[str, Any]]) -> bool:
    return "prompt" not in kinds and all(_could_be(kinds, leg, "text", "messages") for leg in ("chosen", "rejected"))


def _fits_transcripts(kinds: Kinds, rows: Sequence[Mapping[str, Any]]) -> bool:
    """No prompt column, and some row's chosen text is a transcript: prompts that are given are never parsed."""
    texts = [raw.get("chosen") for raw in rows] if _fits_implicit(kinds, rows) else []
    return any(isinstance(t, str) and t.lstrip().startswith("Human:") and ASSISTANT in t for t in texts)


def _fits_messages(kinds: Kinds, _: Sequence[Mapping[str, Any]]) -> bool:
    return _could_be(kinds, "messages", "messages")


def _fits_scored(kinds: Kinds, _: Sequence[Mapping[str, Any]]) -> bool:
    if not _could_be(kinds, "prompt", "text", "messages"):
        return False
    if _could_be(kinds, "responses", "list of text") and _could_be(kinds, "scores", "list of number"):
        return True
    entries = [kind for kind in kinds.get("responses", ()) if kind.startswith("list of {")]
    keys = [set(kind[len("list of {") : -1].split(", ")) for kind in entries]
    return any("text" in own and {"score", "scores"} & own for own in keys)


FORMATS: Mapping[str, Format] = {
    form.name: form
    for form in (  # in the order in which they are tried
        Format(
            name="hh",
            needs=("chosen", "rejected"),
            expects="chosen + rejected transcripts with 'Human:' and 'Assistant:' turns",
            fits=_fits_transcripts,
            read=transcripts,
            to_chat=transcript_to_chat,
        ),
        Format(
            name="paired",
            needs=("prompt", "chosen", "rejected"),
            expects="prompt + chosen + rejected, text or messages",
            fits=_fits_columns("prompt", "chosen", "rejected"),
            read=paired,
        ),
        Format(
            name="paired_implicit",
            needs=("chosen", "rejected"),
            expects="chosen + rejected that begin with the same prompt",
            fits=_fits_implicit,
            read=paired_implicit,
        ),
        Format(
            name="scored",
            needs=("prompt", "responses"),
            expects="prompt + responses [{text, score}, …]",
            fits=_fits_scored,
            read=scored,
        ),
        Format(
            name="unpaired",
            needs=("prompt", "completion", "label"),
            expects="prompt + completion + label, which is true or false; format prompt_completion passes labels over",
            fits=_fits_unpaired,
            read=unpaired,
        ),
        Format(
            name="prompt_completion",
            needs=("prompt", "completion"),
            expects="prompt + completion, text or messages",
            fits=_fits_columns("prompt", "completion"),
            read=prompt_completion,
        ),
        Format(
            name="messages",
            needs=("messages",),
            expects="messages that end with the assistant's",
            fits=_fits_messages,
            read=messages,
        ),
    )
}
"""Every format by name."""

_EXPECTED = (
    "prompt + chosen + rejected (or chosen + rejected that begin with the prompt; "
    "prompt + responses [{text, score}, …]; prompt + completion, with or without label; messages)"
)

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "prompt": ("question", "instruction", "query", "input", "problem", "context"),
    "chosen": ("better", "preferred", "accepted", "win", "winner", "positive", "response_chosen", "chosen_response"),
    "rejected": (
        *("worse", "dispreferred", "lose", "loser", "negative", "reject"),
        *("response_rejected", "rejected_response"),
    ),
    "gold": (),
    "reference": (),
    "completion": ("answer", "response", "output", "text", "solution", "target"),
    "label": (
        *("labels", "thumbs", "thumbs_up", "is_good", "good", "preference", "desirable", "is_desirable", "liked"),
        *("feedback", "accepted", "is_chosen", "vote", "upvoted"),
    ),
    "messages": ("conversation", "conversations", "dialogue", "dialog", "chat", "turns"),
    "responses": ("completions", "candidates", "generations", "outputs", "answers"),
    "scores": ("ratings", "rewards"),
    "margin": (),
    "group": ("subset", "category"),
    **{name: () for leg in ("chosen", "rejected", "gold") for name in (f"score_{leg}", f"{leg}_score")},
}
"""Our columns, and what others call them."""

_GUESSES = (
    ("prompt", "chosen", "rejected"),
    ("chosen", "rejected"),
    ("prompt", "responses", "scores"),
    ("prompt", "responses"),
    ("prompt", "completion", "label"),
    ("prompt", "completion"),
    ("messages",),
)
"""Sets of columns to guess a mapping for, most telling first."""


def _nothing_fits(where: str, rows: Sequence[Mapping[str, Any]], kinds: Kinds, expected: str) -> str:
    first = {column: kind_of(rows[0].get(column)) for column in kinds} if rows else {}
    found = ", ".join(f"{column!r} ({kind})" for column, kind in first.items())
    guess = next(_guesses(kinds), {})
    way_out = ", ".join(f"{ours}: {theirs}" for ours, theirs in guess.items()) or "prompt: <column>, …"
    return f"{where}: found {f'columns {found}' if found else 'no columns'}; expected {expected}; " + (
        f"set data.columns: {{{way_out}}}" if guess else f"say which is which with data.columns: {{{way_out}}}"
    )


def _guesses(kinds: Kinds) -> Iterator[dict[str, str]]:
    """Mappings after which some format fits, most telling first."""
    for wanted in _GUESSES:
        mapping: dict[str, str] = {}
        for ours in wanted:
            theirs = ours if ours in kinds else _named_like(ours, [c for c in kinds if c not in mapping.values()])
            if theirs is None:
                break
            mapping[ours] = theirs
        else:
            free = [name for name in COLUMNS["group"] if name in kinds and name not in mapping.values()]
            if free and "group" not in kinds:
                mapping["group"] = free[0]  # what evaluation can report apart
            # Types must fit too, or the mapping would lead to the same error again.
            rename = {theirs: ours for ours, theirs in mapping.items()}
            renamed = {rename.get(column, column): seen for column, seen in kinds.items()}
            if any(form.fits(renamed, []) for form in FORMATS.values()):
                yield {ours: theirs for ours, theirs in mapping.items() if ours != theirs}


def _named_like(ours: str, columns: Sequence[str]) -> str | None:
    """The column that others would use for ours: by synonym, then by spelling."""
    lower = {column.lower(): column for column in reversed(columns)}
    for name in (ours, *COLUMNS[ours]):
        if name in lower:
            return lower[name]
    near = difflib.get_close_matches(ours, list(lower), n=1, cutoff=0.8)
    return lower[near[0]] if near else None
