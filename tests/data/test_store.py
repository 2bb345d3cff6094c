"""Token tables on disk: what comes back, what a fingerprint sees, what a crash leaves."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.store import Ragged, TokenTable, cache_dir, digest, write_folder
from data.tokens import TokenRow

LEGS = ("chosen", "rejected")


def token_row(prompt=(1, 2), chosen=(3, 4), rejected=(5,), source="d", index=0) -> TokenRow:
    return TokenRow(prompt=prompt, legs={"chosen": chosen, "rejected": rejected}, source=source, index=index)


ROWS = [token_row(), token_row((6,), (7,), (8, 9, 10)), token_row((2, 2), (3,), (4,))]


def as_lists(table: TokenTable):
    return {
        "prompt": [table.prompts[i].tolist() for i in range(len(table))],
        **{name: [leg[i].tolist() for i in range(len(table))] for name, leg in table.legs.items()},
    }


ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5).map(tuple)


@given(contents=st.lists(st.tuples(ids, ids, ids), max_size=6))
def test_tables_come_back_from_disk(tmp_path_factory, contents):
    rows = [token_row(*content) for content in contents]
    table = TokenTable.of(rows, LEGS)
    folder = tmp_path_factory.mktemp("table")
    table.save(folder)
    loaded = TokenTable.load(folder)
    assert len(loaded) == len(rows)
    assert as_lists(loaded) == as_lists(table)
    assert as_lists(table)["chosen"] == [list(row.legs["chosen"]) for row in rows]
    assert loaded.fingerprint() == table.fingerprint()


LABELLED = [dataclasses.replace(row, label=label) for row, label in zip(ROWS, (True, False, True), strict=True)]


def test_labels_come_back_from_disk(tmp_path):
    table = TokenTable.of(LABELLED, LEGS)
    table.save(tmp_path)
    loaded = TokenTable.load(tmp_path)
    assert loaded.labels is not None
    assert (loaded.labels.dtype, loaded.labels.tolist()) == (np.dtype(bool), [True, False, True])
    assert loaded.fingerprint() == table.fingerprint()
    taken = loaded.take(np.array([1, 2, 1])).labels
    assert taken is not None
    assert taken.tolist() == [False, True, False]
    assert TokenTable.of(ROWS, LEGS).labels is None
    assert TokenTable.of(ROWS, LEGS).take(np.array([0])).labels is None
    with pytest.raises(AssertionError, match="only some"):
        TokenTable.of([LABELLED[0], *ROWS], LEGS)


def test_labels_are_part_of_a_tables_fingerprint():
    flipped = [dataclasses.replace(row, label=not row.label) for row in LABELLED]
    tables = [TokenTable.of(rows, LEGS) for rows in (ROWS, LABELLED, flipped)]
    assert len({table.fingerprint() for table in tables}) == 3


def test_arrays_are_mapped_not_read(tmp_path):
    TokenTable.of(ROWS, LEGS).save(tmp_path)
    loaded = TokenTable.load(tmp_path)
    assert isinstance(loaded.prompts.values, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        loaded.prompts.values[0] = 1


def test_lengths():
    """Prompt + both responses when shared; each response's copy of the prompt, padded to the longer, when not."""
    table = TokenTable.of(ROWS, LEGS)
    assert table.shared_lengths().tolist() == [5, 5, 4]
    assert table.separate_lengths().tolist() == [2 * (2 + 2), 2 * (1 + 3), 2 * (2 + 1)]


def test_take_picks_rows_in_the_order_asked_for():
    table = TokenTable.of(ROWS, LEGS)
    assert as_lists(table.take(np.array([2, 0, 2]))) == as_lists(TokenTable.of([ROWS[2], ROWS[0], ROWS[2]], LEGS))
    assert len(table.take(np.array([], dtype=np.int64))) == 0


@pytest.mark.parametrize(
    "changed",
    [
        [token_row((1, 3)), *ROWS[1:]],
        [token_row(chosen=(3, 5)), *ROWS[1:]],
        [token_row(rejected=(6,)), *ROWS[1:]],
        [token_row((1, 2, 3), (4,)), *ROWS[1:]],  # the same ids in the same order, the boundary one later
        [token_row(chosen=(5,), rejected=(3, 4)), *ROWS[1:]],
        [ROWS[1], ROWS[0], ROWS[2]],
        ROWS[:2],
        [],
    ],
    ids=["prompt", "chosen", "rejected", "boundary", "swapped", "order", "fewer", "none"],
)
def test_a_fingerprint_sees_every_token_and_boundary(changed):
    assert TokenTable.of(changed, LEGS).fingerprint() != TokenTable.of(ROWS, LEGS).fingerprint()


def test_a_fingerprint_sees_where_one_row_ends_and_the_next_begins():
    one = TokenTable.of([token_row((1, 2), (9,), (9,)), token_row((3,), (9,), (9,))], LEGS)
    other = TokenTable.of([token_row((1,), (9,), (9,)), token_row((2, 3), (9,), (9,))], LEGS)
    assert one.fingerprint() != other.fingerprint()


def test_a_fingerprint_sees_which_legs_there_are():
    whole, half = TokenTable.of(ROWS, LEGS), TokenTable.of(ROWS, ("chosen",))
    renamed = TokenTable(whole.prompts, {"chosen": whole.legs["chosen"], "gold": whole.legs["rejected"]})
    assert len({whole.fingerprint(), half.fingerprint(), renamed.fingerprint()}) == 3


def test_a_fingerprint_sees_nothing_else(tmp_path):
    table = TokenTable.of(ROWS, LEGS)
    moved = [dataclasses.replace(row, source="elsewhere", index=row.index + 7) for row in ROWS]
    assert TokenTable.of(moved, LEGS).fingerprint() == table.fingerprint()
    assert TokenTable.of(ROWS, LEGS[::-1]).fingerprint() == table.fingerprint()
    assert table.take(np.arange(3)).fingerprint() == table.fingerprint()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("ab", "c"), ("a", "bc")),
        ((["a"],), ("a",)),
        ((1,), ("1",)),
        ((), ("",)),
        (({"a": 1, "b": 2},), ({"a": 2, "b": 1},)),
    ],
)
def test_different_parts_have_different_digests(one, other):
    assert digest(*one) != digest(*other)


def test_the_order_of_keys_does_not_matter_and_digests_stay_as_they_are():
    """A changed digest would orphan every cache; then ``FORMAT`` is the place to say so."""
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest("prompt", [1, 2.5, None], b"bytes") == "8095a93c63092e68199f9a231b3a67b3"


def test_ragged_takes_no_sequences_and_empty_ones():
    assert len(Ragged.of([])) == 0
    ragged = Ragged.of([[], [1, 2], []])
    assert [ragged[i].tolist() for i in range(3)] == [[], [1, 2], []]
    assert ragged.lengths().tolist() == [0, 2, 0]


def test_a_folder_appears_complete(tmp_path):
    seen = []

    def fill(folder: Path) -> None:
        (folder / "part").write_text("1")
        seen.append((tmp_path / "a" / "new").exists())

    write_folder(tmp_path / "a" / "new", fill)
    assert seen == [False], "while it is filled it is not there yet"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["new"]
    assert (tmp_path / "a" / "new" / "part").read_text() == "1"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [None, "old"])
def test_a_folder_that_fails_leaves_what_was_there(tmp_path, error, before):
    folder = tmp_path / "made"
    if before is not None:
        write_folder(folder, lambda path: (path / "part").write_text(before) and None)

    def fill(path: Path) -> None:
        (path / "part").write_text("half")
        raise error

    with pytest.raises(error):
        write_folder(folder, fill)
    assert [path.name for path in tmp_path.iterdir()] == ([] if before is None else ["made"])
    if before is not None:
        assert (folder / "part").read_text() == before


def test_a_folder_is_replaced_whole(tmp_path):
    folder = tmp_path / "made"
    write_folder(folder, lambda path: (path / "old").touch())
    write_folder(folder, lambda path: (path / "new").touch())
    assert [path.name for path in folder.iterdir()] == ["new"]


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.setenv("ALIGN_CACHE", "")
    assert cache_dir() == Path.home() / ".cache" / "align"
