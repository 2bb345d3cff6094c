"""XPO and Nash-MD against arithmetic by hand and the papers; other implementations' numbers are in ``test_vectors``."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from objectives import COLUMNS, LegBatch, mixture
from objectives.dpo import DPO
from objectives.online import XPO, NashMD
from objectives.sft import SFT
from tests.objectives import transcriptions_online as transcriptions
from tests.objectives.batches import (
    BY_HAND,
    FP64_ROUNDING,
    SIX_PLACES,
    assert_transcribed,
    four,
    loss_and_grad,
    make_batch,
    make_rows,
    means,
    ragged,
    row_losses,
)

POLICY, REFERENCE = (COLUMNS["chosen_by"].words[who] for who in ("policy", "reference"))


def written_by(*who: float) -> dict[str, Tensor]:
    return {"chosen_by": torch.tensor(who, dtype=torch.float64)}


def pair(*who: float) -> LegBatch:
    """As many times the row of 2 and 1 tokens whose log-ratios are 1 and −1, log-probs −3 and −4."""
    chosen = make_rows([[-1.0, -2.0]] * len(who), [[-1.5, -2.5]] * len(who))
    rejected = make_rows([[-4.0]] * len(who), [[-3.0]] * len(who))
    return LegBatch(legs={"chosen": chosen, "rejected": rejected}, scores=written_by(*who))


def sampled(logps: list[list[float]], ref_logps: list[list[float]], preference: list[float]) -> LegBatch:
    leg = make_rows(logps, ref_logps)
    return LegBatch(legs={"completion": leg}, scores={"preference": torch.tensor(preference, dtype=torch.float64)})


# XPO


def test_xpo_by_hand():
    """β = 0.5, α = 0.1: m = 0.5 · 2 = 1, log(1 + e⁻¹) = 0.3132616875.

    The policy's was chosen: the reference's is the rejected one, + 0.1 · (−4) → −0.0867383125; its token gets
    0.5 · σ(−1) + 0.1 = 0.2344707107, chosen ones −0.1344707107.
    The reference's was chosen: + 0.1 · (−3) → 0.01326168752; chosen tokens get −0.1344707107 + 0.1.
    """
    objective = XPO(beta=0.5, alpha=0.1)
    loss, grad = loss_and_grad(objective, pair(POLICY))
    assert loss.item() == pytest.approx(-0.0867383125, **BY_HAND)
    assert grad["chosen"].tolist() == [pytest.approx([-0.1344707107] * 2, **BY_HAND)]
    assert grad["rejected"].tolist() == [pytest.approx([0.2344707107], **BY_HAND)]
    loss, grad = loss_and_grad(objective, pair(REFERENCE))
    assert loss.item() == pytest.approx(0.01326168752, **BY_HAND)
    assert grad["chosen"].tolist() == [pytest.approx([-0.0344707107] * 2, **BY_HAND)]
    assert grad["rejected"].tolist() == [pytest.approx([0.1344707107], **BY_HAND)]


def test_known_numbers_of_xpo():
    """Sums −3 and −4, under the reference −3.5 and −3.8; the policy's sample was chosen."""
    legs = {"chosen": make_rows([[-3.0]], [[-3.5]]), "rejected": make_rows([[-4.0]], [[-3.8]])}
    batch = LegBatch(legs=legs, scores=written_by(POLICY))
    assert loss_and_grad(XPO(beta=0.1, alpha=0.01), batch)[0].item() == pytest.approx(0.618760, **SIX_PLACES)
    assert row_losses(XPO(beta=0.1, alpha=0.01), batch) == pytest.approx([0.658760], **SIX_PLACES)


def test_the_value_that_the_docstring_gives():
    """Policy equals reference, the reference's sample has −40 nats: log 2 − 0.0004."""
    same = make_rows([[-40.0]], [[-40.0]])
    batch = LegBatch(legs={"chosen": same, "rejected": make_rows([[-9.0]], [[-9.0]])}, scores=written_by(REFERENCE))
    assert loss_and_grad(XPO(), batch)[0].item() == pytest.approx(0.692747, **SIX_PLACES)


@given(seed=st.integers(0, 200), beta=st.floats(0.01, 5), alpha=st.floats(1e-6, 1))
def test_xpo_is_the_paper_s(seed: int, beta: float, alpha: float):
    objective = XPO(beta=beta, alpha=alpha)
    batch = make_batch(objective, seed=seed, rows=5)
    who = ["reference" if each == REFERENCE else "policy" for each in batch.scores["chosen_by"].tolist()]
    assert len(set(who)) == 2
    assert_transcribed(objective, batch, *transcriptions.xpo(*four(batch), who, beta=beta, alpha=alpha))


def test_all_but_the_added_term_is_dpo():
    batch = make_batch(XPO(), seed=1)
    assert row_losses(XPO(beta=0.3), batch) == row_losses(DPO(beta=0.3), batch)
    ours, theirs = means(XPO(), batch), means(DPO(), batch)
    assert {name: ours[name] for name in theirs} == theirs


def test_metrics_tell_both_samples_apart():
    found = means(XPO(), pair(POLICY, REFERENCE, REFERENCE, REFERENCE))
    assert found["samples/policy_won"] == 0.25
    assert found["logps/reference_sample"] == pytest.approx((-4 - 3 * 3) / 4)
    assert found["logps/policy_sample"] == pytest.approx((-3 - 3 * 4) / 4)


def test_what_explores_is_the_whole_response():
    """A share of its tokens, as LD-DPO takes, and weights change no more than DPO's part, or nothing."""
    batch = pair(REFERENCE)
    half = replace(batch["chosen"], share=torch.full_like(batch["chosen"].logps, 0.5))
    output = XPO()(replace(batch, legs={**batch.legs, "chosen": half}))
    assert output.terms["optimism"].values.tolist() == [-3.0]
    assert output.terms["preference"].values.tolist() != row_losses(XPO(), batch)


# Nash-MD


def test_nash_md_by_hand():
    """β = 0.5, p = 0.75, log-probs −1 and −3, log-ratios 0.5 and −1.

    loss = −0.25 · (−4) + 0.5 · (0.5 · (−1) + (−1) · (−3)) = 1 + 1.25 = 2.25
    slopes: 0.5 · 0.5 − 0.25 = 0 and 0.5 · (−1) − 0.25 = −0.75
    """
    loss, grad = loss_and_grad(NashMD(beta=0.5), sampled([[-1.0, -3.0]], [[-1.5, -2.0]], [0.75]))
    assert loss.item() == pytest.approx(2.25, **BY_HAND)
    assert grad["completion"].tolist() == [pytest.approx([0.0, -0.75], abs=1e-12)]


def test_known_numbers_of_nash_md():
    """p = σ(1.2 − 0.4) = 0.689974; divergence 0.3."""
    p = 1 / (1 + math.exp(-0.8))
    assert p == pytest.approx(0.689974, **SIX_PLACES)
    batch = sampled([[-0.5, -1.0]], [[-0.7, -0.6]], [p])
    assert loss_and_grad(NashMD(), batch)[0].item() == pytest.approx(0.314962, **SIX_PLACES)
    assert NashMD()(batch).terms["divergence"].total.item() == pytest.approx(0.3)


@given(seed=st.integers(0, 200), beta=st.floats(0.01, 5))
def test_nash_md_is_the_paper_s(seed: int, beta: float):
    objective = NashMD(beta=beta)
    batch = make_batch(objective, seed=seed, rows=5)
    leg = batch["completion"]
    arrays = ragged(leg.logps, leg), ragged(leg.ref_logps, leg)
    preference = batch.scores["preference"].tolist()
    assert_transcribed(objective, batch, *transcriptions.nash_md(*arrays, preference, beta=beta))


def test_a_tie_at_the_reference_moves_nothing():
    same = [[-1.0, -2.0], [-0.5]]
    _, grad = loss_and_grad(NashMD(), sampled(same, same, [0.5, 0.5]))
    assert not grad["completion"].any()


@given(seed=st.integers(0, 50))
def test_on_policy_its_gradient_is_that_of_the_game(seed: int):
    """Responses of one token, all of a vocabulary of six: the expected gradient is that of β·KL − E[p], by the logits.

    With one token the token's divergence is the response's, and the sample's probability is the policy's own.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, generator=generator, dtype=torch.float64).requires_grad_()
    ref_logps = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)
    wins = torch.rand(6, generator=generator, dtype=torch.float64)
    logps = logits.log_softmax(0)
    game = (logps.exp() * (0.7 * (logps - ref_logps) - wins)).sum()
    (expected,) = torch.autograd.grad(game, logits, retain_graph=True)
    batch = sampled([[0.0]] * 6, [[x] for x in ref_logps.tolist()], wins.tolist())
    leg = replace(batch["completion"], logps=logps[:, None])
    terms = NashMD(beta=0.7)(replace(batch, legs={"completion": leg})).terms.values()
    losses = sum(term.coef * term.values for term in terms)
    (found,) = torch.autograd.grad((logps.detach().exp() * losses).sum(), logits)
    assert_close(found, expected, **FP64_ROUNDING)


def test_metrics_of_nash_md():
    batch = sampled([[-1.0, -3.0], [-2.0]], [[-1.5, -2.0], [-1.0]], [0.75, 0.25])
    found = means(NashMD(), batch)
    assert found == {
        "samples/preference": 0.5,
        "displacement/completion": pytest.approx(-0.75),
        "logps/completion": -3.0,
    }


# Both in a mixture


def test_columns_are_declared_through_a_mixture():
    both = mixture([("xpo", XPO(alpha=0.5), 1.0), ("sft", SFT(leg="chosen"), 2.0)])
    assert both.needs.columns == ("chosen_by",)
    assert both.needs.numbers == ("chosen_by",)
    batch = pair(POLICY, REFERENCE)
    alone = loss_and_grad(XPO(alpha=0.5), batch)[0] + 2 * loss_and_grad(SFT(leg="chosen"), batch)[0]
    assert_close(loss_and_grad(both, batch)[0], alone, **FP64_ROUNDING)
    assert "chosen_by" not in both.view("sft", batch).scores
