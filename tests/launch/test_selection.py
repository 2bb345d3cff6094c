"""Rounds, selection and QAlign measured: the reward errs as it says, verdicts and page follow from the intervals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from align.selection_curves import Curve
from data.worlds import Problem, problems
from launch import selection_page, selection_verdicts
from launch.bench import selection
from launch.bench.selection_parts import SIZES, since_middle, since_peak
from launch.bench.selection_samples import ERRORS, noisy_reward, paired
from launch.line_plots import LINE, apart
from launch.selection_verdicts import falls, flat, holds, of_curves, of_pass_at_k, of_rounds, rises, word


@pytest.fixture(scope="module")
def problem() -> Problem:
    return problems("held_out", 1, seed=5)[0]


# ---- the reward ----


def test_a_reward_without_error_is_the_truth(problem: Problem):
    assert noisy_reward(problem, problem.answer, 0.0) == 1
    assert [noisy_reward(problem, answer, 0.0) for answer in (problem.answer + 1, None)] == [0, 0]


def test_the_error_belongs_to_the_answer_and_grows_with_its_size(problem: Problem):
    other = problems("held_out", 2, seed=5)[1]
    wrong = [answer for answer in range(1, 60) if answer not in (problem.answer, other.answer)]
    errors = [noisy_reward(problem, answer, 1.0) for answer in wrong]
    assert errors == [noisy_reward(problem, answer, 1.0) for answer in wrong]
    assert len(set(errors)) == len(wrong)
    assert set(errors).isdisjoint(noisy_reward(other, answer, 1.0) for answer in wrong)
    assert set(errors).isdisjoint(noisy_reward(problem, answer, 1.0, seed=1) for answer in wrong)
    np.testing.assert_allclose([noisy_reward(problem, answer, 0.3) for answer in wrong], 0.3 * np.array(errors))
    assert noisy_reward(problem, problem.answer, 0.3) - 1 == pytest.approx(
        0.3 * (noisy_reward(problem, problem.answer, 1.0) - 1)
    )


@pytest.mark.slow
def test_errors_have_the_heavy_tail_of_two_degrees_of_freedom(problem: Problem):
    """|t| exceeds 0.816 half of the time, 4.303 in 5 % and 9.925 in 1 %, as tables say."""
    errors = np.abs([noisy_reward(problem, answer, 1.0) for answer in range(10_000, 30_000)])
    for limit, share in ((0.816, 0.5), (4.303, 0.05), (9.925, 0.01)):
        assert (errors > limit).mean() == pytest.approx(share, abs=4 * (share * (1 - share) / len(errors)) ** 0.5)


# ---- verdicts ----


def interval(low: float, high: float) -> dict[str, float]:
    return {"value": (low + high) / 2, "low": low, "high": high}


UP, DOWN, SMALL, UNKNOWN = interval(0.1, 0.2), interval(-0.2, -0.1), interval(-0.01, 0.02), interval(-0.2, 0.2)


def test_what_an_interval_says():
    assert [rises(each) for each in (UP, DOWN, SMALL, UNKNOWN)] == [True, False, False, False]
    assert [falls(each) for each in (UP, DOWN, SMALL, UNKNOWN)] == [False, True, False, False]
    assert [flat(each) for each in (UP, DOWN, SMALL, UNKNOWN)] == [False, False, True, False]
    assert [holds(each) for each in (UP, DOWN, SMALL, UNKNOWN)] == [True, False, True, False]
    assert [word(each) for each in (UP, DOWN, UNKNOWN)] == ["higher", "lower", "no difference seen"]


def test_rounds_have_to_rise_with_every_seed():
    def part(*last: dict[str, float]) -> dict[str, Any]:
        return {
            "runs": [
                {"seed": seed, "rounds": [{"change": SMALL, "gain": SMALL}, {"change": each, "gain": UP}]}
                for seed, each in enumerate(last)
            ]
        }

    assert [each.shows for each in of_rounds(part(UP, UP))] == [True, True]
    assert [each.shows for each in of_rounds(part(UP, UNKNOWN))] == [False, True]
    assert "seed 1: +0.000 [-0.200, +0.200]" in next(of_rounds(part(UP, UNKNOWN))).numbers


@pytest.mark.parametrize(("first", "last", "shows"), [(UP, DOWN, [True, True]), (UNKNOWN, SMALL, [False, False])])
def test_pass_at_k_rises_at_one_and_narrows_at_the_end(first: Any, last: Any, shows: list[bool]):
    part = {"k": [1, 8, 64], "runs": [{"seed": 0, "changes": [first, SMALL, last]}]}
    assert [each.shows for each in of_pass_at_k(part)] == shows


def curves_part(best: Any, gate: Any, majority: Any, over: Any) -> dict[str, Any]:
    found = {
        "size": 1.0,
        "since_peak": {"best_of_n": best, "best_of_majority": gate},
        "since_middle": {"majority": majority | {"from": 32}},
        "open_gate": gate | {"from": 4, "to": 16},
        "best_of_majority_against": {"best_of_n": over, "majority": over, "weighted_majority": over},
    }
    return {"n": [1, 512], "errors": {"large": found}}


def test_the_curves_of_the_paper_show_and_others_do_not():
    assert all(each.shows for each in of_curves(curves_part(DOWN, SMALL, SMALL, UP)))
    assert not any(each.shows for each in of_curves(curves_part(UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN)))
    assert not any(each.shows for each in of_curves(curves_part(UP, DOWN, UP, DOWN)))


@pytest.mark.parametrize(("over", "change", "shows"), [(UP, SMALL, True), (DOWN, UNKNOWN, False)])
def test_qalign_is_above_and_does_not_fall_or_is_not_and_does(over: Any, change: Any, shows: bool):
    others = {"best_of_n": over, "majority": over, "qalign, β 0.2": UP}
    found = {"size": 1.0, "against": {"qalign, β 1": others}, "since_peak": {"qalign, β 1": change}}
    claims = list(selection_verdicts.of_chains({"budgets": [64, 512], "errors": {"large": found}}))
    assert [each.shows for each in claims] == [shows] * 3
    assert "at 512 tokens" in claims[0].claim


def test_one_problem_in_a_hundred_is_no_difference():
    """Mean 0.01, deviation 0.1: 0.01 ± 1.984 · 0.1/√100."""
    one = np.eye(100)[0]
    found = paired(one, np.zeros(100))
    assert found["value"] == pytest.approx(0.01)
    assert (found["low"], found["high"]) == pytest.approx((0.01 - 0.0198422, 0.01 + 0.0198422), abs=1e-7)
    assert not rises(found)


def test_a_fall_is_measured_on_other_problems_than_its_peak_is_chosen_on():
    """Of noise some N is best by luck; measured where it was chosen, noise would fall."""
    rng = np.random.default_rng(0)
    noise = (rng.random((400, 10)) < 0.5).astype(float)
    assert not falls(since_peak(noise, SIZES))
    best = int(noise.mean(axis=0).argmax())
    assert (noise[:, -1] - noise[:, best]).mean() < since_peak(noise, SIZES)["value"]
    falling = (rng.random((400, 10)) < np.array([0.5, 0.7, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.4, 0.4])).astype(float)
    found = since_peak(falling, SIZES)
    assert found["peak_at"] == [4, 4]
    assert falls(found)
    assert found["value"] == pytest.approx(-0.5, abs=0.1)
    assert since_middle(Curve(sizes=SIZES, estimates=(), per_prompt=falling, subsets=None))["from"] == 32


# ---- page and plots ----


def test_names_at_the_end_of_lines_stay_apart():
    assert apart([10.0, 100.0], 0, 200) == [10, 100]
    placed = apart([100.0, 101.0, 99.0], 0, 200)
    assert sorted(placed) == [placed[2], placed[0], placed[1]]
    assert np.diff(sorted(placed)).min() >= LINE
    assert max(apart([198.0, 199.0], 0, 200)) <= 200


def test_the_page_is_up_to_date():
    assert selection_page.main(["--check"]) == 0, "run `python -m launch.selection_page`"


def test_the_numbers_on_record_are_whole():
    found = json.loads(selection_page.NUMBERS.read_text(encoding="utf-8"))
    assert list(found["parts"]) == list(selection.PARTS)
    assert not any(part["quick"] for part in found["parts"].values())
    assert {name: each["size"] for name, each in found["parts"]["curves"]["errors"].items()} == ERRORS


def test_every_plot_is_on_the_page_and_can_be_read():
    found = json.loads(selection_page.NUMBERS.read_text(encoding="utf-8"))
    text = selection_page.page(found)
    for name, drawing in selection_page.plots(found["parts"]).items():
        assert f"(plots/{name})" in text
        assert ElementTree.fromstring(drawing).tag.endswith("svg")
        assert "prefers-color-scheme:dark" in drawing


def test_quick_numbers_are_not_published():
    with pytest.raises(SystemExit):
        selection.main(["--quick", "--into", str(selection_page.NUMBERS)])


@pytest.mark.all
def test_it_runs(tmp_path: Path):
    """All of it with tiny numbers, and chains and curves again from the samples that are there."""
    words = ["--quick", "--into", str(tmp_path / "found.json"), "--output_dir", str(tmp_path / "runs")]
    assert selection.main(words) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["parts"]) == list(selection.PARTS)
    text = selection_page.page(found)
    assert all(f"(plots/{name})" in text for name in selection_page.plots(found["parts"]))
    accuracy = found["parts"]["curves"]["errors"]["none"]["by_samples"]["best_of_n"]
    passed = found["parts"]["pass_at_k"]["start"]
    # With a perfect reward best-of-N finds a right answer whenever there is one.
    assert [each["value"] for each in accuracy[:4]] == pytest.approx([each["value"] for each in passed[:4]])
    samples = (tmp_path / "runs" / "start.jsonl").read_bytes()
    assert selection.main([*words, "--parts", "curves,qalign"]) == 0
    again = json.loads((tmp_path / "found.json").read_text())
    for name in ("curves", "qalign"):
        assert again["parts"][name]["errors"] == found["parts"][name]["errors"]
    assert (tmp_path / "runs" / "start.jsonl").read_bytes() == samples
