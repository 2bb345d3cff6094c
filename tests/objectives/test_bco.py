"""BCO against arithmetic by hand and the paper; other implementations' numbers are in ``test_vectors``."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from objectives import LegBatch, Needs
from objectives.bco import BCO
from tests.objectives import transcriptions
from tests.objectives.batches import (
    BY_HAND,
    SIX_PLACES,
    assert_transcribed,
    loss_and_grad,
    make_batch,
    make_rows,
    means,
    ragged,
    rows_of,
    tv1_labelled,
)

KEYS_OF_THE_RATIO = {"min_density_ratio", "max_density_ratio", "prompt_sample_size"}


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def seen(total: float, count: float) -> dict[str, Tensor]:
    """The state after ``count`` rewards of that total."""
    return {"reward_total": number(total), "reward_count": number(count)}


def two_rows(density_ratio: list[float] | None = None) -> LegBatch:
    """Log-ratios 1 (thumbs up) and −1 (thumbs down); the mean of two rewards before is 0.25."""
    completion = make_rows([[-1.0, -2.0], [-3.0]], [[-1.5, -2.5], [-2.0]])
    return LegBatch(
        legs={"completion": completion},
        labels=torch.tensor([True, False]),
        density_ratio=None if density_ratio is None else torch.tensor(density_ratio, dtype=torch.float64),
        state=seen(0.5, 2),
    )


def test_bco_by_hand():
    """β = 0.5, δ = 0.5/2 = 0.25: rewards 0.5 and −0.5.

    desirable:   r − δ = 0.25   →   log(1 + e^−0.25) = 0.5759394199
    undesirable: δ − r = 0.75   →   log(1 + e^−0.75) = 0.3868710061
    loss = 0.4814052130;   slopes −0.5 · σ(−0.25)/2 = −0.1094558748 and 0.5 · σ(−0.75)/2 = 0.0802053252
    """
    loss, grad = loss_and_grad(BCO(beta=0.5), two_rows())
    assert loss.item() == pytest.approx(0.4814052130, **BY_HAND)
    assert grad["completion"][0].tolist() == pytest.approx([-0.1094558748, -0.1094558748], **BY_HAND)
    assert grad["completion"][1].tolist() == pytest.approx([0.0802053252, 0.0], **BY_HAND)


def test_density_ratio_by_hand():
    """The undesirable row's ratio 3 is its weight, the desirable row's 7 has no effect; nothing is divided by weights.

    (0.5759394199 + 3 · 0.3868710061)/2 = 0.8682762191;   its slope 3 · 0.0802053252 = 0.2406159756
    """
    objective = BCO(beta=0.5, prompt_encoder="policy")
    loss, grad = loss_and_grad(objective, two_rows(density_ratio=[7.0, 3.0]))
    assert loss.item() == pytest.approx(0.8682762191, **BY_HAND)
    assert grad["completion"][0].tolist() == pytest.approx([-0.1094558748, -0.1094558748], **BY_HAND)
    assert grad["completion"][1, 0].item() == pytest.approx(0.2406159756, **BY_HAND)


def test_the_density_ratio_is_clamped_by_hand():
    """Within [0.8, 1.5]: 0.1 counts as 0.8, 3 as 1.5, and weights/undesirable says so.

    (0.5759394199 + 0.8 · 0.3868710061)/2 = 0.4427181124;   (0.5759394199 + 1.5 · 0.3868710061)/2 = 0.5781229645
    """
    objective = BCO(beta=0.5, prompt_encoder="policy", min_density_ratio=0.8, max_density_ratio=1.5)
    for ratio, weight, expected in ((0.1, 0.8, 0.4427181124), (3.0, 1.5, 0.5781229645), (1.0, 1.0, 0.4814052130)):
        batch = two_rows(density_ratio=[1.0, ratio])
        assert loss_and_grad(objective, batch)[0].item() == pytest.approx(expected, **BY_HAND)
        assert means(objective, batch)["weights/undesirable"] == pytest.approx(weight)


def test_known_numbers():
    """Observe, update, formula. Rewards 0, −0.025 (thumbs up), −0.05 and 0.1 (thumbs down): δ = 0.025/4 = 0.00625."""
    objective, batch = BCO(beta=0.1), tv1_labelled()
    state = objective.update(objective.init_state(), objective.observe(batch))
    assert (state["reward_total"] / state["reward_count"]).item() == pytest.approx(0.006250, rel=1e-12)
    batch = replace(batch, state=state)
    assert loss_and_grad(objective, batch)[0].item() == pytest.approx(0.702927, **SIX_PLACES)
    rows = [loss_and_grad(objective, rows_of(batch, slice(i, i + 1)))[0].item() for i in range(4)]
    assert rows == pytest.approx([0.696277, 0.708894, 0.665418, 0.741120], **SIX_PLACES)


def test_known_numbers_with_density_ratios():
    """A classifier's 0.2 and 0.9 for the two prompts with thumbs down: ratios 0.25, clamped to 0.5, and 9."""
    ratios = torch.tensor([5.0, 0.01, 0.2 / 0.8, 0.9 / 0.1], dtype=torch.float64)
    objective = BCO(beta=0.1, prompt_encoder="policy")
    batch = tv1_labelled(density_ratio=ratios, state=seen(0.025, 4))
    assert loss_and_grad(objective, batch)[0].item() == pytest.approx(2.101991, **SIX_PLACES)


def test_the_shift_is_a_mean_over_all_rewards_so_far():
    """Two more rewards of 0.4: (4 · 0.00625 + 0.8)/6 = 0.1375, not a mean of means and without decay."""
    objective, first = BCO(beta=0.1), tv1_labelled()
    state = objective.update(objective.init_state(), objective.observe(first))
    second = LegBatch(
        legs={"completion": make_rows([[-1.0], [-2.0]], [[-5.0], [-6.0]])}, labels=torch.tensor([True, True])
    )
    state = objective.update(state, objective.observe(second))
    assert state["reward_count"].item() == 6
    assert (state["reward_total"] / state["reward_count"]).item() == pytest.approx(0.137500, rel=1e-12)


def test_a_step_uses_the_shift_after_the_step_before():
    """The first has none yet: its rows cost log(1 + e^−r) and log(1 + e^r), whatever their mean."""
    objective = BCO(beta=0.5)
    batch = replace(two_rows(), state=objective.init_state())
    assert loss_and_grad(objective, batch)[0].item() == pytest.approx(math.log1p(math.exp(-0.5)), rel=1e-12)
    objective.observe(batch)
    assert all(value == 0 for value in batch.state.values())


@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_shifts_are_what_the_paper_says(sizes: list[int], seed: int):
    """After each step, also one without rows (which no list of rewards can have in front)."""
    objective = BCO(beta=0.3)
    state, history = objective.init_state(), []
    for number_of_rows, step_seed in zip([2, *sizes], range(seed, seed + 6), strict=False):
        batch = rows_of(make_batch(objective, seed=step_seed, rows=4), slice(0, number_of_rows))
        state = objective.update(state, objective.observe(batch))
        history.append((0.3 * batch["completion"].logratio()).tolist())
        shift = (state["reward_total"] / state["reward_count"]).item()
        assert shift == pytest.approx(transcriptions.bco_shift(history)[-1], rel=1e-11, abs=1e-13)


@given(
    seed=st.integers(0, 1000),
    beta=st.sampled_from([0.01, 0.1, 2.0]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    shift=st.sampled_from([-3.0, 0.0, 0.4]),
    encoder=st.sampled_from([None, "policy"]),
    limits=st.sampled_from([(0.5, 10.0), (0.0, 1.0), (2.0, 2.0)]),
)
def test_bco_is_what_the_paper_says(
    seed: int, beta: float, scale: float, shift: float, encoder: str | None, limits: tuple[float, float]
):
    low, high = limits
    objective = BCO(beta=beta, prompt_encoder=encoder, min_density_ratio=low, max_density_ratio=high)
    batch = replace(make_batch(objective, seed=seed, rows=5, scale=scale), state=seen(7 * shift, 7))
    leg = batch["completion"]
    expected = transcriptions.bco(
        ragged(leg.logps, leg),
        ragged(leg.ref_logps, leg),
        batch.labels.tolist(),
        beta=beta,
        delta=shift,
        density_ratio=None if encoder is None else batch.density_ratio.tolist(),
        minimum=low,
        maximum=high,
    )
    assert_transcribed(objective, batch, *expected)


def test_metrics_by_hand():
    """Both rows above: rewards 0.5 and −0.5 lie on their labels' sides of 0.25. A class without rows has count 0."""
    assert means(BCO(beta=0.5), two_rows()) == {
        "rewards/chosen": pytest.approx(0.5),
        "rewards/rejected": pytest.approx(-0.5),
        "rewards/accuracies": 1.0,
        "rewards/threshold": pytest.approx(0.25),
        "labels/desirable": 0.5,
        "displacement/chosen": pytest.approx(1.0),
        "displacement/rejected": pytest.approx(-1.0),
        "logps/chosen": pytest.approx(-3.0),
        "logps/rejected": pytest.approx(-3.0),
    }
    desirable = BCO(beta=0.5, prompt_encoder="policy")(rows_of(two_rows(density_ratio=[1.0, 1.0]), slice(0, 1))).metrics
    for name in ("rewards/rejected", "displacement/rejected", "weights/undesirable"):
        assert (desirable[name].total.item(), desirable[name].count) == (0.0, 0.0)
    assert desirable["rewards/chosen"].count == 1


def test_sides_are_those_of_the_threshold_not_of_zero():
    """Rewards 0 and −0.025 (thumbs up) lie below 0.00625 and are wrong, so is 0.1 (thumbs down); −0.05 is right."""
    metrics = means(BCO(beta=0.1), tv1_labelled(state=seen(0.025, 4)))
    assert metrics["rewards/accuracies"] == 0.25
    assert metrics["rewards/threshold"] == pytest.approx(0.00625)
    assert (metrics["logps/chosen"], metrics["logps/rejected"]) == (-2.625, -3.0)


def test_a_reward_at_the_threshold_counts_one_half():
    """As before the first update, when every reward and the threshold are 0."""
    batch = make_batch(BCO(), seed=1, at_reference=True)
    assert means(BCO(), batch)["rewards/accuracies"] == 0.5


def test_what_the_encoder_decides():
    """Without one there is no density ratio: none is needed, three keys have no effect, and the first loss is log 2."""
    plain, matching = BCO(), BCO(prompt_encoder="some/encoder")
    assert plain.needs == Needs(legs=("completion",), reference=True, labels=True)
    assert matching.needs == replace(plain.needs, density_ratio="some/encoder")
    assert set(plain.idle()) == KEYS_OF_THE_RATIO
    assert matching.idle() == {}
    assert plain.step0 == math.log(2)
    assert matching.step0 is None


def test_the_density_ratio_gets_no_gradient():
    batch = two_rows(density_ratio=[1.0, 2.0])
    batch = replace(batch, density_ratio=batch.density_ratio.requires_grad_())
    batch["completion"].logps.requires_grad_()
    objective = BCO(prompt_encoder="policy")
    objective(batch).loss(batch.counts()).backward()
    assert batch.density_ratio.grad is None


def test_a_balanced_shift_lies_between_the_classes():
    """Rewards seen before: one desirable row of 2.0, three undesirable ones of −1.0 each; sums 2 − 3 = −1 over 4 rows.

    mean:     −1 / 4           = −0.25
    balanced: (2/1 + −3/3) / 2 =  0.5
    """
    seen = {
        "reward_total": torch.tensor(-1.0, dtype=torch.float64),
        "reward_count": torch.tensor(4.0, dtype=torch.float64),
        "desirable_total": torch.tensor(2.0, dtype=torch.float64),
        "desirable_count": torch.tensor(1.0, dtype=torch.float64),
    }
    for shift, expected in (("mean", -0.25), ("balanced", 0.5)):
        objective = BCO(shift=shift)
        batch = make_batch(objective, seed=1)
        state = {name: seen[name] for name in objective.init_state()}
        threshold = objective(replace(batch, state=state)).metrics["rewards/threshold"]
        assert threshold.total.item() / threshold.count == pytest.approx(expected)


def test_a_balanced_shift_adds_up_its_classes():
    objective = BCO(shift="balanced")
    batch = make_batch(objective, seed=2, rows=5)
    state = objective.update(objective.init_state(), objective.observe(batch))
    rewards = 0.1 * batch["completion"].logratio()
    assert batch.labels is not None
    assert state["desirable_count"] == batch.labels.sum()
    assert state["desirable_total"].item() == pytest.approx(rewards[batch.labels].sum().item())
    assert state["reward_total"].item() == pytest.approx(rewards.sum().item())


@pytest.mark.parametrize(("shift", "wanted"), [("mean", 0.5), ("balanced", 0.2)])
def test_one_of_each_class_seen(shift: str, wanted: float):
    """A single desirable reward of 0.6 and one of −0.2: balanced (0.6 − 0.2)/2; with the mean a single 0.5."""
    objective = BCO(shift=shift)
    if shift == "mean":
        state = {"reward_total": torch.tensor(0.5), "reward_count": torch.tensor(1.0)}
    else:
        state = {
            "reward_total": torch.tensor(0.4),
            "reward_count": torch.tensor(2.0),
            "desirable_total": torch.tensor(0.6),
            "desirable_count": torch.tensor(1.0),
        }
    assert objective._shift(state).item() == pytest.approx(wanted)


def test_classes_of_several_rewards_are_means():
    """Three desirable ones of 0.9 in all and two others of −0.8 in all: (0.3 − 0.4)/2."""
    numbers = {"reward_total": 0.1, "reward_count": 5.0, "desirable_total": 0.9, "desirable_count": 3.0}
    state = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    assert BCO(shift="balanced")._shift(state).item() == pytest.approx(-0.05)
