"""Rows scored by a model that is not being trained: one pass, prompts shared, sums only.

    scorer = RowScorer(section, model, table, …)
    found = scorer(of_states=…)      # {"sum/chosen": (row,), "length/chosen": (row,), …}

What is wanted of hidden states, or of the log-probs of single tokens, is reduced to numbers per row while its batch is
there: none of them are kept, whatever the number of rows.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from align.assemble import BLOCK, token_budget
from align.forward import causal_lm, dense
from align.model import PACKING
from align.paths import choose_path
from align.sections import ModelSection
from data.loader import PlannedBatches
from data.pack import PackedBatch
from data.plan import Layout, Plan
from data.store import TokenTable

OfStates = Callable[[Tensor, PackedBatch], Mapping[str, Tensor]]
"""Maps the states that predict a batch's response tokens, (response, hidden), to numbers per row."""
OfLogps = Callable[[str, Tensor, Tensor], Mapping[str, Tensor]]
"""Maps a leg's name, its tokens' log-probs, (row, token), nats, and the mask of tokens to numbers per row."""
Progress = Callable[[int, int], None]
"""Told how many rows are done, of how many."""
EVERY = 10.0
"""Seconds between two lines about progress, at least."""


def telling(say: Callable[[str], None], who: str, what: str = "pairs") -> Progress:
    """Progress as lines for people.

    Args:
        say: prints one.
        who: scores.
        what: the rows are called.
    """
    began = told = time.perf_counter()

    def progress(done: int, total: int) -> None:
        nonlocal told
        now = time.perf_counter()
        if now - told > EVERY or done == total:
            told = now
            say(f"{who}: {done} of {total} {what}, {done / (now - began):.1f} {what}/s")

    return progress


class RowScorer:
    """Scores the rows of a table under a model.

    Args:
        section: of the model; says which attention.
        model: bound (see ``align.forward.bind``), on its device, in the type it computes in.
        table: rows to score.
        dtype: of the computation.
        budget: positions of a batch, or auto.
    Raises:
        RunError: the model can't score a row.
    """

    def __init__(
        self,
        section: ModelSection,
        model: nn.Module,
        table: TokenTable,
        dtype: torch.dtype,
        budget: int | str = "auto",
    ) -> None:
        self.model, self.table, self.dtype = model.eval(), table, dtype
        self.device = next(model.parameters()).device
        self.share, self.check = choose_path(section, model, table, dtype, self.device)
        way = causal_lm(model).config.get_text_config()._attn_implementation
        lengths = table.shared_lengths() if self.share else table.separate_lengths()
        positions = max(token_budget(budget, lengths), int(lengths.max()))
        layout = Layout(
            kind="pack" if self.share and way in PACKING else "bucket",
            multiple=BLOCK if self.share and way == "flex_attention" else 1,
        )
        self.plan = Plan(
            lengths=lengths,
            rows_per_step=len(lengths),
            token_budget=positions,
            epochs=1,
            world=1,
            layout=layout,
            seed=0,
            shuffle=False,
        )
        self.batches = PlannedBatches(table, self.plan, rank=0, share=self.share)

    def __call__(
        self,
        of_states: OfStates | None = None,
        progress: Progress = lambda done, total: None,
        of_logps: OfLogps | None = None,
    ) -> dict[str, np.ndarray]:
        """Numbers of every row, in the table's order.

        Args:
            of_states: what else is wanted, from hidden states.
            progress: told after every batch.
            of_logps: what else is wanted, from log-probs of single tokens; called for each leg. Not of reward models.
        Returns:
            ``sum/<leg>``: log-probs summed over the response, nats, float64; ``length/<leg>``: its tokens; of reward
            models ``value/<leg>/<output number>`` instead of sums; and what ``of_states`` and ``of_logps`` give.
        """
        found: dict[str, np.ndarray] = {}
        done, total = 0, len(self.table)
        # The longest batch first: memory fails at the start or never.
        for rows in reversed(self.bins()):
            batch = self.batches.pack(rows).to(self.device)
            for name, values in self._of_batch(batch, of_states, of_logps).items():
                if name not in found:
                    found[name] = np.full(total, np.nan)
                found[name][rows] = values.double().cpu().numpy()
            done += len(rows)
            progress(done, total)
        return found

    def bins(self) -> list[np.ndarray]:
        """Rows that are computed together, short ones first."""
        order = np.argsort(self.plan.lengths, kind="stable")
        ends = self.plan.layout.bins_under(self.plan.lengths[order], self.plan.token_budget)
        return [order[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def _of_batch(self, batch: PackedBatch, of_states: OfStates | None, of_logps: OfLogps | None) -> dict[str, Tensor]:
        low = self.dtype != torch.float32 and self.device.type != "cpu"
        casting = torch.autocast(self.device.type, self.dtype) if low else contextlib.nullcontext()
        with torch.inference_mode(), casting:
            options = {"keep_states": True} if of_states is not None else {}
            scores = self.model(packed=batch, **options)
        found: dict[str, Tensor] = {}
        rows = len(batch.rows)
        for number, (leg, place) in enumerate(batch.legs.items()):
            found[f"length/{leg}"] = place.mask.sum(dim=1)
            if "values" in scores:
                of_leg = scores["values"][number * rows : (number + 1) * rows]
                found |= {f"value/{leg}/{output}": of_leg[:, output] for output in range(of_leg.shape[1])}
            else:
                logps = dense(scores["logps"], batch, leg).double()
                found[f"sum/{leg}"] = logps.sum(dim=1)
                if of_logps is not None:
                    found |= of_logps(leg, logps, place.mask)
        if of_states is not None:
            found |= of_states(scores["states"], batch)
        return found
