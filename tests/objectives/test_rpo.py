"""RPO and IRPO against arithmetic by hand and the papers; other implementations' numbers are in ``test_vectors``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from objectives import LegBatch, mixture
from objectives.dpo import DPO
from objectives.rpo import IRPO, RPO
from objectives.sft import SFT
from tests.objectives import transcriptions
from tests.objectives.batches import (
    BY_HAND,
    SIX_PLACES,
    assert_transcribed,
    loss_and_grad,
    make_batch,
    make_rows,
    ragged,
    rows_of,
    tv1,
)

PAIR = ("chosen", "rejected")


def two_rows() -> LegBatch:
    """Log-ratios 1 and −1 in the first row, 0 and 0 in the second; chosen log-probs −3 (two tokens) and −4 (one)."""
    chosen = make_rows([[-1.0, -2.0], [-4.0]], [[-1.5, -2.5], [-4.0]])
    rejected = make_rows([[-3.0], [-1.0]], [[-2.0], [-1.0]])
    return LegBatch(legs={"chosen": chosen, "rejected": rejected})


def first_row(weight: list[float] | None = None) -> LegBatch:
    batch = rows_of(two_rows(), slice(0, 1))
    if weight is None:
        return batch
    chosen = replace(batch["chosen"], weight=torch.tensor([weight], dtype=torch.float64))
    return replace(batch, legs={**batch.legs, "chosen": chosen})


def test_cumulative_rpo_by_hand():
    """β = 0.5, η = 0.2: DPO's part has m = 0.5 · 2 = 1.

    loss = log(1 + e⁻¹) + 0.2 · 0.5 · 3 = 0.3132616875 + 0.3 = 0.6132616875
    chosen tokens: −0.5 · σ(−1) − 0.2 · 0.5 = −0.1344707107 − 0.1; the rejected one only DPO's 0.1344707107
    """
    loss, grad = loss_and_grad(RPO(beta=0.5, eta=0.2), first_row())
    assert loss.item() == pytest.approx(0.6132616875, **BY_HAND)
    assert grad["chosen"].tolist() == [pytest.approx([-0.2344707107, -0.2344707107], **BY_HAND)]
    assert grad["rejected"].tolist() == [pytest.approx([0.1344707107], **BY_HAND)]


def test_average_rpo_by_hand():
    """The same row with η = 0.4, per token and without β: 0.3132616875 + 0.4 · 3/2 = 0.9132616875.

    chosen tokens: −0.1344707107 − 0.4/2 = −0.3344707107
    """
    loss, grad = loss_and_grad(RPO(beta=0.5, eta=0.4, form="average"), first_row())
    assert loss.item() == pytest.approx(0.9132616875, **BY_HAND)
    assert grad["chosen"].tolist() == [pytest.approx([-0.3344707107, -0.3344707107], **BY_HAND)]


def test_rpo_is_a_mean_over_rows():
    """Second row: m = 0, log 2 = 0.6931471806, chosen log-prob −4. β = 0.5, η = 0.2.

    cumulative: (0.6132616875 + 0.6931471806 + 0.1 · 4)/2 = 0.8532044340
    average:    (0.3132616875 + 0.2 · 1.5 + 0.6931471806 + 0.2 · 4)/2 = 1.0532044340
    """
    cumulative, average = (RPO(beta=0.5, eta=0.2, form=form) for form in ("cumulative", "average"))
    assert loss_and_grad(cumulative, two_rows())[0].item() == pytest.approx(0.8532044340, **BY_HAND)
    assert loss_and_grad(average, two_rows())[0].item() == pytest.approx(1.0532044340, **BY_HAND)


def test_irpo_by_hand():
    """Both rows, β = 0.5, α = 2. Preference: (0.3132616875 + 0.6931471806)/2 = 0.5032044340.

    token:    NLL = (1 + 2 + 4)/3           →   0.5032044340 + 2 · 7/3  = 5.1698711007
    sequence: NLL = ((1 + 2)/2 + 4)/2       →   0.5032044340 + 2 · 2.75 = 6.0032044340
    first chosen token, token:    −0.5 · σ(−1)/2 − 2/3       = −0.0672353554 − 0.6666666667 = −0.7339020220
    first chosen token, sequence: −0.5 · σ(−1)/2 − 2/(2 · 2) = −0.5672353554
    """
    loss, grad = loss_and_grad(IRPO(beta=0.5, alpha=2.0), two_rows())
    assert loss.item() == pytest.approx(5.1698711007, **BY_HAND)
    assert grad["chosen"][0, 0].item() == pytest.approx(-0.7339020220, **BY_HAND)
    loss, grad = loss_and_grad(IRPO(beta=0.5, alpha=2.0, form="sequence"), two_rows())
    assert loss.item() == pytest.approx(6.0032044340, **BY_HAND)
    assert grad["chosen"][0, 0].item() == pytest.approx(-0.5672353554, **BY_HAND)


def test_weights_by_hand():
    """First row with weights 2 and 0, which leave one token of log-prob −1: NLL = 2 · 1, length 1. Margins ignore them.

    cumulative: 0.3132616875 + 0.2 · 0.5 · 2 = 0.5132616875
    average:    0.3132616875 + 0.2 · 2/1     = 0.7132616875; irpo, either form, with α = 0.2 the same
    """
    batch = first_row(weight=[2.0, 0.0])
    assert loss_and_grad(RPO(beta=0.5, eta=0.2), batch)[0].item() == pytest.approx(0.5132616875, **BY_HAND)
    irpo = [IRPO(beta=0.5, alpha=0.2, form=form) for form in ("token", "sequence")]
    for objective in (RPO(beta=0.5, eta=0.2, form="average"), *irpo):
        loss, grad = loss_and_grad(objective, batch)
        assert loss.item() == pytest.approx(0.7132616875, **BY_HAND)
        assert grad["chosen"][0].tolist() == pytest.approx([-0.1344707107 - 0.4, -0.1344707107], **BY_HAND)


def test_known_numbers_of_rpo():
    """Two rows whose DPO margins are 0.5 and −1.25 nats; chosen log-probs −3 (three tokens) and −2.25 (two)."""
    cumulative, batch = RPO(beta=0.01, eta=0.005), tv1(*PAIR)
    assert loss_and_grad(cumulative, batch)[0].item() == pytest.approx(0.695165, **SIX_PLACES)
    rows = [loss_and_grad(cumulative, rows_of(batch, slice(i, i + 1)))[0].item() for i in range(2)]
    assert rows == pytest.approx([0.690800, 0.699529], **SIX_PLACES)
    average = RPO(beta=0.5, eta=0.2, form="average")
    assert loss_and_grad(average, batch)[0].item() == pytest.approx(1.027320, **SIX_PLACES)


def test_cumulative_rpo_is_not_dpo_plus_a_token_mean():
    """What other trainers offer under the name gives 0.700283 in place of 0.695165."""
    listed = mixture([("dpo", DPO(beta=0.01), 1.0), ("sft", SFT(leg="chosen"), 0.005)])
    assert loss_and_grad(listed, tv1(*PAIR))[0].item() == pytest.approx(0.700283, **SIX_PLACES)


def test_irpo_is_the_list_of_dpo_and_sft():
    """1.763029 on the two rows, by either way: the likelihood is a mean over the tokens of the step."""
    listed = mixture([("dpo", DPO(beta=0.1), 1.0), ("sft", SFT(leg="chosen"), 1.0)])
    for objective in (IRPO(beta=0.1, alpha=1.0), listed):
        assert loss_and_grad(objective, tv1(*PAIR))[0].item() == pytest.approx(1.763029, **SIX_PLACES)
    batch = make_batch(IRPO(), seed=1, rows=5, weighted=True)
    torch.testing.assert_close(loss_and_grad(IRPO(), batch), loss_and_grad(listed, batch), rtol=1e-12, atol=1e-14)


def transcribed_legs(batch: LegBatch) -> list[transcriptions.Ragged]:
    responses = [ragged(batch[name].logps, batch[name]) for name in PAIR]
    return [*responses, *(ragged(batch[name].ref_logps, batch[name]) for name in PAIR)]


SEEDS = st.integers(0, 1000)
SCALES = st.sampled_from([0.1, 1.0, 30.0])


@pytest.mark.parametrize("form", ["cumulative", "average"])
@given(seed=SEEDS, beta=st.sampled_from([0.01, 0.5]), eta=st.sampled_from([0.005, 0.2, 3.0]), scale=SCALES)
def test_rpo_is_what_the_paper_says(form: str, seed: int, beta: float, eta: float, scale: float):
    objective = RPO(beta=beta, eta=eta, form=form)
    batch = make_batch(objective, seed=seed, rows=5, scale=scale)
    expected = transcriptions.rpo(*transcribed_legs(batch), beta=beta, eta=eta, form=form)
    assert_transcribed(objective, batch, *expected)


@pytest.mark.parametrize("form", ["token", "sequence"])
@given(seed=SEEDS, beta=st.sampled_from([0.1, 2.0]), scale=SCALES, weighted=st.booleans())
def test_irpo_is_what_the_paper_says(form: str, seed: int, beta: float, scale: float, weighted: bool):
    objective = IRPO(beta=beta, alpha=0.7, form=form)
    batch = make_batch(objective, seed=seed, rows=5, scale=scale, weighted=weighted)
    weight = ragged(batch["chosen"].weight, batch["chosen"]) if weighted else None
    expected = transcriptions.irpo(*transcribed_legs(batch), beta=beta, alpha=0.7, form=form, chosen_weight=weight)
    assert_transcribed(objective, batch, *expected)
