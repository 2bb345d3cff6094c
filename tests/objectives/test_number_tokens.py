"""Number token losses against arithmetic by hand and the paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from objectives import LegBatch, Needs, mixture
from objectives.number_tokens import NTLMSE, NTLWAS
from objectives.sft import SFT
from tests.objectives import transcriptions_pairs_free
from tests.objectives.batches import SIX_PLACES, assert_transcribed, loss_and_grad, make_batch, make_rows, means, ragged
from tests.objectives.transcriptions_pairs_free import number_moments

DIGITS = [float(digit) for digit in range(10)]
both = pytest.mark.parametrize("cls", [NTLMSE, NTLWAS], ids=["ntl_mse", "ntl_was"])


def numbers(values: list[list[float]], means_: list[list[float]], distances: list[list[float]]) -> LegBatch:
    """Rows with these targets' values (NaN for a word), expected values and expected distances."""
    columns = {"number_value": values, "number_mean": means_, "number_distance": distances}
    leg = make_rows([[-1.0 for _ in row] for row in values])
    return LegBatch(legs={"gold": replace(leg, extras={key: make_rows(each).logps for key, each in columns.items()})})


def from_logits(logits: Sequence[float], answer: float) -> LegBatch:
    """One number token, from the logits of the ten digits."""
    mean, distance = number_moments(logits, DIGITS, answer)
    return numbers([[answer]], [[mean]], [[distance]])


def test_number_token_losses_by_hand():
    """Two rows: 4, a word and 2 expected as 5, whatever and 1.5; 7 expected as 7. Three number tokens.

    squares: (1² + 0.5² + 0²)/3 = 1.25/3, slopes 2/3, 0 for the word, −1/3 and 0
    distances 1.5, 0.5 and 0.25: 2.25/3 = 0.75, slope 1/3 for every number
    """
    batch = numbers([[4.0, math.nan, 2.0], [7.0]], [[5.0, 8.0, 1.5], [7.0]], [[1.5, 9.0, 0.5], [0.25]])
    loss, grad = loss_and_grad(NTLMSE(), batch)
    assert loss.item() == pytest.approx(1.25 / 3, rel=1e-12)
    assert grad["gold/number_mean"].tolist() == [pytest.approx([2 / 3, 0.0, -1 / 3]), [0.0, 0.0, 0.0]]
    loss, grad = loss_and_grad(NTLWAS(), batch)
    assert loss.item() == pytest.approx(0.75, rel=1e-12)
    assert grad["gold/number_distance"].tolist() == [pytest.approx([1 / 3, 0.0, 1 / 3]), pytest.approx([1 / 3, 0, 0])]
    assert not grad["gold"].any()


def test_known_numbers():
    """Target 4; logits 1, 2 and 1 on 3, 4 and 5, else 0: expected value 4.252199."""
    logits = [0.0, 0.0, 0.0, 1.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    batch = from_logits(logits, 4.0)
    assert batch["gold"].extras["number_mean"].item() == pytest.approx(4.252199, **SIX_PLACES)
    assert loss_and_grad(NTLMSE(), batch)[0].item() == pytest.approx(0.063604, **SIX_PLACES)
    assert loss_and_grad(NTLWAS(), batch)[0].item() == pytest.approx(1.434334, **SIX_PLACES)


def test_the_squares_have_an_optimum_that_is_none():
    """Half of the mass on 0 and half on 8, target 4: expected value 4, loss 0 — and a distance of 4."""
    logits = [0.0 if digit in (0, 8) else -1e4 for digit in range(10)]
    batch = from_logits(logits, 4.0)
    loss, grad = loss_and_grad(NTLMSE(), batch)
    assert loss.item() == pytest.approx(0.0, abs=1e-20)
    assert not grad["gold/number_mean"].any()
    assert loss_and_grad(NTLWAS(), batch)[0].item() == pytest.approx(4.0, rel=1e-12)


def test_the_distance_is_wassersteins():
    """To all mass on the target it is the area between the two distribution functions, values being one apart."""
    logits = [0.3, -1.0, 0.5, 1.0, 2.0, 1.0, 0.2, -2.0, 0.0, 0.7]
    total = math.fsum(math.exp(each) for each in logits)
    for answer in range(10):
        below, area = 0.0, 0.0
        for digit, logit in enumerate(logits):
            below += math.exp(logit) / total
            area += abs(below - (1.0 if digit >= answer else 0.0))
        loss = loss_and_grad(NTLWAS(), from_logits(logits, float(answer)))[0].item()
        assert loss == pytest.approx(area, rel=1e-12)


@both
def test_a_step_without_numbers_contributes_nothing(cls: type[NTLMSE | NTLWAS]):
    """0 with a graph, where a mean over no tokens would be NaN; what stands at words is never read."""
    batch = numbers([[math.nan, math.nan]], [[math.nan, 1e30]], [[math.inf, math.nan]])
    inputs = batch["gold"].extras
    leaves = {key: inputs[key].clone().requires_grad_() for key in ("number_mean", "number_distance")}
    leg = replace(batch["gold"], extras={**inputs, **leaves})
    batch = replace(batch, legs={"gold": leg})
    assert batch.counts()["gold.number"] == 0.0
    loss = cls()(batch).loss(batch.counts())
    assert loss.item() == 0.0
    loss.backward()
    assert all(leaf.grad is None or not leaf.grad.any() for leaf in leaves.values())
    assert any(leaf.grad is not None for leaf in leaves.values())


@both
@given(seed=st.integers(0, 1000))
def test_they_are_what_the_paper_says(cls: type[NTLMSE | NTLWAS], seed: int):
    batch = make_batch(cls(), seed=seed, rows=5)
    leg = batch["gold"]
    key = "number_mean" if cls is NTLMSE else "number_distance"
    transcribed = transcriptions_pairs_free.ntl_mse if cls is NTLMSE else transcriptions_pairs_free.ntl_was
    loss, slopes = transcribed(ragged(leg.extras["number_value"], leg), ragged(leg.extras[key], leg))
    assert_transcribed(cls(), batch, loss, {f"gold/{key}": slopes})


@both
def test_the_mean_is_over_the_numbers_of_the_whole_step(cls: type[NTLMSE | NTLWAS]):
    """A microbatch's share is its sum over the step's count: of one number here and four elsewhere, a fifth."""
    batch = numbers([[4.0]], [[6.0]], [[2.0]])
    expected = 4.0 if cls is NTLMSE else 2.0
    assert cls()(batch).loss({"row": 3.0, "gold.number": 5.0}).item() == pytest.approx(expected / 5)
    assert means(cls(), batch)["numbers/loss"] == expected
    assert means(cls(), batch)["numbers/share"] == 1.0


def test_beside_the_likelihood():
    """What it is meant for: 0.3 of it beside the likelihood, each averaged over its own tokens."""
    batch = numbers([[4.0, math.nan]], [[6.0, 0.0]], [[2.0, 0.0]])
    listed = mixture([("sft", SFT(), 1.0), ("ntl_was", NTLWAS(), 0.3)])
    assert loss_and_grad(listed, batch)[0].item() == pytest.approx(1.0 + 0.3 * 2.0)
    assert listed.needs == Needs(legs=("gold",), likelihood=("gold",), extras=("number_value", "number_distance"))


def test_what_they_need():
    assert NTLMSE().needs == Needs(legs=("gold",), extras=("number_value", "number_mean"))
    assert NTLWAS(leg="chosen").needs == Needs(legs=("chosen",), extras=("number_value", "number_distance"))
    assert torch.isnan(make_batch(NTLMSE(), seed=0, rows=8)["gold"].extras["number_value"]).any()
