"""Checkpoints that appear complete or not at all, and can tell when they are damaged."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from align.errors import RunError

MANIFEST = "manifest.json"
STATE = "align_state.json"
RECIPE = "recipe.yaml"
PARTIAL = ".partial"
STARTED = ".started"
"""In a run directory from the first step until weights are saved."""

LEFT_BY_RUNS = (
    "checkpoint-*", "abandoned-checkpoint-*", PARTIAL, STARTED, RECIPE,
    "metrics.jsonl", "results.json", "report.html", "README.md", "card.json", "card", ".eval_results",
    "trackers.json", "tensorboard", "wandb",
    "data_report.json", "checks.json", "forecast.json", "example.txt", "resumes.json", "runs", "training_args.bin",
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template.*", "vocab.*", "merges.txt",
)  # fmt: skip
"""What ``train.overwrite_output_dir`` deletes; anything else in the folder is somebody's and stays."""

MAY_DIFFER = {
    "train": {
        "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "allow_recipe_change", "ddp_timeout",
        "save_strategy", "save_steps",
        "save_total_limit", "async_save", "token_budget", "gradient_checkpointing",
        "report_to", "run_name", "project", "dataloader_num_workers", "eval_strategy", "eval_steps",
    },
    "hub": {
        "push_to_hub", "hub_model_id", "hub_private_repo", "push_samples", "license", "language", "tags",
    },
    "data": {"max_dropped_share"},
}  # fmt: skip
"""Keys of a recipe that a resumed run may change, because no number depends on them."""
AFTERWARDS = ("evals", "serving")
"""Sections that say what is measured once the weights are final."""


NEVER_DIFFERS = ("model.", "lora", "train.optim")
"""Beginnings of keys that no resumed run may change: weights or the optimizer's state would not fit."""


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
        raise RunError(f"{folder} is not a complete checkpoint (it has no {MANIFEST}); {_another(folder)}")
    try:
        files = json.loads((folder / MANIFEST).read_text())
        expected = {str(name): (int(file["bytes"]), str(file["blake2b"])) for name, file in files.items()}
        whole = {STATE, RECIPE} <= expected.keys()
    except (ValueError, TypeError, KeyError, AttributeError):
        whole, expected = False, {}
    if not whole:
        raise RunError(f"the checkpoint {folder} is damaged: {MANIFEST} is no list of its files; {_another(folder)}")
    for name, (size, content) in expected.items():
        path = folder / name
        if not path.is_file():
            raise RunError(f"the checkpoint {folder} is damaged: {name} is missing; {_another(folder)}")
        if path.stat().st_size != size or _hash(path) != content:
            raise RunError(f"the checkpoint {folder} is damaged: {name} has changed; {_another(folder)}")


def _another(folder: Path) -> str:
    """The way out of a checkpoint that can't be used."""
    others = [path for path in checkpoints(folder.parent) if path.name != folder.name]
    if not others:
        return "start a new output_dir"
    return f"go on from an earlier one with --resume_from_checkpoint {others[-1]}"


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((p for p in found if (p / MANIFEST).is_file()), key=lambda path: int(path.name.split("-")[1]))


def find_checkpoint(wanted: str, output_dir: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint that ``train.resume_from_checkpoint`` means, verified.

    Returns:
        Its folder, or None where ``auto`` found none; and why newer ones were passed over.
    Raises:
        RunError: there is none, or the one that was named is damaged.
    """
    if wanted not in ("last", "auto"):
        folder = Path(wanted)
        if not folder.is_dir():
            raise RunError(f"train.resume_from_checkpoint: there is no folder {wanted!r}; use last for the newest one")
        verify(folder)
        return folder, []
    skipped = []
    for folder in reversed(checkpoints(output_dir)):
        try:
            verify(folder)
            return folder, skipped
        except RunError as error:
            skipped.append(f"{folder.name} was passed over: {str(error).partition(';')[0]}")
    if wanted == "auto" and not skipped:
        return None, []
    raise RunError(
        f"train.resume_from_checkpoint {wanted}: {output_dir} holds no complete checkpoint"
        + (f" ({'; '.join(skipped)}); choose another output_dir" if skipped else "; leave the key out")
    )


def refuse_other_engine(folder: Path, engine: str, processes: int) -> str | None:
    """What changes when a checkpoint is gone on from with other processes than wrote it; None where nothing does.

    Raises:
        RunError: this engine can't read what that one wrote.
    """
    stored = json.loads((folder / STATE).read_text())
    was, count = stored.get("engine", engine), int(stored.get("processes", processes))
    replicas = ("single", "ddp")
    if was != engine and not (was in replicas and engine in replicas):
        raise RunError(
            f"{folder} was written by {was} and this run is launched with {engine}, which stores optimizers otherwise; "
            f"launch with {was}, or train on from the weights (python -m align.export {folder} OUT)"
        )
    if count != processes and engine.startswith("zero"):
        raise RunError(
            f"{folder} was written by {count} processes and DeepSpeed can't divide its optimizer among {processes}; "
            f"launch {count}, or train on from the weights (python -m align.export {folder} OUT)"
        )
    if count == processes:
        return None
    return (
        f"{count} processes wrote this checkpoint and {processes} go on from it: steps keep their rows and order, sums "
        "are added in another order"
    )


def refuse_other_recipe(folder: Path, resolved: Mapping[str, Any], *, allowed: bool = False) -> list[str]:
    """The keys in which a checkpoint's recipe differs, where that changes numbers.

    Raises:
        RunError: there are such keys, and that is not allowed.
    """
    try:
        stored = yaml.safe_load((folder / RECIPE).read_text())
    except (OSError, ValueError, yaml.YAMLError):
        stored = None
    if not isinstance(stored, Mapping):
        raise RunError(f"the checkpoint {folder} is damaged: it has no {RECIPE} to compare with; {_another(folder)}")
    differing = [
        f"{path} was {was!r}, is {now!r}" for path, was, now in _differences(stored, resolved) if not _free(path)
    ]
    plateau = resolved["train"]["lr_scheduler_type"] == "reduce_lr_on_plateau"  # which keeps its own learning rate
    never = (*NEVER_DIFFERS, "train.lr_scheduler_type", *(["train.learning_rate"] if plateau else []))
    fixed = [each for each in differing if each.startswith(never)]
    if fixed:
        raise RunError(
            f"{folder} belongs to another recipe, and a run can't change this on its way: {'; '.join(fixed[:5])}; "
            "start a new output_dir, from its weights if you like (python -m align.export)"
        )
    if differing and not allowed:
        raise RunError(
            f"{folder} belongs to another recipe: {'; '.join(differing[:5])}; start a new output_dir, or go on with "
            "these changes with --allow_recipe_change"
        )
    return differing


def _free(path: str) -> bool:
    section, key = path.split(".")[0], path.split(".")[-1]
    return section in AFTERWARDS or key in MAY_DIFFER.get(section, set())


def refuse_other_rows(folder: Path, fingerprint: str) -> None:
    """Raises ``RunError`` if a checkpoint was made from other training rows than the recipe's data holds now."""
    stored = json.loads((folder / STATE).read_text()).get("rows")
    if stored != fingerprint:
        raise RunError(
            f"{folder} was trained on other rows than data.dataset_name holds now; restore the data, or start a new "
            "output_dir"
        )


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


def unfinished(output_dir: Path) -> bool:
    """Whether a run has begun in the folder and left neither a checkpoint nor weights, so that nothing can be lost."""
    left = [*output_dir.glob("checkpoint-*"), *output_dir.glob("*.safetensors")]
    return (output_dir / STARTED).exists() and not left


def set_aside(output_dir: Path, checkpoint: Path) -> list[str]:
    """Renames checkpoints of later steps than the one that is gone on from: they are of another course of the run, and
    would be taken for its newest. Returns what to say of each."""
    if checkpoint.parent.resolve() != output_dir.resolve():
        return []
    told, step = [], int(checkpoint.name.rpartition("-")[2])
    for path in sorted(output_dir.glob("checkpoint-*")):
        if re.fullmatch(r"checkpoint-\d+", path.name) and int(path.name.rpartition("-")[2]) > step:
            aside = output_dir / f"abandoned-{path.name}"
            if aside.exists():
                shutil.rmtree(aside)
            path.rename(aside)
            told.append(f"{path.name} is of the former course and was renamed to {aside.name}")
    return told


def refuse_output_dir(output_dir: Path, *, overwrite: bool, resume: bool) -> None:
    """Raises ``RunError`` for a file, and for a folder that holds another run. Changes nothing."""
    if output_dir.exists() and not output_dir.is_dir():
        raise RunError(f"train.output_dir {str(output_dir)!r} is a file; name a folder")
    leftovers = [name for name in ("metrics.jsonl", RECIPE, "results.json") if (output_dir / name).exists()]
    leftovers += [path.name for path in checkpoints(output_dir)]
    if leftovers and not (overwrite or resume):
        raise RunError(
            f"{output_dir} already holds a run ({leftovers[0]}); choose another --output_dir, go on with "
            "--resume_from_checkpoint last, or delete it with --overwrite_output_dir"
        )


@contextlib.contextmanager
def alone_in(output_dir: Path) -> Iterator[None]:
    """Keeps other runs out of the folder for the while.

    Raises:
        RunError: one is in it.
    """
    lock = FileLock(output_dir / ".lock", timeout=0)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise RunError(
            f"another process trains in {output_dir}; wait for it, or end it (a launcher that was killed leaves its "
            "processes behind), or choose another --output_dir"
        ) from None
    except OSError:
        yield  # the folder can't be written, which whoever writes it explains
        return
    try:
        yield
    finally:
        lock.release()


def claim_output_dir(output_dir: Path, *, overwrite: bool) -> None:
    """Makes the folder; deletes what a former run left there if asked to.

    Raises:
        RunError: it can't be written.
    """
    try:
        for path in sorted(output_dir.iterdir()) if overwrite and output_dir.is_dir() else ():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in LEFT_BY_RUNS):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        output_dir.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(output_dir / PARTIAL, ignore_errors=True)
        probe = output_dir / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise RunError(
            f"can't write to train.output_dir {str(output_dir)!r} ({error.strerror}); choose another --output_dir"
        ) from None


def require_space(output_dir: Path, needed: int, what: str) -> None:
    """Raises ``RunError`` unless the disk has ``needed`` bytes left for ``what``."""
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise RunError(
            f"{output_dir} has {_size(free)} left and {what} need about {_size(needed)}; free some, choose another "
            "output_dir, or lower train.save_total_limit"
        )


def require_memory(needed: float) -> None:
    """Raises ``RunError`` unless this machine has ``needed`` bytes of memory left for copies of a checkpoint."""
    free = psutil.virtual_memory().available
    if needed > free:
        raise RunError(
            f"train.async_save copies checkpoints of {_size(round(needed))} into host memory, of which "
            f"{_size(free)} are left; leave it out, or train an adapter (lora)"
        )


def _size(count: int) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024  # type: ignore[assignment]
    raise AssertionError


@contextlib.contextmanager
def explained(folder: Path, way_out: str | None = None) -> Iterator[None]:
    """Makes one sentence of what comes of a disk that can't be written to; other errors pass.

    Args:
        folder: what is written to.
        way_out: what to do when the disk is in order again; None where ``folder`` is a run.
    Raises:
        RunError: ``folder`` is full or broken.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:  # safetensors and torch wrap the system's error
        fault = _disk_fault(error, folder)
        if fault is None:
            raise
        if way_out is None:
            begun = bool(checkpoints(folder))
            way_out = "go on with --resume_from_checkpoint last" if begun else "start again with --overwrite_output_dir"
        raise RunError(f"{fault}, and {way_out}") from error


def _disk_fault(error: Exception, folder: Path) -> str | None:
    if isinstance(error, (ConnectionError, TimeoutError)):
        return None
    number = getattr(error, "errno", None)
    # torch and numpy tell neither number nor reason when a file stays shorter than what they wrote.
    cut_short = re.search(
        r"PytorchStreamWriter|inline_container|iostream error|\d+ requested and \d+ written", str(error)
    )
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error) or (cut_short and number is None):
        return f"no space left in {folder}; free some"
    if isinstance(error, (OSError, SafetensorError)):
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()).rstrip(".")
        return f"could not write {getattr(error, 'filename', None) or folder} ({reason}); make room for it"
    return None


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
