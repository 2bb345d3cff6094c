"""Reward models: accuracy and calibration by hand and against others, ratings, parts of rows, card and report."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import yaml
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from align.train import main
from data.preparation import Split
from data.store import Ragged, TokenTable
from evals.bootstrap import DRAWS, bootstrapped
from evals.card import CardInfo, write_card
from evals.held_out import HeldOut
from evals.metrics import METRICS
from evals.parts import MOST_GROUPS
from evals.report import write_report
from evals.results import Result, Results
from evals.reward_model import (
    HIGHEST,
    LOWEST,
    WHOLE,
    Pairs,
    Ratings,
    apart,
    calibration_error,
    measure,
    of_pairs,
    of_ratings,
    pairs_in,
    ratings_in,
    reliability,
    temperature,
)
from tests.equivalence.runs import write_rows

NAMES: dict[str, Any] = {"dataset": "d", "split": "s", "step": 3}
MARGINS = np.array([2, 0.5, -1, 0.1, 3, -0.2, 1.2, 0])
"""The vector of a second implementation; what should come out stands in the tests that use it."""


def pairs(margin: Any, prompts: Any = None, strength: Any = None) -> Pairs:
    margin = np.asarray(margin, dtype=np.float64)
    strength = np.full(len(margin), np.nan) if strength is None else np.asarray(strength, dtype=np.float64)
    return Pairs(margin=margin, prompts=list(range(len(margin)) if prompts is None else prompts), strength=strength)


def values_of(found: Any) -> dict[str, float]:
    return {metric.removeprefix("reward_model/"): each.estimate.value for metric, each in found.items()}


# ---- pairs ----


def test_the_vector():
    """Strictly right 5 of 8, and one tie: 0.625 + 0.0625."""
    found = values_of(of_pairs(pairs(MARGINS)))
    assert found["accuracy"] == 0.6875
    assert found["ties"] == 0.125
    assert found["accuracy"] - found["ties"] / 2 == 0.625
    assert found["margin"] == pytest.approx(0.7)
    assert found["nll"] == pytest.approx(0.545227, abs=1e-6)
    assert found["brier"] == pytest.approx(0.190623, abs=1e-6)
    assert found["temperature"] == pytest.approx(0.960629, abs=1e-6)
    assert calibration_error(pairs(MARGINS), bins=5).estimate.value == pytest.approx(0.139821, abs=1e-6)
    assert [each["n"] for each in reliability(MARGINS, bins=5)] == [3, 1, 2, 1, 1]
    assert temperature(pairs(MARGINS)).extra["nll"] == pytest.approx(0.545091, abs=1e-6)


def test_calibration_by_hand():
    """Confidences 0.75 three times (two right) and 0.9 (right), in bins of a tenth's half.

    ECE = 3/4·|2/3 − 0.75| + 1/4·|1 − 0.9| = 0.0625 + 0.025.
    """
    three, nine = math.log(3), math.log(9)
    margins = np.array([three, three, -three, nine])
    bins = calibration_error(pairs(margins)).extra["bins"]
    assert [each["n"] for each in bins] == [3, 1]
    assert bins[0]["confidence"] == pytest.approx(0.75)
    assert bins[0]["accuracy"] == pytest.approx(2 / 3)
    assert (bins[1]["confidence"], bins[1]["accuracy"]) == (pytest.approx(0.9), 1.0)
    assert calibration_error(pairs(margins)).estimate.value == pytest.approx(0.0875)
    found = values_of(of_pairs(pairs(margins)))
    assert found["nll"] == pytest.approx((2 * math.log(4 / 3) + math.log(4) + math.log(10 / 9)) / 4)
    assert found["brier"] == pytest.approx((2 / 16 + 9 / 16 + 0.01) / 4)


def test_bins_hold_their_upper_end_and_the_first_one_its_lower():
    at = np.array([0.5, 0.55, 0.6, 0.600001, 1.0])
    margins = [*np.log(at[:-1] / (1 - at[:-1])).tolist(), 50.0]
    margins[1] = np.nextafter(margins[1], 0)  # σ of the logarithm may round up
    margins[2] = np.nextafter(margins[2], 0)
    assert [(each["low"], each["high"], each["n"]) for each in reliability(np.array(margins))] == [
        (0.5, 0.55, 2),
        (0.55, 0.6, 1),
        (0.6, 0.65, 1),
        (0.95, 1.0, 1),
    ]


@given(st.integers(0, 500), st.integers(1, 60))
def test_the_error_is_that_of_a_plain_loop(seed: int, number: int):
    margins = np.random.default_rng(seed).normal(scale=2, size=number).round(1)
    total = 0.0
    for low in np.arange(10) / 20 + 0.5:
        confidence = 1 / (1 + np.exp(-np.abs(margins)))
        members = (confidence > low + 1e-12 * (low > 0.5)) & (confidence <= low + 0.05 + 1e-12)
        members |= (confidence == 0.5) & (low == 0.5)
        if members.any():
            right = (np.sign(margins[members]) + 1) / 2
            total += abs(float((right - confidence[members]).sum())) / number
    assert calibration_error(pairs(margins)).estimate.value == pytest.approx(total, abs=1e-9)


def test_ties_are_half_right_and_as_sure_as_that():
    found = of_pairs(pairs([0.0, 0.0, 0.0]))
    values = values_of(found)
    assert (values["accuracy"], values["ties"], values["ece"], values["brier"]) == (0.5, 1.0, 0.0, 0.25)
    assert values["nll"] == pytest.approx(math.log(2))
    assert "temperature" not in values, "any would fit"


@pytest.mark.slow
def test_a_perfectly_calibrated_model_has_a_small_error_and_needs_no_temperature():
    rng = np.random.default_rng(3)
    size = rng.exponential(1.5, 4000)
    margins = np.where(rng.random(4000) < 1 / (1 + np.exp(-size)), size, -size)
    found = of_pairs(pairs(margins))
    assert found["reward_model/ece"].estimate.value < 0.03
    best = found["reward_model/temperature"].estimate
    assert best.low < 1 < best.high
    doubled = of_pairs(pairs(2 * margins))
    assert doubled["reward_model/temperature"].estimate.value == pytest.approx(2 * best.value, rel=1e-9)
    assert doubled["reward_model/ece"].estimate.value > 0.05


# ---- temperature ----


@given(st.integers(0, 500))
def test_temperature_is_that_of_a_logistic_regression(seed: int):
    """Without intercept or penalty, on differences with either sign."""
    rng = np.random.default_rng(seed)
    margins = rng.normal(0.7, 1.5, 30)
    found = temperature(pairs(margins)).estimate
    both = np.concatenate([margins, -margins])[:, None]
    fitted = LogisticRegression(C=1e12, fit_intercept=False, tol=1e-10, max_iter=1000)
    slope = float(fitted.fit(both, np.repeat([True, False], 30)).coef_[0, 0])
    if LOWEST < found.value < HIGHEST:
        assert found.value == pytest.approx(1 / slope, rel=1e-4)
    else:
        assert slope < 1 / HIGHEST


@pytest.mark.parametrize(
    ("margins", "value", "boundary"),
    [([1.0, 0.2, 3.0], LOWEST, "lowest"), ([-1.0, -0.2, 0.3], HIGHEST, "highest"), ([5.0], LOWEST, "lowest")],
)
def test_a_temperature_at_the_end_is_told(margins: list[float], value: float, boundary: str):
    found = temperature(pairs(margins))
    assert (found.estimate.value, found.extra["boundary"]) == (value, boundary)
    assert math.isnan(found.estimate.low)
    assert math.isnan(found.estimate.stderr)
    result = Result.of(found.estimate, metric="reward_model/temperature", extra=found.extra, **NAMES)
    assert result.low is result.high is result.stderr is None


def test_the_interval_of_a_temperature_is_that_of_a_bootstrap():
    """Clusters of four pairs that share an error: taking them as independent would be too narrow."""
    rng = np.random.default_rng(5)
    prompts = np.repeat(np.arange(150), 4)
    margins = 0.8 + rng.normal(size=150)[prompts] + 0.5 * rng.normal(size=600)
    found = temperature(pairs(margins, prompts)).estimate
    members = [np.flatnonzero(prompts == prompt) for prompt in range(150)]
    draws = []
    for _ in range(300):
        drawn = np.concatenate([members[i] for i in rng.integers(0, 150, 150)])
        draws.append(math.log(temperature(pairs(margins[drawn])).estimate.value))
    half = (math.log(found.high) - math.log(found.low)) / 2
    assert half == pytest.approx(1.976 * float(np.std(draws)), rel=0.15)
    alone = temperature(pairs(margins)).estimate
    assert math.log(alone.high / alone.low) < 0.8 * 2 * half


# ---- intervals ----


def test_accuracy_has_the_interval_that_fits():
    alone = of_pairs(pairs([1, -1, 1, 2]))["reward_model/accuracy"].estimate
    assert (alone.interval, alone.n, alone.clusters) == ("wilson", 4, 4)
    clustered = of_pairs(pairs([1, -1, 1, 2], prompts="aabb"))["reward_model/accuracy"].estimate
    assert (clustered.interval, clustered.n, clustered.clusters) == ("clustered-t", 4, 2)
    with_tie = of_pairs(pairs([1, 0, 1, 2]))["reward_model/accuracy"].estimate
    assert (with_tie.interval, with_tie.value) == ("clustered-t", 0.875)
    all_right = of_pairs(pairs([1, 1, 1, 2], prompts="aabb"))["reward_model/accuracy"].estimate
    assert (all_right.interval, all_right.high) == ("wilson-over-prompts", 1.0)
    assert all_right.low < 0.5


def test_a_single_pair_has_values_and_no_spread():
    for metric, found in of_pairs(pairs([0.3])).items():
        result = Result.of(found.estimate, metric=metric, extra=found.extra, **NAMES)
        assert result.n == 1
        if metric not in ("reward_model/accuracy", "reward_model/ties"):
            assert result.low is result.high is None, metric


@pytest.mark.slow
def test_an_interval_by_bootstrap_is_that_of_another_one():
    """Against scipy's, of pairs with a prompt each; clusters make it wider."""
    rng = np.random.default_rng(0)
    margins = rng.normal(0.5, 1, 200)
    found = calibration_error(pairs(margins)).estimate
    assert found.interval == "bootstrap"

    def error(rows: np.ndarray) -> float:
        return calibration_error(pairs(margins[rows])).estimate.value if len(rows) == 200 else math.nan

    drawn = [error(rng.integers(0, 200, 200)) for _ in range(300)]
    assert found.stderr == pytest.approx(np.std(drawn), rel=0.15)
    assert found.low == pytest.approx(np.quantile(drawn, 0.025), abs=0.02)
    assert found.high == pytest.approx(np.quantile(drawn, 0.975), abs=0.02)
    assert found.low <= found.value <= found.high
    wider = calibration_error(pairs(np.repeat(margins, 3), np.repeat(np.arange(200), 3))).estimate
    assert wider.value == pytest.approx(found.value)
    assert (wider.low, wider.high) == (pytest.approx(found.low), pytest.approx(found.high))
    assert wider.clusters == 200


def test_few_prompts_get_a_t_interval_and_one_gets_none():
    def mean(drawn: np.ndarray) -> np.ndarray:
        return drawn @ np.arange(drawn.shape[1]) / drawn.sum(axis=1)

    found = bootstrapped(mean, n=4, prompts=4, bounds=(0.0, 3.0))
    assert (found.value, found.interval) == (1.5, "bootstrap-stderr-t")
    # Of 0, 1, 2, 3 the mean of four draws varies by √(1.25/4) = 0.559; t with 3 degrees of freedom is 3.18.
    assert found.stderr == pytest.approx(0.559, rel=0.05)
    assert (found.low, found.high) == (0.0, 3.0), "cut to what is possible"
    assert math.isnan(bootstrapped(mean, n=1, prompts=1, bounds=(0.0, 3.0)).low)
    assert bootstrapped(mean, n=25, prompts=25, bounds=(0.0, 24.0)).interval == "bootstrap"


def test_where_all_are_right_calibration_has_no_interval():
    found = calibration_error(pairs(np.linspace(0.1, 3, 50)))
    assert found.estimate.value > 0.1
    assert math.isnan(found.estimate.low)


# ---- ratings ----


def ratings(predicted: Any, given_: Any, prompts: Any = None) -> Ratings:
    predicted = np.asarray(predicted, dtype=np.float64)
    return Ratings(
        predicted=predicted,
        given=np.asarray(given_, dtype=np.float64),
        prompts=list(range(len(predicted)) if prompts is None else prompts),
    )


def test_ratings_by_hand():
    """Errors 1, 0, −2, 0.5 over two attributes: mean 0.875, root of 5.25/4."""
    found = of_ratings([ratings([3, 2], [2, 2]), ratings([1, 4.5], [3, 4])])
    values = values_of(found)
    assert values["absolute_error"] == 0.875
    assert values["rmse"] == pytest.approx(math.sqrt(5.25 / 4))
    assert values["spearman"] == 1.0, "of the second attribute; ratings of the first do not vary"
    assert found["reward_model/rmse"].estimate.clusters == 2
    assert found["reward_model/rmse"].extra == {"draws": DRAWS, "seed": 0}


@given(st.integers(0, 300), st.integers(3, 40))
def test_rank_correlation_is_scipy_s(seed: int, number: int):
    rng = np.random.default_rng(seed)
    predicted, given_ = rng.normal(size=number).round(1), rng.integers(0, 4, number)
    found = of_ratings([ratings(predicted, given_)])
    if np.ptp(given_) == 0 or np.ptp(predicted) == 0:
        assert "reward_model/spearman" not in found
    else:
        wanted = float(scipy.stats.spearmanr(predicted, given_).statistic)
        assert found["reward_model/spearman"].estimate.value == pytest.approx(wanted, abs=1e-12)


def test_the_bootstrap_of_ranks_is_over_prompts():
    """Against plain resampling with scipy; items of a prompt stay together."""
    rng = np.random.default_rng(2)
    prompts = np.repeat(np.arange(60), 3)
    given_ = rng.normal(size=60)[prompts] + 0.3 * rng.normal(size=180)
    predicted = given_ + rng.normal(size=180)
    found = of_ratings([ratings(predicted, given_, prompts)])
    members = [np.flatnonzero(prompts == prompt) for prompt in range(60)]
    draws: dict[str, list[float]] = {"spearman": [], "rmse": []}
    for _ in range(400):
        rows = np.concatenate([members[i] for i in rng.integers(0, 60, 60)])
        draws["spearman"].append(float(scipy.stats.spearmanr(predicted[rows], given_[rows]).statistic))
        draws["rmse"].append(math.sqrt(float(((predicted[rows] - given_[rows]) ** 2).mean())))
    for name, drawn in draws.items():
        estimate = found[f"reward_model/{name}"].estimate
        assert estimate.stderr == pytest.approx(np.std(drawn), rel=0.15), name
        assert estimate.low == pytest.approx(np.quantile(drawn, 0.025), abs=0.03), name
        assert estimate.interval == "bootstrap"


# ---- rows of an evaluation ----


def by_row(margins: Any, **more: Any) -> dict[str, np.ndarray]:
    n = len(margins)
    base = np.linspace(-1, 1, n)
    return {
        "row": np.arange(n),
        "value_chosen/reward": base + np.asarray(margins),
        "value_rejected/reward": base,
        "length_chosen": np.full(n, 3),
        "length_rejected": np.full(n, 3),
        **{name: np.asarray(values, dtype=np.float64) for name, values in more.items()},
    }


@pytest.mark.slow
def test_every_metric_of_pairs_comes_from_rows():
    results = measure(by_row(MARGINS), range(8), **NAMES)
    assert [result.metric for result in results] == [name for name in METRICS if name in of_pairs(pairs(MARGINS))]
    assert {result.extra["n_dropped"] for result in results} == {0}
    assert {(result.dataset, result.split, result.step) for result in results} == {("d", "s", 3)}
    of_part = measure(by_row(MARGINS), range(8), part=True, **NAMES)
    assert {result.metric for result in of_part} == {result.metric for result in results} - set(WHOLE)


def test_pairs_that_can_t_be_scored_are_left_out_and_counted():
    rows = by_row([1.0, 1.0, -1.0, math.nan], score_chosen=[2, 3, 1, 1], score_rejected=[1, math.nan, 1, 1])
    rows["length_rejected"][1] = 0
    found = pairs_in(rows, "abcd")["reward"]
    assert (found.margin.tolist(), list(found.prompts), found.dropped) == ([1.0, -1.0], ["a", "c"], 2)
    assert found.strength.tolist() == [1.0, 0.0]
    assert {result.extra["n_dropped"] for result in measure(rows, "abcd", **NAMES)} == {2}
    with pytest.raises(ValueError, match="none of 1 rows can be scored: each has an empty response, a score that is"):
        measure(by_row([math.nan]), "a", **NAMES)
    assert measure(by_row([math.nan]), "a", part=True, **NAMES) == []


def rated(**attributes: tuple[Any, Any]) -> dict[str, np.ndarray]:
    n = len(next(iter(attributes.values()))[0])
    rows: dict[str, np.ndarray] = {"row": np.arange(n), "length_completion": np.full(n, 4)}
    for name, (predicted, given_) in attributes.items():
        rows[f"value_completion/{name}"] = np.array(predicted, dtype=np.float64)
        rows[f"score_{name}"] = np.array(given_, dtype=np.float64)
    return rows


def test_ratings_come_from_rows_all_together_and_one_by_one():
    nan = math.nan
    rows = rated(helpfulness=([1.0, 2.0, nan], [2.0, 2.0, 1.0]), correctness=([0.0, 5.0, 3.0], [1.0, nan, 3.0]))
    read = ratings_in(rows, "aab")
    assert (read["helpfulness"].dropped, list(read["correctness"].prompts)) == (1, ["a", "b"])
    together = {result.metric: result for result in measure(rows, "aab", **NAMES)}
    assert together["reward_model/absolute_error"].value == 0.5
    assert together["reward_model/absolute_error"].n == 4
    assert together["reward_model/absolute_error"].extra == {
        "n_dropped": 1,
        "attributes": ["helpfulness", "correctness"],
    }
    single = apart(rows, "aab", **NAMES)
    values = {(result.split, result.metric): result.value for result in single}
    assert values["s, helpfulness", "reward_model/absolute_error"] == 0.5
    assert values["s, correctness", "reward_model/rmse"] == pytest.approx(math.sqrt(0.5))
    assert apart(rated(score=([1.0], [2.0])), "a", **NAMES) == [], "one attribute is all there is"
    assert "score_humour" not in rows
    assert ratings_in({**rows, "value_completion/humour": np.ones(3)}, "aab").keys() == read.keys()


def test_strengths_of_preference_are_splits_of_their_own():
    rows = by_row([1, -1, 2, 2, 3], score_chosen=[2, 1.9, 3, 4.1, 1], score_rejected=[1, 1, 1, 2, math.nan])
    found = apart(rows, range(5), **NAMES)
    accuracy = {result.split: (result.value, result.n) for result in found if result.metric == "reward_model/accuracy"}
    assert accuracy == {"s, strength 1": (0.5, 2), "s, strength 2": (1.0, 2)}
    margin = {result.split: result.value for result in found if result.metric == "reward_model/margin"}
    assert margin == {"s, strength 1": 0.0, "s, strength 2": 2.0}
    assert {result.metric for result in found}.isdisjoint(WHOLE)
    alike = by_row([1, -1], score_chosen=[1, 1], score_rejected=[0, 0])
    assert apart(alike, range(2), **NAMES) == []
    many = by_row(np.ones(40), score_chosen=np.arange(40), score_rejected=np.zeros(40))
    assert apart(many, range(40), **NAMES) == []
    negative = by_row([1, -1], score_chosen=[1, 0], score_rejected=[0, 1])
    assert {result.split for result in apart(negative, range(2), **NAMES)} == {"s, strength −1", "s, strength 1"}


def test_further_outputs_of_a_head_are_splits_of_their_own():
    rows = by_row([1.0, 1.0])
    rows |= {"value_chosen/style": np.array([0.0, 1.0]), "value_rejected/style": np.array([1.0, 2.0])}
    (first,) = [r for r in measure(rows, range(2), **NAMES) if r.metric == "reward_model/accuracy"]
    assert (first.value, first.extra["output"]) == (1.0, "reward")
    (second,) = [r for r in apart(rows, range(2), **NAMES) if r.metric == "reward_model/accuracy"]
    assert (second.value, second.split) == (0.0, "s, style")


# ---- held-out rows of a run ----


def split_of(groups: list[str], sources: list[str] | None = None) -> Split:
    ids = Ragged.of([[1]] * len(groups))
    names = sources or ["d"] * len(groups)
    return Split(
        table=TokenTable(ids, {"chosen": ids, "rejected": ids}),
        where=[(name, i) for i, name in enumerate(names)],
        prompts=np.arange(len(groups)),
        groups=groups,
    )


def accuracies(held_out: HeldOut) -> dict[tuple[str, str], float]:
    return {(r.dataset, r.split): r.value for r in held_out.results if r.metric == "reward_model/accuracy"}


def test_groups_and_datasets_are_reported_apart():
    held_out = HeldOut(split_of(["code", "chat", "code", ""], ["a", "b", "a", "b"]), "a + b", "held out")
    shuffled = {name: values[[2, 0, 3, 1]] for name, values in by_row([1.0, -1.0, 1.0, 1.0]).items()}
    flat = held_out(shuffled, step=0)
    assert accuracies(held_out) == {
        ("a + b", "held out"): 0.75,
        ("a", "held out"): 1.0,
        ("b", "held out"): 0.5,
        ("a + b", "held out, code"): 1.0,
        ("a + b", "held out, chat"): 0.0,
        ("a + b", "held out, other"): 1.0,
    }
    assert flat["eval/reward_model/accuracy"] == 0.75
    assert flat["eval/reward_model/accuracy_low"] < 0.75
    assert held_out.results[0].split == "held out", "what is over all rows comes first"
    before = len(held_out.results)
    held_out(shuffled, step=0)
    assert len(held_out.results) == before


def test_a_group_without_a_pair_that_can_be_scored_is_left_out():
    held_out = HeldOut(split_of(["code", "chat"]), "d", "held out")
    held_out(by_row([1.0, math.nan]), step=0)
    assert accuracies(held_out) == {("d", "held out"): 1.0, ("d", "held out, code"): 1.0}


def test_the_largest_groups_are_reported():
    groups = [f"g{i}" for i in range(MOST_GROUPS + 5)] + [f"g{i}" for i in range(5, MOST_GROUPS + 5)]
    held_out = HeldOut(split_of(groups), "d", "held out")
    held_out(by_row(np.ones(len(groups))), step=0)
    found = accuracies(held_out)
    assert len(found) == 1 + MOST_GROUPS
    assert ("d", "held out, g0") not in found
    assert held_out.results[0].extra["groups_left_out"] == 5


def test_datasets_of_policies_are_reported_apart_too():
    held_out = HeldOut(split_of(["", ""], ["a", "b"]), "a + b", "held out")
    sums = {"policy_chosen": [-1.0, -2.0], "policy_rejected": [-2.0, -1.0]}
    lengths = {"length_chosen": np.ones(2), "length_rejected": np.ones(2)}
    held_out({"row": np.arange(2), **{k: np.array(v) for k, v in sums.items()}, **lengths}, step=0)
    found = {r.dataset: r.value for r in held_out.results if r.metric == "ranking/accuracy"}
    assert found == {"a + b": 0.5, "a": 1.0, "b": 0.0}


# ---- card and report ----


def run_of(path: Path, *, group: str = "code | <b>", strengths: bool = True, rows: int = 200) -> Path:
    """A run directory as training leaves it, with two evaluations and an overconfident model."""
    path.mkdir()
    rng = np.random.default_rng(0)
    strength = rng.integers(1, 4, rows) if strengths else np.full(rows, np.nan)
    groups = [group if i % 2 else "chat" for i in range(rows)]
    held_out = HeldOut(
        split_of(groups, [f"acme/{'a' if i < 150 else 'b'}" for i in range(rows)]), "acme/a + acme/b", "held out"
    )
    lines = []
    for step in (0, 30):
        margins = rng.normal(0.02 * step, 0.3 + step / 12, rows)
        found = held_out(by_row(margins, score_chosen=strength, score_rejected=np.zeros(rows)), step)
        lines.append({"step": step, **found})
    lines.append({"step": 30, "loss": 0.6, "rewards/margins": 0.5})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Results(run={"model": "acme/base"}, results=held_out.results).write(path / "results.json")
    (path / "recipe.yaml").write_text(yaml.safe_dump({"objective": {"name": "bradley_terry"}}))
    return path


def card_of(path: Path, **changes: Any) -> tuple[dict[str, Any], str]:
    fields: dict[str, Any] = {
        "base_model": "acme/base",
        "datasets": ["acme/a"],
        "objective": "bradley_terry",
        "formula": "loss",
        "citation": "Somebody",
        "adapter": False,
        "command": "train",
        "outputs": ("reward",),
        **changes,
    }
    text = write_card(path, info=CardInfo(**fields)).read_text()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


@pytest.mark.slow
def test_the_card_of_a_reward_model(tmp_path: Path):
    front, body = card_of(run_of(tmp_path / "run"))
    assert front["pipeline_tag"] == "text-classification"
    assert "reward-model" in front["tags"]
    tasks = [each["task"]["type"] for each in front["model-index"][0]["results"]]
    assert set(tasks) == {"text-classification"}
    metrics = {m["type"] for each in front["model-index"][0]["results"] for m in each["metrics"]}
    assert metrics == {"reward_model/accuracy", "reward_model/ece"}
    assert re.search(r"it scores the chosen response above the rejected one in \*\*\d\d\.\d %\*\* of pairs", body)
    assert "where the model at step 0 does in" in body
    assert re.search(r"\| code \\\| &lt;b&gt; \| 100 \| \d\d\.\d % \[\d\d\.\d, \d\d\.\d\] \|", body)
    assert re.search(r"\| chat \| 100 \|", body)
    assert re.search(r"\| acme/b \| 50 \|", body)
    assert re.search(r"\| strength 3 \|", body)
    assert body.count("| reward_model/accuracy | Reward model scores") == 1, "parts have a table of their own"
    assert re.search(r"\| 95\.0 % to 100\.0 % \| \d+ \| \d\d\.\d % \| \d+\.\d % \|", body)
    assert "Differences of scores are overconfident as log-odds" in body
    assert "Ranking accuracy measures" not in body
    for table in re.findall(r"(?:^\|.*\n)+", body, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table


def test_a_language_model_s_card_is_as_it_was(tmp_path: Path):
    front, body = card_of(run_of(tmp_path / "run"), outputs=())
    assert front["pipeline_tag"] == "text-generation"
    assert "model.generate" in body


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("outputs", [("reward",), ("helpfulness", 'a "b"')])
def test_the_quick_start_is_python(tmp_path: Path, adapter: bool, chat: bool, outputs: tuple[str, ...]):
    run = run_of(tmp_path / "run")
    if chat:
        (run / "chat_template.jinja").write_text("x")
    _, body = card_of(run, adapter=adapter, outputs=outputs, repo_id="me/m")
    code = re.search(r"```python\n(.*?)```", body, re.DOTALL)
    assert code is not None
    compile(code[1], "quick start", "exec")
    assert f"Auto{'Peft' if adapter else ''}ModelForSequenceClassification" in code[1]
    assert (f"num_labels={len(outputs)}" in code[1]) == adapter
    assert ("apply_chat_template" in code[1]) == chat


def test_the_report_of_a_reward_model(tmp_path: Path):
    page = write_report(run_of(tmp_path / "run", group="</td><script>x</script>")).read_text()
    assert "<script>x" not in page
    assert page.count("<script") == 1, "the page's own"
    text = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    for expected in (
        "Held-out accuracy",
        "Held-out calibration error",
        "Score of the chosen response minus that of the rejected one.",
        "Parts of the rows",
        "strength 2",
        "acme/b",
        "Right, by confidence",
        "95.0 % to 100.0 %",
    ):
        assert expected in text, expected
    assert "β-scaled" not in text
    assert page.count("<code>reward_model/accuracy</code>") == 2, "first and last evaluation, over all rows"
    drawing = re.search(
        r'<svg viewBox="[^"]+" role="img" aria-label="Share that is right over confidence">.*?</svg>', page
    )
    assert drawing is not None
    assert drawing[0].count("<circle") == len(re.findall(r'scope="row">\d+\.\d % to \d+\.\d %', page))


def test_ratings_have_a_card_and_a_report(tmp_path: Path):
    path = tmp_path / "run"
    path.mkdir()
    rng = np.random.default_rng(1)
    held_out = HeldOut(split_of(["a", "b"] * 30), "acme/a", "held out")
    given_ = rng.integers(0, 5, 60)
    rows = rated(helpfulness=(given_ + rng.normal(size=60), given_), correctness=(given_, given_ + rng.normal(size=60)))
    flat = held_out(rows, 5)
    assert {"eval/reward_model/rmse", "eval/reward_model/spearman", "eval/reward_model/absolute_error"} <= flat.keys()
    (path / "metrics.jsonl").write_text(json.dumps({"step": 5, **flat}) + "\n")
    Results(run={}, results=held_out.results).write(path / "results.json")
    (path / "recipe.yaml").write_text(yaml.safe_dump({"objective": {"name": "reward_regression"}}))
    _, body = card_of(path, outputs=("helpfulness", "correctness"), objective="reward_regression")
    assert re.search(r"\| reward_model/spearman \| Rank correlation .* \| 120 \| 60 \| bootstrap \|", body)
    for part in ("a", "b", "helpfulness", "correctness"):
        assert re.search(rf"\| {part} \| 60 \|", body), part
    assert "Held-out rank correlation" in write_report(path).read_text()


def test_a_run_without_evaluation_is_known_by_its_objective(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.7, "rewards/margins": 0.1}\n')
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"objective": [{"name": "margin_bt"}]}))
    assert "Score of the chosen response minus that" in write_report(tmp_path).read_text()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"objective": [{"name": "dpo"}, {"name": "no such"}]}))
    assert "β-scaled" in write_report(tmp_path).read_text()


def printed(run: Path) -> float:
    """What the quick start of a run's card prints, executed as it stands but for the folder."""
    code = re.search(r"```python\n(.*?)```", (run / "README.md").read_text(), re.DOTALL)
    assert code is not None
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(
            compile(code[1].replace('"."', repr(str(run))).replace(', device_map="auto"', ""), "quick start", "exec"),
            {},
        )
    return float(said.getvalue())


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_quick_start_prints_the_score_that_was_trained(folder: Path, lora: bool):
    """Of the text that training would have read, end token included, by the head that training left."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = [
        {"prompt": f"Say {i}:", "chosen": f" {i} it is, gladly.", "rejected": f" No, {i}!", "group": f"g{i % 2}"}
        for i in range(40)
    ]
    words = [
        *(f"--model_name_or_path={folder / 'model'}", f"--dataset_name={write_rows(folder / 'rows.jsonl', rows)}"),
        *(f"--output_dir={folder / 'run'}", "--objective=bradley_terry", "--eval_share=0.3", "--max_steps=3"),
        *("--rows_per_step=8", "--save_strategy=no", "--learning_rate=1e-2", *(["--lora.r=2"] if lora else [])),
    ]
    assert main(words) == 0
    score = printed(folder / "run")
    assert score == printed(folder / "run")
    stored = Results.read(folder / "run" / "results.json").results
    assert {r.split for r in stored if r.metric == "reward_model/accuracy"} == {
        "held out",
        "held out, g0",
        "held out, g1",
    }
    tokenizer = AutoTokenizer.from_pretrained(folder / "run")
    ids = tokenizer("How do I keep bread fresh? Wrap it in a cloth." + tokenizer.eos_token, return_tensors="pt")
    if lora:
        from peft import PeftModel

        base = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1)
        model = PeftModel.from_pretrained(base, folder / "run").merge_and_unload()
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder / "run")
    with torch.no_grad():
        last = model.model(input_ids=ids["input_ids"]).last_hidden_state[0, -1]
        assert score == pytest.approx(float(model.score(last)), rel=1e-4, abs=1e-5)
