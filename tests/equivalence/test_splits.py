"""Any split of the same global batch gives the same gradient: microbatches, token budgets, ranks, layouts.

TRL's likelihood term fails this: it is a mean over the tokens of each microbatch, so it changes with the split.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from align.forward import dense
from data.loader import PlannedBatches, kept_tokens
from data.pack import Known
from data.plan import Layout, Plan
from data.store import Ragged
from objectives import OBJECTIVES, TOKEN_WEIGHTS, Leg, LegBatch, mixture, weighting
from tests.align.tiny import CONFIGS, float64_throughout, model_of, random_table

FLOAT64 = {"rtol": 1e-10, "atol": 1e-10}
ROWS = 13
PAIR = ("chosen", "rejected")
TRIPLE = (*PAIR, "gold")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is minimised over which legs, and what is known by then."""

    parts: dict[str, tuple[object, float]]
    """Objective and weight by name."""
    legs: tuple[str, ...] = PAIR
    weights: dict[str, object] = field(default_factory=dict)
    """Token weights by name."""
    state: dict[str, float] = field(default_factory=dict)
    """Of objectives; those of the first step where empty."""
    tau: float | None = None
    """Of adaptive weights, nats."""


def one(name, **keys):
    return {name: (OBJECTIVES[name](**keys), 1.0)}


def sft(leg="gold", **weights):
    return Case(parts=one("sft", leg=leg), legs=(leg,), weights={n: TOKEN_WEIGHTS[n](**k) for n, k in weights.items()})


BCO_STATE = {"bco/reward_total": -7.0, "bco/reward_count": 5.0}
CASES = {
    "dpo": Case(parts=one("dpo")),
    "sft": sft("chosen"),
    "dpo+sft": Case(parts={**one("dpo", beta=0.5), "sft": (OBJECTIVES["sft"](leg="chosen"), 0.7)}),
    "tpo": Case(parts=one("tpo", beta=0.1), legs=TRIPLE),
    "tpo-ipo": Case(parts=one("tpo", beta=0.5, link="ipo"), legs=TRIPLE),
    "tpo-pair": Case(parts=one("tpo", alpha=0.0)),
    "tpo_l": Case(parts=one("tpo_l", alpha=0.7), legs=TRIPLE),
    "bco": Case(parts=one("bco"), legs=("completion",), state=BCO_STATE),
    "bco-density": Case(parts=one("bco", prompt_encoder="policy"), legs=("completion",), state=BCO_STATE),
    "kto": Case(parts=one("kto", desirable_weight=1.5), legs=("completion", "mismatched"), state={"kto/kl": 0.8}),
    "rpo-cumulative": Case(parts=one("rpo", eta=0.5)),
    "rpo-average": Case(parts=one("rpo", form="average", eta=0.5)),
    "irpo-token": Case(parts=one("irpo")),
    "irpo-sequence": Case(parts=one("irpo", form="sequence")),
    "goldfish": sft(goldfish={"k": 2, "h": 3}),
    "talr": replace(sft(talr={}), tau=1.7),
    "talr-first-step": sft(talr={}),
    "flow": replace(sft(flow={}), tau=2.5),
    "goldfish+talr+flow": replace(sft(goldfish={"k": 3, "strategy": "static"}, talr={}, flow={}), tau=2.0),
    "rpo-average+goldfish": Case(
        parts=one("rpo", form="average", eta=0.5), weights={"goldfish": TOKEN_WEIGHTS["goldfish"](k=2, h=3)}
    ),
    "list": Case(
        parts={"tpo": (OBJECTIVES["tpo"](), 0.3), "irpo": (OBJECTIVES["irpo"](alpha=0.2), 1.7)},
        legs=TRIPLE,
        weights={"goldfish": TOKEN_WEIGHTS["goldfish"](k=4, h=2, legs=("gold",))},
    ),
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one optimizer step comes to."""

    loss: float
    gradient: torch.Tensor
    bins: int
    """Microbatches with rows, over all ranks."""
    state: dict[str, torch.Tensor]
    """Of objectives and weights, for the step after."""


def table_of(case, seed=5):
    table = random_table(case.legs, rows=ROWS, seed=seed)
    labels = np.random.default_rng(3).random(ROWS) < 0.6
    return replace(table, labels=labels) if "completion" in case.legs else table


def minimised(case):
    """The case's objective and weighting."""
    objective = mixture([(name, built, weight) for name, (built, weight) in case.parts.items()])
    return objective, weighting(list(case.weights.items()), objective.needs.likelihood)


def step_of(model, table, case, *, budget, world, kind, share=True, whole_step=False):
    """One optimizer step over all rows, computed bin by bin, rank by rank."""
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
    objective, weights = minimised(case)
    state = {key: torch.tensor(value, dtype=torch.float64) for key, value in case.state.items()}
    state = objective.init_state() | state
    tau = weights.init_state() | weights.fit({leg: torch.ones(1) for leg in case.legs})
    tau = tau if case.tau is None else {key: torch.tensor(case.tau, dtype=torch.float64) for key in tau}
    known = Known(
        references={name: _references(leg) for name, leg in table.legs.items()},
        kept=kept_tokens(table, weights),
        density_ratio=np.exp(np.random.default_rng(9).normal(0, 2, ROWS)).astype(np.float32),
    )
    model.zero_grad()
    loss, bins, observed, losses = 0.0, 0, {}, {}
    for rank in range(world):
        batches = PlannedBatches(table, plan, rank=rank, share=share)
        batches.known = known
        for number in range(len(batches)):
            batch = batches[number]
            flat = model(packed=batch)["logps"]
            legs, _ = weights.apply(_legs(batch, flat, state), tau, whole_step=whole_step)
            share_of_loss = objective(legs).loss(batch.counts) + 0.0 * flat.sum()
            share_of_loss.backward()
            loss, bins = loss + share_of_loss.item(), bins + bool(len(batch.rows))
            for name, value in objective.observe(legs).items():
                observed[name] = observed.get(name, 0.0) + value
            for name, values in weights.observe(legs).items():
                losses.setdefault(name, []).append(values)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    after = objective.update(state, observed) | weights.update(tau, {k: torch.cat(v) for k, v in losses.items()})
    return Step(loss=loss, gradient=gradient, bins=bins, state=after)


def _legs(batch, flat, state):
    legs = {
        name: Leg(
            logps=dense(flat, batch, name),
            mask=place.mask,
            tokens=place.tokens,
            ref_logps=place.ref_logps.double(),
            weight=None if place.weight is None else place.weight.double(),
        )
        for name, place in batch.legs.items()
    }
    return LegBatch(legs=legs, labels=batch.labels, density_ratio=batch.density_ratio.double(), state=state)


def _references(leg):
    values = -np.abs(np.random.default_rng(7).normal(3, 1, len(leg.values))).astype(np.float32)
    return Ragged(values, np.asarray(leg.offsets))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_no_split_changes_the_step(name):
    """Neither its loss, nor its gradient, nor the state that it leaves."""
    case = CASES[name]
    table = table_of(case)
    with float64_throughout():
        model = model_of(CONFIGS["llama"]())
        whole = step_of(model, table, case, budget=10_000, world=1, kind="bucket")
        assert whole.bins == 1
        assert float(whole.gradient.abs().max()) > 1e-6
        seen = set()
        longest = int(table.shared_lengths().max())
        splits = [(60, 1, "bucket"), (60, 1, "pack"), (100, 2, "bucket"), (200, 3, "pack"), (50, 4, "bucket")]
        for budget, world, kind in splits:
            split = step_of(model, table, case, budget=max(budget, longest), world=world, kind=kind)
            same_step(split, whole)
            seen.add(split.bins)
        assert len(seen) >= 3  # the splits were different ones
        apart = step_of(model, table, case, budget=300, world=2, kind="bucket", share=False)
        torch.testing.assert_close(apart.gradient, whole.gradient, rtol=1e-9, atol=1e-9)


def same_step(found, wanted):
    torch.testing.assert_close(found.loss, wanted.loss, **FLOAT64)
    torch.testing.assert_close(found.gradient, wanted.gradient, **FLOAT64)
    assert found.state.keys() == wanted.state.keys()
    for key, value in wanted.state.items():
        torch.testing.assert_close(found.state[key], value, **FLOAT64, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", ["bco", "bco-density", "kto", "talr"])
def test_state_matters_here(name):
    """The cases above would be no test if what is remembered changed nothing."""
    case = CASES[name]
    table = table_of(case)
    with float64_throughout():
        model = model_of(CONFIGS["llama"]())
        kept = step_of(model, table, case, budget=10_000, world=1, kind="bucket")
        fresh = step_of(model, table, replace(case, state={}, tau=None), budget=10_000, world=1, kind="bucket")
    assert float((kept.gradient - fresh.gradient).abs().max()) > 1e-4


def test_talr_of_a_whole_step_takes_that_step_s_median():
    """A step that is one microbatch equals the split one whose τ, from the step before, happens to be its median."""
    case = CASES["talr-first-step"]
    table = table_of(case)
    with float64_throughout():
        model = model_of(CONFIGS["llama"]())
        whole = step_of(model, table, case, budget=10_000, world=1, kind="bucket", whole_step=True)
        tau = float(whole.state["talr/gold"])
        split = step_of(model, table, replace(case, tau=tau), budget=100, world=2, kind="bucket")
        unweighted = step_of(model, table, case, budget=10_000, world=1, kind="bucket")
    assert 0 < tau < 100
    same_step(split, whole)
    assert unweighted.loss > whole.loss * 1.1  # without a step before there is no τ, and no weight


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo+sft", "bco-density", "kto", "goldfish+talr+flow"])
def test_more_ranks_than_rows_leave_empty_bins_that_add_nothing(name):
    case = CASES[name]
    table = table_of(case)
    with float64_throughout():
        model = model_of(CONFIGS["llama"]())
        whole = step_of(model, table, case, budget=10_000, world=1, kind="bucket")
        many = step_of(model, table, case, budget=10_000, world=16, kind="bucket")
    assert many.bins <= ROWS < 16
    same_step(many, whole)


def test_a_mean_over_each_microbatch_would_fail_here():
    """The mistake that this file guards against, made on purpose: its gradient depends on the split."""
    table = random_table(rows=ROWS, seed=5)
    likelihood, _ = minimised(CASES["sft"])

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
