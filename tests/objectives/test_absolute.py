"""NCA, paired BCO, SPPO and APO against arithmetic by hand and the papers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from objectives import LegBatch, Objective, Stateful, mixture
from objectives.absolute import NCA, SPPO, APODown, APOZero, BCOPair
from objectives.dpo import DPO
from objectives.sft import SFT
from tests.objectives import transcriptions, transcriptions_pairs
from tests.objectives.batches import (
    BY_HAND,
    SIX_PLACES,
    apart,
    assert_transcribed,
    four,
    loss_and_grad,
    make_batch,
    means,
    one_row,
    row_losses,
    rows_of,
    tv1,
)
from tests.objectives.transcriptions_pairs import RowLoss


def seen(total: float, count: float) -> dict[str, Tensor]:
    """Rewards seen so far."""
    return {
        "reward_total": torch.tensor(total, dtype=torch.float64),
        "reward_count": torch.tensor(count, dtype=torch.float64),
    }


def with_shift(batch: LegBatch, delta: float) -> LegBatch:
    return replace(batch, state=seen(4 * delta, 4))


def test_nca_by_hand():
    """One row, log-ratios 1 and −1, β = 0.5: rewards 0.5 and −0.5.

    −log σ(0.5) − ½·log σ(−0.5) − ½·log σ(0.5) = 0.4740769842 + ½ · 0.9740769842 + ½ · 0.4740769842 = 1.1981539684
    by the chosen reward −σ(−0.5) + ½·σ(0.5) = −0.3775406688 + 0.3112296656 = −0.0663110032, times β −0.0331555016
    by the rejected one ½·σ(−0.5) = 0.1887703344, times β 0.0943851672
    """
    loss, grad = loss_and_grad(NCA(beta=0.5), one_row())
    assert loss.item() == pytest.approx(1.1981539684, **BY_HAND)
    assert grad["chosen"].tolist() == [pytest.approx([-0.0331555016, -0.0331555016], rel=2e-9)]
    assert grad["rejected"].tolist() == [pytest.approx([0.0943851672], **BY_HAND)]


def test_nca_has_a_finite_target_for_the_chosen_response():
    """−log σ(r) − ½·log σ(−r) is lowest at r = log 2: σ(−r) = ½·σ(r)."""
    slopes = loss_and_grad(NCA(beta=1.0), apart([0.6, 0.6931471805599453, 0.8]))[1]["chosen"].flatten().tolist()
    assert slopes[0] < 0 < slopes[2]
    assert slopes[1] == pytest.approx(0.0, abs=1e-12)


def test_paired_bco_by_hand():
    """The same row, rewards 0.5 and −0.5, after rewards whose mean is 0.25.

    −log σ(0.5 − 0.25) − log σ(0.25 + 0.5) = 0.5759394199 + 0.3868710061 = 0.9628104260
    slopes −β·σ(−0.25) = −0.2189117496 for each chosen token, β·σ(−0.75) = 0.1604106504 for the rejected one
    """
    loss, grad = loss_and_grad(BCOPair(beta=0.5), with_shift(one_row(), 0.25))
    assert loss.item() == pytest.approx(0.9628104260, **BY_HAND)
    assert grad["chosen"].tolist() == [pytest.approx([-0.2189117496, -0.2189117496], **BY_HAND)]
    assert grad["rejected"].tolist() == [pytest.approx([0.1604106504], **BY_HAND)]


def test_the_shift_by_hand():
    """β = 0.1: rewards 0, −0.025, −0.05 and 0.1, mean 0.025/4 = 0.00625; then two rewards of 0.4, mean 0.825/6."""
    objective, batch = BCOPair(beta=0.1), tv1("chosen", "rejected")
    first = replace(batch, state=objective.init_state())
    assert means(objective, first)["rewards/shift"] == 0.0
    state = objective.update(first.state, objective.observe(first))
    assert {key: value.item() for key, value in state.items()} == pytest.approx(
        {"reward_total": 0.025, "reward_count": 4.0}
    )
    assert means(objective, replace(batch, state=state))["rewards/shift"] == pytest.approx(0.00625)
    high = apart([4.0], [4.0])
    state = objective.update(state, objective.observe(high))
    assert means(objective, replace(batch, state=state))["rewards/shift"] == pytest.approx(0.1375)


def test_a_step_uses_the_shift_of_the_step_before():
    """So no loss depends on how its step is split; the first step has no shift."""
    objective, batch = BCOPair(beta=0.5), make_batch(BCOPair(), seed=3)
    plain = loss_and_grad(BCOPair(beta=0.5, shift="none"), replace(batch, state={}))[0]
    assert torch.equal(loss_and_grad(objective, replace(batch, state=objective.init_state()))[0], plain)


def test_without_a_shift_nothing_is_remembered():
    """It still answers as an objective with a state does, with an empty one."""
    objective = BCOPair(shift="none")
    assert isinstance(objective, Stateful)
    assert objective.init_state() == {}
    assert objective.observe(tv1("chosen", "rejected")) == {}
    assert objective.update({}, {}) == {}


def test_sppo_by_hand():
    """The same row, β = 0.25, targets 2 and −2: (1 − 2)² + (−1 + 2)² = 2, slopes −2 and 2. At the targets none."""
    loss, grad = loss_and_grad(SPPO(beta=0.25), one_row())
    assert loss.item() == 2.0
    assert (grad["chosen"].tolist(), grad["rejected"].tolist()) == ([[-2.0, -2.0]], [[2.0]])
    loss, grad = loss_and_grad(SPPO(beta=0.5), one_row())
    assert loss.item() == 0.0
    assert not any(slopes.any() for slopes in grad.values())


def test_apo_zero_by_hand():
    """The same row, β = 0.5: 1 − σ(0.5) + σ(−0.5) = 2 · 0.3775406688 = 0.7550813376.

    slope of either: β·σ(0.5)·σ(−0.5) = 0.5 · 0.2350037122 = 0.1175018561
    """
    loss, grad = loss_and_grad(APOZero(beta=0.5), one_row())
    assert loss.item() == pytest.approx(0.7550813376, **BY_HAND)
    assert grad["chosen"].tolist() == [pytest.approx([-0.1175018561, -0.1175018561], **BY_HAND)]
    assert grad["rejected"].tolist() == [pytest.approx([0.1175018561], **BY_HAND)]


def test_apo_down_by_hand():
    """The same row, β = 0.5: σ(0.5) + 1 − σ(0.5 + 0.5) = 0.6224593312 + 0.2689414214 = 0.8914007526.

    chosen: β·[σ(0.5)σ(−0.5) − σ(1)σ(−1)] = 0.5 · (0.2350037122 − 0.1966119332) = 0.0191958895 — downwards, though the
    margin alone would push it up; rejected: β·σ(1)σ(−1) = 0.0983059666
    """
    loss, grad = loss_and_grad(APODown(beta=0.5), one_row())
    assert loss.item() == pytest.approx(0.8914007526, **BY_HAND)
    assert grad["chosen"].tolist() == [pytest.approx([0.0191958895, 0.0191958895], rel=2e-9)]
    assert grad["rejected"].tolist() == [pytest.approx([0.0983059666], **BY_HAND)]


def test_at_the_reference_apo_down_moves_the_rejected_response_only():
    """σ(r)'s slope at 0 is what the margin's is."""
    batch = make_batch(APODown(), seed=1, at_reference=True)
    grad = loss_and_grad(APODown(), batch)[1]
    assert grad["chosen"].abs().max() < 1e-15
    assert (grad["rejected"][batch["rejected"].mask] > 0).all()


@pytest.mark.parametrize(
    ("objective", "rows", "mean"),
    [
        (NCA(beta=0.1), (1.373951, 1.418286), 1.396118),
        (BCOPair(beta=0.1, shift="none"), (1.361607, 1.450122), 1.405864),
        (SPPO(beta=0.1), (45.250000, 63.562500), 54.406250),
        (SPPO(beta=0.5), (1.25, 5.5625), 3.406250),
        (APOZero(beta=0.1), (0.987503, 1.031229), 1.009366),
        (APODown(beta=0.1), (0.987503, 1.024960), 1.006231),
    ],
    ids=["nca", "bco_pair", "sppo", "sppo-0.5", "apo_zero", "apo_down"],
)
def test_known_numbers(objective: Objective, rows: tuple[float, ...], mean: float):
    """Two rows, log-ratios 0 and −0.25 of chosen, −0.5 and 1 of rejected responses."""
    batch = tv1("chosen", "rejected")
    assert row_losses(objective, batch) == pytest.approx(rows, **SIX_PLACES)
    assert loss_and_grad(objective, batch)[0].item() == pytest.approx(mean, **SIX_PLACES)


def test_known_numbers_with_a_shift():
    batch = with_shift(tv1("chosen", "rejected"), 0.00625)
    assert row_losses(BCOPair(beta=0.1), batch) == pytest.approx((1.361695, 1.450015), **SIX_PLACES)
    assert loss_and_grad(BCOPair(beta=0.1), batch)[0].item() == pytest.approx(1.405855, **SIX_PLACES)


def test_mpo_is_a_list_of_three():
    """Mixed Preference Optimization: 0.8 · 0.713029 + 0.2 · 1.405864 + 1.0 · 1.05, weights as they are."""
    listed = mixture([("dpo", DPO(), 0.8), ("bco_pair", BCOPair(shift="none"), 0.2), ("sft", SFT(leg="chosen"), 1.0)])
    assert loss_and_grad(listed, tv1("chosen", "rejected"))[0].item() == pytest.approx(1.901596, **SIX_PLACES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "transcribed"),
    [
        (NCA, transcriptions_pairs.nca),
        (SPPO, transcriptions_pairs.sppo),
        (APOZero, transcriptions_pairs.apo_zero),
        (APODown, transcriptions_pairs.apo_down),
    ],
    ids=["nca", "sppo", "apo_zero", "apo_down"],
)
@given(seed=st.integers(0, 1000), beta=st.sampled_from([0.01, 0.1, 2.0]), scale=st.sampled_from([0.1, 1.0, 30.0]))
def test_they_are_what_the_papers_say(
    cls: Callable[..., Objective], transcribed: Callable[..., RowLoss], seed: int, beta: float, scale: float
):
    objective = cls(beta=beta)
    batch = make_batch(objective, seed=seed, rows=5, scale=scale)
    assert_transcribed(objective, batch, *transcriptions_pairs.over_rows(transcribed(beta=beta), *four(batch)))


@pytest.mark.slow
@given(
    seed=st.integers(0, 1000),
    beta=st.sampled_from([0.01, 0.1, 2.0]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    later=st.booleans(),
)
def test_paired_bco_is_what_the_paper_says(seed: int, beta: float, scale: float, later: bool):
    objective = BCOPair(beta=beta)
    batch = make_batch(objective, seed=seed, rows=5, scale=scale, later=later)
    total, count = (batch.state[key].item() for key in ("reward_total", "reward_count"))
    assert (count > 0) == later
    row = transcriptions_pairs.bco_pair(beta=beta, delta=total / max(count, 1))
    assert_transcribed(objective, batch, *transcriptions_pairs.over_rows(row, *four(batch)))
    plain = transcriptions_pairs.over_rows(transcriptions_pairs.bco_pair(beta=beta, delta=0.0), *four(batch))
    assert_transcribed(BCOPair(beta=beta, shift="none"), batch, *plain)


@pytest.mark.slow
@given(seed=st.integers(0, 1000), cut=st.integers(0, 5))
def test_the_shift_is_the_mean_of_all_rewards_so_far(seed: int, cut: int):
    """Over two steps, the second of two microbatches, as the transcription of unpaired BCO's has it."""
    objective = BCOPair(beta=0.7)
    batches = [make_batch(objective, seed=seed + step, rows=5) for step in (0, 1)]
    rewards = []
    for batch in batches:
        chosen, rejected, ref_chosen, ref_rejected = four(batch)
        pairs = [*zip(chosen, ref_chosen, strict=True), *zip(rejected, ref_rejected, strict=True)]
        rewards.append([0.7 * (sum(logps) - sum(ref)) for logps, ref in pairs])
    expected = transcriptions.bco_shift(rewards)
    state = objective.init_state()
    for batch, shift, parts in zip(batches, expected, ([slice(0, 5)], [slice(0, cut), slice(cut, 5)]), strict=True):
        observed = [objective.observe(rows_of(batch, part)) for part in parts]
        state = objective.update(state, {key: sum(each[key] for each in observed) for key in observed[0]})
        assert (state["reward_total"] / state["reward_count"]).item() == pytest.approx(shift, rel=1e-11, abs=1e-13)


def test_one_reward_seen_is_a_mean_of_one():
    """δ = 0.25 after a single reward, not half of it."""
    batch = replace(tv1("chosen", "rejected"), state=seen(0.25, 1))
    assert means(BCOPair(), batch)["rewards/shift"] == pytest.approx(0.25)
