"""Packed batches: the index by hand, and who may attend to whom by brute force."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align.masks import attention_mask
from data.pack import PADDING, Known, PackedBatch, PackedLeg, pack
from data.store import Ragged, TokenTable
from data.tokens import TokenRow
from tests.align.tiny import random_table

COUNTS = {"row": 7.0, "a.token": 9.0}
# The row of the module's docstring, then a shorter one.
ROWS = [([10, 11, 12], {"a": [20, 21, 22], "b": [30, 31]}), ([13, 14], {"a": [23], "b": [32, 33]})]
TABLE = TokenTable.of(
    [
        TokenRow(prompt=tuple(prompt), legs={name: tuple(t) for name, t in legs.items()}, source="", index=i)
        for i, (prompt, legs) in enumerate(ROWS)
    ],
    ("a", "b"),
)


def test_the_example_of_the_docstring():
    """line     x0 x1 x2 | a0 a1 a2 | b0 b1."""
    batch = pack(TABLE, [0], share=True, counts=COUNTS)
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 22, 30, 31]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4]]
    assert batch.leg_ids.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2]]
    assert batch.row_ids.tolist() == [[0] * 8]
    assert batch.source.tolist() == [2, 3, 4, 2, 6]  # a0 and b0 are predicted from x2
    assert batch.target.tolist() == [20, 21, 22, 30, 31]
    assert batch.legs["a"].slot.tolist() == [[0, 1, 2]]
    assert batch.legs["b"].slot.tolist() == [[3, 4]]
    assert batch.legs["b"].mask.tolist() == [[True, True]]
    assert batch.legs["b"].tokens.tolist() == [[30, 31]]
    assert batch.legs["a"].ref_logps is None
    assert (batch.shared, batch.rows.tolist(), batch.counts, batch.useful_tokens) == (True, [0], COUNTS, 8)


def test_a_line_per_row():
    batch = pack(TABLE, [1, 0], share=True, counts=COUNTS)
    assert batch.input_ids.tolist() == [[13, 14, 23, 32, 33, 0, 0, 0], [10, 11, 12, 20, 21, 22, 30, 31]]
    assert batch.position_ids.tolist()[0] == [0, 1, 2, 2, 3, 0, 0, 0]
    assert batch.leg_ids.tolist()[0] == [0, 0, 1, 2, 2, -1, -1, -1]
    assert batch.row_ids.tolist()[0] == [1] * 5 + [PADDING] * 3
    # Leg by leg, row by row; the second line begins at flat position 8.
    assert batch.source.tolist() == [1, 8 + 2, 8 + 3, 8 + 4, 1, 3, 8 + 2, 8 + 6]
    assert batch.target.tolist() == [23, 20, 21, 22, 32, 33, 30, 31]
    assert batch.legs["a"].slot.tolist() == [[0, 0, 0], [1, 2, 3]]
    assert batch.legs["a"].mask.tolist() == [[True, False, False], [True] * 3]
    assert batch.legs["a"].tokens.tolist() == [[23, 0, 0], [20, 21, 22]]
    assert (batch.rows.tolist(), batch.useful_tokens) == ([1, 0], 13)


def test_rows_end_to_end():
    batch = pack(TABLE, [0, 1], share=True, kind="pack", counts=COUNTS)
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 22, 30, 31, 13, 14, 23, 32, 33]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 0, 1, 2, 2, 3]]
    assert batch.row_ids.tolist() == [[0] * 8 + [1] * 5]
    assert batch.source.tolist() == [2, 3, 4, 9, 2, 6, 9, 11]
    assert batch.target.tolist() == [20, 21, 22, 23, 30, 31, 32, 33]


def test_separate_sequences():
    batch = pack(TABLE, [0], share=False, counts=COUNTS)
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 22], [10, 11, 12, 30, 31, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 0]]
    assert batch.source.tolist() == [2, 3, 4, 6 + 2, 6 + 3]
    assert not batch.shared
    with pytest.raises(AssertionError, match="lines of their own"):
        pack(TABLE, [0], share=False, kind="pack", counts=COUNTS)


@pytest.mark.parametrize(("share", "kind"), [(True, "bucket"), (True, "pack"), (False, "bucket")])
def test_a_dummy_runs_forward_and_weighs_nothing(share, kind):
    batch = pack(TABLE, [], share=share, kind=kind, counts=COUNTS)
    assert (batch.input_ids[0, :3].tolist(), batch.counts) == ([13, 14, 23], COUNTS)  # the shortest row
    assert batch.source.tolist() == [1]
    assert len(batch.target) == 1
    assert (batch.rows.tolist(), batch.useful_tokens) == ([], 0)
    for leg in batch.legs.values():
        assert leg.mask.shape == (0, 1)


@pytest.mark.parametrize("share", [True, False])
def test_reference_log_probs_stand_beside_their_tokens(share):
    """Every response token's log-prob is minus its id, so that a misplaced one shows."""
    references = {
        name: Ragged(-np.array([t for _, legs in ROWS for t in legs[name]], dtype=np.float32), leg.offsets)
        for name, leg in TABLE.legs.items()
    }
    batch = pack(TABLE, [1, 0], share=share, counts=COUNTS, known=Known(references=references))
    for leg in batch.legs.values():
        assert leg.ref_logps is not None
        assert leg.ref_logps.dtype == torch.float32
        assert torch.equal(leg.ref_logps, -leg.tokens.float())
    dummy = pack(TABLE, [], share=share, counts=COUNTS, known=Known(references=references))
    assert dummy.legs["a"].ref_logps.shape == (0, 1)


def test_moving_keeps_everything():
    references = {name: Ragged(leg.values.astype(np.float32), leg.offsets) for name, leg in TABLE.legs.items()}
    batch = pack(TABLE, [0, 1], share=True, counts=COUNTS, known=Known(references=references))
    moved = batch.to("meta")

    def same(old, new):
        if isinstance(old, torch.Tensor):
            assert (new.device.type, new.shape, new.dtype) == ("meta", old.shape, old.dtype)
        elif isinstance(old, PackedBatch | PackedLeg):
            assert type(new) is type(old)
            for field in dataclasses.fields(old):
                same(getattr(old, field.name), getattr(new, field.name))
        elif isinstance(old, dict):
            assert list(new) == list(old)
            for key in old:
                same(old[key], new[key])
        else:
            assert new == old

    same(batch, moved)
    assert torch.equal(batch.to("cpu").source, batch.source)


def test_memory_mapped_tables_pack_alike(tmp_path):
    TABLE.save(tmp_path)
    one, other = (pack(t, [1, 0], share=True, counts=COUNTS) for t in (TABLE, TokenTable.load(tmp_path)))
    assert torch.equal(one.input_ids, other.input_ids)
    assert torch.equal(one.target, other.target)


def random_pack(seed: int, taken: int, kind: str) -> PackedBatch:
    """One, two or three legs; up to six of six rows, in any order, none makes a dummy."""
    return pack(
        random_table(("chosen", "rejected", "gold")[: 1 + seed % 3], rows=6, seed=seed),
        np.random.default_rng(seed).permutation(6)[:taken],
        share=kind != "separate",
        kind="pack" if kind == "pack" else "bucket",
        counts=COUNTS,
    )


seeds, sizes = st.integers(0, 100), st.integers(0, 6)


@given(seeds, sizes, st.sampled_from(["bucket", "pack", "separate"]))
def test_the_index_leads_back_to_the_tokens(seed, taken, kind):
    """The token after a source, in its leg, is the target; every slot holds its leg's token; no slot occurs twice."""
    batch = random_pack(seed, taken, kind)
    for name, leg in batch.legs.items():
        assert torch.equal(batch.target[leg.slot[leg.mask]], leg.tokens[leg.mask]), name
    if not len(batch.rows):
        return
    slots = torch.cat([leg.slot[leg.mask] for leg in batch.legs.values()])
    assert sorted(slots.tolist()) == list(range(len(batch.target)))
    ids, row, legs, position = (
        t.flatten() for t in (batch.input_ids, batch.row_ids, batch.leg_ids, batch.position_ids)
    )
    for number, leg in enumerate(batch.legs.values(), start=1):
        for i, table_row in enumerate(batch.rows.tolist()):
            for t in range(int(leg.mask[i].sum())):
                source = int(batch.source[leg.slot[i, t]])
                here = (row == table_row) & (legs == number) & (position == position[source] + 1)
                assert ids[here].tolist() == [leg.tokens[i, t]]
                assert legs[source] == (0 if t == 0 else number)
    assert batch.useful_tokens == int((row != PADDING).sum())


def visible(batch, line, query, key, window):
    """The rule in words: myself; else what came before in my row, if it is the prompt or my own response."""
    if query == key:
        return True
    row, leg, position = (t[line].tolist() for t in (batch.row_ids, batch.leg_ids, batch.position_ids))
    if key > query or row[query] != row[key] or PADDING in (row[query], row[key]):
        return False
    if leg[key] not in (0, leg[query]):
        return False
    return window is None or position[query] - position[key] < window


@pytest.mark.slow
@given(seeds, sizes, st.sampled_from(["bucket", "pack"]), st.sampled_from([None, 1, 4]))
def test_the_mask_is_the_rule(seed, taken, kind, window):
    batch = random_pack(seed, taken, kind)
    mask = attention_mask(batch, window)
    lines, width = batch.input_ids.shape
    assert mask.shape == (lines, 1, width, width)
    expected = [
        [[visible(batch, line, query, key, window) for key in range(width)] for query in range(width)]
        for line in range(lines)
    ]
    assert mask[:, 0].tolist() == expected


@pytest.mark.parametrize("share", [True, False])
def test_what_is_known_of_rows_stands_beside_them(share):
    """Labels, density ratios and token masks, in the order of the batch; a dummy has none of them but their shapes."""
    table = TokenTable(TABLE.prompts, TABLE.legs, np.array([True, False]))
    kept = {"a": Ragged((np.asarray(TABLE.legs["a"].values) % 2).astype(np.uint8), TABLE.legs["a"].offsets)}
    known = Known(kept=kept, density_ratio=np.array([0.5, 2.0]))
    batch = pack(table, [1, 0], share=share, counts=COUNTS, known=known)
    assert batch.labels is not None
    assert batch.labels.tolist() == [False, True]
    assert batch.density_ratio is not None
    assert batch.density_ratio.tolist() == [2.0, 0.5]
    leg = batch.legs["a"]
    assert leg.weight is not None
    assert torch.equal(leg.weight[leg.mask], (leg.tokens[leg.mask] % 2).float())
    assert batch.legs["b"].weight is None
    dummy = pack(table, [], share=share, counts=COUNTS, known=known)
    assert dummy.labels is not None
    assert dummy.density_ratio is not None
    assert len(dummy.labels) == len(dummy.density_ratio) == 0
