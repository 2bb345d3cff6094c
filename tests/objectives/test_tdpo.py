"""TDPO against arithmetic by hand and the paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from objectives import Leg, LegBatch, Needs
from objectives.dpo import DPO
from objectives.tdpo import TDPO
from tests.objectives import transcriptions_pairs
from tests.objectives.batches import (
    BY_HAND,
    SIX_PLACES,
    assert_transcribed,
    four,
    loss_and_grad,
    make_batch,
    make_rows,
    means,
    one_row,
    ragged,
)
from tests.objectives.transcriptions_pairs import kl_of_position, log_softmax


def with_kl(batch: LegBatch, chosen: list[list[float]], rejected: list[list[float]]) -> LegBatch:
    """The batch with a KL for every token."""
    kls = {"chosen": make_rows(chosen).logps, "rejected": make_rows(rejected).logps}
    legs = {name: replace(batch[name], extras={"ref_kl": kls[name]}) for name in batch}
    return replace(batch, legs=legs)


def by_hand() -> LegBatch:
    """Log-ratios 1 and −1, K(chosen) = 0.2 + 0.3 = 0.5, K(rejected) = 0.9."""
    return with_kl(one_row(), [[0.2, 0.3]], [[0.9]])


def test_tdpo1_by_hand():
    """β = 0.5: 0.5 · (2 − (0.9 − 0.5)) = 0.8, loss log(1 + e^−0.8) = 0.3711006659.

    slope −β·σ(−0.8) = −0.1550127594 for chosen tokens; the KL of chosen tokens falls with it, that of rejected rises
    """
    loss, grad = loss_and_grad(TDPO(beta=0.5, variant="tdpo1"), by_hand())
    assert loss.item() == pytest.approx(0.3711006659, **BY_HAND)
    assert grad["chosen"].tolist() == [pytest.approx([-0.1550127594, -0.1550127594], **BY_HAND)]
    assert grad["rejected"].tolist() == [pytest.approx([0.1550127594], **BY_HAND)]
    assert grad["chosen/ref_kl"].tolist() == [pytest.approx([-0.1550127594, -0.1550127594], **BY_HAND)]
    assert grad["rejected/ref_kl"].tolist() == [pytest.approx([0.1550127594], **BY_HAND)]


def test_tdpo2_by_hand():
    """β = 0.5, α = 0.5: 0.5 · (2 − 0.5 · 0.4) = 0.9, loss log(1 + e^−0.9) = 0.3411538747.

    slope −β·σ(−0.9) = −0.1445252487; by K(rejected) β·α·σ(−0.9) = 0.0722626243, by K(chosen) none: it is stopped
    """
    loss, grad = loss_and_grad(TDPO(beta=0.5, alpha=0.5), by_hand())
    assert loss.item() == pytest.approx(0.3411538747, **BY_HAND)
    assert grad["chosen"].tolist() == [pytest.approx([-0.1445252487, -0.1445252487], **BY_HAND)]
    assert grad["rejected/ref_kl"].tolist() == [pytest.approx([0.0722626243], **BY_HAND)]
    assert not grad["chosen/ref_kl"].any()


def from_logits(positions: Sequence[tuple[Sequence[float], Sequence[float], int]]) -> Leg:
    """A leg of one row from the logits of policy and reference and the target of each position."""
    leg = make_rows(
        [[log_softmax(policy)[target] for policy, _, target in positions]],
        [[log_softmax(reference)[target] for _, reference, target in positions]],
    )
    kl = make_rows([[kl_of_position(policy, reference) for policy, reference, _ in positions]]).logps
    return replace(leg, extras={"ref_kl": kl})


def test_known_numbers():
    """A vocabulary of three: u = 0.859068, v = 0.742932, K(chosen) = 0.231482, K(rejected) = 0.208931, β = 0.1."""
    batch = LegBatch(
        legs={
            "chosen": from_logits([((1, 0, 0), (0, 0, 0), 0), ((0, 2, 0), (0, 1, 0), 1)]),
            "rejected": from_logits([((0, 1, 0), (0.5, 0, 0), 1)]),
        }
    )
    assert batch["chosen"].logratio().item() == pytest.approx(0.859068, **SIX_PLACES)
    assert batch["rejected"].logratio().item() == pytest.approx(0.742932, **SIX_PLACES)
    metrics = means(TDPO(), batch)
    assert metrics["ref_kl/chosen"] == pytest.approx(0.231482, **SIX_PLACES)
    assert metrics["ref_kl/rejected"] == pytest.approx(0.208931, **SIX_PLACES)
    assert metrics["rewards/chosen"] == pytest.approx(0.1 * (0.859068 + 0.231482), abs=2e-7)
    assert metrics["rewards/rejected"] == pytest.approx(0.1 * (0.742932 + 0.208931), abs=2e-7)
    for objective, expected in (
        (TDPO(variant="tdpo1"), 0.686237),
        (TDPO(variant="tdpo2"), 0.686797),
        (TDPO(variant="tdpo2", alpha=0.0), 0.687357),
        (DPO(), 0.687357),
    ):
        assert loss_and_grad(objective, batch)[0].item() == pytest.approx(expected, **SIX_PLACES)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [None, 0.0, 0.5, 2.0])
@given(seed=st.integers(0, 1000), beta=st.sampled_from([0.01, 0.1, 2.0]), scale=st.sampled_from([0.1, 1.0, 30.0]))
def test_tdpo_is_what_the_paper_says(alpha: float | None, seed: int, beta: float, scale: float):
    objective = TDPO(beta=beta, variant="tdpo1") if alpha is None else TDPO(beta=beta, alpha=alpha)
    batch = make_batch(objective, seed=seed, rows=5, scale=scale)
    kls = [ragged(batch[name].extras["ref_kl"], batch[name]) for name in batch]
    assert_transcribed(objective, batch, *transcriptions_pairs.tdpo(*four(batch), *kls, beta=beta, alpha=alpha))


def test_tdpo2_without_alpha_is_dpo():
    batch = make_batch(TDPO(), seed=1)
    assert torch.equal(loss_and_grad(TDPO(alpha=0.0), batch)[0], loss_and_grad(DPO(), batch)[0])


def test_what_it_needs():
    """The reference's whole distributions, so a cached reference will not do."""
    assert TDPO().needs == Needs(legs=("chosen", "rejected"), reference=True, extras=("ref_kl",))


def test_alpha_is_idle_in_tdpo1():
    assert TDPO(variant="tdpo1").idle() == {"alpha": "variant tdpo1 has none"}
    assert TDPO().idle() == {}
