"""Log-probs under the frozen reference: one interface, three sources, invisible to objectives.

    cached       computed once before the first step and stored, so that no second model is ever loaded for the initial
                 policy; on resume it is read, never recomputed from a policy that has moved
    adapter_off  the policy itself with its adapter switched off, in every step
    live         a second, frozen model, in every step

The cache is content-addressed: a log-prob's key holds what it depends on (weights, adapter, precision, path, and the
tokens of prompt and response, which tokenizer, template and truncation decide) and nothing else. A sweep over learning
rates, objectives or subsets of the data reads it, and a changed model never does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.checks import Tolerance
from align.errors import RunError
from align.logps_store import LogpsStore, StoredLogps
from data.loader import PlannedBatches
from data.pack import PackedBatch
from data.plan import Plan
from data.store import TokenTable, cache_dir, digest

FORMAT = 2
ROWS_PER_MESSAGE = 2**14
"""Rows whose log-probs one process sends another at a time: some megabytes."""
Scorer = Callable[[PackedBatch], Tensor]
"""Maps a batch to the log-probs of its response tokens, without gradient."""
Gather = Callable[[object], list[Any]]
"""Collects one object from every rank, in order of rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceKey:
    """Everything a reference log-prob depends on besides the tokens themselves."""

    weights: str
    """Fingerprint of the reference's weights, adapter included unless it does nothing yet."""
    precision: str
    """Type of computation."""
    path: str
    """``shared`` or ``separate``, and the attention implementation."""

    @property
    def folder(self) -> Path:
        """Where this reference's log-probs are stored."""
        return cache_dir() / "reference" / digest(FORMAT, self.weights, self.precision, self.path)


def find_cached(key: ReferenceKey, table: TokenTable) -> dict[str, StoredLogps]:
    """What the cache holds of this table, leg by leg."""
    stored = {leg: StoredLogps.of(table, leg) for leg in table.legs}
    LogpsStore(key.folder).fill(stored.values())
    return stored


def find_cached_anywhere(
    key: ReferenceKey, tables: Sequence[TokenTable], rank: int, gather: Gather
) -> list[dict[str, StoredLogps]]:
    """What the cache of any rank holds of these tables, known to every rank afterwards.

    Each machine may have a cache of its own, and a damaged part may be seen by one rank only. What is done next, by all
    ranks together, follows from what was found; so they have to have found the same.

    Raises:
        RunError: on every rank, where one of them may not read its cache.
    """
    try:
        found = [find_cached(key, table) for table in tables]
    except RunError as error:
        gather(error)
        raise
    stored = [leg for legs in found for leg in legs.values()]
    held = gather([np.packbits(leg.done) for leg in stored])
    for said in held:
        if isinstance(said, RunError):
            raise said
    for number, leg in enumerate(stored):
        done = np.array([np.unpackbits(said[number], count=len(leg.done)) for said in held], dtype=bool)
        _share(leg, done, rank, gather)
    return found


def _share(leg: StoredLogps, done: np.ndarray, rank: int, gather: Gather) -> None:
    """Sends what some ranks know and others don't: no message where all read one cache."""
    rows, sender = np.flatnonzero(done.any(axis=0) & ~done.all(axis=0)), done.argmax(axis=0)
    for start in range(0, len(rows), ROWS_PER_MESSAGE):
        part = rows[start : start + ROWS_PER_MESSAGE]
        mine = part[sender[part] == rank]
        for sent_rows, values in gather((mine, leg.of_rows(mine))):
            leg.put(sent_rows, values)


def fill_cache(
    key: ReferenceKey,
    stored: Mapping[str, StoredLogps],
    batches: PlannedBatches,
    scorer: Scorer,
    gather: Gather,
    progress: Callable[[int, int], None] = lambda done, total: None,
    bins_per_part: int = 64,
) -> None:
    """Computes what the cache lacks; every rank does its share and ends with everything.

    Args:
        key: of the cache.
        stored: as ``find_cached`` gave it; complete afterwards.
        batches: knows the table, how rows are laid out, and which rank this is.
        scorer: the reference.
        gather: called the same number of times on every rank.
        progress: told how many rows are done, of how many.
        bins_per_part: bins each rank computes between two writes.
    """
    plan = batches.plan
    missing = ~np.logical_and.reduce([leg.done for leg in stored.values()])
    same = _first_of_the_same(stored)
    rows = np.unique(same[missing])  # a row that is there twice is computed once
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
            parts = [entry for rank in gathered for entry in rank]
            part_rows = np.concatenate([part for part, _ in parts])
            values = np.concatenate([value for _, value in parts])
            stored[leg].put(part_rows, values)
            if batches.rank == 0:
                own = stored[leg]
                LogpsStore(key.folder).write(own.keys[part_rows], own.lengths(part_rows), values)
        done = int(sum(len(part) for part in bins[: (start + bins_per_part) * plan.world]))
        progress(done, len(rows))
    again = np.flatnonzero(missing & (same != np.arange(len(same))))
    for leg in stored.values():
        leg.put(again, leg.of_rows(same[again]))


def _first_of_the_same(stored: Mapping[str, StoredLogps]) -> np.ndarray:
    """For each row the first one with the same prompt and responses."""
    keys = np.ascontiguousarray(np.concatenate([leg.keys for leg in stored.values()], axis=1))
    whole = keys.view(np.dtype((np.void, keys.itemsize * keys.shape[1])))[:, 0]
    _, first, of_row = np.unique(whole, return_index=True, return_inverse=True)
    return first[of_row]


def _score_bin(batches: PlannedBatches, scorer: Scorer, rows: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    batch = batches.pack(rows)
    flat = scorer(batch).float().cpu()
    values = {leg: flat[place.slot[place.mask]].numpy() for leg, place in batch.legs.items()}
    return rows, values


def verify_cached(
    folder: Path,
    stored: Mapping[str, StoredLogps],
    batches: PlannedBatches,
    scorer: Scorer,
    tolerance: Tolerance,
    rows: int = 4,
) -> None:
    """Recomputes a few of the rows that were found, if any were, and compares.

    Raises:
        RunError: the cache and the reference disagree, in a token or on average.
    """
    found = np.flatnonzero(np.logical_or.reduce([leg.done for leg in stored.values()]))
    differences = []
    for row in found[np.unique(np.linspace(0, len(found) - 1, min(rows, len(found))).astype(np.int64))]:
        _, values = _score_bin(batches, scorer, np.array([row]))
        known = {name: leg for name, leg in stored.items() if leg.done[row]}
        differences += [np.abs(values[name] - leg.ragged()[int(row)]) for name, leg in known.items()]
    if not differences:
        return
    together = np.concatenate(differences)
    worst, mean = float(together.max()), float(together.mean())
    # One token may be as far off as a token may be, which shows in the mean of a few.
    allowed = tolerance.mean + tolerance.token / len(together)
    if not (worst <= tolerance.token and mean <= allowed):
        raise RunError(
            f"cached reference log-probs differ from the reference by {worst:.2g} nats in a token (at most "
            f"{tolerance.token:.2g} is rounding) and by {mean:.2g} on average (at most {allowed:.2g}); delete {folder} "
            "to have them computed again"
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
