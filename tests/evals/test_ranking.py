"""Vectors of arXiv 2405.19534 as recomputed in float64: five pairs, of which the fourth ties."""

import numpy as np
import pytest

from evals.ranking import METRICS, Pairs, critical_loss, difficulty, flow, rank
from objectives.stats import wilson

REF_CHOSEN = np.array([-20, -35, -50, -12, -30.0])
REF_REJECTED = np.array([-25, -30, -40, -12, -30.004])
POLICY_CHOSEN = np.array([-18, -28, -44, -12, -29.0])
POLICY_REJECTED = np.array([-27, -29, -41, -12, -31.0])
LENGTH_CHOSEN = np.array([10, 20, 10, 6, 15])
LENGTH_REJECTED = np.array([10, 15, 20, 4, 15])


def pairs(**changes):
    fields = {
        "policy_chosen": POLICY_CHOSEN,
        "policy_rejected": POLICY_REJECTED,
        "ref_chosen": REF_CHOSEN,
        "ref_rejected": REF_REJECTED,
        "length_chosen": LENGTH_CHOSEN,
        "length_rejected": LENGTH_REJECTED,
        "prompts": list("abcde"),
    }
    return Pairs(**{**fields, **changes})


def values(found):
    return {name: estimate.value for name, estimate in found.estimates.items()}


def test_accuracies_of_the_vector():
    """The vector's R(≥) = 0.6 and R(>) = 0.4, so one pair of five ties and ties-one-half gives 0.5; R̃ = 0.8."""
    found = values(rank(pairs(policy_chosen=REF_CHOSEN, policy_rejected=REF_REJECTED)))
    assert found["ranking/accuracy"] == pytest.approx(0.5)
    assert found["ranking/strict"] == pytest.approx(0.4)
    assert found["ranking/strict"] + found["ranking/ties"] == pytest.approx(0.6)
    assert found["ranking/accuracy_per_token"] == pytest.approx(0.8)
    assert found["ranking/reference"] == found["ranking/accuracy"]
    assert found["ranking/reference_per_token"] == found["ranking/accuracy_per_token"]
    assert found["rewards/accuracies"] == 0.5  # policy equals reference: one half, not 0


def test_without_the_tie():
    keep = [0, 1, 2, 4]
    found = values(
        rank(
            Pairs(
                policy_chosen=REF_CHOSEN[keep],
                policy_rejected=REF_REJECTED[keep],
                length_chosen=LENGTH_CHOSEN[keep],
                length_rejected=LENGTH_REJECTED[keep],
                prompts=keep,
            )
        )
    )
    assert found["ranking/accuracy"] == 0.5
    assert found["ranking/accuracy_per_token"] == 0.75
    assert set(found) == {name for name in METRICS if name.startswith("ranking/")} - {
        "ranking/reference",
        "ranking/reference_per_token",
        "ranking/gain",
    }


def test_displacement_of_the_vector():
    found = values(rank(pairs()))
    assert found["displacement/chosen"] == pytest.approx(3.2)
    assert found["displacement/rejected"] == pytest.approx(-0.5992)
    assert found["displacement/chosen_fell"] == 0
    assert found["displacement/both_fell"] == 0
    # Δ+ = 2, 7, 6, 0, 1 over 10, 20, 10, 6, 15 tokens
    assert found["displacement/chosen_per_token"] == pytest.approx((0.2 + 0.35 + 0.6 + 0 + 1 / 15) / 5)


def test_difficulty_and_critical_loss_of_the_vector():
    c = difficulty(REF_CHOSEN, REF_REJECTED)
    assert c == pytest.approx([-5, 5, 10, 0, -0.004])
    limit = critical_loss(c, 0.1)
    assert limit == pytest.approx([0.974077, 0.474077, 0.313262, 0.693147, 0.693347], abs=1e-6)
    margin = 0.1 * (POLICY_CHOSEN - REF_CHOSEN - POLICY_REJECTED + REF_REJECTED)
    loss = np.logaddexp(0, -margin)
    assert loss == pytest.approx([0.513015, 0.437488, 0.403186, 0.693147, 0.598319], abs=1e-6)
    # Theorem 4.1: ranked rightly (ties count) exactly when the loss is at most critical.
    assert (loss <= limit + 1e-12).tolist() == (POLICY_CHOSEN >= POLICY_REJECTED).tolist() == [1, 1, 0, 1, 1]


def test_flow_adds_up_to_the_accuracies():
    """Reference 1, 0, 0, ½, 1 and policy 1, 1, 0, ½, 1: one of five flipped, and the lasting tie did not move."""
    found = values(rank(pairs()))
    parts = {
        name: found[f"flow/{name}"] for name in ("right_to_right", "wrong_to_right", "right_to_wrong", "wrong_to_wrong")
    }
    assert parts == pytest.approx(
        {"right_to_right": 0.5, "wrong_to_right": 0.2, "right_to_wrong": 0.0, "wrong_to_wrong": 0.3}
    )
    assert parts["right_to_right"] + parts["wrong_to_right"] == pytest.approx(found["ranking/accuracy"])
    assert parts["right_to_right"] + parts["right_to_wrong"] == pytest.approx(found["ranking/reference"])
    assert found["ranking/gain"] == pytest.approx(found["ranking/accuracy"] - found["ranking/reference"])


def test_flow_is_a_partition():
    states = np.array([0.0, 0.5, 1.0])
    before, after = (grid.ravel() for grid in np.meshgrid(states, states))
    parts = flow(before, after)
    assert sum(parts.values()) == pytest.approx(np.ones(9))
    assert all((part >= 0).all() for part in parts.values())


def test_unusable_pairs_are_dropped_and_counted():
    with_nan = POLICY_CHOSEN.copy()
    with_nan[0] = np.nan
    with_inf = REF_REJECTED.copy()
    with_inf[1] = -np.inf
    empty = LENGTH_REJECTED.copy()
    empty[2] = 0
    found = rank(pairs(policy_chosen=with_nan, ref_rejected=with_inf, length_rejected=empty))
    assert found.n_dropped == 3
    assert all(estimate.n == 2 for estimate in found.estimates.values())
    assert found.estimates["ranking/accuracy"].value == 0.75  # the tie and the last pair
    assert found.results(dataset="d", split="s", step=3)[0].extra == {"n_dropped": 3}


def test_nothing_left_is_an_error():
    with pytest.raises(ValueError, match="none of 5 pairs can be ranked"):
        rank(pairs(length_chosen=np.zeros(5, dtype=int)))


def test_shapes_and_halves_of_a_reference_are_refused():
    with pytest.raises(ValueError, match=r"length_chosen has shape \(1,\), and there are 5 prompts"):
        pairs(length_chosen=np.array([1]))
    with pytest.raises(ValueError, match="come together"):
        pairs(ref_chosen=None)


def test_intervals_fit_what_they_are_for():
    found = rank(pairs()).estimates
    assert found["ranking/strict"].interval == "wilson"  # zeros and ones, one pair per prompt
    assert (found["ranking/strict"].low, found["ranking/strict"].high) == wilson(3, 5)
    assert found["ranking/accuracy"].interval == "clustered-t"  # a tie
    clustered = rank(pairs(prompts=list("aabbc"))).estimates
    assert clustered["ranking/strict"].interval == "clustered-t"
    assert clustered["ranking/strict"].clusters == 3
    # All pairs agree: a clustered interval would have no width.
    fell = clustered["displacement/both_fell"]
    assert (fell.value, fell.interval, (fell.low, fell.high)) == (0.0, "wilson-over-prompts", wilson(0, 3))


def test_a_mean_of_nats_is_not_taken_for_a_proportion():
    """At step 0 every displacement is 0, which must not turn into Wilson limits of 0 and 43 % nats."""
    found = rank(pairs(policy_chosen=REF_CHOSEN, policy_rejected=REF_REJECTED)).estimates["displacement/chosen"]
    assert (found.value, found.low, found.high, found.interval) == (0.0, 0.0, 0.0, "clustered-t")


def test_one_prompt_has_a_value_and_no_interval():
    found = rank(pairs(prompts=["a"] * 5))
    assert np.isnan(found.estimates["displacement/chosen"].low)
    assert all(
        result.low is None or result.interval == "wilson-over-prompts"
        for result in found.results(dataset="d", split="s", step=0)
    )
