"""Files of JSON lines that evaluations add to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evals.generations_file import Generation, read_generations, write_generations
from evals.pair_rows import PairRow, read_pairs, write_pairs


def pair(row: int, step: int = 0, **numbers: float) -> PairRow:
    return PairRow(
        dataset="d",
        split="test",
        step=step,
        row=f"d, row {row}",
        prompt_id=f"{row:032x}",
        prompt="p",
        chosen=" a\u2028\ud800",
        rejected=" b",
        numbers=numbers or {"policy_chosen": -1.0},
    )


def test_pairs_of_a_step_replace_those_of_an_earlier_evaluation(tmp_path: Path):
    write_pairs(tmp_path, [pair(0), pair(1)], dataset="d", split="test", step=0)
    write_pairs(tmp_path, [pair(0, 5)], dataset="d", split="test", step=5)
    write_pairs(tmp_path, [pair(1, policy_chosen=-2.5)], dataset="d", split="test", step=0)
    found = list(read_pairs(tmp_path))
    assert [(each.row, each.step, each.numbers) for each in found] == [
        ("d, row 0", 5, {"policy_chosen": -1.0}),
        ("d, row 1", 0, {"policy_chosen": -2.5}),
    ]
    assert found[0].chosen == " a\u2028?"  # a line separator stays; half a character can't


def test_pairs_refuse_what_a_reader_could_not_use():
    with pytest.raises(ValueError, match="policy_chosen of d, row 0 is nan"):
        pair(0, policy_chosen=float("nan"))
    with pytest.raises(ValueError, match="no number 'chess'"):
        pair(0, chess=1.0)


def answer(model: str, text: str, step: int = 0) -> Generation:
    return Generation(
        dataset="d",
        split="test",
        step=step,
        model=model,
        prompt_id="0",
        prompt=[{"role": "user", "content": "hello"}],
        sample=0,
        text=text,
        finish_reason="stop",
        tokens=1,
    )


def test_answers_of_a_model_replace_its_earlier_ones(tmp_path: Path):
    write_generations(tmp_path, [answer("a", "one"), answer("b", "two")])
    write_generations(tmp_path, [answer("a", "three")])
    assert [(each.model, each.text) for each in read_generations(tmp_path)] == [("b", "two"), ("a", "three")]


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "line 2 of .* is not JSON"), ('{"version": 9}', "has version 9"), ('{"version": 1}', "lacks something")],
)
def test_damaged_files_are_named_with_their_line(tmp_path: Path, line: str, message: str):
    write_generations(tmp_path, [answer("a", "one")])
    path = tmp_path / "generations.jsonl"
    path.write_text(path.read_text() + line + "\n")
    before = path.read_text()
    with pytest.raises(ValueError, match=message):
        list(read_generations(tmp_path))
    with pytest.raises(ValueError, match=message):
        write_generations(tmp_path, [answer("a", "two")])
    assert path.read_text() == before
    assert json.loads(before.splitlines()[0])["text"] == "one"
