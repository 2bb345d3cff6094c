"""The planned microbatches of one rank, as a torch dataset."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch.utils.data import DataLoader, Dataset

from data.pack import NOTHING, Known, PackedBatch, PerToken, pack
from data.plan import Layout, Plan
from data.store import Ragged, TokenTable
from objectives import Weighting
from objectives.output import Counts


class PlannedBatches(Dataset[PackedBatch]):
    """Item ``step · G + g`` is microbatch g of that step of the current epoch, for one rank.

    Every rank reads only its own bins; the counts of the whole step come from the plan, not from communication.
    """

    def __init__(self, table: TokenTable, plan: Plan, *, rank: int, share: bool) -> None:
        self.table, self.plan, self.rank, self.share = table, plan, rank, share
        self.known: Known = NOTHING
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Chooses which epoch's order the items come in."""
        self._steps = self.plan.epoch(epoch)

    def __len__(self) -> int:
        return self.plan.steps_per_epoch * self.plan.microbatches

    def __getitem__(self, item: int) -> PackedBatch:
        step, microbatch = divmod(item, self.plan.microbatches)
        bins = self._steps[step]
        rows = np.concatenate([rows for ranks in bins for rows in ranks])
        return self.pack(bins[microbatch][self.rank], counts=self.counts(rows))

    def pack(self, rows: np.ndarray | Sequence[int], counts: Counts | None = None) -> PackedBatch:
        """Lays any rows out as this loader does; counts default to those rows' own."""
        layout = self.plan.layout if self.share else Layout(kind="bucket")
        counts = counts if counts is not None else self.counts(np.asarray(rows))
        return pack(
            self.table,
            rows,
            share=self.share,
            kind=layout.kind,
            counts=counts,
            known=self.known,
            multiple=layout.multiple,
        )

    def counts(self, rows: np.ndarray) -> Counts:
        """What a step made of these rows holds."""
        return step_counts(self.table, rows, self.known)

    def loader(self, workers: int = 0) -> DataLoader[PackedBatch]:
        """One microbatch at a time, in order."""
        return DataLoader(self, batch_size=1, collate_fn=lambda items: items[0], num_workers=workers)


def step_counts(table: TokenTable, rows: np.ndarray, known: Known = NOTHING) -> Counts:
    """What a step made of these rows holds, by unit.

    Args:
        table: token ids.
        rows: row numbers.
        known: which tokens likelihood terms learn from, and how many number tokens rows have.
    """
    chosen, kept = np.asarray(rows, dtype=np.int64), known.kept
    tokens = {}
    for name, leg in table.legs.items():
        if kept is not None and name in kept:
            tokens[f"{name}.token"] = float(sum(int(kept[name][int(row)].sum()) for row in chosen))
        else:
            tokens[f"{name}.token"] = float(leg.lengths()[chosen].sum())
    numbers = {f"{name}.number": float(counts[chosen].sum()) for name, counts in (known.numbers or {}).items()}
    return {"row": float(len(chosen)), **tokens, **numbers}


def number_counts(table: TokenTable, values: np.ndarray) -> dict[str, np.ndarray]:
    """How many tokens of each response are numbers, by leg.

    Args:
        table: token ids.
        values: by token id, the value of a number token, else NaN.
    """
    counts: dict[str, np.ndarray] = {}
    for name, leg in table.legs.items():
        running = np.concatenate([[0], np.isfinite(values[leg.values]).cumsum()])
        counts[name] = running[leg.offsets[1:]] - running[leg.offsets[:-1]]
    return counts


def kept_tokens(table: TokenTable, weighting: Weighting) -> PerToken | None:
    """Which response tokens the masks of a weighting keep, for the legs on which one acts; None where none does."""
    kept: dict[str, Ragged] = {}
    for name in weighting.masked_legs():
        responses = table.legs[name]
        values = np.empty(int(responses.offsets[-1]), dtype=np.uint8)
        for row in range(len(table)):
            prompt, response = table.prompts[row], responses[row]
            keep = weighting.keep(name, np.concatenate([prompt, response]), len(prompt))
            assert keep is not None
            values[responses.offsets[row] : responses.offsets[row + 1]] = keep
        kept[name] = Ragged(values, np.asarray(responses.offsets))
    return kept or None
