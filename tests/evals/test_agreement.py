import math

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from evals.agreement import METRICS, agreement, bias, both_orders, leave_one_out, mode, prefers_longer

A = [1, 1, 2, 2, 1.5, 2, 1, 2, 2, 1]
B = [1, 2, 2, 2, 1.5, 1, 1, 2, 1.5, 1]
S1 = [1, 1, 0, 1, 0.5, 0, 1]
S2 = [0, 1, 0, 0.5, 0.5, 1, math.nan]


def values(found):
    assert set(found.estimates) <= set(METRICS)
    return {name.removeprefix("judge/"): estimate.value for name, estimate in found.estimates.items()}


def test_both_orders_of_the_vector():
    """(A,A) (A,B) (B,A) (A,tie) (tie,tie) (B,B) (A,missing), as verdicts from the model's point of view."""
    found = both_orders(S1, S2)
    assert values(found) == pytest.approx(
        {"win_rate": 0.5416667, "consistency": 0.5, "first_position": 0.5416667, "parse_failures": 1 / 7}
    )
    assert (found.n_dropped, found.estimates["judge/win_rate"].n, found.extra) == (1, 6, {"policy": "mean"})
    assert found.estimates["judge/parse_failures"].n == 7
    assert values(both_orders(S1, S2, policy="strict"))["win_rate"] == 0.5


def test_a_judge_that_always_says_first_says_nothing():
    found = values(both_orders([1] * 5, [0] * 5))
    assert (found["win_rate"], found["consistency"], found["first_position"]) == (0.5, 0, 1)


def test_swapping_model_and_baseline_mirrors():
    there = values(both_orders(S1, S2))
    back = values(both_orders(1 - np.array(S2), 1 - np.array(S1)))
    assert back["win_rate"] == pytest.approx(1 - there["win_rate"])
    assert back["first_position"] == pytest.approx(there["first_position"])


@pytest.mark.parametrize(
    ("one", "two", "keys", "says"),
    [
        ([1, 0], [1], {}, "both orders need a verdict for the same items"),
        ([], [], {}, "none of 0 prompts"),
        ([1, math.nan], [math.nan, 0], {}, "none of 2 prompts has a verdict in both orders"),
        ([2], [0], {}, "between 0 .* and 1 .*, got 2"),
        ([-1], [0], {}, "got -1"),
        ([1], [0], {"policy": "best"}, "policy must be mean or strict"),
    ],
)
def test_verdicts_that_can_t_be_used(one, two, keys, says):
    """A failure that is coded as −1 or 2 must not pass for a verdict."""
    with pytest.raises(ValueError, match=says):
        both_orders(one, two, **keys)


def test_agreement_of_the_vector():
    found = values(agreement(A, B))
    assert found["agreement"] == pytest.approx(0.7)
    assert found["kappa"] == pytest.approx(0.516129, abs=5.1e-7)
    assert values(agreement(A, B, kind="absolute"))["agreement"] == pytest.approx(0.75)


def test_kappa_is_scikit_learn_s_and_absent_where_nothing_varies():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 3, 100)
    b = np.where(rng.random(100) < 0.6, a, rng.integers(0, 3, 100))
    found = agreement(a, b)
    assert found.estimates["judge/kappa"].value == pytest.approx(cohen_kappa_score(a, b))
    assert found.estimates["judge/kappa"].low < cohen_kappa_score(a, b) < found.estimates["judge/kappa"].high
    assert set(agreement([1, 1], [1, 1]).estimates) == {"judge/agreement"}
    with pytest.raises(ValueError, match="none of 2 items"):
        agreement([1, math.nan], [math.nan, 1])
    with pytest.raises(ValueError, match="same items"):
        agreement([1], [1, 2])
    with pytest.raises(ValueError, match="zero_one or absolute"):
        agreement([1], [1], kind="kappa")  # pyright: ignore


def test_longer_means_clearly_longer():
    """Differences of 100, −31 and 30: the last is no difference."""
    found = prefers_longer([1, 1, 0, math.nan], [200, 10, 40, 900], [100, 41, 10, 1])
    assert values(found)["prefers_longer"] == 0.5
    assert found.n_dropped == 2
    with pytest.raises(ValueError, match="no longer answer"):
        prefers_longer([1], [5], [5])
    with pytest.raises(ValueError, match="as many lengths"):
        prefers_longer([1], [5, 6], [5, 5])


def test_variance_and_bias():
    """Item 1: 1, 1, 2: each 1 sees the others 1, 2 (tie) or 1, 2; with each of them 2 pairs of 6 agree."""
    assert leave_one_out([[1, 1, 2]], others="each") == pytest.approx(1 / 3)
    assert leave_one_out([[1, 1], [1, 2], [2]]) == 0.5
    assert leave_one_out([[1, 1, 1], [2, 2, 2]]) == 1
    assert bias([[1, 1, 2], [2]], [[1], [1, 1]]) == 0.5
    assert mode([1, 2, 2, 1.5], np.random.default_rng(0)) == 2
    with pytest.raises(ValueError, match="judged twice"):
        leave_one_out([[1], [2]])
    with pytest.raises(ValueError, match="same items"):
        bias([], [])
    with pytest.raises(ValueError, match="nobody has judged"):
        bias([[]], [[1]])
