"""Checkpoints that are written while training goes on (``train.async_save``).

A save copies what is to be written into host memory and lets training go on; a thread writes it, in the same files,
byte for byte, that would have been written at once. What makes those files are four libraries: transformers, peft,
accelerate with ``torch.distributed.checkpoint`` (FSDP2) and DeepSpeed. Their code runs as it always does, and only the
last call, which would write a large file, is put off. Should a library write by another function some day, its file is
written at once: correct as before, and training waits for it.

FSDP2's shards are written by ``torch.distributed.checkpoint.save`` in this thread, which is what its ``async_save``
does in one of its own: that would be a thread and a process group for each of model and optimizer, and the checkpoint
is complete when both and all other files are.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import importlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors.torch import save_file
from torch import Tensor, nn

SAVERS = (
    ("torch", "save", "_take_objects"),
    ("transformers.modeling_utils", "safe_save_file", "_take_tensors"),
    ("peft.peft_model", "safe_save_file", "_take_tensors"),
    ("torch.distributed.checkpoint", "save", "_take_shards"),
)
"""Modules, the functions in them that write large files, and what is called in their place."""
NEVER_KEPT = ("training_args.bin",)
"""Files that no checkpoint of ours has: a pickle of settings that the recipe holds anyway."""
AS_THEY_ARE = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, type)


class HostCopies:
    """What a checkpoint will hold, in host memory.

    Args:
        group: for what processes tell each other while they write; None where there is one process.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self._writes: deque[Callable[[], object]] = deque()

    @contextlib.contextmanager
    def taking(self) -> Iterator[None]:
        """For as long as it lasts, large files that this thread saves are copied and put off."""
        caller = threading.get_ident()

        def instead(original: Any, take: Any) -> Any:
            def call(*arguments: Any, **options: Any) -> Any:
                if threading.get_ident() != caller:
                    return original(*arguments, **options)
                return take(original, *arguments, **options)

            return call

        with contextlib.ExitStack() as restored:
            for module, name, take in SAVERS:
                owner = importlib.import_module(module)
                original = getattr(owner, name)
                restored.callback(setattr, owner, name, original)
                setattr(owner, name, instead(original, getattr(self, take)))
            yield

    def keep(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        """Puts off a file of tensors that are copies already."""
        self._writes.append(lambda: save_file(dict(tensors), path))

    def write(self) -> None:
        """Writes everything, and lets go of each copy that is written."""
        while self._writes:
            self._writes.popleft()()

    def _take_objects(self, save: Any, value: Any, file: Any, *arguments: Any, **options: Any) -> None:
        if not isinstance(file, str | os.PathLike):  # a buffer, which whoever made it reads next
            save(value, file, *arguments, **options)
        elif Path(file).name not in NEVER_KEPT:
            held = on_host(value)
            self._writes.append(lambda: save(held, file, *arguments, **options))

    def _take_tensors(self, save: Any, tensors: Any, file: Any, **options: Any) -> None:
        held = on_host(tensors)
        self._writes.append(lambda: save(held, file, **options))

    def _take_shards(self, save: Any, state_dict: Any, **options: Any) -> None:
        held = on_host(state_dict)
        self._writes.append(lambda: save(held, **options, process_group=self.group))


def on_host(value: Any) -> Any:
    """A copy that no later step changes, with every tensor in host memory; tensors that were one still are."""
    return _copied(value, {})


def _copied(value: Any, known: dict[Any, tuple[Tensor, Tensor]]) -> Any:
    if isinstance(value, AS_THEY_ARE):
        return value
    if isinstance(value, Tensor):
        return _copied_tensor(value, known)
    if isinstance(value, dict):
        made = copy.copy(value)  # which keeps what kind of dict it is
        for key, entry in value.items():
            made[key] = _copied(entry, known)
        for name, attribute in getattr(value, "__dict__", {}).items():  # a state dict's versions
            setattr(made, name, _copied(attribute, known))
        return made
    if isinstance(value, list | tuple):
        entries = [_copied(entry, known) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    return copy.deepcopy(value)


def _copied_tensor(value: Tensor, known: dict[Any, tuple[Tensor, Tensor]]) -> Tensor:
    part: Any = value.detach()
    local = part.to_local() if hasattr(part, "to_local") else part
    place = (local.untyped_storage()._cdata, local.storage_offset(), tuple(local.shape), local.stride(), local.dtype)
    if place not in known:
        # The original is kept until all is copied, lest another one comes to lie in its place.
        known[place] = (value, part.to("cpu", copy=True))
    made = known[place][1]
    if isinstance(value, nn.Parameter):
        return nn.Parameter(made, requires_grad=value.requires_grad)
    return made.detach().requires_grad_() if value.requires_grad else made


class BackgroundWriter:
    """One write at a time, in a thread; what goes wrong there is raised where the training loop asks for it.

    Args:
        timeout: seconds that processes wait for each other while they write.
    """

    def __init__(self, timeout: float) -> None:
        several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        # Of its own: on the other group the training loop's sums are under way, in an order of their own.
        limit = datetime.timedelta(seconds=timeout)
        self.group: Any = torch.distributed.new_group(backend="gloo", timeout=limit) if several else None
        self.writing = ""
        self._thread: threading.Thread | None = None
        self._fault: BaseException | None = None

    def start(self, name: str, work: Callable[[], object]) -> None:
        """Begins to write; the former write has to be over."""
        assert self._thread is None

        def run() -> None:
            try:
                work()
            except BaseException as fault:
                self._fault = fault

        self.writing = name
        self._thread = threading.Thread(target=run, daemon=True, name=f"writes {name}")
        self._thread.start()

    def wait(self) -> None:
        """Until the write under way, if any, is over.

        Raises:
            RunError: it failed, which is said once.
        """
        if self._thread is not None:
            self._thread.join()
        self.look()

    def look(self) -> None:
        """Raises what went wrong in a write that is over; doesn't wait."""
        if self._thread is None or self._thread.is_alive():
            return
        fault, self._thread, self._fault = self._fault, None, None
        if fault is not None:
            raise fault

    def meet(self) -> None:
        """Waits for the other processes' threads."""
        if self.group is not None:
            torch.distributed.barrier(group=self.group)
