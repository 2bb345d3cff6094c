"""Any split of the same global batch gives the same gradient: microbatches, token budgets, ranks, layouts.

TRL's likelihood term fails this: it is a mean over the tokens of each microbatch, so it changes with the split.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from align.forward import dense
from data.loader import PlannedBatches
from data.pack import Known
from data.plan import Layout, Plan
from objectives import OBJECTIVES, Leg, LegBatch, mixture
from tests.align.tiny import CONFIGS, float64_throughout, model_of, random_table

FLOAT64 = {"rtol": 1e-10, "atol": 1e-10}
ROWS = 13
MIXTURES = {
    "dpo": [("dpo", OBJECTIVES["dpo"](), 1.0)],
    "sft": [("sft", OBJECTIVES["sft"](leg="chosen"), 1.0)],
    "dpo+sft": [("dpo", OBJECTIVES["dpo"](beta=0.5), 1.0), ("sft", OBJECTIVES["sft"](leg="chosen"), 0.7)],
}


def step_gradient(model, table, objective, *, budget, world, kind, share=True):
    """Gradient of one optimizer step over all rows, computed bin by bin, rank by rank."""
    lengths = table.shared_lengths() if share else table.separate_lengths()
    plan = Plan(
        lengths=lengths,
        rows_per_step=ROWS,
        token_budget=budget,
        epochs=1,
        world=world,
        layout=Layout(kind=kind),
        seed=1,
    )
    model.zero_grad()
    loss, bins = 0.0, 0
    for rank in range(world):
        batches = PlannedBatches(table, plan, rank=rank, share=share)
        batches.known = Known(references={name: _references(leg) for name, leg in table.legs.items()})
        for number in range(len(batches)):
            batch = batches[number]
            flat = model(packed=batch)["logps"]
            legs = {
                name: Leg(logps=dense(flat, batch, name), mask=p.mask, tokens=p.tokens, ref_logps=p.ref_logps.double())
                for name, p in batch.legs.items()
            }
            share_of_loss = objective(LegBatch(legs=legs)).loss(batch.counts) + 0.0 * flat.sum()
            share_of_loss.backward()
            loss, bins = loss + share_of_loss.item(), bins + bool(len(batch.rows))
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    return loss, gradient, bins


def _references(leg):
    from data.store import Ragged

    values = -np.abs(np.random.default_rng(7).normal(3, 1, len(leg.values))).astype(np.float32)
    return Ragged(values, np.asarray(leg.offsets))


@pytest.mark.parametrize("name", MIXTURES)
def test_no_split_changes_the_gradient(name):
    table = random_table(rows=ROWS, seed=5)
    objective = mixture(MIXTURES[name])
    with float64_throughout():
        model = model_of(CONFIGS["llama"]())
        loss, gradient, bins = step_gradient(model, table, objective, budget=10_000, world=1, kind="bucket")
        assert bins == 1
        seen = set()
        splits = [(60, 1, "bucket"), (60, 1, "pack"), (100, 2, "bucket"), (200, 3, "pack"), (50, 4, "bucket")]
        for budget, world, kind in splits:
            split = step_gradient(model, table, objective, budget=budget, world=world, kind=kind)
            torch.testing.assert_close(split[0], loss, **FLOAT64)
            torch.testing.assert_close(split[1], gradient, **FLOAT64)
            seen.add(split[2])
        assert len(seen) >= 3  # the splits were different ones
        apart = step_gradient(model, table, objective, budget=300, world=2, kind="bucket", share=False)
        torch.testing.assert_close(apart[1], gradient, rtol=1e-9, atol=1e-9)


def test_more_ranks_than_rows_leave_empty_bins_that_add_nothing():
    table = random_table(rows=ROWS, seed=5)
    objective = mixture(MIXTURES["dpo+sft"])
    with float64_throughout():
        model = model_of(CONFIGS["llama"]())
        _, gradient, _ = step_gradient(model, table, objective, budget=10_000, world=1, kind="bucket")
        _, many, bins = step_gradient(model, table, objective, budget=10_000, world=16, kind="bucket")
    assert bins <= ROWS < 16
    torch.testing.assert_close(many, gradient, **FLOAT64)


def test_a_mean_over_each_microbatch_would_fail_here():
    """The mistake that this file guards against, made on purpose: its gradient depends on the split."""
    table = random_table(rows=ROWS, seed=5)
    likelihood = mixture(MIXTURES["sft"])

    def mean_of_means(budget):
        plan = Plan(
            lengths=table.shared_lengths(),
            rows_per_step=ROWS,
            token_budget=budget,
            epochs=1,
            world=1,
            layout=Layout(kind="bucket"),
            seed=1,
        )
        batches = PlannedBatches(table, plan, rank=0, share=True)
        model.zero_grad()
        for number in range(len(batches)):
            batch = batches[number]
            flat = model(packed=batch)["logps"]
            place = batch.legs["chosen"]
            legs = LegBatch(
                legs={"chosen": Leg(logps=dense(flat, batch, "chosen"), mask=place.mask, tokens=place.tokens)}
            )
            (likelihood(legs).loss(legs.counts()) / len(batches)).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    with float64_throughout():
        model = model_of(CONFIGS["llama"]())
        whole, split = mean_of_means(10_000), mean_of_means(80)
    assert float((whole - split).abs().max()) > 1e-3
