"""AUC of labelled responses: by hand, against scikit-learn, with ties, and its clustered error against a bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from data.preparation import Split
from data.store import Ragged, TokenTable
from evals.held_out import HeldOut
from evals.labelled import METRICS, auc, measure

NAMES = {"dataset": "d", "split": "s", "step": 3}


def test_auc_by_hand():
    """Desirable 3 and 1, undesirable 2, 1 and 0: wins 3>2, 3>1, 3>0, 1>0, one tie at 1, one loss to 2.

    AUC = (4 + 0.5) / 6 = 0.75. Share of the others that each beats: desirable 1 and 1/2; undesirable are beaten in
    1/2, 3/4 and 1. Influences: (1/4, −1/4)/2 and (−1/4, 0, 1/4)/3, each row its own prompt:
    SE = √((2/64 + 2/144)·5/4) = 0.2375.
    """
    found = auc(np.array([3.0, 1.0, 2.0, 1.0, 0.0]), np.array([1, 1, 0, 0, 0], dtype=bool), range(5))
    assert found.value == pytest.approx(0.75)
    assert found.stderr == pytest.approx(math.sqrt((2 / 64 + 2 / 144) * 5 / 4))
    assert (found.n, found.clusters, found.interval) == (5, 5, "clustered-t")
    assert found.low <= found.value <= found.high == 1.0


@given(st.integers(0, 1000), st.integers(2, 40), st.sampled_from([1, 3, 1000]))
def test_auc_equals_scikit_learn(seed: int, rows: int, distinct: int):
    """With few distinct scores there are many ties; both count them one half."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, distinct, rows) / 7.0
    labels = rng.random(rows) < 0.4
    labels[:2] = (True, False)
    found = auc(scores, labels, range(rows))
    assert found.value == pytest.approx(roc_auc_score(labels, scores))
    assert auc(-scores, labels, range(rows)).value == pytest.approx(1 - found.value)
    order = rng.permutation(rows)
    assert auc(scores[order], labels[order], order.tolist()).stderr == pytest.approx(found.stderr)


def test_differences_within_the_resolution_are_ties():
    labels = np.array([True, False, False])
    scores = np.array([1.0, 1.0 - 1e-7, 0.5])
    assert auc(scores, labels, range(3)).value == 1.0
    assert auc(scores, labels, range(3), resolution=1e-7).value == 0.75
    assert auc(scores, labels, range(3), resolution=np.array([2e-7, 0.0, 0.0])).value == 0.75
    assert auc(scores, labels, range(3), resolution=10.0).value == 0.5


def clustered(seed: int, prompts: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores with an effect of the label and a large one of the prompt, one to seven rows each, mostly of one label."""
    rng = np.random.default_rng(seed)
    cluster = np.repeat(np.arange(prompts), rng.integers(1, 8, prompts))
    labels = rng.random(len(cluster)) < rng.choice([0.1, 0.9], prompts)[cluster]
    scores = labels * 0.8 + rng.normal(size=prompts)[cluster] + rng.normal(size=len(cluster))
    return scores, labels, cluster


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_stderr_equals_a_bootstrap_over_prompts(seed: int):
    """Within 15 %; taking rows as independent would be too small by more than that."""
    scores, labels, cluster = clustered(seed)
    found = auc(scores, labels, cluster.tolist())
    rng = np.random.default_rng(100 + seed)
    members = [np.flatnonzero(cluster == prompt) for prompt in range(found.clusters)]
    values = []
    for _ in range(800):
        drawn = np.concatenate([members[i] for i in rng.integers(0, found.clusters, found.clusters)])
        values.append(roc_auc_score(labels[drawn], scores[drawn]))
    assert found.stderr == pytest.approx(np.std(values), rel=0.15)
    assert auc(scores, labels, range(len(scores))).stderr < 0.9 * found.stderr


def test_one_prompt_has_no_interval():
    found = auc(np.array([1.0, 0.0]), np.array([True, False]), ["a", "a"])
    assert found.value == 1.0
    assert math.isnan(found.stderr)


def test_every_metric_of_labelled_responses():
    policy, reference = np.array([-10.0, -20.0, -30.0, -5.0]), np.array([-12.0, -19.0, -33.0, -5.0])
    labels = np.array([True, False, True, False])
    results = measure(policy, reference, labels, ["a", "a", "b", "b"], **NAMES)
    found = {result.metric: result for result in results}
    assert found.keys() == METRICS.keys()
    assert found["labels/auc"].value == 1.0  # raised by 2 and 3; −1 and 0
    assert found["displacement/desirable"].value == 2.5
    assert found["displacement/undesirable"].value == -0.5
    assert [found[name].n for name in METRICS] == [4, 2, 2]
    assert {(result.dataset, result.split, result.step) for result in results} == {("d", "s", 3)}


@pytest.mark.parametrize("label", [True, False])
def test_one_class_gives_its_displacement_only(label: bool):
    results = measure(np.array([-1.0, -2.0]), np.array([-2.0, -2.0]), np.array([label, label]), ["a", "b"], **NAMES)
    assert [result.metric for result in results] == [f"displacement/{'desirable' if label else 'undesirable'}"]
    assert results[0].value == 0.5


def test_before_training_every_comparison_is_a_tie():
    """Rounding of float32 sums is no win: policy and reference are computed in batches of other shapes."""
    rng = np.random.default_rng(0)
    reference = -300 * rng.random(40)
    policy = reference * (1 + 1e-7 * rng.normal(size=40))
    found = {r.metric: r.value for r in measure(policy, reference, rng.random(40) < 0.5, list(range(40)), **NAMES)}
    assert found["labels/auc"] == 0.5


# ---- held-out rows ----


def split_of(rows: int, groups: list[str], labels: np.ndarray | None = None) -> Split:
    ids = Ragged.of([[1]] * rows)
    table = TokenTable(ids, {"completion": ids} if labels is not None else {"chosen": ids, "rejected": ids}, labels)
    return Split(table=table, where=[("d", i) for i in range(rows)], prompts=np.arange(rows) // 2, groups=groups)


def test_groups_are_reported_apart():
    """Rows of reward-augmented pairs: goals of chosen are ranked right, goals of rejected wrong."""
    held_out = HeldOut(split_of(4, ["goal=chosen", "goal=rejected"] * 2), "d", "held out")
    sums = {
        "row": np.array([3, 0, 1, 2]),
        "policy_chosen": np.array([-9.0, -5.0, -9.0, -5.0]),
        "policy_rejected": np.array([-6.0, -7.0, -6.0, -7.0]),
        "length_chosen": np.ones(4),
        "length_rejected": np.ones(4),
    }
    flat = held_out(sums, step=0)
    accuracy = {r.split: r.value for r in held_out.results if r.metric == "ranking/accuracy"}
    assert accuracy == {"held out": 0.5, "held out, goal=chosen": 1.0, "held out, goal=rejected": 0.0}
    assert {r.split: r.n for r in held_out.results if r.metric == "ranking/accuracy"}["held out, goal=chosen"] == 2
    assert flat["eval/ranking/accuracy"] == 0.5  # what is logged is of all rows
    before = len(held_out.results)
    held_out(sums, step=0)
    assert len(held_out.results) == before


@pytest.mark.parametrize("groups", [[], [""] * 4, ["goal=chosen"] * 4])
def test_one_group_is_no_group(groups: list[str]):
    labels = np.array([True, False, True, False])
    held_out = HeldOut(split_of(4, groups, labels), "d", "held out")
    held_out({"row": np.arange(4), "policy_completion": -np.ones(4), "ref_completion": -np.arange(4.0)}, step=0)
    assert {result.split for result in held_out.results} == {"held out"}
    assert {result.metric for result in held_out.results} == set(METRICS)
