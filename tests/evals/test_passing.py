"""Pass@k and strategies by hand, and on the vector of best-of-majority."""

import pytest

from align.selection import SELECTIONS
from evals.metrics import METRICS
from evals.passing import METRICS as OWN
from evals.passing import Tried, chosen_at_k, pass_at_k

ANSWERS = [7, 12, 7, 9, 12, 7, 5, 9, 12, 7]
REWARDS = [0.2, 0.9, 0.3, 2.5, 0.8, 0.1, 1.9, -1, 0.7, 0.4]


def vector(**more):
    own = {"prompt": "p", "answers": ANSWERS, "right": [each == 12 for each in ANSWERS], "rewards": REWARDS}
    return Tried(**{**own, **more})


def values(found):
    return {name: each.value for name, each in found.estimates.items()}


def test_unbiased_pass_at_k_of_the_vector():
    """3 right of 10."""
    found = values(pass_at_k([vector()], [1, 2, 5]))
    assert found == {
        "pass_at_k/any@1": pytest.approx(0.3),
        "pass_at_k/any@2": pytest.approx(0.533333, abs=1e-6),
        "pass_at_k/any@5": pytest.approx(0.916667, abs=1e-6),
    }


def test_best_of_n_of_the_vector():
    found = values(chosen_at_k(SELECTIONS["best_of_n"](), [vector()], [1, 2, 4, 10]))
    assert list(found.values()) == pytest.approx([0.3, 0.4, 0.309524, 0], abs=1e-6)


def test_majority_needs_no_rewards_and_sees_all():
    """7 has four votes of ten, 12 three."""
    found = chosen_at_k(SELECTIONS["majority"](), [vector(rewards=None)], [10])
    assert values(found) == {"pass_at_k/majority@10": 0}
    assert found.n_dropped == 0


def test_prompts_without_rewards_are_dropped_and_counted():
    strategy = SELECTIONS["best_of_majority"](alpha=0.25)
    found = chosen_at_k(strategy, [vector(), vector(prompt="q", rewards=None)], [10])
    assert values(found) == {"pass_at_k/best_of_majority@10": 1}
    assert (found.n_dropped, found.extra["subsets"]) == (1, 200)
    with pytest.raises(ValueError, match="best_of_majority chooses by rewards, and none of 1 prompts has one"):
        chosen_at_k(strategy, [vector(rewards=None)], [10])


def test_answers_that_mean_the_same_are_one():
    tried = Tried(prompt="p", answers=["1/2", "3", "0.5"], right=[True, False, True])
    same = lambda a, b: {a, b} == {"1/2", "0.5"}  # noqa: E731
    assert values(chosen_at_k(SELECTIONS["majority"](), [tried], [3], same=same)) == {"pass_at_k/majority@3": 1}


def test_samples_without_an_answer_are_never_chosen():
    tried = Tried(prompt="p", answers=[None, None, 4], right=[False, False, True])
    assert values(chosen_at_k(SELECTIONS["majority"](), [tried], [3])) == {"pass_at_k/majority@3": 1}


def test_scores_are_kept_by_prompt_for_the_largest_k():
    found = pass_at_k([vector(), vector(prompt="q", right=[False] * 10)], [1, 10])
    assert found.by_prompt == {"pass_at_k/any@10": {"p": 1.0, "q": 0.0}}


def test_every_strategy_has_a_metric():
    assert {f"pass_at_k/{name}" for name in SELECTIONS.names()} < set(OWN)
    assert METRICS["pass_at_k/majority@8"].better == "higher"


def test_more_than_there_are():
    with pytest.raises(ValueError, match="has 10 samples, and the curve goes to 11"):
        pass_at_k([vector()], [11])
