"""TPO and TPO-L against arithmetic by hand and the paper; other implementations' numbers are in ``test_vectors``."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from objectives import LegBatch, Needs
from objectives.tpo import TPO, TPOL
from tests.objectives import transcriptions
from tests.objectives.batches import (
    BY_HAND,
    FP64_ROUNDING,
    SIX_PLACES,
    assert_transcribed,
    loss_and_grad,
    make_batch,
    make_rows,
    means,
    ragged,
    rows_of,
    tv1,
)

TRIPLE = ("chosen", "rejected", "gold")
EXACT = {"rel": 1e-14}


def one_row() -> LegBatch:
    """Summed log-probs −3, −4 and −2; per token −1.5, −4 and −1."""
    legs = {
        "chosen": make_rows([[-1.0, -2.0]]),
        "rejected": make_rows([[-4.0]]),
        "gold": make_rows([[-0.5, -1.5]]),
    }
    return LegBatch(legs=legs)


def test_tpo_by_hand():
    """β = 0.5, α = 2.

    m = 0.5 · (−3 + 4) = 0.5;   NLL = (0.5 + 1.5)/2 = 1   →   loss = log(1 + e^−0.5) + 2 · 1 = 2.4740769842
    dloss/dm = −σ(−0.5) = −0.3775406688; times β, −0.1887703344 for each chosen token, the opposite for the rejected one
    gold: −2/2 for each token
    """
    loss, grad = loss_and_grad(TPO(beta=0.5, alpha=2.0), one_row())
    assert loss.item() == pytest.approx(2.4740769842, **BY_HAND)
    assert grad["chosen"].tolist() == [pytest.approx([-0.1887703344, -0.1887703344], **BY_HAND)]
    assert grad["rejected"].tolist() == [pytest.approx([0.1887703344], **BY_HAND)]
    assert grad["gold"].tolist() == [[-1.0, -1.0]]


def test_tpo_with_label_smoothing_by_hand():
    """The same row, m = 0.5, with ε = 0.2 and α = 2.

    0.8 · 0.4740769842 + 0.2 · 0.9740769842 = 0.5740769842, and 2 · 1 for gold
    dloss/dm = −0.8 · 0.3775406688 + 0.2 · 0.6224593312 = −0.1775406688; times β: −0.0887703344
    """
    loss, grad = loss_and_grad(TPO(beta=0.5, alpha=2.0, label_smoothing=0.2), one_row())
    assert loss.item() == pytest.approx(2.5740769842, **BY_HAND)
    assert grad["chosen"].tolist() == [pytest.approx([-0.0887703344, -0.0887703344], rel=1e-8)]
    assert grad["rejected"].tolist() == [pytest.approx([0.0887703344], rel=1e-8)]


def test_hinge_by_hand():
    """m = 0.5 as above: max(0, 1 − 0.5) = 0.5, slope −β for each chosen token. With β = 2, m = 2: no loss, no slope."""
    loss, grad = loss_and_grad(TPO(beta=0.5, alpha=0.0, link="hinge"), one_row())
    assert loss.item() == 0.5
    assert (grad["chosen"].tolist(), grad["rejected"].tolist()) == ([[-0.5, -0.5]], [[0.5]])
    loss, grad = loss_and_grad(TPO(beta=2.0, alpha=0.0, link="hinge"), one_row())
    assert loss.item() == 0.0
    assert (grad["chosen"].tolist(), grad["rejected"].tolist()) == ([[0.0, 0.0]], [[0.0]])


def test_ipo_by_hand():
    """Per token −1.5 and −4, target 1/(2 · 0.5) = 1: (2.5 − 1)² = 2.25.

    Slope 2 · 1.5 = 3 per unit of either mean: 3/2 for each of two chosen tokens, −3 for the rejected one.
    """
    loss, grad = loss_and_grad(TPO(beta=0.5, alpha=0.0, link="ipo"), one_row())
    assert loss.item() == 2.25
    assert (grad["chosen"].tolist(), grad["rejected"].tolist()) == ([[1.5, 1.5]], [[-3.0]])


def test_tpo_l_by_hand():
    """β = 2, γ = 1, α = 0.5.

    m = 2 · (−1.5 + 4) − 1 = 4   →   log(1 + e⁻⁴) + 0.5 · 1 = 0.5181499279
    dloss/dm = −σ(−4) = −0.0179862100; times β = 2, over 2 chosen tokens −0.0179862100 each; rejected 0.0359724199
    """
    loss, grad = loss_and_grad(TPOL(beta=2.0, gamma=1.0, alpha=0.5), one_row())
    assert loss.item() == pytest.approx(0.5181499279, **BY_HAND)
    assert grad["chosen"].tolist() == [pytest.approx([-0.01798620996, -0.01798620996], **BY_HAND)]
    assert grad["rejected"].tolist() == [pytest.approx([0.03597241992], **BY_HAND)]
    assert grad["gold"].tolist() == [[-0.25, -0.25]]


def test_equal_responses_cost_a_known_amount():
    """TPO: log 2, as σ(0) = 1/2. TPO-L: log(1 + e^γ), as m = −γ; that is 1.7839007409 for γ = 1.6."""
    legs = {name: make_rows([[-1.0, -3.0]]) for name in ("chosen", "rejected")}
    assert loss_and_grad(TPO(alpha=0), LegBatch(legs=legs))[0].item() == pytest.approx(math.log(2), **EXACT)
    longer = LegBatch(legs={**legs, "rejected": make_rows([[-2.0, -2.0, -2.0]])})
    assert loss_and_grad(TPOL(alpha=0), longer)[0].item() == pytest.approx(1.7839007409, **BY_HAND)


@pytest.mark.parametrize(
    ("objective", "rows", "total"),
    [
        (TPO(beta=0.2, alpha=0.9), (0.798139, 0.533382), 1.385761),
        (TPO(beta=0.01, alpha=1.0), None, 1.491298),
        (TPOL(beta=2.0, gamma=1.6, alpha=0.05), (1.783901, 1.996035), 1.929968),
    ],
    ids=["tpo-0.2", "tpo-0.01", "tpo_l"],
)
def test_known_numbers(objective: TPO | TPOL, rows: tuple[float, ...] | None, total: float):
    """Two rows, with the likelihood of gold: (0.25 + 0.75 + 0.5 + 1 + 1.5)/5 = 0.8 per token."""
    batch = tv1(*TRIPLE)
    output = objective(batch)
    assert output.loss(batch.counts()).item() == pytest.approx(total, **SIX_PLACES)
    assert output.terms["likelihood"].value(batch.counts()).item() == pytest.approx(0.8 * objective.alpha, **EXACT)
    if rows is not None:
        each = [objective(rows_of(batch, slice(i, i + 1))).terms["preference"].total.item() for i in range(2)]
        assert each == pytest.approx(rows, **SIX_PLACES)


@pytest.mark.parametrize("cls", [TPO, TPOL])
def test_without_alpha_there_is_no_gold_response(cls: type[TPO | TPOL]):
    """Neither asked for nor computed; with one, it is what token weights act on."""
    assert cls(alpha=0).needs == Needs(legs=("chosen", "rejected"))
    assert cls(alpha=0.05).needs == Needs(legs=TRIPLE, likelihood=("gold",))
    output = cls(alpha=0)(tv1("chosen", "rejected"))
    assert list(output.terms) == ["preference"]
    assert not [name for name in output.metrics if "gold" in name]


def test_no_reference_is_needed_and_none_is_read():
    for objective in (TPO(), TPOL()):
        assert not objective.needs.reference
        assert objective.step0 is None


def test_metrics_by_hand():
    """The two rows above in nats: chosen −3 and −2.25, rejected −2 and −4, gold −1.5 and −2.5; β = 0.5.

    rewards of TPO are sums times β, of TPO-L means times β: chosen −1 and −1.125, rejected −1 and −1, so one tie
    """
    metrics = means(TPO(beta=0.5), tv1(*TRIPLE))
    assert {name: metrics[name] for name in metrics if not name.startswith("displacement/")} == {
        "rewards/chosen": pytest.approx(0.5 * -2.625),
        "rewards/rejected": pytest.approx(0.5 * -3.0),
        "rewards/margins": pytest.approx(0.5 * 0.375),
        "rewards/accuracies": 0.5,
        "logps/chosen": pytest.approx(-2.625),
        "logps/rejected": pytest.approx(-3.0),
        "logps/gold": pytest.approx(-2.0),
        "lengths/chosen": 2.5,
        "lengths/rejected": 3.0,
        "lengths/gold": 2.5,
    }
    metrics = means(TPOL(beta=1.0), tv1(*TRIPLE))
    assert metrics["rewards/chosen"] == pytest.approx(-1.0625)
    assert metrics["rewards/rejected"] == pytest.approx(-1.0)
    assert metrics["rewards/accuracies"] == 0.25


def test_link_and_smoothing_exclude_each_other():
    with pytest.raises(ValueError, match="label_smoothing has no meaning with link hinge; use link sigmoid"):
        TPO(link="hinge", label_smoothing=0.1)


SEEDS = st.integers(0, 1000)
BETAS = st.sampled_from([0.01, 0.1, 2.0])
SCALES = st.sampled_from([0.1, 1.0, 30.0])


def transcribed_legs(batch: LegBatch) -> list[transcriptions.Ragged]:
    return [ragged(batch[name].logps, batch[name]) for name in TRIPLE]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("link", "label_smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.1), ("sigmoid", 0.4), ("hinge", 0.0), ("ipo", 0.0)]
)
@given(seed=SEEDS, beta=BETAS, alpha=st.sampled_from([0.05, 1.0]), scale=SCALES, weighted=st.booleans())
def test_tpo_is_what_the_paper_says(
    link: str, label_smoothing: float, seed: int, beta: float, alpha: float, scale: float, weighted: bool
):
    objective = TPO(beta=beta, alpha=alpha, link=link, label_smoothing=label_smoothing)
    batch = make_batch(objective, seed=seed, rows=5, scale=scale, weighted=weighted)
    gold_weight = ragged(batch["gold"].weight, batch["gold"]) if weighted else None
    expected = transcriptions.tpo(
        *transcribed_legs(batch),
        beta=beta,
        alpha=alpha,
        link=link,
        label_smoothing=label_smoothing,
        gold_weight=gold_weight,
    )
    assert_transcribed(objective, batch, *expected)


@pytest.mark.slow
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.4])
@given(seed=SEEDS, beta=BETAS, gamma=st.sampled_from([0.0, 1.6, 10.0]), scale=SCALES, weighted=st.booleans())
def test_tpo_l_is_what_the_paper_says(
    label_smoothing: float, seed: int, beta: float, gamma: float, scale: float, weighted: bool
):
    objective = TPOL(beta=beta, gamma=gamma, alpha=0.5, label_smoothing=label_smoothing)
    batch = make_batch(objective, seed=seed, rows=5, scale=scale, weighted=weighted)
    gold_weight = ragged(batch["gold"].weight, batch["gold"]) if weighted else None
    expected = transcriptions.tpo_l(
        *transcribed_legs(batch),
        beta=beta,
        gamma=gamma,
        alpha=0.5,
        label_smoothing=label_smoothing,
        gold_weight=gold_weight,
    )
    assert_transcribed(objective, batch, *expected)


def test_tpo_is_tpo_l_on_responses_of_one_token():
    """Sums and means are then the same, and without γ so are the losses."""
    batch = LegBatch(legs={name: make_rows([[-1.0 - i], [-2.0]]) for i, name in enumerate(TRIPLE)})
    losses = [loss_and_grad(cls, batch)[0].item() for cls in (TPO(beta=0.7), TPOL(beta=0.7, gamma=0.0, alpha=1.0))]
    assert losses[0] == pytest.approx(losses[1], rel=FP64_ROUNDING["rtol"])
