"""What is made of a judge's verdicts, worked out by hand."""

import math

import numpy as np
import pytest

from evals import verdicts
from evals.metrics import METRICS
from evals.sampled import plain_name
from evals.verdicts import Verdicts, compared, measure, of_strengths, strengths

NAN = math.nan


def played(games, share, *, lengths=None, prompts=None, model="policy", baseline="base", identical=None, whole=None):
    """Verdicts of a judge that was shown both answers."""
    n = len(share)
    ours, theirs = zip(*(lengths or [(100, 100)] * n), strict=True)
    return Verdicts(
        model=model,
        baseline=baseline,
        prompts=prompts or [f"p{i}" for i in range(n)],
        share=np.array(share, dtype=float),
        reasons=["the judge gave no verdict" if math.isnan(each) else "" for each in share],
        length_model=np.array(ours),
        length_base=np.array(theirs),
        whole=np.array(whole or [True] * n),
        identical=np.array(identical or [False] * n),
        excluded=np.zeros(n, dtype=bool),
        games=games,
    )


def four(**more):
    """Won clearly and slightly; won and lost by position; the same answer; a verdict missing."""
    games = [("A>>B", "B>A"), ("A>B", "A>B"), (None, None), ("A=B", None)]
    return played(
        games,
        [0.875, 0.5, 0.5, NAN],
        lengths=[(900, 200), (100, 100), (70, 70), (50, 60)],
        identical=[False, False, True, False],
        **more,
    )


def values(found):
    estimates = {name: each for measured in found for name, each in measured.estimates.items()}
    assert set(estimates) <= set(METRICS)
    return {name: each.value for name, each in estimates.items()}


@pytest.mark.slow
def test_everything_by_hand():
    """raw (.875 + .5 + .5)/3; first shown wins 1, 0, 1, 1 of four games; one of three asked has no verdict.

    Arena: p0 gives 1, 1, 1 (clear, as A) and 1 (as B); p1 gives 1 and 0; p2 gives ½ and ½: 6 of 8.
    WildBench: p0 gives 1 and ½, of which the slight one is 700 characters longer and counts 0; p1 ½ and −½; p2 0 and 0.
    """
    found, _ = measure(four(), verdicts.KINDS, both=True)
    got = values(found)
    assert got["win_rate/raw"] == pytest.approx(1.875 / 3)
    assert got["win_rate/ties"] == pytest.approx(2 / 3)
    assert got["judge/first_position"] == 0.75
    assert got["judge/consistency"] == 0.5
    assert got["judge/parse_failures"] == pytest.approx(1 / 3)
    assert got["judge/prefers_longer"] == 0.875
    assert got["arena/score"] == 0.75
    assert got["wildbench/reward"] == pytest.approx(1 / 6)
    assert "judge/win_rate" not in got
    assert found[0].n_dropped == 1


def test_wildbench_without_its_rule_counts_long_wins():
    found, _ = measure(four(), ["wildbench"], both=True, margin=-1)
    assert values(found)["wildbench/reward"] == pytest.approx(1.5 / 6)


def test_truncated_or_empty_answers_leave_wildbench():
    found, _ = measure(four(whole=[False, True, True, True]), ["wildbench"], both=True, margin=-1)
    assert values(found)["wildbench/reward"] == 0


def test_one_order_has_no_arena_score_and_counts_failures():
    games = [("A>B", None), (None, "A>B"), (None, None)]
    found, warnings = measure(played(games, [0.75, 0.25, NAN]), ["arena", "wildbench"], both=False)
    got = values(found)
    assert got["judge/parse_failures"] == pytest.approx(1 / 3)
    assert got["wildbench/reward"] == 0  # won as A slightly, lost as B slightly
    assert not {"arena/score", "judge/consistency", "judge/first_position"} & set(got)
    assert any("set orders: both" in line for line in warnings)


def test_ties_everywhere_are_told():
    found, warnings = measure(played(None, [0.5, 0.5, 0.5]), ["raw"], both=True)
    assert values(found)["win_rate/raw"] == 0.5
    assert any("all 3 verdicts are ties: they say nothing" in line for line in warnings)


def test_one_prompt_is_told_and_has_no_interval():
    one = played(None, [1.0, 0.0], prompts=["p", "p"], lengths=[(10, 20), (10, 20)])
    found, warnings = measure(one, ["raw", "length_controlled"], both=True)
    assert math.isnan(found[0].estimates["win_rate/raw"].low)
    assert any("one prompt only" in line for line in warnings)
    assert any("win_rate/length_controlled is left out" in line and "length" in line for line in warnings)


@pytest.mark.parametrize(("games", "which"), [(("A>B", "A>B"), "first"), (("B>A", "B>A"), "second")])
def test_a_judge_with_a_side_is_told(games, which):
    _, warnings = measure(played([games] * 6, [0.5] * 6), ["raw"], both=True)
    assert any(f"prefers the answer shown {which}: {100 if which == 'first' else 0} %" in line for line in warnings)


def test_a_judge_without_a_side_is_not():
    _, warnings = measure(played([("A>B", "B>A"), ("B>A", "A>B")] * 4, [0.75, 0.25] * 4), ["raw"], both=True)
    assert warnings == ["judge/prefers_longer is left out: none of 8 pairs differs by more than 30 characters; there "
                        "is no longer answer"]  # fmt: skip


def test_no_verdict_at_all_is_no_number():
    with pytest.raises(ValueError, match="none of 2 verdicts can be used"):
        measure(played([(None, None)] * 2, [NAN, NAN]), ["raw"], both=True)


def test_judges_agree_on_whom_they_prefer():
    """Wins, wins, ties and no verdict against wins, loses and ties: two of three alike."""
    one, two = played(None, [1, 0.75, 0.5, NAN]), played(None, [0.6, 0.2, 0.5, 0.5])
    assert compared(one, two).estimates["judge/agreement"].value == pytest.approx(2 / 3)


@pytest.mark.slow
def test_strengths_of_a_model_that_meets_all():
    """Against a single opponent the win rate is the mean score; Elo is 1000 + 400·log₁₀(odds)."""
    found = strengths([played(None, [1, 1, 1, 0]), played(None, [1, 0, 0.5, NAN], baseline="other")], "base")
    measured = of_strengths(found, "policy")
    assert measured.estimates["bradley_terry/win_rate"].value == pytest.approx(0.75)
    assert measured.estimates["bradley_terry/elo"].value == pytest.approx(1000 + 400 * math.log10(3))
    assert measured.extra["elo"]["other"] == pytest.approx(1000 + 400 * math.log10(3), abs=1e-3)
    assert measured.extra["anchor"] == "base"
    assert found.n == 7


def test_names_in_splits_have_no_commas():
    assert plain_name("a, b ,c") == "a b c"
