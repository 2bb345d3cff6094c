"""Prepared rows without some of them, and the report that says so: for what leaves after rows have become tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import xxhash

from data.preparation import DataSpec, Prepared, refuse_losses
from data.rowstore import numbered
from data.shapes import MISMATCHED
from data.store import Ragged, TokenTable, digest
from data.tables import Split
from data.tokens import Dropped


def narrowed(prepared: Prepared, gone: Mapping[int, str], spec: DataSpec) -> Prepared:
    """Without training rows, each of which is counted among the dropped; evaluation rows stay.

    What the report says of cut tokens, templates and terminators remains that of all rows that were prepared. Its
    ``narrowed`` has the numbers of the rows that left, from which what was trained on can be told without a model.

    Args:
        prepared: tables and report.
        gone: number of each training row that leaves, and why.
        spec: what was prepared; its ``max_dropped_share`` holds for these rows too.
    Raises:
        DataError: no row is left, or too few.
    """
    if not gone:
        return prepared
    before = prepared.train
    leaves = np.isin(np.arange(len(before.table)), list(gone))
    train = before.take(np.flatnonzero(~leaves))
    report = _report(prepared, train, gone)
    refuse_losses(report, spec)
    return replace(prepared, train=train, report=report)


def _report(prepared: Prepared, train: Split, gone: Mapping[int, str]) -> dict[str, Any]:
    old, before, held = dict(prepared.report), prepared.train, prepared.eval
    dropped = [
        Dropped(source=source, index=index, reason=why)
        for (source, index), why in ((before.where[row], why) for row, why in sorted(gone.items()))
    ]
    rows, number = old["rows"], len(gone)
    tokens = Counter(old["tokens"])
    for name, ragged in [("prompt", before.table.prompts), *before.table.legs.items()]:
        own = train.table.prompts if name == "prompt" else train.table.legs[name]
        tokens[name] += int(own.lengths().sum()) - int(ragged.lengths().sum())
    tables = [train.table, *([] if held is None else [held.table])]
    new = {
        "rows": {**rows, "kept": rows["kept"] - number, "train": rows["train"] - number},
        "dropped": dict((Counter(old["dropped"]) + Counter(gone.values())).most_common()),
        "dropped_rows": [*old["dropped_rows"], *(asdict(each) for each in dropped)],
        "narrowed": sorted(gone),
        "dropped_share": round(1 - (1 - old["dropped_share"]) * (1 - number / rows["kept"]), 12),
        "tokens": dict(tokens),
        "dataset_hash": digest([table.fingerprint() for table in tables]),
    }
    if old["labels"] is not None:
        desirable = int(np.asarray(train.table.labels).sum())
        new["labels"] = {"desirable": desirable, "undesirable": len(train.table) - desirable}
    if old["duplicate_rows"]:
        new["duplicate_rows"] = old["duplicate_rows"] - _copies(before.table) + _copies(train.table)
    if old["eval_prompts_in_training"] and held is not None:
        first, second = _hashes(train.table.prompts), _hashes(held.table.prompts)
        new["eval_prompts_in_training"] = (
            _distinct(first) + _distinct(second) - _distinct(np.concatenate([first, second]))
        )
    return {**old, **new}


def _copies(table: TokenTable) -> int:
    """Rows that are the same as another one but for its first occurrence: tokens and label."""
    parts = [table.prompts, *(leg for name, leg in table.legs.items() if name != MISMATCHED)]
    columns = [_hashes(part) for part in parts]
    if table.labels is not None:
        columns.append(np.asarray(table.labels, dtype=np.uint64)[:, None])
    rows = np.ascontiguousarray(np.concatenate(columns, axis=1))
    return len(rows) - len(np.unique(rows, axis=0))


def _hashes(ragged: Ragged) -> np.ndarray:
    """128 bits of each sequence, (row, 2)."""
    found = b"".join(
        xxhash.xxh3_128_digest(np.asarray(ragged[i], dtype=np.int32).tobytes()) for i in range(len(ragged))
    )
    return np.frombuffer(found, dtype=np.uint64).reshape(-1, 2)


def _distinct(hashes: np.ndarray) -> int:
    return int(numbered(hashes).max(initial=-1)) + 1
