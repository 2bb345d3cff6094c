"""Columns beside responses, and log-probs of scored ones: read, needed, kept through preparation, refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.convert import scored
from data.errors import DataError
from data.formats import RowProblem, recognise, to_row
from data.pack import pack
from data.preparation import Prepared, prepare, read_sources
from data.rowstore import pack_rows, unpack_row
from data.shapes import RowsKind, objectives_for
from data.sources import Source
from evals.evaluations.pairs import Ranking
from objectives import COLUMNS, OBJECTIVES, RELABELERS, Candidate, Row
from objectives.reward_transforms import Clip, Unlikeliness, ZScore
from tests.data.byte_level import byte_level
from tests.data.preparing import a_spec


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))


def write(path: Path, rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def a_pair(number: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"{number}?", "chosen": f" yes {number}", "rejected": " no", **more}


def a_sample(number: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"{number}?", "completion": f" yes {number}", **more}


PAIRS = [a_pair(i, chosen_by=("policy", "reference")[i % 2]) for i in range(8)]
SAMPLES = [a_sample(i, preference=i / 8) for i in range(8)]
PAIR = {"scores": ("chosen_by",), "eval_share": 0.0}
SAMPLE = {"legs": ("completion",), "scores": ("preference",), "eval_share": 0.0}


def spec_of(path: Path, column: str, **changes: Any) -> Any:
    """As a recipe for XPO or Nash-MD makes it."""
    source = Source(dataset_name=str(path), attributes=(column,))
    return a_spec(train=(source,), **{**(PAIR if column == "chosen_by" else SAMPLE), **changes})


def refused(spec: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_sources(spec)
    said = str(caught.value)
    assert "\n" not in said
    return said


def numbers(prepared: Prepared, column: str) -> dict[int, float]:
    """By the number of the row in its source."""
    values = np.asarray(prepared.train.table.scores[column]).tolist()
    return {index: value for (_, index), value in zip(prepared.train.where, values, strict=True)}


def read(raw: dict[str, Any], column: str) -> Row | RowProblem:
    return to_row(raw, recognise([raw], where="d"), source="d", index=3, attributes=(column,))


# ---- what may stand in a column ----


@pytest.mark.parametrize(
    ("value", "number"), [("policy", 0.0), ("reference", 1.0), (" Reference ", 1.0), ("POLICY", 0.0)]
)
def test_words_become_numbers(value: str, number: float):
    row = read(a_pair(0, chosen_by=value), "chosen_by")
    assert isinstance(row, Row)
    assert row.scores == {"chosen_by": number}


@pytest.mark.parametrize(("value", "number"), [(0, 0.0), (1, 1.0), (0.25, 0.25), ("0.75", 0.75)])
def test_probabilities_are_numbers_in_their_range(value: Any, number: float):
    row = read(a_sample(0, preference=value), "preference")
    assert isinstance(row, Row)
    assert row.scores == {"preference": number}


@pytest.mark.parametrize(
    ("raw", "column", "reason"),
    [
        *[
            (a_pair(0, chosen_by=value), "chosen_by", "chosen_by is not policy or reference")
            for value in ("chosen", 1, True, ["policy"])
        ],
        *[
            (a_sample(0, preference=value), "preference", "preference is not a number in [0, 1]")
            for value in (-0.01, 1.01, "50")
        ],
        (a_sample(0, preference="much"), "preference", "preference is not a finite number"),
        (a_sample(0, preference=math.nan), "preference", "preference is not a finite number"),
        (a_sample(0, preference=True), "preference", "preference is not a number"),
    ],
)
def test_what_can_t_be_read_names_row_and_column(raw: dict[str, Any], column: str, reason: str, tmp_path: Path):
    problem = read(raw, column)
    assert isinstance(problem, RowProblem)
    assert str(problem) == f"d, row 3: {reason}"
    path = write(tmp_path / "a.jsonl", [raw])
    assert f"none of 1 rows can be used as {recognise([raw], where='d').name}" in refused(spec_of(path, column))
    assert f"row 0: {reason}; mend the rows" in refused(spec_of(path, column))


def test_columns_that_no_objective_reads_may_hold_anything(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [a_pair(i, chosen_by="me", preference=70) for i in range(8)])
    rows = read_sources(a_spec(path)).train
    assert all(row.scores == {} for row in rows)


# ---- through preparation ----


@pytest.mark.parametrize(
    ("rows", "column", "expected"),
    [(PAIRS, "chosen_by", {i: i % 2 for i in range(8)}), (SAMPLES, "preference", {i: i / 8 for i in range(8)})],
)
def test_every_row_keeps_its_own(rows: list[dict[str, Any]], column: str, expected: dict[int, float], tmp_path: Path):
    """Read, prepared, read again from the cache, and packed in any order."""
    spec = spec_of(write(tmp_path / "a.jsonl", rows), column)
    for _ in range(2):
        prepared = prepare(spec, byte_level())
        assert numbers(prepared, column) == expected
    assert len(list((tmp_path / "cache" / "rows").glob("*/report.json"))) == 1
    table = prepared.train.table
    batch = pack(table, [5, 2, 7], share=True, kind="bucket", counts={})
    assert batch.scores[column].tolist() == np.asarray(table.scores[column])[[5, 2, 7]].tolist()
    assert batch.to("cpu").scores[column].tolist() == batch.scores[column].tolist()


@pytest.mark.parametrize(
    ("rows", "column", "other"), [(PAIRS, "chosen_by", "policy"), (SAMPLES, "preference", 0.5)], ids=["pairs", "one"]
)
def test_another_value_is_other_data(rows: list[dict[str, Any]], column: str, other: Any, tmp_path: Path):
    """The same tokens, another fingerprint: what a run was trained on, and what its resuming compares."""
    changed = [row | {column: other} if i == 5 else row for i, row in enumerate(rows)]
    found = [
        prepare(spec_of(write(tmp_path / f"{i}.jsonl", each), column), byte_level())
        for i, each in enumerate((rows, changed, rows))
    ]
    prints = [each.train.table.fingerprint() for each in found]
    assert prints[0] == prints[2] != prints[1]
    assert found[0].report["dataset_hash"] != found[1].report["dataset_hash"]


def test_a_file_that_was_changed_is_read_again(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", PAIRS)
    before = prepare(spec_of(path, "chosen_by"), byte_level())
    write(path, [row | {"chosen_by": "reference"} for row in PAIRS])
    after = prepare(spec_of(path, "chosen_by"), byte_level())
    assert set(numbers(before, "chosen_by").values()) == {0.0, 1.0}
    assert set(numbers(after, "chosen_by").values()) == {1.0}


def test_names_can_be_mapped(tmp_path: Path):
    rows = [{**a_pair(i), "written_by": "reference"} for i in range(8)]
    path = write(tmp_path / "a.jsonl", rows)
    source = Source(dataset_name=str(path), attributes=("chosen_by",), columns={"chosen_by": "written_by"})
    prepared = prepare(a_spec(train=(source,), **PAIR), byte_level())
    assert set(numbers(prepared, "chosen_by").values()) == {1.0}


def test_held_out_rows_and_chat_have_them_too(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", SAMPLES)
    spec = spec_of(path, "preference", eval_share=0.5)
    chat = dataclasses.replace(spec, train=(dataclasses.replace(spec.train[0], as_chat=True),))
    rows = read_sources(chat)
    assert len(rows.held) == 4
    for row in (*rows.train, *rows.held):
        assert row.scores == {"preference": row.index / 8}
        assert row.prompt == ({"role": "user", "content": f"{row.index}?"},)


def test_a_label_may_stand_beside(tmp_path: Path):
    rows = [row | {"label": i % 2 == 0} for i, row in enumerate(SAMPLES)]
    prepared = prepare(spec_of(write(tmp_path / "a.jsonl", rows), "preference", labels=True), byte_level())
    assert numbers(prepared, "preference") == {i: i / 8 for i in range(8)}


# ---- what is refused ----


def test_rows_without_the_column_are_refused(tmp_path: Path):
    said = refused(spec_of(write(tmp_path / "a.jsonl", [a_pair(i) for i in range(4)]), "chosen_by"))
    assert said.startswith(
        f"{tmp_path / 'a.jsonl'}, row 0: the objective needs chosen_by, who wrote the chosen response, and the rows "
        "have prompt, chosen, rejected; add a chosen_by column with policy or reference (data.columns maps names), or "
        "use an objective that works with this data: dpo, ipo, simpo"
    )
    said = refused(spec_of(write(tmp_path / "b.jsonl", [a_sample(i) for i in range(4)]), "preference"))
    assert "row 0: the objective needs preference, the probability that the completion is preferred to the opp" in said
    assert "add a preference column with a number in [0, 1] (data.columns maps names), or use" in said


@pytest.mark.parametrize("nothing", [{}, {"chosen_by": None}, {"chosen_by": ""}], ids=["no key", "null", "empty"])
def test_one_row_without_it_is_named(nothing: dict[str, Any], tmp_path: Path):
    rows = [a_pair(i, **(nothing if i == 5 else {"chosen_by": "policy"})) for i in range(8)]
    said = refused(spec_of(write(tmp_path / "a.jsonl", rows), "chosen_by"))
    assert "a.jsonl, row 5: the objective needs chosen_by, who wrote the chosen response, and this row has" in said


LISTED = [
    {"prompt": f"{i}?", "chosen_by": "policy", "preference": 0.5, "responses": [{"text": "a", "score": 1}] * 2}
    for i in range(4)
]


@pytest.mark.parametrize(
    ("rows", "column", "own"),
    [
        (LISTED, "chosen_by", "a chosen response that is the row's own"),
        (LISTED, "preference", "a completion response that is the row's own"),
        ([row | {"preference": 0.5} for row in PAIRS], "preference", "a completion response that is the row's own"),
    ],
)
def test_what_a_column_says_is_not_said_of_converted_rows(
    rows: list[dict[str, Any]], column: str, own: str, tmp_path: Path
):
    """A rule chooses another response, a pair is two completions: the column would be about something else."""
    said = refused(spec_of(write(tmp_path / "a.jsonl", rows), column))
    assert f"row 0: the objective needs {column}, " in said
    assert own in said


def test_relabelers_that_exchange_responses_are_refused(tmp_path: Path):
    rows = [row | {"score_chosen": 0.9, "score_rejected": 0.1} for row in PAIRS]
    relabel = (RELABELERS["reward_augmented"](form="text", lowest=0.0, highest=1.0),)
    said = refused(spec_of(write(tmp_path / "a.jsonl", rows), "chosen_by", relabel=relabel))
    assert said.startswith("relabel rewrites chosen and rejected, and the objective needs chosen_by, who wrote the ")
    assert "leave relabel out" in said


def test_what_such_rows_serve_includes_what_reads_them():
    pairs = RowsKind(frozenset({"chosen", "rejected"}), scores=frozenset({"chosen_by"}))
    one = RowsKind(frozenset({"gold"}), scores=frozenset({"preference"}))
    assert {"xpo", "dpo"} <= set(objectives_for([pairs]))
    assert {"nash_md", "sft"} <= set(objectives_for([one]))
    for kind in (RowsKind(pairs.legs), RowsKind(one.legs), RowsKind(frozenset(), scored=True)):
        assert not {"xpo", "nash_md"} & set(objectives_for([kind]))


def test_every_column_is_some_objective_s_or_evaluation_s():
    measured = set(Ranking(alpha="data").needs.columns)
    needed = {name for cls in map(OBJECTIVES.__getitem__, OBJECTIVES) if not hasattr(cls, "example") for name in (
        cls().needs.columns
    )}  # fmt: skip
    assert needed | measured == set(COLUMNS)


# ---- log-probs of scored responses ----


def listed(number: int, *responses: tuple[float, float | None]) -> dict[str, Any]:
    entries = [
        {"text": f" {i}", "score": score, **({} if logp is None else {"mean_logp": logp})}
        for i, (score, logp) in enumerate(responses)
    ]
    return {"prompt": f"{number}?", "responses": entries}


GROUPS = [listed(i, (1.0, -0.5), (1.0, -2.0), (0.0, -0.1), (1.0, -1.0)) for i in range(8)]


def test_log_probs_are_read_with_the_scores():
    draft = scored(listed(0, (0.0, -2.0), (1.0, None), (0.5, 0.0)))
    assert draft.candidates == (
        Candidate(text=" 1", score=1.0),
        Candidate(text=" 2", score=0.5, mean_logp=0.0),
        Candidate(text=" 0", score=0.0, mean_logp=-2.0),
    )
    assert scored({"prompt": "q", "responses": [{"text": "a", "score": 1, "mean_logp": "-1.5"}]}).candidates == (
        Candidate(text="a", score=1.0, mean_logp=-1.5),
    )


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("low", "mean_logp is not a finite number"),
        (-math.inf, "mean_logp is not a finite number"),
        ([1], "mean_logp is not a number"),
        (0.5, "mean_logp is above 0, which no log-prob is"),
    ],
)
def test_bad_log_probs_are_told(value: Any, reason: str):
    raw = {"prompt": "q", "responses": [{"text": "a", "score": 1, "mean_logp": value}]}
    problem = to_row(raw, recognise([raw], where="d"), source="d", index=0)
    assert isinstance(problem, RowProblem)
    assert problem.reason == reason


def test_they_are_kept_in_chat_and_in_the_store():
    raw = GROUPS[0]
    row = to_row(raw, recognise([raw], where="d"), source="d", index=0, as_chat=True)
    assert isinstance(row, Row)
    assert [each.mean_logp for each in row.candidates] == [-0.5, -2.0, -1.0, -0.1]
    packed = pack_rows([row])
    assert unpack_row(packed.blob) == row
    other = dataclasses.replace(row.candidates[0], mean_logp=-0.6)
    assert pack_rows([dataclasses.replace(row, candidates=(other, *row.candidates[1:]))]).blob != packed.blob


def test_the_unlikely_right_answer_is_chosen(tmp_path: Path):
    """Without, the first of the three right ones; with, the one that the policy hardly finds."""
    path = write(tmp_path / "a.jsonl", GROUPS)
    plain, weighed = (
        {(row.responses["chosen"], row.responses["rejected"]) for row in read_sources(spec).train}
        for spec in (a_spec(path), a_spec(path, reward_transforms=(Unlikeliness(),)))
    )
    assert plain == {(" 0", " 2")}
    assert weighed == {(" 1", " 2")}
    both = a_spec(path, reward_transforms=(Unlikeliness(), ZScore()), scores=("chosen", "rejected"), eval_share=0.0)
    scores = read_sources(both).train[0].scores
    assert {name: scores[name] for name in ("chosen", "rejected")} == pytest.approx(
        {"chosen": 0.629612, "rejected": -1.491186},
        abs=5e-6,  # the authors have 10⁻⁶ beside the standard deviation
    )


def test_a_prompt_without_log_probs_is_named(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [*GROUPS[:3], listed(9, (1.0, -0.5), (0.0, None))])
    said = refused(a_spec(path, reward_transforms=(Unlikeliness(),)))
    assert said == (
        f"{path}, row 3: unlikeliness ranks responses by their log-probs, and a response has no mean_logp; give each "
        "its mean log-prob per token under the policy that drew it, or leave unlikeliness out"
    )


def test_scores_below_0_are_refused_unless_they_are_clipped(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [listed(i, (1.0, -0.5), (1.0, -2.0), (-1.0, -1.0)) for i in range(8)])
    assert f"{path}, row 0: unlikeliness multiplies scores, and one is below 0" in refused(
        a_spec(path, reward_transforms=(Unlikeliness(),))
    )
    rows = read_sources(a_spec(path, reward_transforms=(Clip(lowest=0.0), Unlikeliness()))).train
    assert {row.responses["chosen"] for row in rows} == {" 1"}
