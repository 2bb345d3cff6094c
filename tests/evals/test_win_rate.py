import math

import numpy as np
import pytest

from evals.win_rate import METRICS, shares, soft_preference, win_rate, win_rate_of_scores

SIX = {"abs": 5.1e-7}


def test_the_vector():
    found = win_rate([1, 2, 1.5, 0, 1.9, 1.2, math.nan, 2, 3])
    raw = found.estimates["win_rate/raw"]
    assert (raw.n, found.n_dropped) == (7, 2)
    assert 100 * raw.value == pytest.approx(58.571429, **SIX)
    assert 100 * raw.stderr == pytest.approx(15.028318, **SIX)
    assert found.extra == {"n_wins": 3, "n_wins_base": 2, "n_draws": 2}
    assert 100 * found.estimates["win_rate/discrete"].value == pytest.approx(57.142857, **SIX)
    assert found.estimates["win_rate/ties"].value == pytest.approx(2 / 7)
    assert found.by_prompt["win_rate/raw"] == pytest.approx({0: 0, 1: 1, 2: 0.5, 3: 0.5, 4: 0.9, 5: 0.2, 7: 1})
    assert set(found.estimates) < set(METRICS)


def test_soft_preferences_of_the_vector():
    logs = -4.048847, -0.017597131
    assert soft_preference(*logs) == pytest.approx(1.982558, **SIX)
    assert soft_preference(*logs, model_first=True) == pytest.approx(1.017442, **SIX)
    assert soft_preference(None, -0.1) == 2
    assert soft_preference(-0.1, None) == 1
    assert soft_preference(-0.1, None, model_first=True) == 2
    assert soft_preference(None, None) is None


def test_prompts_are_clusters():
    found = win_rate([2, 2, 1, 1], list("aabb"))
    assert found.estimates["win_rate/raw"].clusters == 2
    assert found.by_prompt["win_rate/raw"] == {"a": 1.0, "b": 0.0}
    with pytest.raises(ValueError, match="3 prompts were given for 2 items"):
        win_rate([1, 2], "abc")


def test_one_prompt_has_a_value_and_no_spread():
    (raw, *_) = win_rate([1.5]).results(dataset="d", split="s", step=0)
    assert (raw.value, raw.stderr, raw.low) == (0.5, None, None)


@pytest.mark.parametrize("verdicts", [[], [math.nan], [3.0, math.inf]])
def test_no_verdicts(verdicts: list[float]):
    with pytest.raises(ValueError, match=f"none of {len(verdicts)} verdicts can be used"):
        win_rate(verdicts)


def test_shares_of_codes():
    assert shares(np.array([0, 1, 1.25, 2, 2.5, np.nan]))[:4].tolist() == [0.5, 0, 0.25, 1]


def test_win_rate_of_scores_is_over_all_pairs_of_a_prompt():
    """a: 1 and 3 against 2 and 0: (1 + 2)/4 won; b: a tie."""
    found = win_rate_of_scores([1, 3, 5, math.nan], [2, 0, 5, 1], list("aabb"))
    assert found.by_prompt["win_rate/raw"] == {"a": 0.75, "b": 0.5}
    assert found.n_dropped == 1
    with pytest.raises(ValueError, match="score the baseline's answers too"):
        win_rate_of_scores([1.0], [math.nan])
    with pytest.raises(ValueError, match="as many baseline answers"):
        win_rate_of_scores([1.0], [])
