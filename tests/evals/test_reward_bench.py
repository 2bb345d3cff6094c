"""RewardBench's sections, overall, best-of-four and ties: the vectors, and the last by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from evals.ranking import share_of
from evals.reward_bench import PRIOR, SECTIONS, best_of, reward_bench, ties_score
from objectives.stats import Estimate

SIX = {"abs": 6e-7}


def measured(value: float, stderr: float = 0.0) -> Estimate:
    return Estimate(value=value, stderr=stderr, low=value, high=value, n=10, clusters=10, interval="wilson")


def test_the_sections_of_the_vector():
    hard = {"natural": 0.9, "adver-neighbor": 0.6, "adver-GPTInst": 0.5, "adver-GPTOut": 0.66, "adver-manual": 0.55}
    subsets = {f"llmbar-{name}": measured(value) for name, value in hard.items()}
    found = reward_bench({**subsets, "mt-bench-hard": measured(0.7)}).estimates
    assert found["reward_bench/chat_hard"].value == pytest.approx(0.654868, **SIX)
    assert sum(SECTIONS["chat_hard"].values()) == 456
    names = ("cpp", "go", "java", "js", "python", "rust")
    code = {f"hep-{name}": measured(v) for name, v in zip(names, (0.9, 0.88, 0.92, 0.91, 0.93, 0.87), strict=True)}
    found = reward_bench({**code, "math-prm": measured(0.8)}).estimates
    assert found["reward_bench/reasoning"].value == pytest.approx(0.850833, **SIX)
    assert "reward_bench/overall" not in found


def test_overall_of_the_vector():
    of_sections = dict(zip(SECTIONS, (0.95, 0.63, 0.85, 0.86), strict=True))
    subsets = {name: measured(of_sections[section]) for section, names in SECTIONS.items() for name in names}
    assert reward_bench(subsets).estimates["reward_bench/overall"].value == pytest.approx(0.8225)
    with_prior = reward_bench(subsets | {name: measured(0.7) for name in PRIOR}).estimates
    assert with_prior["reward_bench/overall"].value == pytest.approx(0.808889, **SIX)
    assert with_prior["reward_bench/prior_sets"].value == pytest.approx(0.7)


def test_a_missing_subset_is_left_out_of_its_section_and_named():
    found = reward_bench({"mt-bench-easy": measured(1.0, 0.1), "mt-bench-med": measured(0.5, 0.1), "mine": measured(0)})
    each = found.estimates["reward_bench/chat"]
    assert each.value == pytest.approx((28 + 20) / 68)
    assert each.stderr == pytest.approx(0.1 * math.hypot(28, 40) / 68)
    assert "donotanswer" in found.extra["missing"]
    assert found.results(dataset="d", split="s", step=0)
    with pytest.raises(ValueError, match="no subset of RewardBench is among mine"):
        reward_bench({"mine": measured(0.5)})


@pytest.mark.slow
def test_the_interval_of_a_section_covers():
    rng = np.random.default_rng(0)
    truth = {"mt-bench-easy": 0.8, "mt-bench-med": 0.4, "alpacaeval-easy": 0.6}
    wanted = sum(SECTIONS["chat"][name] * p for name, p in truth.items()) / sum(SECTIONS["chat"][n] for n in truth)
    held = 0
    for _ in range(1000):
        drawn = {n: share_of((rng.random(100) < p).astype(float), range(100)) for n, p in truth.items()}
        each = reward_bench(drawn).estimates["reward_bench/chat"]
        held += each.low <= wanted <= each.high
    assert 0.925 <= held / 1000 <= 0.975


def test_best_of_four_of_the_vector():
    assert best_of([3, 1, 3, 2], 0) == 0.5
    assert best_of([3, 1, 4, 2], 0) == 0
    assert best_of([3, 1, 2, 2], 0) == 1


def test_ties_by_hand():
    """Two prompts. First: gaps 2 and 1.5, spread 0.5. Second: gaps −1 and 1, spread 2.

    acc_tied 1, acc_ref ½, gap_tied > spread in one of two, the lesser gap > spread in one of two; tanh(3 − 1) and
    tanh(−½ − 1): 0.3 + 0.15 + 0.1 + 0.1 + 0.005·(tanh 2 − tanh 1.5).
    """
    reference = [([5.0, 3.0], 1), ([1.0, 2.0], 1)]
    tied = [([4.0, 4.5, 2.5], 2), ([5.0, 3.0, 2.0], 2)]
    assert ties_score(reference, tied) == pytest.approx(0.65 + 0.005 * (math.tanh(2) - math.tanh(1.5)))
    alike = [([4.0, 4.0, 2.5], 2)]
    assert ties_score(reference[:1], alike) == pytest.approx(1.01), "no spread: tanh of infinity is 1"
    with pytest.raises(ValueError, match="needs its reference"):
        ties_score(reference, alike)
    with pytest.raises(ValueError, match="needs right and wrong ones"):
        ties_score(reference[:1], [([1.0], 1)])
