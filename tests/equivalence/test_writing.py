"""Checkpoints written while training goes on are those of a run that waits for them, whatever comes in between."""

from __future__ import annotations

import collections
import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from align import forecast as forecasting
from align import saving, trainer, writing
from align.assemble import bytes_to_copy
from align.errors import RunError
from align.lifetime import SAVED
from align.recipe import read_recipe
from align.saving import MANIFEST, PARTIAL, RECIPE
from align.train import main
from align.writing import BackgroundWriter, HostCopies, on_host
from tests.align.test_forecast import AHEAD
from tests.equivalence import test_engines
from tests.equivalence.test_engines import Case, launch
from tests.equivalence.test_lifetime import same_weights, wait_for_checkpoint
from tests.equivalence.test_resume import after_a_crash, command, same_lines
from tests.support import REPOSITORY

pytestmark = pytest.mark.usefixtures("plain_runs")

LATER = "--async_save"
PATIENCE = 60.0
MOVING = ["--reference.source=live", '--modifiers=[{"name":"tr_dpo","sync_steps":2,"sync_alpha":0.5}]']


def contents(checkpoint: Path) -> dict[str, bytes]:
    """All files but the two that name the run: its recipe, and the list with the recipe's hash."""
    found = {str(path.relative_to(checkpoint)): path for path in checkpoint.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name not in (MANIFEST, RECIPE)}


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("checkpoint-*"))


# ---- what is written ----


def same_bytes(first: Path, second: Path) -> None:
    own, others = contents(first), contents(second)
    assert own.keys() == others.keys()
    assert [file for file, content in own.items() if others[file] != content] == []


@pytest.mark.all
@pytest.mark.parametrize("more", [["--lora.r=4"], MOVING], ids=["lora", "moving-reference"])
def test_every_byte_is_that_of_a_run_which_waits(folder: Path, more: list[str]):
    assert main(command(folder, "waits", *more)) == 0
    assert main(command(folder, "goes_on", LATER, *more)) == 0
    assert checkpoints(folder / "goes_on") == ["checkpoint-10", "checkpoint-5"]
    for name in checkpoints(folder / "waits"):
        same_bytes(folder / "goes_on" / name, folder / "waits" / name)
    assert not (folder / "goes_on" / PARTIAL).exists()
    same_lines(folder / "goes_on", folder / "waits")


def values(path: Path) -> Any:
    return torch.load(path, weights_only=False, map_location="cpu")


def same_values(first: Any, second: Any, where: str) -> None:
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype, where
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            same_values(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), where
        for i, (one, two) in enumerate(zip(first, second, strict=True)):
            same_values(one, two, f"{where}.{i}")
    elif isinstance(first, str | int | float | bool | None):
        assert first == second, where
    else:
        assert type(first) is type(second), where


@pytest.mark.all
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", test_engines.ENGINES)
def test_every_engine_writes_what_it_would_have_written(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """DeepSpeed's files are compared by what is in them: their pickles remember which strings were one object."""
    test_engines.save_model(tmp_path / "untied", tie_word_embeddings=False)
    test_engines.save_rows(tmp_path / "rows.jsonl")
    monkeypatch.setitem(test_engines.KEYS, "max_steps", 8)
    saves = ("--save_strategy=steps", "--save_steps=4", "--save_total_limit=3")
    cases = tuple(
        Case(objective="dpo", lora=lora, model="untied", more=(*saves, f"--async_save={later}"))
        for lora in (False, True)
        for later in ("false", "true")
    )
    runs = launch(tmp_path, engine, cases)
    for waits, goes_on in zip(cases[::2], cases[1::2], strict=True):
        for name in ("checkpoint-4", "checkpoint-8"):
            first, second = runs / waits.name / name, runs / goes_on.name / name
            own, others = contents(first), contents(second)
            assert own.keys() == others.keys()
            for file in [file for file in own if own[file] != others[file] and not file.endswith(".metadata")]:
                assert file.startswith("global_step"), file
                same_values(values(first / file), values(second / file), file)


# ---- when it is written ----


class Events(list[str]):
    """What happened, in order; from any thread."""

    def until(self, said: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while said not in self:
            assert time.monotonic() < deadline, f"{said} never came: {self}"
            time.sleep(0.005)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Events:
    """Steps, writes that begin, checkpoints that are there, and what is waited for. A write ends when it is."""
    found = Events()
    write, publish, step_end = trainer.write_manifest, trainer.publish, trainer._Bookkeeping.on_step_end
    wait = BackgroundWriter.wait

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **options: Any) -> None:
        step_end(self, args, state, control, **options)
        found.append(f"step {state.global_step}")

    def waits(self: BackgroundWriter) -> None:
        if self._thread is not None:
            found.append(f"waits for {self.writing}")
        wait(self)

    def published(partial: Path, final: Path) -> None:
        publish(partial, final)
        found.append(f"{final.name} is there")

    def begun(partial: Path) -> None:
        found.append(f"writes {partial.name}")
        held.get(partial.name, lambda: None)()
        write(partial)

    held: dict[str, Any] = {
        "checkpoint-5": lambda: found.until("waits for checkpoint-5"),
        "checkpoint-10": lambda: found.until("waits for checkpoint-10"),
    }
    monkeypatch.setattr(trainer, "write_manifest", begun)
    monkeypatch.setattr(trainer, "publish", published)
    monkeypatch.setattr(trainer._Bookkeeping, "on_step_end", on_step_end)
    monkeypatch.setattr(BackgroundWriter, "wait", waits)
    return found


@pytest.mark.slow
def test_training_goes_on_and_what_is_written_is_of_its_step(folder: Path, events: Events):
    """The first write ends only when the second save asks for its end: five steps later, its weights are of its step.

    Every byte is that of a run which waits, and a run that goes on from it ends as that one does.
    """
    assert main(command(folder, "run", LATER)) == 0
    order = [events.index(each) for each in (
        "step 5", "step 6", "step 9", "step 10", "waits for checkpoint-5", "checkpoint-5 is there",
        "writes checkpoint-10", "waits for checkpoint-10", "checkpoint-10 is there",
    )]  # fmt: skip
    assert order == sorted(order), events
    assert events.index("writes checkpoint-5") < events.index("step 10"), events
    events[:] = ["waits for checkpoint-5", "waits for checkpoint-10"]
    assert main(command(folder, "waits")) == 0
    assert events.index("checkpoint-5 is there") < events.index("step 6")
    for name in ("checkpoint-5", "checkpoint-10"):
        same_bytes(folder / "run" / name, folder / "waits" / name)
    same_lines(folder / "run", folder / "waits")
    assert not (folder / "run" / PARTIAL).exists()
    after_a_crash(folder / "run", step=5)
    assert main(command(folder, "run", "--resume_from_checkpoint=last", LATER, save_total_limit=1)) == 0
    assert checkpoints(folder / "run") == ["checkpoint-10"]
    same_lines(folder / "run", folder / "waits")
    same_weights(folder / "run", folder / "waits")


@pytest.mark.slow
def test_what_ends_the_training_does_not_end_the_write(
    folder: Path, events: Events, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    look = trainer.ObjectiveTrainer._look_at_step

    def stopped(self: trainer.ObjectiveTrainer) -> None:
        if self.state.global_step == 7:
            raise RunError("the loss is nan at step 8")
        look(self)

    monkeypatch.setattr(trainer.ObjectiveTrainer, "_look_at_step", stopped)
    assert main(command(folder, "run", LATER)) == 2
    assert "the loss is nan at step 8" in capsys.readouterr().err
    assert events.index("step 7") < events.index("checkpoint-5 is there")
    saving.verify(folder / "run" / "checkpoint-5")


# ---- what goes wrong ----


@pytest.mark.slow
@pytest.mark.parametrize("full_at", [5, pytest.param(10, marks=pytest.mark.all)], ids=["between-saves", "last-save"])
def test_a_full_disk_stops_the_run_with_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], full_at: int
):
    """As a save that waits does; what was complete before stays, nothing else does."""
    written = trainer.write_manifest

    def full(partial: Path) -> None:
        assert threading.current_thread() is not threading.main_thread()
        if partial.name == f"checkpoint-{full_at}":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(partial))
        written(partial)

    monkeypatch.setattr(trainer, "write_manifest", full)
    assert main(command(folder, "run", LATER)) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(said) == 1
    assert "no space left in" in said[0]
    assert checkpoints(folder / "run") == (["checkpoint-5"] if full_at == 10 else [])
    assert not (folder / "run" / PARTIAL).exists()
    assert not (folder / "run" / "model.safetensors").exists()
    monkeypatch.setattr(trainer, "write_manifest", written)
    assert main(command(folder, "run", LATER, "--resume_from_checkpoint=auto")) == 0
    assert checkpoints(folder / "run") == ["checkpoint-10", "checkpoint-5"]


STRAIGHT = {"num_train_epochs": 3, "save_steps": 4, "save_total_limit": 3}
SLOW = """
import sys, time
import align.trainer as trainer
written = trainer.write_manifest
def slow(folder):
    written(folder)
    if folder.name != "checkpoint-4":
        (folder.parent.parent / "under_way").touch()
        time.sleep(float(sys.argv[1]))
trainer.write_manifest = slow
from align.train import main
sys.exit(main(sys.argv[2:]))
"""


def start_slowly(folder: Path, seconds: float, *more: str, processes: int = 1, engine: str = "") -> Any:
    """A run whose second write takes long, in a process of its own."""
    script = folder / "slow.py"
    script.write_text(SLOW)
    launcher = [sys.executable]
    if processes > 1:
        config = f"--config_file=launch/accelerate/{engine}.yaml"
        launcher += ["-m", "accelerate.commands.launch", config, "--main_process_port=0"]
    return subprocess.Popen(
        [*launcher, str(script), str(seconds), *command(folder, "run", LATER, *more, **STRAIGHT)],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def wait_for_write(run: Path, process: subprocess.Popen[str]) -> None:
    """Until the second write is under way, all of its files written and only its name lacking."""
    wait_for_checkpoint(run, process)
    deadline = time.monotonic() + 120
    while not (run / "under_way").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ended(process: subprocess.Popen[str]) -> None:
    """Kills a run with all its processes."""
    for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        each.kill()
    process.communicate()


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written(folder: Path):
    run = folder / "run"
    killed = start_slowly(folder, 600)
    wait_for_write(run, killed)
    ended(killed)
    assert checkpoints(run) == ["checkpoint-4"]
    assert (run / PARTIAL / "checkpoint-8" / MANIFEST).is_file()  # all but its name
    assert main(command(folder, "run", LATER, "--resume_from_checkpoint=auto", **STRAIGHT)) == 0
    assert main(command(folder, "straight", **STRAIGHT)) == 0
    same_weights(run, folder / "straight")
    same_lines(run, folder / "straight")
    assert not (run / PARTIAL).exists()


@pytest.mark.all
def test_sigterm_waits_for_the_write_and_leaves_another_checkpoint(folder: Path):
    run = folder / "run"
    stopped = start_slowly(folder, 2)
    wait_for_write(run, stopped)
    stopped.send_signal(signal.SIGTERM)
    output, _ = stopped.communicate(timeout=120)
    assert stopped.returncode == SAVED, output
    last = saving.checkpoints(run)[-1]
    assert f"{last.name} is complete" in output
    assert "checkpoint-8" in checkpoints(run)
    assert int(last.name.split("-")[1]) >= 8
    assert not (run / PARTIAL).exists()
    assert main(command(folder, "run", LATER, "--resume_from_checkpoint=auto", **STRAIGHT)) == 0
    assert main(command(folder, "straight", **STRAIGHT)) == 0
    same_weights(run, folder / "straight")


@pytest.mark.all
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ["cpu_ddp", "cpu_fsdp2"])
def test_two_processes_killed_while_a_checkpoint_is_written(folder: Path, engine: str):
    run = folder / "run"
    killed = start_slowly(folder, 600, processes=2, engine=engine)
    wait_for_write(run, killed)
    ended(killed)
    assert checkpoints(run) == ["checkpoint-4"]
    again = start_slowly(folder, 0, "--resume_from_checkpoint=auto", processes=2, engine=engine)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    assert "resuming from checkpoint-4" in output
    shutil.move(run, folder / "killed")
    straight = start_slowly(folder, 0, processes=2, engine=engine)
    output, _ = straight.communicate(timeout=300)
    assert straight.returncode == 0, output
    same_weights(folder / "killed", run)
    same_lines(folder / "killed", run)


# ---- memory ----


def test_copies_that_have_no_place_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 2**20})())
    with pytest.raises(RunError, match=r"copies checkpoints of 3\.0 MiB into host memory, of which 1\.0 MiB are left"):
        saving.require_memory(3 * 2**20)
    saving.require_memory(2**20)
    monkeypatch.undo()
    memory = {"program": 100.0, "weights": 50.0, "copy of a checkpoint": 30.0}
    replace(AHEAD, memory=memory, available=180.0).refuse_copies()
    replace(AHEAD, memory=memory, available=140.0).refuse_copies()  # too little without them too: a warning, as ever
    with pytest.raises(RunError, match=r"leave it out, or lower train\.token_budget"):
        replace(AHEAD, memory=memory, available=170.0).refuse_copies()


@pytest.mark.slow
@pytest.mark.whole_runs
def test_a_run_without_place_for_copies_stops_before_it_costs_anything(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Less than the run with copies takes, and more than without."""
    recipe = read_recipe(None, command(folder, "run", LATER))
    assert recipe.train.async_save
    monkeypatch.setattr(forecasting, "bytes_to_copy", lambda *_: 2.0**40)
    monkeypatch.setattr(forecasting, "_available", lambda device: 2.0**40)
    assert main(command(folder, "run", LATER)) == 2
    assert "train.async_save copies checkpoints of 1024.00 GiB" in " ".join(capsys.readouterr().err.split())
    assert not (folder / "run").exists()


@pytest.mark.slow
def test_bytes_of_a_copy_are_those_of_the_files(folder: Path):
    """But for what says where numbers are; and none without the key."""
    assert main(command(folder, "run", LATER, "--optim=adamw_torch", num_train_epochs=1)) == 0
    checkpoint = folder / "run" / "checkpoint-5"
    files = sum((checkpoint / name).stat().st_size for name in ("model.safetensors", "optimizer.pt"))
    recipe = read_recipe(checkpoint / RECIPE)
    total = sum(each.numel() for each in values_of(checkpoint).values())
    assert bytes_to_copy(recipe, total, total, "single", 1) == pytest.approx(files, rel=0.1)
    assert bytes_to_copy(recipe, total, total, "ddp", 2) == 12 * total
    assert bytes_to_copy(recipe, total, total, "ddp", 2, first=False) == 0
    assert bytes_to_copy(recipe, total, total, "fsdp2", 4, first=False) == 3 * total
    assert bytes_to_copy(recipe, total, total, "zero3", 4) == 4 * total + 3 * total
    plain = read_recipe(None, command(folder, "plain"))
    assert bytes_to_copy(plain, total, total, "single", 1) == 0


def values_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(checkpoint / "model.safetensors")


def test_a_key_without_effect_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(command(folder, "run", LATER, save_strategy="no", save_steps=None, save_total_limit=None)) == 2
    assert "train.async_save has no effect: train.save_strategy is no" in " ".join(capsys.readouterr().err.split())


# ---- the parts ----


class Pair(NamedTuple):
    first: torch.Tensor
    second: int


def test_copies_do_not_change_and_keep_what_they_are():
    model = nn.Linear(3, 2)
    tied = torch.ones(4)
    state = collections.OrderedDict(model.state_dict())
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    original = {
        "state": state, "tied": [tied, tied.view(4)], "pair": Pair(torch.zeros(2), 7), "size": torch.Size([2, 3]),
        "parameter": nn.Parameter(torch.ones(2)), "leaf": torch.ones(2, requires_grad=True),
        "numbers": np.arange(3), "scalar": 1.5, "dtype": torch.bfloat16, "kinds": collections.defaultdict(list, a=[1]),
    }  # fmt: skip
    copied = on_host(original)
    before = {name: tensor.clone() for name, tensor in state.items()}
    with torch.no_grad():
        for each in (*model.parameters(), tied, original["pair"].first, original["parameter"], original["leaf"]):
            each.fill_(9.0)
    original["numbers"][:] = 9
    original["kinds"]["a"].append(2)
    assert all(torch.equal(copied["state"][name], tensor) for name, tensor in before.items())
    assert copied["state"]._metadata == {"": {"version": 1}}
    assert torch.equal(copied["tied"][0], torch.ones(4))
    assert copied["tied"][0].data_ptr() == copied["tied"][1].data_ptr()
    assert isinstance(copied["pair"], Pair)
    assert copied["pair"].second == 7
    assert torch.equal(copied["pair"].first, torch.zeros(2))
    assert copied["size"] == torch.Size([2, 3])
    assert isinstance(copied["size"], torch.Size)
    assert isinstance(copied["parameter"], nn.Parameter)
    assert copied["leaf"].requires_grad
    assert copied["numbers"].tolist() == [0, 1, 2]
    assert copied["kinds"]["a"] == [1]
    assert copied["kinds"]["b"] == []
    assert copied["dtype"] is torch.bfloat16


def test_what_others_save_in_the_meantime_is_saved(tmp_path: Path):
    """Another thread's file, and a buffer; afterwards all is as it was."""
    saved = torch.save
    copies, buffer = HostCopies(), io.BytesIO()
    with copies.taking():
        torch.save({"a": torch.ones(2)}, tmp_path / "mine.pt")
        torch.save(torch.ones(2), tmp_path / "training_args.bin")
        torch.save({"a": torch.ones(2)}, buffer)
        other = threading.Thread(target=lambda: torch.save({"a": torch.ones(2)}, tmp_path / "others.pt"))
        other.start()
        other.join()
    assert torch.save is saved
    assert sorted(path.name for path in tmp_path.iterdir()) == ["others.pt"]
    assert buffer.tell() > 0
    copies.write()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.pt", "others.pt"]
    assert torch.equal(torch.load(tmp_path / "mine.pt")["a"], torch.ones(2))


@pytest.mark.parametrize(("module", "name", "take"), writing.SAVERS)
def test_every_saver_is_still_there(module: str, name: str, take: str):
    """Each under the name by which its library calls it."""
    import importlib

    assert callable(getattr(importlib.import_module(module), name))
    assert callable(getattr(HostCopies, take))


def test_a_fault_is_raised_once():
    writer = BackgroundWriter(timeout=1)
    writer.wait()
    writer.start("checkpoint-1", lambda: (_ for _ in ()).throw(RunError("no space left")))
    with pytest.raises(RunError, match="no space left"):
        writer.wait()
    writer.look()
    writer.start("checkpoint-2", lambda: None)
    writer.wait()
