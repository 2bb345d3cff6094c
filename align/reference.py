"""Log-probs under the frozen reference: one interface, three sources, invisible to objectives.

    cached       computed once before the first step and stored, so that no second model is ever loaded for the initial
                 policy; on resume it is read, never recomputed from a policy that has moved
    adapter_off  the policy itself with its adapter switched off, in every step
    live         a second, frozen model, in every step

The cache is content-addressed: its key holds what the log-probs depend on (weights, adapter, tokens, precision,
path) and nothing else, so a sweep over learning rates or objectives reads it and a changed model never does.
"""

from __future__ import annotations

import contextlib
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from align.errors import RunError
from data.loader import PlannedBatches
from data.pack import PackedBatch
from data.plan import Plan
from data.store import Ragged, TokenTable, cache_dir, digest

FORMAT = 1
Scorer = Callable[[PackedBatch], Tensor]
"""Maps a batch to the log-probs of its response tokens, without gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceKey:
    """Everything a reference log-prob depends on besides the tokens themselves."""

    weights: str
    """Fingerprint of the reference's weights, adapter included unless it does nothing yet."""
    precision: str
    """Type of computation."""
    path: str
    """``shared`` or ``separate``, and the attention implementation."""

    def folder(self, table: TokenTable, leg: str) -> Path:
        """Where one leg's log-probs of one dataset are stored."""
        key = digest(FORMAT, self.weights, self.precision, self.path)
        return cache_dir() / "reference" / key / f"{leg}-{table.leg_fingerprint(leg)}"


class StoredLogps:
    """One leg's log-probs on disk, in parts that appear whole or not at all, so that an interrupted pass goes on."""

    def __init__(self, folder: Path, responses: Ragged) -> None:
        self.folder = folder
        self.offsets = np.asarray(responses.offsets)
        self.values = np.zeros(int(self.offsets[-1]), dtype=np.float32)
        self.done = np.zeros(len(responses), dtype=bool)
        for part in sorted(folder.glob("part-*.npz")):
            self._read(part)

    def _read(self, part: Path) -> None:
        try:
            with part.open("rb") as file, np.load(file) as stored:
                rows, values = stored["rows"], stored["values"]
            if len(values) != np.diff(self.offsets)[rows].sum() or not np.isfinite(values).all():
                raise ValueError("does not fit the rows")
        except PermissionError as error:
            raise RunError(f"can't read {part}: {error.strerror}; set ALIGN_CACHE to a folder of your own") from None
        except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile):
            part.unlink(missing_ok=True)  # a damaged part is computed again
            return
        self.put(rows, values)

    def put(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Takes the log-probs of some rows, one after the other."""
        at = 0
        for row in rows.tolist():
            start, end = int(self.offsets[row]), int(self.offsets[row + 1])
            self.values[start:end] = values[at : at + end - start]
            at += end - start
            self.done[row] = True

    def write(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Stores one part on disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".part-", suffix=".npz", delete=False) as file:
            try:
                np.savez(file, rows=rows, values=values)
            except OSError:
                Path(file.name).unlink()  # a full disk should not be filled further
                raise
        Path(file.name).chmod(0o644)  # temporary files are private, and a cache may be shared
        name = f"part-{int(rows.min()) if len(rows) else 0:09d}-{digest(rows.tobytes())[:16]}.npz"
        Path(file.name).rename(self.folder / name)

    def ragged(self) -> Ragged:
        """Log-probs by row."""
        return Ragged(self.values, self.offsets)


def find_cached(key: ReferenceKey, table: TokenTable) -> dict[str, StoredLogps]:
    """What the cache holds of this table, leg by leg."""
    return {leg: StoredLogps(key.folder(table, leg), responses) for leg, responses in table.legs.items()}


def fill_cache(
    stored: Mapping[str, StoredLogps],
    batches: PlannedBatches,
    scorer: Scorer,
    gather: Callable[[object], list[object]],
    progress: Callable[[int, int], None] = lambda done, total: None,
    bins_per_part: int = 64,
) -> None:
    """Computes what the cache lacks; every rank does its share and ends with everything.

    Args:
        stored: as ``find_cached`` gave it; complete afterwards.
        batches: knows the table, how rows are laid out, and which rank this is.
        scorer: the reference.
        gather: collects one object from every rank, in order of rank; the same number of calls on every rank.
        progress: told how many rows are done, of how many.
        bins_per_part: bins each rank computes between two writes.
    """
    plan = batches.plan
    missing = ~np.logical_and.reduce([leg.done for leg in stored.values()])
    rows = np.flatnonzero(missing)
    rows = rows[np.argsort(plan.lengths[rows], kind="stable")]
    if not len(rows):
        return
    ends = plan.layout.bins_under(plan.lengths[rows], plan.token_budget)
    bins = [rows[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    bins += [rows[:0]] * (-len(bins) % plan.world)  # every rank runs the same number of forward passes
    mine = bins[batches.rank :: plan.world]
    done = 0
    for start in range(0, len(mine), bins_per_part):
        computed = [_score_bin(batches, scorer, part) for part in mine[start : start + bins_per_part]]
        for leg in stored:
            gathered = gather([(part, values[leg]) for part, values in computed if len(part)])
            parts = [entry for rank in gathered for entry in rank]  # type: ignore[union-attr]
            part_rows = np.concatenate([part for part, _ in parts])
            values = np.concatenate([value for _, value in parts])
            stored[leg].put(part_rows, values)
            if batches.rank == 0:
                stored[leg].write(part_rows, values)
        done = int(sum(len(part) for part in bins[: (start + bins_per_part) * plan.world]))
        progress(done, len(rows))


def _score_bin(batches: PlannedBatches, scorer: Scorer, rows: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    batch = batches.pack(rows)
    flat = scorer(batch).float().cpu()
    values = {leg: flat[place.slot[place.mask]].numpy() for leg, place in batch.legs.items()}
    return rows, values


def verify_cached(
    stored: Mapping[str, StoredLogps], batches: PlannedBatches, scorer: Scorer, tolerance: float, rows: int = 4
) -> None:
    """Recomputes a few rows and compares.

    Raises:
        RunError: the cache and the reference disagree by more than ``tolerance`` nats in a token.
    """
    chosen = np.unique(np.linspace(0, len(batches.table) - 1, rows).astype(np.int64))
    for row in chosen:
        _, values = _score_bin(batches, scorer, np.array([row]))
        for leg, fresh in values.items():
            worst = float(np.abs(fresh - stored[leg].ragged()[int(row)]).max(initial=0.0))
            if not worst <= tolerance:
                raise RunError(
                    f"cached reference log-probs of {leg!r} differ from the reference by {worst:.2g} nats in a token; "
                    f"delete {stored[leg].folder} to have them computed again"
                )


def plan_for_scoring(plan: Plan) -> Plan:
    """The same layout and budget, all rows in one step, in order: for evaluation and reference passes."""
    return Plan(
        lengths=plan.lengths,
        rows_per_step=max(len(plan.lengths), 1),
        token_budget=plan.token_budget,
        epochs=1,
        world=plan.world,
        layout=plan.layout,
        seed=plan.seed,
        shuffle=False,
    )


@contextlib.contextmanager
def adapter_off(model: torch.nn.Module):
    """The model as it is without its adapter."""
    with model.disable_adapter():  # type: ignore[operator]
        yield
