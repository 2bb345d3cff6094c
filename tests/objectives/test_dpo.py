"""DPO against arithmetic by hand and against the paper; other implementations' numbers are in ``test_vectors``."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from objectives import Leg, LegBatch
from objectives.dpo import DPO
from tests.objectives import transcriptions
from tests.objectives.batches import BY_HAND, assert_transcribed, loss_and_grad, make_batch, means, ragged


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


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.4])
@given(seed=st.integers(0, 1000), beta=st.sampled_from([0.01, 0.1, 1.0, 5.0]), scale=st.sampled_from([0.1, 1.0, 30.0]))
def test_dpo_is_what_the_paper_says(label_smoothing: float, seed: int, beta: float, scale: float):
    objective = DPO(beta=beta, label_smoothing=label_smoothing)
    batch = make_batch(objective, seed=seed, rows=5, scale=scale)
    responses = [ragged(batch[name].logps, batch[name]) for name in ("chosen", "rejected")]
    references = [ragged(batch[name].ref_logps, batch[name]) for name in ("chosen", "rejected")]
    expected = transcriptions.dpo(*responses, *references, beta=beta, label_smoothing=label_smoothing)
    assert_transcribed(objective, batch, *expected)
