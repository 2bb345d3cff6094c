"""NVIDIA's RPO against arithmetic by hand and its formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from objectives import LegBatch, Needs
from objectives.reward_aware import RewardAwareRPO, bernoulli_kl
from tests.objectives import transcriptions_pairs
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
    tv1,
)

OURS = {"squared": "sq", "backward": "bwd_kl", "forward": "fwd_kl"}
every_distance = pytest.mark.parametrize("distance", OURS.values())


def scored(batch: LegBatch, chosen: list[float], rejected: list[float]) -> LegBatch:
    columns = {"chosen": chosen, "rejected": rejected}
    return replace(batch, scores={key: torch.tensor(each, dtype=torch.float64) for key, each in columns.items()})


def test_distances_by_hand():
    """One row, log-ratios 1 and −1, β = 0.5, scores 4 and 2.5, s = 2: m = 1, k = 3.

    sq: (1 − 3)² = 4, by m −4
    bwd: σ(3)·(0.3132616875 − 0.0485873516) + σ(−3)·(1.3132616875 − 3.0485873516)
       = 0.2521219245 − 0.0822993349 = 0.1698225896, by m σ(1) − σ(3) = −0.2215155482
    fwd: σ(1)·(0.0485873516 − 0.3132616875) + σ(−1)·(3.0485873516 − 1.3132616875)
       = −0.1934924438 + 0.4667009506 = 0.2732085068, by m σ(1)·σ(−1)·(1 − 3) = −0.3932238665
    times β for each chosen token
    """
    batch = scored(one_row(), [4.0], [2.5])
    for distance, expected, slope in (
        ("sq", 4.0, -4.0),
        ("bwd_kl", 0.1698225896, -0.2215155482),
        ("fwd_kl", 0.2732085068, -0.3932238665),
    ):
        loss, grad = loss_and_grad(RewardAwareRPO(beta=0.5, reward_scale=2.0, distance=distance), batch)
        assert loss.item() == pytest.approx(expected, **BY_HAND)
        assert grad["chosen"].tolist() == [pytest.approx([0.5 * slope] * 2, **BY_HAND)]
        assert grad["rejected"].tolist() == [pytest.approx([-0.5 * slope], **BY_HAND)]


@pytest.mark.parametrize(
    ("distance", "rows", "mean"),
    [
        ("sq", (8.410000, 0.562500), 4.486250),
        ("bwd_kl", (0.458274, 0.068707), 0.263491),
        ("fwd_kl", (0.781751, 0.069770), 0.425760),
    ],
)
def test_known_numbers(distance: str, rows: tuple[float, ...], mean: float):
    """Two rows whose log-ratios differ by 0.5 and −1.25, scores 4 and 1, 3 and 2.5."""
    batch = scored(tv1("chosen", "rejected"), [4.0, 3.0], [1.0, 2.5])
    objective = RewardAwareRPO(beta=0.2, distance=distance)
    assert row_losses(objective, batch) == pytest.approx(rows, **SIX_PLACES)
    assert loss_and_grad(objective, batch)[0].item() == pytest.approx(mean, **SIX_PLACES)
    assert means(objective, batch)["rewards/target_margins"] == pytest.approx(1.75)


@every_distance
def test_a_margin_that_follows_the_scores_costs_nothing(distance: str):
    """m = k, whatever its sign: no loss and no gradient; on either side the gradient leads back."""
    objective = RewardAwareRPO(beta=1.0, distance=distance)
    batch = scored(apart([2.0, -1.0, 1.9, 2.1]), [5.0, 3.0, 5.0, 5.0], [3.0, 4.0, 3.0, 3.0])
    losses, slopes = row_losses(objective, batch), loss_and_grad(objective, batch)[1]["chosen"].flatten().tolist()
    assert losses[:2] == pytest.approx([0.0, 0.0], abs=1e-15)
    assert slopes[:2] == pytest.approx([0.0, 0.0], abs=1e-15)
    assert min(losses[2:]) > 0
    assert slopes[2] < 0 < slopes[3]


@pytest.mark.slow
@pytest.mark.parametrize(("distance", "ours"), OURS.items())
@given(
    seed=st.integers(0, 1000),
    beta=st.sampled_from([0.01, 0.2, 2.0]),
    reward_scale=st.sampled_from([0.1, 1.0, 3.0]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
)
def test_they_are_what_the_formula_says(
    distance: str, ours: str, seed: int, beta: float, reward_scale: float, scale: float
):
    objective = RewardAwareRPO(beta=beta, reward_scale=reward_scale, distance=ours)
    batch = make_batch(objective, seed=seed, rows=5, scale=scale)
    expected = transcriptions_pairs.rpo_reward_aware(
        *four(batch),
        batch.scores["chosen"].tolist(),
        batch.scores["rejected"].tolist(),
        beta=beta,
        scale=reward_scale,
        distance=distance,
    )
    assert_transcribed(objective, batch, *expected)


def test_what_it_needs():
    """Both scores of every row: there is no default for one that is missing."""
    legs = ("chosen", "rejected")
    assert RewardAwareRPO().needs == Needs(legs=legs, reference=True, scores=legs)
    with pytest.raises(ValueError, match="the rows have no score 'chosen' here"):
        RewardAwareRPO()(tv1(*legs))


def test_the_kl_of_bernoullis():
    """0 for equal logits, positive otherwise, finite at any: KL(1 ‖ σ(b)) = log(1 + e^−b)."""
    logits = torch.tensor([-1e4, -3.0, 0.0, 2.0, 1e4], dtype=torch.float64)
    assert_close(bernoulli_kl(logits, logits), torch.zeros(5, dtype=torch.float64))
    assert (bernoulli_kl(logits, logits.roll(1)) > 0).all()
    assert bernoulli_kl(logits[4:], logits[3:4]).item() == pytest.approx(0.1269280110, **BY_HAND)
