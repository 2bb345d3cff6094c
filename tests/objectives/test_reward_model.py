"""Reward models against arithmetic by hand and the papers; other implementations' numbers are in ``test_vectors``."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from objectives import Leg, LegBatch, Needs, Objective
from objectives.reward_model import BradleyTerry, MarginBT, RewardRegression, ScaledBT
from tests.objectives.batches import (
    BY_HAND,
    FP64_ROUNDING,
    SIX_PLACES,
    TRANSCRIPTION,
    loss_and_grad,
    make_batch,
    means,
    row_losses,
    rows_of,
)
from tests.vectors.make import transcriptions_reward_model as transcriptions
from tests.vectors.reading import ANOTHER_IMPLEMENTATION, batch_of, contents, matrix, objective_of, vector

NONE = math.nan
"""No rating."""

Columns = dict[str, list[float]]

of_pairs = pytest.mark.parametrize(
    "objective", [BradleyTerry(), MarginBT(), ScaledBT()], ids=lambda o: type(o).__name__
)
of_strength = pytest.mark.parametrize("objective", [MarginBT(), ScaledBT()], ids=lambda o: type(o).__name__)


def with_values(values: Columns) -> Leg:
    """Responses of one token each."""
    logps = torch.full((len(next(iter(values.values()))), 1), -1.0, dtype=torch.float64)
    return Leg(
        logps=logps,
        mask=torch.ones_like(logps, dtype=torch.bool),
        tokens=torch.zeros_like(logps, dtype=torch.int64),
        values={name: vector(numbers) for name, numbers in values.items()},
    )


def pairs(
    chosen: list[float],
    rejected: list[float],
    scores: tuple[list[float], list[float]] | None = None,
    attribute: str = "reward",
) -> LegBatch:
    """Pairs with these rewards; ``scores`` are of chosen and rejected responses."""
    legs = {name: with_values({attribute: each}) for name, each in (("chosen", chosen), ("rejected", rejected))}
    columns = {} if scores is None else dict(zip(legs, map(vector, scores), strict=True))
    return LegBatch(legs=legs, scores=columns)


def strong(chosen: list[float], rejected: list[float], strength: list[float]) -> LegBatch:
    """Pairs with these rewards, preferred this strongly."""
    return pairs(chosen, rejected, (strength, [0.0 for _ in strength]))


def rated(values: Columns, ratings: Columns) -> LegBatch:
    scores = {name: vector(numbers) for name, numbers in ratings.items()}
    return LegBatch(legs={"completion": with_values(values)}, scores=scores)


def regression_of(batch: LegBatch) -> RewardRegression:
    return RewardRegression(attributes=tuple(batch["completion"].values))


def slopes(objective: Objective, batch: LegBatch) -> tuple[float, dict[str, list[float]]]:
    """The loss, and its gradient by every output of the head. Log-probs have none."""
    loss, grad = loss_and_grad(objective, batch)
    assert not any(grad[name].any() for name in batch)
    return loss.item(), {name: each.tolist() for name, each in grad.items() if "/" in name}


# By hand


def test_bradley_terry_by_hand():
    """Rewards 1 and 0: D = 1 → log(1 + e⁻¹) = 0.3132616875; by r_w −σ(−1) = −0.2689414214.

    With c = 0.5 also 0.5·(1 + 0)² = 0.5, whose slope 2·0.5·1 = 1 is the same by both rewards.
    """
    batch = pairs([1.0], [0.0])
    loss, grad = slopes(BradleyTerry(), batch)
    assert loss == pytest.approx(0.3132616875, **BY_HAND)
    assert grad["chosen/reward"] == pytest.approx([-0.2689414214], **BY_HAND)
    assert grad["rejected/reward"] == pytest.approx([0.2689414214], **BY_HAND)
    loss, grad = slopes(BradleyTerry(center_rewards_coefficient=0.5), batch)
    assert loss == pytest.approx(0.8132616875, **BY_HAND)
    assert grad["chosen/reward"] == pytest.approx([0.7310585786], **BY_HAND)
    assert grad["rejected/reward"] == pytest.approx([1.2689414214], **BY_HAND)


def test_margin_bt_by_hand():
    """Rewards 1 and 0, scores 4.5 and 2.5: m = 2, D − m = −1 → log(1 + e) = 1.3132616875; by r_w −σ(1)."""
    loss, grad = slopes(MarginBT(), pairs([1.0], [0.0], ([4.5], [2.5])))
    assert loss == pytest.approx(1.3132616875, **BY_HAND)
    assert grad["chosen/reward"] == pytest.approx([-0.7310585786], **BY_HAND)
    assert grad["rejected/reward"] == pytest.approx([0.7310585786], **BY_HAND)


def test_scaled_bt_by_hand():
    """Two rows with rewards 1 and 0, and with m = 2 and 0.5: a mean over rows, not over weights.

    (2 + 0.5)·0.3132616875/2 = 0.3915771094; by r_w −2·0.2689414214/2 and −0.5·0.2689414214/2.
    """
    loss, grad = slopes(ScaledBT(), pairs([1.0, 1.0], [0.0, 0.0], ([4.5, 3.0], [2.5, 2.5])))
    assert loss == pytest.approx(0.3915771094, **BY_HAND)
    assert grad["chosen/reward"] == pytest.approx([-0.2689414214, -0.06723535535], **BY_HAND)
    assert grad["rejected/reward"] == pytest.approx([0.2689414214, 0.06723535535], **BY_HAND)


def test_reward_regression_by_hand():
    """Rows with two ratings and with one.

    (3 − 1)² = 4 and (0.5 − 1)² = 0.25 → 2.125;    (1 − 2)² = 1 → 1;    (2.125 + 1)/2 = 1.5625
    by the first row's a and c: 2·2/2/2 = 1 and 2·(−0.5)/2/2 = −0.25;    by the second's b: 2·(−1)/1/2 = −1
    """
    values = {"a": [3.0, 2.0], "b": [5.0, 1.0], "c": [0.5, 4.0]}
    batch = rated(values, {"a": [1.0, NONE], "b": [NONE, 2.0], "c": [1.0, NONE]})
    objective = RewardRegression(attributes=("a", "b", "c"))
    assert objective(batch).terms["regression"].values.tolist() == pytest.approx([2.125, 1.0])
    assert slopes(objective, batch) == (
        pytest.approx(1.5625),
        {"completion/a": [1.0, 0.0], "completion/b": [0.0, -1.0], "completion/c": [-0.25, 0.0]},
    )


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (BradleyTerry(), 0.403186),
        (MarginBT(), 1.541008),
        (ScaledBT(), 0.806372),
        (BradleyTerry(center_rewards_coefficient=0.01), 0.432086),
    ],
)
def test_known_numbers(objective: Objective, expected: float):
    """Rewards 1.2 and 0.5, strength 2."""
    assert slopes(objective, strong([1.2], [0.5], [2.0]))[0] == pytest.approx(expected, **SIX_PLACES)


def test_known_number_of_a_regression():
    batch = rated({"a": [3.1], "b": [2.0], "c": [4.0]}, {"a": [4.0], "b": [NONE], "c": [3.0]})
    assert slopes(regression_of(batch), batch)[0] == pytest.approx(0.905000, **SIX_PLACES)


# From the papers


def assert_same(objective: Objective, batch: LegBatch, expected: tuple[float, Columns]) -> None:
    loss, grad = slopes(objective, batch)
    assert math.isclose(loss, expected[0], rel_tol=1e-11, abs_tol=1e-13)
    assert set(grad) == set(expected[1])
    for name, numbers in expected[1].items():
        assert_close(vector(grad[name]), vector(numbers), **TRANSCRIPTION)


@given(seed=st.integers(0, 200), scale=st.sampled_from([0.1, 1.0, 30.0]), center=st.sampled_from([0.0, 0.01, 2.0]))
def test_pairs_as_in_the_papers(seed: int, scale: float, center: float):
    """Random rewards and scores; scores that contradict the label are among them."""
    batch = make_batch(MarginBT(), seed=seed, rows=5)
    legs = {
        name: replace(batch[name], values={"reward": scale * batch[name].value("reward")})
        for name in ("chosen", "rejected")
    }
    batch = replace(batch, legs=legs)
    rewards = [legs[name].value("reward").tolist() for name in legs]
    strength = (batch.score("chosen") - batch.score("rejected")).tolist()
    for objective, (loss, grad) in (
        (BradleyTerry(center_rewards_coefficient=center), transcriptions.bradley_terry(*rewards, center=center)),
        (MarginBT(), transcriptions.margin_bt(*rewards, strength)),
        (ScaledBT(), transcriptions.scaled_bt(*rewards, strength)),
    ):
        assert_same(objective, batch, (loss, {f"{leg}/reward": numbers for leg, numbers in grad.items()}))


@given(seed=st.integers(0, 200), share=st.sampled_from([0.2, 0.6, 1.0]))
def test_regression_as_in_the_papers(seed: int, share: float):
    """Random values and ratings, of which some are missing; each row has one."""
    objective = RewardRegression(attributes=("a", "b", "c"))
    batch = make_batch(objective, seed=seed, rows=6)
    generator = torch.Generator().manual_seed(seed)
    has_rating = torch.rand(6, 3, generator=generator) < share
    has_rating[torch.arange(6), torch.randint(0, 3, (6,), generator=generator)] = True
    kept = dict(zip(batch.scores, has_rating.T, strict=True))
    batch = replace(batch, scores={name: torch.where(kept[name], each, NONE) for name, each in batch.scores.items()})
    loss, grad = transcriptions.reward_regression(
        {name: batch["completion"].value(name).tolist() for name in objective.attributes},
        {name: batch.score(name).tolist() for name in objective.attributes},
    )
    assert_same(objective, batch, (loss, {f"completion/{name}": numbers for name, numbers in grad.items()}))


# What pairs cost


@of_pairs
@pytest.mark.parametrize("reward", [0.0, 1.5, -40.0])
def test_equal_rewards_cost_log_2(objective: Objective, reward: float):
    """Without a margin, and under a weight of 1; whatever the rewards."""
    strength = 1.0 if isinstance(objective, ScaledBT) else 0.0
    loss, grad = slopes(objective, strong([reward], [reward], [strength]))
    assert loss == pytest.approx(math.log(2), **BY_HAND)
    assert grad == {"chosen/reward": [-0.5], "rejected/reward": [0.5]}


@of_pairs
@given(by=st.floats(-50, 50), seed=st.integers(0, 20))
def test_only_the_difference_of_rewards_counts(objective: Objective, by: float, seed: int):
    """Until they are centred, which pulls the sum of a pair's rewards to 0."""
    batch = make_batch(MarginBT(), seed=seed)
    moved = {name: replace(batch[name], values={"reward": batch[name].value("reward") + by}) for name in batch}
    before, after = (slopes(objective, each)[0] for each in (batch, replace(batch, legs=moved)))
    assert before == pytest.approx(after, rel=1e-9)


def test_centring_prefers_rewards_around_zero():
    centred = BradleyTerry(center_rewards_coefficient=0.01)
    around, above = pairs([0.5], [-0.5]), pairs([3.0], [2.0])
    assert slopes(centred, around)[0] == slopes(BradleyTerry(), around)[0]
    assert slopes(centred, above)[0] == pytest.approx(slopes(BradleyTerry(), above)[0] + 0.25, **BY_HAND)


@pytest.mark.parametrize("strength", [0.0, -1.0, -3.0])
def test_a_pair_without_strength_does_not_count(strength: float):
    """Nor one whose scores contradict its label: no loss and no gradient, but a row of the mean."""
    alone = strong([1.0], [0.0], [2.0])
    both = strong([1.0, -5.0], [0.0, 5.0], [2.0, strength])
    assert row_losses(ScaledBT(), both) == [*row_losses(ScaledBT(), alone), 0.0]
    (loss, grad), (of_alone, slope) = slopes(ScaledBT(), both), slopes(ScaledBT(), alone)
    assert loss == pytest.approx(of_alone / 2, **BY_HAND)
    for name, (first,) in slope.items():
        assert grad[name] == [pytest.approx(first / 2, **BY_HAND), 0.0]
    assert means(ScaledBT(), both)["rewards/strength"] == 1.0


def test_a_margin_below_zero_is_taken_as_it_is():
    """As in TRL: the rejected response may then be ahead by as much."""
    assert row_losses(MarginBT(), strong([0.0], [3.0], [-3.0])) == pytest.approx([math.log(2)], **BY_HAND)


def test_a_weight_is_how_often_a_row_occurs():
    """Rows with m = 3, 1 and 2: the sum is that of plain Bradley-Terry over six rows."""
    chosen, rejected, strength = [1.0, -0.5, 2.0], [0.25, 0.5, -1.0], [3, 1, 2]
    often = torch.repeat_interleave(torch.arange(3), torch.tensor(strength))
    scaled = ScaledBT()(strong(chosen, rejected, [float(m) for m in strength])).terms["preference"].total
    repeated = BradleyTerry()(rows_of(pairs(chosen, rejected), often)).terms["preference"].total
    assert_close(scaled, repeated, **FP64_ROUNDING)


@of_strength
def test_strength_is_a_difference_of_scores(objective: Objective):
    first, second = (pairs([1.0], [0.5], scores) for scores in (([4.0], [1.5]), ([2.5], [0.0])))
    assert slopes(objective, first) == slopes(objective, second)
    assert means(objective, first)["rewards/strength"] == 2.5


@of_pairs
def test_other_outputs_of_the_head_are_not_trained(objective: Objective):
    """A head of a regression goes on with one of its attributes."""
    batch = strong([1.0], [0.0], [2.0])
    plain = slopes(objective, batch)
    legs = {
        name: replace(batch[name], values={"helpfulness": batch[name].value("reward"), "verbosity": vector([7.0])})
        for name in batch
    }
    loss, grad = slopes(replace(objective, attribute="helpfulness"), replace(batch, legs=legs))
    assert loss == plain[0]
    assert grad == {
        **{f"{leg}/helpfulness": plain[1][f"{leg}/reward"] for leg in batch},
        **{f"{leg}/verbosity": [0.0] for leg in batch},
    }


def test_metrics_of_pairs():
    """Rewards ahead, behind and equal; a tie is half right."""
    found = means(BradleyTerry(), pairs([2.0, 0.0, 1.0], [0.5, 1.0, 1.0]))
    assert found == {
        "rewards/chosen": pytest.approx(1.0),
        "rewards/rejected": pytest.approx(2.5 / 3),
        "rewards/margins": pytest.approx(0.5 / 3),
        "rewards/accuracies": pytest.approx(0.5),
    }


# What ratings cost


def test_a_missing_rating_has_no_gradient_and_no_weight():
    """A row's loss is that of its rated attributes alone, whatever the head says of the others."""
    values = {"a": [3.0, 1.0], "b": [2.0, -1.0], "c": [0.0, 4.0]}
    some = rated(values, {"a": [1.0, 2.0], "b": [0.5, NONE], "c": [NONE, 4.5]})
    objective = regression_of(some)
    without_c = rated({name: values[name][:1] for name in "ab"}, {"a": [1.0], "b": [0.5]})
    without_b = rated({name: values[name][1:] for name in "ac"}, {"a": [2.0], "c": [4.5]})
    alone = [regression_of(each)(each).terms["regression"].values for each in (without_c, without_b)]
    assert_close(objective(some).terms["regression"].values, torch.cat(alone), **FP64_ROUNDING)
    absurd = {**values, "b": [2.0, 1e8], "c": [-1e8, 4.0]}
    for each in (values, absurd):
        loss, grad = slopes(objective, rated(each, {"a": [1.0, 2.0], "b": [0.5, NONE], "c": [NONE, 4.5]}))
        assert loss == pytest.approx(slopes(objective, some)[0], **BY_HAND)
        assert (grad["completion/b"][1], grad["completion/c"][0]) == (0.0, 0.0)


def test_a_row_without_ratings_is_no_loss_and_no_nan():
    """Reading the data drops such rows; one that arrives is a row of the mean."""
    batch = rated({"a": [3.0, 1.0], "b": [2.0, -1.0]}, {"a": [1.0, NONE], "b": [2.0, NONE]})
    loss, grad = slopes(regression_of(batch), batch)
    assert loss == pytest.approx(1.0)
    assert grad == {"completion/a": [1.0, 0.0], "completion/b": [0.0, 0.0]}
    nothing = rows_of(batch, slice(1, 2))
    assert slopes(regression_of(nothing), nothing) == (0.0, {"completion/a": [0.0], "completion/b": [0.0]})


def test_right_predictions_cost_nothing():
    ratings = {"a": [3.0, 1.0], "b": [NONE, 4.0]}
    loss, grad = slopes(RewardRegression(attributes=("a", "b")), rated({"a": [3.0, 1.0], "b": [9.0, 4.0]}, ratings))
    assert loss == 0
    assert grad == {"completion/a": [0.0, 0.0], "completion/b": [0.0, 0.0]}


def test_metrics_of_ratings():
    """Errors and ratings are averaged over ratings, rewards over all outputs."""
    found = means(
        RewardRegression(attributes=("a", "b")),
        rated({"a": [3.0, 1.0], "b": [2.0, -1.0]}, {"a": [1.0, 2.0], "b": [NONE, 3.0]}),
    )
    assert found == {
        "rewards/mean": pytest.approx(1.25),
        "ratings/mean": pytest.approx(2.0),
        "ratings/absolute_error": pytest.approx(7 / 3),
    }


def test_nemo_aligner_divides_by_the_ratings_of_a_microbatch():
    """Squares 4 in a row with one rating; 1, 4, 0.25 and 4, 0.25, 1 in rows with three. Ours is 7.5/3 = 2.5.

    Theirs is 14.5/7 for one microbatch, where the lone rating counts 1/7 and not 1/3. In microbatches of two rows and
    one it is (9.25/4 + 5.25/3)/2: another loss of the same rows. Ours adds up, however the step is split.
    """
    whole, split = contents("differences/reward_regression")["cases"]
    assert whole["legs"] == split["legs"]
    objective, batch = objective_of("reward_regression", whole), batch_of(whole)
    loss, grad = loss_and_grad(objective, batch)
    assert loss.item() == pytest.approx(2.5, **BY_HAND)
    assert whole["loss"] == pytest.approx(14.5 / 7, rel=1e-12)
    assert split["loss"] == pytest.approx((9.25 / 4 + 5.25 / 3) / 2, rel=1e-12)
    parts = [loss_and_grad(objective, rows_of(batch, part), batch.counts()) for part in (slice(0, 2), slice(2, 3))]
    assert_close(sum(part for part, _ in parts), loss, **FP64_ROUNDING)

    # By which factor a row counts more than here: 3 rows by its ratings, over all ratings.
    for case, factors in ((whole, [3 / 7, 9 / 7, 9 / 7]), (split, [3 / 8, 9 / 8, 3 / 2])):
        for name, theirs in case["grad"].items():
            expected: Tensor = grad[name] * vector(factors)
            assert_close(matrix(theirs), expected, **ANOTHER_IMPLEMENTATION)


def test_what_they_need():
    assert BradleyTerry(attribute="helpfulness").needs == Needs(legs=("chosen", "rejected"), values=("helpfulness",))
    for objective in (MarginBT(), ScaledBT()):
        legs = ("chosen", "rejected")
        assert objective.needs == Needs(legs=legs, values=("reward",), scores=legs)
    names = ("helpfulness", "verbosity")
    assert RewardRegression(attributes=names).needs == Needs(legs=("completion",), values=names, scores=names)
