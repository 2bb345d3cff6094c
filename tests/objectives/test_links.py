"""Hinge, IPO, EXO and DiscoPOP against arithmetic by hand and the papers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from objectives import Objective
from objectives.dpo import DPO
from objectives.links import EXO, IPO, DiscoPOP, Hinge
from tests.objectives import transcriptions_pairs
from tests.objectives.batches import (
    BY_HAND,
    SIX_PLACES,
    apart,
    assert_transcribed,
    four,
    loss_and_grad,
    make_batch,
    map_legs,
    map_tensors,
    one_row,
    row_losses,
    tv1,
)

SEEDS = st.integers(0, 1000)
SCALES = st.sampled_from([0.1, 1.0, 30.0])


def test_hinge_by_hand():
    """One row, log-ratios 1 and −1, β = 0.25: m = 0.25 · 2 = 0.5, loss 1 − 0.5, slope −β for each chosen token."""
    loss, grad = loss_and_grad(Hinge(beta=0.25), one_row())
    assert loss.item() == 0.5
    assert (grad["chosen"].tolist(), grad["rejected"].tolist()) == ([[-0.25, -0.25]], [[0.25]])


def test_a_pair_that_is_apart_is_left_alone():
    """m = 0.5 · 2 = 1 and more: no loss, and no gradient. A pair the wrong way round costs 1 − m, with slope β."""
    for beta in (0.5, 0.6, 100.0):
        loss, grad = loss_and_grad(Hinge(beta=beta), one_row())
        assert loss.item() == 0.0
        assert not any(slopes.any() for slopes in grad.values())
    assert row_losses(Hinge(beta=0.5), apart([-3.0, 1.99, 2.01])) == pytest.approx([2.5, 0.005, 0.0], abs=1e-12)


def test_ipo_by_hand():
    """The same row of 2 and 1 tokens, β = 0.5, so a target of 1.

    mean: (1/2 + 1/1 − 1)² = 0.25, slope 2 · 0.5 per unit of either mean: 0.5 for each chosen token, −1 for the rejected
    sum: (1 + 1 − 1)² = 1, slope 2 per unit of either sum
    """
    loss, grad = loss_and_grad(IPO(beta=0.5), one_row())
    assert loss.item() == 0.25
    assert (grad["chosen"].tolist(), grad["rejected"].tolist()) == ([[0.5, 0.5]], [[-1.0]])
    loss, grad = loss_and_grad(IPO(beta=0.5, reduction="sum"), one_row())
    assert loss.item() == 1.0
    assert (grad["chosen"].tolist(), grad["rejected"].tolist()) == ([[2.0, 2.0]], [[-2.0]])


def test_ipo_pulls_back_what_is_too_far_apart():
    """Unlike the logistic loss: β = 0.1 is a target of 5 nats, from both sides."""
    for difference, sign in ((4.0, -1), (6.0, 1)):
        assert loss_and_grad(IPO(), apart([difference]))[1]["chosen"].sign().item() == sign
    assert loss_and_grad(IPO(), apart([5.0]))[0].item() == pytest.approx(0.0, abs=1e-20)


def test_exo_by_hand():
    """The same row, β = 0.5, ε = 0.2: m = 1.

    q = σ(1) = 0.7310585786:  q · (−0.3132616875 − log 0.8) = 0.7310585786 · (−0.0901181362) = −0.0658816366
    1 − q = 0.2689414214:  · (−1.3132616875 − log 0.2) = 0.2689414214 · 0.2961762249 = 0.0796540549
    loss = 0.0137724183
    dloss/dm = q·(1−q)·(m − log 4) = 0.1966119332 · (−0.3862943611) = −0.0759500811; times β, −0.0379750406 a token
    """
    loss, grad = loss_and_grad(EXO(beta=0.5, label_smoothing=0.2), one_row())
    assert loss.item() == pytest.approx(0.0137724183, abs=1e-10)
    assert grad["chosen"].tolist() == [pytest.approx([-0.0379750406, -0.0379750406], rel=2e-9)]
    assert grad["rejected"].tolist() == [pytest.approx([0.0379750406], rel=2e-9)]


@pytest.mark.parametrize("label_smoothing", [1e-3, 0.1, 0.4])
def test_exo_has_a_finite_optimum(label_smoothing: float):
    """Its minimum, 0, is at m = log((1−ε)/ε), 6.906755 for ε = 0.001; on either side the gradient points to it."""
    objective = EXO(beta=1.0, label_smoothing=label_smoothing)
    optimum = math.log((1 - label_smoothing) / label_smoothing)
    batch = apart([optimum - 0.1, optimum, optimum + 0.1])
    below, at, above = (row[0] for row in loss_and_grad(objective, batch)[1]["chosen"].tolist())
    assert below < 0 < above
    assert at == pytest.approx(0.0, abs=1e-12)
    assert row_losses(objective, batch)[1] == pytest.approx(0.0, abs=1e-12)
    assert min(row_losses(objective, batch)) == row_losses(objective, batch)[1]


def test_exo_of_an_optimum_that_is_known():
    assert math.log((1 - 1e-3) / 1e-3) == pytest.approx(6.906755, **SIX_PLACES)
    assert EXO().step0 == pytest.approx(2.761231, **SIX_PLACES)


def test_discopop_by_hand():
    """The same row, β = 0.5, τ = 0.5: m = 1, gate g = σ(2) = 0.8807970780.

    logistic: 0.1192029220 · 0.3132616875 = 0.0373417085;  exponential: 0.8807970780 · e⁻¹ = 0.3240271368
    loss = 0.3613688453
    dg/dm = g·(1−g)/τ = 0.2099871708
    dloss/dm = 0.2099871708 · (0.3678794412 − 0.3132616875) − 0.1192029220 · 0.2689414214 − 0.3240271368
             = 0.0114690276 − 0.0320586033 − 0.3240271368 = −0.3446167125; times β, −0.1723083563 a token
    """
    loss, grad = loss_and_grad(DiscoPOP(beta=0.5, tau=0.5), one_row())
    assert loss.item() == pytest.approx(0.3613688453, **BY_HAND)
    assert grad["chosen"].tolist() == [pytest.approx([-0.1723083563, -0.1723083563], **BY_HAND)]
    assert grad["rejected"].tolist() == [pytest.approx([0.1723083563], **BY_HAND)]


@pytest.mark.parametrize("tau", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("difference", [-1e5, -1e3, -89.0, 89.0, 1e5])
def test_discopop_is_finite_where_the_naive_product_overflows(tau: float, difference: float):
    """exp(−m) of m = −89 is infinite in float32, and its factor σ(m/τ) is 0: their product would be NaN."""
    naive = torch.sigmoid(torch.tensor(-1e3) / tau) * torch.exp(torch.tensor(1e3))
    assert not naive.isfinite()
    batch = apart([difference])
    single = map_legs(batch, lambda leg: map_tensors(leg, lambda _, x: x.float() if x.is_floating_point() else x))
    loss, grad = loss_and_grad(DiscoPOP(beta=1.0, tau=tau), single)
    assert loss.isfinite()
    assert grad["chosen"].isfinite().all()


def test_discopop_is_not_convex_where_its_gate_switches():
    """A pair at m = 0 costs more than the pairs on either side of it cost together, halved."""
    below, middle, above = row_losses(DiscoPOP(beta=1.0, tau=0.05), apart([-0.1, 0.0, 0.1]))
    assert middle > (below + above) / 2


@pytest.mark.parametrize(
    ("objective", "rows", "mean"),
    [
        (Hinge(beta=0.1), (0.950000, 1.125000), 1.037500),
        (IPO(beta=0.1), (22.562500, 28.890625), 25.726562),
        (IPO(beta=0.1, reduction="sum"), (20.250000, 39.062500), 29.656250),
        (EXO(beta=0.1, label_smoothing=1e-3), (2.675227, 2.978736), 2.826981),
        (DiscoPOP(beta=0.1, tau=0.05), (0.875181, 0.786088), 0.830634),
    ],
    ids=["hinge", "ipo", "ipo-sum", "exo", "discopop"],
)
def test_known_numbers(objective: Objective, rows: tuple[float, ...], mean: float):
    """Two rows whose log-ratios differ by 0.5 and −1.25."""
    batch = tv1("chosen", "rejected")
    assert row_losses(objective, batch) == pytest.approx(rows, **SIX_PLACES)
    assert loss_and_grad(objective, batch)[0].item() == pytest.approx(mean, **SIX_PLACES)


@given(seed=SEEDS, beta=st.sampled_from([0.01, 0.1, 2.0]), scale=SCALES)
def test_hinge_is_what_the_paper_says(seed: int, beta: float, scale: float):
    batch = make_batch(Hinge(), seed=seed, rows=5, scale=scale)
    expected = transcriptions_pairs.over_rows(transcriptions_pairs.hinge(beta=beta), *four(batch))
    assert_transcribed(Hinge(beta=beta), batch, *expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@given(seed=SEEDS, beta=st.sampled_from([0.01, 0.1, 2.0]), scale=SCALES)
def test_ipo_is_what_the_paper_says(reduction: str, seed: int, beta: float, scale: float):
    batch = make_batch(IPO(), seed=seed, rows=5, scale=scale)
    row = transcriptions_pairs.ipo(beta=beta, reduction=reduction)
    assert_transcribed(IPO(beta=beta, reduction=reduction), batch, *transcriptions_pairs.over_rows(row, *four(batch)))


@given(
    seed=SEEDS, beta=st.sampled_from([0.01, 0.1, 2.0]), label_smoothing=st.sampled_from([1e-3, 0.1, 0.4]), scale=SCALES
)
def test_exo_is_what_the_paper_says(seed: int, beta: float, label_smoothing: float, scale: float):
    batch = make_batch(EXO(), seed=seed, rows=5, scale=scale)
    row = transcriptions_pairs.exo(beta=beta, label_smoothing=label_smoothing)
    expected = transcriptions_pairs.over_rows(row, *four(batch))
    assert_transcribed(EXO(beta=beta, label_smoothing=label_smoothing), batch, *expected)


@given(seed=SEEDS, beta=st.sampled_from([0.01, 0.1, 2.0]), tau=st.sampled_from([0.05, 0.3, 1.0]), scale=SCALES)
def test_discopop_is_what_the_paper_says(seed: int, beta: float, tau: float, scale: float):
    batch = make_batch(DiscoPOP(), seed=seed, rows=5, scale=scale)
    expected = transcriptions_pairs.over_rows(transcriptions_pairs.discopop(beta=beta, tau=tau), *four(batch))
    assert_transcribed(DiscoPOP(beta=beta, tau=tau), batch, *expected)


@pytest.mark.slow
@given(seed=SEEDS)
def test_at_the_reference_they_want_what_dpo_wants(seed: int):
    """Chosen responses up and rejected ones down; all but DiscoPOP."""
    for objective in (DPO(), Hinge(), IPO(), EXO()):
        batch = make_batch(objective, seed=seed, at_reference=True)
        grad = loss_and_grad(objective, batch)[1]
        assert (grad["chosen"][batch["chosen"].mask] < 0).all()
        assert (grad["rejected"][batch["rejected"].mask] > 0).all()


def test_at_the_reference_discopop_begins_the_wrong_way():
    """τ = 0.05, m = 0: dloss/dm = (1 − log 2)/(4τ) − ¼ − ½ = 5 · 0.3068528194 − 0.75 = 0.7842640972, uphill.

    The gate's switch from the logistic to the larger exponential part outweighs both parts' own slopes; a pair has to
    be noisy enough to leave it. With τ = 1 it is −0.6732867951, downhill.
    """
    for tau, slope in ((0.05, 0.7842640972), (1.0, -0.6732867951)):
        grad = loss_and_grad(DiscoPOP(beta=1.0, tau=tau), apart([0.0]))[1]
        assert grad["chosen"].item() == pytest.approx(slope, **BY_HAND)
