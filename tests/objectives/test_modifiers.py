"""Modifiers against arithmetic by hand and the papers, and the laws over every objective that takes them."""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError, asdict, dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from objectives import (
    MODIFIERS,
    OBJECTIVES,
    Coupled,
    LegBatch,
    Mixture,
    Modified,
    Needs,
    Objective,
    Stateful,
    mixture,
    modified,
    with_own_step,
)
from objectives.absolute import NCA, SPPO, APODown, APOZero, BCOPair
from objectives.beta_dpo import BetaDPO
from objectives.dpo import DPO, DPOP, CalDPO, DPONorm, Robust
from objectives.links import EXO, IPO, DiscoPOP, Hinge
from objectives.modifiers import LDDPO, MMDPO, RDPO, TRDPO, WPO, FDivergence, Modifier
from objectives.reference_free import CPO, SimPO
from objectives.registry import field_docs, formula, source
from objectives.rpo import IRPO
from objectives.sft import SFT
from objectives.sorting import AOT
from tests.objectives import transcriptions_pairs, transcriptions_pairs_modified
from tests.objectives.batches import (
    BY_HAND,
    FP64_ROUNDING,
    SIX_PLACES,
    apart,
    assert_transcribed,
    build,
    four,
    loss_and_grad,
    make_batch,
    make_rows,
    means,
    one_row,
    ragged,
    row_losses,
    rows_of,
    tv1,
    with_logps,
)
from tests.objectives.test_conformance import (
    NOT_A_NUMBER,
    Values,
    assert_constants_get_no_gradient,
    assert_finite,
    assert_gradients_are_finite_differences,
    assert_masked_places_change_nothing,
    assert_metrics_carry_no_graph,
    assert_microbatches_add_up,
    assert_padding_columns_change_nothing,
    assert_rows_may_be_permuted,
)
from tests.objectives.transcriptions_pairs import RowLoss

LEGS = ("chosen", "rejected")

FORMS: dict[str, list[Any]] = {
    "r_dpo": [RDPO(length_alpha=0.05)],
    "ld_dpo": [LDDPO(ld_alpha=0.3), LDDPO(ld_alpha=0.0, applies_to="policy")],
    "wpo": [WPO(), WPO(clamp=False)],
    "mm_dpo": [MMDPO()],
    "f_divergence": [
        FDivergence(divergence="js"),
        FDivergence(divergence="forward_kl"),
        FDivergence(divergence="alpha", divergence_alpha=0.5),
    ],
    "tr_dpo": [TRDPO()],
}
"""Each modifier in the forms that differ."""


def objectives_of(name: str) -> list[Objective]:
    """The objective, and IPO in both of its forms: modifiers tell them apart."""
    return [build(name), IPO(reduction="sum")] if name == "ipo" else [build(name)]


def accepted(modifier: str, name: str) -> list[Modified]:
    """The objective under that modifier, in every form; none if it makes no sense."""
    found = (modified(name, inner, [(modifier, form)])[0] for inner in objectives_of(name) for form in FORMS[modifier])
    return [each for each in found if isinstance(each, Modified)]


COMBINATIONS = [(m, name) for m in MODIFIERS.names() for name in OBJECTIVES.names() if accepted(m, name)]
every_combination = pytest.mark.parametrize(
    ("modifier", "name"), COMBINATIONS, ids=[f"{modifier}-{name}" for modifier, name in COMBINATIONS]
)


def under(objective: Objective, *modifiers: Modifier) -> Objective:
    """The objective with these modifiers, which must all act."""
    named = [(MODIFIERS.name_of(each), each) for each in modifiers]
    acting, refused = modified(OBJECTIVES.name_of(objective), objective, named)
    assert not refused
    return acting


def log_sum_p2(batch: LegBatch, values: dict[str, list[list[float]]]) -> LegBatch:
    legs = {name: replace(batch[name], extras={"log_sum_p2": make_rows(values[name]).logps}) for name in batch}
    return replace(batch, legs=legs)


def scored(batch: LegBatch, differences: list[float]) -> LegBatch:
    up = torch.tensor(differences, dtype=torch.float64)
    return replace(batch, scores={"chosen": up + 1.5, "rejected": torch.full_like(up, 1.5)})


# R-DPO


def test_r_dpo_by_hand():
    """One row of 2 and 1 tokens, log-ratios 1 and −1, β = 0.5, α = 0.25: m = 1 + 0.25 · (2 − 1) = 1.25.

    loss log(1 + e^−1.25) = 0.2519290813, slope −0.5 · σ(−1.25) = −0.1113500694 a token
    """
    objective = under(DPO(beta=0.5), RDPO(length_alpha=0.25))
    loss, grad = loss_and_grad(objective, one_row())
    assert loss.item() == pytest.approx(0.2519290813, **BY_HAND)
    assert grad["chosen"].tolist() == [pytest.approx([-0.1113500694, -0.1113500694], **BY_HAND)]
    metrics = means(objective, one_row())
    assert metrics["r_dpo/margin"] == pytest.approx(0.25)
    assert metrics["r_dpo/length_gap"] == 1.0
    assert metrics["rewards/margins"] == pytest.approx(1.0), "rewards are logged without it"


def test_r_dpo_pushes_a_longer_chosen_response_less():
    """The sign: where the log-ratios say nothing (d = 0), a longer chosen response costs less than log 2."""
    longer, shorter = make_rows([[-1.0] * 5], [[-1.0] * 5]), make_rows([[-1.0] * 2], [[-1.0] * 2])
    objective = under(DPO(), RDPO(length_alpha=0.05))
    loss, grad = loss_and_grad(objective, LegBatch(legs={"chosen": longer, "rejected": shorter}))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.15)), rel=1e-12)
    assert loss.item() < math.log(2)
    assert grad["chosen"].abs().max() < 0.05
    loss, grad = loss_and_grad(objective, LegBatch(legs={"chosen": shorter, "rejected": longer}))
    assert loss.item() > math.log(2)
    assert grad["chosen"].abs().max() > 0.05
    opposite = under(DPO(), RDPO(length_alpha=-0.05))
    assert loss_and_grad(opposite, LegBatch(legs={"chosen": longer, "rejected": shorter}))[0].item() > math.log(2)


def test_known_numbers_of_r_dpo():
    """α = 0.05: m = 0.05 + 0.05 · 1 and −0.125 − 0.05 · 2."""
    objective, batch = under(DPO(beta=0.1), RDPO(length_alpha=0.05)), tv1(*LEGS)
    assert row_losses(objective, batch) == pytest.approx([0.644397, 0.811962], **SIX_PLACES)
    assert loss_and_grad(objective, batch)[0].item() == pytest.approx(0.728179, **SIX_PLACES)


# LD-DPO


def ld_row() -> LegBatch:
    """Chosen log-probs −1, −2, −4 (reference −1.5, −2.5, −3), rejected −3 (reference −2): the tail gains −1."""
    return LegBatch(
        legs={
            "chosen": make_rows([[-1.0, -2.0, -4.0]], [[-1.5, -2.5, -3.0]]),
            "rejected": make_rows([[-3.0]], [[-2.0]]),
        }
    )


def test_ld_dpo_by_hand():
    """k = min(3, 1) = 1, α = 0.5, β = 1.

    both: −1 + 0.5 · (−2 − 4) − (−1.5 + 0.5 · (−2.5 − 3)) = −4 + 4.25 = 0.25, rejected −1: m = 1.25
    policy: −4 − (−1.5 − 2.5 − 3) = 3, m = 4
    slopes −σ(−m) for the first chosen token, half of it for the others
    """
    for applies_to, margin in (("both", 1.25), ("policy", 4.0)):
        objective = under(DPO(beta=1.0), LDDPO(ld_alpha=0.5, applies_to=applies_to))
        loss, grad = loss_and_grad(objective, ld_row())
        slope = -1 / (1 + math.exp(margin))
        assert loss.item() == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-13)
        assert grad["chosen"].tolist() == [pytest.approx([slope, slope / 2, slope / 2], rel=1e-13)]
        assert grad["rejected"].tolist() == [pytest.approx([-slope], rel=1e-13)]
        assert means(objective, ld_row())["ld_dpo/beyond"] == pytest.approx(2 / 4)


def test_ld_dpo_without_the_tail_compares_prefixes():
    """α = 0: of both responses only as many tokens as the shorter one has; what the rest says is not read."""
    objective = under(DPO(beta=1.0), LDDPO(ld_alpha=0.0))
    batch = ld_row()
    prefix = LegBatch(legs={"chosen": make_rows([[-1.0]], [[-1.5]]), "rejected": batch["rejected"]})
    loss, grad = loss_and_grad(objective, batch)
    assert torch.equal(loss, loss_and_grad(DPO(beta=1.0), prefix)[0])
    assert grad["chosen"][0, 1:].tolist() == [0.0, 0.0]
    excluded = torch.tensor([[-1.0, -math.inf, -math.inf]], dtype=torch.float64)
    again, _ = loss_and_grad(objective, with_logps(batch, {**{n: batch[n].logps for n in batch}, "chosen": excluded}))
    assert torch.equal(again, loss)


def test_ld_dpo_of_responses_of_equal_length_changes_nothing():
    batch = apart([1.0, -2.0], [0.3, 0.1])
    assert torch.equal(loss_and_grad(under(DPO(), LDDPO()), batch)[0], loss_and_grad(DPO(), batch)[0])


def test_known_numbers_of_ld_dpo():
    """β = 0.1; α = 0.5 and 0 on both, 0.5 on the policy alone: d = 0.75, −1.125; 1, −1; 1.25, −2.5."""
    batch = tv1(*LEGS)
    both = under(DPO(), LDDPO(ld_alpha=0.5))
    assert row_losses(both, batch) == pytest.approx([0.656350, 0.750978], **SIX_PLACES)
    for modifier, expected in (
        (LDDPO(ld_alpha=0.5), 0.703664),
        (LDDPO(ld_alpha=0.0), 0.694397),
        (LDDPO(ld_alpha=0.5, applies_to="policy"), 0.729269),
    ):
        assert loss_and_grad(under(DPO(), modifier), batch)[0].item() == pytest.approx(expected, **SIX_PLACES)


def test_ld_dpo_leaves_likelihoods_alone():
    """IRPO's preference changes, its likelihood does not."""
    batch = make_batch(IRPO(), seed=3, weighted=True)
    inner, outer = IRPO()(batch), under(IRPO(), LDDPO(ld_alpha=0.0))(batch)
    assert torch.equal(inner.terms["likelihood"].values, outer.terms["likelihood"].values)
    assert not torch.equal(inner.terms["preference"].values, outer.terms["preference"].values)


# WPO


def test_wpo_by_hand():
    """One row, log-ratios 1 and −1, β = 0.5, DPO's loss 0.3132616875; log Σp² of −1.25, −1.25 and −3.25.

    w(chosen) = exp[(0.25 − 0.75)/2] = e^−0.25, w(rejected) = e^0.25: W = 1. With −2.75 it is e^−0.5 = 0.6065306597.
    """
    objective = under(DPO(beta=0.5), WPO())
    for rejected, weight in ((-3.25, 1.0), (-2.75, 0.6065306597)):
        batch = log_sum_p2(one_row(), {"chosen": [[-1.25, -1.25]], "rejected": [[rejected]]})
        loss, grad = loss_and_grad(objective, batch)
        assert loss.item() == pytest.approx(weight * 0.3132616875, **BY_HAND)
        assert grad["chosen"].tolist() == [pytest.approx([-weight * 0.1344707107] * 2, **BY_HAND)]
        assert means(objective, batch)["wpo/weight"] == pytest.approx(weight, **BY_HAND)
        assert means(objective, batch)["wpo/chosen"] == pytest.approx(math.exp(-0.25))


def test_wpo_is_at_most_one_unless_it_is_not_clamped():
    """log w(chosen) + log w(rejected) = 2: clamped 1, unclamped e²."""
    batch = log_sum_p2(one_row(), {"chosen": [[-2.0, -3.0]], "rejected": [[-4.0]]})
    plain = loss_and_grad(DPO(), one_row())[0].item()
    assert loss_and_grad(under(DPO(), WPO()), batch)[0].item() == plain
    unclamped = loss_and_grad(under(DPO(), WPO(clamp=False)), batch)[0].item()
    assert unclamped == pytest.approx(math.exp(2) * plain, rel=1e-13)


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("name", ["dpo", "hinge", "nca", "irpo", "simpo"])
def test_the_weight_of_wpo_is_detached(name: str, clamp: bool):
    """Every row's gradient is the inner objective's times W: what W itself depends on adds nothing."""
    inner = build(name)
    objective = under(inner, WPO(clamp=clamp))
    batch = make_batch(objective, seed=4)
    weights = WPO(clamp=clamp).row_weights(batch)
    assert weights.min() < 1
    slopes, inner_slopes = loss_and_grad(objective, batch)[1], loss_and_grad(inner, batch)[1]
    for leg in LEGS:
        assert_close(slopes[leg], weights[:, None] * inner_slopes[leg], **FP64_ROUNDING)


def test_known_numbers_of_wpo():
    """DPO's losses of d = 0.5 and −1.25 times W: log w −0.7 and −0.4, −0.1 and 0.6; then from tokens."""
    batch = apart([0.5, -1.25])
    ours = {
        leg: [[x - w] for x, w in zip(batch[leg].logps.flatten().tolist(), each, strict=True)]
        for leg, each in (("chosen", (-0.7, -0.1)), ("rejected", (-0.4, 0.6)))
    }
    batch = log_sum_p2(batch, ours)
    unclamped, clamped = under(DPO(), WPO(clamp=False)), under(DPO(), WPO())
    assert WPO(clamp=False).row_weights(batch).tolist() == pytest.approx([0.332871, 1.648721], **SIX_PLACES)
    assert row_losses(unclamped, batch) == pytest.approx([0.222511, 1.249070], **SIX_PLACES)
    assert loss_and_grad(unclamped, batch)[0].item() == pytest.approx(0.735790, **SIX_PLACES)
    assert loss_and_grad(clamped, batch)[0].item() == pytest.approx(0.490055, **SIX_PLACES)
    tokens = {"chosen": [[-1, -1.5, -1.25], [-1.75, -1.0]], "rejected": [[-1.0, -1.0], [-1.5, -1.25, -2.0, -0.75]]}
    batch = log_sum_p2(tv1(*LEGS), tokens)
    assert WPO(clamp=False).row_weights(batch).tolist() == pytest.approx([1.284025, 1.868246], **SIX_PLACES)
    assert loss_and_grad(unclamped, batch)[0].item() == pytest.approx(1.136850, **SIX_PLACES)


def test_the_weight_of_a_response_from_logits():
    """Two of four positions are response: mean of log p − log Σp² of −0.680270 + 0.952933 and −0.665732 + 0.960940."""
    leg = replace(make_rows([[-0.680270, -0.665732]]), extras={"log_sum_p2": make_rows([[-0.952933, -0.960940]]).logps})
    assert WPO().weight(leg).item() == pytest.approx(1.328348, abs=2e-6)


def test_wpo_weighs_every_term():
    """IRPO's likelihood too, row by row; the tokens it is averaged over stay what they are."""
    objective = under(IRPO(), WPO())
    batch = make_batch(objective, seed=5)
    inner, outer, weights = IRPO()(batch), objective(batch), WPO().row_weights(batch)
    for key, term in inner.terms.items():
        assert_close(outer.terms[key].values, term.values * weights, **FP64_ROUNDING)
        assert outer.terms[key].per == term.per


# MM-DPO


def test_mm_dpo_by_hand():
    """w = 1, k = log 2, scores one apart: the factor is 1 + (1 − ½) = 1.5. Two apart 1.75; −1 apart counts as 0."""
    modifier = MMDPO(scaling=1.0, sharpness=math.log(2))
    batch = scored(apart([1.0, 1.0, 1.0]), [1.0, 2.0, -1.0])
    assert modifier.factor(batch).tolist() == pytest.approx([1.5, 1.75, 1.0], rel=1e-13)
    losses = row_losses(under(DPO(beta=0.4), modifier), batch)
    assert losses == pytest.approx([math.log1p(math.exp(-0.4 * f)) for f in (1.5, 1.75, 1.0)], rel=1e-13)
    metrics = means(under(DPO(beta=0.4), modifier), batch)
    assert metrics["mm_dpo/factor"] == pytest.approx(4.25 / 3)
    assert metrics["rewards/chosen"] == pytest.approx(0.4 * 4.25 / 3)


def test_known_numbers_of_mm_dpo():
    """β 0.1, w and k 0.5: β′ at differences of 0, 1 and 3; never above β(1 + w)."""
    batch = scored(apart([0.0, 0.0, 0.0, 0.0]), [0.0, 1.0, 3.0, 1e4])
    betas = 0.1 * MMDPO(scaling=0.5, sharpness=0.5).factor(batch)
    assert betas.tolist() == pytest.approx([0.100000, 0.119673, 0.138843, 0.15], **SIX_PLACES)


@pytest.mark.parametrize("objective", [IPO(), IPO(reduction="sum"), SPPO(beta=0.1), CalDPO(beta=0.1)], ids=type)
def test_mm_dpo_moves_targets_too(objective: Objective):
    """Where β sets a target, 1/(2β), a larger β brings it nearer: as the objective itself does with that β."""
    batch = scored(make_batch(objective, seed=6, rows=3), [0.0, 1.0, 3.0])
    losses = row_losses(under(objective, MMDPO()), batch)
    for row, factor in enumerate(MMDPO().factor(batch).tolist()):
        alone = replace(objective, beta=objective.beta * factor)
        assert losses[row] == pytest.approx(row_losses(alone, rows_of(batch, slice(row, row + 1)))[0], rel=1e-12)


# f-divergences


def test_f_divergences_by_hand():
    """Log-ratios log 2 and −log 2, β = 1: f′(2) − f′(½).

    forward_kl 1 − ½ − (1 − 2) = 1.5;  js log(4/3) − log(2/3) = log 2;  alpha ½: −2·(2^−½ − 2^½) = √2
    """
    batch = apart([math.log(2)], [-math.log(2)])
    for divergence, margin in (("forward_kl", 1.5), ("js", math.log(2)), ("alpha", math.sqrt(2))):
        objective = under(DPO(beta=1.0), FDivergence(divergence=divergence))
        assert loss_and_grad(objective, batch)[0].item() == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-13)
        metrics = means(objective, batch)
        assert metrics["rewards/margins"] == pytest.approx(2 * math.log(2)), "rewards are logged as ever"
        assert metrics["f_divergence/chosen"] - metrics["f_divergence/rejected"] == pytest.approx(margin)


@pytest.mark.parametrize(
    ("divergence", "rows", "mean"),
    [
        ("forward_kl", (0.661237, 0.740003), 0.700620),
        ("js", (0.679199, 0.719110), 0.699154),
        ("alpha", (0.665148, 0.747195), 0.706171),
    ],
)
def test_known_numbers_of_f_divergences(divergence: str, rows: tuple[float, ...], mean: float):
    objective, batch = under(DPO(beta=0.1), FDivergence(divergence=divergence)), tv1(*LEGS)
    assert row_losses(objective, batch) == pytest.approx(rows, **SIX_PLACES)
    assert loss_and_grad(objective, batch)[0].item() == pytest.approx(mean, **SIX_PLACES)


def test_alpha_lies_between_forward_and_reverse_kl():
    """Its ends: 0 is forward_kl, and towards 1 it becomes the log-ratio itself, as in DPO."""
    ratios = torch.linspace(-5.0, 5.0, 11, dtype=torch.float64)
    forward = FDivergence(divergence="forward_kl").slope(ratios)
    assert_close(FDivergence(divergence="alpha", divergence_alpha=0.0).slope(ratios), forward, **FP64_ROUNDING)
    assert_close(FDivergence(divergence="alpha", divergence_alpha=1 - 1e-9).slope(ratios), ratios, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
def test_f_divergences_are_finite_at_extremes(divergence: str):
    """e^−r of r = −1000 would be infinite; the exponent is capped."""
    ratios = torch.tensor([-1e5, -1e3, -81.0, 0.0, 1e3, 1e5], requires_grad=True)
    slopes = FDivergence(divergence=divergence).slope(ratios)
    slopes.sum().backward()
    assert slopes.isfinite().all()
    assert ratios.grad.isfinite().all()
    assert (slopes.detach().diff() >= 0).all()
    assert slopes[3].item() == pytest.approx(0.0, abs=1e-7)


# TR-DPO


def test_tr_dpo_by_hand():
    """0.6 · 2 + 0.4 · 1 = 1.6, in place; α = 1 is a copy. The formula of the objective stays."""
    reference, policy = torch.tensor([1.0, 0.0]), torch.tensor([2.0, -1.0], requires_grad=True)
    TRDPO().sync(reference, policy)
    assert reference.tolist() == pytest.approx([1.6, -0.6])
    assert not reference.requires_grad
    TRDPO(sync_alpha=1.0).sync(reference, policy)
    assert reference.tolist() == [2.0, -1.0]
    objective = under(DPO(), TRDPO())
    batch = make_batch(objective, seed=7)
    assert torch.equal(loss_and_grad(objective, batch)[0], loss_and_grad(DPO(), batch)[0])


# against the papers


@dataclass(frozen=True)
class Inner:
    """An objective with β = 0.3 and its transcription, which takes β and these other keys."""

    objective: Objective
    transcribed: Callable[..., RowLoss]
    keys: dict[str, Any]

    def row(self, beta: float = 0.3) -> RowLoss:
        return self.transcribed(beta=beta, **self.keys)


OF_SUMS = [
    Inner(DPO(beta=0.3, label_smoothing=0.1), transcriptions_pairs.dpo, {"label_smoothing": 0.1}),
    Inner(Robust(beta=0.3, label_smoothing=0.1), transcriptions_pairs.robust, {"label_smoothing": 0.1}),
    Inner(Hinge(beta=0.3), transcriptions_pairs.hinge, {}),
    Inner(IPO(beta=0.3, reduction="sum"), transcriptions_pairs.ipo, {"reduction": "sum"}),
    Inner(EXO(beta=0.3, label_smoothing=0.1), transcriptions_pairs.exo, {"label_smoothing": 0.1}),
    Inner(DiscoPOP(beta=0.3, tau=0.4), transcriptions_pairs.discopop, {"tau": 0.4}),
]
PER_TOKEN = [
    Inner(IPO(beta=0.3), transcriptions_pairs.ipo, {"reduction": "mean"}),
    Inner(DPONorm(beta=0.3), transcriptions_pairs.dpo_norm, {}),
]
OF_EACH_REWARD = [
    Inner(DPOP(beta=0.3, penalty=3.0), transcriptions_pairs.dpop, {"penalty": 3.0}),
    Inner(CalDPO(beta=0.3), transcriptions_pairs.cal_dpo, {}),
    Inner(NCA(beta=0.3), transcriptions_pairs.nca, {}),
    Inner(BCOPair(beta=0.3, shift="none"), transcriptions_pairs.bco_pair, {"delta": 0.0}),
    Inner(SPPO(beta=0.3), transcriptions_pairs.sppo, {}),
    Inner(APOZero(beta=0.3), transcriptions_pairs.apo_zero, {}),
    Inner(APODown(beta=0.3), transcriptions_pairs.apo_down, {}),
]


def over(inners: Sequence[Inner]) -> Any:
    ids = [f"{OBJECTIVES.name_of(each.objective)}-{i}" for i, each in enumerate(inners)]
    return pytest.mark.parametrize("inner", inners, ids=ids)


def batches(objective: Objective) -> list[LegBatch]:
    return [make_batch(objective, seed=seed, rows=4) for seed in range(5)]


@pytest.mark.slow
@over(OF_SUMS)
@pytest.mark.parametrize("alpha", [-0.05, 0.01, 0.3])
def test_r_dpo_is_what_the_paper_says(inner: Inner, alpha: float):
    objective = under(inner.objective, RDPO(length_alpha=alpha))
    row = transcriptions_pairs_modified.r_dpo(inner.row(), beta=0.3, alpha=alpha)
    for batch in batches(objective):
        assert_transcribed(objective, batch, *transcriptions_pairs.over_rows(row, *four(batch)))


@pytest.mark.slow
@over([*OF_SUMS, *PER_TOKEN])
@pytest.mark.parametrize(("kind", "alpha"), [("forward_kl", 0.5), ("js", 0.5), ("alpha", 0.5), ("alpha", 0.0)])
def test_f_divergences_are_what_the_paper_says(inner: Inner, kind: str, alpha: float):
    objective = under(inner.objective, FDivergence(divergence=kind, divergence_alpha=alpha))
    row = transcriptions_pairs_modified.f_divergence(inner.row(), kind=kind, alpha=alpha)
    for batch in batches(objective):
        assert_transcribed(objective, batch, *transcriptions_pairs.over_rows(row, *four(batch)))


@pytest.mark.slow
@over([*OF_SUMS, *OF_EACH_REWARD])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.3])
@pytest.mark.parametrize("applies_to", ["both", "policy"])
def test_ld_dpo_is_what_the_paper_says(inner: Inner, alpha: float, applies_to: str):
    """Also with an α that no float32 is."""
    objective = under(inner.objective, LDDPO(ld_alpha=alpha, applies_to=applies_to))
    for batch in batches(objective):
        expected = transcriptions_pairs_modified.ld_dpo(
            inner.row(), *four(batch), alpha=alpha, reference=applies_to == "both"
        )
        assert_transcribed(objective, batch, *expected)


@pytest.mark.slow
@over([*OF_SUMS, *PER_TOKEN, *OF_EACH_REWARD])
@pytest.mark.parametrize("clamp", [True, False])
def test_wpo_is_what_the_paper_says(inner: Inner, clamp: bool):
    objective = under(inner.objective, WPO(clamp=clamp))
    for batch in batches(objective):
        relative = [ragged(batch[leg].extras["log_sum_p2"], batch[leg]) for leg in LEGS]
        weights = transcriptions_pairs_modified.wpo_weights(*four(batch)[:2], *relative, clamped=clamp)
        expected = transcriptions_pairs_modified.of_each_row([inner.row()] * 4, weights, *four(batch))
        assert_transcribed(objective, batch, *expected)


@pytest.mark.slow
@over([*OF_SUMS, *PER_TOKEN, *OF_EACH_REWARD])
@pytest.mark.parametrize("scaling", [0.1, 3.0])
def test_mm_dpo_is_what_the_paper_says(inner: Inner, scaling: float):
    objective = under(inner.objective, MMDPO(scaling=scaling, sharpness=0.7))
    for batch in batches(objective):
        deltas = (batch.scores["chosen"] - batch.scores["rejected"]).clamp(min=0).tolist()
        rows = [
            inner.row(transcriptions_pairs_modified.mm_dpo_beta(each, beta=0.3, weight=scaling, rate=0.7))
            for each in deltas
        ]
        expected = transcriptions_pairs_modified.of_each_row(rows, [1.0] * 4, *four(batch))
        assert_transcribed(objective, batch, *expected)


# which goes with which


PAIRS_WITH_REFERENCE = {
    "dpo", "robust", "hinge", "ipo", "exo", "discopop", "dpo_norm", "dpop", "cal_dpo", "nca", "bco_pair", "sppo",
    "apo_zero", "apo_down", "tdpo", "rpo", "irpo", "rpo_reward_aware", "xpo", "aot", "aot_unpaired", "beta_dpo",
}  # fmt: skip
PAIRS_WITHOUT = {"cpo", "simpo", "alpha_po", "orpo", "tpo", "tpo_l", "symbolic"}
OF_DIFFERENCES = {"dpo", "robust", "hinge", "ipo", "exo", "discopop", "rpo", "irpo", "rpo_reward_aware", "xpo"}
COUPLED = {"aot", "aot_unpaired", "beta_dpo"}
LABELLED = {"kto", "bco", "apo_zero_unpaired"}


@pytest.mark.parametrize(
    ("modifier", "expected"),
    [
        ("r_dpo", OF_DIFFERENCES | {"cpo", "tpo"}),
        ("ld_dpo", (PAIRS_WITH_REFERENCE | PAIRS_WITHOUT) - {"tdpo"}),
        ("wpo", (PAIRS_WITH_REFERENCE | PAIRS_WITHOUT) - COUPLED),
        ("mm_dpo", (PAIRS_WITH_REFERENCE | PAIRS_WITHOUT) - COUPLED - {"orpo", "symbolic"}),
        ("f_divergence", OF_DIFFERENCES | {"dpo_norm"}),
        ("tr_dpo", PAIRS_WITH_REFERENCE | LABELLED | {"nash_md"}),
    ],
)
def test_what_takes_which_modifier(modifier: str, expected: set[str]):
    """By what each does: a length reward wants a difference of sums, an f-divergence a reference and a difference."""
    assert {name for name in OBJECTIVES.names() if accepted(modifier, name)} == expected


@pytest.mark.parametrize(
    ("modifier", "objective", "reason"),
    [
        (RDPO(), DPONorm(), "per token, so length is accounted for"),
        (RDPO(), IPO(), "per token, so length is accounted for"),
        (RDPO(), SimPO(), "per token, so length is accounted for"),
        (RDPO(), NCA(), "each reward enters by itself"),
        (RDPO(), AOT(), "rows are coupled by the step"),
        (FDivergence(), SPPO(), r"log Z\(x\) would not cancel"),
        (FDivergence(), DPOP(), r"log Z\(x\) would not cancel"),
        (FDivergence(), CPO(), "no reference to diverge from"),
        (FDivergence(), BetaDPO(), "rows are coupled by the step"),
        (WPO(), AOT(), "rows are coupled by the step"),
        (WPO(), SFT(), "not about .*pairs"),
        (MMDPO(), build("orpo"), "has no β to scale"),
        (MMDPO(), BetaDPO(), "sets β itself"),
        (MMDPO(), AOT(), "rows are coupled by the step"),
        (LDDPO(), build("tdpo"), "whole distributions token by token"),
        (LDDPO(), build("kto"), "not about .*pairs"),
        (TRDPO(), CPO(), "has no reference"),
        (TRDPO(), SFT(), "has no reference"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_reason(modifier: Modifier, objective: Objective, reason: str):
    name = MODIFIERS.name_of(modifier)
    same, refused = modified(OBJECTIVES.name_of(objective), objective, [(name, modifier)])
    assert same is objective
    assert re.search(reason, refused[name])
    with pytest.raises(ValueError, match=rf"^{name} has nothing to act on: it makes no sense for .*{reason}"):
        mixture([(OBJECTIVES.name_of(objective), objective, 1.0)], [(name, modifier)])


def test_in_a_list_a_modifier_acts_on_what_it_makes_sense_for():
    """MPO's list under R-DPO: DPO takes it, the likelihood and the classifier's reward do not."""
    listed = mixture(
        [("dpo", DPO(), 0.8), ("bco_pair", BCOPair(shift="none"), 0.2), ("sft", SFT(leg="chosen"), 1.0)],
        [("r_dpo", RDPO(length_alpha=0.05))],
    )
    assert isinstance(listed, Mixture)
    assert {name for name, part in listed.parts.items() if isinstance(part, Modified)} == {"dpo"}
    loss = loss_and_grad(listed, tv1(*LEGS))[0].item()
    assert loss == pytest.approx(0.8 * 0.728179 + 0.2 * 1.405864 + 1.050000, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "named", [("r_dpo", "wpo"), ("f_divergence", "r_dpo"), ("ld_dpo", "mm_dpo"), ("wpo", "ld_dpo")]
)
def test_two_modifiers_act_together(named: tuple[str, str]):
    """The gradient is right, each logs its own, and what either needs is needed."""
    listed = mixture([("dpo", DPO(), 1.0)], [(name, FORMS[name][0]) for name in named])
    objective = listed.parts["dpo"]
    batch = make_batch(objective, seed=8, rows=2)
    assert_gradients_are_finite_differences(objective, batch)
    logged = set(objective(batch).metrics)
    assert all(any(key.startswith(f"{name}/") for key in logged) for name in named)
    for name in named:
        alone = under(DPO(), FORMS[name][0])
        assert loss_and_grad(alone, batch)[0] != loss_and_grad(objective, batch)[0]


def test_two_that_take_length_away_are_refused():
    with pytest.raises(ValueError, match="r_dpo and ld_dpo both take the effect of length away"):
        mixture([("dpo", DPO(), 1.0)], [("ld_dpo", LDDPO()), ("r_dpo", RDPO())])


def test_a_length_reward_is_not_scaled_by_dynamic_beta():
    """R-DPO's α is in units of reward: m = β′·d + α·gap, with β′ of MM-DPO."""
    listed = mixture(
        [("dpo", DPO(beta=0.4), 1.0)],
        [("mm_dpo", MMDPO(scaling=1.0, sharpness=math.log(2))), ("r_dpo", RDPO(length_alpha=0.25))],
    )
    loss = loss_and_grad(listed, scored(one_row(), [1.0]))[0].item()
    assert loss == pytest.approx(math.log1p(math.exp(-(0.4 * 1.5 * 2 + 0.25))), rel=1e-13)


def test_a_modifier_named_twice_is_refused():
    with pytest.raises(ValueError, match="r_dpo"):
        mixture([("dpo", DPO(), 1.0)], [("r_dpo", RDPO()), ("r_dpo", RDPO(length_alpha=0.2))])


# the laws


@pytest.mark.slow
@every_combination
def test_gradients_are_finite_differences(modifier: str, name: str):
    for seed, objective in enumerate(accepted(modifier, name)):
        rows = 3 if isinstance(objective, Coupled) else 1
        batch = make_batch(objective, seed=seed, rows=rows, later=seed % 2 == 1)
        assert_gradients_are_finite_differences(objective, batch)


@pytest.mark.slow
@every_combination
def test_microbatches_add_up(modifier: str, name: str):
    for objective in accepted(modifier, name):
        for seed, cuts in enumerate(([2], [0, 3, 3])):
            assert_microbatches_add_up(objective, make_batch(objective, seed=seed, rows=5, later=seed == 1), cuts)


@pytest.mark.slow
@every_combination
def test_rows_may_be_permuted(modifier: str, name: str):
    for objective in accepted(modifier, name):
        for seed, order in enumerate(([4, 3, 2, 1, 0], [2, 0, 1, 4, 3])):
            assert_rows_may_be_permuted(objective, make_batch(objective, seed=seed, rows=5, later=seed == 1), order)


@pytest.mark.slow
@every_combination
def test_padding_columns_change_nothing(modifier: str, name: str):
    for objective in accepted(modifier, name):
        for seed, extra in enumerate((1, 17)):
            assert_padding_columns_change_nothing(objective, make_batch(objective, seed=seed), extra)


@pytest.mark.slow
@every_combination
def test_masked_places_change_nothing(modifier: str, name: str):
    for objective in accepted(modifier, name):
        for seed, junk in enumerate((math.nan, math.inf)):
            batch = make_batch(objective, seed=seed, dtype=torch.float32)
            assert_masked_places_change_nothing(objective, batch, junk)


@pytest.mark.slow
@every_combination
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_finite_everywhere(modifier: str, name: str, dtype: torch.dtype):
    """At the reference, with a log-ratio of some hundred nats, and where a response is all but excluded."""
    for objective in accepted(modifier, name):
        assert_finite(objective, make_batch(objective, seed=3, dtype=dtype, at_reference=True))
        for scale in (100.0, 1e4):
            batch = make_batch(objective, seed=3, dtype=dtype, scale=scale)
            # No token is more probable than a sampled one by more than the size of the vocabulary.
            for leg in batch:
                extras = {key: each.clamp(min=-12) for key, each in batch[leg].extras.items()}
                batch = replace(batch, legs={**batch.legs, leg: replace(batch[leg], extras=extras)})
            assert_finite(objective, batch)


@every_combination
def test_constants_get_no_gradient(modifier: str, name: str):
    """Reference, scores, log Σp², what a step knows of other rows."""
    for objective in accepted(modifier, name):
        assert_constants_get_no_gradient(objective, make_batch(objective, seed=7))
        assert_metrics_carry_no_graph(objective, make_batch(objective, seed=8))


@every_combination
def test_step0_is_what_it_says(modifier: str, name: str):
    for objective in accepted(modifier, name):
        if objective.step0 is not None:
            for seed, rows in enumerate((1, 4, 5)):
                batch = make_batch(objective, seed=seed, rows=rows, at_reference=True)
                loss, _ = loss_and_grad(objective, batch)
                assert loss.item() == pytest.approx(objective.step0, rel=1e-12), rows


@every_combination
def test_it_is_stateful_or_coupled_where_the_inner_one_is(modifier: str, name: str):
    """And passes exactly its state on; what it observes is of the batch that its formula sees."""
    for objective in accepted(modifier, name):
        inner = objective.objective
        assert isinstance(objective, Objective)
        assert isinstance(objective, Stateful) == isinstance(inner, Stateful)
        assert isinstance(objective, Coupled) == isinstance(inner, Coupled)
        batch = make_batch(objective, seed=9, later=True)
        seen = objective._prepared(batch)
        if isinstance(inner, Stateful):
            assert objective.init_state() == inner.init_state()
            observed, expected = objective.observe(batch), inner.observe(seen)
            assert_close(dict(observed), dict(expected), rtol=0, atol=0)
            updated = objective.update(batch.state, observed)
            assert_close(dict(updated), dict(inner.update(batch.state, observed)), rtol=0, atol=0)
        if isinstance(inner, Coupled):
            assert_close(dict(objective.step_pass(batch)), dict(inner.step_pass(seen)), rtol=0, atol=0)
        if not isinstance(inner, Stateful):
            with pytest.raises(AttributeError):
                _ = objective.init_state


def test_python_312_sees_the_state_too():
    """From 3.12 on isinstance() of a protocol looks names up without ``__getattr__``: then they must be there."""
    objective = under(BetaDPO(), LDDPO())
    for name in ("init_state", "observe", "update", "step_pass"):
        assert inspect.getattr_static(objective, name, None) is not None, name


@every_combination
def test_needs_are_the_inner_ones_and_the_modifiers(modifier: str, name: str):
    """And what it needs, it asks for by name."""
    for objective in accepted(modifier, name):
        inner, own = objective.objective.needs, FORMS[modifier][0]
        needs = objective.needs
        assert needs == replace(
            inner,
            scores=tuple(dict.fromkeys([*inner.scores, *own.scores])),
            extras=tuple(dict.fromkeys([*inner.extras, *own.extras])),
        )
        batch = make_batch(objective, seed=10)
        for missing in own.scores:
            rest = {key: values for key, values in batch.scores.items() if key != missing}
            with pytest.raises(ValueError, match=f"the rows have no score '{missing}' here"):
                objective(replace(batch, scores=rest))
        for missing in own.extras:
            legs = {
                leg: replace(batch[leg], extras={k: v for k, v in batch[leg].extras.items() if k != missing})
                for leg in batch
            }
            with pytest.raises(ValueError, match=f"this leg has no '{missing}'"):
                objective(replace(batch, legs=legs))


@pytest.mark.slow
@every_combination
def test_a_modifier_is_the_only_difference(modifier: str, name: str):
    """It logs all that the inner objective logs; TR-DPO, which acts on the reference, changes no number."""
    for objective in accepted(modifier, name):
        batch = make_batch(objective, seed=11, later=True)
        inner = objective.objective
        plain = with_own_step(inner, batch)
        assert set(inner(plain).metrics) <= set(objective(batch).metrics)
        same = torch.equal(loss_and_grad(objective, batch)[0], loss_and_grad(inner, plain)[0])
        assert same == (modifier == "tr_dpo")


# keys


KEYS: dict[tuple[str, str], Values] = {
    ("f_divergence", "divergence"): Values(allowed=("forward_kl", "js", "alpha"), refused=("reverse_kl", "kl", "")),
    ("f_divergence", "divergence_alpha"): Values(allowed=(0.0, 0.5), refused=(-0.1, 1.0, 2.0, *NOT_A_NUMBER)),
    ("ld_dpo", "ld_alpha"): Values(allowed=(0.0, 0.5), refused=(-0.1, 1.0, 1.5, *NOT_A_NUMBER)),
    ("ld_dpo", "applies_to"): Values(allowed=("both", "policy"), refused=("reference", "")),
    ("mm_dpo", "scaling"): Values(allowed=(0.1, 0.5), refused=(0.0, -0.1, *NOT_A_NUMBER)),
    ("mm_dpo", "sharpness"): Values(allowed=(0.1, 0.5), refused=(0.0, -0.1, *NOT_A_NUMBER)),
    ("r_dpo", "length_alpha"): Values(allowed=(0.05, -0.05), refused=(0.0, *NOT_A_NUMBER)),
    ("tr_dpo", "sync_alpha"): Values(allowed=(0.6, 1.0), refused=(0.0, -0.1, 1.1, *NOT_A_NUMBER)),
    ("tr_dpo", "sync_steps"): Values(allowed=(1, 512), refused=(0, -1)),
    ("wpo", "clamp"): Values(allowed=(True, False), refused=()),
}
"""Every key of every modifier. The bounds come from the papers, not from the classes."""

every_modifier = pytest.mark.parametrize("name", MODIFIERS.names())


def test_every_key_is_in_the_table():
    assert set(KEYS) == {(name, field.name) for name in MODIFIERS for field in fields(MODIFIERS[name])}
    assert set(FORMS) == set(MODIFIERS.names())


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [(name, key, value) for (name, key), values in KEYS.items() for value in values.refused],
)
def test_values_out_of_range_are_refused_by_name(name: str, key: str, value: object):
    with pytest.raises(ValueError, match=rf"^{key} must be .*got {re.escape(repr(value))}$"):
        MODIFIERS[name](**{key: value})


@every_modifier
def test_recipe_to_modifier_to_recipe_is_the_identity(name: str):
    keys = {key: values.allowed for (modifier, key), values in KEYS.items() if modifier == name}
    for chosen in itertools.product(*keys.values()):
        recipe = dict(zip(keys, chosen, strict=True))
        modifier = MODIFIERS[name](**recipe)
        assert asdict(modifier) == recipe
        assert isinstance(modifier, Modifier)
        with pytest.raises(FrozenInstanceError):
            setattr(modifier, next(iter(keys)), None)


@every_modifier
def test_docstrings_have_formula_source_and_keys(name: str):
    cls = MODIFIERS[name]
    assert "=" in formula(cls) or "←" in formula(cls)
    assert re.search(r"arXiv:\d{4}\.\d{5}", source(cls))
    docs = field_docs(cls)
    assert all(docs.get(field.name, "").strip() for field in fields(cls))


@pytest.mark.parametrize(
    ("divergence", "idle"), [("js", {"divergence_alpha"}), ("forward_kl", {"divergence_alpha"}), ("alpha", set())]
)
def test_idle_keys_have_no_effect(divergence: str, idle: set[str]):
    """Only alpha has an α."""
    modifier = FDivergence(divergence=divergence)
    assert set(modifier.idle()) == idle
    ratios = torch.linspace(-2.0, 2.0, 5)
    same = torch.equal(modifier.slope(ratios), replace(modifier, divergence_alpha=0.1).slope(ratios))
    assert same == bool(idle)


@pytest.mark.parametrize(
    ("theirs", "answer"),
    [
        ("use_weighting", "it is called 'wpo' here"),
        ("f_dpo", "it is called 'f_divergence' here"),
        ("sync_ref_model", "it is called 'tr_dpo' here"),
        ("rdpo", "did you mean 'r_dpo'?"),
        ("lddpo", "did you mean 'ld_dpo'?"),
        ("wop", "did you mean 'wpo'?"),
        ("zebra", "(known: f_divergence, "),
    ],
)
def test_other_names_are_answered_with_ours(theirs: str, answer: str):
    with pytest.raises(ValueError, match=f"unknown modifier '{theirs}'.*{re.escape(answer)}"):
        MODIFIERS[theirs]


def test_nothing_is_left_of_a_modifier_after_the_call():
    """The batch it was given is what it was: shares, β and margins are the prepared copy's."""
    for modifier in (RDPO(), LDDPO(), MMDPO(), FDivergence()):
        objective = under(DPO(), modifier)
        batch = make_batch(objective, seed=12)
        objective(batch)
        assert batch.adjust.beta is None
        assert batch.adjust.margin is None
        assert batch.adjust.divergence is None
        assert all(batch[leg].share is None for leg in batch)


def test_what_is_needed_in_a_list():
    """A list needs what its parts need, modifiers included, and each part sees its own."""
    listed = mixture([("dpo", DPO(), 1.0), ("sft", SFT(leg="chosen"), 1.0)], [("wpo", WPO()), ("mm_dpo", MMDPO())])
    assert listed.needs == Needs(legs=LEGS, reference=True, likelihood=("chosen",), scores=LEGS, extras=("log_sum_p2",))
    seen: Tensor | None = listed.view("sft", make_batch(listed.parts["dpo"], seed=1))["chosen"].extras.get("log_sum_p2")
    assert seen is None


def test_a_length_reward_adds_to_a_margin_that_is_there():
    """0.1 times two tokens more, on top of 2."""
    batch = LegBatch(legs={"chosen": make_rows([[-1.0, -1.0, -1.0]]), "rejected": make_rows([[-1.0]])})
    batch = replace(batch, adjust=replace(batch.adjust, margin=torch.tensor([2.0], dtype=torch.float64)))
    prepared = RDPO(length_alpha=0.1).prepare(batch)
    assert prepared.adjust.margin is not None
    assert prepared.adjust.margin.tolist() == [pytest.approx(2.2)]
