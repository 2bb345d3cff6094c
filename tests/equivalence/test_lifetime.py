"""Runs that are stopped, killed, damaged or changed: what is left, what is said, and what they come to afterwards."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from align.console import idle_libraries
from align.lifetime import HUNG, SAVED, Watchdog
from align.recipe import read_recipe
from align.saving import STARTED, alone_in
from align.train import main
from tests.equivalence.test_resume import after_a_crash, command, lines, same_lines
from tests.support import REPOSITORY

pytestmark = pytest.mark.usefixtures("plain_runs")

LONG = {"num_train_epochs": 12, "save_steps": 4, "save_total_limit": 3}
ENGINE = "launch/accelerate/cpu_ddp.yaml"


def same_weights(first: Path, second: Path) -> None:
    one, two = (load_file(run / "model.safetensors") for run in (first, second))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def start(folder: Path, output: str, *more: str, processes: int = 1, **keys: object) -> subprocess.Popen[str]:
    """A run in processes of its own, as users launch it."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "accelerate.commands.launch", f"--config_file={ENGINE}", "--main_process_port=0"]
    return subprocess.Popen(
        [*launcher, "align/train.py", *command(folder, output, *more, **{**LONG, **keys})],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def wait_for_checkpoint(run: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 180
    while not list(run.glob("checkpoint-*/manifest.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training processes below a launcher, by rank."""
    found = [p for p in psutil.Process(process.pid).children(recursive=True) if "align/train.py" in p.cmdline()]
    return sorted((p for p in found if "RANK" in p.environ()), key=lambda p: int(p.environ()["RANK"]))


@pytest.mark.slow
def test_sigterm_saves_and_the_run_goes_on(folder: Path):
    assert main(command(folder, "straight", **LONG)) == 0
    stopped = start(folder, "stopped")
    wait_for_checkpoint(folder / "stopped", stopped)
    stopped.send_signal(signal.SIGTERM)
    output, _ = stopped.communicate(timeout=120)
    assert stopped.returncode == SAVED, output
    assert "stopped by SIGTERM" in output
    assert not (folder / "stopped" / "model.safetensors").exists()
    again = start(folder, "stopped", "--resume_from_checkpoint=auto")
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    same_weights(folder / "stopped", folder / "straight")
    # A line for the step it stopped at is there besides, and an evaluation of the step it goes on from is not.
    stored = {line["step"]: line for line in lines(folder / "straight") if "loss" in line}
    for line in lines(folder / "stopped"):
        if "loss" in line:
            assert line == stored[line["step"]]


@pytest.mark.slow
def test_sigterm_to_the_launcher_reaches_all_processes(folder: Path):
    stopped = start(folder, "run", processes=2)
    wait_for_checkpoint(folder / "run", stopped)
    before = {path.name for path in (folder / "run").glob("checkpoint-*")}
    stopped.send_signal(signal.SIGTERM)
    output, _ = stopped.communicate(timeout=120)
    assert stopped.returncode != 0
    assert "SIGTERM: stopping after this step" in output
    assert {path.name for path in (folder / "run").glob("checkpoint-*")} != before, output
    again = start(folder, "run", "--resume_from_checkpoint=auto", processes=2)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output


@pytest.mark.slow
def test_a_process_that_dies_takes_the_others_with_it(folder: Path):
    run = start(folder, "run", processes=2)
    wait_for_checkpoint(folder / "run", run)
    workers(run)[1].kill()
    output, _ = run.communicate(timeout=120)
    assert run.returncode != 0
    assert "SIGKILL" in output or "exitcode  : -9" in output
    assert list((folder / "run").glob("checkpoint-*/manifest.json"))


@pytest.mark.slow
def test_a_process_that_hangs_is_named(folder: Path):
    run = start(folder, "run", "--ddp_timeout=20", processes=2)
    wait_for_checkpoint(folder / "run", run)
    hanging = workers(run)[1]
    hanging.send_signal(signal.SIGSTOP)
    assert run.stdout is not None
    output, said = "", ""
    try:
        while "no progress for" not in said:
            said = run.stdout.readline()
            assert said, f"it ended without a word of who hangs:\n{output}"
            output += said
    finally:
        hanging.send_signal(signal.SIGCONT)  # or the launcher would wait half a minute before it kills it
    run.communicate(timeout=120)
    assert run.returncode != 0
    assert said.startswith("[process 0] error: ")
    assert "process 1 was last seen in: " in said


class Kept(dict[str, str]):
    """What processes share, as ``torch.distributed.Store`` has it."""

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


def told(doing: str, ago: float, alive: float = 0.0) -> str:
    return json.dumps({"doing": doing, "since": time.time() - ago, "alive": time.time() - alive})


def reports(store: Kept, world: int = 3) -> str:
    watchdog = Watchdog(0, world, 10, store)
    watchdog.note("agreeing on step 7")
    return watchdog.report()


def test_the_report_names_who_gives_no_sign_of_life():
    said = reports(Kept({"1": told("agreeing on step 7", 12), "2": told("scoring", 2, alive=30)}))
    assert "agreeing on step 7; process 2 was last seen in: scoring, 30 s ago" in said
    assert "process 1" not in said


def test_the_report_names_who_is_behind_where_all_are_alive():
    said = reports(Kept({"1": told("agreeing on step 7", 12), "2": told("evaluating", 40)}))
    assert "process 2 was last seen in: evaluating" in said
    assert "process 1" not in said


def test_the_report_names_who_never_came():
    assert "process 2 never gave a sign of life" in reports(Kept({"1": told("starting", 1)}))


@pytest.mark.slow
def test_silence_ends_the_process_and_progress_does_not(capsys: pytest.CaptureFixture[str]):
    ended: list[int] = []
    watchdog = Watchdog(0, 2, 0.4, Kept({"1": told("scoring", 0)}), end=ended.append)
    watchdog.start()
    for number in range(12):
        watchdog.note(f"step {number}")
        time.sleep(0.05)
    assert not ended
    time.sleep(0.8)
    assert ended == [HUNG]
    assert "in: step 11" in capsys.readouterr().err


# ---- checkpoints that can't be used, and recipes that have changed ----


def half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: half(folder / "model.safetensors"), "model.safetensors has changed"),
        (lambda folder: half(folder / "optimizer.pt"), "optimizer.pt has changed"),
        (lambda folder: (folder / "scheduler.pt").unlink(), "scheduler.pt is missing"),
        (lambda folder: half(folder / "manifest.json"), "manifest.json"),
    ],
    ids=["weights", "optimizer", "missing", "manifest"],
)
def test_a_damaged_checkpoint_is_passed_over(
    folder: Path, damage: Callable[[Path], Any], says: str, capfd: pytest.CaptureFixture[str]
):
    assert main(command(folder, "straight")) == 0
    shutil.copytree(folder / "straight", folder / "run")
    after_a_crash(folder / "run", step=10)
    damage(folder / "run" / "checkpoint-10")
    assert main(command(folder, "run", "--resume_from_checkpoint=last")) == 0
    out = capfd.readouterr().out
    assert "resume: checkpoint-10 was passed over" in out
    assert says in out
    assert "resuming from checkpoint-5" in out
    same_lines(folder / "run", folder / "straight")
    same_weights(folder / "run", folder / "straight")


@pytest.mark.slow
def test_auto_starts_where_there_is_nothing_and_goes_on_where_there_is(folder: Path):
    assert main(command(folder, "run", "--resume_from_checkpoint=auto")) == 0
    shutil.copytree(folder / "run", folder / "straight")
    after_a_crash(folder / "run", step=5)
    assert main(command(folder, "run", "--resume_from_checkpoint=auto")) == 0
    same_lines(folder / "run", folder / "straight")
    # Killed before its first checkpoint: from the beginning.
    after_a_crash(folder / "run", step=0)
    assert main(command(folder, "run", "--resume_from_checkpoint=auto")) == 2  # nothing says that it was unfinished
    (folder / "run" / STARTED).write_text("")
    assert main(command(folder, "run", "--resume_from_checkpoint=auto")) == 0
    same_lines(folder / "run", folder / "straight")


@pytest.mark.slow
@pytest.mark.whole_runs
def test_checkpoints_of_a_former_course_are_set_aside(folder: Path, capfd: pytest.CaptureFixture[str]):
    """Else they would be taken for the newest, and the ones of the new course deleted in their favour."""
    assert main(command(folder, "run")) == 0
    for name in ("model.safetensors", "report.html"):
        (folder / "run" / name).unlink()
    earlier = f"--resume_from_checkpoint={folder / 'run' / 'checkpoint-5'}"
    assert main(command(folder, "run", earlier, save_total_limit=1)) == 0
    assert "resume: checkpoint-10 is of the former course" in capfd.readouterr().out
    assert (folder / "run" / "abandoned-checkpoint-10").is_dir()
    assert [path.name for path in (folder / "run").glob("checkpoint-*")] == ["checkpoint-10"]


@pytest.mark.slow
def test_a_run_that_had_its_last_checkpoint_only_finishes(folder: Path):
    """Killed between its last checkpoint and its report: nothing is trained again, and no step too many."""
    keys = {"num_train_epochs": None, "max_steps": 10, "save_steps": 5}  # in the middle of an epoch
    assert main(command(folder, "straight", **keys)) == 0
    shutil.copytree(folder / "straight", folder / "run")
    after_a_crash(folder / "run", step=10)
    assert main(command(folder, "run", "--resume_from_checkpoint=auto", **keys)) == 0
    same_lines(folder / "run", folder / "straight")
    same_weights(folder / "run", folder / "straight")


@pytest.mark.slow
def test_two_runs_do_not_train_in_one_folder(folder: Path, capfd: pytest.CaptureFixture[str]):
    with alone_in(folder / "run"):
        assert main(command(folder, "run")) == 2
    assert "another process trains in" in " ".join(capfd.readouterr().err.split())
    assert not (folder / "run" / "recipe.yaml").exists()
    assert main(command(folder, "run", num_train_epochs=1)) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", ["--optim=sgd", "--lora.r=4", "--lr_scheduler_type=cosine", "--model.dtype=bfloat16"]
)
def test_what_a_run_can_not_change_on_its_way(folder: Path, capfd: pytest.CaptureFixture[str], change: str):
    assert main(command(folder, "run", num_train_epochs=1)) == 0
    words = ["--resume_from_checkpoint=last", "--allow_recipe_change", change]
    assert main(command(folder, "run", *words, num_train_epochs=1)) == 2
    assert "a run can't change this on its way" in " ".join(capfd.readouterr().err.split())


@pytest.mark.slow
def test_a_new_objective_begins_where_the_recipe_changes(folder: Path):
    assert main(command(folder, "run")) == 0
    after_a_crash(folder / "run", step=5)
    objective = '--objective=[{"name":"dpo","beta":0.5},{"name":"beta_dpo","beta":0.5}]'
    words = [word for word in command(folder, "run", objective) if not word.startswith(("--objective.", "--beta"))]
    assert main([*words, "--resume_from_checkpoint=last", "--allow_recipe_change"]) == 0
    state = json.loads((folder / "run" / "checkpoint-10" / "align_state.json").read_text())["objective_state"]
    assert float(state["beta_dpo/steps"]["values"][0]) == 5  # of ten


@pytest.mark.slow
def test_a_changed_recipe_is_shown_and_holds(folder: Path, capfd: pytest.CaptureFixture[str]):
    constant = "--lr_scheduler_type=constant"
    assert main(command(folder, "run", constant, logging_steps=1)) == 0
    after_a_crash(folder / "run", step=5)
    changed = {"learning_rate": 2e-4, "weight_decay": 0.1, "adam_beta1": 0.8, "logging_steps": 1}
    resume = ["--resume_from_checkpoint=last", constant]
    assert main(command(folder, "run", *resume, **changed)) == 2
    assert "--allow_recipe_change" in " ".join(capfd.readouterr().err.split())
    assert main(command(folder, "run", *resume, "--allow_recipe_change", **changed)) == 0
    assert "resume: train.learning_rate was 0.001, is 0.0002" in capfd.readouterr().out
    rates = {line["step"]: line["learning_rate"] for line in lines(folder / "run") if "loss" in line}
    assert [rates[step] for step in (4, 5, 6, 7)] == [1e-3, 1e-3, 2e-4, 2e-4]
    state = torch.load(folder / "run" / "checkpoint-10" / "optimizer.pt", weights_only=True)
    groups = state["param_groups"]
    assert {group["lr"] for group in groups} == {2e-4}
    assert {tuple(group["betas"]) for group in groups} == {(0.8, 0.999)}
    assert 0.1 in {group["weight_decay"] for group in groups}


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_the_same_rows(folder: Path, capfd: pytest.CaptureFixture[str]):
    keys = {"num_train_epochs": 2, "save_steps": 5, "save_total_limit": 10}
    two = start(folder, "two", processes=2, **keys)
    output, _ = two.communicate(timeout=300)
    assert two.returncode == 0, output
    shutil.copytree(folder / "two", folder / "one")
    after_a_crash(folder / "one", step=5)
    assert main(command(folder, "one", "--resume_from_checkpoint=last", **keys)) == 0
    assert "2 processes wrote this checkpoint and 1 go on from it" in capfd.readouterr().out
    for mine, others in zip(lines(folder / "one"), lines(folder / "two"), strict=True):
        assert mine["step"] == others["step"]
        for key, value in others.items():
            assert mine[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], pytest.param(["--async_save"], marks=pytest.mark.all)], ids=["waits", "goes-on"])
def test_a_disk_that_fills_up_under_two_processes(folder: Path, more: list[str]):
    """One sentence, no half a checkpoint, and with room again the run goes on."""
    script = folder / "full.py"
    script.write_text(
        "import errno, os, sys\n"
        "import align.trainer as trainer\n"
        "def full(folder):\n"
        "    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))\n"
        "trainer.write_manifest = full\n"
        "from align.train import main\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            str(script),
            *command(folder, "run", *more),
        ],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "no space left in" in line]
    assert len(said) == 1, done.stderr[-3000:]
    assert said[0].startswith("error: ")
    assert not list((folder / "run").glob("checkpoint-*"))
    assert main(command(folder, "run", "--resume_from_checkpoint=auto")) == 0
    assert (folder / "run" / "model.safetensors").is_file()


LEAVING = """
import atexit, sys, threading, time
import torch
import torch.distributed as dist

from align.lifetime import leave

rank, how = int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=sys.argv[1], rank=rank, world_size=2)
time.sleep(rank)
tensor = torch.ones(4)
work = dist.all_reduce(tensor, async_op=True)
del tensor, work  # now only gloo's thread has them
if how == "leave":
    atexit.register(print, "registered")
    threading.Timer(0.1, print, ["waited for"]).start()
sys.setswitchinterval(1000)  # that thread waits for Python from here on, until it is taken apart
until = time.monotonic() + 2 - rank
while time.monotonic() < until:
    pass
{"leave": leave, "exit": sys.exit}[how](7)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["leave", pytest.param("exit", marks=pytest.mark.all)])
def test_a_process_that_leaves_others_does_not_abort(tmp_path: Path, how: str):
    words = [sys.executable, "-c", LEAVING, f"file://{tmp_path}/meet"]
    both = [
        subprocess.Popen([*words, rank, how], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    told = [each.communicate(timeout=120) for each in both]
    status = [each.returncode for each in both]
    if how == "exit":  # why leave() is needed: once torch has mended it, it can go
        assert status[0] == -signal.SIGABRT
        return
    assert status == [7, 7], told
    assert [each[0].splitlines() for each in told] == [["waited for", "registered"]] * 2
    assert [each[1] for each in told] == ["", ""]


ALONE = """
import atexit, gc, sys, threading
from align.console import many_imports
from align.lifetime import alone, leave

how = sys.argv[1]

def main():
    with many_imports():
        import yaml
    print("frozen" if gc.get_freeze_count() else "not frozen")
    atexit.register(print, "registered")
    threading.Timer(0.1, print, ["waited for"]).start()
    if how == "watched":
        sys.setprofile(lambda *arguments: None)
    if how == "broken":
        raise LookupError("nobody caught")
    return 7

try:
    leave(main()) if how == "guest" else alone(main)
except SystemExit:
    print("as any other")
    raise
"""


@pytest.mark.parametrize(
    ("how", "status", "said"),
    [
        ("alone", 7, ["frozen", "waited for", "registered"]),
        ("guest", 7, ["not frozen", "waited for", "registered"]),
        ("watched", 7, ["frozen", "as any other", "waited for", "registered"]),
        ("broken", 1, ["frozen", "waited for", "registered"]),
    ],
)
def test_what_a_process_does_before_it_leaves(how: str, status: int, said: list[str]):
    done = subprocess.run([sys.executable, "-c", ALONE, how], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()) == (status, said)
    if how == "broken":
        assert "LookupError: nobody caught" in done.stderr
    else:
        assert done.stderr == ""


@pytest.mark.parametrize(
    ("engine", "words", "idle"),
    [
        ("single", [], {"deepspeed", "bitsandbytes"}),
        ("fsdp2", [], {"deepspeed", "bitsandbytes"}),
        ("zero2", [], {"bitsandbytes"}),
        ("single", ["--optim=adamw_bnb_8bit"], {"deepspeed"}),
        ("single", ["--optim=paged_adamw_32bit"], {"deepspeed"}),
        ("single", ["--lora.r=4"], {"deepspeed"}),
        ("single", ["--reference.model=another", "--reference.source=live"], {"deepspeed"}),
        ("single", ["--trust_remote_code=true"], {"deepspeed"}),
    ],
)
def test_libraries_that_a_run_has_no_use_for(folder: Path, engine: str, words: list[str], idle: set[str]):
    recipe = read_recipe(None, command(folder, "run", *words))
    assert set(idle_libraries(recipe, engine)) == idle


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "hidden"),
    [([], {"deepspeed", "bitsandbytes"}), (["--optim=adamw_bnb_8bit"], {"deepspeed"})],
)
def test_they_are_not_imported(folder: Path, words: list[str], hidden: set[str]):
    """And those that it has a use for are, where they are installed."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "align/train.py", *command(folder, "run", *words), "--plan"],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    # By their modules: a name stands there too where somebody only tried.
    begun = {name.partition(".")[0] for name in imported if "." in name}
    assert "peft" in begun
    assert not begun & hidden
    wanted = {name for name in ("bitsandbytes",) if name not in hidden and importlib.util.find_spec(name)}
    assert wanted <= begun
