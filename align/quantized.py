"""What frozen weights in 4 and 8 bits take (bitsandbytes), known without making them.

    4 bits   half a byte a weight, a float32 scale for each block of 64, and a table of 16 values for each layer;
             nested: scales in 8 bits with a float32 scale for each 256 of them, their mean and a table of 256
             (arXiv:2305.14314, section 3)
    8 bits   a byte a weight and a float32 scale for each row (arXiv:2208.07339)

Linear layers are quantized, but for the output layer and what is tied to it; embeddings and norms stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from align.forward import causal_lm
from align.sections import ModelSection

BLOCK, NESTED_BLOCK = 64, 256
"""Weights that share a scale, and scales that do."""
TABLE, NESTED_TABLE = 4 * 16, 4 * 256
"""Bytes of the values that codes stand for."""


def quantized_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    """Weights that would be quantized in a model with or without adapter, before they are."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert

    inner: Any = causal_lm(model)
    kept = tuple(f"{name}." for name in get_keys_to_not_convert(inner))
    for name, module in inner.named_modules():
        linear = type(module) is nn.Linear or isinstance(module, Conv1D)
        weight: Any = getattr(module, "weight", None)
        if linear and not weight.requires_grad and not f"{name}.".startswith(kept):
            yield weight


def bytes_held(weight: nn.Parameter, section: ModelSection) -> int:
    """Bytes of a weight as ``section`` has it quantized, with what is needed to read it."""
    if section.load_in_8bit:
        return weight.numel() + 4 * weight.shape[0]
    blocks = -(-weight.numel() // BLOCK)
    scales = 4 * blocks
    if section.use_bnb_nested_quant:
        scales = blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 + NESTED_TABLE
    return -(-weight.numel() // 2) + scales + TABLE


def weights_held(model: nn.Module, section: ModelSection) -> float:
    """Bytes of all weights of a model that is not quantized yet, as it will be held."""
    whole = sum(each.nbytes for each in model.parameters())
    if not section.quantized:
        return float(whole)
    return float(whole + sum(bytes_held(each, section) - each.nbytes for each in quantized_weights(model)))


def largest_layer(model: nn.Module, section: ModelSection) -> float:
    """Bytes of the largest quantized weight, which is there in full while its layer computes; 0 where none is."""
    return float(max((each.nbytes for each in quantized_weights(model)), default=0)) if section.quantized else 0.0
