"""Numbers of other implementations: losses and gradients recorded under ``tests/vectors``, by the scripts in ``make``.

Each case is one step whose microbatch is the whole batch. Where the other implementation updates a running mean before
it uses it, ``state`` is the mean after the update; β-DPO, which updates its means before it uses them itself, gets them
from before. Numbers are float64 on both sides. Those of modifiers are in ``test_modifier_vectors``, of token weights in
``test_token_weights``.

Where published code differs from its paper or from us, ``differences`` has what it gives, and the tests at the end say
by how much and why.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from objectives import OBJECTIVES
from objectives.beta_dpo import BetaDPO
from tests.objectives.batches import loss_and_grad
from tests.vectors.reading import (
    ANOTHER_IMPLEMENTATION,
    assert_recorded,
    batch_of,
    cases,
    contents,
    matrix,
    objective_of,
    vector,
)


@pytest.mark.parametrize(("name", "case"), [pytest.param(name, case, id=label) for label, name, case in cases()])
def test_vector(name: str, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    objective = objective_of(name, case)
    if "selected" in case:
        prescribe_selection(monkeypatch, case["selected"])
    assert_recorded(objective, case)


def prescribe_selection(monkeypatch: pytest.MonkeyPatch, selected: list[int]) -> None:
    """β-DPO learns from these rows; it would have drawn as many."""
    draw = BetaDPO.select

    def select(self: BetaDPO, differences: Tensor, *known: Any) -> Tensor:
        drawn = draw(self, differences, *known)
        assert drawn.sum() == len(selected)
        return torch.zeros_like(drawn).index_fill_(0, torch.tensor(selected), True)

    monkeypatch.setattr(BetaDPO, "select", select)


def test_cal_dpo_adds_the_squares_of_each_row_to_that_row():
    """The authors add the batch's mean of squares to every row: the same mean, other values per row."""
    (case,) = contents("differences/cal_dpo")["cases"]
    ours = objective_of("cal_dpo", case)(batch_of(case)).terms["preference"].values
    theirs = vector(case["losses"])
    assert_close(ours.mean(), theirs.mean(), **ANOTHER_IMPLEMENTATION)
    assert ours.tolist() == pytest.approx([1.099077, 4.283179], abs=5.1e-7)
    assert theirs.tolist() == pytest.approx([2.177202, 3.205054], abs=5.1e-7)


def test_dpop_has_no_penalty_in_the_gradient_where_the_chosen_response_is_as_likely_as_under_the_reference():
    """A tie, and every row of a first step. ``clamp`` lets λ into the gradient there, as if the likelihood had fallen.

    In the first row log-ratios are 0 and −0.5, so m = 0.15 for β = 0.3, and a chosen token's slope is −σ(−m)·β/2 here,
    1 + λ = 51 times that in Cerebras' modelzoo. The loss is the same.
    """
    (case,) = contents("differences/dpop")["cases"]
    loss, grad = loss_and_grad(objective_of("dpop", case), batch_of(case))
    assert loss.item() == pytest.approx(case["loss"], rel=1e-12)
    slope = -0.3 / 2 / (1 + math.exp(0.15))
    assert grad["chosen"][0].tolist() == pytest.approx([slope] * 3, rel=1e-12)
    theirs = matrix(case["grad"]["chosen"])
    assert theirs[0].tolist() == pytest.approx([51 * slope] * 3, rel=1e-12)
    assert_close(grad["chosen"][1], theirs[1], **ANOTHER_IMPLEMENTATION)


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case["name"]) for case in contents("differences/ntl_mse")["cases"]]
)
def test_ntl_mse_is_over_number_tokens_alone(case: dict[str, Any]):
    """The authors look the value of a masked label, −100, up in their table: it is the hundredth token's from the end.

    Where that one is a number, padding is learned as if it were the label. And a batch without numbers gives NaN, the
    mean of nothing.
    """
    leg = case["legs"]["gold"]
    value, mean, mask = (matrix(leg[key]) for key in ("number_value", "number_mean", "mask"))
    loss, grad = loss_and_grad(objective_of("ntl_mse", case), batch_of(case))
    errors = ((mean - value) ** 2)[mask.bool() & value.isfinite()]
    if case["name"] == "no-number":
        assert case["loss"] is None
        assert len(errors) == 0
        assert loss == 0
        assert not grad["gold/number_mean"].any()
    else:
        assert_close(loss, errors.mean(), **ANOTHER_IMPLEMENTATION)
        padding = ((mean - 5) ** 2)[~mask.bool()]
        assert case["loss"] == pytest.approx(torch.cat([errors, padding]).mean().item(), rel=1e-12)
        assert abs(case["loss"] - loss.item()) > 5


def test_dco_is_the_loss_and_not_its_factor_times_the_likelihood():
    """The authors return F·(−log p) with F detached, which has the loss's gradient and another value.

    For N·p < 0.1 they take F from series that end with the square: with N·p = 0.086 it is off by 8 parts in 10⁵.
    """
    (case,) = contents("differences/dco")["cases"]
    objective = OBJECTIVES["dco"](**case["config"])
    batch = batch_of(case)
    loss, grad = loss_and_grad(objective, batch)
    log_p = batch["gold"].sum_logps()
    attempts = case["config"]["attempts"]
    covered = -torch.expm1(attempts * torch.log1p(-log_p.exp()))
    factor = attempts * log_p.exp() * (1 - log_p.exp()) ** (attempts - 1) / covered
    assert_close(loss, -covered.log().mean(), **ANOTHER_IMPLEMENTATION)
    assert_close(grad["gold"][:, 0], -factor / 3, **ANOTHER_IMPLEMENTATION)
    theirs = matrix(case["grad"]["gold"])[:, 0] * -3
    off = (theirs / factor - 1).abs()
    assert off.tolist() == pytest.approx([8.35e-5, 4.1e-7, 4.5e-9], rel=0.02)
    assert case["loss"] == pytest.approx((theirs * -log_p).mean().item(), rel=1e-12)
    assert case["loss"] > 2 * loss
