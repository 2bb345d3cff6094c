"""Filters in recipes, and what the data doctor leaves in a run directory."""

from __future__ import annotations

import json
import shlex

import pytest

from align.errors import RecipeError
from align.recipe import read_recipe
from align.train import main
from data.findings import Diagnosis
from tests.equivalence.runs import write_rows

pytest.importorskip("rensa", reason="near duplicates take the package rensa")

BASE = ["--model_name_or_path=model", "--dataset_name=rows.jsonl", "--output_dir=run", "--objective=dpo"]


@pytest.mark.slow
def test_a_run_with_filters_and_a_check(folder, monkeypatch, capsys):
    """What the filters removed is counted in the report; what is left is what the doctor saw; the recipe reads back."""
    monkeypatch.chdir(folder)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    contradiction = {**rows[3], "chosen": rows[3]["rejected"], "rejected": rows[3]["chosen"]}
    write_rows(folder / "rows.jsonl", [*rows, rows[0], rows[1], contradiction])
    words = "--max_steps 1 --rows_per_step 8 --save_strategy no --data.check --eval_share 0 --filter exact_duplicates"
    assert main([*BASE, *shlex.split(words)]) == 0
    report = json.loads((folder / "run" / "data_report.json").read_text())
    assert report["dropped"] == {"filter exact_duplicates: the same as an earlier row": 2}
    assert report["rows"]["kept"] == len(rows) + 1
    found = Diagnosis.read(folder / "run" / "doctor.json")
    checks = {each.check: each for each in found.findings}
    assert found.rows == len(rows) + 1
    assert checks["exact_duplicates"].rows == 0
    assert (checks["contradictions"].rows, checks["contradictions"].verdict) == (2, "fault")
    assert checks["truncation"].n == len(rows) + 1
    assert "--data.check" in found.command
    assert "data: fault: 2 of" in capsys.readouterr().out
    recipe = read_recipe(folder / "run" / "recipe.yaml")
    assert recipe.resolved()["filter"] == [{"name": "exact_duplicates"}]
    assert recipe.data.check


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--filter '{name: near_duplicates, threshold: 0.2}'", "filter.threshold must be in [0.5, 1], got 0.2"),
        ("--filter '[{name: length_ratio, most: 0}]'", "filter.0.most must be >= 1"),
        ("--filter dedup", "it is called 'exact_duplicates' here"),
        ("--filter '{name: overlap}'", "filter.against is required"),
        ("--filter '{name: overlap, against: []}'", "filter.against must be a list of files"),
        ("--filter '{name: echo, x: 1}'", "unknown key filter.x"),
        ("--filter '[]'", "filter is empty; leave it out"),
    ],
)
def test_keys_that_are_refused(words, says):
    with pytest.raises(RecipeError) as refused:
        read_recipe(None, [*BASE, *shlex.split(words)])
    assert says in str(refused.value)


def test_a_filter_that_can_do_nothing_stops_the_run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    write_rows(folder / "rows.jsonl", [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()])
    assert main([*BASE, "--filter=shared_with_eval"]) == 2
    assert "filter shared_with_eval has no effect on rows.jsonl" in capsys.readouterr().err
    assert not (folder / "run").exists()
