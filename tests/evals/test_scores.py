"""Scores of prompts beside results: written whole, replaced by what they are of, read with one-sentence errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from align.samples import prompt_id
from evals.measured import means_by_prompt
from evals.scores import NAME, VERSION, Scores, read_scores, write_scores
from evals.win_rate import win_rate


def scores(**changes: Any) -> Scores:
    fields = {"metric": "m", "dataset": "d", "split": "s", "step": 3, "by_prompt": {"p": 0.5, "q": 1.0}}
    return Scores(**{**fields, **changes})


def test_written_and_read_again(tmp_path: Path):
    one, two = scores(), scores(step=4, by_prompt={"ünicode": 1e-3})
    write_scores(tmp_path, [one, two])
    assert read_scores(tmp_path) == {one.key: one, two.key: two}
    lines = [json.loads(line) for line in (tmp_path / NAME).read_text().splitlines()]
    assert [line["version"] for line in lines] == [VERSION] * 2
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_an_evaluation_that_is_repeated_replaces_its_own(tmp_path: Path):
    write_scores(tmp_path, [scores(), scores(metric="other")])
    write_scores(tmp_path, [scores(by_prompt={"p": 0.0})])
    found = read_scores(tmp_path)
    assert len(found) == 2
    assert found["m", "d", "s", 3].by_prompt == {"p": 0.0}


def test_no_file_is_no_scores(tmp_path: Path):
    assert read_scores(tmp_path) == {}


def test_what_is_not_finite_or_empty_is_refused():
    with pytest.raises(ValueError, match="'m' on 'd' is nan of prompt 'p'"):
        scores(by_prompt={"p": math.nan})
    with pytest.raises(ValueError, match="has no prompts"):
        scores(by_prompt={})


LINE = json.dumps({"version": 1, "metric": "m", "dataset": "d", "split": "s", "step": 3, "by_prompt": {"p": 1}})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "line 1 of .* is not JSON"),
        (LINE + "\n" + LINE[:40], "line 2 of .* is not JSON"),
        ("[]", "has version None, and this code reads version 1"),
        (LINE.replace('"version": 1', '"version": 2'), "has version 2"),
        (LINE.replace('"metric"', '"metrik"'), "lacks something .*metric"),
        (LINE.replace('{"p": 1}', "[1]"), "lacks something or holds a wrong type"),
        (LINE.replace('{"p": 1}', '{"p": NaN}'), "is nan of prompt 'p'"),
    ],
)
def test_errors_are_one_sentence(tmp_path: Path, text: str, says: str):
    (tmp_path / NAME).write_text(text)
    with pytest.raises(ValueError, match=says) as caught:
        read_scores(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=says):
        write_scores(tmp_path, [scores()])
    assert (tmp_path / NAME).read_text() == text, "what can't be read is not overwritten"


def test_an_evaluation_files_both(tmp_path: Path):
    prompts = [prompt_id("a"), prompt_id("b"), prompt_id("a")]
    found = win_rate([1, 2, 2], prompts)
    write_scores(tmp_path, found.scores(dataset="d", split="s", step=3))
    stored = read_scores(tmp_path)["win_rate/raw", "d", "s", 3]
    assert stored.by_prompt == {prompt_id("a"): 0.5, prompt_id("b"): 1.0}
    (raw, *_) = found.results(dataset="d", split="s", step=3, extra={"judge": "j-1"})
    assert raw.extra == {"n_dropped": 0, "n_wins": 2, "n_wins_base": 1, "n_draws": 0, "judge": "j-1"}


def test_means_by_prompt():
    import numpy as np

    assert means_by_prompt(np.array([1.0, 0, 4]), ["b", "a", "b"]) == {"b": 2.5, "a": 0}
