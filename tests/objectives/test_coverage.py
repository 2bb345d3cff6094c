"""DCO against arithmetic by hand and the formula in two hundred digits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from objectives import LegBatch, Needs
from objectives.coverage import DCO
from objectives.sft import SFT
from tests.objectives import transcriptions_pairs_free
from tests.objectives.batches import (
    SIX_PLACES,
    assert_transcribed,
    loss_and_grad,
    make_batch,
    make_rows,
    means,
    ragged,
)
from tests.objectives.transcriptions_pairs_free import coverage_of


def answers(*rows: list[float]) -> LegBatch:
    return LegBatch(legs={"gold": make_rows(list(rows))})


def test_dco_by_hand():
    """N = 2, an answer of two tokens with p = ½: −log(1 − ¼) = log(4/3).

    F = 2 · ½ · ½ / ¾ = 2/3, the slope of either token's −log-prob
    """
    loss, grad = loss_and_grad(DCO(attempts=2), answers([math.log(0.8), math.log(0.625)]))
    assert loss.item() == pytest.approx(math.log(4 / 3), rel=1e-12)
    assert grad["gold"].tolist() == [pytest.approx([-2 / 3, -2 / 3], rel=1e-12)]


@pytest.mark.parametrize(
    ("logp", "attempts", "expected", "factor"),
    [
        (-1.0, 1, 1.000000, 1.0),
        (-1.0, 8, 0.025822, 0.121789),
        (-5.0, 8, 2.944101, 0.976498),
        (-5.0, 256, 0.194983, 0.373876),
        (-20.0, 256, 14.454823, None),
        (-60.0, 256, 54.454823, 1.0),
    ],
)
def test_known_numbers(logp: float, attempts: int, expected: float, factor: float | None):
    """Loss and F; F is also what the gradient is, and what is logged."""
    objective, batch = DCO(attempts=attempts), answers([logp])
    loss, grad = loss_and_grad(objective, batch)
    assert loss.item() == pytest.approx(expected, **SIX_PLACES)
    if factor is not None:
        assert -grad["gold"].item() == pytest.approx(factor, **SIX_PLACES)
        assert means(objective, batch)["coverage/factor"] == pytest.approx(factor, **SIX_PLACES)


@given(
    seed=st.integers(0, 1000),
    attempts=st.sampled_from([1, 2, 8, 256, 2**20]),
    scale=st.sampled_from([0.5, 1.0, 3.0, 30.0]),
)
def test_dco_is_what_the_paper_says(seed: int, attempts: int, scale: float):
    objective = DCO(attempts=attempts)
    batch = make_batch(objective, seed=seed, rows=5, scale=scale)
    rows = ragged(batch["gold"].logps, batch["gold"])
    assert_transcribed(objective, batch, *transcriptions_pairs_free.dco(rows, attempts=attempts))


@pytest.mark.parametrize("attempts", [2, 8, 256, 2**20])
@pytest.mark.parametrize("logp", [-29.9, -30.1, -60.0, -300.0])
def test_below_minus_thirty_it_is_the_likelihood_less_log_n(attempts: int, logp: float):
    """N·p in place of 1 − (1−p)^N: within N·e⁻³⁰ of the exact loss on either side; in float32 no infinity at −120."""
    loss, grad = loss_and_grad(DCO(attempts=attempts), answers([logp]))
    exact, factor = coverage_of(logp, attempts)
    assert loss.item() == pytest.approx(exact, abs=attempts * math.exp(-30))
    assert -grad["gold"].item() == pytest.approx(factor, abs=attempts * math.exp(-30))
    if logp < -30:
        assert loss.item() == pytest.approx(-logp - math.log(attempts), rel=1e-14)
        assert grad["gold"].item() == -1.0


@pytest.mark.parametrize("attempts", [2, 8, 256, 2**20])
@pytest.mark.parametrize("logp", [0.0, -1e-12, -1e-3, -0.7, -5.0, -29.0, -31.0, -88.0, -104.0, -120.0, -1e5])
def test_in_float32_it_is_finite_and_close(attempts: int, logp: float):
    leg = make_rows([[logp]])
    single = LegBatch(legs={"gold": type(leg)(logps=leg.logps.float(), mask=leg.mask, tokens=leg.tokens)})
    loss, grad = loss_and_grad(DCO(attempts=attempts), single)
    double, slopes = loss_and_grad(DCO(attempts=attempts), answers([logp]))
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert loss.item() == pytest.approx(double.item(), rel=1e-5, abs=1e-6)
    assert grad["gold"].item() == pytest.approx(slopes["gold"].item(), rel=1e-4, abs=1e-6)


def test_one_attempt_is_supervised_fine_tuning_on_sums():
    batch = make_batch(DCO(), seed=2)
    loss, grad = loss_and_grad(DCO(attempts=1), batch)
    other, slopes = loss_and_grad(SFT(per="row"), batch)
    assert loss.item() == pytest.approx(other.item(), rel=1e-14)
    assert torch.equal(grad["gold"], slopes["gold"])


def test_the_factor_falls_from_one_to_zero():
    """1 for improbable answers, 0 once p is well above 1/N."""
    logps = torch.linspace(-40.0, -1e-3, 200, dtype=torch.float64)
    factor = DCO(attempts=64).factor(logps)
    assert (factor.diff() <= 0).all()
    assert factor[0] == 1.0
    assert factor[-1] < 1e-100
    assert DCO(attempts=64).factor(torch.tensor([-math.log(64)], dtype=torch.float64)).item() == pytest.approx(
        64 * (63 / 64) ** 63 / 64 / (1 - (63 / 64) ** 64), rel=1e-12
    )


def test_metrics_by_hand():
    """N = 2, p = ½ and p = 1 − 10⁻⁵: F = 2/3 and 2·10⁻⁵, of which the second is dead; one of two attempts succeeds
    in ¾ and in 1 − 10⁻¹⁰ of all cases."""
    metrics = means(DCO(attempts=2), answers([math.log(0.5)], [math.log1p(-1e-5)]))
    assert metrics["coverage/probability"] == pytest.approx((0.75 + 1 - 1e-10) / 2, rel=1e-9)
    assert metrics["coverage/factor"] == pytest.approx((2 / 3 + 2e-5) / 2, rel=1e-6)
    assert metrics["coverage/dead"] == 0.5
    assert metrics["logps/gold"] == pytest.approx((math.log(0.5) - 1e-5) / 2, rel=1e-6)


def test_which_response_is_covered():
    assert DCO().needs == Needs(legs=("gold",))
    assert DCO(leg="chosen").needs == Needs(legs=("chosen",))
