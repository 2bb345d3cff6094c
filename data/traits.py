"""What can be seen of a row by itself, without a model or a tokenizer: hashes, lengths, scores and flaws of its text.

A million rows are looked at once, batch by batch in workers; what is kept of a row is about a hundred bytes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import xxhash

from data.rowstore import prompt_key, rows_from
from objectives.rows import Row, Text

ECHO_CHARACTERS = 12
"""Of what was asked, at least: a response that begins with less than this may do so by chance."""
HUMAN, ASSISTANT = "Human:", "Assistant:"
LEGS = ("chosen", "rejected", "gold", "completion")
MARKERS = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "<|assistant|>", "<|user|>"),
    *("[INST]", "[/INST]", "<<SYS>>", "<s>", "</s>"),
)
"""Control tokens of well-known chat templates, looked for where no tokenizer says which ones are its own."""

FLAWS = {
    "identical_pairs": "chosen and rejected differ in nothing but white space and letter case",
    "echo": "a response starts with what was asked",
    "empty_responses": "a response is empty",
    "replacement_characters": "U+FFFD, which stands where text could not be decoded",
    "mojibake": "UTF-8 that was read as Latin-1 or Windows-1252",
    "control_characters": "control characters other than tab and line ends",
    "html": "HTML tags or entities",
    "special_tokens": "control tokens of a chat template, written out",
}
"""Bits of ``Traits.flaws``, lowest first."""
BIT = {name: 1 << i for i, name in enumerate(FLAWS)}

_MOJIBAKE = re.compile("â€[™œ\x9d“”˜¦¢\x93\x94\x99]|Ã[\u0080-\u00bf]|Â[\u00a0-\u00bf]|ðŸ")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_HTML = re.compile(
    r"</?(?:p|br|hr|div|span|a|li|ul|ol|td|th|tr|table|tbody|thead|b|i|u|em|strong|code|pre|sub|sup|small|blockquote"
    r"|script|style|h[1-6]|img|font|iframe|form|input|button|html|head|body|center)(?:\s[^<>]*)?/?>"
    r"|&(?:amp|lt|gt|quot|nbsp|apos|#\d{2,5});",
    re.IGNORECASE,
)


def plain(text: Text) -> str:
    """The text itself, or what the messages say, one after the other."""
    if isinstance(text, str):
        return text
    return "\n".join(str(message.get("content") or "") for message in text)


def pieces(row: Row) -> dict[str, str]:
    """The texts of a row by name: the prompt, each response, and all scored responses together."""
    found = {"prompt": plain(row.prompt), **{leg: plain(row.responses[leg]) for leg in sorted(row.responses)}}
    if row.candidates:
        found["responses"] = "\n".join(sorted(plain(each.text) for each in row.candidates))
    return found


def asked(prompt: Text) -> str:
    """What was asked last: the last user message, the last human turn of a transcript, or else the whole prompt."""
    if not isinstance(prompt, str):
        users = [message for message in prompt if message.get("role") == "user"]
        return plain(tuple((users or list(prompt))[-1:]))
    _, marker, turn = prompt.rpartition(HUMAN)
    return turn.rpartition(ASSISTANT)[0] if marker and ASSISTANT in turn else prompt


def echoes(row: Row) -> bool:
    """Whether a response starts with what was asked, or with the whole prompt, whatever their white space."""
    starts = {" ".join(text.split()) for text in (asked(row.prompt), plain(row.prompt))}
    long = tuple(start for start in starts if len(start) >= ECHO_CHARACTERS)
    if not long:
        return False
    most = 4 * max(map(len, long)) + 64
    return any(" ".join(text[:most].split()).startswith(long) for text in _responses(row))


def _responses(row: Row) -> list[str]:
    return [plain(text) for text in (*row.responses.values(), *(each.text for each in row.candidates))]


@dataclass(frozen=True, slots=True)
class Look:
    """What all batches share."""

    specials: tuple[str, ...] = MARKERS
    """Control tokens to look for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What was seen of some rows; one entry per row, but for the last three."""

    index: np.ndarray
    """The row's number in its source, int64, (row,)."""
    contents: np.ndarray
    """128 bits that say which rows have the same prompt, responses, scores and label, uint64, (row, 2)."""
    compared: np.ndarray
    """128 bits that say which rows compare the same two responses to one prompt, or label the same one, (row, 2)."""
    side: np.ndarray
    """1 and −1: which of the two is the better one, or what the label is; 0 where there is neither, int8, (row,)."""
    flaws: np.ndarray
    """Bits of ``FLAWS``, int32, (row,)."""
    lengths: np.ndarray
    """Characters of the responses by ``LEGS``, −1 where there is none, int32, (row, 4)."""
    scores: np.ndarray
    """Scores of chosen and rejected, NaN without, float64, (row, 2)."""
    answers: np.ndarray
    """64 bits that say which responses are the same to the same prompt, uint64, (response,)."""
    answered: np.ndarray
    """How many of these each row has, int32, (row,)."""
    candidate_scores: np.ndarray
    """Scores of all scored responses, float64, (response,)."""

    def __len__(self) -> int:
        return len(self.index)

    def has(self, flaw: str) -> np.ndarray:
        """Whether each row has this flaw, (row,)."""
        return (self.flaws & BIT[flaw]) > 0

    def length(self, leg: str) -> np.ndarray:
        """Characters of one response, −1 without, (row,)."""
        return self.lengths[:, LEGS.index(leg)]

    @staticmethod
    def joined(parts: Sequence[Traits]) -> Traits:
        """Those of one batch after the other."""
        empty = traits_of([], Look())
        return Traits(
            **{
                each.name: np.concatenate([getattr(part, each.name) for part in (empty, *parts)])
                for each in fields(Traits)
            }
        )


def traits_batch(look: Look, source: Any) -> Traits:
    """``traits_of`` of rows that ``RowView.sources`` tell of."""
    return traits_of(rows_from(source), look)


def traits_of(rows: Sequence[Row], look: Look) -> Traits:
    """What can be seen of rows."""
    special = re.compile("|".join(map(re.escape, sorted(look.specials, key=len, reverse=True))) or r"(?!)")
    contents: list[bytes] = []
    compared: list[bytes] = []
    side: list[int] = []
    flaws: list[int] = []
    answers: list[int] = []
    answered: list[int] = []
    for row in rows:
        prompt = prompt_key(row.prompt)
        legs = {name: prompt_key(text) for name, text in row.responses.items()}
        listed = [(prompt_key(each.text), each.score) for each in row.candidates]
        contents.append(_hash(prompt, repr((sorted(legs.items()), sorted(listed), row.label, _sorted(row.scores)))))
        raw, which = _comparison(prompt, legs, row.label)
        compared.append(raw)
        side.append(which)
        flaws.append(_flaws(row, special))
        own = [*legs.values(), *(text for text, _ in listed)]
        answers += [xxhash.xxh3_64_intdigest(_bytes(prompt, text)) for text in own]
        answered.append(len(own))
    return Traits(
        index=np.array([row.index for row in rows], dtype=np.int64),
        contents=_array(contents),
        compared=_array(compared),
        side=np.array(side, dtype=np.int8),
        flaws=np.array(flaws, dtype=np.int32),
        lengths=np.array(
            [[len(plain(row.responses[leg])) if leg in row.responses else -1 for leg in LEGS] for row in rows],
            dtype=np.int32,
        ).reshape(-1, len(LEGS)),
        scores=np.array([[row.scores.get(leg, np.nan) for leg in LEGS[:2]] for row in rows], dtype=np.float64).reshape(
            -1, 2
        ),
        answers=np.array(answers, dtype=np.uint64),
        answered=np.array(answered, dtype=np.int32),
        candidate_scores=np.array([each.score for row in rows for each in row.candidates], dtype=np.float64),
    )


def _sorted(scores: Any) -> list[tuple[str, Any]]:
    return sorted((name, value) for name, value in scores.items())


def _comparison(prompt: str, legs: dict[str, str], label: bool | None) -> tuple[bytes, int]:
    if {"chosen", "rejected"} <= legs.keys():
        first, second = sorted((legs["chosen"], legs["rejected"]))
        return _hash("pair", prompt, first, second), 0 if first == second else 1 if legs["chosen"] == first else -1
    if label is not None and "completion" in legs:
        return _hash("label", prompt, legs["completion"]), 1 if label else -1
    return bytes(16), 0


def _flaws(row: Row, special: re.Pattern[str]) -> int:
    texts = _responses(row)
    whole = "\n".join([plain(row.prompt), *texts])
    found = 0
    if {"chosen", "rejected"} <= row.responses.keys():
        chosen, rejected = (plain(row.responses[leg]).split() for leg in ("chosen", "rejected"))
        if chosen == rejected or " ".join(chosen).casefold() == " ".join(rejected).casefold():
            found |= BIT["identical_pairs"]
    if echoes(row):
        found |= BIT["echo"]
    if any(not text.strip() for text in texts):
        found |= BIT["empty_responses"]
    if "\ufffd" in whole:
        found |= BIT["replacement_characters"]
    if not whole.isascii() and _MOJIBAKE.search(whole):
        found |= BIT["mojibake"]
    if _CONTROL.search(whole):
        found |= BIT["control_characters"]
    if ("<" in whole or "&" in whole) and _HTML.search(whole):
        found |= BIT["html"]
    if special.search(whole):
        found |= BIT["special_tokens"]
    return found


def _bytes(*texts: str) -> bytes:
    return b"".join(
        len(raw).to_bytes(8, "little") + raw for raw in (text.encode("utf-8", "surrogatepass") for text in texts)
    )


def _hash(*texts: str) -> bytes:
    return xxhash.xxh3_128_digest(_bytes(*texts))


def _array(digests: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(digests), dtype=np.uint64).reshape(-1, 2)
