"""CPO, SimPO, AlphaPO and ORPO against arithmetic by hand and the papers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from objectives import LegBatch, Needs, Objective, mixture
from objectives.reference_free import CPO, ORPO, AlphaPO, SimPO
from objectives.sft import SFT
from objectives.tpo import TPO
from tests.objectives import transcriptions_pairs_free
from tests.objectives.batches import (
    BY_HAND,
    FP64_ROUNDING,
    SIX_PLACES,
    assert_transcribed,
    loss_and_grad,
    make_batch,
    make_rows,
    map_legs,
    means,
    ragged,
    row_losses,
    tv1,
    two,
)
from tests.objectives.transcriptions import Ragged

LEGS = ("chosen", "rejected")
SEEDS = st.integers(0, 1000)
SCALES = st.sampled_from([0.1, 1.0, 30.0])


def pair(chosen: list[float], rejected: list[float]) -> LegBatch:
    return LegBatch(legs={"chosen": make_rows([chosen]), "rejected": make_rows([rejected])})


def one_row() -> LegBatch:
    """Summed log-probs −3 and −4; per token −1.5 and −4."""
    return pair([-1.0, -2.0], [-4.0])


def cast(batch: LegBatch, dtype: torch.dtype) -> LegBatch:
    return map_legs(batch, lambda leg: replace(leg, logps=leg.logps.to(dtype)))


def weight_of(batch: LegBatch) -> Ragged | None:
    leg = batch["chosen"]
    return None if leg.weight is None else ragged(leg.weight, leg)


# CPO


def test_cpo_by_hand():
    """β = 0.5, α = 2: m = 0.5 · (−3 + 4) = 0.5, NLL(chosen) = (1 + 2)/2 = 1.5.

    loss = log(1 + e^−0.5) + 2 · 1.5 = 0.4740769842 + 3
    slopes −β·σ(−0.5) = −0.1887703344 and −2/2 for each chosen token, 0.1887703344 for the rejected one
    """
    loss, grad = loss_and_grad(CPO(beta=0.5, cpo_alpha=2.0), one_row())
    assert loss.item() == pytest.approx(3.4740769842, **BY_HAND)
    assert grad["chosen"].tolist() == [pytest.approx([-1.1887703344, -1.1887703344], **BY_HAND)]
    assert grad["rejected"].tolist() == [pytest.approx([0.1887703344], **BY_HAND)]


def test_links_of_cpo_by_hand():
    """Without likelihood. hinge: 1 − 0.5, slope −β a token. ipo: per token −1.5 and −4, (2.5 − 1)² = 2.25, slope 3."""
    loss, grad = loss_and_grad(CPO(beta=0.5, cpo_alpha=0.0, link="hinge"), one_row())
    assert loss.item() == 0.5
    assert (grad["chosen"].tolist(), grad["rejected"].tolist()) == ([[-0.5, -0.5]], [[0.5]])
    loss, grad = loss_and_grad(CPO(beta=0.5, cpo_alpha=0.0, link="ipo"), one_row())
    assert loss.item() == 2.25
    assert (grad["chosen"].tolist(), grad["rejected"].tolist()) == ([[1.5, 1.5]], [[-3.0]])


def test_cpo_is_tpo_whose_gold_is_the_chosen_response():
    batch = make_batch(CPO(), seed=3, weighted=True)
    triple = LegBatch(legs={**batch.legs, "gold": batch["chosen"]})
    loss, grad = loss_and_grad(CPO(beta=0.3, cpo_alpha=0.7, label_smoothing=0.1), batch)
    other, gradients = loss_and_grad(TPO(beta=0.3, alpha=0.7, label_smoothing=0.1), triple)
    assert_close(loss, other, **FP64_ROUNDING)
    assert_close(grad["chosen"], gradients["chosen"] + gradients["gold"], **FP64_ROUNDING)


def test_what_cpo_needs():
    assert CPO().needs == Needs(legs=LEGS, likelihood=("chosen",))
    assert CPO(cpo_alpha=0.0).needs == Needs(legs=LEGS)
    with pytest.raises(ValueError, match="label_smoothing has no meaning with link ipo"):
        CPO(link="ipo", label_smoothing=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("link", "label_smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.1), ("hinge", 0.0), ("ipo", 0.0)]
)
@given(
    seed=SEEDS,
    beta=st.sampled_from([0.01, 0.1, 2.0]),
    alpha=st.sampled_from([0.0, 0.5, 1.0]),
    scale=SCALES,
    weighted=st.booleans(),
)
def test_cpo_is_what_the_paper_says(
    link: str, label_smoothing: float, seed: int, beta: float, alpha: float, scale: float, weighted: bool
):
    objective = CPO(beta=beta, cpo_alpha=alpha, link=link, label_smoothing=label_smoothing)
    batch = make_batch(objective, seed=seed, rows=5, scale=scale, weighted=weighted)
    expected = transcriptions_pairs_free.cpo(
        *two(batch),
        beta=beta,
        alpha=alpha,
        link=link,
        label_smoothing=label_smoothing,
        chosen_weight=weight_of(batch),
    )
    assert_transcribed(objective, batch, *expected)


# SimPO and AlphaPO


def test_simpo_by_hand():
    """β = 2, γ = 1: m = 2 · (−1.5 + 4) − 1 = 4, loss log(1 + e⁻⁴) = 0.0181499279.

    slopes −β·σ(−4)/2 = −0.0179862100 for each of two chosen tokens, 0.0359724199 for the rejected one
    with ε = 0.2: 0.8 · 0.0181499279 + 0.2 · 4.0181499279 = 0.8181499279
    """
    loss, grad = loss_and_grad(SimPO(beta=2.0, gamma=1.0), one_row())
    assert loss.item() == pytest.approx(0.0181499279, rel=3e-9)
    assert grad["chosen"].tolist() == [pytest.approx([-0.01798620996, -0.01798620996], **BY_HAND)]
    assert grad["rejected"].tolist() == [pytest.approx([0.03597241992], **BY_HAND)]
    smoothed = SimPO(beta=2.0, gamma=1.0, label_smoothing=0.2)
    assert loss_and_grad(smoothed, one_row())[0].item() == pytest.approx(0.8181499279, **BY_HAND)


def test_alpha_po_by_hand():
    """α = 0.5, β = 0.5, γ = 1; chosen one token of −2·log 2, rejected two of −4·log 2.

    e^(−α·a) = 2 and 4, so rewards (1 − 2)/0.5 = −2 and (1 − 4)/0.5 = −6:  m = 0.5 · 4 − 1 = 1
    loss = log(1 + e⁻¹) = 0.3132616875
    slopes −β·σ(−1)·2 = −0.2689414214 for the chosen token, β·σ(−1)·4/2 = 0.2689414214 for each rejected one
    """
    batch = pair([-2 * math.log(2)], [-4 * math.log(2), -4 * math.log(2)])
    loss, grad = loss_and_grad(AlphaPO(alpha=0.5, beta=0.5, gamma=1.0), batch)
    assert loss.item() == pytest.approx(0.3132616875, **BY_HAND)
    assert grad["chosen"].tolist() == [pytest.approx([-0.2689414214], **BY_HAND)]
    assert grad["rejected"].tolist() == [pytest.approx([0.2689414214, 0.2689414214], **BY_HAND)]


def test_equal_responses_cost_a_known_amount():
    """log(1 + e^γ), 0.9740769842 for γ = 0.5, however long they are."""
    batch = pair([-1.0, -3.0], [-2.0])
    for objective in (SimPO(gamma=0.5), AlphaPO(gamma=0.5)):
        assert loss_and_grad(objective, batch)[0].item() == pytest.approx(0.9740769842, **BY_HAND)
    assert means(SimPO(gamma=0.5), batch)["rewards/above_target"] == 0.0
    assert means(SimPO(gamma=0.5), one_row())["rewards/above_target"] == 1.0


@pytest.mark.parametrize("alpha", [0.0, 1e-9, 1e-5, -1e-5])
def test_alpha_po_without_alpha_is_simpo(alpha: float):
    """Its limit: within α·a² of it, at 0 itself exactly."""
    batch = make_batch(SimPO(), seed=2)
    loss, grad = loss_and_grad(SimPO(beta=2.5, gamma=0.1), batch)
    bent, slopes = loss_and_grad(AlphaPO(beta=2.5, gamma=0.1, alpha=alpha), batch)
    close = FP64_ROUNDING if abs(alpha) < 1e-6 else {"rtol": 1e-3, "atol": 1e-4}
    assert_close(bent, loss, **close)
    for name in LEGS:
        assert_close(slopes[name], grad[name], **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alpha_po_is_finite_where_a_response_all_but_excluded(dtype: torch.dtype):
    """p = e^−500 underflows, so p^−α is infinite if it is computed as that; here the exponent is capped."""
    batch = cast(pair([-500.0], [-2.0]), dtype)
    loss, grad = loss_and_grad(AlphaPO(alpha=0.25), batch)
    assert loss.isfinite()
    assert all(slopes.isfinite().all() for slopes in grad.values())


@given(
    seed=SEEDS,
    beta=st.sampled_from([0.1, 2.0, 10.0]),
    gamma=st.sampled_from([0.0, 0.5, 5.0]),
    label_smoothing=st.sampled_from([0.0, 0.1, 0.4]),
    scale=SCALES,
)
def test_simpo_is_what_the_paper_says(seed: int, beta: float, gamma: float, label_smoothing: float, scale: float):
    objective = SimPO(beta=beta, gamma=gamma, label_smoothing=label_smoothing)
    batch = make_batch(objective, seed=seed, rows=5, scale=scale)
    expected = transcriptions_pairs_free.simpo(*two(batch), beta=beta, gamma=gamma, label_smoothing=label_smoothing)
    assert_transcribed(objective, batch, *expected)


@given(
    seed=SEEDS,
    beta=st.sampled_from([0.1, 2.5, 10.0]),
    gamma=st.sampled_from([0.0, 0.1, 5.0]),
    alpha=st.sampled_from([-1.0, -0.25, 0.25, 1.0]),
    scale=st.sampled_from([0.1, 1.0]),
)
def test_alpha_po_is_what_the_paper_says(seed: int, beta: float, gamma: float, alpha: float, scale: float):
    objective = AlphaPO(beta=beta, gamma=gamma, alpha=alpha)
    batch = make_batch(objective, seed=seed, rows=5, scale=scale)
    expected = transcriptions_pairs_free.alpha_po(*two(batch), beta=beta, gamma=gamma, alpha=alpha)
    assert_transcribed(objective, batch, *expected)


# ORPO


def test_orpo_by_hand():
    """λ = 0.1; chosen one token of probability ½, rejected two of ¼ each: odds 1 and ⅓, log of their ratio log 3.

    loss = log 2 − 0.1 · log σ(log 3) = 0.6931471806 + 0.1 · log(4/3) = 0.7219153878
    d log odds/da = 1/(1 − p): 2 and 4/3;  chosen −1 − 0.1 · ¼ · 2 = −1.05, each rejected one 0.1 · ¼ · 4/3 / 2 = 1/60
    """
    batch = pair([math.log(0.5)], [math.log(0.25), math.log(0.25)])
    loss, grad = loss_and_grad(ORPO(beta=0.1), batch)
    assert loss.item() == pytest.approx(0.7219153878, **BY_HAND)
    assert grad["chosen"].tolist() == [pytest.approx([-1.05], rel=1e-12)]
    assert grad["rejected"].tolist() == [pytest.approx([1 / 60, 1 / 60], rel=1e-12)]
    assert means(ORPO(), batch)["odds/log_ratio"] == pytest.approx(math.log(3), rel=1e-12)


def test_orpo_over_sequences_by_hand():
    """Two rows, −1 and −2, −3: 2 per token of all three, and of the rows' means 1 and 2.5, 1.75."""
    chosen = make_rows([[-1.0], [-2.0, -3.0]])
    batch = LegBatch(legs={"chosen": chosen, "rejected": chosen})
    for nll, likelihood in (("token", 2.0), ("sequence", 1.75)):
        loss = loss_and_grad(ORPO(beta=0.1, nll=nll), batch)[0].item()
        assert loss == pytest.approx(likelihood + 0.1 * math.log(2), rel=1e-12)


@pytest.mark.parametrize("certain", ["chosen", "rejected", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("logp", [0.0, -1e-12, -1e-7])
def test_orpo_is_finite_as_a_response_becomes_certain(certain: str, dtype: torch.dtype, logp: float):
    """Odds p/(1−p) are infinite at p = 1; a log-prob per token counts as at most −10⁻⁶, so log odds as 13.8 at most."""
    sure = {name: certain in (name, "both") for name in LEGS}
    legs = {name: make_rows([[logp, logp] if sure[name] else [-1.0, -2.0]]) for name in LEGS}
    batch = cast(LegBatch(legs=legs), dtype)
    loss, grad = loss_and_grad(ORPO(), batch)
    assert loss.isfinite()
    assert all(slopes.isfinite().all() for slopes in grad.values())
    assert abs(means(ORPO(), batch)["odds/log_ratio"]) < 13.9 + math.log(math.expm1(1.5))


@pytest.mark.parametrize("nll", ["token", "sequence"])
@given(seed=SEEDS, beta=st.sampled_from([0.1, 2.0]), scale=SCALES, weighted=st.booleans())
def test_orpo_is_what_the_paper_says(nll: str, seed: int, beta: float, scale: float, weighted: bool):
    objective = ORPO(beta=beta, nll=nll)
    batch = make_batch(objective, seed=seed, rows=5, scale=scale, weighted=weighted)
    expected = transcriptions_pairs_free.orpo(*two(batch), weight=beta, form=nll, chosen_weight=weight_of(batch))
    assert_transcribed(objective, batch, *expected)


# all


@pytest.mark.parametrize(
    ("objective", "rows", "total"),
    [
        (CPO(beta=0.1), (0.744397, 0.609470), 1.726934),
        (SimPO(beta=2.5, gamma=1.375), (1.600413, 1.857227), 1.728820),
        (SimPO(beta=2.0, gamma=0.5), (0.974077, 1.136871), 1.055474),
        (AlphaPO(alpha=0.25, beta=2.5, gamma=0.1), (0.744397, 0.978810), 0.861604),
        (ORPO(beta=0.1), (0.693147, 0.793281), 1.124321),
    ],
    ids=["cpo", "simpo-2.5", "simpo-2", "alpha_po", "orpo"],
)
def test_known_numbers(objective: Objective, rows: tuple[float, ...], total: float):
    """Two rows; the likelihood of the chosen responses is (0.5 + 1 + 1.5 + 2 + 0.25)/5 = 1.05 per token."""
    batch = tv1(*LEGS)
    assert row_losses(objective, batch) == pytest.approx(rows, **SIX_PLACES)
    assert loss_and_grad(objective, batch)[0].item() == pytest.approx(total, **SIX_PLACES)


def test_simpo_with_a_likelihood_is_a_list():
    """TRL's CPOTrainer leaves cpo_alpha at 1 beside simpo; here it is written: 1.728820 + 1 · 1.05."""
    listed = mixture([("simpo", SimPO(beta=2.5, gamma=1.375), 1.0), ("sft", SFT(leg="chosen"), 1.0)])
    assert loss_and_grad(listed, tv1(*LEGS))[0].item() == pytest.approx(2.778820, **SIX_PLACES)


def test_no_reference_is_needed():
    for objective in (CPO(), SimPO(), AlphaPO(), ORPO()):
        assert not objective.needs.reference
        assert objective.step0 is None


def test_orpo_s_rewards_are_beta_times_mean_log_probs():
    """β = 0.5 on −1.5 and −4 a token; the log of the odds ratio is logged beside them, without β."""
    found = means(ORPO(beta=0.5), one_row())
    odds = -1.5 + 4 - math.log1p(-math.exp(-1.5)) + math.log1p(-math.exp(-4))
    assert found["rewards/chosen"] == pytest.approx(-0.75, **BY_HAND)
    assert found["rewards/rejected"] == pytest.approx(-2.0, **BY_HAND)
    assert found["odds/log_ratio"] == pytest.approx(odds, **BY_HAND)


def test_alpha_po_s_reward_by_hand():
    """r = (1 − e^(0.25·2))/0.25 at −2 nats a token."""
    found = AlphaPO(alpha=0.25).reward(torch.tensor([-2.0], dtype=torch.float64))
    assert found.tolist() == [pytest.approx((1 - math.exp(0.5)) / 0.25, **BY_HAND)]
