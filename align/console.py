"""What a run says, and what libraries may say beside it."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from tqdm import tqdm

from align.lifetime import is_ours

if TYPE_CHECKING:
    from align.recipe import Recipe


def tell(line: str) -> None:
    """Writes a line of its own to stderr, where progress bars may stand and other processes write too."""
    with tqdm.external_write_mode(file=sys.stderr):
        sys.stderr.write(f"{line}\n")  # in one piece: with its end written apart, lines of two processes run together
        sys.stderr.flush()


@contextlib.contextmanager
def many_imports() -> Iterator[None]:
    """For a block that imports large libraries for the whole run.

    They make some million objects that stay. Python would look through them again and again for garbage while they are
    made, which takes a second, and later, which takes another. In a process of our own it never does: some libraries
    complain about what is left when Python is taken apart, which ``leave`` does without.
    """
    gc.disable()
    try:
        yield
        if is_ours():
            gc.freeze()
    finally:
        gc.enable()


def idle_libraries(recipe: Recipe, engine: str) -> list[str]:
    """Libraries that a run has no use for, and that accelerate and peft import wherever they are installed.

    Args:
        recipe: the run's.
        engine: as ``align.engines.launched`` tells.
    """
    idle = [] if engine.startswith("zero") else ["deepspeed"]
    # Weights that are trained are not quantized; the base of an adapter may be, as its checkpoint says.
    whole = recipe.lora is None and recipe.reference.model == "initial" and not recipe.model.trust_remote_code
    if whole and (recipe.train.optim.startswith("adamw_torch") or recipe.train.optim in ("sgd", "adafactor")):
        idle.append("bitsandbytes")
    return idle


def hide(names: Iterable[str]) -> None:
    """Makes libraries that were not imported yet look as if they were not installed, for as long as this process is."""
    for name in names:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def quiet_libraries() -> None:
    """Keeps what libraries print about themselves out of the way of what a run has to say."""
    # peft imports bitsandbytes where it is installed; on CPUs that misses a package which only 4-bit weights gain by.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from align.engines import on_gpu

    if not on_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when imported; else DeepSpeed warns that it found no GPU
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
