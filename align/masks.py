"""Who may attend to whom in a packed line.

A response attends to its row's prompt and to itself, never to another response or another row. A sliding window is
measured in position ids, not in packed positions: the second response's first token is as near to its prompt as the
first response's. Padding attends to itself alone, so that no softmax is taken over nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from align import segments
from align.segments import segments_of
from data.pack import PADDING, PROMPT, PackedBatch

segments.register()


def attention_mask(batch: PackedBatch, window: int | None = None) -> Bool[Tensor, "line 1 position position"]:
    """True where the query (third axis) may attend to the key (fourth axis).

    Args:
        batch: a packed batch with shared prompts.
        window: sliding window in tokens, the query itself included; None for full attention.
    """
    row, leg, position = batch.row_ids, batch.leg_ids, batch.position_ids
    n = row.shape[1]
    order = torch.arange(n, device=row.device)
    causal = order[:, None] >= order[None, :]
    visible = (leg[:, None, :] == PROMPT) | (leg[:, None, :] == leg[:, :, None])
    mask = causal & visible & (row[:, None, :] == row[:, :, None]) & (row[:, None, :] != PADDING)
    if window is not None:
        mask &= position[:, :, None] - position[:, None, :] < window
    return (mask | (order[:, None] == order[None, :]))[:, None]


def block_mask(batch: PackedBatch, window: int | None = None) -> Any:
    """The same rule as a FlexAttention block mask: blocks that hold nothing cost nothing.

    The rule is a function of tensors alone. One that held the batch would be compiled anew for every batch.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    row, leg, position = batch.row_ids, batch.leg_ids, batch.position_ids
    lines, n = row.shape
    # All layers' calls share one function, and kinds of layers, types and modes each take a compilation of it: past
    # the limit, which is 8, it would be run uncompiled, with all scores at once.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    # Uncompiled it would hold all pairs of positions at once.
    return create_block_mask(
        lambda line, _head, query, key: _visible(row, leg, position, window, line, query, key),
        B=lines,
        H=None,
        Q_LEN=n,
        KV_LEN=n,
        device=str(row.device),
        _compile=row.device.type == "cuda",
    )


def _visible(
    row: Tensor, leg: Tensor, position: Tensor, window: int | None, line: Tensor, query: Tensor, key: Tensor
) -> Tensor:
    same = (row[line, query] == row[line, key]) & (row[line, key] != PADDING)
    seen = same & (query >= key) & ((leg[line, key] == PROMPT) | (leg[line, key] == leg[line, query]))
    if window is not None:
        seen = seen & (position[line, query] - position[line, key] < window)
    return seen | (query == key)


def additive_mask(batch: PackedBatch, window: int | None = None) -> Float[Tensor, "line 1 position position"]:
    """The same rule as numbers to add to attention scores, which is what eager attention takes."""
    mask = attention_mask(batch, window)
    lowest = torch.finfo(torch.get_default_dtype()).min / 2  # two of them must not add up to −inf
    return torch.zeros_like(mask, dtype=torch.get_default_dtype()).masked_fill(~mask, lowest)


def segments_or_mask(batch: PackedBatch, window: int | None = None) -> Tensor:
    """Segments of a single line, which need no mask; the rule itself for rows padded to one another."""
    return segments_of(batch, window) if len(batch.input_ids) == 1 else attention_mask(batch, window)


MAKERS = {
    "sdpa": attention_mask,
    "eager": additive_mask,
    "flex_attention": block_mask,
    segments.NAME: segments_or_mask,
}
"""Mask by attention implementation. Others cannot express the rule, and the model takes the plain path."""


def masks_for(config: Any, batch: PackedBatch) -> Any:
    """What a model's backbone takes as ``attention_mask``: one mask, or one for each kind of its layers."""
    make = MAKERS[config._attn_implementation]
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds:
        return {kind: make(batch, window if kind == "sliding_attention" else None) for kind in sorted(kinds)}
    uses_window = window is not None and getattr(config, "use_sliding_window", True)
    return make(batch, window if uses_window else None)
