"""Weightings: what several token weights do together to a batch, what they remember, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from objectives import LegBatch, Mean, Objective, TokenWeight, Weighting, mixture, weighting
from objectives.dpo import DPO
from objectives.rpo import IRPO, RPO
from objectives.sft import SFT
from objectives.token_weights import FLOW, TALR, Goldfish
from objectives.tpo import TPO
from tests.objectives.batches import (
    FP64_ROUNDING,
    SIX_PLACES,
    loss_and_grad,
    make_batch,
    make_rows,
    map_legs,
    rows_of,
)

seeds = st.integers(0, 1000)
GOLD = ("gold",)


def of(*parts: TokenWeight, likelihood: tuple[str, ...] = GOLD) -> Weighting:
    """Named after their classes, in lower case."""
    return weighting([(type(part).__name__.lower(), part) for part in parts], likelihood)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def three_rows() -> LegBatch:
    """Mean losses 0.766667, 0.525 and 1.1 under the policy, 1, 2 and 4 under the reference."""
    logps = [[-0.1, -0.2, -2.0], [-0.05, -1.0], [-3.0, -0.5, -0.7, -0.2]]
    return LegBatch(legs={"gold": make_rows(logps, [[-1.0] * 3, [-2.0] * 2, [-4.0] * 4])})


def masked(batch: LegBatch, parts: Weighting) -> LegBatch:
    """The batch as a loader would give it: masks in ``weight``, made from tokens behind a prompt of two."""

    def mask(name: str) -> Tensor:
        leg = batch[name]
        rows = []
        for tokens, length in zip(leg.tokens, leg.length().int().tolist(), strict=True):
            kept = parts.keep(name, np.concatenate([[7, 9], tokens[:length].numpy()]), 2)
            rows.append(torch.nn.functional.pad(torch.from_numpy(kept).to(leg.logps), (0, len(tokens) - length)))
        return torch.stack(rows)

    legs = {name: replace(batch[name], weight=mask(name)) for name in parts.masked_legs()}
    return replace(batch, legs={**batch.legs, **legs})


def differentiated(
    objective: Objective, parts: Weighting, batch: LegBatch, state: Mapping[str, Tensor], *, whole_step: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradient with a graph through everything, weights included."""
    batch = map_legs(batch, lambda leg: replace(leg, logps=leg.logps.detach().clone().requires_grad_()))
    weighted, _ = parts.apply(batch, state, whole_step=whole_step)
    loss = objective(weighted).loss(weighted.counts())
    slopes = torch.autograd.grad(loss, [batch[name].logps for name in batch], materialize_grads=True, allow_unused=True)
    return loss.detach(), dict(zip(batch, slopes, strict=True))


def values(metrics: Mapping[str, Mean]) -> dict[str, tuple[float, float]]:
    return {name: (metric.total.item(), metric.count) for name, metric in metrics.items()}


# What is refused.


def test_an_objective_without_a_likelihood_term_has_nothing_to_weigh():
    with pytest.raises(ValueError, match="goldfish weighs likelihood terms, and this objective has none"):
        weighting([("goldfish", Goldfish())], DPO().needs.likelihood)
    assert weighting([], DPO().needs.likelihood).parts == {}


@pytest.mark.parametrize("part", [Goldfish(legs=("rejected",)), TALR(legs=("rejected",)), FLOW(legs=("rejected",))])
def test_a_leg_without_a_likelihood_term_is_refused(part: TokenWeight):
    with pytest.raises(ValueError, match="can't act on 'rejected': only chosen, gold has a likelihood term"):
        of(part, likelihood=("chosen", "gold"))


def test_a_weight_listed_twice_is_refused():
    with pytest.raises(ValueError, match="talr is listed twice"):
        weighting([("talr", TALR()), ("talr", TALR(min_weight=0.5))], GOLD)


def test_a_leg_listed_twice_is_refused():
    """It would be weighed twice: the weight squared."""
    with pytest.raises(ValueError, match="talr lists a leg twice: gold, gold"):
        of(TALR(legs=("gold", "gold")))


# What acts where.


def test_legs_are_those_of_the_likelihood_unless_named():
    both = ("chosen", "gold")
    parts = of(Goldfish(legs=("gold",)), TALR(), likelihood=both)
    assert (parts.legs("goldfish"), parts.legs("talr")) == (("gold",), both)
    assert parts.masked_legs() == ("gold",)
    assert parts.keep("chosen", np.arange(20), 1) is None
    assert parts.keep("gold", np.arange(20), 1) is not None
    assert set(parts.init_state()) == {"talr/chosen", "talr/gold"}
    assert of(TALR(), likelihood=both).masked_legs() == ()


def test_only_flow_looks_at_the_reference():
    assert of(FLOW()).needs_reference
    assert not of(Goldfish(), TALR()).needs_reference
    assert not weighting([], GOLD).needs_reference


def test_tokens_are_kept_where_every_mask_keeps_them():
    """1, 5, 9, … dropped by one, 2, 6, 10, … by the other: of twelve tokens behind one, six are left."""
    parts = weighting([("first", Goldfish(strategy="static")), ("second", Goldfish(strategy="static", start=1))], GOLD)
    kept = parts.keep("gold", np.arange(13), 1)
    assert np.flatnonzero(kept).tolist() == [2, 3, 6, 7, 10, 11]


def test_legs_that_no_weight_acts_on_are_untouched():
    objective = TPO()
    batch = make_batch(objective, seed=1)
    parts = of(TALR(), likelihood=objective.needs.likelihood)
    applied, _ = parts.apply(batch, parts.init_state(), whole_step=True)
    assert applied["chosen"] is batch["chosen"]
    assert applied["rejected"] is batch["rejected"]
    assert applied["gold"].weight is not None
    assert batch["gold"].weight is None, "the batch it was given is not edited"
    assert torch.equal(applied["gold"].logps, batch["gold"].logps)


def test_one_of_two_legs_can_be_weighed():
    both = mixture([("sft", SFT(leg="chosen"), 1.0), ("sft", SFT(leg="gold"), 1.0)])
    batch = make_batch(both, seed=2)
    parts = of(TALR(legs=("chosen",)), likelihood=both.needs.likelihood)
    applied, _ = parts.apply(batch, {"talr/chosen": number(0.5)})
    assert applied["gold"].weight is None
    assert applied["chosen"].weight is not None


# Temperatures.


def test_the_first_step_is_unweighted():
    """τ = ∞ before the first: weights are exactly 1, and loss and gradient those without them, at any log-probs."""
    parts = of(TALR())
    assert parts.init_state() == {"talr/gold": number(math.inf)}
    for scale in (0.0, 1.0, 1e5):
        for dtype in (torch.float32, torch.float64):
            batch = make_batch(SFT(), seed=3, scale=scale, dtype=dtype)
            loss, grad = differentiated(SFT(), parts, batch, parts.init_state())
            plain_loss, plain_grad = loss_and_grad(SFT(), batch)
            assert torch.equal(loss, plain_loss)
            assert torch.equal(grad["gold"], plain_grad["gold"])
            assert grad["gold"].isfinite().all()


def test_known_numbers_of_talr():
    """A step of one microbatch takes its own median, 0.766667: 0.162520 in place of 0.861111."""
    parts = of(TALR())
    loss, grad = differentiated(SFT(), parts, three_rows(), parts.init_state(), whole_step=True)
    assert loss.item() == pytest.approx(0.162520, **SIX_PLACES)
    assert grad["gold"][0, 0].item() == pytest.approx(-0.877714 / 9, **SIX_PLACES)


def test_a_part_of_a_step_takes_the_median_of_the_step_before():
    """Whatever its own is. After the step the state is the median of all its rows, not of medians."""
    parts, batch = of(TALR()), three_rows()
    state = {"talr/gold": number(0.5)}
    loss, _ = differentiated(SFT(), parts, batch, state)
    expected = sum(math.exp(logp / 0.5) * -logp for logp in batch["gold"].logps[batch["gold"].mask].tolist())
    floor = 0.01 * 3.0 - math.exp(-3.0 / 0.5) * 3.0  # the token of 3 nats would weigh e⁻⁶
    assert loss.item() == pytest.approx((expected + floor) / 9, rel=1e-12)

    observed = [parts.observe(rows_of(batch, index)) for index in (slice(0, 2), slice(2, 3))]
    assert [part["talr/gold"].tolist() for part in observed] == [pytest.approx([2.3 / 3, 0.525]), pytest.approx([1.1])]
    together = {"talr/gold": torch.cat([part["talr/gold"] for part in observed])}
    assert parts.update(state, together)["talr/gold"].item() == pytest.approx(2.3 / 3)


def test_a_whole_step_and_the_step_after_it_have_one_temperature():
    """What ``apply`` takes from a whole step is what ``update`` keeps of it."""
    parts, batch = of(TALR()), three_rows()
    state = parts.update(parts.init_state(), parts.observe(batch))
    at_once = differentiated(SFT(), parts, batch, parts.init_state(), whole_step=True)
    again = differentiated(SFT(), parts, batch, state)
    assert_close(at_once, again, **FP64_ROUNDING)


def test_a_step_without_rows_keeps_the_temperature():
    parts, state = of(TALR()), {"talr/gold": number(0.7)}
    nothing = rows_of(three_rows(), slice(0, 0))
    assert parts.observe(nothing)["talr/gold"].shape == (0,)
    assert parts.update(state, parts.observe(nothing)) == state
    applied, metrics = parts.apply(nothing, state, whole_step=True)
    assert applied["gold"].weight.shape == (0, 4)
    assert all(metric.count == 0 for metric in metrics.values())


def test_the_median_of_one_row_is_its_own_mean():
    """So a token as hard as the row's mean weighs 1/e: losses 1, 2, 3 and τ = 2."""
    parts = of(TALR())
    batch = LegBatch(legs={"gold": make_rows([[-1.0, -2.0, -3.0]])})
    applied, metrics = parts.apply(batch, parts.init_state(), whole_step=True)
    assert applied["gold"].weight.tolist() == [pytest.approx([math.exp(-loss / 2) for loss in (1, 2, 3)])]
    assert values(metrics)["talr/tau"] == (6.0, 3.0)


def test_every_leg_has_its_own_temperature():
    both = mixture([("sft", SFT(leg="chosen"), 1.0), ("sft", SFT(leg="gold"), 1.0)])
    batch = LegBatch(legs={"chosen": make_rows([[-1.0]]), "gold": make_rows([[-3.0]])})
    parts = of(TALR(), likelihood=both.needs.likelihood)
    state = parts.update(parts.init_state(), parts.observe(batch))
    assert {key: tau.item() for key, tau in state.items()} == {"talr/chosen": 1.0, "talr/gold": 3.0}


def test_flow_is_fitted_once():
    """On the training rows, median 3; steps observe and change nothing, whatever the median of theirs (2 here)."""
    parts = of(FLOW())
    assert parts.init_state() == {}
    state = parts.fit({"gold": torch.tensor([9.0, 1.0, 3.0])})
    assert state == {"flow/gold": number(3.0)}
    batch = three_rows()
    assert parts.observe(batch) == {}
    assert parts.update(state, {}) == state
    for whole_step in (False, True):
        applied, metrics = parts.apply(batch, state, whole_step=whole_step)
        weights = applied["gold"].weight[:, 0].tolist()
        assert weights == pytest.approx([math.exp(-loss / 3) for loss in (1, 2, 4)])
        assert values(metrics)["flow/weight"] == (pytest.approx(sum(weights)), 3.0)


def test_known_numbers_of_flow():
    """Initial losses 0.8, 1.5, 0.4, 2.0 and 1.1: τ = 1.1."""
    parts = of(FLOW())
    initial = [0.8, 1.5, 0.4, 2.0, 1.1]
    state = parts.fit({"gold": torch.tensor(initial, dtype=torch.float64)})
    assert state["flow/gold"].item() == pytest.approx(1.1)
    batch = LegBatch(legs={"gold": make_rows([[-1.0]] * 5, [[-loss] for loss in initial])})
    applied, _ = parts.apply(batch, state)
    expected = [0.483225, 0.255729, 0.695144, 0.162321, 0.367879]
    assert applied["gold"].weight[:, 0].tolist() == pytest.approx(expected, **SIX_PLACES)


def test_fitted_and_observed_temperatures_live_together():
    parts, batch = of(TALR(), FLOW()), three_rows()
    state = {**parts.init_state(), **parts.fit({"gold": torch.tensor([1.0, 2.0, 4.0])})}
    state = parts.update(state, parts.observe(batch))
    assert {key: tau.item() for key, tau in state.items()} == {"talr/gold": pytest.approx(2.3 / 3), "flow/gold": 2.0}


# What weights do to losses and counts.


@pytest.mark.slow
@pytest.mark.parametrize("parts", [of(TALR()), of(FLOW()), of(FLOW(), TALR())], ids=["talr", "flow", "both"])
@given(seed=seeds)
def test_no_gradient_goes_through_weights(parts: Weighting, seed: int):
    """The slope of a token's log-prob is −weight/N exactly, though the weight is computed from it."""
    batch = make_batch(SFT(), seed=seed)
    leg = replace(batch["gold"], ref_logps=batch["gold"].logps.roll(1, 0).nan_to_num(-1.0))
    batch = LegBatch(legs={"gold": leg})
    state = {"talr/gold": number(0.8), "flow/gold": number(1.3)}
    applied, _ = parts.apply(batch, state)
    assert not applied["gold"].weight.requires_grad
    _, grad = differentiated(SFT(), parts, batch, state)
    expected = -applied["gold"].weight / leg.mask.sum()
    assert_close(grad["gold"][leg.mask], expected[leg.mask], rtol=1e-14, atol=0)


@pytest.mark.slow
@given(seed=seeds, scale=st.sampled_from([0.0, 1.0, 1e5]))
def test_adaptive_weights_change_no_count(seed: int, scale: float):
    """What a loss is divided by is known before the forward."""
    batch = make_batch(DPO(), seed=seed, scale=scale, dtype=torch.float32)
    parts = of(TALR(min_weight=1e-50), FLOW(), likelihood=("chosen",))
    state = {"talr/chosen": number(1e-6), "flow/chosen": number(1e-6)}
    assert parts.apply(batch, state)[0].counts() == batch.counts()
    assert parts.apply(batch, state, whole_step=True)[0].counts() == batch.counts()


@pytest.mark.slow
@given(seed=seeds)
def test_masks_reduce_counts_and_only_of_their_leg(seed: int):
    batch = make_batch(mixture([("sft", SFT(), 1.0), ("sft", SFT(leg="chosen"), 1.0)]), seed=seed, rows=6)
    parts = of(Goldfish(k=2, strategy="static", legs=("gold",)), TALR(), likelihood=("gold", "chosen"))
    kept = masked(batch, parts)
    before, after = batch.counts(), kept.counts()
    assert after["gold.token"] < before["gold.token"]
    assert (after["row"], after["chosen.token"]) == (before["row"], before["chosen.token"])
    assert parts.apply(kept, parts.init_state(), whole_step=True)[0].counts() == after


@pytest.mark.slow
@given(seed=seeds)
def test_weights_multiply_in_any_order(seed: int):
    """Bit for bit: goldfish is 0 or 1, and a product of two does not depend on the order."""
    objective = RPO(form="average")
    batch = make_batch(objective, seed=seed, rows=5)
    parts = (Goldfish(k=2, h=2), TALR(), FLOW())
    state = {"talr/chosen": number(0.8), "flow/chosen": number(1.3)}
    found = []
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        several = of(*(parts[i] for i in order), likelihood=("chosen",))
        found.append(differentiated(objective, several, masked(batch, several), state))
    for loss, grad in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert all(torch.equal(grad[name], found[0][1][name]) for name in grad)

    alone = [of(part, likelihood=("chosen",)) for part in parts]
    each = [of(part, likelihood=("chosen",)).apply(batch, state)[0]["chosen"].weight for part in parts[1:]]
    product = masked(batch, alone[0])["chosen"].weight * each[0] * each[1]
    together = of(*parts, likelihood=("chosen",))
    applied, _ = together.apply(masked(batch, together), state)
    mask = batch["chosen"].mask
    assert_close(applied["chosen"].weight[mask], product[mask], **FP64_ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("objective", [SFT(leg="chosen"), IRPO(), IRPO(form="sequence"), RPO(), RPO(form="average")])
@given(seed=seeds, cut=st.integers(0, 6))
def test_microbatches_add_up(objective: Objective, seed: int, cut: int):
    """With weights that look at log-probs too: loss, gradient and metrics, for a given state."""
    batch = make_batch(DPO(), seed=seed, rows=6)
    parts = of(Goldfish(k=2, h=2), TALR(), FLOW(), likelihood=("chosen",))
    batch = masked(batch, parts)
    state = {"talr/chosen": number(0.8), "flow/chosen": number(1.3)}
    whole, metrics = parts.apply(batch, state)
    shares = [parts.apply(rows_of(batch, index), state) for index in (slice(0, cut), slice(cut, 6))]
    losses = [objective(share).loss(whole.counts()) for share, _ in shares]
    assert_close(sum(losses), objective(whole).loss(whole.counts()), **FP64_ROUNDING)
    for name, metric in metrics.items():
        each = [found[name] for _, found in shares if name in found]
        assert_close(sum(m.total for m in each), metric.total, **FP64_ROUNDING)
        assert sum(m.count for m in each) == metric.count


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e3, 1e5])
def test_finite_everywhere(dtype: torch.dtype, scale: float):
    for objective in (SFT(leg="chosen"), IRPO(form="sequence"), RPO(), RPO(form="average")):
        parts = of(Goldfish(k=2, h=1), TALR(), FLOW(), likelihood=("chosen",))
        batch = masked(make_batch(DPO(), seed=4, scale=scale, dtype=dtype), parts)
        for tau in (1e-6, 1.0, math.inf):
            for whole_step in (False, True):
                state = {"talr/chosen": number(tau), "flow/chosen": number(tau)}
                loss, grad = differentiated(objective, parts, batch, state, whole_step=whole_step)
                assert loss.isfinite()
                assert all(slopes.isfinite().all() for slopes in grad.values())
                _, metrics = parts.apply(batch, state, whole_step=whole_step)
                assert all(metric.total.isfinite() for metric in metrics.values())


# What is logged.


def test_metrics_by_hand():
    """Losses 1, 2, 4 and 8; the second is dropped. τ = 3.75, as the state has it.

    goldfish: one of four dropped, (1 + 4 + 8)/3 on the others; unweighted is the mean of the same three
    """
    leg = make_rows([[-1.0, -2.0, -4.0, -8.0]])
    leg = replace(leg, weight=torch.tensor([[1.0, 0.0, 1.0, 1.0]], dtype=torch.float64))
    parts = of(Goldfish(), TALR())
    _, metrics = parts.apply(LegBatch(legs={"gold": leg}), {"talr/gold": number(3.75)})
    assert values(metrics)["goldfish/dropped"] == (1.0, 4.0)
    assert values(metrics)["goldfish/loss_kept"] == (13.0, 3.0)
    assert values(metrics)["goldfish/loss_dropped"] == (2.0, 1.0)
    assert values(metrics)["likelihood/unweighted"] == (13.0, 3.0)
    assert values(metrics)["talr/tau"] == (15.0, 4.0)
    assert not any(metric.total.requires_grad for metric in metrics.values())


def test_metrics_are_of_all_legs():
    """Not of the last one only: losses 1 and 3 here, 5 there; dropped 3 and nothing."""
    chosen = replace(make_rows([[-1.0, -3.0]]), weight=torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    gold = replace(make_rows([[-5.0]]), weight=torch.ones(1, 1, dtype=torch.float64))
    parts = of(Goldfish(), TALR(), likelihood=("chosen", "gold"))
    _, metrics = parts.apply(LegBatch(legs={"chosen": chosen, "gold": gold}), parts.init_state())
    assert values(metrics)["goldfish/dropped"] == (1.0, 3.0)
    assert values(metrics)["goldfish/loss_kept"] == (6.0, 2.0)
    assert values(metrics)["likelihood/unweighted"] == (6.0, 2.0)
    assert values(metrics)["talr/weight"] == (3.0, 3.0)


def test_without_weights_nothing_is_logged_or_changed():
    batch = make_batch(SFT(), seed=5)
    applied, metrics = weighting([], GOLD).apply(batch, {})
    assert metrics == {}
    assert applied["gold"] is batch["gold"]
