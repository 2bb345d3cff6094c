"""What one forward and backward pass computes, moves and keeps, found without computing it.

The run's own forward is executed on tensors that have shapes and no contents, so that whatever the architecture does
is counted as it will be done: arithmetic of matrix products and attention, bytes that all other operations read and
write, and the most memory that is in use at any moment. Models with many equal layers are traced with two and with
four, and the rest follows.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from data.pack import PackedBatch

FEW = (2, 4)
"""Layers that are traced; models with no more than the latter are traced whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """Of one microbatch."""

    forward_flops: float
    """Floating-point operations of matrix products and attention in the forward pass; multiply and add are two."""
    total_flops: float
    """With the backward pass, and what it computes again."""
    moved: float
    """Bytes that operations other than matrix products and attention read and write, both passes."""
    peak: float
    """Most bytes in use at once beside the weights, gradients included."""
    parameters: float
    trained: float
    parameter_bytes: float
    trained_bytes: float

    def __add__(self, other: Traced) -> Traced:
        return Traced(**{name: getattr(self, name) + getattr(other, name) for name in Traced.__slots__})

    def __mul__(self, factor: float) -> Traced:
        return Traced(**{name: getattr(self, name) * factor for name in Traced.__slots__})


class _Watch(TorchDispatchMode):
    """Follows every tensor that an operation makes until it is let go."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.now, self.peak, self.moved = known, 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [value for value in tree_leaves(out) if isinstance(value, Tensor)]
        fresh = [value for value in made if self._take(value)]
        if fresh and not _is_product(func):
            read = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            self.moved += sum(value.nbytes for value in (*read, *made))
        elif not fresh and func._schema.is_mutable:
            self.moved += 2 * sum(value.nbytes for value in made)
        return out

    def _take(self, value: Tensor) -> bool:
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return False
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)
        return True

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def _is_product(func: Any) -> bool:
    name = func._schema.name
    return any(part in name for part in ("mm", "scaled_dot_product", "convolution"))


def trace(config: Any, batch: PackedBatch, *, make: Any, dtype: torch.dtype, checkpointing: bool) -> Traced:
    """Counts one microbatch.

    Args:
        config: of the model.
        batch: on the CPU.
        make: builds the bound model from a configuration, under a mode in which nothing is allocated.
        dtype: of the computation; below float32 it runs under autocast.
        checkpointing: whether activations are computed again.
    """
    layers = int(config.get_text_config().num_hidden_layers)
    if layers <= FEW[1]:
        return _traced(config, batch, make, dtype, checkpointing)
    low, high = (_traced(_with_layers(config, number), batch, make, dtype, checkpointing) for number in FEW)
    each = (high + low * -1.0) * (1 / (FEW[1] - FEW[0]))
    return low + each * (layers - FEW[0])


def _with_layers(config: Any, number: int) -> Any:
    shorter = copy.deepcopy(config)
    text = shorter.get_text_config()
    text.num_hidden_layers = number
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:number]
    return shorter


def _traced(config: Any, batch: PackedBatch, make: Any, dtype: torch.dtype, checkpointing: bool) -> Traced:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model: nn.Module = make(config)
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        known = {each.untyped_storage()._cdata for each in (*model.parameters(), *model.buffers())}
        low = dtype in (torch.bfloat16, torch.float16)
        with _Watch(known) as watch, FlopCounterMode(display=False) as flops:
            seen = []
            for _ in range(2):  # in the second pass gradients are there already, as in most microbatches
                with torch.autocast("cpu", dtype) if low else contextlib.nullcontext():
                    found = model(packed=batch)
                seen.append(flops.get_total_flops())
                values = found["values"] if "values" in found else found["logps"]
                values.sum().backward()
                del found, values
                seen += [flops.get_total_flops(), watch.moved]
        sizes = [(each.numel(), each.nbytes, each.requires_grad) for each in model.parameters()]
    return Traced(
        forward_flops=float(seen[0]),
        total_flops=float(seen[1]),
        moved=float(seen[2]),
        peak=float(watch.peak),
        parameters=float(sum(number for number, _, _ in sizes)),
        trained=float(sum(number for number, _, grad in sizes if grad)),
        parameter_bytes=float(sum(size for _, size, _ in sizes)),
        trained_bytes=float(sum(size for _, size, grad in sizes if grad)),
    )


@contextlib.contextmanager
def without_random_numbers() -> Iterator[None]:
    """Building a model draws weights; the run's own must not depend on whether it was planned."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
