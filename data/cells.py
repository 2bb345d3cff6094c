"""One cell of a raw row: text, messages or a number, or the reason why it is none of these."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from objectives.columns import COLUMNS
from objectives.rows import Message, Text

TEMPLATE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
"""What chat templates read of a message. Other keys (ids, time stamps) would only make equal turns differ."""


ROUNDING = 1e-3
"""How far above 0 rounding may bring a log-prob, nats."""


class RowError(ValueError):
    """Why one row can't be used."""


def turn(role: str, content: str) -> Message:
    """One message."""
    return {"role": role, "content": content}


def is_text(value: Any) -> bool:
    """Whether a value is a string, or a list of what looks like messages."""
    return isinstance(value, str) or (
        isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) and "role" in m for m in value)
    )


def text_in(value: Any, column: str) -> Text:
    """A string as it is, or messages reduced to what chat templates read."""
    if isinstance(value, str):
        return _encodable(value, column)
    if value is None:
        raise RowError(f"no {column}")
    if isinstance(value, Mapping) and "role" in value:
        value = [value]
    if not isinstance(value, Sequence):
        raise RowError(f"{column} is neither text nor messages")
    if not value:
        raise RowError(f"{column} is an empty list")
    return tuple(_message(message, column) for message in value)


def _message(message: Any, column: str) -> Message:
    if not isinstance(message, Mapping):
        raise RowError(f"{column} is a list of something other than messages")
    # Arrow fills keys that other messages have with None; templates ask whether a key is there.
    kept = {key: _without_none(message[key]) for key in TEMPLATE_KEYS if message.get(key) is not None}
    if not isinstance(kept.get("role"), str):
        raise RowError(f"a message of {column} has no role")
    if "content" not in kept and not kept.get("tool_calls"):
        raise RowError(f"a message of {column} has no content")
    if not isinstance(kept.get("content", ""), str):
        raise RowError(f"a message of {column} has content that is not text")
    _encodable(kept.get("content", ""), column)
    return kept


def _encodable(text: str, column: str) -> str:
    """Half of a surrogate pair, which JSON can spell, is no character: no tokenizer and no file could take it."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RowError(f"{column} holds half of a character (a lone surrogate)") from None
    return text


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value


def label_in(value: Any, what: str) -> bool:
    """True or false, also as 1 or 0, and as text, because every column of a CSV file is text."""
    if value is None:
        raise RowError(f"no {what}")
    if isinstance(value, str):
        value = {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
    if not isinstance(value, (bool, int, float)) or value not in (0, 1):
        raise RowError(f"{what} is neither true nor false")
    return bool(value)


def number_in(value: Any, what: str) -> float:
    """A finite number, also where it is written as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise RowError(f"{what} is not a number")
    try:
        number = float(value)  # of a string too: every column of a CSV file is text
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError(f"{what} is not a finite number")
    return number


def column_in(value: Any, name: str) -> float:
    """The number that a column of ``COLUMNS`` stands for, or that an attribute of another name is."""
    column = COLUMNS.get(name)
    if column is None:
        return number_in(value, name)
    if column.words:
        word = value.strip().lower() if isinstance(value, str) else ""
        if word not in column.words:
            raise RowError(f"{name} is not {column.expects}")
        return column.words[word]
    number = number_in(value, name)
    if not column.lowest <= number <= column.highest:
        raise RowError(f"{name} is not {column.expects}")
    return number


def mean_logp_in(value: Any) -> float | None:
    """A mean log-prob; None of nothing. Above 0 it is no log-prob, and would rank responses the wrong way round."""
    if value is None:
        return None
    number = number_in(value, "mean_logp")
    if number > ROUNDING:
        raise RowError("mean_logp is above 0, which no log-prob is")
    return number


def rewards_in(value: Any, what: str) -> dict[str, float]:
    """Several rewards by name; none of what is no mapping. Arrow fills those that only other rows have with None."""
    if not isinstance(value, Mapping):
        return {}
    return {str(name): number_in(number, what) for name, number in value.items() if number is not None}


def group_in(value: Any) -> str:
    """A group's name: text on one line, or a number as one writes it. Anything else is no group, nor is nothing."""
    if isinstance(value, str):
        return " ".join(_encodable(value, "group").split())
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):  # of whole numbers too, where a column of them has gaps
        return f"{value:.15g}" if math.isfinite(value) else ""
    return str(value) if isinstance(value, int) else ""
