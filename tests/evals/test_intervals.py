"""Intervals hold the truth as often as they say, and the page that tells how often is what was measured."""

from __future__ import annotations

import numpy as np
import pytest

from evals.bootstrap import bootstrapped, mean_of_items
from launch.bench import false_claims, intervals
from objectives.stats import clustered_wilson, mean_with_interval
from tests.support import REPOSITORY

USED = [
    case
    for case in intervals.CASES
    if case.interval in ("wilson", "wilson-clustered", "clustered-t", "bootstrap")
    and case.draw is not intervals.one_answer
]
"""From 20 prompts on; of one answer per prompt results have Wilson's interval."""


@pytest.mark.slow
@pytest.mark.parametrize("case", USED, ids=lambda case: f"{case.interval}, {case.scores}")
@pytest.mark.parametrize("prompts", [100, 150])
def test_from_100_prompts_on_coverage_is_94_to_96_percent(case: intervals.Case, prompts: int):
    found = {share: intervals.coverage(case, share, prompts, simulations=8000) for share in (0.2, 0.35, 0.5, 0.65, 0.8)}
    # 0.24 % is the standard error of 8000 simulations; none is allowed for Wilson, whose coverage is exact.
    slack = 0.0 if case.draw is None else 0.005
    assert 0.94 - slack <= min(found.values()) <= max(found.values()) <= 0.96 + slack, found
    assert 0.94 <= np.mean(list(found.values())) <= 0.96


def test_what_is_simulated_is_what_results_have():
    rng = np.random.default_rng(0)
    scores = intervals.several_answers(0.5, 12, 3, rng)
    prompts = np.repeat(np.arange(12), intervals.ANSWERS)
    for column, low, high in zip(scores.T, *intervals.t_interval(scores), strict=True):
        answers = [float(k < round(4 * share)) for share in column for k in range(4)]
        estimate = mean_with_interval(answers, prompts.tolist())
        assert (estimate.low, estimate.high) == (pytest.approx(low), pytest.approx(high))
    for column, low, high in zip(scores.T, *intervals.clustered_wilson(scores), strict=True):
        answers = [float(k < round(4 * share)) for share in column for k in range(4)]
        estimate = clustered_wilson(answers, prompts.tolist())
        assert (estimate.low, estimate.high) == (pytest.approx(low), pytest.approx(high))
    for method in ("percentile", "t", "bca"):
        for column, low, high in zip(scores.T, *intervals.resampled(method)(scores), strict=True):
            estimate = bootstrapped(mean_of_items(column, range(12)), n=12, prompts=12, method=method)
            assert (estimate.low, estimate.high) == (pytest.approx(low), pytest.approx(high))


@pytest.mark.slow
def test_the_page_is_what_is_measured():
    """The lines that take no time: Wilson, exactly, and the clustered t interval."""
    page = (REPOSITORY / "docs" / "intervals.md").read_text()
    cases = [case for case in intervals.CASES if case.interval in ("wilson", "clustered-t")]
    for line in intervals.table(cases):
        assert line in page


@pytest.mark.slow
def test_compare_keeps_its_level():
    """A line of the page, simulated anew, and one that is neither: a true difference is found far more often."""
    page = (REPOSITORY / "docs" / "intervals.md").read_text()
    assert all(f"| {name} | {runs} |" in page for name, runs, _ in false_claims.CASES)
    for prompts in (30, 100):
        false = false_claims.false_families(false_claims.right_or_wrong, prompts)
        assert 0.005 < false / false_claims.FAMILIES <= false_claims.LEVEL
        assert f"{100 * false / false_claims.FAMILIES:.1f} (" in page

    def unequal(prompts: int, rng: np.random.Generator) -> np.ndarray:
        return (rng.random((3, prompts)) < np.array([[0.4], [0.6], [0.6]])).astype(float)

    assert false_claims.false_families(unequal, 300, families=50) >= 48
