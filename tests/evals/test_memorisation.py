"""Extraction and membership: vectors, brute force, and controls."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_curve

from evals.membership import attack_scores, least_probable, membership, true_positives_at, zlib_bytes
from evals.memorisation import extraction, lcs_length, longest_prefix, over_control, rouge_l, split_document
from evals.metrics import METRICS

WITHHELD, GENERATED = [5, 9, 2, 7, 7, 1, 3, 8], [5, 9, 4, 7, 1, 3, 8, 8]
TEXTS = "The cat sat on the mat, quietly.", "the cat quietly sat on a mat"
MEMBERS = np.array([1.2, 0.8, 1.5, 0.9, 2.0])
OTHERS = np.array([1.6, 1.4, 2.2, 0.95])
BYTES = np.array([120, 90, 200, 100, 180]), np.array([150, 160, 210, 95])


@pytest.mark.slow
def test_extraction_of_the_vector():
    found = extraction([WITHHELD, WITHHELD], [GENERATED, WITHHELD], [TEXTS, (TEXTS[0], TEXTS[0])], ["a", "b"])
    by_document = {name.partition("/")[2]: values for name, values in found.by_prompt.items()}
    assert by_document["exact"] == {"a": 0, "b": 1}
    assert by_document["longest_prefix"] == {"a": 2, "b": 8}
    assert by_document["token_accuracy"] == {"a": 0.5, "b": 1}
    assert by_document["lcs_f1"] == {"a": 0.75, "b": 1}
    assert by_document["rouge_l"] == {"a": pytest.approx(0.714286, abs=5.1e-7), "b": 1}
    assert found.estimates["extraction/exact"].value == 0.5
    assert set(found.estimates) <= set(METRICS)
    assert "extraction/rouge_l" not in extraction([WITHHELD], [GENERATED]).estimates


def test_an_early_end_is_no_exact_match():
    found = extraction([[1, 2, 3]], [[1, 2]])
    values = {name: each.value for name, each in found.estimates.items()}
    assert values == {
        "extraction/exact": 0,
        "extraction/longest_prefix": 2,
        "extraction/token_accuracy": pytest.approx(2 / 3),
        "extraction/lcs_f1": 0.8,
    }
    assert extraction([[1, 2]], [[]]).estimates["extraction/lcs_f1"].value == 0


@given(st.lists(st.integers(0, 2), max_size=7), st.lists(st.integers(0, 2), max_size=7))
def test_lcs_is_the_longest_of_all_subsequences(a: list[int], b: list[int]):
    def subsequences(ids: list[int]) -> set[tuple[int, ...]]:
        return {tuple(part) for n in range(len(ids) + 1) for part in combinations(ids, n)}

    assert lcs_length(a, b) == max(len(part) for part in subsequences(a) & subsequences(b))
    assert longest_prefix(a, b) == max(n for n in range(min(len(a), len(b)) + 1) if a[:n] == b[:n])


def test_rouge_ignores_case_and_punctuation():
    assert rouge_l("A cat!", "a CAT") == 1
    assert rouge_l("a cat", "") == 0


def test_documents_are_split_at_their_end():
    assert split_document(range(60), withheld=50) == (list(range(10)), list(range(10, 60)))
    assert split_document(range(50), withheld=50) is None
    prompt, withheld = split_document(range(3000)) or ([], [])
    assert (len(prompt), withheld[-1]) == (1998, 2047)
    with pytest.raises(ValueError, match="withheld must be"):
        split_document(range(5), withheld=0)


@pytest.mark.parametrize(
    ("withheld", "generated", "texts", "says"),
    [
        ([], [], None, "got 0 and 0"),
        ([[1]], [], None, "got 1 and 0"),
        ([[1]], [[1]], [], "with 0 texts"),
        ([[1], []], [[1], [1]], None, "nothing is withheld of document 1"),
    ],
)
def test_what_can_t_be_extracted(withheld, generated, texts, says):
    with pytest.raises(ValueError, match=says):
        extraction(withheld, generated, texts)


def test_memorised_is_what_the_control_does_not_show():
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 50, 20).tolist() for _ in range(80)]
    recited = [d if i % 2 else rng.integers(0, 50, 20).tolist() for i, d in enumerate(documents[:40])]
    trained = extraction(documents[:40], recited)
    control = extraction(documents[40:], [rng.integers(0, 50, 20).tolist() for _ in range(40)])
    found = over_control(trained, control).estimates
    exact, accuracy = found["extraction/exact_over_control"], found["extraction/token_accuracy_over_control"]
    assert exact.value == 0.5
    assert 0.3 < exact.low < exact.high < 0.7
    assert accuracy.value == pytest.approx(0.5, abs=0.05)
    assert list(found) == [name for name in METRICS if name in found]
    assert math.isnan(
        over_control(extraction([[1]] * 3, [[1]] * 3), extraction([[1]] * 2, [[2]] * 2))
        .estimates["extraction/exact_over_control"]
        .low
    )
    with pytest.raises(ValueError, match="1 and 40 documents are too few"):
        over_control(extraction([[1]], [[1]]), control)


# ---- membership ----


def test_membership_of_the_vector():
    tokens = np.full(5, 100), np.full(4, 100)
    found = membership(attack_scores(MEMBERS, tokens[0], BYTES[0]), attack_scores(OTHERS, tokens[1], BYTES[1]))
    values = {name.partition("/")[2]: each.value for name, each in found.estimates.items()}
    assert values["auc_loss"] == pytest.approx(0.7)
    assert values["balanced_accuracy_loss"] == pytest.approx(0.7)
    assert values["tpr_at_1_loss"] == pytest.approx(0.4)
    assert values["tpr_at_01_loss"] == pytest.approx(0.4)
    assert values["auc_mean_zlib"] == pytest.approx(0.625)
    assert true_positives_at(-MEMBERS, -OTHERS, 0.25) == 0.6
    assert true_positives_at(-MEMBERS, -OTHERS, 0.01) == 0.4
    assert found.extra == {"smallest_fpr": 0.25}
    assert set(found.estimates) <= set(METRICS)


def test_scores_by_hand():
    found = attack_scores(np.array([2.0]), np.array([10]), np.array([5]), np.array([2.5]))
    assert {name: float(values[0]) for name, values in found.items()} == {
        "loss": -2.0,
        "zlib": -4.0,
        "mean_zlib": -0.4,
        "reference": 0.5,
        "zlib_alone": -5.0,
        "reference_alone": -2.5,
    }


def test_the_least_probable_tokens_by_hand():
    """Of five tokens one, of six two (a fifth rounded up); what is masked counts for nothing."""
    logps = torch.tensor([[-1.0, -4.0, -2.0, -3.0, -0.5, -99.0], [-1.0, -4.0, -2.0, -3.0, -0.5, -6.0]])
    mask = torch.tensor([[True] * 5 + [False], [True] * 6])
    assert least_probable(logps, mask).tolist() == [-4.0, -5.0]
    assert least_probable(logps, mask, share=1.0).tolist() == pytest.approx([-2.1, -2.75])
    scores = attack_scores(np.ones(1), np.ones(1), np.ones(1), min_k=np.array([-4.0]))
    assert scores["min_k"].tolist() == [-4.0]


def test_zlib_of_the_vector():
    assert zlib_bytes("The quick brown fox jumps over the lazy dog. " * 4) == 55
    assert zlib_bytes("hello world") == 19


@pytest.mark.slow
@given(st.integers(0, 10_000), st.sampled_from([0.001, 0.01, 0.25, 1.0]))
def test_rates_are_scikit_learn_s(seed: int, rate: float):
    """With ties, in any number: the last point of the curve that keeps the rate."""
    rng = np.random.default_rng(seed)
    one, two = rng.normal(0.5, 1, 30).round(1), rng.normal(0, 1, 20).round(1)
    false, true, _ = roc_curve([1] * 30 + [0] * 20, np.concatenate([one, two]), drop_intermediate=False)
    assert true_positives_at(one, two, rate) == pytest.approx(true[false <= rate].max())
    found = membership({"loss": one}, {"loss": two}).estimates
    assert found["membership/tpr_at_1_loss"].value == pytest.approx(true[false <= 0.01].max())
    assert found["membership/balanced_accuracy_loss"].value == pytest.approx((1 - (false + 1 - true) / 2).max())


@pytest.mark.slow
def test_a_control_shows_that_the_sets_differ_by_themselves():
    """Members that are easier text for any model: the trained model's loss tells them, and so does the reference's."""
    rng = np.random.default_rng(1)
    easy, hard = rng.normal(2.0, 0.5, 200), rng.normal(3.0, 0.5, 200)
    tokens = np.full(200, 100)
    found = membership(
        attack_scores(easy - 0.02 * rng.normal(size=200), tokens, tokens, easy),
        attack_scores(hard - 0.02 * rng.normal(size=200), tokens, tokens, hard),
    ).estimates
    assert found["membership/auc_loss"].value > 0.85
    assert found["membership/auc_reference_alone"].value > 0.85
    reference = found["membership/auc_reference"]
    assert reference.low < 0.5 < reference.high, "what the model itself learned: nothing"


@pytest.mark.parametrize(
    ("one", "two", "says"),
    [
        ({}, {}, "give both the same"),
        ({"loss": np.ones(2)}, {"zlib": np.ones(2)}, "give both the same"),
        ({"loss": np.ones(2)}, {"loss": np.ones(0)}, "2 members and 0 others"),
        ({"loss": np.array([1, np.nan])}, {"loss": np.ones(1)}, "a loss score is not finite"),
    ],
)
def test_what_shows_no_membership(one, two, says):
    with pytest.raises(ValueError, match=says):
        membership(one, two)
