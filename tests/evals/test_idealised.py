"""The optimum's ranking accuracy: the vector of five pairs, closed forms, and the training run that reaches it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from evals.idealised import (
    BETAS,
    METRICS,
    alignment_gap,
    as_people,
    competition_ranks,
    exact_rankings,
    idealised,
    log_odds,
    logit,
    rankable_below,
)

CHOSEN = np.array([-20, -35, -50, -12, -30.0])
REJECTED = np.array([-25, -30, -40, -12, -30.004])
LENGTHS: dict[str, Any] = {
    "length_chosen": np.array([10, 20, 10, 6, 15]),
    "length_rejected": np.array([10, 15, 20, 4, 15]),
}
ALPHA = np.array([0.75, 0.75, 1, 0.5, 0.75])
SIX = {"abs": 6e-7}


def test_logit_of_the_vector():
    assert logit(ALPHA) == pytest.approx([1.098612, 1.098612, 6.907755, 0, 1.098612], **SIX)
    assert logit(0.0) == -logit(1.0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        logit(np.array([0.5, np.nan]))


def test_log_odds_of_the_vector():
    raw = log_odds(CHOSEN, REJECTED, ALPHA, 1.0)
    assert raw == pytest.approx([6.098612, -3.901388, -3.092245, 0, 1.102612], **SIX)
    assert np.exp(raw[[0, 1, 2, 4]]) == pytest.approx([445.2395, 0.020214, 0.045400, 3.012024], rel=2e-5)
    per_token = log_odds(CHOSEN, REJECTED, ALPHA, 5.0, *LENGTHS.values())
    assert per_token == pytest.approx([0.719722, 0.469722, -1.618449, 1.0, 0.219989], **SIX)


def test_accuracies_of_the_vector():
    found = idealised(CHOSEN, REJECTED, ALPHA)
    assert [each.value for each in found.per_beta.values()] == [1, 1, 0.5, 0.5, 0.5]
    assert list(found.per_beta) == list(BETAS)
    assert (found.minimum, found.median, found.maximum, found.n_dropped) == (0.5, 0.5, 1, 1)
    per_token = idealised(CHOSEN, REJECTED, ALPHA, **LENGTHS)
    assert [each.value for each in per_token.per_beta.values()] == [1, 1, 1, 0.75, 0.75]
    assert (per_token.minimum, per_token.median, per_token.maximum) == (0.75, 1, 1)


def test_gaps_of_the_vector():
    """With the policy at the reference: R = 0.5 and R̃ = 0.75 without the tie."""
    found = alignment_gap(CHOSEN, REJECTED, CHOSEN, REJECTED, ALPHA)
    values = {name: each.value for name, each in found.estimates.items()}
    assert values == {
        "ranking/idealised_min": 0.5,
        "ranking/idealised": 0.5,
        "ranking/idealised_max": 1,
        "ranking/gap": 0,
    }
    assert found.extra == {"betas": list(BETAS), "per_beta": [1, 1, 0.5, 0.5, 0.5]}
    per_token = alignment_gap(CHOSEN, REJECTED, CHOSEN, REJECTED, ALPHA, **LENGTHS)
    assert per_token.estimates["ranking/gap_per_token"].value == 0.25
    assert set(per_token.estimates) | set(found.estimates) == set(METRICS)
    assert alignment_gap(CHOSEN, REJECTED, CHOSEN, REJECTED).extra["simulated_alpha"] == 0.75


def test_a_pair_is_rankable_below_its_beta():
    below = rankable_below(CHOSEN, REJECTED, ALPHA)
    assert below[1] == pytest.approx(0.219722, **SIX)
    assert below[0] == np.inf
    for beta, right in ((float(below[1]) * 0.999, True), (float(below[1]) * 1.001, False)):
        assert (log_odds(CHOSEN, REJECTED, ALPHA, beta)[1] > 0) == right


@given(st.floats(-30, 30), st.floats(0.51, 0.99), st.floats(0.05, 5))
def test_the_optimum_is_where_dpo_on_raters_goes(reference: float, alpha: float, beta: float):
    """Minimises −α·log σ(β(h − c)) − (1 − α)·log σ(−β(h − c)) over the policy's log-ratio h, numerically."""

    def loss(h: float) -> float:
        m = beta * (h - reference)
        return float(alpha * np.logaddexp(0, -m) + (1 - alpha) * np.logaddexp(0, m))

    wide = 10 / beta
    best = minimize_scalar(loss, bounds=(reference - wide, reference + wide), method="bounded").x
    found = log_odds(np.array([reference]), np.array([0.0]), alpha, beta)[0]
    assert best == pytest.approx(found, abs=2e-3 / beta)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"alpha": np.full(5, 0.5)}, "none of 5 pairs can be idealised"),
        ({"ref_chosen": np.full(5, np.nan)}, "non-finite log-prob"),
        ({"ref_chosen": np.array([]), "ref_rejected": np.array([])}, "none of 0 pairs"),
        ({"ref_rejected": REJECTED[:2]}, "the same 5 pairs"),
        ({"length_chosen": LENGTHS["length_chosen"]}, "come together"),
        ({"betas": ()}, "no β"),
        ({"betas": (0.0,)}, "beta must be > 0"),
    ],
)
def test_what_can_t_be_idealised(changes: dict[str, Any], says: str):
    keys = {"ref_chosen": CHOSEN, "ref_rejected": REJECTED, "alpha": 0.75, **changes}
    with pytest.raises(ValueError, match=says):
        idealised(**keys)


def test_people_who_tie():
    first, second = np.log([0.5, 0.505, 0.5, 0.3]), np.log([0.4, 0.5, 0.4, 0.6])
    assert as_people(first, second, np.array([0.75, 0.5, 0.5, 0.25])).tolist() == [1, 1, 0, 1]


def test_whole_rankings():
    assert competition_ranks(np.array([3.1, 2.0, 3.1, 1.0])).tolist() == [1, 3, 1, 4]
    model, people = np.array([[3, 2, 1.0], [3, 2, 1], [1, 1, 0]]), np.array([[9, 5, 0.0], [5, 9, 0], [2, 2, 1]])
    assert exact_rankings(model, people).tolist() == [1, 0, 1]
