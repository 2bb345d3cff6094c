"""Checkpoints that appear complete or not at all, and can tell when they are damaged."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from align.errors import RunError

MANIFEST = "manifest.json"
STATE = "align_state.json"
RECIPE = "recipe.yaml"
PARTIAL = ".partial"

MAY_DIFFER = {
    "train": {
        "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "save_strategy", "save_steps",
        "save_total_limit", "report_to", "run_name", "dataloader_num_workers", "eval_strategy", "eval_steps",
    },
    "hub": {"push_to_hub", "hub_model_id", "hub_private_repo"},
    "data": {"max_dropped_share"},
}  # fmt: skip
"""Keys of a recipe that a resumed run may change, because no number depends on them."""


def write_manifest(folder: Path) -> None:
    """Lists every file of a checkpoint with size and hash."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "blake2b": _hash(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps(files, indent=1))


def verify(folder: Path) -> None:
    """Checks a checkpoint against its manifest.

    Raises:
        RunError: it is no checkpoint of ours, or a file is missing or damaged.
    """
    if not (folder / MANIFEST).is_file():
        raise RunError(f"{folder} is not a complete checkpoint (it has no {MANIFEST}); choose another one")
    try:
        files = json.loads((folder / MANIFEST).read_text())
    except ValueError:
        raise RunError(f"{folder}/{MANIFEST} is damaged; resume from another checkpoint") from None
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise RunError(f"the checkpoint {folder} is damaged: {name} is missing; resume from another checkpoint")
        if path.stat().st_size != expected["bytes"] or _hash(path) != expected["blake2b"]:
            raise RunError(f"the checkpoint {folder} is damaged: {name} has changed; resume from another checkpoint")


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((p for p in found if (p / MANIFEST).is_file()), key=lambda path: int(path.name.split("-")[1]))


def find_checkpoint(wanted: str, output_dir: Path) -> Path:
    """The folder that ``train.resume_from_checkpoint`` means.

    Raises:
        RunError: there is none.
    """
    if wanted == "last":
        complete = checkpoints(output_dir)
        if not complete:
            raise RunError(
                f"train.resume_from_checkpoint last: {output_dir} holds no complete checkpoint; leave the key out"
            )
        return complete[-1]
    folder = Path(wanted)
    if not folder.is_dir():
        raise RunError(f"train.resume_from_checkpoint: there is no folder {wanted!r}; use last for the newest one")
    return folder


def refuse_other_recipe(folder: Path, resolved: Mapping[str, Any]) -> None:
    """Raises ``RunError`` listing the keys in which a checkpoint's recipe differs, where that changes numbers."""
    try:
        stored = yaml.safe_load((folder / RECIPE).read_text())
    except (OSError, yaml.YAMLError):
        raise RunError(f"{folder} lacks its recipe; resume from another checkpoint") from None
    differing = [
        f"{path} was {was!r}, is {now!r}"
        for path, was, now in _differences(stored, resolved)
        if path.split(".")[-1] not in MAY_DIFFER.get(path.split(".")[0], set())
    ]
    if differing:
        raise RunError(f"{folder} belongs to another recipe: {'; '.join(differing[:5])}; start a new output_dir")


def _differences(stored: Any, resolved: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(stored, Mapping) and isinstance(resolved, Mapping):
        keys = dict.fromkeys([*stored, *resolved])
        return [
            entry
            for key in keys
            for entry in _differences(stored.get(key), resolved.get(key), f"{path}.{key}" if path else str(key))
        ]
    if isinstance(stored, list) and isinstance(resolved, list) and len(stored) == len(resolved):
        return [
            entry
            for i, (was, now) in enumerate(zip(stored, resolved, strict=True))
            for entry in _differences(was, now, f"{path}.{i}")
        ]
    return [] if stored == resolved else [(path, stored, resolved)]


def claim_output_dir(output_dir: Path, *, overwrite: bool, resume: bool) -> None:
    """Refuses a folder that holds another run; nothing is deleted unless asked for.

    Raises:
        RunError: it does, or it can't be written.
    """
    leftovers = [name for name in ("metrics.jsonl", RECIPE, "results.json") if (output_dir / name).exists()]
    if leftovers and not (overwrite or resume):
        raise RunError(
            f"{output_dir} already holds a run ({leftovers[0]}); choose another --output_dir, go on with "
            "--resume_from_checkpoint last, or delete it with --overwrite_output_dir"
        )
    if output_dir.exists() and not output_dir.is_dir():
        raise RunError(f"train.output_dir {str(output_dir)!r} is a file; name a folder")
    try:
        if overwrite and leftovers:
            shutil.rmtree(output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(output_dir / PARTIAL, ignore_errors=True)
        probe = output_dir / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise RunError(f"can't write to train.output_dir {str(output_dir)!r}: {error.strerror}") from None


def require_space(output_dir: Path, needed: int, what: str) -> None:
    """Raises ``RunError`` unless the disk has ``needed`` bytes left for ``what``."""
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise RunError(
            f"{output_dir} has {_size(free)} left and {what} takes about {_size(needed)}; free some, choose another "
            "output_dir, or lower train.save_total_limit"
        )


def _size(count: int) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024  # type: ignore[assignment]
    raise AssertionError


def explain_os_error(error: OSError, output_dir: Path) -> RunError:
    """One sentence for a disk that failed in the middle of a run."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(f"no space left for {output_dir}; free some and go on with --resume_from_checkpoint last")
    return RunError(f"could not write {error.filename or output_dir}: {error.strerror or error}")


def publish(partial: Path, final: Path) -> None:
    """Renames a finished folder into place; a crash leaves either nothing or all of it."""
    for path in partial.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
