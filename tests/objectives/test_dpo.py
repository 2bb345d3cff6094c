"""DPO and its logistic relatives against arithmetic by hand and the papers.

Other implementations' numbers are in ``test_vectors``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from objectives import Leg, LegBatch, Objective
from objectives.dpo import DPO, DPOP, CalDPO, DPONorm, Robust
from tests.objectives import transcriptions, transcriptions_pairs
from tests.objectives.batches import (
    BY_HAND,
    FP64_ROUNDING,
    SIX_PLACES,
    apart,
    assert_transcribed,
    four,
    loss_and_grad,
    make_batch,
    means,
    ragged,
    row_losses,
    tv1,
)
from tests.objectives.transcriptions_pairs import RowLoss


def leg(logps: list[list[float]], ref_logps: list[list[float]]) -> Leg:
    """A leg without padding."""
    values = torch.tensor(logps, dtype=torch.float64)
    return Leg(
        logps=values,
        ref_logps=torch.tensor(ref_logps, dtype=torch.float64),
        mask=torch.ones_like(values, dtype=torch.bool),
        tokens=torch.zeros_like(values, dtype=torch.int64),
    )


def one_row() -> LegBatch:
    chosen = leg([[-1.0, -2.0]], [[-1.5, -2.5]])
    rejected = leg([[-3.0]], [[-2.0]])
    return LegBatch(legs={"chosen": chosen, "rejected": rejected})


def test_dpo_by_hand():
    """One row of 2 and 1 tokens, β = 0.5.

    logratio(chosen)   = (−1.0 + 1.5) + (−2.0 + 2.5) =  1.0
    logratio(rejected) = (−3.0 + 2.0)                = −1.0
    m = 0.5 · (1.0 + 1.0) = 1   →   loss = log(1 + e⁻¹) = 0.3132616875
    dloss/dm = −σ(−1) = −0.2689414214; times β, for each chosen token −0.1344707107, for each rejected one +0.1344707107
    """
    loss, grad = loss_and_grad(DPO(beta=0.5), one_row())
    assert loss.item() == pytest.approx(0.3132616875, **BY_HAND)
    assert grad["chosen"].tolist() == [pytest.approx([-0.1344707107, -0.1344707107], **BY_HAND)]
    assert grad["rejected"].tolist() == [pytest.approx([0.1344707107], **BY_HAND)]


def test_dpo_with_label_smoothing_by_hand():
    """The same row, m = 1, with ε = 0.2.

    loss = 0.8 · log(1 + e⁻¹) + 0.2 · log(1 + e¹)
         = 0.8 · 0.3132616875 + 0.2 · 1.3132616875 = 0.5132616875
    dloss/dm = −0.8 · σ(−1) + 0.2 · σ(1) = −0.8 · 0.2689414214 + 0.2 · 0.7310585786 = −0.0689414214;
    times β = 0.5: −0.0344707107 for each chosen token
    """
    loss, grad = loss_and_grad(DPO(beta=0.5, label_smoothing=0.2), one_row())
    assert loss.item() == pytest.approx(0.5132616875, **BY_HAND)
    assert grad["chosen"].tolist() == [pytest.approx([-0.0344707107, -0.0344707107], **BY_HAND)]
    assert grad["rejected"].tolist() == [pytest.approx([0.0344707107], **BY_HAND)]


def test_dpo_is_a_mean_over_rows():
    """Two rows, β = 1: m = 1 as above in nats, and m = −1. Mean of log(1 + e⁻¹) and log(1 + e¹).

    row 1: (−1.0 + 2.0) − (−1.0 + 1.0) =  1   →   0.3132616875
    row 2: (−1.0 + 1.0) − (−1.0 + 2.0) = −1   →   1.3132616875
    mean = 0.8132616875
    """
    chosen = leg([[-1.0], [-1.0]], [[-2.0], [-1.0]])
    rejected = leg([[-1.0], [-1.0]], [[-1.0], [-2.0]])
    loss, _ = loss_and_grad(DPO(beta=1.0), LegBatch(legs={"chosen": chosen, "rejected": rejected}))
    assert loss.item() == pytest.approx(0.8132616875, **BY_HAND)


def test_smoothing_has_a_finite_optimum():
    """m = log((1−ε)/ε): with ε = 0.1, 2.1972245773. There the gradient vanishes and on both sides points to it."""
    objective = DPO(beta=1.0, label_smoothing=0.1)
    slopes = []
    for margin in (2.1, 2.1972245773, 2.3):
        batch = LegBatch(legs={"chosen": leg([[-1.0]], [[-1.0 - margin]]), "rejected": leg([[-1.0]], [[-1.0]])})
        slopes.append(loss_and_grad(objective, batch)[1]["chosen"].item())
    assert slopes[0] < 0 < slopes[2]
    assert slopes[1] == pytest.approx(0.0, abs=1e-10)


def test_metrics_by_hand():
    """Two rows, β = 0.5; the second is a tie, which counts one half.

    rewards: chosen 0.5 · 1.0 and 0.5 · 0.5, rejected 0.5 · (−1.0) and 0.5 · 0.5; margins 1.0 and 0
    """
    chosen = leg([[-1.0, -2.0], [-1.0, -1.0]], [[-1.5, -2.5], [-1.25, -1.25]])
    rejected = leg([[-3.0], [-1.0]], [[-2.0], [-1.5]])
    assert means(DPO(beta=0.5), LegBatch(legs={"chosen": chosen, "rejected": rejected})) == {
        "rewards/chosen": pytest.approx(0.375),
        "rewards/rejected": pytest.approx(-0.125),
        "rewards/margins": pytest.approx(0.5),
        "rewards/accuracies": pytest.approx(0.75),
        "logps/chosen": pytest.approx(-2.5),
        "logps/rejected": pytest.approx(-2.0),
        "displacement/chosen": pytest.approx(0.75),
        "displacement/rejected": pytest.approx(-0.25),
    }


@pytest.mark.slow
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.4])
@given(seed=st.integers(0, 1000), beta=st.sampled_from([0.01, 0.1, 1.0, 5.0]), scale=st.sampled_from([0.1, 1.0, 30.0]))
def test_dpo_is_what_the_paper_says(label_smoothing: float, seed: int, beta: float, scale: float):
    objective = DPO(beta=beta, label_smoothing=label_smoothing)
    batch = make_batch(objective, seed=seed, rows=5, scale=scale)
    responses = [ragged(batch[name].logps, batch[name]) for name in ("chosen", "rejected")]
    references = [ragged(batch[name].ref_logps, batch[name]) for name in ("chosen", "rejected")]
    expected = transcriptions.dpo(*responses, *references, beta=beta, label_smoothing=label_smoothing)
    assert_transcribed(objective, batch, *expected)


@pytest.mark.parametrize(
    ("objective", "rows", "mean"),
    [
        (DPO(beta=0.1), (0.668460, 0.757599), 0.713029),
        (DPO(beta=0.1, label_smoothing=0.1), (0.673460, 0.745099), 0.709279),
        (Robust(beta=0.1, label_smoothing=0.1), (0.662210, 0.773224), 0.717717),
        (DPONorm(beta=0.1), (0.680725, 0.712073), 0.696399),
        (DPONorm(beta=5.0), (0.251929, 2.017675), 1.134802),
        (DPOP(beta=0.3, penalty=50.0), (0.620957, 4.141034), 2.380996),
        (DPOP(beta=0.1, penalty=5.0), (0.668460, 0.825939), 0.747200),
        (CalDPO(beta=0.5), (1.099077, 4.283179), 2.691128),
    ],
    ids=["dpo", "cdpo", "robust", "dpo_norm", "dpo_norm-5", "dpop-50", "dpop-5", "cal_dpo"],
)
def test_known_numbers(objective: Objective, rows: tuple[float, ...], mean: float):
    """Two rows, log-ratios 0 and −0.25 of chosen, −0.5 and 1 of rejected responses; 3, 2, 2 and 4 tokens."""
    batch = tv1("chosen", "rejected")
    assert row_losses(objective, batch) == pytest.approx(rows, **SIX_PLACES)
    assert loss_and_grad(objective, batch)[0].item() == pytest.approx(mean, **SIX_PLACES)


# Robust DPO


def test_robust_dpo_by_hand():
    """The first row above, m = 1, ε = 0.2.

    (0.8 · 0.3132616875 − 0.2 · 1.3132616875)/0.6 = (0.2506093500 − 0.2626523375)/0.6 = −0.0200716458: below 0
    dloss/dm = −(0.8 · 0.2689414214 + 0.2 · 0.7310585786)/0.6 = −0.6022747547, times β = 0.5, −0.3011373774 a token
    """
    loss, grad = loss_and_grad(Robust(beta=0.5, label_smoothing=0.2), one_row())
    assert loss.item() == pytest.approx(-0.0200716458, rel=3e-9)
    assert grad["chosen"].tolist() == [pytest.approx([-0.3011373774, -0.3011373774], **BY_HAND)]
    assert grad["rejected"].tolist() == [pytest.approx([0.3011373774], **BY_HAND)]


def test_robust_dpo_is_unbiased():
    """A share ε of pairs exchanged, and 1 − ε as they are, cost on average what DPO costs the pairs as they are."""
    pairs = apart([1.3, -0.4, 3.0])
    exchanged = LegBatch(legs={"chosen": pairs["rejected"], "rejected": pairs["chosen"]})
    objective = Robust(beta=0.7, label_smoothing=0.3)
    losses = torch.tensor([row_losses(objective, batch) for batch in (pairs, exchanged)], dtype=torch.float64)
    expected = torch.tensor(row_losses(DPO(beta=0.7), pairs), dtype=torch.float64)
    assert_close(0.7 * losses[0] + 0.3 * losses[1], expected, **FP64_ROUNDING)


def test_robust_dpo_is_unbounded_below():
    """For a large margin it is −ε·m/(1 − 2ε): here −0.1 · m/0.8. DPO with the same ε rises instead."""
    for margin in (1e2, 1e4, 1e6):
        loss = loss_and_grad(Robust(beta=1.0, label_smoothing=0.1), apart([margin]))[0].item()
        assert loss == pytest.approx(-margin / 8, rel=1e-12)
        assert loss_and_grad(DPO(beta=1.0, label_smoothing=0.1), apart([margin]))[0].item() > 0


def test_robust_dpo_without_noise_is_dpo():
    batch = make_batch(DPO(), seed=1)
    assert torch.equal(loss_and_grad(Robust(label_smoothing=0.0), batch)[0], loss_and_grad(DPO(), batch)[0])


# DPO per token


def test_dpo_norm_by_hand():
    """The first row above: per token 1/2 and −1, β = 2: m = 3, loss log(1 + e⁻³) = 0.0485873516.

    slopes −2 · σ(−3)/2 = −0.0474258732 for each of two chosen tokens, 2 · σ(−3) = 0.0948517464 for the rejected one
    """
    loss, grad = loss_and_grad(DPONorm(beta=2.0), one_row())
    assert loss.item() == pytest.approx(0.0485873516, **BY_HAND)
    assert grad["chosen"].tolist() == [pytest.approx([-0.0474258732, -0.0474258732], **BY_HAND)]
    assert grad["rejected"].tolist() == [pytest.approx([0.0948517464], **BY_HAND)]


def test_dpo_norm_is_dpo_on_responses_of_one_token():
    batch = apart([1.0, -2.0], [0.3, 0.1])
    assert torch.equal(loss_and_grad(DPONorm(beta=0.7), batch)[0], loss_and_grad(DPO(beta=0.7), batch)[0])


# DPO-Positive


def test_dpop_by_hand():
    """One row, log-ratios −1 and −4, β = 0.5, λ = 3: m = 0.5 · (−1 + 4 − 3 · 1) = 0, loss log 2.

    dloss/dm = −½; by the chosen log-ratio β·(1 + λ) = 2 of it, −1; by the rejected one +0.25
    """
    loss, grad = loss_and_grad(DPOP(beta=0.5, penalty=3.0), apart([-1.0], [-4.0]))
    assert loss.item() == pytest.approx(0.6931471806, **BY_HAND)
    assert (grad["chosen"].item(), grad["rejected"].item()) == (-1.0, 0.25)
    metrics = means(DPOP(beta=0.5, penalty=3.0), apart([-1.0, 0.0], [-4.0, 0.0]))
    assert metrics["penalty/mean"] == pytest.approx(0.75)
    assert metrics["penalty/rows"] == 0.5


def test_the_fine_of_dpop_has_no_effect_until_the_likelihood_falls():
    """At the reference λ changes neither loss nor gradient, and is not felt by chosen responses above it."""
    start = make_batch(DPO(), seed=5, at_reference=True)
    above = apart([0.1, 5.0], [-1.0, 7.0])
    for batch in (start, above):
        loss, grad = loss_and_grad(DPO(beta=0.3), batch)
        for penalty in (0.0, 50.0, 500.0):
            fined, slopes = loss_and_grad(DPOP(beta=0.3, penalty=penalty), batch)
            assert torch.equal(fined, loss)
            assert all(torch.equal(slopes[name], grad[name]) for name in batch)
    assert loss_and_grad(DPOP(), apart([-0.1]))[0] > loss_and_grad(DPO(beta=0.3), apart([-0.1]))[0]


# Cal-DPO


def test_cal_dpo_by_hand():
    """The first row above, log-ratios 1 and −1, β = 0.25: targets 2 and −2.

    log(1 + e⁻²) + ½ · (1 + 1) = 1.1269280110; slopes −σ(−2) + (1 − 2) = −1.1192029220 and its opposite: no β in either
    """
    loss, grad = loss_and_grad(CalDPO(beta=0.25), one_row())
    assert loss.item() == pytest.approx(1.1269280110, **BY_HAND)
    assert grad["chosen"].tolist() == [pytest.approx([-1.1192029220, -1.1192029220], **BY_HAND)]
    assert grad["rejected"].tolist() == [pytest.approx([1.1192029220], **BY_HAND)]
    metrics = means(CalDPO(beta=0.25), one_row())
    assert metrics["loss/contrast"] == pytest.approx(0.1269280110, **BY_HAND)
    assert metrics["loss/calibration"] == pytest.approx(1.0)


def test_cal_dpo_holds_log_ratios_near_their_targets():
    """At ±1/(2β) = ±2 only the contrastive part still pushes, by σ(−4); beyond it the square pulls back."""
    slopes = loss_and_grad(CalDPO(beta=0.25), apart([2.0, 3.0], [-2.0, -3.0]))[1]["chosen"].flatten().tolist()
    assert slopes[0] == pytest.approx(-0.01798620996 / 2, **BY_HAND)
    assert slopes[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "transcribed"),
    [
        (Robust(label_smoothing=0.1), transcriptions_pairs.robust),
        (Robust(label_smoothing=0.4), transcriptions_pairs.robust),
        (DPONorm(), transcriptions_pairs.dpo_norm),
        (DPOP(penalty=0.0), transcriptions_pairs.dpop),
        (DPOP(penalty=5.0), transcriptions_pairs.dpop),
        (CalDPO(), transcriptions_pairs.cal_dpo),
    ],
    ids=["robust", "robust-0.4", "dpo_norm", "dpop-0", "dpop-5", "cal_dpo"],
)
@given(seed=st.integers(0, 1000), beta=st.sampled_from([0.01, 0.1, 2.0]), scale=st.sampled_from([0.1, 1.0, 30.0]))
def test_its_relatives_are_what_the_papers_say(
    objective: Objective, transcribed: Callable[..., RowLoss], seed: int, beta: float, scale: float
):
    objective = replace(objective, beta=beta)
    batch = make_batch(objective, seed=seed, rows=5, scale=scale)
    row = transcribed(**asdict(objective))
    assert_transcribed(objective, batch, *transcriptions_pairs.over_rows(row, *four(batch)))
