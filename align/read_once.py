"""Weights that one process reads for all, on engines that divide them.

The first process reads them. The others make room for them in memory that nobody writes to, which takes no place, and
get their parts when the model is divided (``align.engines``). Whole weights lie once in one machine's memory, and not
once a process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from accelerate.utils import broadcast_object_list
from torch import nn

from align.engines import is_reader, launched, shards_weights, whole_weights
from align.errors import RunError
from align.tracing import without_random_numbers

Value = TypeVar("Value")


def of_reader(value: Callable[[], Value]) -> Value:
    """What can be told of whole weights, on every process."""
    if not shards_weights(launched()):
        return value()
    said: list[Any] = broadcast_object_list([value() if is_reader() else None])
    return said[0]


def read(load: Callable[[], Any], make: Callable[[str], nn.Module]) -> Any:
    """The model with its weights on the process that reads, with room for them on the others; all have to call it.

    Args:
        load: reads it.
        make: makes it from its configuration alone, with the attention of this name.
    Raises:
        RunError: on all processes, where the first can't read it.
    """
    if not is_reader():
        about: Any = broadcast_object_list([None])[0]
        if isinstance(about, RunError):
            raise about
        return _room(make, **about)
    try:
        model = load()
    except RunError as error:
        broadcast_object_list([error])
        raise
    tied: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(parameter, []).append(name)
    about = {
        "attention": model.config._attn_implementation,
        "parameters": [(names, parameter.shape, parameter.dtype) for parameter, names in tied.items()],
        "buffers": dict(model.named_buffers()),
    }
    broadcast_object_list([about])
    return model


def _room(make: Callable[[str], nn.Module], attention: str, parameters: Any, buffers: Any) -> nn.Module:
    with without_random_numbers(), whole_weights(), init_empty_weights(include_buffers=False):
        model = make(attention)
    for names, shape, dtype in parameters:
        parameter = nn.Parameter(torch.empty(shape, dtype=dtype))
        for name in names:
            _owner(model, name)._parameters[name.rpartition(".")[-1]] = parameter
    for name, value in buffers.items():
        _owner(model, name)._buffers[name.rpartition(".")[-1]] = value
    return model.eval()  # as what is read is


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])
