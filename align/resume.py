"""Which checkpoint a run goes on from: the first process decides, and the others take its word.

Hashes of a whole checkpoint are checked once and not by every process, and processes that see a shared file system at
different moments go on from the same one. The others wait until they see its files as well.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align import saving
from align.errors import RecipeError, RunError
from align.recipe import Recipe

PATIENCE = 120.0
"""Seconds until a file that another machine has written should be seen: NFS looks again after 60 at most."""


@dataclass(frozen=True, kw_only=True)
class Resume:
    """What a run goes on from."""

    checkpoint: Path | None = None
    """None for the beginning."""
    again: bool = False
    """Whether a run was begun here that left nothing."""
    told: tuple[str, ...] = ()
    """What to say of it."""


def decide(recipe: Recipe, engine: str, processes: int) -> Resume:
    """Looks for the checkpoint that the recipe means, and verifies it.

    Raises:
        RunError: there is none, or this run can't go on from it.
    """
    wanted, output_dir = recipe.train.resume_from_checkpoint, Path(recipe.train.output_dir)
    if wanted is None:
        return Resume()
    checkpoint, told = saving.find_checkpoint(wanted, output_dir)
    if checkpoint is None:
        return Resume(again=saving.unfinished(output_dir), told=tuple(told))
    allowed = recipe.train.allow_recipe_change
    told += saving.refuse_other_recipe(checkpoint, recipe.resolved(), allowed=allowed)
    other = saving.refuse_other_engine(checkpoint, engine, processes)
    return Resume(checkpoint=checkpoint, told=(*told, *([other] if other is not None else [])))


def agree(recipe: Recipe, engine: str, processes: int) -> Resume:
    """The same on all processes.

    Raises:
        RunError: on all of them, if the first one can't; on one of them, if it doesn't see the checkpoint.
    """
    if processes == 1 or recipe.train.resume_from_checkpoint is None:
        return decide(recipe, engine, processes)
    from accelerate.utils import broadcast_object_list

    from align.assemble import training_arguments

    rank = training_arguments(recipe, 1, evaluate=True).process_index  # which starts the process group
    found: Any = broadcast_object_list([_outcome(lambda: decide(recipe, engine, processes)) if rank == 0 else None])[0]
    if isinstance(found, Exception):
        raise found
    if found.checkpoint is not None and rank != 0:
        wait_until_seen(found.checkpoint)
    return found


def _outcome(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except (RunError, RecipeError) as error:
        return error


def wait_until_seen(folder: Path, patience: float = PATIENCE) -> None:
    """Waits for all files of a checkpoint that another process has verified. Looks at sizes, not at contents.

    Raises:
        RunError: they don't appear.
    """
    deadline = time.monotonic() + patience
    while (lacking := _not_seen(folder)) is not None:
        if time.monotonic() > deadline:
            raise RunError(
                f"the first process goes on from {folder}, and {os.uname().nodename} does not see all of it "
                f"({lacking}); put train.output_dir on a file system that all machines share"
            )
        time.sleep(min(1.0, patience / 10))


def _not_seen(folder: Path) -> str | None:
    try:
        files = json.loads((folder / saving.MANIFEST).read_text())
        return next((name for name, file in files.items() if (folder / name).stat().st_size != file["bytes"]), None)
    except FileNotFoundError as error:
        return Path(error.filename).name
    except ValueError:  # seen half
        return saving.MANIFEST
