"""β-DPO against arithmetic by hand and the paper; its selection against the probabilities it promises."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from objectives import Coupled, LegBatch, Stateful, with_own_step
from objectives.beta_dpo import BetaDPO
from objectives.dpo import DPO
from tests.objectives import transcriptions_pairs
from tests.objectives.batches import (
    BY_HAND,
    FP64_ROUNDING,
    SIX_PLACES,
    apart,
    assert_transcribed,
    four,
    loss_and_grad,
    make_batch,
    means,
    row_losses,
    rows_of,
    with_columns,
    with_junk,
)

SEEDS = st.integers(0, 1000)


def own_step(objective: BetaDPO, batch: LegBatch) -> LegBatch:
    """The batch as the first step."""
    return with_own_step(objective, replace(batch, state=objective.init_state()))


def named(batch: LegBatch) -> LegBatch:
    """The batch with tokens by which its rows can be told apart."""
    legs = {
        name: replace(batch[name], tokens=torch.arange(batch[name].tokens.numel()).reshape(batch[name].tokens.shape))
        for name in batch
    }
    return replace(batch, legs=legs)


def selected(objective: BetaDPO, batch: LegBatch) -> list[int]:
    """The rows that are learned from."""
    return [row for row, loss in enumerate(row_losses(objective, batch)) if loss != 0]


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def test_beta_dpo_by_hand():
    """Two rows, β = 0.5, a = 0.5, nothing filtered, γ = 0.5: differences 3 and 1, mean 2.

    first step: μ = 0.5 · 0 + 0.5 · 2 = 1, σ = 0.5 · √2 (unbiased: (1² + 1²)/1 = 2)
    β_s = 0.5 · (1 + 0.5 · (2 − 1)) = 0.75
    loss = ½ · [−log σ(2.25) − log σ(0.75)] = ½ · (0.1002065589 + 0.3868710061) = 0.2435387825
    slopes −0.75 · σ(−2.25)/2 = −0.0357560493 and −0.75 · σ(−0.75)/2 = −0.1203079878
    """
    objective = BetaDPO(beta=0.5, modulation=0.5, filtered=0.0, momentum=0.5)
    batch = own_step(objective, apart([3.0, 1.0]))
    loss, grad = loss_and_grad(objective, batch)
    assert loss.item() == pytest.approx(0.2435387825, **BY_HAND)
    assert grad["chosen"].flatten().tolist() == pytest.approx([-0.0357560493, -0.1203079878], rel=2e-9)
    assert means(objective, batch)["beta/step"] == pytest.approx(0.75)
    state = objective.update(batch.state, objective.observe(batch))
    assert state["mean"].item() == pytest.approx(1.0)
    assert state["spread"].item() == pytest.approx(0.5 * math.sqrt(2))


def test_known_numbers():
    """Differences 0.5, −1.25, 2 and 0.1 in the first step: μ and σ, β of rows 0, 2 and 3, and DPO's losses with it."""
    differences = [0.5, -1.25, 2.0, 0.1]
    objective, batch = BetaDPO(), apart(differences)
    state = objective.update(objective.init_state(), objective.observe(batch))
    assert state["mean"].item() == pytest.approx(0.033750, **SIX_PLACES)
    assert state["spread"].item() == pytest.approx(0.133752, **SIX_PLACES)
    beta = objective.beta_of(torch.tensor([0.5, 2.0, 0.1], dtype=torch.float64), state["mean"])
    assert beta == pytest.approx(0.149975, **SIX_PLACES)
    losses = row_losses(DPO(beta=beta), batch)
    assert losses == pytest.approx([0.656356, 0.791268, 0.554377, 0.685677], **SIX_PLACES)
    log_weights = transcriptions_pairs.beta_dpo_log_weights(differences, mu=0.03375, sigma=0.1337519470)
    assert [math.exp(each) for each in log_weights[::3]] == pytest.approx([0.0023, 0.88], abs=6e-3)


@pytest.mark.slow
@given(
    seed=SEEDS, a=st.sampled_from([0.0, 0.6, 5.0]), filtered=st.sampled_from([0.0, 0.2, 0.5]), steps=st.integers(1, 3)
)
def test_beta_dpo_is_what_the_paper_says(seed: int, a: float, filtered: float, steps: int):
    """Loss, gradient, β and running statistics after several steps, for the rows that were drawn."""
    objective = BetaDPO(beta=0.3, modulation=a, filtered=filtered)
    state, history = objective.init_state(), []
    for step in range(steps):
        batch = with_own_step(objective, replace(make_batch(objective, seed=seed + step, rows=7), state=state))
        chosen, rejected, ref_chosen, ref_rejected = four(batch)
        sums = [[math.fsum(row) for row in leg] for leg in (chosen, ref_chosen, rejected, ref_rejected)]
        differences = [w - r_w - (l - r_l) for w, r_w, l, r_l in zip(*sums, strict=True)]  # noqa: E741
        history.append(differences)
        mu, sigma = transcriptions_pairs.beta_dpo_moments(history)[-1]
        rows = selected(objective, batch)
        assert len(rows) == {0.0: 7, 0.2: 5, 0.5: 3}[filtered]
        step_beta = transcriptions_pairs.beta_dpo_beta([differences[i] for i in rows], beta=0.3, a=a, mu=mu)
        assert means(objective, batch)["beta/step"] == pytest.approx(step_beta, rel=1e-11)
        assert means(objective, batch)["beta/selected"] == pytest.approx(len(rows) / 7)
        state = objective.update(state, objective.observe(batch))
        assert state["mean"].item() == pytest.approx(mu, rel=1e-11, abs=1e-13)
        assert state["spread"].item() == pytest.approx(sigma, rel=1e-10)
    expected = transcriptions_pairs.beta_dpo(*four(batch), step_beta=step_beta, selected=rows)
    assert_transcribed(objective, batch, *expected)


def test_beta_is_at_least_a_thousandth():
    """Differences far below μ would make it negative: 0.1 · (1 + 0.6 · (−100 − 10))."""
    assert BetaDPO().beta_of(torch.tensor([-100.0]), scalar(10.0)) == 1e-3


@pytest.mark.parametrize(
    ("rows", "filtered", "number"),
    [
        (1, 0.2, 1),
        (2, 0.2, 1),
        (4, 0.2, 3),
        (5, 0.2, 4),
        (10, 0.2, 8),
        (10, 0.0, 10),
        (3, 0.9, 1),
        (10, 0.8, 2),
        (20, 0.9, 2),
    ],
)
def test_how_many_rows_are_learned_from(rows: int, filtered: float, number: int):
    """(1−ρ)·M, rounded down, at least one; also where 1 − ρ is not what it looks like in binary."""
    objective = BetaDPO(filtered=filtered)
    batch = own_step(objective, named(make_batch(objective, seed=1, rows=rows)))
    assert len(selected(objective, batch)) == number


@pytest.mark.slow
@given(seed=SEEDS, order=st.permutations(range(8)))
def test_the_selection_moves_with_its_rows(seed: int, order: list[int]):
    objective = BetaDPO(filtered=0.5)
    batch = own_step(objective, make_batch(objective, seed=seed, rows=8))
    permuted = own_step(objective, rows_of(batch, torch.tensor(order)))
    assert [order[i] for i in selected(objective, permuted)] == sorted(
        selected(objective, batch), key=lambda row: order.index(row)
    )


@pytest.mark.slow
@given(seed=SEEDS, extra=st.integers(1, 20))
def test_the_selection_does_not_depend_on_padding(seed: int, extra: int):
    objective = BetaDPO(filtered=0.5)
    batch = own_step(objective, make_batch(objective, seed=seed, rows=8))
    assert selected(objective, own_step(objective, with_columns(batch, extra))) == selected(objective, batch)


@pytest.mark.slow
@given(seed=SEEDS, cuts=st.lists(st.integers(0, 8), min_size=1, max_size=3))
def test_the_selection_is_one_for_the_whole_step(seed: int, cuts: list[int]):
    """Numbers of microbatches, gathered as they come: the same rows, the same β, loss and gradient."""
    objective = BetaDPO(filtered=0.5)
    batch = own_step(objective, make_batch(objective, seed=seed, rows=8))
    edges = [0, *sorted(cuts), 8]
    parts = [rows_of(batch, slice(start, end)) for start, end in itertools.pairwise(edges)]
    passes = [objective.step_pass(part) for part in parts]
    step = {key: torch.cat([each[key] for each in passes]) for key in passes[0]}
    gathered = [
        replace(part, step=step, place=torch.arange(start, end))
        for part, (start, end) in zip(parts, itertools.pairwise(edges), strict=True)
    ]
    assert [start + i for start, part in zip(edges, gathered, strict=False) for i in selected(objective, part)] == (
        selected(objective, batch)
    )
    whole_loss, whole_grad = loss_and_grad(objective, batch)
    shares = [loss_and_grad(objective, part, batch.counts()) for part in gathered]
    assert_close(sum(loss for loss, _ in shares), whole_loss, **FP64_ROUNDING)
    for name, slopes in whole_grad.items():
        assert_close(torch.cat([grad[name] for _, grad in shares]), slopes, **FP64_ROUNDING)


def test_another_seed_and_another_step_select_others():
    """Of rows that are equally good, half: both change the draw, and the same seed and step repeat it."""
    batch = named(apart([0.0] * 16))
    found = {}
    for seed, steps in ((0, 0), (0, 1), (1, 0), (2**31 - 1, 10**6)):
        objective = BetaDPO(filtered=0.5, seed=seed)
        state = {**objective.init_state(), "steps": scalar(steps)}
        at = with_own_step(objective, replace(batch, state=state))
        found[seed, steps] = tuple(selected(objective, at))
        assert selected(objective, at) == list(found[seed, steps])
        assert len(found[seed, steps]) == 8
    assert len(set(found.values())) == 4


def draws(log_weights: Sequence[float], number: int, repeats: int) -> Counter[tuple[int, ...]]:
    """Which rows are selected, over many seeds, by log-weights −½·d²: μ = 0, σ = 1."""
    differences = torch.tensor([math.sqrt(-2 * each) for each in log_weights], dtype=torch.float64)
    statistics: Mapping[str, Tensor] = {"mean": scalar(0.0), "spread": scalar(1.0), "steps": scalar(1.0)}
    identity = torch.arange(len(log_weights)) * 1_000_003
    filtered = 1 - (number + 0.5) / len(log_weights)
    chosen = (
        BetaDPO(filtered=filtered, seed=seed).select(differences, statistics, identity) for seed in range(repeats)
    )
    return Counter(tuple(each.nonzero().flatten().tolist()) for each in chosen)


def without_replacement(weights: Sequence[float], number: int) -> dict[tuple[int, ...], float]:
    """The probability of every selection, drawn one after the other, each time ∝ weight among what is left."""
    found: dict[tuple[int, ...], float] = {}
    for order in itertools.permutations(range(len(weights)), number):
        probability, left = 1.0, sum(weights)
        for row in order:
            probability *= weights[row] / left
            left -= weights[row]
        key = tuple(sorted(order))
        found[key] = found.get(key, 0.0) + probability
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 3])
def test_rows_are_drawn_in_proportion_to_their_weights(number: int):
    """Weights 1, 0.6, 0.3 and 0.1; 2000 draws, each share within four standard errors of its probability."""
    weights, repeats = (1.0, 0.6, 0.3, 0.1), 2000
    counts = draws([math.log(weight) for weight in weights], number, repeats)
    assert sum(counts.values()) == repeats
    for rows, probability in without_replacement(weights, number).items():
        error = math.sqrt(probability * (1 - probability) / repeats)
        assert counts[rows] / repeats == pytest.approx(probability, abs=4 * error), rows


def test_outliers_are_left_out_even_where_all_weights_underflow():
    """exp(−½·(100/0.1)²) is 0 in any float, for every row; their order is still known, and there is no error."""
    objective = BetaDPO(filtered=0.5)
    differences = torch.tensor([100.0, 101.0, 300.0, -500.0], dtype=torch.float64)
    statistics = {"mean": scalar(0.0), "spread": scalar(0.1), "steps": scalar(1.0)}
    kept = objective.select(differences, statistics, torch.arange(4))
    assert kept.tolist() == [True, True, False, False]


@pytest.mark.slow
def test_rows_that_say_the_same_are_drawn_for_themselves():
    """Answers repeat in a step ("Yes" against "No", to different prompts): their noise must not be one and the same.

    Eight rows with the same tokens, whose weights are equal to sixteen places: were the noise the same, the last place
    would decide, and the selection not change with the seed.
    """
    batch = apart([1e-9 * row for row in range(8)])
    found = set()
    for seed in range(40):
        objective = BetaDPO(filtered=0.5, seed=seed)
        state = {"mean": scalar(0.0), "spread": scalar(1.0), "steps": scalar(1.0)}
        found.add(tuple(selected(objective, with_own_step(objective, replace(batch, state=state)))))
    assert len(found) > 1


def test_without_filter_and_modulation_it_is_dpo():
    objective = BetaDPO(modulation=0.0, filtered=0.0)
    batch = own_step(objective, make_batch(objective, seed=2))
    loss, grad = loss_and_grad(objective, batch)
    dpo_loss, dpo_grad = loss_and_grad(DPO(), batch)
    assert_close(loss, dpo_loss, **FP64_ROUNDING)
    for name, slopes in grad.items():
        assert_close(slopes, dpo_grad[name], **FP64_ROUNDING)
    assert set(objective.idle()) == {"seed", "momentum"}
    assert BetaDPO().idle() == {}


def test_statistics_are_of_the_step_not_of_its_microbatches():
    """Sums of two microbatches give the same μ and σ as the step at once."""
    objective = BetaDPO()
    batch = make_batch(objective, seed=4, rows=7)
    parts = [objective.observe(rows_of(batch, index)) for index in (slice(0, 3), slice(3, 7))]
    added = objective.update(objective.init_state(), {key: parts[0][key] + parts[1][key] for key in parts[0]})
    whole = objective.update(objective.init_state(), objective.observe(batch))
    for key, value in whole.items():
        assert_close(added[key], value, **FP64_ROUNDING)


def test_it_couples_rows_and_remembers():
    assert isinstance(BetaDPO(), Coupled)
    assert isinstance(BetaDPO(), Stateful)


def test_identities_are_of_the_tokens_alone():
    """Log-probs, other rows and what padding holds have no part in them."""
    objective = BetaDPO()
    batch = make_batch(objective, seed=5, rows=4)
    identity = objective.step_pass(batch)["identity"]
    assert len(set(identity.tolist())) == 4
    assert torch.equal(objective.step_pass(rows_of(batch, slice(1, 3)))["identity"], identity[1:3])
    moved = replace(batch, legs={name: replace(batch[name], logps=batch[name].logps * 2) for name in batch})
    assert torch.equal(objective.step_pass(moved)["identity"], identity)
    assert torch.equal(objective.step_pass(with_junk(batch, math.nan))["identity"], identity)


def test_steps_are_counted_one_by_one():
    """What is drawn depends on the step's number, which a checkpoint keeps."""
    objective = BetaDPO()
    batch = make_batch(objective, seed=1, rows=4)
    state = objective.init_state()
    for number in (1, 2, 3):
        state = objective.update(state, objective.observe(batch))
        assert state["steps"].item() == number


def test_statistics_of_one_row():
    """Its difference is the mean, and there is no spread: 0, where 0/0 would be NaN."""
    objective = BetaDPO(momentum=0.5)
    state = objective.update(objective.init_state(), objective.observe(apart([3.0])))
    assert state["mean"].item() == pytest.approx(1.5)
    assert state["spread"].item() == 0.0


def test_a_small_spread_is_not_rounded_and_none_is_not_below_zero():
    """Differences 0.1 and 0.3 have 0.1·√2; of many equal ones squares less total times mean may round below zero."""
    objective = BetaDPO(momentum=0.0)
    state = objective.update(objective.init_state(), objective.observe(apart([0.1, 0.3])))
    assert state["spread"].item() == pytest.approx(0.1 * math.sqrt(2))
    rounded = {name: torch.tensor(value, dtype=torch.float64) for name, value in BELOW_ZERO.items()}
    assert objective.update(objective.init_state(), rounded)["spread"].item() == 0.0


BELOW_ZERO = {"total": 3.0, "squares": 3.0 - 1e-15, "count": 3.0}
