"""Which way a model computes log-probs: shared prompts by the fastest attention that agrees with its own forward."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from align import checks
from align import model as models
from align.errors import RunError
from align.forward import causal_lm
from align.fused import unfuse
from align.sections import ModelSection
from data.store import TokenTable


def choose_path(
    section: ModelSection, model: nn.Module, table: TokenTable, dtype: torch.dtype, device: torch.device
) -> tuple[bool, checks.Check]:
    """Shared prompts by the fastest attention that works out for this model, or else sequences one by one.

    Args:
        section: says which attention, or that it may be chosen.
        model: bound, on ``device``, not wrapped; its attention is set.
        table: rows to try it on.
        dtype: of the computation.
        device: where the model is.
    Returns:
        Whether responses may share their prompt, and what was found.
    Raises:
        RunError: the model can't score a row in any way.
    """
    inner = causal_lm(model)
    reasons: list[str] = []
    share, check = False, None
    ways = _ways(section, inner.config)
    for way in ways:
        if way != inner.config.get_text_config()._attn_implementation:
            try:
                inner.set_attn_implementation(way)
            except ValueError:  # models that have no choice, such as those without attention
                inner.set_attn_implementation("eager")
        try:
            share, check = checks.choose_path(model, table, dtype, device)
        except RunError as error:  # where a kernel can't be compiled, the model's own forward fails too
            if way == ways[-1]:
                raise
            reasons.append(f"{way}: {error}")
            continue
        if share:
            more = f", with {way} ({'; '.join(reasons)})" if reasons else ""
            return True, dataclasses.replace(check, detail=check.detail + more)
        reasons.append(f"{way}: {check.detail}")
    assert check is not None
    unfuse(model)  # what is said is that responses go through the model's own forward
    return share, check


def _ways(section: ModelSection, config: Any) -> list[str]:
    """Implementations of attention, the fastest first; the last one takes any mask."""
    loaded = config.get_text_config()._attn_implementation
    dense = models.dense_attention(config)
    if section.attn_implementation != "auto" or loaded == "eager":
        return [loaded]
    return list(dict.fromkeys([loaded, *([models.NAME] if dense == "sdpa" else []), dense]))
