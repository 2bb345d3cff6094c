"""What a run was trained on, as memorisation takes it: rows that filters left and that its steps reached."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from align.errors import RunError
from align.train import main as train
from data.loader import PlannedBatches
from evals.__main__ import main as evals
from evals.documents import Documents, trained_rows
from evals.results import Results
from tests.equivalence.test_resume import command

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("plain_runs")]
SHORT = {"save_strategy": "no", "save_steps": None, "num_train_epochs": None, "max_steps": 3}
Row = tuple[int, ...]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> set[Row]:
    """The rows that training steps really read: prompt and chosen response, as token ids."""
    found: set[Row] = set()
    before = PlannedBatches.__getitem__

    def spied(self: PlannedBatches, item: int):
        batch = before(self, item)
        if self.plan.shuffle:
            table = self.table
            found.update(
                (*table.prompts[row].tolist(), *table.legs["chosen"][row].tolist()) for row in batch.rows.tolist()
            )
        return batch

    monkeypatch.setattr(PlannedBatches, "__getitem__", spied)
    return found


def texts(documents: Documents) -> set[Row]:
    return {tuple(documents.ids(row).tolist()) for row in range(len(documents))}


def of_run(run: Path, steps: int = 3) -> tuple[Documents, Documents | None]:
    return trained_rows(run, AutoTokenizer.from_pretrained(run), AutoConfig.from_pretrained(run), steps)


@pytest.mark.parametrize("filters", [None, "--filter=[{name: ches, share: 0.3}, {name: label_noise, share: 0.1}]"])
def test_only_what_steps_reached_and_filters_left_counts(folder: Path, read: set[Row], filters: str | None):
    """38 rows are not held out; three steps of eight reach 24 of those that filters left."""
    words = command(folder, "run", *([filters] if filters else []), **SHORT)
    assert train(words) == 0
    trained, held = of_run(folder / "run")
    assert texts(trained) == read
    assert len(trained) == len(read) == 24
    left = json.loads((folder / "run" / "data_report.json").read_text())["rows"]["train"]
    assert sorted(trained.apart.values()) == sorted(each for each in (38 - left, left - 24) if each)
    assert (left < 38) == (filters is not None)
    assert held is not None
    assert held.split == "held out"
    assert not texts(held) & read


def test_a_second_epoch_reaches_everything(folder: Path, read: set[Row]):
    assert train(command(folder, "run", **{**SHORT, "max_steps": 6})) == 0
    trained, _ = of_run(folder / "run", steps=6)
    assert texts(trained) == read
    assert (len(trained), dict(trained.apart)) == (38, {})


def test_rows_that_were_not_reached_are_the_control_of_a_run_that_held_out_none(folder: Path, read: set[Row]):
    """But for those of prompts that were reached: one of them has another response to learn by heart."""
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    twice = [row | {"chosen": f" again, {row['chosen']}"} for row in rows]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *twice]))
    asked = "{name: memorisation, suffix_tokens: 4, overlap_tokens: 40}"
    words = command(folder, "run", f"--evals={asked}", **{**SHORT, "eval_share": 0})
    assert train([*words, "--serving.engine=transformers"]) == 0
    trained, control = of_run(folder / "run")
    assert texts(trained) == read
    assert control is not None
    prompts = {tuple(trained.given[row].tolist()) for row in range(len(trained))}
    others = {tuple(control.given[row].tolist()) for row in range(len(control))}
    assert not prompts & others
    assert len(prompts) + len(others) == 48
    assert len(control) == 2 * len(others) < 96 - 24
    found = Results.read(folder / "run" / "results.json").results
    of_control = next(each for each in found if each.split == "not reached (control)")
    assert of_control.extra["documents"]["not_trained_on"] == {"the run's 3 steps did not reach it": 96 - 24}
    assert "72 of the run's training rows do not count as trained on" in of_control.extra["warnings"][0]


def test_a_run_of_other_rows_is_refused(folder: Path, capsys: pytest.CaptureFixture):
    assert train(command(folder, "run", "--filter=ches", **SHORT)) == 0
    report = folder / "run" / "data_report.json"
    text = report.read_text()
    told = json.loads(text)
    told["narrowed"] = told["narrowed"][1:]
    report.write_text(json.dumps(told))
    with pytest.raises(RunError, match="are not those it was trained on"):
        of_run(folder / "run")
    del told["narrowed"]
    report.write_text(json.dumps(told))
    with pytest.raises(RunError, match="does not say which rows filters with a model left out; name what"):
        of_run(folder / "run")
    report.write_text("{")
    with pytest.raises(RunError, match="which says what the run was trained on, can't be read"):
        of_run(folder / "run")
    report.write_text(text)
    of_run(folder / "run")
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(reversed(pairs.read_text().splitlines(keepends=True))))
    assert evals(["run", str(folder / "run"), "--evals={name: memorisation, suffix_tokens: 4}"]) == 2
    assert "files, tokenizer or template have changed; restore them, or name" in capsys.readouterr().err
