"""Legs, counts and terms: the arithmetic every objective is written in."""

from __future__ import annotations

import math

import pytest
import torch

from objectives import Leg, LegBatch, Mean, Output, Term, masked_sum
from tests.objectives.batches import FP64_ROUNDING

NAN = math.nan


def leg() -> Leg:
    """Rows of 3, 1 and 0 tokens, NaN elsewhere; the last token of the first row has weight 0."""
    return Leg(
        logps=torch.tensor([[-1.0, -2.0, -4.0], [-3.0, NAN, NAN], [NAN, NAN, NAN]]),
        ref_logps=torch.tensor([[-1.5, -1.5, -1.5], [-2.0, NAN, NAN], [NAN, NAN, NAN]]),
        mask=torch.tensor([[True, True, True], [True, False, False], [False, False, False]]),
        tokens=torch.zeros(3, 3, dtype=torch.int64),
        weight=torch.tensor([[1.0, 0.5, 0.0], [2.0, NAN, NAN], [NAN, NAN, NAN]]),
    )


def test_sums_of_a_leg():
    """logratio = (−1 − 2 − 4) + 4.5 = −2.5 and −3 + 2 = −1; nll = 1·1 + 0.5·2 = 2 and 2·3 = 6."""
    assert leg().length().tolist() == [3, 1, 0]
    assert leg().sum_logps().tolist() == [-7.0, -3.0, 0.0]
    assert leg().mean_logps().tolist() == pytest.approx([-7 / 3, -3.0, 0.0])
    assert leg().ref_sum_logps().tolist() == [-4.5, -2.0, 0.0]
    assert leg().logratio().tolist() == [-2.5, -1.0, 0.0]
    assert leg().nll().tolist() == [2.0, 6.0, 0.0]


def test_counts_are_rows_and_tokens_of_nonzero_weight():
    batch = LegBatch(legs={"chosen": leg()})
    assert batch.rows == 3
    assert batch.counts() == {"row": 3.0, "chosen.token": 3.0}


def test_masked_sum_ignores_nan_in_value_and_gradient():
    values = torch.tensor([[1.0, NAN]], requires_grad=True)
    total = masked_sum(values, torch.tensor([[True, False]]))
    total.sum().backward()
    assert total.tolist() == [1.0]
    assert values.grad.tolist() == [[1.0, 0.0]]


def test_shapes_are_checked_here():
    """The shapes in the signatures are checked while tests run; without that they would be comments."""
    with pytest.raises(TypeError):
        masked_sum(torch.zeros(2, 3), torch.ones(2, 4, dtype=torch.bool))


def test_a_loss_is_sums_over_counts():
    """2 · 6/3 + 1 · 8/4 = 6."""
    output = Output(
        terms={
            "preference": Term(values=torch.tensor(6.0), per="row", coef=2.0),
            "likelihood": Term(values=torch.tensor(8.0), per="gold.token"),
        }
    )
    assert output.loss({"row": 3, "gold.token": 4}).item() == 6.0


def test_a_step_without_the_unit_contributes_zero():
    """A step whose tokens were all dropped: 0/0 would be NaN."""
    term = Term(values=torch.tensor(0.0), per="gold.token")
    assert term.value({"row": 2, "gold.token": 0}).item() == 0.0


def test_an_uncounted_unit_is_an_error():
    with pytest.raises(KeyError, match=r"gold\.token.*row"):
        Term(values=torch.tensor(1.0), per="gold.token").value({"row": 2})


def test_means_add_up():
    """(1 + 2 + 6)/3, not the mean of 1.5 and 6."""
    values = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    first, second = Mean.of(values[:2]), Mean.of(values[2:])
    mean = (first.total + second.total) / (first.count + second.count)
    torch.testing.assert_close(mean, values.mean(), **FP64_ROUNDING)
