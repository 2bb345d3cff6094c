"""Rendered rows to token ids: where responses begin, how they end, what is cut.

Nothing is lost in silence: rows that cannot be used become ``Dropped`` with a reason, and every cut, added terminator
and boundary that tokenisation moved is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from data.chat import Rendered, render
from data.errors import DataError
from data.shapes import MISMATCHED
from objectives.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    batch: int = 1000,
    scores: Sequence[str] = (),
) -> tuple[list[TokenRow], list[Dropped], TokenStats]:
    """Tokenises the ``legs`` of every row.

    Args:
        rows: text rows; those without a wanted leg are an error, found before anything is tokenised.
        tokenizer: must have an end token.
        policy: length limit and what to do beyond it.
        legs: names of the responses to keep, in order.
        batch: rows tokenised at a time.
        scores: names of the scores to keep.
    Returns:
        Rows that can be trained on, rows that can't with their reasons, and counts of what was changed.
    Raises:
        DataError: a leg is missing, the tokenizer has no end token, or ``truncation="raise"`` met a long row.
    """
    require_legs(rows, legs)
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end token, so responses could never end; "
            "set model.eos_token to the token that ends a response"
        )
    kept: list[TokenRow] = []
    dropped: list[Dropped] = []
    stats = TokenStats()
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        rendered = [render(row, tokenizer) for row in part]
        for row, text, ids in zip(part, rendered, _encode(rendered, legs, tokenizer), strict=True):
            result = _finish(row, text.chat, ids, tokenizer, policy, stats)
            if isinstance(result, TokenRow) and scores:
                result = replace(result, scores={name: row.scores[name] for name in scores if name in row.scores})
            (kept if isinstance(result, TokenRow) else dropped).append(result)  # type: ignore[arg-type]
    return kept, dropped, stats


def require_legs(rows: Iterable[Row], legs: Sequence[str]) -> None:
    """Raises ``DataError`` naming the first row that lacks one of ``legs``."""
    for row in rows:
        for leg in legs:
            if leg not in row.responses:
                has = ", ".join(row.responses)
                raise DataError(f"{row.where}: the objective needs a {leg} response and this row has only {has}")


def _encode(
    rendered: Sequence[Rendered], legs: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], dict[str, list[int]]]]:
    """Token ids of every prompt and of every prompt + response, special tokens as the text form asks for."""
    texts = [text for row in rendered for text in (row.prompt, *(row.full[leg] for leg in legs))]
    ids: list[list[int]] = []
    width = 1 + len(legs)
    # Chat templates write their own special tokens; plain text gets the ones the tokenizer adds (BOS).
    for chat in (False, True):
        chosen = [text for i, text in enumerate(texts) if rendered[i // width].chat is chat]
        # Not verbose: what is longer than the context is cut or dropped later, so a warning of it would mislead.
        encoded = tokenizer(chosen, add_special_tokens=not chat, verbose=False)["input_ids"] if chosen else []
        ids.append(encoded)  # type: ignore[arg-type]
    streams = {False: iter(ids[0]), True: iter(ids[1])}
    result = []
    for row in rendered:
        prompt, *full = [list(next(streams[row.chat])) for _ in range(width)]  # type: ignore[arg-type]
        result.append((prompt, dict(zip(legs, full, strict=True))))
    return result


def _finish(
    row: Row,
    chat: bool,
    ids: tuple[list[int], dict[str, list[int]]],
    tokenizer: PreTrainedTokenizerBase,
    policy: TokenPolicy,
    stats: TokenStats,
) -> TokenRow | Dropped:
    prompt, full = ids
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    # Text that was rendered elsewhere may begin with the token that the tokenizer puts there once more.
    twice = not chat and bos is not None and prompt[:2] == [bos, bos]
    if twice:
        prompt, full = prompt[1:], {name: tokens[1:] for name, tokens in full.items()}

    def drop(reason: str) -> Dropped:
        return Dropped(source=row.source, index=row.index, reason=reason)

    # All legs share one prompt: the boundary is the longest prefix common to the prompt and to every leg.
    boundary = min(_common_prefix(prompt, tokens) for tokens in full.values())
    if boundary == 0:
        return drop("no prompt token is shared by all responses")
    # A tokenizer that closes every text with its end token closes the prompt alone with it too: that is no mismatch.
    closed = not chat and prompt[-1] == eos
    responses = {name: tokens[boundary:] for name, tokens in full.items()}
    legs = {name: _terminate(tokens, chat, tokenizer) for name, tokens in responses.items()}
    for name, tokens in legs.items():
        if not tokens or tokens == [eos]:
            return drop(f"empty {name} response")
        if not chat and eos in tokens[:-1]:
            return drop(f"the {name} response contains the end token before its end")
    if len(legs) > 1 and legs.get("chosen") == legs.get("rejected") is not None:
        return drop("chosen and rejected are the same tokens")
    cut = _truncate(prompt[:boundary], legs, policy, row)
    if isinstance(cut, str):
        return drop(cut)
    short_prompt, short_legs = cut
    if len(legs) > 1 and short_legs.get("chosen") == short_legs.get("rejected") is not None:
        return drop("chosen and rejected are the same tokens after truncation")
    stats.boundary_mismatches += boundary < len(prompt) - closed
    stats.bos_removed += twice
    _count_ends(responses, legs, stats)
    _count_cuts(boundary - len(short_prompt), legs, short_legs, stats)
    return TokenRow(
        prompt=tuple(short_prompt),
        legs={name: tuple(tokens) for name, tokens in short_legs.items()},
        source=row.source,
        index=row.index,
        label=row.label,
        group=row.group,
    )


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    for i, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return i
    return min(len(first), len(second))


def _terminate(tokens: list[int], chat: bool, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Exactly one end token, as the last token."""
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int)
    end = len(tokens)
    if chat and eos in tokens:
        # Templates often write a newline after the end token; it would be trained on and never generated.
        last = len(tokens) - 1 - tokens[::-1].index(eos)
        if not str(tokenizer.decode(tokens[last + 1 :])).strip():
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
