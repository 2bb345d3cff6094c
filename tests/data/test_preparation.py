"""From files to token tables: what is held out, when the cache is used, what the report says."""

from __future__ import annotations

import json
import multiprocessing
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

import data.preparation as preparation
from data.errors import DataError
from data.preparation import hold_out, prepare, read_sources, tokenizer_fingerprint
from data.sources import Source
from data.tokens import TokenPolicy
from objectives.rows import Row
from tests.data.byte_level import byte_level
from tests.data.preparing import a_spec, prepare_slowly

PAIRS = [{"prompt": f"{i}+1 is", "chosen": f" {i + 1}", "rejected": f" {i - 1}"} for i in range(20)]
TRIPLES = [pair | {"gold": f" {i}+1"} for i, pair in enumerate(PAIRS)]
TEMPLATE = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}{{ '>' }}{% endif %}"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tokenized(monkeypatch):
    """The row numbers of every tokenisation that took place."""
    calls = []
    tokenize_rows = preparation.tokenize_rows

    def noted(rows, *args):
        calls.append([row.index for row in rows])
        return tokenize_rows(rows, *args)

    monkeypatch.setattr(preparation, "tokenize_rows", noted)
    return calls


def write(path, rows=PAIRS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prompts_of(split):
    return {tuple(split.table.prompts[i].tolist()) for i in range(len(split.table))}


# Holding out


def rows_of(prompts):
    return [Row(prompt=f"p{p}", responses={"chosen": f"{i}"}, index=i) for i, p in enumerate(prompts)]


@given(st.lists(st.integers(0, 9), max_size=40), st.floats(0, 0.5), st.integers(0, 5))
def test_no_prompt_is_on_both_sides(prompts, share, seed):
    train, held = hold_out(rows_of(prompts), share, seed)
    assert not {row.prompt for row in train} & {row.prompt for row in held}
    assert sorted(row.index for row in [*train, *held]) == list(range(len(prompts))), "nothing is lost"
    for side in (train, held):
        assert [row.index for row in side] == sorted(row.index for row in side), "order is kept"


@pytest.mark.parametrize(
    ("number", "share", "expected"),
    [(100, 0.05, 5), (100, 0.5, 50), (100, 0.0, 0), (30, 0.01, 1), (3, 0.5, 2), (2, 0.5, 1), (1, 0.5, 0), (0, 0.5, 0)],
)
def test_how_many_prompts_are_held_out(number, share, expected):
    """A share of the prompts, not of the rows; at least one and never all where there are two."""
    rows = rows_of([p for p in range(number) for _ in range(1 + p % 3)])
    train, held = hold_out(rows, share, seed=0)
    assert len({row.prompt for row in held}) == expected
    assert len({row.prompt for row in train}) == number - expected


def test_what_is_held_out_depends_on_the_seed_alone():
    rows = rows_of(range(100))
    assert hold_out(rows, 0.2, 3) == hold_out(rows, 0.2, 3)
    assert hold_out(rows, 0.2, 3) != hold_out(rows, 0.2, 4)


def test_messages_are_prompts_too():
    prompt = ({"role": "user", "content": "hi"},)
    rows = [Row(prompt=prompt, responses={}, index=0), Row(prompt="hi", responses={}, index=1)]
    rows += [Row(prompt=({"content": "hi", "role": "user"},), responses={}, index=2)]
    sides = [{row.index for row in side} for side in hold_out(rows, 0.5, 0)]
    assert {0, 2} in sides, "the same message with its keys in another order is the same prompt"


# The cache


def test_the_same_content_is_tokenised_once(tmp_path, tokenized):
    spec = a_spec(write(tmp_path / "a.jsonl"))
    first = prepare(spec, byte_level())
    assert sorted(i for call in tokenized for i in call) == list(range(20))
    again = prepare(spec, byte_level())
    assert len(tokenized) == 2, "train and eval, once each"
    assert again.report == first.report
    assert again.train.table.fingerprint() == first.train.table.fingerprint()
    assert (again.train.where, again.train.prompts.tolist()) == (first.train.where, first.train.prompts.tolist())


def test_using_a_tokenizer_does_not_change_it(tmp_path, tokenized):
    """Cutting and padding leave their settings in a tokenizer."""
    spec, tokenizer = a_spec(write(tmp_path / "a.jsonl")), byte_level()
    prepare(spec, tokenizer)
    tokenizer("some text", truncation=True, max_length=3)
    prepare(spec, tokenizer)
    assert len(tokenized) == 2


INGREDIENTS = {
    "a response": lambda path: write(path, [PAIRS[0] | {"rejected": " x"}, *PAIRS[1:]]),
    "a prompt": lambda path: write(path, [PAIRS[0] | {"prompt": "x"}, *PAIRS[1:]]),
    "a score": lambda path: write(path, [PAIRS[0] | {"score_chosen": 1, "score_rejected": 0}, *PAIRS[1:]]),
    "order": lambda path: write(path, PAIRS[::-1]),
    "one row less": lambda path: write(path, PAIRS[1:]),
    "an unusable row": lambda path: write(path, [*PAIRS, {"prompt": "p", "chosen": None, "rejected": "r"}]),
}


@pytest.mark.parametrize("change", INGREDIENTS)
def test_the_key_sees_the_rows(tmp_path, tokenized, change):
    path = write(tmp_path / "a.jsonl")
    before = prepare(a_spec(path), byte_level()).report
    INGREDIENTS[change](path)
    assert prepare(a_spec(path), byte_level()).report["rows"]["read"] in (19, 20, 21)
    assert len(tokenized) == 4
    write(path)
    assert prepare(a_spec(path), byte_level()).report == before
    assert len(tokenized) == 4, "what was prepared before is still there"


@pytest.mark.parametrize(
    "changed",
    [
        {"policy": TokenPolicy(max_length=199)},
        {"policy": TokenPolicy(max_length=200, truncation="drop")},
        {"legs": ("chosen",)},
        {"legs": ("chosen", "rejected", "gold")},
        {"seed": 1},
        {"eval_share": 0.5},
        {"eval_share": 0.0},
        {"max_rows": 19},
    ],
    ids=["max_length", "truncation", "fewer legs", "more legs", "seed", "eval_share", "no eval", "max_rows"],
)
def test_the_key_sees_what_is_asked_for(tmp_path, tokenized, changed):
    path = write(tmp_path / "a.jsonl", TRIPLES)
    prepare(a_spec(path), byte_level())
    prepare(a_spec(path, **changed), byte_level())
    assert len(tokenized) == 4


@pytest.mark.parametrize(
    "other",
    [
        byte_level(merges=[("1", "1")]),
        byte_level(adds_bos=True),
        byte_level(eos_token="<|im_end|>"),
        byte_level(bos_token=None),
        byte_level(template=TEMPLATE),
    ],
    ids=["merges", "post-processing", "end token", "beginning token", "template"],
)
def test_the_key_sees_the_tokenizer(tmp_path, tokenized, other):
    path = write(tmp_path / "a.jsonl")
    prepare(a_spec(path), byte_level())
    prepare(a_spec(path), other)
    assert len(tokenized) == 4
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(byte_level())


def test_the_key_sees_the_evaluation_set(tmp_path, tokenized):
    path, held = write(tmp_path / "a.jsonl"), write(tmp_path / "held.jsonl", PAIRS[:3])
    spec = a_spec(path, eval=Source(dataset_name=str(held)))
    prepare(spec, byte_level())
    write(held, PAIRS[:4])
    assert prepare(spec, byte_level()).report["rows"]["eval"] == 4


def test_the_key_sees_the_format_of_what_is_stored(tmp_path, tokenized, monkeypatch):
    path = write(tmp_path / "a.jsonl")
    prepare(a_spec(path), byte_level())
    monkeypatch.setattr(preparation, "FORMAT", preparation.FORMAT + 1)
    prepare(a_spec(path), byte_level())
    assert len(tokenized) == 4


def test_the_key_sees_nothing_that_changes_no_table(tmp_path, tokenized):
    path = write(tmp_path / "a.jsonl")
    prepare(a_spec(path), byte_level())
    prepare(a_spec(path, max_dropped_share=0.1, max_rows=20), byte_level())
    assert len(tokenized) == 2


def test_an_interrupted_preparation_leaves_nothing_behind(tmp_path, monkeypatch, tokenized):
    spec = a_spec(write(tmp_path / "a.jsonl"))
    token_totals = preparation._token_totals
    monkeypatch.setattr(preparation, "_token_totals", lambda tables: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(spec, byte_level())
    assert [path for path in (tmp_path / "cache" / "rows").iterdir() if path.is_dir()] == []
    monkeypatch.setattr(preparation, "_token_totals", token_totals)
    assert prepare(spec, byte_level()).report["rows"]["kept"] == 20


def test_two_processes_prepare_once(tmp_path):
    """Both arrive together; one works, the other waits and maps what it wrote."""
    path, log = write(tmp_path / "a.jsonl"), tmp_path / "log"
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    arguments = (str(path), str(tmp_path / "cache"), str(log), start)
    processes = [context.Process(target=prepare_slowly, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0]
    workers = log.read_text().split()
    assert len(workers) == 2, "train and eval, once each"
    assert len(set(workers)) == 1, "by the same process"
    assert len({(tmp_path / f"log.{process.pid}").read_text() for process in processes}) == 1


# The report


MIXED = [
    *PAIRS[:16],
    {"prompt": "p", "chosen": None, "rejected": "r"},  # unusable as a row
    {"prompt": "q", "chosen": " same", "rejected": " same"},  # unusable as a pair
    {"prompt": "q", "chosen": " a</s>b", "rejected": " c"},  # unusable as tokens
    {"prompt": "long", "chosen": " " + "c" * 60, "rejected": " " + "r" * 30},  # cut
    PAIRS[3],  # twice
]


def test_counts_add_up(tmp_path):
    report = prepare(a_spec(write(tmp_path / "a.jsonl", MIXED), policy=TokenPolicy(max_length=50)), byte_level()).report
    rows = report["rows"]
    assert rows["read"] == len(MIXED) == rows["kept"] + sum(report["dropped"].values())
    assert rows["kept"] == rows["train"] + rows["eval"] == 18
    assert report["dropped"]["the chosen response contains the end token before its end"] == 1
    assert Counter(row["reason"] for row in report["dropped_rows"]) == report["dropped"]
    assert {row["index"] for row in report["dropped_rows"]} == {16, 17, 18}
    assert report["truncated"] == report["terminator_lost"] == {"chosen": 1}
    assert report["tokens_lost"] == {"chosen": 62 - 46}
    assert report["terminator_added"] == {"chosen": 18, "rejected": 18}, "of the rows that are kept"
    assert report["duplicate_rows"] == 1
    assert (report["max_length"], report["truncation"]) == (50, "truncate_response_end")
    assert report["formats"] == ["paired"]


def test_tokens_and_places_are_those_of_the_tables(tmp_path):
    path = write(tmp_path / "a.jsonl", MIXED)
    prepared = prepare(a_spec(path), byte_level())
    splits = [prepared.train, prepared.eval]
    for name in ("chosen", "rejected"):
        total = sum(int(split.table.legs[name].lengths().sum()) for split in splits)
        assert prepared.report["tokens"][name] == total
    assert prepared.report["tokens"]["prompt"] == sum(int(s.table.prompts.lengths().sum()) for s in splits)
    tokenizer = byte_level()
    for split in splits:
        assert len(split.where) == len(split.prompts) == len(split.table)
        for i, (source, index) in enumerate(split.where):
            assert tokenizer.decode(split.table.prompts[i]) == MIXED[index]["prompt"]
            assert split.name(i) == f"{source}, row {index}" == f"{path}, row {index}"


def test_rows_of_one_prompt_form_a_cluster(tmp_path):
    rows = [PAIRS[0], PAIRS[1], PAIRS[0] | {"chosen": " one"}, PAIRS[2]]
    train = prepare(a_spec(write(tmp_path / "a.jsonl", rows), eval_share=0.0), byte_level()).train
    assert train.prompts.tolist() == [0, 1, 0, 2]


def test_without_a_held_out_share_there_is_no_evaluation(tmp_path):
    prepared = prepare(a_spec(write(tmp_path / "a.jsonl"), eval_share=0.0), byte_level())
    assert prepared.eval is None
    assert prepared.report["rows"] == {"read": 20, "kept": 20, "train": 20, "eval": 0}


def test_the_hash_is_of_the_tokens(tmp_path):
    one = prepare(a_spec(write(tmp_path / "a.jsonl")), byte_level()).report["dataset_hash"]
    assert prepare(a_spec(write(tmp_path / "b.jsonl")), byte_level()).report["dataset_hash"] == one
    assert prepare(a_spec(write(tmp_path / "c.jsonl", TRIPLES[:19])), byte_level()).report["dataset_hash"] != one


def test_a_given_evaluation_set_is_taken_whole_and_its_overlap_counted(tmp_path):
    held = Source(dataset_name=str(write(tmp_path / "held.jsonl", [*PAIRS[5:8], MIXED[19]])))
    prepared = prepare(a_spec(write(tmp_path / "a.jsonl"), eval=held), byte_level())
    assert prepared.report["rows"] == {"read": 24, "kept": 24, "train": 20, "eval": 4}
    assert prepared.report["eval_prompts_in_training"] == 3
    assert prepared.report["formats"] == ["paired", "paired"]
    assert [source for source, _ in prepared.eval.where] == [held.dataset_name] * 4


def test_held_out_prompts_are_not_in_training(tmp_path):
    rows = [pair | {"chosen": f"{pair['chosen']}{n}"} for pair in PAIRS for n in range(3)]
    prepared = prepare(a_spec(write(tmp_path / "a.jsonl", rows)), byte_level())
    assert prepared.report["eval_prompts_in_training"] == 0
    assert prepared.report["rows"]["eval"] == 15
    assert not prompts_of(prepared.train) & prompts_of(prepared.eval)


def test_several_datasets_are_mixed_by_weight(tmp_path):
    """All of one, half of another, two copies of a third; what is held out is evaluated once, whatever its weight."""
    names = [write(tmp_path / f"{i}.jsonl", PAIRS[4 * i : 4 * i + 4]) for i in range(3)]
    sources = tuple(
        Source(dataset_name=str(name), weight=weight) for name, weight in zip(names, (1, 0.5, 2), strict=True)
    )
    whole = prepare(a_spec(train=sources, eval_share=0.0), byte_level())
    assert Counter(source for source, _ in whole.train.where) == dict(zip(map(str, names), (4, 2, 8), strict=True))
    assert whole.report["rows"] == {"read": 12, "kept": 14, "train": 14, "eval": 0}
    prepared = prepare(a_spec(train=sources, eval_share=0.5), byte_level())
    assert prepared.eval is not None
    assert set(Counter(prepared.eval.where).values()) == {1}
    assert not prompts_of(prepared.train) & prompts_of(prepared.eval)
    assert prepared.report["rows"]["read"] == 12


def test_max_rows_limits_every_dataset(tmp_path):
    spec = a_spec(write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl"), max_rows=3, eval_share=0.0)
    train, held, loaded = read_sources(spec)
    assert (len(train), len(held), [len(each.rows) for each in loaded]) == (6, 0, [3, 3])
    assert [row.index for row in train] == [0, 1, 2] * 2
    given_ = a_spec(tmp_path / "a.jsonl", max_rows=3, eval=Source(dataset_name=str(tmp_path / "b.jsonl")))
    assert len(read_sources(given_)[1]) == 3


# What is refused


def refused(spec, tokenizer=None) -> str:
    with pytest.raises(DataError) as caught:
        prepare(spec, tokenizer or byte_level())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_losing_more_than_agreed_is_refused(tmp_path):
    """Two of five rows: refused at a third, taken at two fifths."""
    rows = [*PAIRS[:3], PAIRS[3] | {"chosen": "c" * 300}, PAIRS[4] | {"chosen": "c" * 300}]
    spec = a_spec(write(tmp_path / "a.jsonl", rows), policy=TokenPolicy(max_length=50, truncation="drop"))
    tight = a_spec(tmp_path / "a.jsonl", policy=spec.policy, max_dropped_share=1 / 3)
    assert refused(tight) == (
        f"{tmp_path / 'a.jsonl'}: 40% of 5 rows can't be used (2 × longer than max_length); mend the data, raise "
        "data.max_length, or accept it with data.max_dropped_share 0.41"
    )
    agreed = a_spec(tmp_path / "a.jsonl", policy=spec.policy, max_dropped_share=0.41)
    assert prepare(agreed, byte_level()).report["rows"]["kept"] == 3, "the remedy of the message works"
    assert refused(tight).startswith(str(tmp_path)), "from the cache as well"


def test_nothing_to_train_on_is_refused(tmp_path):
    spec = a_spec(write(tmp_path / "a.jsonl"), policy=TokenPolicy(max_length=3), max_dropped_share=1.0)
    assert refused(spec) == (
        f"{tmp_path / 'a.jsonl'}: no row can be trained on (20 × the prompt leaves fewer than 16 response tokens); "
        "mend the data, or raise data.max_length (3)"
    )


def test_a_given_evaluation_set_of_which_nothing_is_left_is_refused(tmp_path):
    """Else the run would go on without the evaluation that was asked for."""
    held = Source(dataset_name=str(write(tmp_path / "held.jsonl", [PAIRS[0] | {"prompt": "p" * 300}])))
    assert refused(a_spec(write(tmp_path / "a.jsonl"), eval=held)).startswith(
        f"{tmp_path / 'held.jsonl'}: no row can be evaluated on"
    )


def test_a_missing_leg_names_the_row(tmp_path):
    message = refused(a_spec(write(tmp_path / "a.jsonl"), legs=("chosen", "gold")))
    assert message.startswith(f"{tmp_path / 'a.jsonl'}, row ")
    assert "needs a 'gold' response" in message
