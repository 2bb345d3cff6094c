"""WildBench and Arena-Hard: vectors, and rules worked out by hand."""

import math

import numpy as np
import pytest

from evals import arena, wildbench
from evals.arena import arena_score, expanded, parsed
from evals.wildbench import VERDICTS, reward, score, task_macro

# Winner and extent of the vector, with lengths of model and reference.
WB = [1, 0.5, 0.5, 0.5, -0.5, -0.5, -1, 0]
LENGTH_MODEL = [900, 900, 851, 850, 300, 300, 300, 500]
LENGTH_REF = [400, 350, 350, 350, 900, 800, 2000, 500]


def value(found, metric):
    assert set(found.estimates) <= {**arena.METRICS, **wildbench.METRICS}.keys()
    return found.estimates[metric].value


@pytest.mark.parametrize(
    ("margin", "scores", "total"),
    [(-1, [1, 0.5, 0.5, 0.5, -0.5, -0.5, -1, 0], 6.25), (500, [1, 0, 0, 0.5, 0, -0.5, -1, 0], 0.0)],
)
def test_reward_of_the_vector(margin, scores, total):
    found = reward(WB, LENGTH_MODEL, LENGTH_REF, margin=margin)
    assert list(found.by_prompt["wildbench/reward"].values()) == scores
    assert 100 * value(found, "wildbench/reward") == pytest.approx(total)


def test_skipped_items_leave_the_denominator_unless_strict():
    skipped = [False] * 6 + [True, True]
    assert value(reward(WB, LENGTH_MODEL, LENGTH_REF, margin=-1, skipped=skipped), "wildbench/reward") == 0.25
    strict = reward(WB, LENGTH_MODEL, LENGTH_REF, margin=-1, skipped=skipped, strict=True)
    assert value(strict, "wildbench/reward") == 1.5 / 8
    assert strict.n_dropped == 0


def test_a_judge_of_extent():
    assert sorted(VERDICTS.values()) == [-1, -0.5, 0, 0.5, 1]
    found = reward([VERDICTS["A+"], math.nan], [1, 1], [1, 1])
    assert (value(found, "wildbench/reward"), found.n_dropped) == (0.5, 1)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"verdicts": [0.7]}, "a verdict is one of .* got 0.7"),
        ({"verdicts": [math.nan]}, "none of 1 items"),
        ({"verdicts": [1.0], "skipped": [True]}, "none of 1 items"),
        ({"verdicts": [1.0], "length_model": [1, 2]}, "length_model has shape"),
        ({"verdicts": [1.0], "margin": -2}, "margin must be"),
    ],
)
def test_rewards_that_can_t_be_averaged(keys, says):
    with pytest.raises(ValueError, match=says):
        reward(**{"length_model": [1], "length_reference": [1], **keys})


def test_score_of_the_vector():
    """A mean of 7.3 is 46.0 on the board."""
    found = score([7, 7, 7, 8, 8, 8, 7, 7, 7, 7, math.nan])
    assert 10 * value(found, "wildbench/score") == pytest.approx(46.0)
    assert found.n_dropped == 1
    with pytest.raises(ValueError, match="from 1 to 10, got 0"):
        score([0.0])
    with pytest.raises(ValueError, match="none of 0"):
        score([])


def test_task_macro_by_hand():
    """a: mean of 1, 0 = 0.5; b: mean of 0, 1 = 0.5 … with weights 1 and 3: (1·0.5 + 3·⅔)/4."""
    values, tags = [1, 0, 1, 1, 5], [["a"], ["a", "b"], ["b"], ["b"], ["other"]]
    found = task_macro(values, tags, weights={"a": 1, "b": 3})
    assert value(found, "wildbench/task_macro") == pytest.approx((0.5 + 3 * 2 / 3) / 4)
    assert (found.n_dropped, found.extra["categories"]) == (1, {"a": 0.5, "b": pytest.approx(2 / 3)})
    with pytest.raises(ValueError, match=r"no item of the categories \['c'\]"):
        task_macro(values, tags, weights={"a": 1, "c": 1})
    with pytest.raises(ValueError, match="all finite"):
        task_macro([math.nan], [["a"]])
    assert sum(wildbench.TASKS.values()) == 4.75


# ---- Arena-Hard ----

GAMES = [("B>>A", "A>B"), ("A=B", "A>B"), ("A>B", "B>A"), ("B>A", "A=B")]


def test_expansion_of_the_vector():
    rows = [row for pair in GAMES for row in expanded(*pair)]
    assert sorted(rows) == sorted([1, 1, 1, 1, 1, 0.5, 0, 0, 0.5, 1])
    found = arena_score([*GAMES, (None, "A>B")])
    assert value(found, "arena/score") == pytest.approx(0.70)
    assert (found.estimates["arena/score"].n, found.estimates["arena/score"].clusters, found.n_dropped) == (10, 4, 1)
    assert math.log(0.7 / 0.3) == pytest.approx(0.847298, abs=5.1e-7), "the Bradley-Terry strength against one baseline"


def test_swapping_model_and_baseline_mirrors():
    back = [(second, first) for first, second in GAMES]
    assert value(arena_score(back), "arena/score") == pytest.approx(1 - 0.7)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("… [[A>B]] no, [[B>>A]]", "B>>A"),
        ("my verdict is [[a=b]]", "A=B"),
        ("[A>>B]", "A>>B"),
        ("[[B<A]]", "A>B"),
        ("[[A<<B]]", "B>>A"),
        ("[[A>>>B]]", None),
        ("no verdict", None),
        ("", None),
    ],
)
def test_verdicts_are_read_from_the_end(text, verdict):
    assert parsed(text) == verdict


def test_games_that_can_t_be_scored():
    with pytest.raises(ValueError, match="unknown verdict 'A'"):
        arena_score([("A", "A>B")])
    with pytest.raises(ValueError, match="none of 1 prompts has a verdict in both games"):
        arena_score([(None, "A>B")])
    assert np.isnan(arena_score([("A=B", "A=B")]).estimates["arena/score"].low), "one prompt"
