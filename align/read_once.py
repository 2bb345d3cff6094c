"""Weights that one process reads for all, on engines that divide them.

The first process reads them. The others make room for them in memory that nobody writes to, which takes no place, and
get their parts when the model is divided (``align.engines``). Whole weights lie once in one machine's memory, and not
once a process.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed
from accelerate import init_empty_weights
from torch import nn

from align.engines import is_reader, launched, shards_weights, whole_weights
from align.errors import RunError
from align.tracing import without_random_numbers

Value = TypeVar("Value")
PATIENCE = datetime.timedelta(days=1)
"""Reading and hashing a large model from a slow disk, or downloading it, takes longer than a step may."""


def of_reader(value: Callable[[], Value]) -> Value:
    """What can be told of whole weights, on every process.

    Raises:
        RunError: on all other processes, where the one that reads can't tell.
    """
    if not shards_weights(launched()):
        return value()
    if not is_reader():
        said: Any = _from_reader(None)
        if isinstance(said, RunError):
            raise said
        return said
    try:
        found = value()
    except RunError as error:
        _from_reader(error)
        raise
    except Exception as error:
        _from_reader(RunError(f"the first process could not read the weights ({error!r})"))
        raise
    _from_reader(found)
    return found


def read(load: Callable[[], Any], make: Callable[[str], nn.Module]) -> Any:
    """The model with its weights on the process that reads, with room for them on the others; all have to call it.

    Args:
        load: reads it.
        make: makes it from its configuration alone, with the attention of this name.
    Raises:
        RunError: on all processes, where the first can't read it.
    """
    kept: list[Any] = []

    def about() -> dict[str, Any]:
        kept.append(load())
        return _about(kept[0])

    told = of_reader(about)
    return kept[0] if kept else _room(make, **told)


def _from_reader(value: Any) -> Any:
    """On a line of its own: others wait here for as long as reading takes."""
    if not torch.distributed.is_initialized():
        return value
    said = [value]
    group: Any = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    torch.distributed.broadcast_object_list(said, 0, group=group)
    torch.distributed.destroy_process_group(group)
    return said[0]


def _about(model: Any) -> dict[str, Any]:
    tied: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(parameter, []).append(name)
    return {
        "attention": model.config._attn_implementation,
        "parameters": [(names, each.shape, each.dtype, each.requires_grad) for each, names in tied.items()],
        "buffers": {name: value.cpu() for name, value in model.named_buffers()},
    }


def _room(make: Callable[[str], nn.Module], attention: str, parameters: Any, buffers: Any) -> nn.Module:
    with without_random_numbers(), whole_weights(), init_empty_weights(include_buffers=False):
        model = make(attention)
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    read = {name for names, *_ in parameters for name in names}
    if own != read:
        raise RunError(
            f"the model as it was read has other weights than its configuration says ({sorted(own ^ read)[0]} …), so "
            "that it can't be divided among processes; launch with zero2.yaml or ddp.yaml"
        )
    for names, shape, dtype, trained in parameters:
        parameter = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=trained)
        for name in names:
            _owner(model, name)._parameters[name.rpartition(".")[-1]] = parameter
    for name, value in buffers.items():
        _owner(model, name)._buffers[name.rpartition(".")[-1]] = value
    return model.eval()  # as what is read is


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])
