"""Sample weights: laws for all that are registered, and each against the authors' code, by hand and transcribed."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from objectives import TOKEN_WEIGHTS, Leg, LegBatch, SampleWeight, Weighting, weighting
from objectives.sample_weights import Extremes, LinUpper, Quadratic, row_losses
from objectives.sft import SFT
from tests.objectives import transcriptions_weights as transcriptions
from tests.objectives.batches import FP64_ROUNDING, SIX_PLACES, TRANSCRIPTION, make_leg, make_rows, ragged, rows_of
from tests.support import VECTORS

NAMES = [name for name in TOKEN_WEIGHTS.names() if isinstance(TOKEN_WEIGHTS[name](), SampleWeight)]
every = pytest.mark.parametrize("name", NAMES)
seeds = st.integers(0, 1000)
KNOWN = [[-0.5, -0.5], [-1.0], [-2.0, -3.0, -1.0], [-3.5]]
"""Rows whose mean losses are 0.5, 1, 2 and 3.5."""


def losses_of(seed: int, rows: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).exponential(2.0, rows))


def stepped(batch: LegBatch, parts: Weighting, steps: float = 0.0) -> LegBatch:
    """The batch of a whole step with its weights."""
    state = {key: torch.tensor(steps, dtype=torch.float64) for key in parts.init_state()}
    whole = replace(batch, step=parts.step_pass(batch), place=torch.arange(batch.rows))
    return parts.apply(whole, state)[0]


def weighed(weight: Any, leg: Leg, *, steps: float = 0.0, per: str = "sequence") -> tuple[Tensor, Tensor]:
    """Loss and slopes of supervised fine-tuning in a step of these rows, with a graph through all of it."""
    leg = replace(leg, logps=leg.logps.detach().clone().requires_grad_())
    objective = SFT(per=per)
    batch = stepped(LegBatch(legs={"gold": leg}), weighting([("x", weight)], objective.needs.likelihood), steps)
    loss = objective(batch).loss(batch.counts())
    (slopes,) = torch.autograd.grad(loss, leg.logps)
    return loss.detach(), slopes


# Laws.


@every
@given(seed=seeds, rows=st.integers(1, 9), temperature=st.sampled_from([0.1, 0.4, 1.0, 1e6]))
def test_weights_are_positive_and_average_to_one(name: str, seed: int, rows: int, temperature: float):
    weights = TOKEN_WEIGHTS[name](temperature=temperature).row_weights(losses_of(seed, rows))
    assert (weights > 0).all()
    assert weights.mean().item() == pytest.approx(1.0, abs=1e-12)


@every
@given(seed=seeds, factor=st.floats(0.01, 100), shift=st.floats(-5, 5))
def test_only_the_place_among_the_others_counts(name: str, seed: int, factor: float, shift: float):
    """Losses in other units, or all higher by as much, have the same weights."""
    weight, losses = TOKEN_WEIGHTS[name](), losses_of(seed, 6)
    assert_close(weight.row_weights(losses * factor + shift), weight.row_weights(losses), rtol=1e-7, atol=1e-12)


@every
@given(seed=seeds, order=st.permutations(range(6)))
def test_rows_may_be_permuted(name: str, seed: int, order: list[int]):
    weight, losses = TOKEN_WEIGHTS[name](), losses_of(seed, 6)
    assert_close(weight.row_weights(losses[order]), weight.row_weights(losses)[order], **FP64_ROUNDING)


@every
def test_equal_losses_have_equal_weights(name: str):
    """Also one row alone, and losses that differ in rounding only: 0/0 would not be a number."""
    for losses in ([2.0], [1.0] * 4, [0.0, 0.0], [1.0, 1.0 + 1e-12]):
        weights = TOKEN_WEIGHTS[name]().row_weights(torch.tensor(losses, dtype=torch.float64))
        assert weights.tolist() == pytest.approx([1.0] * len(losses), abs=1e-5)


@every
def test_warm_is_uniform_and_cold_is_the_best_alone(name: str):
    losses = torch.tensor([0.5, 1.0, 2.0, 3.5], dtype=torch.float64)
    warm = TOKEN_WEIGHTS[name](temperature=1e9).row_weights(losses)
    assert warm.tolist() == pytest.approx([1.0] * 4, abs=1e-8)
    for temperature in (1e-3, 1e-300, 5e-324):
        cold = TOKEN_WEIGHTS[name](temperature=temperature).row_weights(losses)
        best = {"lin_upper": [0, 0, 2, 2], "quadratic": [0, 0, 4, 0], "extremes": [2, 0, 0, 2]}[name]
        assert cold.tolist() == pytest.approx(best, abs=1e-12)
        assert (cold > 0).all(), "a weight of zero is a row less in the counts"


@every
def test_rows_without_tokens_take_no_part(name: str):
    weight = TOKEN_WEIGHTS[name]()
    there = torch.tensor([0.5, 1.0, 3.5], dtype=torch.float64)
    among = torch.tensor([math.nan, 0.5, 1.0, math.nan, 3.5], dtype=torch.float64)
    assert_close(weight.row_weights(among)[[1, 2, 4]], weight.row_weights(there), **FP64_ROUNDING)
    assert weight.row_weights(among)[[0, 3]].tolist() == [1.0, 1.0]
    assert weight.row_weights(torch.full((3,), math.nan)).tolist() == [1.0] * 3
    assert weight.row_weights(torch.zeros(0)).shape == (0,)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_are_computed_in_double_and_have_the_losses_type(name: str, dtype: torch.dtype):
    losses = torch.tensor([1e-4, 3e4, 1.0, 0.0], dtype=dtype)
    weights = TOKEN_WEIGHTS[name]().row_weights(losses)
    assert weights.dtype == dtype
    assert_close(weights, TOKEN_WEIGHTS[name]().row_weights(losses.double()).to(dtype), rtol=0, atol=0)


@every
@given(seed=seeds)
def test_no_gradient_goes_through_them(name: str, seed: int):
    """The slope of a token is that of a constant weight."""
    leg = make_leg(generator=torch.Generator().manual_seed(seed), rows=5, width=6)
    loss, slopes = weighed(TOKEN_WEIGHTS[name](), leg)
    rows = TOKEN_WEIGHTS[name]().row_weights(row_losses(leg))
    lengths = leg.mask.sum(dim=-1).double()
    expected = torch.where(leg.mask, -(rows / lengths / (lengths > 0).sum())[:, None], 0.0)
    assert_close(slopes, expected, **FP64_ROUNDING)
    assert loss.isfinite()


@pytest.mark.slow
@every
@given(seed=seeds, cut=st.integers(0, 6))
def test_parts_of_a_step_add_up(name: str, seed: int, cut: int):
    """Weights are those of the whole step, whatever part of it is at hand."""
    leg = make_leg(generator=torch.Generator().manual_seed(seed), rows=6, width=6)
    batch, parts = LegBatch(legs={"gold": leg}), weighting([("x", TOKEN_WEIGHTS[name]())], ("gold",))
    step = parts.step_pass(batch)
    state, objective = parts.init_state(), SFT(per="sequence")
    whole = parts.apply(replace(batch, step=step, place=torch.arange(6)), state)[0]
    total = torch.zeros((), dtype=torch.float64)
    for part in (slice(0, cut), slice(cut, 6)):
        place = torch.arange(6)[part]
        some = parts.apply(replace(rows_of(batch, part), step=step, place=place), state)[0]
        total = total + objective(some).loss(whole.counts())
    assert_close(total, objective(whole).loss(whole.counts()), **FP64_ROUNDING)


@every
def test_the_first_steps_are_without(name: str):
    """``warmup_steps`` counts optimizer steps: the third is weighed where it is 2."""
    leg, weight = make_rows(KNOWN), TOKEN_WEIGHTS[name](warmup_steps=2)
    for steps in (0.0, 1.0):
        assert weighed(weight, leg, steps=steps)[0].item() == pytest.approx(1.75)
    assert weighed(weight, leg, steps=2.0)[0].item() != pytest.approx(1.75, abs=1e-3)
    parts = weighting([("x", weight)], ("gold",))
    state = parts.init_state()
    for number in range(4):
        assert state["x/gold"].item() == number
        state = parts.update(state, {})


# Numbers of others.


@pytest.mark.parametrize(
    ("weight", "shares", "loss"),
    [
        (LinUpper(), [0.036145, 0.083170, 0.440342, 0.440342], 2.523125),
        (Quadratic(), [0.054967, 0.220437, 0.669630, 0.054967], 1.779563),
        (Extremes(), [0.397348, 0.172687, 0.032616, 0.397348], 1.827313),
    ],
    ids=["lin_upper", "quadratic", "extremes"],
)
def test_by_hand(weight: Any, shares: list[float], loss: float):
    """Losses 0.5, 1, 2, 3.5 stand at h = −1, −2/3, 0, 1; r = 0.4. E.g. LinUpper: e^{f/r} of f = 0, 1/3, 1, 1."""
    leg = make_rows(KNOWN)
    assert row_losses(leg).tolist() == [0.5, 1.0, 2.0, 3.5]
    assert weight.row_weights(row_losses(leg)).tolist() == pytest.approx([4 * x for x in shares], abs=4e-6)
    found, slopes = weighed(weight, leg)
    assert found.item() == pytest.approx(loss, **SIX_PLACES)
    assert slopes[2, 1].item() == pytest.approx(-shares[2] / 3, abs=1e-6)


def test_per_token_rows_count_by_their_length_besides():
    """Weights n·share, of tokens: Σ 4·share·length·loss / 7 tokens."""
    shares = [0.036145, 0.083170, 0.440342, 0.440342]
    expected = 4 * sum(w * n * loss for w, n, loss in zip(shares, [2, 1, 3, 1], [0.5, 1, 2, 3.5], strict=True)) / 7
    assert weighed(LinUpper(), make_rows(KNOWN), per="token")[0].item() == pytest.approx(expected, abs=5e-6)


def cases() -> list[Any]:
    return [
        pytest.param(name, case, id=f"{name}-{case['name']}")
        for name in NAMES
        for case in json.loads((VECTORS / "weights" / f"{name}.json").read_text(encoding="utf-8"))["cases"]
    ]


@pytest.mark.parametrize(("name", "case"), cases())
def test_vector(name: str, case: dict[str, Any]):
    """The authors' functions, put together as their README does."""
    arrays = {key: torch.tensor(values, dtype=torch.float64) for key, values in case["legs"]["response"].items()}
    mask = arrays["mask"].bool()
    leg = Leg(logps=arrays["logps"], mask=mask, tokens=torch.zeros_like(mask, dtype=torch.int64))
    weight = TOKEN_WEIGHTS[name](**case["config"])
    shares = torch.tensor(case["share"], dtype=torch.float64)
    assert_close(weight.row_weights(row_losses(leg)), shares * len(shares), rtol=1e-10, atol=1e-12)
    loss, slopes = weighed(weight, leg)
    assert loss.item() == pytest.approx(case["loss"], rel=1e-10)
    assert_close(slopes, torch.tensor(case["grad"]["response"], dtype=torch.float64), rtol=1e-10, atol=1e-12)


@every
@given(seed=seeds, rows=st.integers(1, 7), temperature=st.sampled_from([0.2, 0.4, 1.0]))
def test_it_is_what_the_paper_says(name: str, seed: int, rows: int, temperature: float):
    leg = make_leg(generator=torch.Generator().manual_seed(seed), rows=rows, width=6)
    logps = ragged(leg.logps, leg)
    means = [-math.fsum(row) / len(row) for row in logps]
    shares = transcriptions.sample_shares(means, strategy=name, temperature=temperature)
    loss, slopes = weighed(TOKEN_WEIGHTS[name](temperature=temperature), leg)
    expected_loss, expected_slopes = transcriptions.weighted_rows(logps, shares)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-9)
    flat = torch.tensor([x for row in expected_slopes for x in row], dtype=torch.float64)
    assert_close(slopes[leg.mask], flat, **{**TRANSCRIPTION, "rtol": 1e-9})


def test_keys_are_the_same_for_all():
    assert {tuple(field.name for field in fields(TOKEN_WEIGHTS[name])) for name in NAMES} == {
        ("temperature", "warmup_steps", "legs")
    }


def test_row_losses_carry_no_slope():
    """A weight must not learn to be small."""
    leg = make_rows([[-1.0, -2.0]])
    leg = replace(leg, logps=leg.logps.clone().requires_grad_())
    losses = row_losses(leg)
    assert not losses.requires_grad
    assert losses.tolist() == [pytest.approx(1.5)]


def test_a_row_without_counted_tokens_has_no_loss():
    leg = make_rows([[-1.0, -3.0], [-2.0, -2.0]])
    weight = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=leg.logps.dtype)
    losses = row_losses(replace(leg, weight=weight))
    assert losses[0].item() == pytest.approx(2.0)
    assert math.isnan(losses[1].item())
