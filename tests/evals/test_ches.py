"""CHES: the vector, brute force in float64 on either side of padding, subsets, and what a score foretells."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evals.ches import (
    METRICS,
    StateSums,
    ches,
    displacement,
    edit_distance,
    keep_mask,
    ln_ches,
    measure,
    percentile_subset,
    predicting,
    similarities,
)

CHOSEN = [[9, 9, 9], [1, 0, 2], [0, 1, 1], [2, -1, 1], [7, 7, 7]]
REJECTED = [[9, 9, 9], [1, 0, 2], [1, 1, 0], [5, 5, 5]]
PROMPT = 2


def padded(states: list[list[int]], *, left: int = 0, right: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """States with NaN as padding, and which tokens are labels."""
    nothing = [[float("nan")] * 3]
    hidden = torch.tensor(nothing * left + [[float(x) for x in row] for row in states] + nothing * right)
    labels = [False] * (left + PROMPT) + [True] * (len(states) - PROMPT) + [False] * right
    return hidden[None], torch.tensor(labels)[None]


def summed(hidden: torch.Tensor, labels: torch.Tensor, chunk: int = 100) -> dict[str, np.ndarray]:
    sums, mask = StateSums(), predicting(labels)
    for start in range(0, hidden.shape[1], chunk):
        sums.add(hidden[:, start : start + chunk], mask[:, start : start + chunk])
    return sums.result()


@pytest.mark.parametrize(("left", "right"), [(0, 0), (3, 0), (0, 1), (2, 4)])
@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_the_vector(left: int, right: int, chunk: int):
    """The paper's code gives −221 and −10.75 with one column of padding on the right."""
    chosen, rejected = (summed(*padded(h, left=left, right=right), chunk) for h in (CHOSEN, REJECTED))
    assert chosen["sum"].tolist() == [[3, 0, 4]]
    assert rejected["sum"].tolist() == [[2, 1, 2]]
    assert (chosen["n"].tolist(), rejected["n"].tolist()) == ([3], [2])
    found = similarities(chosen, rejected, [([5, 6, 7, 8], [5, 7, 8])])
    assert found["ches"].tolist() == [-11]
    assert found["ln_ches"] == pytest.approx([-0.444444], abs=6e-7)
    assert found["last_hidden"].tolist() == [1]
    assert found["edit_similarity"].tolist() == [-0.25]


@given(st.integers(0, 10_000), st.integers(1, 9), st.sampled_from([torch.float32, torch.bfloat16]))
def test_streamed_sums_are_those_of_a_loop(seed: int, chunk: int, dtype: torch.dtype):
    """Rows of several lengths, padded on the left or on the right, against plain float64."""
    rng = torch.Generator().manual_seed(seed)
    rows, width = 4, 5
    lengths = torch.randint(3, 14, (rows,), generator=rng).tolist()
    responses = [int(torch.randint(1, n, (1,), generator=rng)) for n in lengths]
    longest = max(lengths)
    hidden = torch.full((rows, longest, width), float("nan"))
    labels = torch.zeros(rows, longest, dtype=torch.bool)
    wanted, last = [], []
    for row, (n, of_response) in enumerate(zip(lengths, responses, strict=True)):
        states = torch.randn(n, width, generator=rng).to(dtype).float()
        start = 0 if row % 2 else longest - n
        hidden[row, start : start + n] = states
        labels[row, start + n - of_response : start + n] = True
        first = n - of_response
        wanted.append(sum(states[t].double().numpy() for t in range(first - 1, n - 1)))
        last.append(states[n - 2].double().numpy())
    found = summed(hidden.to(dtype), labels, chunk)
    assert found["n"].tolist() == responses
    assert found["sum"] == pytest.approx(np.array(wanted), abs=1e-5)
    assert found["last"] == pytest.approx(np.array(last), abs=1e-6)
    exact = StateSums(torch.float64)
    exact.add(hidden.to(dtype), predicting(labels))
    assert exact.result()["sum"] == pytest.approx(np.array(wanted), abs=1e-12)


def test_bfloat16_states_are_added_in_float32():
    """500 equal states: a bfloat16 running sum would stop growing at 256."""
    hidden = torch.ones(1, 501, 2, dtype=torch.bfloat16)
    labels = torch.ones(1, 501, dtype=torch.bool)
    labels[0, 0] = False
    assert summed(hidden, labels, chunk=7)["sum"].tolist() == [[500, 500]]
    with pytest.raises(ValueError, match=r"float32 or float64, not torch\.bfloat16"):
        StateSums(torch.bfloat16)
    with pytest.raises(ValueError, match="no hidden states"):
        StateSums().result()


def test_a_model_s_hidden_states_are_those_its_head_multiplies():
    """``hidden_states[-1]`` of a Llama gives its logits, at the positions that ``predicting`` marks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    assert torch.allclose(model.lm_head(out.hidden_states[-1]), out.logits, atol=1e-6)
    labels = torch.zeros(2, 9, dtype=torch.bool)
    labels[:, 5:] = True
    assert summed(out.hidden_states[-1], labels)["sum"] == pytest.approx(
        out.hidden_states[-1][:, 4:8].sum(dim=1).double().numpy(), abs=1e-5
    )


def test_both_forms_agree_and_the_difference_form_keeps_digits():
    rng = np.random.default_rng(0)
    plus, minus = rng.normal(size=(2, 6, 8))
    assert ches(plus, minus) == pytest.approx((plus * minus).sum(1) - (plus**2).sum(1))
    n = np.array([1, 2, 3, 4, 5, 6])
    assert ln_ches(plus, n, minus, 2 * n) == pytest.approx(
        (plus * minus).sum(1) / (2 * n * n) - (plus**2).sum(1) / n**2
    )
    assert ches(plus, minus) != pytest.approx(ches(minus, plus)), "chosen and rejected play different parts"


def test_empty_responses_have_no_score():
    sums = {"sum": np.ones((2, 3)), "n": np.array([0, 2]), "last": np.ones((2, 3))}
    found = similarities(sums, sums, [([], [1]), ([1], [1])])
    assert all(np.isnan(values[0]) and np.isfinite(values[1]) for values in found.values())
    assert keep_mask(found["ln_ches"], 1.0).tolist() == [False, True]


# ---- edit distance ----


@given(st.lists(st.integers(0, 3), max_size=9), st.lists(st.integers(0, 3), max_size=9))
def test_edit_distance_is_the_recursive_one(a: list[int], b: list[int]):
    def distance(i: int, j: int, known: dict[tuple[int, int], int]) -> int:
        if min(i, j) == 0:
            return max(i, j)
        if (i, j) not in known:
            known[i, j] = min(
                distance(i - 1, j, known) + 1,
                distance(i, j - 1, known) + 1,
                distance(i - 1, j - 1, known) + (a[i - 1] != b[j - 1]),
            )
        return known[i, j]

    if not a and not b:
        with pytest.raises(ValueError, match="two empty responses"):
            edit_distance(a, b)
    else:
        assert edit_distance(a, b) == pytest.approx(distance(len(a), len(b), {}) / max(len(a), len(b)))
        assert edit_distance(a, b) == edit_distance(b, a)


def test_edit_distances_of_the_vector():
    assert edit_distance([5, 6, 7, 8], [5, 7, 8]) == 0.25
    assert edit_distance([1, 2, 3], [3, 2, 1]) == pytest.approx(0.666667, abs=5e-7)


# ---- subsets ----


@pytest.mark.parametrize(
    ("n", "k", "q", "start", "end"),
    [(385, 19, 0, 0, 19), (385, 19, 1, 366, 385), (385, 19, 0.5, 183, 202), (100, 512, 0.5, 0, 100)],
)
def test_percentile_subsets_of_the_vector(n: int, k: int, q: float, start: int, end: int):
    scores = np.random.default_rng(0).permutation(n).astype(float)
    chosen = percentile_subset(scores, k, q)
    assert scores[chosen].tolist() == list(range(start, end))


def test_the_lowest_are_kept_and_the_first_of_equals():
    scores = np.array([3.0, 1, 1, np.nan, 1, 0])
    assert keep_mask(scores, 0.4).tolist() == [False, True, False, False, False, True]
    assert keep_mask(scores, 0.01).sum() == 1
    assert keep_mask(np.arange(385.0)).sum() == 19
    for call, says in (
        (lambda: keep_mask(scores, 0.0), "share must be"),
        (lambda: keep_mask(np.array([np.nan])), "none of 1 pairs has a score"),
        (lambda: percentile_subset(scores, 0, 0.5), "size must be"),
        (lambda: percentile_subset(scores, 1, 1.5), "quantile must be"),
    ):
        with pytest.raises(ValueError, match=says):
            call()


# ---- displacement ----


def test_displacement_of_the_vector():
    found = displacement(
        np.array([-18, -28, -44, -12, -29.0]),
        np.array([-27, -29, -41, -12, -31.0]),
        np.array([-20, -35, -50, -12, -30.0]),
        np.array([-25, -30, -40, -12, -30.004]),
        loss_fell=True,
    )
    assert found.estimates["displacement/chosen"].value == pytest.approx(3.2)
    assert found.estimates["displacement/rejected"].value == pytest.approx(-0.5992)
    assert found.extra == {"displaced": False}


def test_probabilities_and_what_displaced_means():
    logs = [np.log([0.2, 0.1]), np.log([0.5, 0.1]), np.log([0.4, 0.1]), np.log([0.3, 0.2])]
    found = displacement(*logs, loss_fell=True)
    assert found.estimates["displacement/chosen_probability"].value == pytest.approx(-0.1)
    assert found.estimates["displacement/rejected_probability"].value == pytest.approx(0.05)
    assert found.extra == {"displaced": True}
    assert displacement(*logs, loss_fell=False).extra == {"displaced": False}
    assert displacement(*logs).extra == {}
    with pytest.raises(ValueError, match="four finite log-probs"):
        displacement(*[np.array([np.nan])] * 4)
    with pytest.raises(ValueError, match="the same pairs"):
        displacement(np.ones(2), *[np.ones(1)] * 3)


def test_a_score_that_foretells_displacement():
    rng = np.random.default_rng(1)
    fall = rng.normal(size=150)
    scores = {"ches": fall**3, "edit_similarity": rng.normal(size=150)}
    scores["ches"][3] = np.nan
    found = measure(scores, -fall)
    assert set(found.estimates) <= set(METRICS)
    assert found.n_dropped == 1
    assert found.estimates["ches/ches_spearman"].value == pytest.approx(1)
    assert 0.5 < found.estimates["ches/ches_pearson"].value < 0.99
    unrelated = found.estimates["ches/edit_similarity_spearman"]
    assert unrelated.low < 0.1 < unrelated.high
    assert set(measure(scores).estimates) == {"ches/ches", "ches/edit_similarity"}
    for changes, says in ((np.full(150, np.nan), "none of 150 pairs"), (np.ones(150), "every value of the second")):
        with pytest.raises(ValueError, match=says):
            measure(scores, changes)
