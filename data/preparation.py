"""From datasets to token tables: rows gathered, tokenised, cached, reported.

Prepared once per content, before any process group exists, and shared by all ranks: whichever process comes first holds
a file lock while it works, the others map the arrays it wrote. What sources that have not changed led to is noted, so
that the next start reads no row.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock

from data.chat import template_fingerprint
from data.errors import DataError
from data.formats import RowProblem
from data.gathering import DataSpec, Gathered, hold_out, names_of, read_sources
from data.identity import identity_of
from data.rowstore import RowStore, numbered
from data.shapes import refuse_one_class
from data.store import FORMAT, TokenTable, cache_dir, digest, write_folder
from data.tables import Split, SplitWriter, Written
from data.tokens import Dropped, TokenStats, tokenize_rows
from data.workers import Workers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DataSpec", "Gathered", "Prepared", "Split", "hold_out", "prepare", "read_sources", "tokenizer_fingerprint"]

ABANDONED = 24 * 3600
"""Seconds after which what a process that died left behind is removed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What a run needs to know of its data."""

    train: Split
    eval: Split | None
    report: Mapping[str, Any]
    """Counts of what was read, dropped, cut and changed; written to ``data_report.json``."""

    def tables(self) -> list[TokenTable]:
        """The tokens of training and, where there is one, of evaluation."""
        return [split.table for split in (self.train, self.eval) if split is not None]


def prepare(spec: DataSpec, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Token tables of training and evaluation rows, from the cache where the content was prepared before.

    Raises:
        DataError: a dataset can't be used; one sentence on why and what to do.
    """
    fingerprint = tokenizer_fingerprint(tokenizer)
    identity = identity_of(spec)
    if identity is None:
        folder = _prepared(spec, tokenizer, fingerprint)
    else:
        note = cache_dir() / "sources" / f"{digest(FORMAT, identity, fingerprint)}.json"
        note.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(note.with_suffix(".lock")):
            folder = _noted(note)
            if folder is None:
                folder = _prepared(spec, tokenizer, fingerprint)
                if identity_of(spec) == identity:  # else what was read may be older or newer
                    part = note.with_suffix(".part")
                    part.write_text(json.dumps(folder.name))
                    os.replace(part, note)
    report = json.loads((folder / "report.json").read_text())
    refuse_losses(report, spec)
    return Prepared(
        train=Split.load(folder / "train"),
        eval=Split.load(folder / "eval") if (folder / "eval").is_dir() else None,
        report=report,
    )


def _noted(note: Path) -> Path | None:
    """The folder that these sources led to, if it is still there."""
    if not note.is_file():
        return None
    folder = cache_dir() / "rows" / json.loads(note.read_text())
    return folder if (folder / "report.json").is_file() else None


def _prepared(spec: DataSpec, tokenizer: PreTrainedTokenizerBase, fingerprint: str) -> Path:
    """The folder with the tables of what the sources hold now."""
    cache = cache_dir() / "rows"
    cache.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(cache)
    with Workers() as workers, RowStore(cache) as store:
        rows = read_sources(spec, workers, store)
        key = digest(
            FORMAT,
            [dataclasses.astuple(spec.policy), spec.legs, spec.labels, spec.scores, fingerprint],
            [dict(rows.shaped), rows.kept_share, [each.format for each in rows.loaded]],
            [[each.source, each.index, each.reason] for each in _problems(rows)],
            [len(rows.train), len(rows.held)],
            *rows.train.contents(),
            *rows.held.contents(),
        )
        folder = cache / key
        with FileLock(folder.with_suffix(".lock")):
            if not (folder / "report.json").is_file():
                for left in cache.glob(f".{key}.*"):  # by a process that was killed: the lock is ours
                    shutil.rmtree(left, ignore_errors=True)
                write_folder(folder, lambda path: _prepare_into(path, spec, tokenizer, rows, workers))
    return folder


def _remove_abandoned(cache: Path) -> None:
    for folder in cache.glob(".store-*"):
        newest = max(
            (path.stat().st_mtime for path in [folder, *folder.glob("*")] if path.exists()), default=time.time()
        )
        if time.time() - newest > ABANDONED:
            shutil.rmtree(folder, ignore_errors=True)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Content hash of everything about a tokenizer that can change token ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        model = json.loads(backend.to_str())
        # How the last call padded and cut; no call of ours does either.
        del model["padding"], model["truncation"]
    else:
        model = sorted(tokenizer.get_vocab().items())
    return digest(model, {k: str(v) for k, v in tokenizer.special_tokens_map.items()}, template_fingerprint(tokenizer))


def _problems(rows: Gathered) -> list[RowProblem]:
    return [problem for each in rows.loaded for problem in each.problems] + rows.problems


def _prepare_into(
    folder: Path, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, rows: Gathered, workers: Workers
) -> None:
    dropped = [Dropped(source=each.source, index=each.index, reason=each.reason) for each in _problems(rows)]
    stats = TokenStats()
    found: dict[str, Written] = {}
    lost = 0
    for name, text_rows in (("train", rows.train), ("eval", rows.held)):
        with _writing(folder / name) as writer:
            _, lost_here, stats_here = tokenize_rows(
                text_rows, tokenizer, spec.policy, spec.legs, scores=spec.scores, into=writer.add, workers=workers
            )
            found[name] = writer.finish()
        dropped += lost_here
        lost += len(lost_here)
        stats.add(stats_here)
    kept = {name: len(each) for name, each in found.items()}
    tables = {name: each.table for name, each in found.items() if each.table is not None}
    desirable = int((found["train"].labels == 1).sum())
    report = {
        "rows": {
            "read": sum(len(each.rows) + len(each.problems) for each in rows.loaded),
            "kept": kept["train"] + kept["eval"],
            **kept,
        },
        "formats": [each.format for each in rows.loaded],
        "shaped": dict(rows.shaped),
        "labels": {"desirable": desirable, "undesirable": kept["train"] - desirable} if spec.labels else None,
        "dropped": dict(Counter(row.reason for row in dropped).most_common()),
        "dropped_rows": [dataclasses.asdict(row) for row in dropped],
        # Rounded, so that a limit of 0.3 allows three of ten whatever floating point makes of them.
        "dropped_share": round(1 - rows.kept_share * (1 - lost / max(lost + sum(kept.values()), 1)), 12),
        "duplicate_rows": sum(len(each) - _distinct(each.rows) for each in found.values()),
        "eval_prompts_in_training": _shared(found["train"].prompts, found["eval"].prompts),
        "truncated": dict(stats.truncated),
        "tokens_lost": dict(stats.tokens_lost),
        "boundary_mismatches": stats.boundary_mismatches,
        "bos_removed": stats.bos_removed,
        "terminator_added": dict(stats.terminator_added),
        "terminator_lost": dict(stats.terminator_lost),
        "tail_removed": dict(stats.tail_removed),
        "tokens": _token_totals(tables),
        "max_length": spec.policy.max_length,
        "truncation": spec.policy.truncation,
        "dataset_hash": digest([table.fingerprint() for table in tables.values()]),
    }
    (folder / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1))


@contextmanager
def _writing(folder: Path) -> Iterator[SplitWriter]:
    writer = SplitWriter(folder)
    try:
        yield writer
    finally:
        writer.close()


def _distinct(hashes: np.ndarray) -> int:
    return int(numbered(hashes).max(initial=-1)) + 1


def _shared(first: np.ndarray, second: np.ndarray) -> int:
    """How many hashes are in both."""
    return _distinct(first) + _distinct(second) - _distinct(np.concatenate([first, second]))


def _token_totals(tables: Mapping[str, TokenTable]) -> dict[str, int]:
    totals: Counter[str] = Counter()
    for table in tables.values():
        totals["prompt"] += int(table.prompts.lengths().sum())
        for leg, ragged in table.legs.items():
            totals[leg] += int(ragged.lengths().sum())
    return dict(totals)


def refuse_losses(report: Mapping[str, Any], spec: DataSpec) -> None:
    """Stops a run whose data is mostly unusable."""
    rows, reasons = report["rows"], report["dropped"]
    names = names_of(spec)
    why = ", ".join(f"{count} × {reason}" for reason, count in list(reasons.items())[:4])
    rule = ", change data.rule" if report["shaped"]["rule"] else ""
    why = why or "the dataset is empty"
    way_out = f"mend the data{rule}, or raise data.max_length ({spec.policy.max_length})"
    if rows["train"] == 0:
        raise DataError(f"{names}: no row can be trained on ({why}); {way_out}")
    if spec.eval is not None and rows["eval"] == 0:
        raise DataError(f"{spec.eval.dataset_name}: no row can be evaluated on ({why}); {way_out}")
    if spec.labels:
        refuse_one_class(report["labels"]["desirable"], report["labels"]["undesirable"], names)
    share = report["dropped_share"]
    if share > spec.max_dropped_share:
        raise DataError(
            f"{names}: {share:.0%} of {rows['read']} rows can't be used ({why}); mend the data{rule}, raise "
            f"data.max_length, or accept it with data.max_dropped_share {min(1.0, round(share + 0.01, 2))}"
        )
