"""AOT, paired and unpaired, against arithmetic by hand and the paper."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from objectives import Coupled, LegBatch, Objective, Stateful, with_own_step
from objectives.dpo import DPO
from objectives.sorting import AOT, AOTUnpaired
from tests.objectives import transcriptions_pairs
from tests.objectives.batches import (
    BY_HAND,
    FP64_ROUNDING,
    SIX_PLACES,
    apart,
    assert_transcribed,
    four,
    loss_and_grad,
    make_batch,
    make_rows,
    row_losses,
    rows_of,
)

both = pytest.mark.parametrize("cls", [AOT, AOTUnpaired], ids=["aot", "aot_unpaired"])
SEEDS = st.integers(0, 1000)
SCALES = st.sampled_from([0.1, 1.0, 30.0])


def margins(policy: list[float], reference: list[float]) -> LegBatch:
    """Rows of one token whose log-probs differ by so much under policy and reference."""
    chosen = make_rows([[p - 4.0] for p in policy], [[r - 4.0] for r in reference])
    rejected = make_rows([[-4.0] for _ in policy], [[-4.0] for _ in policy])
    return LegBatch(legs={"chosen": chosen, "rejected": rejected})


def test_aot_by_hand():
    """Two rows, β = 1: policy margins 2 and 0, the reference's 0 and 1.

    sorted: 0 and 2 against 0 and 1, so the second row meets 0 and the first one 1
    row 1: −log σ(2 − 1) = 0.3132616875, slope −σ(−1)/2 = −0.1344707107
    row 2: −log σ(0 − 0) = 0.6931471806, slope −σ(0)/2 = −0.25
    DPO would compare 2 with 0 and 0 with 1.
    """
    batch = with_own_step(AOT(), margins([2.0, 0.0], [0.0, 1.0]))
    loss, grad = loss_and_grad(AOT(beta=1.0), batch)
    assert row_losses(AOT(beta=1.0), batch) == pytest.approx([0.3132616875, 0.6931471806], **BY_HAND)
    assert loss.item() == pytest.approx((0.3132616875 + 0.6931471806) / 2, **BY_HAND)
    assert grad["chosen"].flatten().tolist() == pytest.approx([-0.1344707107, -0.25], **BY_HAND)
    assert grad["rejected"].flatten().tolist() == pytest.approx([0.1344707107, 0.25], **BY_HAND)


def test_unpaired_aot_by_hand():
    """Two rows, β = 1: log-ratios 2 and 0 of chosen, −1 and 0 of rejected responses.

    sorted: 0 and 2 against −1 and 0: differences 0 − (−1) = 1 and 2 − 0 = 2
    chosen row 1 (2) meets rejected row 2 (0): −log σ(2) = 0.1269280110, slope σ(−2)/2 = 0.0596014610 on either
    chosen row 2 (0) meets rejected row 1 (−1): −log σ(1) = 0.3132616875, slope σ(−1)/2 = 0.1344707107 on either
    """
    batch = with_own_step(AOTUnpaired(), apart([2.0, 0.0], [-1.0, 0.0]))
    loss, grad = loss_and_grad(AOTUnpaired(beta=1.0), batch)
    assert loss.item() == pytest.approx((0.1269280110 + 0.3132616875) / 2, **BY_HAND)
    assert grad["chosen"].flatten().tolist() == pytest.approx([-0.0596014610, -0.1344707107], **BY_HAND)
    assert grad["rejected"].flatten().tolist() == pytest.approx([0.1344707107, 0.0596014610], **BY_HAND)


def test_known_numbers():
    """Policy margins 2, −1, 0.5, the reference's −0.5, 1, 0: sorted differences −0.5, 0.5, 1. Then u and v."""
    batch = with_own_step(AOT(), margins([2.0, -1.0, 0.5], [-0.5, 1.0, 0.0]))
    assert sorted(row_losses(AOT(beta=0.1), batch)) == pytest.approx([0.644397, 0.668460, 0.718460], **SIX_PLACES)
    assert loss_and_grad(AOT(beta=0.1), batch)[0].item() == pytest.approx(0.677105, **SIX_PLACES)
    smoothed = AOT(beta=0.1, label_smoothing=0.1)
    assert sorted(row_losses(smoothed, batch)) == pytest.approx([0.654397, 0.673460, 0.713460], **SIX_PLACES)
    assert loss_and_grad(smoothed, batch)[0].item() == pytest.approx(0.680439, **SIX_PLACES)
    assert loss_and_grad(DPO(beta=0.1), batch)[0].item() == pytest.approx(0.680846, **SIX_PLACES)
    batch = with_own_step(AOTUnpaired(), apart([0.0, -0.25, 2.0], [1.5, -0.5, 1.0]))
    assert loss_and_grad(AOTUnpaired(beta=0.1), batch)[0].item() == pytest.approx(0.697861, **SIX_PLACES)


@pytest.mark.slow
@both
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@given(seed=SEEDS, beta=st.sampled_from([0.01, 0.1, 2.0]), scale=SCALES, rows=st.integers(1, 6))
def test_they_are_what_the_paper_says(
    cls: type[AOT | AOTUnpaired], label_smoothing: float, seed: int, beta: float, scale: float, rows: int
):
    objective = cls(beta=beta, label_smoothing=label_smoothing)
    batch = make_batch(objective, seed=seed, rows=rows, scale=scale)
    expected = transcriptions_pairs.aot(*four(batch), beta=beta, label_smoothing=label_smoothing, paired=cls is AOT)
    assert_transcribed(objective, batch, *expected)


@pytest.mark.slow
@both
@given(seed=SEEDS, label_smoothing=st.sampled_from([0.0, 0.2]))
def test_a_step_of_one_row_is_dpo(cls: type[AOT | AOTUnpaired], seed: int, label_smoothing: float):
    batch = make_batch(cls(), seed=seed, rows=1)
    loss, grad = loss_and_grad(cls(beta=0.7, label_smoothing=label_smoothing), batch)
    dpo_loss, dpo_grad = loss_and_grad(DPO(beta=0.7, label_smoothing=label_smoothing), batch)
    assert_close(loss, dpo_loss, **FP64_ROUNDING)
    for name, slopes in grad.items():
        assert_close(slopes, dpo_grad[name], **FP64_ROUNDING)


@pytest.mark.slow
@both
@given(seed=SEEDS, cuts=st.lists(st.integers(0, 6), min_size=1, max_size=3))
def test_the_sort_is_of_the_whole_step(cls: type[AOT | AOTUnpaired], seed: int, cuts: list[int]):
    """Numbers of microbatches, gathered as they come, sort all rows of the step; microbatches alone would not."""
    objective = cls(beta=1.0)
    batch = make_batch(objective, seed=seed, rows=6)
    edges = [0, *sorted(cuts), 6]
    parts = [rows_of(batch, slice(start, end)) for start, end in itertools.pairwise(edges)]
    passes = [objective.step_pass(part) for part in parts]
    step = {key: torch.cat([each[key] for each in passes]) for key in passes[0]}
    gathered = [
        type(part)(legs=part.legs, step=step, place=torch.arange(start, end))
        for part, (start, end) in zip(parts, itertools.pairwise(edges), strict=True)
    ]
    whole_loss, whole_grad = loss_and_grad(objective, batch)
    shares = [loss_and_grad(objective, part, batch.counts()) for part in gathered]
    assert_close(sum(loss for loss, _ in shares), whole_loss, **FP64_ROUNDING)
    for name, slopes in whole_grad.items():
        assert_close(torch.cat([grad[name] for _, grad in shares]), slopes, **FP64_ROUNDING)


def test_a_sort_of_microbatches_would_be_another_loss():
    """What the pass over the whole step is for."""
    for objective in (AOT(beta=1.0), AOTUnpaired(beta=1.0)):
        batch = make_batch(objective, seed=0, rows=6)
        alone = [with_own_step(objective, rows_of(batch, index)) for index in (slice(0, 3), slice(3, 6))]
        apart_loss = sum(loss_and_grad(objective, part, batch.counts())[0] for part in alone)
        assert abs(apart_loss - loss_and_grad(objective, batch)[0]) > 1e-3


@both
def test_equal_rewards_are_sorted_somehow(cls: type[AOT | AOTUnpaired]):
    """Ties: each row still meets one partner of its own, and the loss is the same in any order."""
    objective: Objective = cls(beta=1.0)
    batch = with_own_step(objective, apart([1.0, 1.0, 0.0], [0.5, -0.5, 0.5]))
    loss = loss_and_grad(objective, batch)[0]
    for order in itertools.permutations(range(3)):
        again = with_own_step(objective, rows_of(batch, torch.tensor(order)))
        assert_close(loss_and_grad(objective, again)[0], loss, **FP64_ROUNDING)


@both
def test_they_couple_rows_and_remember_nothing(cls: type[AOT | AOTUnpaired]):
    assert isinstance(cls(), Coupled)
    assert not isinstance(cls(), Stateful)
