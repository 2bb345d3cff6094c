"""Planned steps: every row once, every bin within the budget, no more microbatches than needed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.assemble import BLOCK
from data.errors import DataError
from data.loader import PlannedBatches, step_counts
from data.plan import Layout, Plan, times_trained
from tests.align.tiny import random_table

PACK, BUCKET = Layout(kind="pack"), Layout(kind="bucket")
both_layouts = pytest.mark.parametrize("layout", [PACK, BUCKET], ids=["pack", "bucket"])


def a_plan(lengths, **changes) -> Plan:
    given_ = {"rows_per_step": 8, "token_budget": 64, "epochs": 2, "world": 1, "layout": PACK, "seed": 0, **changes}
    return Plan(lengths=np.asarray(lengths, dtype=np.int64), **given_)


@st.composite
def plans(draw) -> Plan:
    lengths = draw(st.lists(st.integers(2, 60), min_size=1, max_size=60))
    return a_plan(
        lengths,
        rows_per_step=draw(st.integers(1, 70)),
        token_budget=max(lengths) + draw(st.integers(0, 200)),
        epochs=draw(st.integers(1, 3)),
        world=draw(st.integers(1, 4)),
        layout=draw(st.sampled_from([PACK, BUCKET])),
        seed=draw(st.integers(0, 5)),
    )


def bins_of(step):
    return [rows for microbatch in step for rows in microbatch]


def flat(epoch):
    return [step_rows.tolist() for step in epoch for step_rows in bins_of(step)]


def positions(plan, rows):
    """What ``Plan.positions`` says, in plain words."""
    lengths = [int(plan.lengths[row]) for row in rows]
    if not lengths:
        return 0
    return sum(lengths) if plan.layout == PACK else max(lengths) * len(lengths)


@given(plan=plans(), steps=st.integers(0, 40))
def test_what_was_trained_on_is_told_by_the_number_of_steps(plan: Plan, steps: int):
    """Counted step by step in the plan that training follows, whatever its lengths, budget and processes."""
    counted = np.zeros(len(plan.lengths), dtype=np.int64)
    for done in range(steps):
        epoch, step = divmod(done, plan.steps_per_epoch)
        for rows in bins_of(plan.epoch(epoch)[step]):
            counted[rows] += 1
    found = times_trained(len(plan.lengths), plan.rows_per_step, steps, plan.seed)
    assert found.tolist() == counted.tolist()
    assert times_trained(0, 4, steps, 0).tolist() == []


def realistic(rows, seed=0):
    """Prompts and pairs of responses as long-tailed as in public preference data, cut at 2048."""
    rng = np.random.default_rng(seed)
    prompts = rng.lognormal(5.0, 0.9, rows)
    responses = rng.lognormal(5.3, 0.8, (2, rows))
    return np.minimum(prompts + responses.sum(axis=0), 2 * 2048).astype(np.int64) + 3


@settings(max_examples=100)
@given(plans())
def test_every_row_once_per_epoch(plan):
    for number in range(plan.epochs):
        rows = list(itertools.chain(*flat(plan.epoch(number))))
        assert sorted(rows) == list(range(len(plan.lengths)))


@settings(max_examples=100)
@given(plans())
def test_steps_hold_what_they_should(plan):
    for number in range(plan.epochs):
        epoch = plan.epoch(number)
        assert len(epoch) == plan.steps_per_epoch == int(np.ceil(len(plan.lengths) / plan.rows_per_step))
        sizes = [sum(map(len, bins_of(step))) for step in epoch]
        assert sizes[:-1] == [plan.rows_per_step] * (len(epoch) - 1)
        for step in epoch:
            assert len(step) == plan.microbatches
            assert {len(microbatch) for microbatch in step} == {plan.world}


@settings(max_examples=100)
@given(plans())
def test_every_bin_is_within_the_budget(plan):
    for rows in flat(plan.epoch(plan.epochs - 1)):
        assert positions(plan, rows) <= plan.token_budget
        if rows:
            assert positions(plan, rows) == plan.positions(rows)


def fewest_runs(plan, rows):
    """The fewest bins within the budget that a split by length can reach, by trying every place of a cut."""
    ordered = sorted(rows, key=lambda row: plan.lengths[row])
    fewest = [0]
    for end in range(1, len(ordered) + 1):
        starts = [s for s in range(end) if positions(plan, ordered[s:end]) <= plan.token_budget]
        fewest.append(1 + min(fewest[s] for s in starts))
    return fewest[-1]


@given(plans())
def test_no_fewer_microbatches_would_do(plan):
    """Some step needs them all. The greedy split is compared with every split of the sorted rows."""
    needed = [
        -(-fewest_runs(plan, np.concatenate(bins_of(step))) // plan.world)
        for number in range(plan.epochs)
        for step in plan.epoch(number)
    ]
    assert plan.microbatches == max(needed)


@given(plans())
def test_the_most_expensive_bin_is_as_cheap_as_it_gets(plan):
    """Under any smaller budget the sorted rows of a step would need more bins than there are."""
    most = plan.world * plan.microbatches
    for step in plan.epoch(0):
        rows = np.sort(plan.lengths[np.concatenate(bins_of(step))])
        worst = max(positions(plan, bin_rows) for bin_rows in bins_of(step))
        if worst > rows[-1]:
            assert len(plan.layout.bins_under(rows, worst - 1)) > most


@given(plans())
def test_a_plan_is_a_function_of_its_arguments(plan):
    again = a_plan(
        plan.lengths, **{name: getattr(plan, name) for name in plan.__dataclass_fields__ if name != "lengths"}
    )
    for number in reversed(range(plan.epochs)):  # resuming asks for a later epoch first
        assert flat(again.epoch(number)) == flat(plan.epoch(number))
    assert again.microbatches == plan.microbatches


def test_epochs_and_seeds_differ():
    lengths = realistic(200)
    plan = a_plan(lengths, token_budget=10**5)
    other = a_plan(lengths, token_budget=10**5, seed=1)
    first_steps = [set(np.concatenate(bins_of(p.epoch(n)[0]))) for p, n in ((plan, 0), (plan, 1), (other, 0))]
    assert all(a != b for a, b in itertools.combinations(first_steps, 2))


@given(st.integers(1, 4), st.integers(1, 4))
def test_which_rows_share_a_step_depends_on_neither_world_nor_budget(world, factor):
    """A run moved to other machines takes the same steps."""
    lengths = realistic(100)
    here = a_plan(lengths, token_budget=5000)
    there = a_plan(lengths, token_budget=5000 * factor, world=world, layout=BUCKET)
    for one, other in zip(here.epoch(1), there.epoch(1), strict=True):
        assert set(np.concatenate(bins_of(one))) == set(np.concatenate(bins_of(other)))


def test_unshuffled_rows_keep_their_steps():
    plan = a_plan([5] * 20, shuffle=False)
    assert [sorted(np.concatenate(bins_of(step)).tolist()) for step in plan.epoch(1)] == [
        list(range(8)),
        list(range(8, 16)),
        list(range(16, 20)),
    ]


def test_bins_by_hand():
    """Six rows of 2 2 3 4 8 9 positions, at most 12 in a bin.

    packed:   2+2+3+4 = 11 | 8 | 9          three bins
    bucketed: 3·3 = 9 (4·4 > 12) | 4 | 8 | 9, as 4 and 8 would take 2·8
    """
    lengths = np.array([2, 2, 3, 4, 8, 9])
    assert PACK.bins_under(lengths, 12) == [4, 5, 6]
    assert BUCKET.bins_under(lengths, 12) == [3, 4, 5, 6]


def test_a_bin_may_be_filled_to_the_last_position():
    for layout, lengths in ((PACK, [4, 8]), (BUCKET, [5, 6])):
        assert layout.bins_under(np.array(lengths), 12) == [2]
        assert layout.bins_under(np.array(lengths), 11) == [1, 2]


def test_bins_are_levelled_below_the_budget():
    """Two bins are needed anyway, so the four rows are halved; filling the first would leave 30 beside 10."""
    plan = a_plan([10] * 4, rows_per_step=4, token_budget=30)
    assert [positions(plan, rows) for rows in flat(plan.epoch(0))] == [20, 20]


def test_ranks_compute_neighbouring_bins_at_the_same_time():
    plan = a_plan(np.arange(1, 17), rows_per_step=16, token_budget=40, world=2)
    for microbatch in plan.epoch(0)[0]:
        spans = [plan.lengths[rows] for rows in microbatch if len(rows)]
        assert all(a.max() <= b.min() for a, b in itertools.pairwise(spans))
    widest = [max(plan.lengths[rows].max(initial=0) for rows in microbatch) for microbatch in plan.epoch(0)[0]]
    assert widest == sorted(widest)


def test_a_row_beyond_the_budget_is_refused_with_what_to_do():
    with pytest.raises(DataError) as caught:
        a_plan([10, 70, 20])
    assert str(caught.value) == (
        "train.token_budget 64 is smaller than the longest row (70 positions, its prompt counted once); set it to at "
        "least 70 or lower data.max_length"
    )
    assert a_plan([10, 70, 20], token_budget=70).microbatches >= 1


@both_layouts
def test_the_costliest_bin_may_come_in_any_epoch(layout):
    """Rows that make an expensive bin together need not meet in the first epoch."""
    plan = a_plan(np.arange(10, 60), rows_per_step=6, token_budget=300, epochs=6, layout=layout)
    worst = [max(positions(plan, rows) for rows in flat(plan.epoch(number))) for number in range(plan.epochs)]
    assert worst[0] < max(worst), "else this would show nothing"
    assert positions(plan, plan.costliest()) == max(worst)


@given(plans())
def test_the_costliest_bin_is_the_costliest_of_all_epochs(plan):
    every = [rows for number in range(plan.epochs) for rows in flat(plan.epoch(number))]
    assert positions(plan, plan.costliest()) == max(positions(plan, rows) for rows in every)


@both_layouts
def test_bins_of_realistic_rows_cost_nearly_the_same(layout, record_property):
    """64 rows a step on four ranks: the slowest bin decides, so it may not be much dearer than the mean."""
    plan = a_plan(realistic(4096), rows_per_step=64, token_budget=16384, world=4, layout=layout, epochs=1)
    ratios = []
    for step in plan.epoch(0):
        costs = [positions(plan, rows) for rows in bins_of(step)]
        ratios.append(max(costs) / np.mean(costs))
    record_property("mean of max/mean", float(np.mean(ratios)))
    assert np.mean(ratios) < 1.1
    assert max(ratios) < 1.2


def test_buckets_of_realistic_rows_hold_little_padding(record_property):
    """Sorted within a step of 128 rows, rows of one bin are of similar length. Unsorted it would be nearly half."""
    plan = a_plan(realistic(4096), rows_per_step=128, token_budget=8192, layout=BUCKET, epochs=1)
    filled = sum(plan.lengths)
    taken = sum(positions(plan, rows) for rows in flat(plan.epoch(0)))
    padding = 1 - filled / taken
    record_property("padding", float(padding))
    assert padding < 0.08
    rng = np.random.default_rng(0)
    unsorted = sum(len(g) * max(g) for g in rng.permutation(plan.lengths).reshape(-1, 8))
    assert 1 - filled / unsorted > 3 * padding


@pytest.mark.parametrize(("rows_per_step", "world"), [(16, 1), (32, 1), (64, 1), (64, 8), (128, 4)])
def test_packed_lines_of_realistic_rows_hold_next_to_no_padding(rows_per_step: int, world: int):
    """As on GPUs, where lines are whole blocks."""
    layout = Layout(kind="pack", multiple=BLOCK)
    plan = a_plan(realistic(4096), rows_per_step=rows_per_step, token_budget=16384, world=world, layout=layout)
    taken = sum(plan.positions(rows) for rows in flat(plan.epoch(0)))
    assert 0 < 1 - sum(plan.lengths) / taken < 0.02


def test_a_hundred_thousand_rows_are_split_few_times(monkeypatch):
    """Planning is linear: each step is split once to find G and, per epoch, once per halving of the budget."""
    calls = []
    split = Layout.bins_under
    monkeypatch.setattr(Layout, "bins_under", lambda self, *args: calls.append(len(args[0])) or split(self, *args))
    plan = a_plan(realistic(100_000), rows_per_step=128, token_budget=16384, world=8, epochs=1)
    plan.epoch(0)
    assert sum(calls) <= 100_000 * (2 + np.log2(16384))


# The loader: what one rank reads of a plan


def planned(world=2, **options):
    table = random_table(rows=11)
    plan = a_plan(table.shared_lengths(), rows_per_step=4, token_budget=60, world=world)
    return [PlannedBatches(table, plan, rank=rank, share=True, **options) for rank in range(world)], plan, table


def test_ranks_read_the_whole_plan_between_them():
    ranks, plan, _ = planned()
    for number in range(2):
        for batches in ranks:
            batches.set_epoch(number)
        bins = [batches[item].rows.tolist() for item in range(len(ranks[0])) for batches in ranks]
        assert bins == flat(plan.epoch(number))


def test_every_microbatch_knows_the_counts_of_its_whole_step():
    ranks, plan, table = planned()
    for item in range(len(ranks[0])):
        step = item // plan.microbatches
        rows = np.concatenate(bins_of(plan.epoch(0)[step]))
        expected = {
            "row": float(len(rows)),
            "chosen.token": float(table.legs["chosen"].lengths()[rows].sum()),
            "rejected.token": float(table.legs["rejected"].lengths()[rows].sum()),
        }
        assert [batches[item].counts for batches in ranks] == [expected] * 2
    assert step_counts(table, np.array([], dtype=np.int64)) == {"row": 0.0, "chosen.token": 0.0, "rejected.token": 0.0}


def test_a_loader_yields_the_items_in_order():
    (batches,), plan, _ = planned(world=1)
    assert [batch.rows.tolist() for batch in batches.loader()] == flat(plan.epoch(0))
