"""Preparing many rows: workers and disk change nothing, what did not change is not read again, what did is."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

import data.arranging as arranging
import data.gathering as gathering
import data.identity as identity
import data.rowstore as rowstore
import data.sources as sources
import data.tokens as tokens
import data.workers as workers
from align.assemble import tell_data
from data.codec import Codec
from data.errors import DataError
from data.preparation import Prepared, prepare
from data.rowstore import RowStore, RowView, numbered, pack_rows, unpack_row
from data.shapes import Rule, with_mismatched
from data.sources import Source, load_rows
from data.tables import SplitWriter
from data.tokens import TokenPolicy, tokenize_rows
from data.workers import Workers
from objectives.relabel import LeftOut, RewardAugmented
from objectives.reward_transforms import R3, ZScore
from objectives.rows import Candidate, Row
from tests.align.test_density import save_encoder
from tests.data.byte_level import byte_level
from tests.data.jobs import ended, half
from tests.data.preparing import a_spec
from tests.support import REPOSITORY

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of seven rows, so that two hundred are many: they go to disk and to workers."""
    for module in (rowstore, arranging, sources, tokens):
        monkeypatch.setattr(module, "BATCH", 7)
    monkeypatch.setattr(rowstore, "IN_MEMORY", 20)
    monkeypatch.setattr(workers, "ALONE", 2)
    monkeypatch.setattr(workers, "cores", lambda: 2)


def write(path: Path, rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text(rng: random.Random, low: int, high: int) -> str:
    return "".join(rng.choice("abcd é\nz ") for _ in range(rng.randint(low, high)))


def many_pairs(number: int = 200) -> list[dict[str, Any]]:
    """Pairs of which some are unusable, too long, without scores, or there twice; a third of the prompts come again."""
    rng = random.Random(0)
    prompts = [f"p{i} {text(rng, 1, 40)}" for i in range(number * 2 // 3)]
    rows: list[dict[str, Any]] = []
    for i in range(number):
        row: dict[str, Any] = {"prompt": rng.choice(prompts), "chosen": " " + text(rng, 1, 60), "rejected": f" {i}"}
        fault = rng.random()
        row |= {"chosen": None} if fault < 0.03 else {"chosen": " a</s>b"} if fault < 0.06 else {}
        row |= {"prompt": "x" * 120} if 0.06 < fault < 0.09 else {}
        row |= {"score_chosen": rng.randint(1, 9), "score_rejected": rng.randint(1, 9)}
        row |= {"group": f"g{rng.randint(0, 2)}"} if fault > 0.8 else {}
        rows += [row] * (1 + (fault > 0.95))
    return rows


def listed(rng: random.Random, number: int = 200) -> list[dict[str, Any]]:
    def response() -> dict[str, Any]:
        return {"text": " " + text(rng, 1, 20), "score": rng.randint(0, 4)}

    return [
        {"prompt": f"{i // 2}?", "responses": [response() for _ in range(rng.randint(1, 4))]} for i in range(number)
    ]


def as_chat(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [
        {key: [{"role": roles[key], "content": value}] for key, value in row.items() if key in roles and value}
        for row in rows
    ]


def labelled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "prompt": row["prompt"],
            "completion": row["rejected"],
            "label": i % 3 == 0,
            **({"helpful": i} if i % 4 else {}),
        }
        for i, row in enumerate(rows)
    ]


def only_some(row: Row) -> list[Row]:
    if row.index % 5 == 0:
        raise LeftOut("a fifth")
    return [row, dataclasses.replace(row, prompt=f"not: {row.prompt}", group="again")]


PAIRS = many_pairs()
LISTS = listed(random.Random(1))
CUT = TokenPolicy(max_length=70)
KTO = {"legs": ("completion", "mismatched"), "labels": True}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "pairs": (PAIRS, {}),
    "prompts cut": (PAIRS, {"policy": TokenPolicy(max_length=60, truncation="truncate_prompt_start")}),
    "long ones dropped": (PAIRS, {"policy": TokenPolicy(max_length=70, truncation="drop"), "max_dropped_share": 1.0}),
    "scores": (PAIRS, {"scores": ("chosen", "rejected")}),
    "chat": (as_chat(PAIRS), {}),
    "labels of pairs": (PAIRS, KTO),
    "labels": (labelled(PAIRS), {**KTO, "eval_share": 0.4}),
    "attributes": (labelled(PAIRS), {"legs": ("completion",), "scores": ("helpful",), "attributes": ("helpful",)}),
    "relabelled": (PAIRS, {"relabel": (only_some, only_some), "max_dropped_share": 1.0}),
    "lists": (LISTS, {"max_dropped_share": 1.0}),
    "lists, margins": (LISTS, {"rule": Rule(name="margin", margin=1.0), "max_dropped_share": 1.0}),
    "lists, triples": (LISTS, {"legs": ("chosen", "rejected", "gold"), "max_dropped_share": 1.0}),
    "lists, transformed": (LISTS, {"reward_transforms": (ZScore(),), "scores": ("chosen",), "max_dropped_share": 1.0}),
    "weights": (PAIRS, {"weights": (0.5, 2.3)}),
    "an evaluation set": (PAIRS, {"eval_rows": PAIRS[:30]}),
    "the first rows": (PAIRS, {"max_rows": 101}),
}


def spec_of(folder: Path, rows: Any, changes: dict[str, Any]) -> Any:
    changes = {"policy": CUT, **changes}
    path = write(folder / "a.jsonl", rows)
    weights, attributes = changes.pop("weights", (1.0,)), changes.pop("attributes", ())
    if (held := changes.pop("eval_rows", None)) is not None:
        changes["eval"] = Source(dataset_name=str(write(folder / "held.jsonl", held)))
    train = tuple(Source(dataset_name=str(path), weight=weight, attributes=attributes) for weight in weights)
    return a_spec(train=train, **changes)


def contents(prepared: Prepared) -> list[Any]:
    splits = [split for split in (prepared.train, prepared.eval) if split is not None]
    return [
        dict(prepared.report),
        [{name: array.tolist() for name, array in split.table._arrays()} for split in splits],
        [(list(split.where), list(split.groups), split.prompts.tolist()) for split in splits],
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_workers_and_disk_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, name: str
) -> None:
    rows, changes = CASES[name]
    tokenizer = byte_level(template=CHATML, eos_token="<|im_end|>") if name == "chat" else byte_level(adds_bos=True)
    spec = spec_of(tmp_path, rows, dict(changes))
    alone = contents(prepare(spec, tokenizer))
    assert not list((tmp_path / "cache" / "rows").glob(".store-*"))
    assert alone[0]["rows"]["train"] > 20, "enough to say something"
    request.getfixturevalue("small_batches")
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "other"))
    started = []
    start = Workers._start
    monkeypatch.setattr(Workers, "_start", lambda self: (started.append(1), start(self))[1])
    together = contents(prepare(spec, tokenizer))
    assert started
    assert together == alone
    assert not list((tmp_path / "other" / "rows").glob(".*")), "nothing is left of what was needed in between"


@pytest.mark.slow
@pytest.mark.usefixtures("small_batches")
def test_the_first_bad_row_is_named_whichever_worker_finds_one(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "chosen": " a" * (99 if i in (30, 31, 60) else 1), "rejected": " b"} for i in range(90)]
    path = write(tmp_path / "a.jsonl", rows)
    spec = a_spec(path, policy=TokenPolicy(max_length=50, truncation="raise"), eval_share=0.0)
    with pytest.raises(DataError, match=f"^{path}, row 30: "):
        prepare(spec, byte_level())
    assert not list((tmp_path / "cache" / "rows").glob(".*"))


# Workers


@pytest.mark.slow
def test_results_come_in_order_and_errors_in_their_place() -> None:
    with Workers(2) as pool:
        assert list(pool.map(half, 7, range(12))) == [(7, i // 2) for i in range(12)]
        assert list(pool.map(half, 8, range(12))) == [(8, i // 2) for i in range(12)]
        found: list[Any] = []
        with pytest.raises(DataError, match="thirteen"):
            found.extend(pool.map(half, 7, iter(range(20))))
        assert list(pool.map(half, 9, range(7))) == [(9, i // 2) for i in range(7)], "they go on after an error"


def test_a_fault_of_the_source_comes_after_those_of_rows_before_it() -> None:
    def jobs(last: int) -> Any:
        yield from range(last)
        raise OSError("the disk")

    for number in (0, 2):
        with Workers(number) as pool:
            with pytest.raises(DataError, match="thirteen"):
                list(pool.map(half, 0, jobs(14)))
            with pytest.raises(OSError, match="the disk"):
                list(pool.map(half, 0, jobs(13)))


def test_a_worker_that_dies_is_told_and_none_is_left() -> None:
    with Workers(2) as pool:
        with pytest.raises(RuntimeError, match="a worker process ended"):
            list(pool.map(ended, 0, range(9)))
        processes = pool._processes
    assert all(process.poll() is not None for process in processes)


def test_what_cannot_be_sent_is_done_here() -> None:
    with Workers(2) as pool:
        assert list(pool.map(lambda shared, job: shared(job), lambda job: job + 1, range(9))) == list(range(1, 10))


def test_workers_import_no_formulas() -> None:
    """They would take two seconds and 200 MB each."""
    code = "import sys; from data.workers import serve; serve(); import data.tokens; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().endswith("False"), "standard output is for results alone"


# Rows as bytes


ROWS = [
    Row(prompt="a", responses={"chosen": "é", "rejected": ""}, source="d", index=3, label=True, group="g"),
    Row(prompt="b", responses={"gold": "x"}, scores={"gold": 1.5}, candidates=(Candidate(text="c", score=2.0),)),
    Row(prompt=({"role": "user", "content": "a"},), responses={"chosen": ({"role": "assistant", "content": "b"},)}),
    Row(prompt="a", responses={"completion": "y"}, source="d", label=False),
] * 9  # fmt: skip


@pytest.mark.parametrize("kept", [0, 10, 99])
def test_rows_come_back_from_memory_and_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    monkeypatch.setattr(rowstore, "IN_MEMORY", kept)
    monkeypatch.setattr(rowstore, "BATCH", 4)
    store = RowStore(tmp_path)
    view = store.add_rows(ROWS)
    assert (store.path is None) == (kept == 99)
    assert list(view) == ROWS == [view[i] for i in range(len(view))]
    assert view[-1] == ROWS[-1]
    assert list(view[3:9]) == ROWS[3:9]
    assert list(view.take(np.array([5, 5, 0]))) == [ROWS[5], ROWS[5], ROWS[0]]
    assert [row for batch in view.sources(5) for row in rowstore.rows_from(batch)] == ROWS
    with pytest.raises(IndexError):
        view[len(ROWS)]
    assert list(view.first_of_kinds()) == ROWS[:4]
    assert numbered(view.prompts()).tolist() == [0, 1, 2, 0] * 9
    assert view.labels().tolist() == [1, -1, -1, 0] * 9
    del store, view
    assert list(tmp_path.iterdir()) == []


def test_equal_rows_are_equal_bytes_whichever_objects_they_are_made_of() -> None:
    same = "ab" * 2
    one = Row(prompt=same, responses={"chosen": same, "rejected": "".join(["abab"])}, source=same)
    other = Row(prompt="abab", responses={"chosen": "".join(["ab", "ab"]), "rejected": same}, source="".join(["abab"]))
    assert pack_rows([one]).blob == pack_rows([other]).blob
    assert unpack_row(pack_rows([one]).blob) == other


@pytest.mark.usefixtures("small_batches")
def test_mismatched_responses_are_those_of_lists_of_rows(tmp_path: Path) -> None:
    rng = random.Random(0)
    for commonest in (1, 30):
        prompts = [f"{rng.randint(0, 40)}" if i % 40 >= commonest else "often" for i in range(80)]
        rows = [Row(prompt=prompt, responses={"completion": f"{i}"}, index=i) for i, prompt in enumerate(prompts)]
        view = arranging.mismatched_view(RowStore(tmp_path).add_rows(rows), 3)
        assert list(view) == with_mismatched(rows, 3)
        assert [row for batch in view.sources(9) for row in rowstore.rows_from(batch)] == with_mismatched(rows, 3)


def test_numbers_count_in_the_order_of_appearance() -> None:
    hashes = np.array([[5, 1], [2, 9], [5, 1], [2, 8], [2, 9]], dtype=np.uint64)
    assert numbered(hashes).tolist() == [0, 1, 0, 2, 1]
    assert numbered(hashes[:0]).tolist() == []


# Tokens


def test_the_short_way_to_ids_is_the_long_way() -> None:
    texts = ["", "  a\n\nb", "<s>x</s>", "é 😀 <|im_start|>", "ab" * 50]
    for tokenizer in (byte_level(adds_bos=True, adds_eos=True), byte_level(merges=[("a", "b"), ("Ġ", "a")])):
        for special in (False, True):
            for split in (False, True):
                tokenizer.split_special_tokens, tokenizer.pad_token = split, "</s>"
                expected = tokenizer(texts, add_special_tokens=special)["input_ids"]
                tokenizer("cut and padded", truncation=True, max_length=2, padding="max_length")
                codec = Codec(tokenizer)
                assert codec._backend is not None
                assert codec.encode(texts, special=special) == expected
                other = Codec.__new__(Codec)
                other.__dict__.update(codec.__getstate__())
                assert other.encode(texts, special=special) == expected
                assert other.decode(expected[1]) == tokenizer.decode(expected[1])


def test_a_tokenizer_with_a_call_of_its_own_is_called() -> None:
    class Own(type(byte_level())):  # type: ignore[misc]
        def _encode_plus(self, *args: Any, **options: Any) -> Any:
            found = super()._encode_plus(*args, **options)
            found["input_ids"] = [ids[::-1] for ids in found["input_ids"]]
            return found

    tokenizer = byte_level()
    tokenizer.__class__ = Own
    assert Codec(tokenizer)._backend is None
    assert Codec(tokenizer).encode(["ab"], special=True) == [byte_level()("ba")["input_ids"]]


def test_no_rows_of_tokens_become_objects(tmp_path: Path) -> None:
    """What is kept of a row while others are tokenised is numbers: its ids are on disk before the next batch comes."""
    store = RowStore(tmp_path)
    rows = store.add_rows(Row(prompt=f"{i}?", responses={"chosen": " a", "rejected": " b"}) for i in range(40))
    writer, sizes = SplitWriter(tmp_path / "train"), []

    def into(chunk: Any) -> None:
        assert all(isinstance(array, np.ndarray) for pair in chunk.ids.values() for array in pair)
        writer.add(chunk)
        sizes.append(sum(len(part) for parts in writer._lengths.values() for part in parts))

    kept, dropped, _ = tokenize_rows(rows, byte_level(), CUT, ("chosen", "rejected"), 10, into=into)
    assert (kept, dropped, sizes) == ([], [], [30, 60, 90, 120])
    writer.finish()
    assert len(writer._lengths) == 0


# A second start


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the datasets whose rows were read."""
    names: list[str] = []
    read = sources.read

    def noted(name: str, **options: Any) -> Any:
        names.append(name)
        return read(name, **options)

    monkeypatch.setattr(sources, "read", noted)
    return names


FEW = [{"prompt": f"{i}?", "chosen": f" {i}", "rejected": " no", "gold": f" {i}{i}"} for i in range(12)]
SCORED = [
    {"prompt": f"{i}?", "responses": [{"text": " yes" * j, "score": float(j)} for j in (1, 2, 3)]} for i in range(12)
]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_a_second_start_reads_no_row(tmp_path: Path, reads: list[str], suffix: str) -> None:
    path, held = tmp_path / f"a.{suffix}", write(tmp_path / "held.jsonl", FEW[:3])
    if suffix == "jsonl":
        write(path, FEW)
    else:
        getattr(datasets.Dataset.from_list(FEW), f"to_{suffix}")(path)
    spec = a_spec(path, eval=Source(dataset_name=str(held)))
    first = prepare(spec, byte_level())
    assert reads == [str(path), str(held)]
    second = prepare(spec, byte_level())
    assert len(reads) == 2
    assert contents(second) == contents(first)
    last = np.int64(len(second.train.table) - 1)  # as callers have it from an array
    assert (second.train.where[last], second.train.groups[last]) == (first.train.where[-1], first.train.groups[-1])
    assert list(second.train.where[2:4]) == list(first.train.where)[2:4]
    assert second.train.groups == [""] * len(second.train.table)
    prepare(dataclasses.replace(spec, max_dropped_share=0.1), byte_level())
    assert len(reads) == 2, "how many losses are accepted changes no table"
    tell_data(second.report, lambda line: None)


def test_a_folder_and_a_saved_dataset_too(tmp_path: Path, reads: list[str]) -> None:
    datasets.Dataset.from_list(FEW).save_to_disk(tmp_path / "saved")
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train-0.jsonl", FEW[:6])
    write(tmp_path / "set" / "train-1.jsonl", FEW[6:])
    for name in ("saved", "set"):
        spec = a_spec(tmp_path / name)
        prepare(spec, byte_level())
        prepare(spec, byte_level())
    assert len(reads) == 2
    write(tmp_path / "set" / "train-2.jsonl", FEW[:1])
    assert prepare(a_spec(tmp_path / "set"), byte_level()).report["rows"]["read"] == 13


def test_hub_datasets_are_known_by_their_fingerprint(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.jsonl", FEW)
    found = datasets.load_dataset("json", data_files=str(tmp_path / "a.jsonl"), split="train")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: found)
    spec = a_spec("me/x")
    prepare(spec, byte_level())
    prepare(spec, byte_level())
    assert len(reads) == 1
    found._fingerprint = "another"
    prepare(spec, byte_level())
    assert len(reads) == 2
    found = datasets.Dataset.from_list(FEW)
    prepare(spec, byte_level())
    prepare(spec, byte_level())
    assert len(reads) == 4, "one that is in no file is read"


def in_place(path: Path, old: str, new: str) -> None:
    """Writes other content of the same size, with the times of before."""
    before = path.stat()
    content = path.read_text()
    assert old in content
    assert len(old) == len(new)
    path.write_text(content.replace(old, new))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda path: write(path, FEW[1:]),
        lambda path: write(path, FEW[::-1]),
        lambda path: os.utime(path, (1, 1)),
        lambda path: in_place(path, " no", " on"),
        lambda path: write(path.with_suffix(".new"), FEW[::-1]).replace(path),
    ],
    ids=["size", "order", "time", "the same size and time", "another file of that name"],
)
def test_a_file_that_changed_is_read(tmp_path: Path, reads: list[str], change: Any) -> None:
    path = write(tmp_path / "a.jsonl", FEW)
    prepare(a_spec(path), byte_level())
    change(path)
    again = prepare(a_spec(path), byte_level())
    assert len(reads) == 2
    fresh = [json.loads(line) for line in path.read_text().splitlines()]
    tokenizer = byte_level()
    for i, (_, index) in enumerate(again.train.where):
        assert tokenizer.decode(again.train.table.legs["rejected"][i]) == fresh[index]["rejected"] + "</s>"


def test_a_file_written_again_at_once_is_read(tmp_path: Path) -> None:
    """Times move in ticks: two writes of the same size in one of them look alike."""
    path = write(tmp_path / "a.jsonl", FEW)
    version = identity.version_of_files(path)
    assert time.time_ns() - path.stat().st_mtime_ns >= 20_000_000
    in_place(path, " no", " on")
    assert identity.version_of_files(path) != version


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "before", "after"),
    [
        (FEW, {}, {"legs": ("chosen", "rejected", "gold")}),
        (FEW, {}, {"policy": TokenPolicy(max_length=100)}),
        (FEW, {}, {"policy": TokenPolicy(max_length=200, truncation="drop")}),
        (FEW, {}, {"seed": 1}),
        (FEW, {}, {"eval_share": 0.5}),
        (FEW, {}, {"max_rows": 11}),
        (FEW, {"legs": ("completion",)}, {"labels": True}),
        (SCORED, {}, {"scores": ("chosen",)}),
        (SCORED, {}, {"rule": Rule(name="margin", margin=1.0)}),
        (SCORED, {}, {"rule": Rule(name="margin", margin=2.0)}),
        (SCORED, {"scores": ("chosen",)}, {"reward_transforms": (ZScore(),)}),
        (SCORED, {}, {"relabel": (RewardAugmented(form="text", highest=3.0),)}),
        (
            SCORED,
            {"relabel": (RewardAugmented(form="text"),)},
            {"relabel": (RewardAugmented(form="text", highest=9.0),)},
        ),
        (FEW, {}, {"source": {"weight": 2.0}}),
        (FEW, {}, {"source": {"columns": {"chosen": "gold"}}}),
        (FEW, {}, {"source": {"as_chat": True}}),
        (FEW, {}, {"source": {"format": "paired"}}),
        (FEW, {}, {"source": {"attributes": ("prompt_length",)}}),
        (FEW, {}, {"twice": True}),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_second_start_sees_every_key(
    tmp_path: Path, reads: list[str], rows: Any, before: dict[str, Any], after: dict[str, Any]
) -> None:
    path = write(tmp_path / "a.jsonl", rows)

    def spec(changes: dict[str, Any]) -> Any:
        changes = dict(changes)
        source = Source(dataset_name=str(path), **changes.pop("source", {}))
        return a_spec(
            train=(source,) * (1 + changes.pop("twice", False)), **{"policy": TokenPolicy(max_length=300), **changes}
        )

    prepare(spec(before), byte_level(template=CHATML))
    count = len(reads)
    prepare(spec({**before, **after}), byte_level(template=CHATML))
    assert len(reads) > count


def test_every_field_of_the_spec_is_one_of_those() -> None:
    """A new field must be in the identity: it is by itself, unless it was left out by name."""
    spec = a_spec("d")
    seen = {*identity._without(spec, "train", "eval", "max_dropped_share", "policy"), "train", "eval", "policy"}
    assert seen == {each.name for each in dataclasses.fields(spec)} - {"max_dropped_share"}


@pytest.mark.parametrize(
    "other",
    [
        byte_level(merges=[("1", "1")]),
        byte_level(adds_bos=True),
        byte_level(template=CHATML),
        byte_level(bos_token=None),
    ],
    ids=["merges", "post-processing", "template", "beginning token"],
)
def test_a_second_start_sees_the_tokenizer(tmp_path: Path, reads: list[str], other: Any) -> None:
    path = write(tmp_path / "a.jsonl", FEW)
    prepare(a_spec(path), byte_level())
    prepare(a_spec(path), other)
    assert len(reads) == 2


def test_a_second_start_sees_code_and_versions(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", FEW)
    prepare(a_spec(path), byte_level())
    code = identity._code()
    assert {"convert.py", "tokens.py", "shapes.py", "relabel.py"} <= {name for name, _ in code[0]}
    assert {"datasets", "tokenizers", "transformers"} <= set(code[1])
    monkeypatch.setattr(identity, "_code", lambda: [code[0][1:], code[1]])
    prepare(a_spec(path), byte_level())
    assert len(reads) == 2


def test_a_second_start_sees_the_encoder(tmp_path: Path, reads: list[str]) -> None:
    encoder = save_encoder(tmp_path / "encoder", "bert")
    path = write(tmp_path / "a.jsonl", SCORED)
    transform = R3(encoder=str(encoder), questions="open")
    spec = a_spec(path, reward_transforms=(transform,), scores=("chosen", "rejected"))
    prepare(spec, byte_level())
    prepare(spec, byte_level())
    assert len(reads) == 1
    weights = next(Path(encoder).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes())
    prepare(spec, byte_level())
    assert len(reads) == 2


def test_what_cannot_be_told_apart_is_read(tmp_path: Path, reads: list[str]) -> None:
    """A function of someone's own may do something else than last time; so may a README that names other files."""
    path = write(tmp_path / "a.jsonl", FEW)
    spec = a_spec(path, relabel=(lambda row: [row],))
    prepare(spec, byte_level())
    prepare(spec, byte_level())
    assert len(reads) == 2
    assert identity.identity_of(spec) is None
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", FEW)
    assert identity.identity_of(a_spec(folder)) is not None
    (folder / "README.md").write_text("---\nconfigs:\n- data_files: ../a.jsonl\n---\n")
    assert identity.identity_of(a_spec(folder)) is None


def test_a_file_that_changes_while_it_is_read_is_read_again(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", FEW)
    read_sources = gathering.read_sources

    def meanwhile(*args: Any) -> Any:
        rows = read_sources(*args)
        write(path, FEW[:6])
        return rows

    monkeypatch.setattr("data.preparation.read_sources", meanwhile)
    assert prepare(a_spec(path), byte_level()).report["rows"]["read"] == 12
    monkeypatch.setattr("data.preparation.read_sources", read_sources)
    assert prepare(a_spec(path), byte_level()).report["rows"]["read"] == 6


def test_tables_that_were_removed_are_made_again(tmp_path: Path, reads: list[str]) -> None:
    import shutil

    spec = a_spec(write(tmp_path / "a.jsonl", FEW))
    first = prepare(spec, byte_level()).report
    shutil.rmtree(tmp_path / "cache" / "rows")
    assert prepare(spec, byte_level()).report == first
    assert len(reads) == 2


# A process that dies


@pytest.mark.slow
def test_killed_in_the_middle_and_started_again(tmp_path: Path) -> None:
    """While its workers tokenise; they end with it, and what it wrote is neither read nor kept."""
    path = write(tmp_path / "a.jsonl", many_pairs(12_000))
    code = (
        "import sys, data.preparation as p; from tests.data.preparing import a_spec\n"
        "from tests.data.byte_level import byte_level; from data.tables import SplitWriter\n"
        "add = SplitWriter.add\n"
        "def noted(self, chunk): add(self, chunk); print('written', flush=True)\n"
        "SplitWriter.add = noted\n"
        f"p.prepare(a_spec({str(path)!r}), byte_level())"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        process.kill()
    rows = tmp_path / "cache" / "rows"
    left = {folder.name for folder in rows.iterdir() if folder.is_dir()}
    assert left, "the test is of something"
    assert all(name.startswith(".") for name in left)
    for folder in rows.glob(".store-*"):
        for each in (*folder.iterdir(), folder):
            os.utime(each, (1, 1))  # as it is a day later
    prepared = prepare(a_spec(path), byte_level())
    assert prepared.report["rows"]["kept"] == len(prepared.train.table) + len(prepared.eval.table)  # type: ignore[union-attr]
    assert [folder.name for folder in rows.iterdir() if folder.is_dir() and folder.name.startswith(".")] == []


def test_load_rows_by_itself_gives_a_list(tmp_path: Path) -> None:
    rows = load_rows(Source(dataset_name=str(write(tmp_path / "a.jsonl", FEW)))).rows
    assert isinstance(rows, list)
    assert not isinstance(rows, RowView)
