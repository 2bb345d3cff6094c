"""Packed batches: what one forward pass sees, and the index that turns it back into dense legs.

Shared prompts: a row is laid out as ``prompt, response 1, response 2, …`` in one line; position ids of every response
restart after the prompt. ``source[i]`` is the flat position whose next-token distribution predicts response token i:
the last prompt position for a response's first token (shared by all responses), the position before it after that.

    line      x0 x1 x2 | a0 a1 a2 | b0 b1
    position   0  1  2    3  4  5    3  4
    source of a0, b0 is x2; of a1 is a0; of b1 is b0

Separate sequences (``share=False``): every response is a line of its own with its own copy of the prompt, which any
causal model can compute through its own forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from data.store import Ragged, TokenTable
from objectives.output import Counts

PADDING = -1
PROMPT = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One prompt, or one response, within its line."""

    line: int
    start: int
    end: int
    prompt: tuple[int, int]
    """Start and end of the prompt that it also sees; of a prompt, its own start twice."""


@dataclass(frozen=True, kw_only=True)
class PackedLeg:
    """Where one leg's dense matrix finds its entries in the flat list of response tokens."""

    slot: Int[Tensor, "row token"]
    """Index into the flat response tokens; 0 where ``mask`` is False."""
    mask: Bool[Tensor, "row token"]
    tokens: Int[Tensor, "row token"]
    last: Int[Tensor, " row"]
    """Flat position (line-major) of each response's last token."""
    ref_logps: Float[Tensor, "row token"] | None = None
    weight: Float[Tensor, "row token"] | None = None
    """1 for tokens that likelihood terms learn from, 0 for those a token mask drops; None where none acts."""


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """One microbatch of one rank."""

    input_ids: Int[Tensor, "line position"]
    position_ids: Int[Tensor, "line position"]
    row_ids: Int[Tensor, "line position"]
    """Which row a position belongs to; −1 is padding."""
    leg_ids: Int[Tensor, "line position"]
    """0 for prompt positions, 1, 2, … for the legs, −1 for padding."""
    source: Int[Tensor, " response"]
    """Flat position (line-major) that predicts each response token."""
    target: Int[Tensor, " response"]
    """The response tokens, leg by leg, row by row."""
    legs: Mapping[str, PackedLeg]
    shared: bool
    """Whether a line holds a prompt once with all its responses."""
    segments: tuple[Segment, ...]
    """Prompts and responses of each line in order, where a line holds a prompt once with all its responses."""
    rows: Int[Tensor, " row"]
    """Row numbers in the table; none for a dummy batch, whose one line has zero weight."""
    useful_tokens: int
    """Positions that hold a token; none for a dummy. Counted where batches are packed: a GPU would have to be asked."""
    counts: Counts
    """What the **whole optimizer step** holds, all microbatches and ranks."""
    labels: Bool[Tensor, " row"] | None = None
    """Whether each row is desirable, where the data has labels."""
    density_ratio: Float[Tensor, " row"] | None = None
    """p(prompt | desirable) / p(prompt | undesirable), where an objective asked for it."""
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    """Scores by leg or attribute, (row,) each, NaN where a row has none."""
    step: Mapping[str, Tensor] | None = None
    """What a pass over the whole step found of all its rows; see ``objectives.needs.Coupled``."""
    place: Int[Tensor, " row"] | None = None
    """Where in ``step`` each row stands."""

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on another device."""

        def move(value: object) -> object:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=True)
            if isinstance(value, PackedLeg):
                return PackedLeg(**{f.name: move(getattr(value, f.name)) for f in fields(value)})  # type: ignore[arg-type]
            if isinstance(value, dict):
                return {key: move(entry) for key, entry in value.items()}
            return value

        return PackedBatch(**{f.name: move(getattr(self, f.name)) for f in fields(self)})  # type: ignore[arg-type]


PerToken = Mapping[str, Ragged]
"""By leg and row number: a number for each response token, such as the reference's log-prob."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of rows besides their tokens, by the time they are packed."""

    references: PerToken | None = None
    """The reference's log-probs."""
    kept: PerToken | None = None
    """1 for tokens that likelihood terms learn from, else 0; only legs on which a mask acts."""
    density_ratio: np.ndarray | None = None
    """One per row."""
    numbers: Mapping[str, np.ndarray] | None = None
    """Number tokens of each row's response, by leg; where an objective averages over them."""


NOTHING = Known()


def pack(
    table: TokenTable,
    rows: Sequence[int] | np.ndarray,
    *,
    share: bool,
    kind: str = "bucket",
    counts: Counts,
    known: Known = NOTHING,
    multiple: int = 1,
) -> PackedBatch:
    """Lays rows out for one forward pass.

    Args:
        table: token ids.
        rows: row numbers; none makes a dummy batch of the table's shortest row with zero rows for the objective.
        share: whether responses share their prompt's positions.
        kind: ``bucket`` (a line per row or sequence) or ``pack`` (one line; only with ``share``).
        counts: of the whole step.
        known: what goes into the batch beside the tokens.
        multiple: lines are padded to a multiple of this many positions.
    """
    assert share or kind == "bucket", "separate sequences are lines of their own"
    numbers = [int(row) for row in rows]
    laid_out = numbers or [int(np.argmin(table.shared_lengths()))]
    lines: list[_Line] = []
    segments: list[Segment] = []
    spans: dict[str, list[tuple[int, int, int]]] = {
        leg: [] for leg in table.legs
    }  # (line, start, last prompt position)
    for row in laid_out:
        prompt = table.prompts[row]
        if share:
            if not lines or kind == "bucket":
                lines.append(_Line())
            line, at = lines[-1], len(lines) - 1
            first = line.add(prompt, row, PROMPT, 0)
            span = (first, first + len(prompt))
            segments.append(Segment(line=at, start=span[0], end=span[1], prompt=(first, first)))
            for number, (name, leg) in enumerate(table.legs.items(), start=1):
                start = line.add(leg[row], row, number, len(prompt))
                segments.append(Segment(line=at, start=start, end=line.length, prompt=span))
                spans[name].append((at, start, span[1] - 1))
        else:
            for number, (name, leg) in enumerate(table.legs.items(), start=1):
                lines.append(_Line())
                last_prompt = lines[-1].add(prompt, row, PROMPT, 0) + len(prompt) - 1
                start = lines[-1].add(leg[row], row, number, len(prompt))
                spans[name].append((len(lines) - 1, start, last_prompt))
    width = -(-max(line.length for line in lines) // multiple) * multiple
    source, target, legs = _index(table, numbers, spans, width, known)
    return PackedBatch(
        input_ids=_stack(lines, "ids", width, 0),
        position_ids=_stack(lines, "positions", width, 0),
        row_ids=_stack(lines, "rows", width, PADDING),
        leg_ids=_stack(lines, "legs", width, PADDING),
        source=source,
        target=target,
        legs=legs,
        shared=share,
        segments=tuple(segments),
        rows=torch.tensor(numbers, dtype=torch.long),
        useful_tokens=sum(line.length for line in lines) if numbers else 0,
        counts=counts,
        labels=None if table.labels is None else torch.from_numpy(np.asarray(table.labels)[numbers].astype(bool)),
        density_ratio=None
        if known.density_ratio is None
        else torch.from_numpy(known.density_ratio[numbers].astype(np.float32)),
        scores={name: torch.from_numpy(np.asarray(values)[numbers]) for name, values in table.scores.items()},
    )


class _Line:
    """One line of a batch while it is being laid out."""

    def __init__(self) -> None:
        self.length = 0
        self.parts: dict[str, list[np.ndarray]] = {"ids": [], "positions": [], "rows": [], "legs": []}

    def add(self, tokens: np.ndarray, row: int, leg: int, first_position: int) -> int:
        """Appends tokens and returns where they start."""
        start, n = self.length, len(tokens)
        self.parts["ids"].append(tokens)
        self.parts["positions"].append(np.arange(first_position, first_position + n))
        self.parts["rows"].append(np.full(n, row))
        self.parts["legs"].append(np.full(n, leg))
        self.length += n
        return start


def _stack(lines: Sequence[_Line], part: str, width: int, fill: int) -> Int[Tensor, "line position"]:
    out = np.full((len(lines), width), fill, dtype=np.int64)
    for i, line in enumerate(lines):
        out[i, : line.length] = np.concatenate(line.parts[part])
    return torch.from_numpy(out)


def _index(
    table: TokenTable,
    rows: Sequence[int],
    spans: Mapping[str, Sequence[tuple[int, int, int]]],
    width: int,
    known: Known,
) -> tuple[Int[Tensor, " response"], Int[Tensor, " response"], dict[str, PackedLeg]]:
    sources: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    legs: dict[str, PackedLeg] = {}
    flat = 0
    for name, leg in table.legs.items():
        lengths = [len(leg[row]) for row in rows]
        shape = (len(rows), max(lengths, default=1))
        slot, tokens = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        mask = np.zeros(shape, dtype=bool)
        lasts: list[int] = []
        ref = None if known.references is None else np.zeros(shape, dtype=np.float32)
        kept = None if known.kept is None or name not in known.kept else np.zeros(shape, dtype=np.float32)
        for i, row in enumerate(rows):
            line, start, last_prompt = spans[name][i]
            n = lengths[i]
            # The first response token is predicted from the last prompt position, which all legs share;
            # every later one from the position before it.
            sources.append(line * width + np.concatenate([[last_prompt], np.arange(start, start + n - 1)]))
            targets.append(leg[row])
            slot[i, :n], mask[i, :n], tokens[i, :n] = np.arange(flat, flat + n), True, leg[row]
            if ref is not None and known.references is not None:
                ref[i, :n] = known.references[name][row]
            if kept is not None and known.kept is not None:
                kept[i, :n] = known.kept[name][row]
            lasts.append(line * width + start + n - 1)
            flat += n
        legs[name] = PackedLeg(
            slot=torch.from_numpy(slot),
            mask=torch.from_numpy(mask),
            tokens=torch.from_numpy(tokens),
            last=torch.tensor(lasts, dtype=torch.long),
            ref_logps=None if ref is None else torch.from_numpy(ref),
            weight=None if kept is None else torch.from_numpy(kept),
        )
    if not rows:  # the dummy's forward still yields one log-prob, so that its backward reaches every parameter
        line, start, last_prompt = next(iter(spans.values()))[0]
        sources, targets = [np.array([line * width + last_prompt])], [np.array([0])]
    return (
        torch.from_numpy(np.concatenate(sources).astype(np.int64)),
        torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        legs,
    )
