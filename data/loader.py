"""The planned microbatches of one rank, as a torch dataset."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch.utils.data import DataLoader, Dataset

from data.pack import PackedBatch, References, pack
from data.plan import Plan
from data.store import TokenTable
from objectives.output import Counts


class PlannedBatches(Dataset[PackedBatch]):
    """Item ``step · G + g`` is microbatch g of that step of the current epoch, for one rank.

    Every rank reads only its own bins; the counts of the whole step come from the plan, not from communication.
    """

    def __init__(self, table: TokenTable, plan: Plan, *, rank: int, share: bool) -> None:
        self.table, self.plan, self.rank, self.share = table, plan, rank, share
        self.references: References | None = None
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
        return self.pack(bins[microbatch][self.rank], counts=step_counts(self.table, rows))

    def pack(self, rows: np.ndarray | Sequence[int], counts: Counts | None = None) -> PackedBatch:
        """Lays any rows out as this loader does; counts default to those rows' own."""
        kind = self.plan.layout.kind if self.share else "bucket"
        counts = counts if counts is not None else step_counts(self.table, np.asarray(rows))
        return pack(self.table, rows, share=self.share, kind=kind, counts=counts, references=self.references)

    def loader(self, workers: int = 0) -> DataLoader[PackedBatch]:
        """One microbatch at a time, in order."""
        return DataLoader(self, batch_size=1, collate_fn=lambda items: items[0], num_workers=workers)


def step_counts(table: TokenTable, rows: np.ndarray) -> Counts:
    """What a step made of these rows holds, by unit."""
    chosen = np.asarray(rows, dtype=np.int64)
    tokens = {f"{name}.token": float(leg.lengths()[chosen].sum()) for name, leg in table.legs.items()}
    return {"row": float(len(chosen)), **tokens}
