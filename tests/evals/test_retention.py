"""Retention: the vector, intervals, fronts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.retention import METRICS, best_within, pareto_front, retention, retention_of_scores

BEFORE = {"ifeval": 0.62, "gsm8k": 0.71, "humaneval": 0.45, "mmlu": 0.80}
AFTER = {"ifeval": 0.60, "gsm8k": 0.70, "humaneval": 0.41, "mmlu": 0.81}


def test_the_vector():
    found = retention(BEFORE, AFTER)
    assert (found.general_before, found.general_after) == (pytest.approx(0.645), pytest.approx(0.63))
    assert found.change == pytest.approx(-0.015)
    assert found.retained == pytest.approx(0.969317, abs=5.1e-7)
    assert found.ratio_of_means == pytest.approx(0.976744, abs=5.1e-7)
    assert (found.worst, found.worst_task) == (pytest.approx(0.911111, abs=5.1e-7), "humaneval")
    assert found.excluded == ()


def test_options():
    clipped = retention(BEFORE, AFTER, clip=True)
    assert clipped.retained == pytest.approx((60 / 62 + 70 / 71 + 41 / 45 + 1) / 4)
    above = retention({"a": 0.5, "b": 0.25}, {"a": 0.4, "b": 0.5}, chance={"b": 0.25})
    assert above.excluded == ("b",)
    assert above.retained == pytest.approx(0.8)
    assert above.general_after == pytest.approx((0.4 + 1 / 3) / 2)


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ({}, {}, "there are none"),
        ({"a": 0.5}, {"a": 0.5, "b": 0.5}, "only one side has b: evaluate the other too"),
        ({"a": 0.0}, {"a": 0.5}, "every task scored 0"),
        ({"a": 62.0}, {"a": 60.0}, "between 0 and 1, got 62"),
        ({"a": math.nan}, {"a": 0.5}, "between 0 and 1, got nan"),
    ],
)
def test_what_can_t_be_retained(before, after, says):
    with pytest.raises(ValueError, match=says):
        retention(before, after)


def scored(rng: np.random.Generator, share: float, prompts: int = 200) -> dict[str, float]:
    return {f"p{i}": float(rng.random() < share) for i in range(prompts)}


def test_prompts_give_intervals_and_tests():
    rng = np.random.default_rng(0)
    before = {task: scored(rng, 0.7) for task in ("a", "b", "domain")}
    after = {
        "a": before["a"],
        "b": {p: v * (rng.random() < 0.8) for p, v in before["b"].items()},
        "domain": {p: max(v, float(rng.random() < 0.6)) for p, v in before["domain"].items()},
    }
    found, tests = retention_of_scores(before, after, domain=["domain"])
    means = {task: np.mean(list(values.values())) for task, values in after.items()}
    change = found.estimates["retention/general_change"]
    assert change.value == pytest.approx((means["b"] - np.mean(list(before["b"].values()))) / 2)
    # One task did not move at all, so that the spread is half that of the other.
    assert change.stderr == pytest.approx(tests["b"].difference.stderr / 2)
    assert change.high < 0
    assert found.estimates["retention/worst"].value == pytest.approx(means["b"] / np.mean(list(before["b"].values())))
    assert found.estimates["retention/worst"].high < 1
    assert found.estimates["retention/domain_change"].low > 0
    assert found.extra["p_holm"]["a"] == 1
    assert found.extra["p_holm"]["b"] < 0.001
    of_single_tasks = {"retention/score", "retention/score_change"}
    assert set(found.estimates) == set(METRICS) - of_single_tasks
    assert found.results(dataset="d", split="s", step=1)


@pytest.mark.slow
def test_the_interval_of_a_ratio_covers():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(600):
        hard = rng.random(150)
        old, new = (rng.random(150) < hard * scale for scale in (0.9, 0.8))
        sides = [{"t": {i: float(v) for i, v in enumerate(values)}} for values in (old, new)]
        estimate = retention_of_scores(*sides)[0].estimates["retention/retained"]
        covered += estimate.low <= 0.8 / 0.9 <= estimate.high
    assert 0.925 <= covered / 600 <= 0.975


def test_prompts_must_be_the_same():
    rng = np.random.default_rng(2)
    task = scored(rng, 0.5)
    with pytest.raises(ValueError, match="a was evaluated on 200 prompts before and 199 after"):
        retention_of_scores({"a": task}, {"a": dict(list(task.items())[1:])})
    with pytest.raises(ValueError, match="evaluate general tasks too"):
        retention_of_scores({"a": task}, {"a": task}, domain=["a"])
    with pytest.raises(ValueError, match=r"domain tasks \['b'\] were not evaluated"):
        retention_of_scores({"a": task}, {"a": task}, domain=["b"])


def test_the_front_by_hand():
    domain, general = [0.53, 0.51, 0.18, 0.20, 0.47, 0.50], [0.69, 0.70, 0.49, 0.73, 0.69, 0.72]
    assert pareto_front(domain, general).tolist() == [True, True, False, True, False, True]
    assert pareto_front([1, 1], [1, 1]).tolist() == [True, True], "equal points beat nobody"
    with pytest.raises(ValueError, match="one finite number"):
        pareto_front([], [])
    with pytest.raises(ValueError, match="one finite number"):
        pareto_front([math.nan], [1])


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_front_is_what_nobody_beats(points: list[tuple[int, int]]):
    front = pareto_front(*zip(*points, strict=True))
    assert front.any()
    for point, on_front in zip(points, front, strict=True):
        assert on_front == (not any(p != point and p[0] >= point[0] and p[1] >= point[1] for p in points))


def test_the_best_that_loses_little():
    assert best_within([0.5, 0.6, 0.7], [0.0, -0.01, -0.05]) == 1
    assert best_within([0.5, 0.6], [-0.02, -0.05]) is None
    assert best_within([0.5, 0.6], [-0.02, -0.05], allowed=0.1) == 1
