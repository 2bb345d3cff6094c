"""KTO and unpaired APO against arithmetic by hand and the papers.

Other implementations' numbers are in ``test_vectors``.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from objectives import LegBatch, Needs
from objectives.kto import KTO, APOZeroUnpaired
from tests.objectives import transcriptions, transcriptions_pairs_free
from tests.objectives.batches import (
    BY_HAND,
    SIX_PLACES,
    assert_transcribed,
    loss_and_grad,
    make_batch,
    make_rows,
    means,
    ragged,
    rows_of,
    tv1_labelled,
)


def kl(value: float) -> dict[str, Tensor]:
    return {"kl": torch.tensor(value, dtype=torch.float64)}


def two_rows(z: float = 0.5) -> LegBatch:
    """Log-ratios 1 (thumbs up) and −1 (thumbs down); of mismatched responses 0.25 and 0.75."""
    return LegBatch(
        legs={
            "completion": make_rows([[-1.0, -2.0], [-3.0]], [[-1.5, -2.5], [-2.0]]),
            "mismatched": make_rows([[-1.0], [-1.0, -1.0]], [[-1.25], [-1.5, -1.25]]),
        },
        labels=torch.tensor([True, False]),
        state=kl(z),
    )


def test_kto_by_hand():
    """β = 0.5, z = 0.5, w_D = 2, w_U = 3.

    desirable:   β·(1 − 0.5)  = 0.25   →   2 · (1 − σ(0.25)) = 2 · 0.4378234991 = 0.8756469982
    undesirable: β·(0.5 + 1)  = 0.75   →   3 · (1 − σ(0.75)) = 3 · 0.3208213008 = 0.9624639025
    loss = 0.9190554504
    slopes −2 · 0.5 · σ(0.25)·σ(−0.25)/2 = −0.1230670414 for each desirable token,
    3 · 0.5 · σ(0.75)·σ(−0.75)/2 = 0.1634212453 for the undesirable one; mismatched responses none
    """
    loss, grad = loss_and_grad(KTO(beta=0.5, desirable_weight=2.0, undesirable_weight=3.0), two_rows())
    assert loss.item() == pytest.approx(0.9190554504, **BY_HAND)
    assert grad["completion"][0].tolist() == pytest.approx([-0.1230670414, -0.1230670414], **BY_HAND)
    assert grad["completion"][1].tolist() == pytest.approx([0.1634212453, 0.0], **BY_HAND)
    assert not grad["mismatched"].any()


def test_the_estimate_by_hand():
    """(0.25 + 0.75)/2 = 0.5, in nats whatever β; exchanged log-ratios give −0.5 and so 0. Nothing is left of 100."""
    objective, batch = KTO(beta=7.0), two_rows(z=100.0)
    observed = objective.observe(batch)
    assert {key: value.item() for key, value in observed.items()} == {"kl_total": 1.0, "kl_count": 2.0}
    assert objective.update(batch.state, observed)["kl"].item() == 0.5
    leg = batch["mismatched"]
    less = replace(batch, legs={**batch.legs, "mismatched": replace(leg, logps=leg.ref_logps, ref_logps=leg.logps)})
    assert objective.update(batch.state, objective.observe(less))["kl"].item() == 0.0


def test_a_step_uses_the_estimate_of_the_step_before():
    """The first has z = 0, though its own mismatched responses say 0.5; afterwards z = 0.5."""
    objective = KTO(beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    first = replace(two_rows(), state=objective.init_state())
    without = loss_and_grad(objective, two_rows(z=0.0))[0]
    assert torch.equal(loss_and_grad(objective, first)[0], without)
    then = replace(first, state=objective.update(first.state, objective.observe(first)))
    assert loss_and_grad(objective, then)[0].item() == pytest.approx(0.9190554504, **BY_HAND)


def known() -> LegBatch:
    """Log-ratios 0, −0.25 (thumbs up), −0.5, 1 (thumbs down), with mismatched ones whose mean is 0.3."""
    batch = tv1_labelled()
    mismatched = make_rows([[-1.0], [-0.5, -0.5], [-2.0], [-1.5]], [[-1.5], [-0.75, -0.75], [-2.5], [-1.2]])
    return replace(batch, legs={**batch.legs, "mismatched": mismatched})


def test_known_numbers():
    """Observe, update, formula: z = (0.5 + 0.5 + 0.5 − 0.3)/4 = 0.3, undesirable rows weigh 1.33."""
    objective, batch = KTO(beta=0.1, undesirable_weight=1.33), known()
    state = objective.update(objective.init_state(), objective.observe(batch))
    assert state["kl"].item() == pytest.approx(0.3, rel=1e-12)
    batch = replace(batch, state=state)
    assert loss_and_grad(objective, batch)[0].item() == pytest.approx(0.586981, **SIX_PLACES)
    rows = [loss_and_grad(KTO(beta=0.1), rows_of(batch, slice(i, i + 1)))[0].item() for i in range(4)]
    assert rows == pytest.approx([0.507499, 0.513747, 0.480011, 0.517493], **SIX_PLACES)


def test_weights_are_exact_in_float64():
    """1.33 is not a float32: the loss of an undesirable row with z = 0 at the reference is 0.665 to the last digit."""
    batch = make_batch(KTO(), seed=1, rows=3, at_reference=True)
    batch = replace(batch, labels=torch.zeros(3, dtype=torch.bool))
    assert loss_and_grad(KTO(undesirable_weight=1.33), batch)[0].item() == pytest.approx(0.665, rel=1e-15)


def test_the_first_loss_is_half_the_weight_where_the_weights_are_equal():
    assert KTO().step0 == 0.5
    assert KTO(desirable_weight=1.33, undesirable_weight=1.33).step0 == pytest.approx(0.665)
    assert KTO(desirable_weight=1.33).step0 is None


def test_what_it_needs():
    assert KTO().needs == Needs(legs=("completion", "mismatched"), reference=True, labels=True)


def test_metrics_by_hand():
    """Both rows above, β = 0.5: rewards 0.5 and −0.5, threshold 0.5 · 0.5; the first is above, the second below.

    kl/mismatched is this step's: (0.25 + 0.75)/2
    """
    assert means(KTO(beta=0.5), two_rows()) == {
        "rewards/chosen": pytest.approx(0.5),
        "rewards/rejected": pytest.approx(-0.5),
        "rewards/accuracies": 1.0,
        "rewards/threshold": pytest.approx(0.25),
        "labels/desirable": 0.5,
        "displacement/chosen": pytest.approx(1.0),
        "displacement/rejected": pytest.approx(-1.0),
        "logps/chosen": pytest.approx(-3.0),
        "logps/rejected": pytest.approx(-3.0),
        "kl/mismatched": pytest.approx(0.5),
    }


@given(
    seed=st.integers(0, 1000),
    beta=st.sampled_from([0.01, 0.1, 2.0]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    weights=st.sampled_from([(1.0, 1.0), (1.33, 1.0), (0.8, 2.0)]),
    later=st.booleans(),
)
def test_kto_is_what_the_paper_says(seed: int, beta: float, scale: float, weights: tuple[float, float], later: bool):
    desirable, undesirable = weights
    objective = KTO(beta=beta, desirable_weight=desirable, undesirable_weight=undesirable)
    batch = make_batch(objective, seed=seed, rows=5, scale=scale, later=later)
    leg = batch["completion"]
    expected = transcriptions.kto(
        ragged(leg.logps, leg),
        ragged(leg.ref_logps, leg),
        batch.labels.tolist(),
        beta=beta,
        desirable_weight=desirable,
        undesirable_weight=undesirable,
        kl=batch.state["kl"].item(),
    )
    assert_transcribed(objective, batch, *expected)


@given(seed=st.integers(0, 1000), cut=st.integers(0, 5))
def test_the_estimate_is_what_the_paper_says(seed: int, cut: int):
    """Over two microbatches of one step."""
    objective = KTO()
    batch = make_batch(objective, seed=seed, rows=5)
    parts = [objective.observe(rows_of(batch, index)) for index in (slice(0, cut), slice(cut, 5))]
    state = objective.update(objective.init_state(), {key: parts[0][key] + parts[1][key] for key in parts[0]})
    leg = batch["mismatched"]
    expected = transcriptions.kto_reference_point(ragged(leg.logps, leg), ragged(leg.ref_logps, leg))
    assert state["kl"].item() == pytest.approx(expected, rel=1e-11, abs=1e-13)


# Unpaired APO


def test_unpaired_apo_by_hand():
    """The two rows above, log-ratios 1 (thumbs up) and −1 (thumbs down), β = 0.5, w_D = 2, w_U = 3.

    desirable 2 · (1 − σ(0.5)) = 0.7550813376, undesirable 3 · σ(−0.5) = 1.1326220064, mean 0.9438516720
    slopes −2 · 0.5 · σ(0.5)·σ(−0.5)/2 = −0.1175018561, 3 · 0.5 · σ(0.5)·σ(−0.5)/2 = 0.1762527842
    """
    objective = APOZeroUnpaired(beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    both = two_rows()
    batch = LegBatch(legs={"completion": both["completion"]}, labels=both.labels)
    loss, grad = loss_and_grad(objective, batch)
    assert loss.item() == pytest.approx(0.9438516720, **BY_HAND)
    assert grad["completion"][0].tolist() == pytest.approx([-0.1175018561, -0.1175018561], **BY_HAND)
    assert grad["completion"][1].tolist() == pytest.approx([0.1762527842, 0.0], **BY_HAND)


def test_unpaired_apo_is_kto_with_an_estimate_of_zero():
    """Whatever its mismatched responses say: it has none."""
    batch = make_batch(KTO(), seed=6, rows=5)
    alone = LegBatch(legs={"completion": batch["completion"]}, labels=batch.labels)
    loss, grad = loss_and_grad(APOZeroUnpaired(beta=0.3, undesirable_weight=1.33), alone)
    expected, slopes = loss_and_grad(KTO(beta=0.3, undesirable_weight=1.33), replace(batch, state=kl(0.0)))
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0.0)
    torch.testing.assert_close(grad["completion"], slopes["completion"], rtol=1e-13, atol=1e-16)
    assert APOZeroUnpaired().needs == Needs(legs=("completion",), reference=True, labels=True)


def test_unpaired_apo_of_pairs_is_half_of_apo_zero():
    """1 − σ(r_w) and σ(r_l) as two rows: known losses 0.987503 and 1.031229, so a mean of 1.009366/2."""
    loss = loss_and_grad(APOZeroUnpaired(beta=0.1), tv1_labelled())[0].item()
    assert loss == pytest.approx(1.009366 / 2, **SIX_PLACES)


def test_the_first_loss_of_unpaired_apo():
    assert APOZeroUnpaired().step0 == 0.5
    assert APOZeroUnpaired(desirable_weight=1.33, undesirable_weight=1.33).step0 == pytest.approx(0.665)
    assert APOZeroUnpaired(desirable_weight=1.33).step0 is None


@given(
    seed=st.integers(0, 1000),
    beta=st.sampled_from([0.01, 0.1, 2.0]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    weights=st.sampled_from([(1.0, 1.0), (1.33, 1.0), (0.8, 2.0)]),
)
def test_unpaired_apo_is_what_the_paper_says(seed: int, beta: float, scale: float, weights: tuple[float, float]):
    desirable, undesirable = weights
    objective = APOZeroUnpaired(beta=beta, desirable_weight=desirable, undesirable_weight=undesirable)
    batch = make_batch(objective, seed=seed, rows=5, scale=scale)
    leg = batch["completion"]
    expected = transcriptions_pairs_free.apo_zero_unpaired(
        ragged(leg.logps, leg),
        ragged(leg.ref_logps, leg),
        batch.labels.tolist(),
        beta=beta,
        desirable_weight=desirable,
        undesirable_weight=undesirable,
    )
    assert_transcribed(objective, batch, *expected)


def test_the_estimate_of_one_row():
    """A microbatch of one mismatched response is its own mean."""
    found = KTO().update(KTO().init_state(), {"kl_total": torch.tensor(0.8), "kl_count": torch.tensor(1.0)})
    assert found["kl"].item() == pytest.approx(0.8)
