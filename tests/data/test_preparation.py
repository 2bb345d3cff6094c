"""From files to token tables: what is held out, when the cache is used, what the report says."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

import data.preparation as preparation
from data.errors import DataError
from data.preparation import hold_out, prepare, read_sources, tokenizer_fingerprint
from data.shapes import Rule, arrange
from data.sources import Source, load_rows
from data.tokens import TokenPolicy
from objectives.registry import RELABELERS
from objectives.relabel import LeftOut
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

    def noted(rows, *args, **options):
        calls.append([row.index for row in rows])
        return tokenize_rows(rows, *args, **options)

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


def test_more_than_one_prompt_can_be_asked_for():
    rows = rows_of(range(10))
    for least, share, expected in ((1, 0.05, 1), (2, 0.05, 2), (2, 0.95, 8), (9, 0.05, 5), (2, 0.0, 0)):
        assert len(hold_out(rows, share, 0, least=least)[1]) == expected


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


# Labels, rules and relabelers


UNPAIRED = [{"prompt": f"{i}+1 is", "completion": f" {i + i % 2}", "label": i % 2 == 1} for i in range(20)]
SCORED = [
    {"prompt": f"{i}+1 is", "responses": [{"text": f" {i + j}", "score": (j * i) % 7 / 7} for j in range(5)]}
    for i in range(20)
]
LABELS = {"legs": ("completion",), "labels": True}
KTO = {"legs": ("completion", "mismatched"), "labels": True}


def texts_of(split):
    tokenizer = byte_level()
    names = ["prompt", *split.table.legs]
    tables = [split.table.prompts, *split.table.legs.values()]
    return [
        dict(zip(names, [tokenizer.decode(table[i], skip_special_tokens=True) for table in tables], strict=True))
        for i in range(len(split.table))
    ]


def test_labels_reach_tables_and_report(tmp_path):
    prepared = prepare(a_spec(write(tmp_path / "a.jsonl", UNPAIRED), **LABELS), byte_level())
    for split in (prepared.train, prepared.eval):
        assert split.table.labels.tolist() == [UNPAIRED[index]["label"] for _, index in split.where]
        assert split.groups == [""] * len(split.table)
    labels = prepared.train.table.labels
    assert prepared.report["labels"] == {"desirable": int(labels.sum()), "undesirable": int((~labels).sum())}
    assert prepared.report["formats"] == ["unpaired"]
    assert prepare(a_spec(write(tmp_path / "a.jsonl")), byte_level()).report["labels"] is None


def test_pairs_serve_objectives_with_labels(tmp_path):
    prepared = prepare(a_spec(write(tmp_path / "a.jsonl"), **LABELS), byte_level())
    assert prepared.report["labels"] == {"desirable": 15, "undesirable": 15}
    assert prepared.report["rows"] == {"read": 20, "kept": 40, "train": 30, "eval": 10}
    assert prepared.report["shaped"] == {"rows_read": 20, "rows_arranged": 40, "rows_relabelled": 40, "rule": None}
    assert prepared.report["dropped_share"] == 0
    for row, label, (_, index) in zip(
        texts_of(prepared.train), prepared.train.table.labels, prepared.train.where, strict=True
    ):
        assert row == {"prompt": PAIRS[index]["prompt"], "completion": PAIRS[index]["chosen" if label else "rejected"]}
    assert not prompts_of(prepared.train) & prompts_of(prepared.eval)


def test_mismatched_responses_are_of_their_own_side(tmp_path):
    prepared = prepare(a_spec(write(tmp_path / "a.jsonl", UNPAIRED), eval_share=0.05, **KTO), byte_level())
    assert prepared.report["rows"]["eval"] == 2, "one prompt could not be mismatched"
    for split in (prepared.train, prepared.eval):
        rows = texts_of(split)
        assert sorted(row["mismatched"] for row in rows) == sorted(row["completion"] for row in rows)
    assert prepared.report["duplicate_rows"] == 0


def test_a_row_that_occurs_twice_is_counted_whatever_its_mismatched_response(tmp_path):
    spec = a_spec(write(tmp_path / "a.jsonl", [*UNPAIRED, UNPAIRED[0]]), eval_share=0.0, **KTO)
    assert prepare(spec, byte_level()).report["duplicate_rows"] == 1


@pytest.mark.parametrize(
    "rule", [Rule(), Rule(name="margin", margin=0.3), Rule(name="threshold", threshold=0.5)], ids=lambda rule: rule.name
)
def test_rules_reach_tables_and_report(tmp_path, rule):
    prepared = prepare(a_spec(write(tmp_path / "a.jsonl", SCORED), rule=rule, eval_share=0.0), byte_level())
    report = prepared.report
    assert report["shaped"]["rule"] == rule.name
    assert (
        report["rows"]["read"] == 20 == len({index for _, index in prepared.train.where}) + len(report["dropped_rows"])
    )
    assert report["rows"]["train"] == report["shaped"]["rows_arranged"] == len(prepared.train.table)
    assert report["dropped_share"] == pytest.approx(len(report["dropped_rows"]) / 20)
    expected = [
        {"prompt": row.prompt, **row.responses}
        for row in arrange(
            load_rows(Source(dataset_name=str(tmp_path / "a.jsonl"))).rows,
            legs=("chosen", "rejected"),
            labels=False,
            rule=rule,
            seed=0,
        )[0]
    ]
    assert texts_of(prepared.train) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "spec", "changed"),
    [
        (SCORED, {}, {"rule": Rule(name="best_vs_random")}),
        (SCORED, {}, {"rule": Rule(margin=0.8)}),
        (SCORED, {"rule": Rule(name="threshold", threshold=0.5)}, {"rule": Rule(name="threshold", threshold=0.7)}),
        (SCORED, {}, LABELS),
        (UNPAIRED, LABELS, KTO),
        (UNPAIRED, LABELS, {"relabel": (lambda row: [dataclasses.replace(row, label=not row.label)],)}),
        (PAIRS, {}, {"relabel": (lambda row: [dataclasses.replace(row, group="g")],)}),
    ],
    ids=["rule", "margin", "threshold", "labels", "mismatched", "relabelled labels", "groups"],
)
def test_the_key_sees_what_rows_become(tmp_path, tokenized, rows, spec, changed):
    path = write(tmp_path / "a.jsonl", rows)
    prepare(a_spec(path, **spec), byte_level())
    prepare(a_spec(path, **spec), byte_level())
    assert len(tokenized) == 2
    prepare(a_spec(path, **{**spec, **changed}), byte_level())
    assert len(tokenized) == 4


def test_the_key_sees_a_label(tmp_path, tokenized):
    path = write(tmp_path / "a.jsonl", UNPAIRED)
    before = prepare(a_spec(path, **LABELS), byte_level())
    write(path, [UNPAIRED[0] | {"label": True}, *UNPAIRED[1:]])
    assert prepare(a_spec(path, **LABELS), byte_level()).report["dataset_hash"] != before.report["dataset_hash"]
    assert len(tokenized) == 4


def swapped(row):
    """Pairs of even number as they are and the other way round; of odd number not at all."""
    if row.index % 2:
        raise LeftOut("odd")
    responses = {"chosen": row.responses["rejected"], "rejected": row.responses["chosen"]}
    return [row, dataclasses.replace(row, prompt="not: " + row.prompt, responses=responses, group="swapped")]


def test_relabelers_run_after_prompts_are_held_out(tmp_path):
    spec = a_spec(write(tmp_path / "a.jsonl"), relabel=(swapped,), max_dropped_share=0.5)
    prepared = prepare(spec, byte_level())
    report = prepared.report
    assert report["dropped"] == {"odd": 10}
    assert report["dropped_share"] == 0.5
    assert report["shaped"] == {"rows_read": 20, "rows_arranged": 20, "rows_relabelled": 20, "rule": None}
    assert report["rows"] == {
        "read": 20,
        "kept": 20,
        "train": len(prepared.train.table),
        "eval": len(prepared.eval.table),
    }
    for split in (prepared.train, prepared.eval):
        for row, group, (_, index) in zip(texts_of(split), split.groups, split.where, strict=True):
            assert group == ("swapped" if row["prompt"].startswith("not: ") else "")
            assert row["prompt"].removeprefix("not: ") == PAIRS[index]["prompt"]
    plain = [{row["prompt"].removeprefix("not: ") for row in texts_of(s)} for s in (prepared.train, prepared.eval)]
    assert plain[0].isdisjoint(plain[1])


def test_relabelers_follow_each_other(tmp_path):
    again = (lambda row: [dataclasses.replace(row, group=row.group + "x")],) * 2
    prepared = prepare(a_spec(write(tmp_path / "a.jsonl"), relabel=again), byte_level())
    assert set(prepared.train.groups) == {"xx"}


def test_relabelers_get_the_legs_they_rewrite_and_may_refuse(tmp_path):
    """From scored lists too, where the objective takes the best response alone."""
    relabel = (RELABELERS["reward_augmented"](form="text", lowest=0.0, highest=1.0),)
    prepared = prepare(a_spec(write(tmp_path / "a.jsonl", SCORED), relabel=relabel, legs=("chosen",)), byte_level())
    assert set(prepared.train.groups) == {"goal=chosen", "goal=rejected"}
    assert refused(a_spec(write(tmp_path / "b.jsonl"), relabel=relabel)).startswith(f"{tmp_path / 'b.jsonl'}, row ")
    said = refused(a_spec(write(tmp_path / "a.jsonl", SCORED), relabel=relabel, **LABELS))
    assert said.startswith("relabel rewrites chosen and rejected, and the objective learns from single labelled")


def test_weights_apply_to_what_rows_become(tmp_path):
    sources = tuple(
        Source(dataset_name=str(write(tmp_path / f"{i}.jsonl", rows)), weight=weight)
        for i, (rows, weight) in enumerate([(PAIRS, 0.5), (UNPAIRED, 2)])
    )
    report = prepare(a_spec(train=sources, eval_share=0.0, **LABELS), byte_level()).report
    assert report["rows"]["train"] == 20 + 40
    assert report["formats"] == ["paired", "unpaired"]


def test_streams_are_prepared_like_files(tmp_path, tokenized):
    path = write(tmp_path / "a.jsonl")
    source = Source(dataset_name=str(path), streaming=True)
    assert prepare(a_spec(train=(source,), max_rows=10), byte_level()).report["rows"]["read"] == 10
    prepare(a_spec(path, max_rows=10), byte_level())
    assert len(tokenized) == 2, "the same rows, so the same key"
    assert "data.streaming needs data.max_rows" in refused(a_spec(train=(source,)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "changes", "said"),
    [
        (
            [row | {"label": True} for row in UNPAIRED],
            LABELS,
            "all 15 training rows have label true, and the objective",
        ),
        ([row | {"label": 0} for row in UNPAIRED], LABELS, "all 15 training rows have label false, and the objective"),
        (SCORED, LABELS | {"rule": Rule(name="threshold", threshold=2.0)}, "all 75 training rows have label false"),
        ([{**row, "prompt": "p"} for row in UNPAIRED], KTO, "all 20 rows have the same prompt"),
        (UNPAIRED[:3], KTO, "all 1 rows have the same prompt, and the objective needs completions of another one"),
        (UNPAIRED[:3], KTO, "add rows with other prompts, raise data.eval_share, or set it to 0"),
        (
            PAIRS,
            {"rule": Rule(margin=0.5)},
            "data.rule, data.threshold, data.margin and data.max_length_ratio say how scored responses",
        ),
        (SCORED, {"legs": ("gold",), "rule": Rule(margin=0.5)}, "data.rule best_vs_worst has no effect: the objective"),
        (
            SCORED,
            LABELS | {"rule": Rule(name="threshold", threshold=0.5, margin=0.1)},
            "data.margin has no effect: with data.rule threshold every response gets a label",
        ),
        (
            SCORED,
            {"rule": Rule(margin=5)},
            "no row can be trained on (17 × scores differ by less than data.margin, 3 × all responses have the same "
            "score); mend the data, change data.rule, or raise data.max_length (200)",
        ),
        (
            SCORED,
            {"rule": Rule(name="threshold", threshold=0.99 * 6 / 7), "max_dropped_share": 0.1},
            "mend the data, change data.rule, raise data.max_length, or accept it with data.max_dropped_share",
        ),
        (
            [{"prompt": "q", "responses": [{"text": t, "score": 0.5} for t in "abc"]}] * 3,
            {},
            "all scores are 0.5, so that no pair",
        ),
    ],
)
def test_what_rules_and_labels_refuse(tmp_path, tokenized, rows, changes, said):
    assert said in refused(a_spec(write(tmp_path / "a.jsonl", rows), **changes))
    assert tokenized == [] or "can be trained on" in said or "max_dropped_share" in said, "before tokenising"


def test_labels_of_which_tokenising_leaves_one_class_are_refused(tmp_path):
    rows = [row | {"completion": " " + "x" * (300 if row["label"] else 1)} for row in UNPAIRED]
    spec = a_spec(write(tmp_path / "a.jsonl", rows), policy=TokenPolicy(max_length=50, truncation="drop"), **LABELS)
    assert "have label false" in refused(spec)


@pytest.mark.slow
def test_real_scores_for_every_objective(tmp_path, shared):
    path = shared / "data" / "alpaca_eval_scored.jsonl.gz"
    policy = TokenPolicy(max_length=256)
    for legs, labels in ((("chosen", "rejected", "gold"), False), (("completion", "mismatched"), True)):
        report = prepare(a_spec(path, legs=legs, labels=labels, policy=policy, max_rows=100), byte_level()).report
        assert report["rows"]["read"] == 100
        arranged = report["shaped"]["rows_arranged"]
        assert arranged == (200 if labels else 100)
        assert arranged == report["rows"]["kept"] + sum(report["dropped"].values())


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
    rows = read_sources(spec)
    assert (len(rows.train), len(rows.held), [len(each.rows) for each in rows.loaded]) == (6, 0, [3, 3])
    assert [row.index for row in rows.train] == [0, 1, 2] * 2
    given_ = a_spec(tmp_path / "a.jsonl", max_rows=3, eval=Source(dataset_name=str(tmp_path / "b.jsonl")))
    assert len(read_sources(given_).held) == 3


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
    assert message.startswith(f"{tmp_path / 'a.jsonl'}, row 0: the objective needs a gold response and the rows have ")
    assert "add a gold or reference column" in message
