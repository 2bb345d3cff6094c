"""Streams: read once up to a limit, kept on disk complete or not at all, and then read like a file."""

from __future__ import annotations

import datetime
import gc
import json
import os
import warnings

import datasets
import pytest

import data.reading as reading
import data.spool as spool
from data.errors import DataError
from data.sources import Source, load_rows
from tests.data.test_sources import RAW, write

# A CSV stream that is not read to its end leaves its file to the garbage collector (datasets 5.2, pandas 2).
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def opened(monkeypatch):
    """The names of the datasets that were opened."""
    names = []
    rows_of = reading._rows_of

    def noted(name, *args, **options):
        names.append(name)
        return rows_of(name, *args, **options)

    monkeypatch.setattr(reading, "_rows_of", noted)
    return names


def stream(path, limit=3, **options):
    return load_rows(Source(dataset_name=str(path), streaming=True, **options), limit=limit)


def contents(loaded):
    return [(row.index, row.prompt, dict(row.responses)) for row in loaded.rows]


def kept(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache" / "spool").iterdir() if path.suffix != ".lock")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.parquet", "a.csv", "a.csv.gz", "a.arrow"])
def test_streams_are_the_first_rows_of_every_kind_of_file(tmp_path, name):
    path = write(tmp_path / name)
    whole = load_rows(Source(dataset_name=str(path)), limit=3)
    assert contents(stream(path)) == contents(whole)
    assert stream(path).rows[2].where == f"{path}, row 2"
    assert len(stream(path, limit=100).rows) == 5


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_streams_of_folders_and_their_splits(tmp_path, suffix):
    write(tmp_path / "set" / f"train-0.{suffix}", RAW[:2])
    write(tmp_path / "set" / f"train-1.{suffix}", RAW[2:4])
    write(tmp_path / "set" / f"test.{suffix}", RAW[4:])
    assert [row.prompt for row in stream(tmp_path / "set").rows] == [raw["prompt"] for raw in RAW[:3]]
    assert [row.prompt for row in stream(tmp_path / "set", split="test").rows] == ["4+1 is"]
    assert len(kept(tmp_path)) == 2
    with pytest.raises(DataError, match="there is no split 'dev'"):
        stream(tmp_path / "set", split="dev")
    assert len(kept(tmp_path)) == 2


def test_streams_of_saved_datasets(tmp_path):
    datasets.Dataset.from_list(RAW).save_to_disk(tmp_path / "saved")
    assert len(stream(tmp_path / "saved").rows) == 3


def test_a_stream_is_read_once(tmp_path, opened):
    path = write(tmp_path / "a.jsonl")
    first = contents(stream(path))
    status = path.stat()
    path.write_text("x" * status.st_size)  # poisoned, and as old as it was
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert contents(stream(path)) == first
    path.unlink()
    assert contents(stream(path)) == first, "what was kept needs no source"
    assert opened == [str(path)]


def test_what_changes_the_rows_is_read_again(tmp_path, opened):
    path = write(tmp_path / "a.jsonl")
    stream(path)
    stream(path, limit=4)
    assert len(opened) == 2
    write(path, RAW[::-1])
    os.utime(path, ns=(1, 1))
    assert stream(path).rows[0].prompt == "4+1 is"
    assert len(opened) == 3
    assert len(stream(write(tmp_path / "b.jsonl")).rows) == 3
    assert len(opened) == 4


def test_a_stream_needs_a_limit(tmp_path, opened):
    with pytest.raises(DataError, match=r"a\.jsonl: data\.streaming needs data\.max_rows, how many rows to read"):
        stream(write(tmp_path / "a.jsonl"), limit=None)
    assert opened == []


def test_a_missing_file_is_as_missing_as_ever(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        stream(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (datetime.datetime(2020, 1, 1), "datetime"),
        (b"raw", "bytes"),
        ({"inner": [datetime.date(2020, 1, 1)]}, "date"),
    ],
)
def test_values_that_cannot_be_kept_are_named(tmp_path, value, kind):
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list([row | {"when": None if i == 0 else value} for i, row in enumerate(RAW)]).to_parquet(
        path
    )
    with pytest.raises(DataError) as caught:
        stream(path)
    assert str(caught.value).startswith(f"{path}, row 1: column 'when' holds {kind}, which a spooled stream can't keep")
    assert "without data.streaming" in str(caught.value)
    assert kept(tmp_path) == []
    assert len(load_rows(Source(dataset_name=str(path))).rows) == 5, "the remedy of the message works"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_stream_leaves_nothing(tmp_path, monkeypatch, error):
    path = write(tmp_path / "a.jsonl")
    line = spool._line

    def interrupted(row, index, name):
        if index == 2:
            raise error("stopped")
        return line(row, index, name)

    monkeypatch.setattr(spool, "_line", interrupted)
    with pytest.raises(error, match="stopped"):
        stream(path)
    assert kept(tmp_path) == []
    monkeypatch.setattr(spool, "_line", line)
    assert len(stream(path).rows) == 3


def test_what_another_process_left_half_written_is_not_read(tmp_path):
    path = write(tmp_path / "a.jsonl")
    stream(path)
    (name,) = kept(tmp_path)
    whole = tmp_path / "cache" / "spool" / name
    whole.rename(whole.with_suffix(".part"))
    whole.with_suffix(".part").write_text('{"prompt": "hal')
    assert len(stream(path).rows) == 3
    assert kept(tmp_path) == [name]


def test_half_a_character_survives_the_disk(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*RAW[:2], RAW[2] | {"chosen": " b\ud83d"}]))
    loaded = stream(path)
    assert [problem.reason for problem in loaded.problems] == ["chosen holds half of a character (a lone surrogate)"]


class Hub:
    """Stands for the Hub: counts what is asked of it."""

    def __init__(self, monkeypatch):
        self.sha, self.asked = "one", []
        monkeypatch.setattr(reading, "dataset_info", self.info)
        monkeypatch.setattr(datasets, "load_dataset", self.load)

    def info(self, name, timeout):
        if self.sha is None:
            raise ConnectionError("offline")
        return type("Info", (), {"sha": self.sha})

    def load(self, *args, **options):
        self.asked.append((args, options))
        if self.sha is None:
            raise ConnectionError("offline")

        def rows():
            yield from RAW

        return datasets.IterableDataset.from_generator(rows)


def test_hub_datasets_are_kept_by_commit(monkeypatch):
    hub = Hub(monkeypatch)
    assert len(stream("me/x", config="en", split="all").rows) == 3
    assert hub.asked == [(("me/x", "en"), {"split": "all", "streaming": True, "revision": "one"})]
    stream("me/x", config="en", split="all")
    assert len(hub.asked) == 1
    hub.sha = "two"
    stream("me/x", config="en", split="all")
    assert len(hub.asked) == 2


def test_without_a_network_what_was_kept_is_used(monkeypatch):
    hub = Hub(monkeypatch)
    stream("me/x")
    hub.sha = None
    assert len(stream("me/x").rows) == 3
    assert len(hub.asked) == 1
    with pytest.raises(DataError, match=r"me/y: the Hub can't be reached \(offline\)"):
        stream("me/y")


def test_a_network_that_fails_half_way_is_one_sentence(monkeypatch, tmp_path):
    hub = Hub(monkeypatch)

    def rows():
        yield RAW[0]
        raise ConnectionError("cut\noff")

    hub.load = lambda *_, **__: rows()
    monkeypatch.setattr(datasets, "load_dataset", hub.load)
    with pytest.raises(DataError, match=r"me/x: the Hub can't be reached \(cut off\)"):
        stream("me/x")
    assert kept(tmp_path) == []
