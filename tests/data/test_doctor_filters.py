"""Filters on planted rows: which leave, that they leave once, and the same ones in a run and in ``--write``."""

from __future__ import annotations

import gzip
import json
import math
import random
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.clean import write_clean
from data.duplicates import banding, later_copies, near_copies
from data.errors import DataError
from data.filtering import filtered, leaving, surveyed
from data.filters import (
    FILTERS,
    Ches,
    Contradictions,
    Echo,
    ExactDuplicates,
    IdenticalPairs,
    LabelNoise,
    LengthRatio,
    NearDuplicates,
    Overlap,
    SameAnswers,
    SharedWithEval,
)
from data.gathering import load
from data.preparation import prepare
from data.rowstore import RowStore
from data.shingles import grams
from data.sources import LoadedRows, Source, load_rows
from data.traits import Look, traits_of
from data.workers import Workers
from objectives.registry import example
from objectives.rows import Row
from tests.data.byte_level import byte_level
from tests.data.planted import altered, near_by_brute_force, pairs, sentence, shingles, survey, write
from tests.data.preparing import a_spec

pytest.importorskip("rensa", reason="near duplicates take the package rensa")

A, B, C, D = pairs(4)
SWAPPED = {**A, "chosen": A["rejected"], "rejected": A["chosen"]}
ECHO = {**B, "chosen": f"  {B['prompt'].replace(' ', '  ')} and so on"}
CASE = {**C, "rejected": C["chosen"].upper().replace(" ", "\n")}
LONG = {**D, "rejected": D["chosen"] * 5}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))


def gone(rows, *filters):
    return np.flatnonzero(leaving(filters, rows) >= 0).tolist()


@pytest.mark.parametrize(
    ("each", "rows", "expected"),
    [
        (ExactDuplicates(), [A, B, A, A, SWAPPED, B], [2, 3, 5]),
        (ExactDuplicates(), [{**A, "score_chosen": 1, "score_rejected": 0}, A], []),
        (Contradictions(), [A, B, SWAPPED, C, A], [0, 2, 4]),
        (IdenticalPairs(), [A, CASE, B], [1]),
        (LengthRatio(most=4), [A, LONG, B], [1]),
        (LengthRatio(most=5.1), [A, LONG, B], []),
        (Echo(), [A, ECHO, C], [1]),
        (SameAnswers(), [A, {**A, "rejected": " x"}, B, {**B, "prompt": A["prompt"]}, A], [1, 4]),
        # the third row shares a response only with one that leaves
        (SameAnswers(), [A, {**A, "rejected": " x"}, {**A, "chosen": " x", "rejected": " y"}], [1]),
        (NearDuplicates(), [A, B, A, {**A, "rejected": B["rejected"]}], [2]),
        (NearDuplicates(), [A, {**A, "prompt": A["prompt"].upper() + "!"}, SWAPPED], [1]),
    ],
)
def test_what_leaves(tmp_path, each, rows, expected):
    assert gone(survey(write(tmp_path / "a.jsonl", rows)), each) == expected


def test_one_completion_with_both_labels(tmp_path):
    rows = [
        {"prompt": "p", "completion": " yes it is", "label": True},
        {"prompt": "p", "completion": " yes it is", "label": False},
        {"prompt": "q", "completion": " yes it is", "label": False},
        {"prompt": "p", "completion": " yes it is", "label": True},
    ]
    assert gone(survey(write(tmp_path / "a.jsonl", rows)), Contradictions()) == [0, 1, 3]


def test_prompts_of_the_evaluation_set_leave_and_those_held_out_have_no_such(tmp_path):
    path, held = write(tmp_path / "a.jsonl", [A, B, C, B]), write(tmp_path / "held.jsonl", [D, {**B, "chosen": " x"}])
    assert gone(survey(path, held=held), SharedWithEval()) == [1, 3]
    with pytest.raises(DataError, match=r"filter shared_with_eval has no effect on .*no data.eval_dataset_name"):
        gone(survey(path), SharedWithEval())


def test_words_of_an_evaluation_set(tmp_path):
    """13 words in a row, whatever their case; five words only as a whole text."""
    words = [sentence(random.Random(100 + i), 40).split() for i in range(3)]
    tests = [
        {"question": " ".join(words[0][:20]), "choices": [{"deep": "One two, three four five!"}], "id": 7},
        {"question": "four words, not more"},
    ]
    rows = [
        {**A, "prompt": " ".join(words[0][:13]).upper() + "!"},
        {**A, "prompt": " ".join([*words[0][:12], "else", *words[0][13:25]])},
        {**A, "chosen": " ".join([*words[1][:5], *words[0][5:18]])},
        {**A, "prompt": "one two three four five"},
        {**A, "prompt": "one two three four five six"},
        {**A, "prompt": "four words not more"},
    ]
    against = write(tmp_path / "test.jsonl", tests)
    rows = survey(write(tmp_path / "a.jsonl", rows))
    assert gone(rows, Overlap(against=(str(against),))) == [0, 2, 3]
    assert gone(rows, Overlap(against=(str(against),), ngram=12)) == [0, 1, 2, 3]
    write(against, [{"question": "too few words"}])
    with pytest.raises(DataError, match="no text of at least 5 words"):
        gone(rows, Overlap(against=(str(against),)))
    with pytest.raises(DataError, match="no such file"):
        gone(rows, Overlap(against=(str(tmp_path / "none.jsonl"),)))


# Near duplicates


@pytest.mark.slow
def test_near_duplicates_as_by_brute_force(tmp_path):
    """Every row that leaves is near one that stays; of those that brute force finds nearly all are found."""
    rng = random.Random(3)
    rows = pairs(120, seed=1)
    for _ in range(180):
        base = rows[rng.randrange(120)]
        rows.append({key: altered(text, rng.randrange(4), rng) for key, text in base.items()})
    found = set(gone(survey(write(tmp_path / "a.jsonl", rows)), NearDuplicates(threshold=0.6, ngram=2)))
    expected = near_by_brute_force(rows, 0.6, 2)
    assert len(expected) > 40
    assert len(found & expected) >= 0.97 * len(expected)
    assert len(found - expected) <= 0.03 * len(expected), "only what a missed pair lets stay can make another one leave"


def test_the_threshold_is_where_it_says(tmp_path):
    """A response of 22 words with one exchanged: 20 shingles of 3, of which 3 differ: J = 17 / 23 = 0.739."""
    words = [f"w{i}" for i in range(22)]
    one = {**A, "chosen": " ".join(words), "rejected": " other words than those"}
    two = {**one, "chosen": " ".join([*words[:10], "x", *words[11:]])}
    assert len(shingles(one["chosen"], 3) & shingles(two["chosen"], 3)) / 23 == 17 / 23
    rows = survey(write(tmp_path / "a.jsonl", [one, two]))
    assert gone(rows, NearDuplicates(threshold=17 / 23)) == [1]
    assert gone(rows, NearDuplicates(threshold=17 / 23 + 1e-6)) == []


def test_bands():
    """1 − (1 − 0.8⁶)²¹ = 0.998; with bands of 7 it would be 0.984."""
    assert banding(0.8) == (21, 6)
    assert 1 - (1 - 0.8**6) ** 21 > 0.995 > 1 - (1 - 0.8**7) ** 18
    assert banding(1.0) == (1, 128)
    for threshold in (0.5, 0.6, 0.7, 0.9, 0.95):
        b, r = banding(threshold)
        assert b * r <= 128
        assert 1 - (1 - threshold**r) ** b >= 0.995


@given(st.lists(st.text(alphabet="ab cé你\u0301.\n", max_size=30), min_size=1, max_size=6), st.integers(1, 6))
def test_grams_are_the_same_where_words_are(texts, n):
    flat, ends = grams(texts, n)
    own = np.split(flat, ends[:-1])
    for i, one in enumerate(texts):
        alone = grams([one], n)[0]
        assert own[i].tolist() == alone.tolist(), "whatever stands beside it"
        for j, other in enumerate(texts):
            words = [re.findall("[你]|[^\\W你]+", text.lower()) for text in (one, other)]
            sets = [{tuple(w[k : k + n]) for k in range(len(w) - n + 1)} or {(n, *w)} for w in words]
            if all(words):
                assert len(set(own[i].tolist()) & set(own[j].tolist())) == len(sets[0] & sets[1])


@pytest.mark.slow
@pytest.mark.parametrize("most", [64, 1], ids=["as it is", "compared with one row only"])
def test_copies_and_idempotence_of_near_copies(tmp_path, monkeypatch, most):
    """However few rows one is compared with: those that stay meet the same ones the second time."""
    monkeypatch.setattr("data.duplicates.MOST_COMPARED", most)
    rng = random.Random(5)
    base = pairs(40, seed=2)
    rows = [{k: altered(v, rng.randrange(3), rng) for k, v in rng.choice(base).items()} for _ in range(200)]
    path = write(tmp_path / "a.jsonl", rows)
    first = gone(survey(path), NearDuplicates(threshold=0.6))
    left = [row for i, row in enumerate(rows) if i not in set(first)]
    assert first
    assert gone(survey(write(tmp_path / "b.jsonl", left)), NearDuplicates(threshold=0.6)) == []


def test_later_copies():
    hashes = np.array([[1, 2], [1, 3], [1, 2], [2, 2], [1, 3]], dtype=np.uint64)
    assert later_copies(hashes).tolist() == [False, False, True, False, True]
    assert later_copies(hashes[:0]).tolist() == []


# Laws


ROWS = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from([A, B, C, SWAPPED, CASE, ECHO, LONG])).map(lambda each: each[1]),
    min_size=1,
    max_size=14,
)
EACH = [ExactDuplicates(), IdenticalPairs(), LengthRatio(), Echo(), Contradictions()]


@pytest.mark.slow
@settings(max_examples=6)
@given(ROWS, st.permutations(EACH), st.randoms())
def test_filters_are_idempotent_and_their_order_does_not_matter(tmp_path_factory, rows, order, rng):
    folder = tmp_path_factory.mktemp("rows")
    stays = lambda rows, filters: [  # noqa: E731
        row for i, row in enumerate(rows) if i not in set(gone(survey(write(folder / "a.jsonl", rows)), *filters))
    ]
    left = stays(rows, EACH)
    assert stays(rows, order) == left
    assert not left or stays(left, EACH) == left
    once = stays(rows, [SameAnswers()])
    answers = [(row["prompt"], text) for row in once for text in {row["chosen"], row["rejected"]}]
    assert len(set(answers)) == len(answers)
    assert stays(once, [SameAnswers()]) == once
    mixed = rng.sample(rows, len(rows))
    for each in EACH:
        number = len(stays(rows, [each]))
        assert len(stays(mixed, [each])) == number, "counts do not depend on the order of the rows"


@pytest.mark.parametrize("name", FILTERS.names())
def test_every_filter_says_what_it_is(name):
    each = example(FILTERS[name])
    assert "leaves(i)" in (type(each).__doc__ or "")
    assert each.reason
    assert each.needs_model is (name in ("ches", "label_noise"))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: NearDuplicates(threshold=0.4), r"threshold must be in \[0.5, 1\]"),
        (lambda: NearDuplicates(ngram=0), r"ngram must be in \[1, 13\]"),
        (lambda: LengthRatio(most=0.5), "most must be >= 1"),
        (lambda: Overlap(against=()), "against must be a list of files"),
        (lambda: Overlap(against=("a",), ngram=4), r"ngram must be in \[5, 50\]"),
        *[(lambda share=share: Ches(share=share), r"share must be in \(0, 1\)") for share in (0, 1, math.nan)],
        *[(lambda share=share: LabelNoise(share=share), r"share must be in \(0, 1\]") for share in (0, 1.1)],
        *[(lambda margin=margin: LabelNoise(margin=margin), "margin must be >= 0") for margin in (-1, math.inf)],
        (lambda: LabelNoise(reward_model=" "), "reward_model must be a folder, a Hub id, or null"),
    ],
)
def test_keys_out_of_range(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_what_can_have_no_effect_is_refused(tmp_path):
    gold = survey(write(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c"}]))
    for each in (IdenticalPairs(), LengthRatio(), Contradictions()):
        with pytest.raises(DataError, match=r"has no effect on .*; leave it out"):
            gone(gold, each)
    source = load_rows(
        Source(dataset_name=str(write(tmp_path / "b.jsonl", [LONG]))), store=RowStore(tmp_path / "store")
    )
    with pytest.raises(DataError, match=r"filter \(length_ratio\) leaves none of its 1 rows"):
        filtered([LengthRatio()], [source], [], Workers(0))


# In a run, and in --write


ROWS_WITH_FAULTS = [A, B, A, ECHO, CASE, LONG, SWAPPED, *pairs(30, seed=9), {"prompt": "p", "chosen": None}]
ALL = (ExactDuplicates(), IdenticalPairs(), LengthRatio(), Echo(), Contradictions(), NearDuplicates())


def test_a_run_drops_and_counts_them(tmp_path):
    spec = a_spec(write(tmp_path / "a.jsonl", ROWS_WITH_FAULTS), filters=ALL)
    report = prepare(spec, byte_level()).report
    assert report["dropped"] == {
        "filter contradictions: another row says the opposite": 2,
        "filter exact_duplicates: the same as an earlier row": 1,
        "filter identical_pairs: chosen and rejected differ in white space or letter case only": 1,
        "filter length_ratio: one response is many times as long as the other": 1,
        "filter echo: a response starts with what was asked": 1,
        "no chosen": 1,
    } | {key: value for key, value in report["dropped"].items() if key.startswith("no ")}
    assert report["rows"]["read"] == len(ROWS_WITH_FAULTS)
    assert report["rows"]["kept"] == 31
    again = prepare(spec, byte_level())
    assert again.report == report, "also from the cache"


@pytest.mark.parametrize("filters", [ALL, ALL[:1], (*ALL[:1], Overlap(against=("test.jsonl",)))], ids=["all", "1", "2"])
def test_write_removes_the_same_rows_as_a_run(tmp_path, monkeypatch, filters):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "a.jsonl", ROWS_WITH_FAULTS)
    write(tmp_path / "test.jsonl", [{"question": B["prompt"]}])
    spec = a_spec(path, filters=filters, eval_share=0.0)
    manifest = write_clean(spec, tmp_path / "clean")
    left = {each["row"]: each["why"] for each in manifest["files"][0]["left"]}
    report = prepare(spec, byte_level()).report
    assert left == {f"{row['source']}, row {row['index']}": row["reason"] for row in report["dropped_rows"]}
    kept = [json.loads(line) for line in (tmp_path / "clean" / "train.jsonl").read_text().splitlines()]
    names = {f"{path}, row {i}" for i in range(len(ROWS_WITH_FAULTS))} - left.keys()
    assert kept == [row for i, row in enumerate(ROWS_WITH_FAULTS) if f"{path}, row {i}" in names]
    clean = prepare(a_spec(tmp_path / "clean" / "train.jsonl", eval_share=0.0), byte_level())
    assert clean.report["dataset_hash"] == report["dataset_hash"], "the same tokens are trained on"


def test_the_cache_sees_filters_and_the_files_they_read(tmp_path):
    path, against = write(tmp_path / "a.jsonl", [A, B, A, C, D]), tmp_path / "test.jsonl"
    kept = lambda *filters: prepare(a_spec(path, filters=filters), byte_level()).report["rows"]["kept"]  # noqa: E731
    assert (kept(), kept(ExactDuplicates()), kept()) == (5, 4, 5)
    assert (kept(LengthRatio(most=1.0)), kept(LengthRatio(most=2.0))) == (5, 5)
    write(against, [{"question": B["prompt"]}])
    assert kept(Overlap(against=(str(against),))) == 4
    write(against, [{"question": B["prompt"]}, {"question": C["prompt"]}])
    assert kept(Overlap(against=(str(against),))) == 3, "another content of the same file"


def test_several_datasets_count_as_one(tmp_path):
    first, second = write(tmp_path / "a.jsonl", [A, B]), write(tmp_path / "b.jsonl", [C, A])
    with RowStore(tmp_path / "store") as store:
        loaded, _ = load(a_spec(first, second, filters=(ExactDuplicates(),)), Workers(0), store)
        assert [len(each.rows) for each in loaded] == [2, 1]
        assert str(loaded[1].problems[0]) == f"{second}, row 1: filter exact_duplicates: the same as an earlier row"


@pytest.mark.slow
def test_workers_find_the_same(tmp_path):
    """In processes, of rows on disk."""
    rows = [*pairs(5990, seed=4), *[A] * 7, ECHO, SWAPPED, CASE]
    path = write(tmp_path / "a.jsonl", rows)
    found = []
    for number in (0, 2):
        with Workers(number) as workers, RowStore(tmp_path / "store") as store:
            source = load_rows(Source(dataset_name=str(path)), store=store, workers=workers)
            assert store.path is not None
            found.append(leaving(ALL, surveyed([source], [], workers)).tolist())
    assert found[0] == found[1]
    assert Counter(found[0])[0] == 6


# Real data


def lines(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.slow
def test_real_pairs_with_copies(tmp_path, shared):
    """HH rows have no copies; 50 planted ones, and 50 with another last word, are found among them."""
    rows = lines(shared / "data" / "hh_harmless.jsonl.gz")
    usable = [row for row in rows if len(row["chosen"]) > 400 and len(row["rejected"]) > 400][:300]
    near = [{key: f"{text} Indeed" for key, text in row.items()} for row in usable[:50]]
    everything = survey(write(tmp_path / "a.jsonl", [*usable, *usable[50:100], *near]))
    assert gone(everything, ExactDuplicates()) == list(range(300, 350))
    found = gone(everything, NearDuplicates())
    plain = [
        {
            "prompt": row["chosen"].rpartition("\n\nAssistant:")[0],
            "chosen": row["chosen"].rpartition("\n\nAssistant:")[2],
            "rejected": row["rejected"].rpartition("\n\nAssistant:")[2],
        }
        for row in [*usable, *usable[50:100], *near]
    ]
    expected = near_by_brute_force([row for row in plain if row["chosen"].strip()], 0.8, 3)
    assert set(found) == expected
    assert len(expected) > 70


def test_nothing_to_look_at(tmp_path):
    assert len(traits_of([], Look())) == 0
    rows = RowStore(tmp_path / "store").add_rows([Row(prompt="p", responses={})])[:0]
    nothing = surveyed([LoadedRows(source="none", format="paired", rows=rows, problems=[])], [], Workers(0))
    assert near_copies(nothing, np.zeros(0, dtype=bool), threshold=0.8, ngram=3).tolist() == []
