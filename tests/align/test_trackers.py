"""Runs that are followed: what W&B and TensorBoard have of them afterwards, and trackers that break."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align.errors import RecipeError
from align.tracker_adapters import KINDS, Opening, SampleTable, refuse_without_login
from align.trackers import Trackers, tracker_name
from align.train import main
from align.watch import DisplacementAlarm
from evals.generations_file import Generation, write_generations
from evals.results import Result
from tests.equivalence.test_resume import after_a_crash, command, lines
from tests.support import REPOSITORY

KEY = "0123456789abcdef" * 2 + "01234567"
"""As long as a W&B key."""
EVIL = 'a | b <script>alert("x")</script>\nsecond line'

# W&B and TensorBoard's own.
pytestmark = [
    pytest.mark.usefixtures("plain_runs"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)


def measure(folder: Path) -> Any:
    """Answers and a win rate, as an evaluation before and after training leaves them."""

    def measured(model: Any, tokenizer: Any, step: int) -> list[Result]:
        common = {"dataset": "asked", "split": "test", "step": step}
        answers = [
            Generation(
                **common,
                model="policy",
                prompt_id=str(i),
                prompt=[{"role": "user", "content": f"Question {i}"}],
                sample=0,
                text=EVIL,
                finish_reason="stop",
                tokens=7 + i,
                scores={"judge": 0.25} if i else {},
            )
            for i in range(2)
        ]
        write_generations(folder / "run", answers)
        spread = {"n": 9, "clusters": 9, "stderr": 0.1, "low": 0.4, "high": 0.8, "interval": "clustered-t"}
        return [Result(metric="win_rate/raw", value=0.6, **common, **spread)]

    return measured


def alarm_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the alarm go off at one step of training, whatever the numbers are."""
    count = [0]

    def look(self: DisplacementAlarm, line: Any) -> bool:
        count[0] += "loss" in line
        self.alarmed_at = 2.5
        return "loss" in line and count[0] == step

    monkeypatch.setattr(DisplacementAlarm, "_look", look)


@pytest.mark.whole_runs
@pytest.mark.slow
def test_a_run_in_weights_and_biases_and_tensorboard(
    folder: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    alarm_at(2, monkeypatch)
    words = [*command(folder, "run", save_steps=3, max_steps=6, num_train_epochs=None, logging_steps=1)]
    words += ["--report_to=[wandb,tensorboard]", "--run_name=mine", "--project=tests"]
    assert main(words, measure=measure(folder)) == 0
    run = folder / "run"
    logged = lines(run)
    known = json.loads((run / "trackers.json").read_text())

    from tests.align.wandb_file import read

    (file,) = (run / "wandb").glob("offline-run-*/*.wandb")
    found = read(file)
    assert found["run"] == (known["wandb"]["id"], "tests", "mine")
    assert found["config"]["objective"]
    assert str(folder) not in json.dumps(found["config"]), "the config names no place on this machine"
    history = found["history"]
    for line in logged:
        names = {tracker_name(key): value for key, value in line.items() if key not in ("step", "alarm/displacement")}
        same = [
            entry for entry in history if entry["train/global_step"] == line["step"] and names.keys() <= entry.keys()
        ]
        differing = [
            {name: (entry[name], value) for name, value in names.items() if entry[name] != value} for entry in same
        ]
        assert {} in differing, (line, differing)
    assert all({"train/loss", "train/rewards/margins"} <= e.keys() for e in history if "alarm/displacement" in e)
    alarms = {
        entry["train/global_step"]: entry["alarm/displacement"] for entry in history if "alarm/displacement" in entry
    }
    assert alarms == {1: 0, 2: 1, 3: 0, 4: 0, 5: 0, 6: 0}
    ((title, text),) = found["alerts"]
    assert title == "Likelihood displacement"
    assert text.startswith("step 2: likelihood displacement. Chosen responses lost 2.5 nats")
    evaluated = [entry for entry in history if "eval/ranking/accuracy" in entry]
    assert [entry["train/global_step"] for entry in evaluated] == [0, 5, 6]
    assert all({"eval/ranking/accuracy_low", "eval/ranking/accuracy_high"} <= entry.keys() for entry in evaluated)
    after = [entry for entry in history if "eval/win_rate/raw" in entry]
    assert {(e["train/global_step"], e["eval/win_rate/raw_low"]) for e in after} == {(0, 0.4), (6, 0.4)}
    tables = [entry["samples/test"] for entry in history if "samples/test" in entry]
    assert len(tables) == 2
    table = json.loads((file.parent / "files" / tables[1]["path"]).read_text())
    assert table["columns"] == ["step", "model", "prompt", "response", "tokens", "finish_reason", "judge"]
    assert table["data"][1] == [6, "policy", "user: Question 1", EVIL, 8, "stop", 0.25]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard" / "mine"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert losses == pytest.approx({line["step"]: line["loss"] for line in logged if "loss" in line})
    assert [event.value for event in events.Scalars("alarm/displacement")] == [0, 1, 0, 0, 0, 0]
    assert {event.step for event in events.Scalars("eval/ranking/accuracy_low")} == {0, 5, 6}
    texts = {tag: events.Tensors(tag) for tag in events.Tags()["tensors"]}
    (said,) = (event.tensor_proto.string_val[0].decode() for event in texts["alarm/text_summary"])
    assert "probability goes to responses that are in no pair" in said
    shown = texts["samples/test/text_summary"][-1].tensor_proto.string_val[0].decode()
    assert "&lt;script>" in shown
    assert "<script" not in shown
    assert len(shown.splitlines()) == 4, "a line for each row, whatever is in it"

    # The card says where it was followed; no file has the key.
    assert "W&amp;B: run" in (run / "README.md").read_text()
    for path in run.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path

    # Resumed, it is the same run in W&B, and TensorBoard has no step twice.
    after_a_crash(run, 3)
    assert main([*words, "--resume_from_checkpoint=last"]) == 0
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    again = next(read(each) for each in files if each != file)
    assert again["run"] == (known["wandb"]["id"], "tests", "mine")
    steps = [entry["train/global_step"] for entry in again["history"] if "train/loss" in entry]
    assert steps == [4, 5, 6]
    assert not any("samples/test" in entry and entry["train/global_step"] <= 3 for entry in again["history"])
    events = EventAccumulator(str(run / "tensorboard" / "mine"), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


class Broken:
    """Works until its third line, like a disk that fills up."""

    def __init__(self, opening: Opening) -> None:
        self.entry = {"shown": "Broken"}
        self.lines = 0

    def metrics(self, values: Any, step: int) -> None:
        self.lines += 1
        if self.lines == 3:
            raise OSError(28, "No space left on device")

    def samples(self, table: SampleTable) -> None: ...

    def alarm(self, title: str, text: str, step: int) -> None: ...

    def close(self, *, failed: bool) -> None:
        raise AssertionError("it was left out")


def refuses(opening: Opening) -> Any:
    raise ConnectionError(f"no answer from the service of {opening.project}")


@pytest.mark.slow
def test_a_tracker_that_breaks_is_told_once_and_left_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("align.trackers.KINDS", {"tensorboard": Broken, "wandb": refuses})
    monkeypatch.setattr("align.assemble.refuse_without_login", lambda names: None)
    assert main([*command(folder, "run", num_train_epochs=None, max_steps=4), "--report_to=[wandb,tensorboard]"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")]
    assert said[0] == (
        "warning: wandb failed at step 0 (ConnectionError: no answer from the service of align); the run goes on "
        "without it"
    )
    assert "tensorboard failed at step" in said[1]
    assert "No space left on device" in said[1]
    assert len(said) == 2
    assert (folder / "run" / "model.safetensors").is_file()


def test_names() -> None:
    assert tracker_name("loss") == "train/loss"
    assert tracker_name("rewards/margins") == "train/rewards/margins"
    assert tracker_name("eval_ranking/accuracy_low") == "eval/ranking/accuracy_low"


def test_a_run_that_fails_is_closed_as_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []

    class Noted(Broken):
        def close(self, *, failed: bool) -> None:
            closed.append(failed)

    monkeypatch.setattr("align.trackers.KINDS", {"wandb": Noted})
    for error in (None, RuntimeError("it failed")):
        trackers = Trackers(["wandb"], DisplacementAlarm(), lambda line: None)
        try:
            with trackers:
                trackers.begin(tmp_path, {}, project=None, name=None, resumed=None)
                if error:
                    raise error
        except RuntimeError:
            pass
        trackers.close(failed=True)  # does nothing more
    assert closed == [False, True]


def test_other_processes_follow_nothing(tmp_path: Path) -> None:
    trackers = Trackers(list(KINDS), DisplacementAlarm(), lambda line: None)
    trackers.results({"eval/x": 1.0}, 3)
    trackers.close(failed=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_online_without_a_key_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "login", lambda **keys: False)
    monkeypatch.setattr(wandb, "setup", lambda: SimpleNamespace(settings=SimpleNamespace(mode="online")))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(RecipeError, match=r"no API key; run `wandb login` .* WANDB_MODE=offline"):
        refuse_without_login(["tensorboard", "wandb"])
    refuse_without_login(["tensorboard"])
    monkeypatch.setattr(wandb, "login", lambda **keys: True)
    refuse_without_login(["wandb"])


@pytest.fixture
def trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What trackio has stored; in a folder of its own, which it reads from its variable when it is imported."""
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("trackio is not installed: pip install trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    return importlib.import_module("trackio.sqlite_storage").SQLiteStorage


def opening(folder: Path, **keys: Any) -> Opening:
    return Opening(run_dir=folder, project="tests", name="mine", config={"objective": "dpo"}, **keys)


def test_trackio(tmp_path: Path, trackio: Any) -> None:
    tracker = KINDS["trackio"](opening(tmp_path))
    for step in (3, 4, 5):
        tracker.metrics({"train/loss": step / 10}, step)
    tracker.samples(SampleTable(name="samples/test", step=3, columns=["prompt", "judge"], rows=[[EVIL, None]]))
    tracker.alarm("Likelihood displacement", "step 3: it fell", 3)
    tracker.close(failed=False)
    again = KINDS["trackio"](opening(tmp_path, earlier=tracker.entry, step=5))
    assert again.entry == tracker.entry
    again.metrics({"train/loss": 0.25}, 6)
    again.close(failed=True)
    ((run, name),) = ((each["id"], each["name"]) for each in trackio.get_run_records("tests"))
    assert {"id": run, "name": name} == {key: tracker.entry[key] for key in ("id", "name")}
    logged = trackio.get_logs("tests", "mine")
    losses = [(line["step"], line["train/loss"]) for line in logged if "train/loss" in line]
    assert losses == [(3, 0.3), (4, 0.4), (5, 0.5), (6, 0.25)]
    (table,) = (line["samples/test"]["_value"] for line in logged if "samples/test" in line)
    assert table == [{"prompt": EVIL, "judge": None}]
    (alert,) = trackio.get_alerts("tests")
    assert (alert["step"], alert["text"], alert["level"]) == (3, "step 3: it fell", "warn")
    assert trackio.get_run_config("tests", "mine")["objective"] == "dpo"


def test_trackio_goes_on_in_its_own_run_and_in_no_other_of_its_name(tmp_path: Path, trackio: Any) -> None:
    """trackio resumes the newest run of a name, which may be that of another folder."""
    first, second = (KINDS["trackio"](opening(tmp_path)) for _ in range(2))
    for tracker, loss in ((first, 0.1), (second, 0.2)):
        tracker.metrics({"train/loss": loss}, 1)
        tracker.close(failed=False)
    again = KINDS["trackio"](opening(tmp_path, earlier=first.entry, step=1))
    again.metrics({"train/loss": 0.3}, 2)
    again.close(failed=False)
    ids = [first.entry["id"], second.entry["id"], again.entry["id"]]
    assert len(set(ids)) == 3
    logged = [[line["train/loss"] for line in trackio.get_logs("tests", run_id=each)] for each in ids]
    assert logged == [[0.1], [0.2], [0.3]]


@pytest.mark.slow
def test_a_run_in_trackio(folder: Path, trackio: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alarm_at(2, monkeypatch)
    words = [*command(folder, "run", save_steps=3, max_steps=6, num_train_epochs=None, logging_steps=1)]
    words += ["--report_to=trackio", "--run_name=mine", "--project=tests"]
    assert main(words, measure=measure(folder)) == 0
    logged = trackio.get_logs("tests", "mine")
    for line in lines(folder / "run"):
        names = {tracker_name(key): value for key, value in line.items() if key not in ("step", "alarm/displacement")}
        assert any(each["step"] == line["step"] and names.items() <= each.items() for each in logged), line
    alarms = {line["step"]: line["alarm/displacement"] for line in logged if "alarm/displacement" in line}
    assert alarms == {1: 0, 2: 1, 3: 0, 4: 0, 5: 0, 6: 0}
    (alert,) = trackio.get_alerts("tests")
    assert (alert["step"], alert["title"]) == (2, "Likelihood displacement")
    tables = {line["step"]: line["samples/test"]["_value"] for line in logged if "samples/test" in line}
    assert tables.keys() == {0, 6}
    assert [(row["response"], row["judge"]) for row in tables[6]] == [(EVIL, None), (EVIL, 0.25)]
    assert str(folder) not in json.dumps(trackio.get_run_config("tests", "mine"))

    after_a_crash(folder / "run", 3)
    assert main([*words, "--resume_from_checkpoint=last"]) == 0
    (record,) = trackio.get_run_records("tests")
    assert record["id"] == json.loads((folder / "run" / "trackers.json").read_text())["trackio"]["id"]
    losses = [(each["step"], each["train/loss"]) for each in trackio.get_logs("tests", "mine") if "train/loss" in each]
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6, 4, 5, 6]
    assert losses[6:] == losses[3:6]


def test_the_page_names_every_tracker() -> None:
    page = (REPOSITORY / "docs" / "live.md").read_text()
    assert all(f"`{name}`" in page for name in KINDS)
