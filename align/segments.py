"""Attention over a packed line, segment by segment: nothing is padded and no score is computed to be masked out.

A line holds prompts and responses one after the other, without gaps. Each prompt attends to itself, each response to
its prompt and itself, in a call of its own to PyTorch's fused attention: work and memory are those of the sequences,
whatever else stands in the line. On GPUs FlexAttention does the same in one kernel; this is for CPUs, where it can't be
trained with.

The function is registered with transformers under ``NAME``. Given anything but segments it is plain SDPA, so that
generation and the model's own forward do not notice.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from data.pack import PackedBatch

NAME = "align_segments"


def segments_of(batch: PackedBatch, window: int | None = None) -> Int[Tensor, "1 1 segment 5"]:
    """Where the segments of a packed line are; with four axes, models pass it to their layers untouched.

    Args:
        batch: one line, with shared prompts.
        window: sliding window in tokens, the query itself included; None for full attention.
    Returns:
        For each segment in order: its start, its end, the start and end of the prompt it also sees (twice its start
        where there is none), and the window (0 for none).
    """
    assert len(batch.input_ids) == 1, "segments are of one line"
    found = [[each.start, each.end, *each.prompt, window or 0] for each in batch.segments]
    end = batch.segments[-1].end
    if batch.input_ids.shape[1] > end:  # padding, which attends to itself
        found.append([end, batch.input_ids.shape[1], end, end, window or 0])
    places = torch.tensor(found, dtype=torch.int64)[None, None]
    # So that no layer has to read them off a tensor, or to make a mask that another has made.
    places.segments, places.masks = found, {}  # type: ignore[attr-defined]
    return places


def segment_attention(
    module: Any,
    query: Float[Tensor, "line head position size"],
    key: Float[Tensor, "line group known size"],
    value: Float[Tensor, "line group known size"],
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "line position head size"], None]:
    """What transformers calls in every layer; ``attention_mask`` is what ``segments_of`` gave, or an ordinary mask.

    Raises:
        ValueError: the layer wants something that is not plain attention, such as capped scores.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(  # type: ignore[return-value]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    beyond = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    if beyond:
        raise ValueError(f"segments know no {' or '.join(beyond)}")
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (each.repeat_interleave(repeats, dim=1) for each in (key, value))
    outputs = []
    found = getattr(attention_mask, "segments", None) or attention_mask[0, 0].tolist()
    masks: dict[Any, Tensor] = getattr(attention_mask, "masks", {})
    # Split once, not cut out one by one: the backward pass then puts the parts together in one go.
    lengths = [end - start for start, end, *_ in found]
    parts = [each.split(lengths, dim=2) for each in (query, key, value)]
    at = {start: i for i, (start, *_) in enumerate(found)}
    for i, (start, end, first, last, window) in enumerate(found):
        queries, keys, values = (part[i] for part in parts)
        seen = last - first
        if seen:
            keys, values = (torch.cat([part[at[first]], part[i]], dim=2) for part in parts[1:])
        mask = None
        if seen or 0 < window < end - start:
            kind = (seen, end - start, window, query.dtype, query.device)
            if kind not in masks:
                masks[kind] = _mask(*kind)
            mask = masks[kind]
        outputs.append(
            scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None and end - start > 1,
                scale=scaling,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _mask(
    seen: int, length: int, window: int, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "query position"]:
    """To add to the scores of ``length`` tokens that stand after ``seen`` others."""
    keys = torch.arange(seen + length, device=device)
    back = keys[seen:, None] - keys[None, :]
    visible = (back >= 0) & (back < window) if window else back >= 0
    return torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill(~visible, -torch.inf)


def register() -> None:
    """Makes the name known to transformers."""
    AttentionInterface.register(NAME, segment_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
