"""SFT against arithmetic by hand and against its definition; other implementations' numbers are in ``test_vectors``."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from objectives import Leg, LegBatch
from objectives.sft import SFT
from tests.objectives import transcriptions
from tests.objectives.batches import assert_transcribed, loss_and_grad, make_batch, ragged


def two_rows(weight: list[list[float]] | None = None) -> LegBatch:
    """Rows of 3 and 1 tokens; NaN where there is no token."""
    nan = math.nan
    logps = torch.tensor([[-0.5, -1.0, -1.5], [-3.0, nan, nan]], dtype=torch.float64)
    gold = Leg(
        logps=logps,
        mask=~logps.isnan(),
        tokens=torch.zeros(2, 3, dtype=torch.int64),
        weight=None if weight is None else torch.tensor(weight, dtype=torch.float64),
    )
    return LegBatch(legs={"gold": gold})


def test_sft_by_hand():
    """Rows of 3 and 1 tokens: every token counts the same, not every row.

    −Σ log π = 0.5 + 1.0 + 1.5 + 3.0 = 6.0;   N = 4   →   loss = 1.5, slope −1/4 for each token
    (the mean of row means would be (1.0 + 3.0)/2 = 2.0)
    """
    loss, grad = loss_and_grad(SFT(), two_rows())
    assert loss.item() == 1.5
    assert grad["gold"].tolist() == [[-0.25, -0.25, -0.25], [-0.25, 0.0, 0.0]]


def test_weighted_sft_by_hand():
    """Weights multiply tokens; a token of weight zero is in neither the sum nor the count.

    weights 2, 0, 1 | 0.5:   2 · 0.5 + 1 · 1.5 + 0.5 · 3.0 = 4.0;   N = 3   →   loss = 4/3
    slopes −2/3, 0, −1/3 | −0.5/3
    """
    loss, grad = loss_and_grad(SFT(), two_rows(weight=[[2.0, 0.0, 1.0], [0.5, 9.0, 9.0]]))
    assert loss.item() == pytest.approx(4 / 3, rel=1e-15)
    assert grad["gold"][0].tolist() == pytest.approx([-2 / 3, 0.0, -1 / 3], rel=1e-15)
    assert grad["gold"][1].tolist() == pytest.approx([-0.5 / 3, 0.0, 0.0], rel=1e-15)


def test_a_dropped_token_may_be_impossible():
    """log π = −∞ under weight zero: 0 · ∞ must not become NaN, in value or in gradient."""
    batch = two_rows(weight=[[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    batch["gold"].logps[0, 1] = -math.inf
    loss, grad = loss_and_grad(SFT(), batch)
    assert loss.item() == pytest.approx((0.5 + 1.5 + 3.0) / 3, rel=1e-15)
    assert grad["gold"].isfinite().all()


def test_a_uniform_model_costs_log_of_its_vocabulary():
    batch = make_batch(SFT(), seed=1)
    uniform = torch.full_like(batch["gold"].logps, -math.log(1000))
    gold = Leg(logps=uniform, mask=batch["gold"].mask, tokens=batch["gold"].tokens)
    loss, _ = loss_and_grad(SFT(), LegBatch(legs={"gold": gold}))
    assert loss.item() == pytest.approx(math.log(1000), rel=1e-12)


def test_metric_is_the_mean_over_rows():
    """Summed log-probs: −3.0 in each of both rows."""
    metric = SFT()(two_rows()).metrics["logps/gold"]
    assert (metric.total.item(), metric.count) == (-6.0, 2)


@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@given(seed=st.integers(0, 1000), leg=st.sampled_from(["gold", "chosen"]))
def test_sft_is_what_its_definition_says(weighted: bool, seed: int, leg: str):
    batch = make_batch(SFT(leg=leg), seed=seed, rows=5, weighted=weighted)
    weight = ragged(batch[leg].weight, batch[leg]) if weighted else None
    expected_loss, expected_grad = transcriptions.sft(ragged(batch[leg].logps, batch[leg]), weight)
    assert_transcribed(SFT(leg=leg), batch, expected_loss, {leg: expected_grad})


@pytest.mark.parametrize(
    ("per", "value", "slopes"),
    [("token", 1.5, (-1 / 4, -1 / 4)), ("sequence", 2.0, (-1 / 6, -1 / 2)), ("row", 3.0, (-1 / 2, -1 / 2))],
)
def test_what_it_is_a_mean_of(per: str, value: float, slopes: tuple[float, float]):
    """Rows of 0.5 + 1 + 1.5 and of 3 nats: 6/4 a token, (1 + 3)/2 over rows of means, (3 + 3)/2 over rows of sums."""
    loss, grad = loss_and_grad(SFT(per=per), two_rows())
    assert loss.item() == pytest.approx(value, rel=1e-15)
    assert grad["gold"][0].tolist() == pytest.approx([slopes[0]] * 3, rel=1e-15)
    assert grad["gold"][1, 0].item() == pytest.approx(slopes[1], rel=1e-15)
