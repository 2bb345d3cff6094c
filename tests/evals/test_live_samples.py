"""Tables of samples for trackers, from a file that grows."""

from __future__ import annotations

import pytest

from evals.generations_file import Generation, write_generations
from evals.live_samples import MOST_ROWS, MOST_TEXT, NewSamples

TOKEN = "hf_" + "aB3dE6gH9j" * 3


def answer(step: int, sample: int = 0, **changes) -> Generation:
    fields = {
        "dataset": "asked",
        "split": "test",
        "step": step,
        "model": "/home/me/runs/dpo",
        "prompt_id": "p",
        "prompt": "Why?",
        "sample": sample,
        "text": f"Because {step}.",
        "finish_reason": "stop",
        "tokens": 3,
    }
    return Generation(**{**fields, **changes})


def test_every_evaluation_is_told_once(tmp_path):
    samples = NewSamples(tmp_path)
    assert samples() == []
    write_generations(tmp_path, [answer(0, scores={"judge": 0.5})])
    (table,) = samples()
    assert (table.name, table.step) == ("samples/test", 0)
    assert table.columns == ("step", "model", "prompt", "response", "tokens", "finish_reason", "judge")
    assert table.rows == [(0, "dpo", "Why?", "Because 0.", 3, "stop", 0.5)]
    assert samples() == []
    write_generations(tmp_path, [answer(5), answer(5, model="acme/base")])
    assert [(table.step, table.rows[0][1]) for table in samples()] == [(5, "dpo"), (5, "acme/base")]
    assert samples() == []


def test_a_resumed_run_tells_what_comes_after_its_checkpoint(tmp_path):
    write_generations(tmp_path, [answer(0), answer(5), answer(8)])
    assert [table.step for table in NewSamples(tmp_path, told_before=5)()] == [8]


def test_long_and_secret_text_and_messages(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    many = [answer(1, sample, text=f"{TOKEN} {'x' * 5000}", prompt=messages) for sample in range(MOST_ROWS + 5)]
    write_generations(tmp_path, many)
    (table,) = NewSamples(tmp_path)()
    assert len(table.rows) == MOST_ROWS
    assert table.rows[0][2] == "system: Be brief.\nuser: Why?"
    assert table.rows[0][3].startswith("*** x")
    assert len(table.rows[0][3]) == MOST_TEXT + 1


def test_a_file_that_cannot_be_read_says_so(tmp_path):
    (tmp_path / "generations.jsonl").write_text("{")
    with pytest.raises(ValueError, match="line 1 of"):
        NewSamples(tmp_path)()
