"""Rendered rows to token ids: where responses begin, how they end, what is cut.

Nothing is lost in silence: rows that cannot be used become ``Dropped`` with a reason, and every cut, added terminator
and boundary that tokenisation moved is counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from data.chat import Rendered, render
from data.codec import Codec
from data.errors import DataError
from data.rowstore import BATCH, RowView, rows_from, text_hashes
from data.shapes import MISMATCHED
from data.workers import Workers
from objectives.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = tuple[list[int], dict[str, list[int]]]
"""Token ids of a prompt, and by leg."""

MIN_RESPONSE_ROOM = 16
"""A row that must be truncated is dropped if its prompt leaves fewer response tokens than this."""

TRUNCATIONS = ("truncate_response_end", "truncate_prompt_start", "drop", "raise")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """One row as token ids. All legs share ``prompt``; each response is trained on in full."""

    prompt: tuple[int, ...]
    legs: Mapping[str, tuple[int, ...]]
    source: str
    index: int
    label: bool | None = None
    """Whether the completion is desirable; None where the data has no labels."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Scores that were asked for, by leg or attribute; those the row has."""
    group: str = ""
    """``Row.group``."""

    @property
    def shared_length(self) -> int:
        """Positions of a forward pass that computes the prompt once."""
        return len(self.prompt) + sum(map(len, self.legs.values()))

    @property
    def longest(self) -> int:
        """Length of the longest single sequence, prompt + response: what must fit the context."""
        return len(self.prompt) + max(map(len, self.legs.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """A row that is not trained on, and why."""

    source: str
    index: int
    reason: str


@dataclass(slots=True)
class TokenStats:
    """What happened to the rows that are kept, in counts; goes into the data report."""

    truncated: Counter[str] = field(default_factory=Counter)
    """Rows cut, by side: ``prompt`` or a leg's name."""
    tokens_lost: Counter[str] = field(default_factory=Counter)
    """Tokens cut off, by side."""
    boundary_mismatches: int = 0
    """Rows whose tokenised prompt is not a prefix of prompt + response: the boundary moved left."""
    bos_removed: int = 0
    """Rows of plain text that begin with the token which the tokenizer puts before every text: it stands there once."""
    terminator_added: Counter[str] = field(default_factory=Counter)
    """Responses that got the end token appended, by leg (all of them, for plain text)."""
    terminator_lost: Counter[str] = field(default_factory=Counter)
    """Responses whose end token was cut off, by leg."""
    tail_removed: Counter[str] = field(default_factory=Counter)
    """Responses with something after their end token (a template's newline, a second end token), by leg."""

    def add(self, more: TokenStats) -> None:
        """Adds the counts of other rows."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(more, each.name))


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPolicy:
    """How text becomes token ids."""

    max_length: int
    truncation: str = "truncate_response_end"

    def __post_init__(self) -> None:
        assert self.truncation in TRUNCATIONS, self.truncation


def tokenize_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    policy: TokenPolicy,
    legs: Sequence[str],
    batch: int | None = None,
    scores: Sequence[str] = (),
    into: Callable[[TokenChunk], None] | None = None,
    workers: Workers | None = None,
) -> tuple[list[TokenRow], list[Dropped], TokenStats]:
    """Tokenises the ``legs`` of every row.

    Args:
        rows: text rows; those without a wanted leg are an error, found before anything is tokenised.
        tokenizer: must have an end token.
        policy: length limit and what to do beyond it.
        legs: names of the responses to keep, in order.
        batch: rows tokenised at a time; default: 1000.
        scores: names of the scores to keep.
        into: takes the rows to train on, as arrays, a batch at a time; the list of them is then empty.
        workers: tokenise the batches, where ``into`` takes them and the rows are many.
    Returns:
        Rows that can be trained on, rows that can't with their reasons, and counts of what was changed.
    Raises:
        DataError: a leg is missing, the tokenizer has no end token, or ``truncation="raise"`` met a long row.
    """
    require_legs(rows.first_of_kinds() if isinstance(rows, RowView) else rows, legs)
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end token, so responses could never end; "
            "set model.eos_token to the token that ends a response"
        )
    kept: list[TokenRow] = []
    dropped: list[Dropped] = []
    stats = TokenStats()
    how = Tokenisation(Codec(tokenizer), policy, tuple(legs), tuple(scores))
    batch = batch or BATCH
    starts = range(0, len(rows), batch)
    if into is None:
        for start in starts:
            found, lost, counts = _tokenized(how, rows[start : start + batch])
            kept += [_token_row(row, ids, how.scores) for row, ids in found]
            dropped += lost
            stats.add(counts)
        return kept, dropped, stats
    jobs = rows.sources(batch) if isinstance(rows, RowView) else (rows[start : start + batch] for start in starts)
    for chunk in (workers or Workers(0)).map(tokenize_batch, how, jobs):
        into(chunk)
        dropped += chunk.dropped
        stats.add(chunk.stats)
    return [], dropped, stats


@dataclass(frozen=True, slots=True)
class Tokenisation:
    """What all batches share."""

    codec: Codec
    policy: TokenPolicy
    legs: tuple[str, ...]
    scores: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenChunk:
    """Some rows as arrays, in order: what a worker gives back."""

    ids: Mapping[str, tuple[np.ndarray, np.ndarray]]
    """``prompt`` and each leg: token ids end to end, int32, and how many each row has, int64."""
    labels: np.ndarray
    """1 and 0, and −1 without a label, (row,)."""
    scores: Mapping[str, np.ndarray]
    """Those that some row has, float32, NaN where a row has none."""
    sources: Sequence[str]
    groups: Sequence[str]
    indices: np.ndarray
    prompts: np.ndarray
    """128 bits that say which rows have the same prompt tokens, (row, 2)."""
    texts: np.ndarray
    """128 bits of each prompt's text, the same whatever the tokenizer, (row, 2)."""
    rows: np.ndarray
    """128 bits that say which rows are the same, whatever their mismatched responses, (row, 2)."""
    dropped: list[Dropped]
    stats: TokenStats


def tokenize_batch(how: Tokenisation, source: Any) -> TokenChunk:
    """Tokenises rows that ``RowView.sources`` tell of, or a list of rows."""
    found, dropped, stats = _tokenized(how, rows_from(source))
    ids = {name: _flat([part[0] if name == "" else part[1][name] for _, part in found]) for name in ("", *how.legs)}
    prompts, same = _hashes(ids, [row.label for row, _ in found])
    names = dict.fromkeys(name for row, _ in found for name in how.scores if name in row.scores)
    return TokenChunk(
        ids={"prompt": ids.pop(""), **{f"leg.{name}": leg for name, leg in ids.items()}},
        labels=np.array([-1 if row.label is None else row.label for row, _ in found], dtype=np.int8),
        scores={
            name: np.array([row.scores.get(name, math.nan) for row, _ in found], dtype=np.float32) for name in names
        },
        sources=[row.source for row, _ in found],
        groups=[row.group for row, _ in found],
        indices=np.array([row.index for row, _ in found], dtype=np.int64),
        prompts=prompts,
        texts=text_hashes(row.prompt for row, _ in found),
        rows=same,
        dropped=dropped,
        stats=stats,
    )


def _flat(sequences: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    flat = list(chain.from_iterable(sequences))
    return np.array(flat, dtype=np.int32), np.array([len(each) for each in sequences], dtype=np.int64)


def _hashes(ids: Mapping[str, tuple[np.ndarray, np.ndarray]], labels: list[bool | None]) -> tuple[np.ndarray, ...]:
    """What says whether prompts, and whether rows, are the same; a mismatched response is drawn for each row anew."""
    views = [
        (memoryview(values.tobytes()), [0, *(4 * lengths.cumsum()).tolist()])
        for name, (values, lengths) in ids.items()
        if name != MISMATCHED
    ]
    found: tuple[list[bytes], list[bytes]] = ([], [])
    for i, label in enumerate(labels):
        state = xxhash.xxh3_128()
        for number, (view, ends) in enumerate(views):
            state.update(view[ends[i] : ends[i + 1]])
            if number == 0:
                found[0].append(state.digest())
            state.update(b"%d" % (ends[i + 1] - ends[i]))
        state.update(str(label).encode())
        found[1].append(state.digest())
    return tuple(np.frombuffer(b"".join(each), dtype=np.uint64).reshape(-1, 2) for each in found)


def _tokenized(how: Tokenisation, rows: Iterable[Row]) -> tuple[list[tuple[Row, Ids]], list[Dropped], TokenStats]:
    """Token ids of the rows that can be trained on, the others, and counts."""
    rows = list(rows)
    rendered = [render(row, None if isinstance(row.prompt, str) else how.codec.tokenizer) for row in rows]
    kept: list[tuple[Row, Ids]] = []
    dropped: list[Dropped] = []
    stats = TokenStats()
    for row, text, ids in zip(rows, rendered, _encode(rendered, how.legs, how.codec), strict=True):
        result = _finish(row, text.chat, ids, how.codec, how.policy, stats)
        if isinstance(result, str):
            dropped.append(Dropped(source=row.source, index=row.index, reason=result))
        else:
            kept.append((row, result))
    return kept, dropped, stats


def _token_row(row: Row, ids: Ids, scores: Sequence[str]) -> TokenRow:
    prompt, legs = ids
    return TokenRow(
        prompt=tuple(prompt),
        legs={name: tuple(tokens) for name, tokens in legs.items()},
        source=row.source,
        index=row.index,
        label=row.label,
        scores={name: row.scores[name] for name in scores if name in row.scores},
        group=row.group,
    )


def require_legs(rows: Iterable[Row], legs: Sequence[str]) -> None:
    """Raises ``DataError`` naming the first row that lacks one of ``legs``."""
    for row in rows:
        for leg in legs:
            if leg not in row.responses:
                has = ", ".join(row.responses)
                raise DataError(f"{row.where}: the objective needs a {leg} response and this row has only {has}")


def _encode(rendered: Sequence[Rendered], legs: Sequence[str], codec: Codec) -> list[Ids]:
    """Token ids of every prompt and of every prompt + response, special tokens as the text form asks for."""
    streams = {}
    # Chat templates write their own special tokens; plain text gets the ones the tokenizer adds (BOS).
    for chat in (False, True):
        chosen = [(row.prompt, [row.full[leg] for leg in legs]) for row in rendered if row.chat is chat]
        streams[chat] = iter(codec.encode_rows(chosen, special=not chat))
    found = (next(streams[row.chat]) for row in rendered)
    return [(prompt, dict(zip(legs, full, strict=True))) for prompt, *full in found]


def _finish(row: Row, chat: bool, ids: Ids, codec: Codec, policy: TokenPolicy, stats: TokenStats) -> Ids | str:
    """Prompt and responses as they are trained on, or the reason why the row is dropped."""
    prompt, full = ids
    eos, bos = codec.eos, codec.bos
    # Text that was rendered elsewhere may begin with the token that the tokenizer puts there once more.
    twice = not chat and bos is not None and prompt[:2] == [bos, bos]
    if twice:
        prompt, full = prompt[1:], {name: tokens[1:] for name, tokens in full.items()}
    # All legs share one prompt: the boundary is the longest prefix common to the prompt and to every leg.
    boundary = min(_common_prefix(prompt, tokens) for tokens in full.values())
    if boundary == 0:
        return "no prompt token is shared by all responses"
    # A tokenizer that closes every text with its end token closes the prompt alone with it too: that is no mismatch.
    closed = not chat and prompt[-1] == eos
    responses = {name: tokens[boundary:] for name, tokens in full.items()}
    legs = {name: _terminate(tokens, chat, codec) for name, tokens in responses.items()}
    for name, tokens in legs.items():
        if not tokens or tokens == [eos]:
            return f"empty {name} response"
        if not chat and eos in tokens[:-1]:
            return f"the {name} response contains the end token before its end"
    if len(legs) > 1 and legs.get("chosen") == legs.get("rejected") is not None:
        return "chosen and rejected are the same tokens"
    cut = _truncate(prompt[:boundary], legs, policy, row)
    if isinstance(cut, str):
        return cut
    short_prompt, short_legs = cut
    if len(legs) > 1 and short_legs.get("chosen") == short_legs.get("rejected") is not None:
        return "chosen and rejected are the same tokens after truncation"
    stats.boundary_mismatches += boundary < len(prompt) - closed
    stats.bos_removed += twice
    _count_ends(responses, legs, stats)
    _count_cuts(boundary - len(short_prompt), legs, short_legs, stats)
    return short_prompt, short_legs


def _common_prefix(first: list[int], second: list[int]) -> int:
    length = min(len(first), len(second))
    if first[:length] == second[:length]:  # nearly always, and faster than one by one
        return length
    return next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)


def _terminate(tokens: list[int], chat: bool, codec: Codec) -> list[int]:
    """Exactly one end token, as the last token."""
    eos: int = codec.eos
    end = len(tokens)
    if chat and eos in tokens:
        # Templates often write a newline after the end token; it would be trained on and never generated.
        last = len(tokens) - 1 - tokens[::-1].index(eos)
        if not codec.decode(tokens[last + 1 :]).strip():
            end = last + 1
    while end >= 2 and tokens[end - 1] == eos and tokens[end - 2] == eos:
        end -= 1
    ended = tokens[:end]
    return ended if ended and ended[-1] == eos else [*ended, eos]


def _truncate(
    prompt: list[int], legs: dict[str, list[int]], policy: TokenPolicy, row: Row
) -> tuple[list[int], dict[str, list[int]]] | str:
    """The row cut to ``max_length``, or the reason why it is dropped.

    A mismatched response belongs to another row: it is cut to fit, and decides nothing.
    """
    longest = max(len(tokens) for name, tokens in legs.items() if name != MISMATCHED)
    limit = policy.max_length
    if len(prompt) + longest <= limit:
        return prompt, {name: tokens[: limit - len(prompt)] for name, tokens in legs.items()}
    if policy.truncation == "raise":
        raise DataError(
            f"{row.where}: {len(prompt)} prompt and {longest} response tokens exceed data.max_length {limit}; "
            "raise data.max_length or set data.truncation to truncate_response_end, truncate_prompt_start or drop"
        )
    if policy.truncation == "drop":
        return "longer than max_length"
    if policy.truncation == "truncate_prompt_start":
        first = prompt[:1]  # the beginning-of-text token, or the one token a model needs to start from
        keep = max(limit - longest - 1, 0)
        prompt = first + (prompt[len(prompt) - keep :] if keep else [])
    room = limit - len(prompt)
    if room < min(MIN_RESPONSE_ROOM, longest):  # responses that are shorter anyway and stay whole need no more
        return f"the prompt leaves fewer than {MIN_RESPONSE_ROOM} response tokens"
    return prompt, {name: tokens[:room] for name, tokens in legs.items()}


def _count_ends(before: Mapping[str, list[int]], ended: Mapping[str, list[int]], stats: TokenStats) -> None:
    for name, tokens in ended.items():
        if len(tokens) > len(before[name]):
            stats.terminator_added[name] += 1
        elif len(tokens) < len(before[name]):
            stats.tail_removed[name] += 1


def _count_cuts(
    prompt_cut: int, before: Mapping[str, list[int]], legs: Mapping[str, list[int]], stats: TokenStats
) -> None:
    if prompt_cut:
        stats.truncated["prompt"] += 1
        stats.tokens_lost["prompt"] += prompt_cut
    for name, tokens in legs.items():
        if len(tokens) < len(before[name]):
            stats.truncated[name] += 1
            stats.tokens_lost[name] += len(before[name]) - len(tokens)
            stats.terminator_lost[name] += 1
