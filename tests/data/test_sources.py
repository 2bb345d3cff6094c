"""Reading: real files of every kind, and what is said about files that can't be read."""

from __future__ import annotations

import gzip
import json
import time
from collections import Counter
from pathlib import Path

import datasets
import pytest

from data.errors import DataError
from data.formats import RowProblem
from data.sources import LoadedRows, Source, load_rows, mix
from objectives.registry import field_docs

RAW = [{"prompt": f"{i}+1 is", "chosen": f" {i + 1}", "rejected": " NA"} for i in range(5)]
BAD = [{"prompt": "p", "chosen": None, "rejected": "r"}]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def as_lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path, rows=RAW):
    """Writes rows as the kind of file that the path's suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name
    if name.endswith(".gz"):
        plain = write(path.with_suffix(""), rows)
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    elif name.endswith((".jsonl", ".ndjson")):
        path.write_text(as_lines(rows))
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows, indent=2))
    elif name.endswith(".parquet"):
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif name.endswith(".csv"):
        datasets.Dataset.from_list(rows).to_csv(path)
    elif name.endswith(".arrow"):
        with datasets.arrow_writer.ArrowWriter(path=str(path)) as writer:
            for row in rows:
                writer.write(row)
            writer.finalize()
    return path


def load(path, *, limit=None, **options) -> LoadedRows:
    return load_rows(Source(dataset_name=str(path), **options), limit=limit)


def refused(path, **options) -> str:
    with pytest.raises(DataError) as caught:
        load(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl",
        "a.ndjson",
        "a.json",
        "a.jsonl.gz",
        "a.json.gz",
        "a.parquet",
        "a.csv",
        "a.csv.gz",
        "a.arrow",
        "a.v2.jsonl",
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    path = write(tmp_path / name)
    loaded = load(path)
    assert [(r.prompt, dict(r.responses)) for r in loaded.rows] == [
        (raw["prompt"], {"chosen": raw["chosen"], "rejected": raw["rejected"]}) for raw in RAW
    ]
    assert loaded.rows[3].where == f"{path}, row 3"
    assert (loaded.format, loaded.problems, loaded.source) == ("paired", [], str(path))
    assert [entry.name for entry in tmp_path.iterdir()] == [name], "nothing is left beside the file"


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet", "csv", "arrow"])
def test_folders_are_read_through_with_their_splits(tmp_path, suffix):
    write(tmp_path / "set" / f"train-0.{suffix}", RAW[:2])
    write(tmp_path / "set" / "more" / f"train-1.{suffix}", RAW[2:4])
    write(tmp_path / "set" / f"test.{suffix}", RAW[4:])
    (tmp_path / "set" / "LICENSE").write_text("MIT")
    assert sorted(row.prompt for row in load(tmp_path / "set").rows) == [raw["prompt"] for raw in RAW[:4]]
    assert [row.prompt for row in load(tmp_path / "set", split="test").rows] == ["4+1 is"]
    assert "there is no split 'dev'; it has 'train', 'test'" in refused(tmp_path / "set", split="dev")


def test_a_folder_without_split_names_is_the_train_split(tmp_path):
    write(tmp_path / "b.jsonl", RAW[2:])
    write(tmp_path / "a.jsonl", RAW[:2])
    assert [row.prompt for row in load(tmp_path).rows] == [raw["prompt"] for raw in RAW]


def test_save_to_disk_folders(tmp_path):
    found = datasets.Dataset.from_list(RAW)
    found.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": found, "test": found.select([0])}).save_to_disk(tmp_path / "two")
    assert len(load(tmp_path / "one").rows) == 5
    assert len(load(tmp_path / "two", split="test").rows) == 1
    assert "it has 'train', 'test'" in refused(tmp_path / "two", split="dev")


def test_home_and_relative_paths(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert load("~/a.jsonl").rows[0].source == "~/a.jsonl"
    assert len(load("a.jsonl").rows) == len(load("./a.jsonl").rows) == 5


def test_json_of_mixed_types_becomes_rows_and_problems(tmp_path):
    """Arrow gives a column one type and refuses this file, or makes strings of everything."""
    rows = [
        RAW[0] | {"meta": {"a": 1}},
        RAW[1] | {"meta": ["x", 2], "chosen": 7},
        {"prompt": [{"role": "user", "content": "hi"}], "chosen": "yes", "rejected": [{"role": "assistant"}]},
        ["not", "an", "object"],
        {"prompt": "2020-01-01", "chosen": "2021-02-03", "rejected": "2022-03-04T00:00:00"},
    ]
    loaded = load(write(tmp_path / "a.jsonl", rows))
    assert [row.index for row in loaded.rows] == [0, 4]
    assert loaded.rows[1].responses["chosen"] == "2021-02-03"
    assert {problem.index: problem.reason for problem in loaded.problems} == {
        1: "chosen is neither text nor messages",
        2: "a message of rejected has no content",
        3: "not an object with columns",
    }


def test_parquet_messages_with_keys_that_only_some_turns_have(tmp_path):
    turns = [{"role": "user", "content": "q", "name": "n"}, {"role": "assistant", "content": "a"}]
    loaded = load(write(tmp_path / "a.parquet", [{"messages": turns}]))
    assert loaded.rows[0].prompt == (turns[0],)
    assert loaded.rows[0].responses == {"gold": (turns[1],)}


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_labels_of_every_kind_of_file(tmp_path, name):
    rows = [{"q": "p", "completion": " a", "thumbs": i % 2 == 0} for i in range(4)]
    loaded = load(write(tmp_path / name, rows), columns={"prompt": "q", "label": "thumbs"})
    assert (loaded.format, loaded.problems) == ("unpaired", [])
    assert [row.label for row in loaded.rows] == [True, False, True, False]


def test_scored_lists_from_parquet(tmp_path):
    rows = [{"prompt": "p", "responses": [{"text": "a", "score": 1.0, "model": "m"}, {"text": "b", "score": 2.0}]}]
    (row,) = load(write(tmp_path / "a.parquet", rows)).rows
    assert [each.text for each in row.candidates] == ["b", "a"]


def test_columns_are_mapped_even_onto_names_that_exist(tmp_path):
    rows = [{"prompt": "id-1", "question": "q", "chosen": "w", "rejected": "b"}]
    path = write(tmp_path / "a.jsonl", rows)
    loaded = load(path, columns={"prompt": "question", "chosen": "rejected", "rejected": "chosen"})
    assert loaded.rows[0].prompt == "q"
    assert loaded.rows[0].responses == {"chosen": "b", "rejected": "w"}


def test_limit_counts_rows_of_the_data(tmp_path):
    path = write(tmp_path / "a.jsonl", [*BAD, *RAW])
    loaded = load(path, limit=3)
    assert (len(loaded.rows), len(loaded.problems)) == (2, 1)
    assert len(load(path, limit=100).rows) == 5


def test_problems_after_the_first_rows_are_counted_too(tmp_path):
    loaded = load(write(tmp_path / "a.jsonl", RAW * 40 + BAD))
    assert len(loaded.rows) == 200
    assert loaded.problems == [RowProblem(source=str(tmp_path / "a.jsonl"), index=200, reason="no chosen")]


def test_as_chat_reaches_the_rows(tmp_path):
    assert load(write(tmp_path / "a.jsonl"), as_chat=True).rows[0].prompt == ({"role": "user", "content": "0+1 is"},)


@pytest.mark.slow
def test_twenty_thousand_equal_rows_take_seconds(tmp_path):
    path = write(tmp_path / "a.jsonl", RAW * 4_000)
    start = time.monotonic()
    assert len(load(path).rows) == 20_000
    assert (
        time.monotonic() - start < 60
    )  # about 2 s with run-time type checks on; comparing rows with rows would take far longer


def test_bars_and_log_level_are_put_back(tmp_path, capfd):
    level, bars = datasets.utils.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    path = write(tmp_path / "a.parquet")
    capfd.readouterr()
    load(path)
    assert (datasets.utils.logging.get_verbosity(), datasets.are_progress_bars_disabled()) == (level, bars)
    refused(write_text(tmp_path / "bad.csv", "prompt,chosen,rejected\na,b,c\na,b,c,d,e\n"))
    assert capfd.readouterr() == ("", "")


def write_text(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", as_lines(RAW) + "{oops}\n", ["a.jsonl, line 6: not valid JSON", "expected one object per line"]),
        ("a.jsonl", '{\n "prompt": "x"\n}\n', ["a.jsonl, line 1: not valid JSON"]),
        (
            "a.json",
            '\n[{"prompt": "a"},\n {"prompt" "b"}]',
            ["a.json, line 3: not valid JSON", "or one list of objects"],
        ),
        ("a.json", "[" * 100_000, ["a.json, line 1: not valid JSON"]),
        ("a.jsonl", b'{"prompt": "\xff"}\n', ["a.jsonl: not UTF-8 text", "convert the file"]),
        ("a.jsonl", "", ["a.jsonl: the dataset has no rows in split 'train'"]),
        ("a.json", "[]", ["a.json: the dataset has no rows"]),
        ("a.jsonl.gz", "not gzip", ["a.jsonl.gz: can't be read: Not a gzipped file"]),
        (
            "a.jsonl.gz",
            gzip.compress(as_lines(RAW * 99).encode())[:-20],
            ["a.jsonl.gz: can't be read: Compressed file"],
        ),
        ("a.csv", "prompt,chosen,rejected\na,b,c\na,b,c,d\n", ["a.csv: can't be read", "Expected 3 fields in line 3"]),
        ("a.csv", "", ["a.csv: the file is empty; expected a first line with column names"]),
        ("a.csv", "prompt,chosen,rejected\n", ["a.csv: the dataset has no rows"]),
        ("a.parquet", "PAR1 no", ["a.parquet: can't be read: Parquet"]),
        ("a.arrow", "no arrow", ["a.arrow: can't be read"]),
        ("a.txt", "x", ["a.txt: don't know how to read .txt: json, jsonl, parquet, arrow or csv"]),
        ("a.jsonl", as_lines(BAD * 3), ["none of 3 rows can be used as paired", "row 0: no chosen"]),
        ("a.jsonl", as_lines([{"x": 1}]), ["found columns 'x' (number); expected prompt + chosen + rejected"]),
    ],
)
def test_bad_files_are_named_in_one_sentence(tmp_path, name, content, parts):
    message = refused(write_text(tmp_path / name, content))
    for part in parts:
        assert part in message
    assert str(tmp_path / name) in message


def test_an_empty_parquet_file(tmp_path):
    datasets.Dataset.from_list(RAW).select([]).to_parquet(tmp_path / "a.parquet")
    assert refused(tmp_path / "a.parquet") == f"{tmp_path / 'a.parquet'}: the dataset has no rows"


@pytest.mark.parametrize("name", ["./none", "~/none/none", "/none/none", "none.jsonl", "a/b.parquet", "x.csv.gz"])
def test_missing_local_paths_are_never_looked_up_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the Hub"))
    assert refused(name) == f"{name}: no such file or folder; for a dataset on the Hub write owner/name"


def test_folders_that_are_not_one_dataset(tmp_path):
    assert refused(tmp_path) == (
        f"{tmp_path}: the folder holds no data files; expected json, jsonl, parquet, arrow or csv, also with .gz"
    )
    write(tmp_path / "a.jsonl")
    write(tmp_path / "b.csv")
    assert refused(tmp_path) == (
        f"{tmp_path}: the folder mixes kinds of files: csv (b.csv), json (a.jsonl); keep one kind, or name one file"
    )


def test_a_file_that_no_split_would_read_is_an_error(tmp_path):
    write(tmp_path / "train.jsonl")
    write(tmp_path / "extra.jsonl")
    assert "extra.jsonl belongs to none of the splits train" in refused(tmp_path)


def test_options_that_would_have_no_effect_are_errors(tmp_path):
    path = write(tmp_path / "a.jsonl")
    assert "there is no split 'test'; it has 'train'" in refused(path, split="test")
    assert "a file has no configurations; leave out dataset_config 'en'" in refused(path, config="en")
    assert "split 'train[:10%]' is a slice or a sum; name one split" in refused(path, split="train[:10%]")
    assert "'en'" in refused(write(tmp_path / "folder" / "a.jsonl").parent, config="en")


def test_columns_that_are_not_there(tmp_path):
    path = write(tmp_path / "a.jsonl")
    message = refused(path, columns={"chosen": "choosen"})
    assert message == (
        f"{path}: data.columns maps chosen to 'choosen', which is not there; did you mean 'chosen'? "
        "(columns: prompt, chosen, rejected)"
    )
    assert "data.columns: 'chosn' is no column of ours; did you mean 'chosen'?" in refused(path, columns={"chosn": "x"})


def test_source_keys_are_checked_and_documented():
    with pytest.raises(DataError, match=r"unknown format 'pared'; did you mean 'paired'\? \(known: auto, hh, "):
        Source(dataset_name="d", format="pared")
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(DataError, match=r"d: weight must be a number > 0"):
            Source(dataset_name="d", weight=weight)
    with pytest.raises(DataError, match="dataset_name is empty"):
        Source(dataset_name=" ")
    assert set(field_docs(Source)) == set(Source.__dataclass_fields__)


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (datasets.exceptions.DatasetNotFoundError("Dataset 'me/x' doesn't exist"), "me/x: no such dataset on the Hub"),
        (
            ConnectionError("Couldn't reach 'me/x'\non the Hub"),
            "me/x: the Hub can't be reached (Couldn't reach 'me/x' on",
        ),
        (
            ValueError("Unknown split \"tset\". Should be one of ['train']."),
            'me/x: can\'t be read: Unknown split "tset"',
        ),
        (
            ValueError("Config name is missing.\nPlease pick one"),
            "me/x: can't be read: Config name is missing. Please pick",
        ),
        (RuntimeError("Dataset scripts are no longer supported"), "me/x: can't be read: Dataset scripts are no longer"),
    ],
)
def test_hub_failures_are_one_sentence(error, part, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert part in refused("me/x")


def test_hub_datasets_get_name_config_and_split(monkeypatch):
    asked = []

    def answer(*args, **options):
        asked.append((args, options))
        return datasets.Dataset.from_list(RAW)

    monkeypatch.setattr(datasets, "load_dataset", answer)
    assert len(load("me/x", config="en", split="train_prefs").rows) == 5
    assert asked == [(("me/x", "en"), {"split": "train_prefs"})]


def loaded_of(number, name="d") -> LoadedRows:
    rows = [load_row(name, i) for i in range(number)]
    return LoadedRows(source=name, format="paired", rows=rows, problems=[])


def load_row(name, index):
    from objectives.rows import Row

    return Row(prompt=f"{name}{index}", responses={"chosen": "a", "rejected": "b"}, source=name, index=index)


@pytest.mark.parametrize(("weight", "total"), [(1, 10), (0.5, 5), (2, 20), (2.5, 25), (0.26, 3)])
def test_weights_are_whole_copies_and_a_random_fraction(weight, total):
    part = loaded_of(10)
    mixed = mix([(part, weight)], seed=3)
    counts = Counter(row.index for row in mixed)
    assert len(mixed) == total
    assert max(counts.values()) - min(counts.get(i, 0) for i in range(10)) <= 1
    assert mixed == mix([(part, weight)], seed=3)


def test_what_is_drawn_depends_on_seed_and_position_only():
    a, b = loaded_of(100, "a"), loaded_of(100, "b")
    alone = mix([(a, 0.5)], seed=1)
    assert mix([(a, 0.5), (b, 0.5)], seed=1)[:50] == alone
    assert [row.index for row in mix([(b, 1), (b, 0.5)], seed=1)[100:]] != [row.index for row in alone]
    assert mix([(a, 0.5)], seed=2) != alone
    assert [row.index for row in alone] == sorted(row.index for row in alone)


def test_weights_that_leave_nothing_are_errors():
    with pytest.raises(DataError, match=r"d: weight 0\.01 of 10 rows leaves none; raise the weight"):
        mix([(loaded_of(10), 0.01)], seed=0)
    assert mix([(loaded_of(0), 0.5)], seed=0) == [], "a weight leaves nothing only where there was something"
    with pytest.raises(DataError, match=r"weight must be a number > 0, not 0"):
        mix([(loaded_of(10), 0)], seed=0)


@pytest.mark.slow
def test_all_human_preference_pairs_are_recognised(shared):
    loaded = load(shared / "data" / "hh_harmless.jsonl.gz")
    assert loaded.format == "hh"
    assert len(loaded.rows) == 1794
    assert Counter(problem.reason for problem in loaded.problems) == {
        "empty chosen response": 4,
        "the transcripts differ before the last assistant turn": 2,
    }
    for row in loaded.rows:
        assert isinstance(row.prompt, str)
        assert row.prompt.endswith("\n\nAssistant:")
        assert all(str(response).startswith(" ") for response in row.responses.values())
    chat = load(shared / "data" / "hh_harmless.jsonl.gz", as_chat=True)
    assert len(chat.rows) == 1794


@pytest.mark.slow
def test_all_scored_prompts_are_recognised(shared):
    loaded = load(shared / "data" / "alpaca_eval_scored.jsonl.gz")
    assert (loaded.format, len(loaded.rows), loaded.problems) == ("scored", 600, [])
    for row in loaded.rows:
        scores = [candidate.score for candidate in row.candidates]
        assert len(scores) >= 4, "of six, some of them empty"
        assert scores == sorted(scores, reverse=True)
        assert row.responses == {}


def test_half_a_character_is_a_problem_of_its_row(tmp_path: Path):
    """JSON can spell a lone surrogate; no tokenizer can take it."""
    path = tmp_path / "rows.jsonl"
    good = '{"prompt": "a", "chosen": " b", "rejected": " c"}\n'
    path.write_text(good + '{"prompt": "a", "chosen": " b\\ud83d", "rejected": " c"}\n')
    loaded = load_rows(Source(dataset_name=str(path)))
    assert len(loaded.rows) == 1
    assert [(p.index, p.reason) for p in loaded.problems] == [
        (1, "chosen holds half of a character (a lone surrogate)")
    ]
