"""Which checkpoint several processes go on from is decided once, whatever each of them sees."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from align import resume, saving
from align.errors import RunError
from align.recipe import read_recipe
from align.resume import Resume, decide, wait_until_seen
from align.train import main
from tests.equivalence.test_resume import after_a_crash, command, lines
from tests.support import REPOSITORY

# The second process sees an old state of the file system: no checkpoint in the folder, and would find any damaged.
STALE = """
import os, sys
import align.saving as saving
if os.environ["RANK"] == "1":
    def asked(*arguments):
        raise AssertionError("the second process looked for itself")
    saving.checkpoints = lambda folder: []
    saving.verify = saving.find_checkpoint = saving.refuse_other_recipe = saving.refuse_other_engine = asked
from align.train import main
sys.exit(main())
"""
pytestmark = pytest.mark.usefixtures("plain_runs")


def both(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    (folder / "stale.py").write_text(STALE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    return subprocess.run(
        [*launcher, str(folder / "stale.py"), *command(folder, "run", "--resume_from_checkpoint=last", *more)],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.all
def test_the_first_process_decides_and_alone_reads_hashes(folder: Path):
    """It passes over the newest one, which is damaged, for both; and what it refuses stops both."""
    assert main(command(folder, "run")) == 0
    wanted = lines(folder / "run")
    after_a_crash(folder / "run", step=10)
    os.truncate(folder / "run" / "checkpoint-10" / "optimizer.pt", 100)
    shutil.copytree(folder / "run", folder / "before")
    done = both(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("resume: checkpoint-10 was passed over") == 1
    for mine, others in zip(lines(folder / "run"), wanted, strict=True):
        assert mine["step"] == others["step"]
        assert all(mine[key] == pytest.approx(value, rel=1e-4, abs=1e-5) for key, value in others.items())
    shutil.rmtree(folder / "run")
    shutil.copytree(folder / "before", folder / "run")
    done = both(folder, "--learning_rate=0.5")
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "belongs to another recipe" in line]
    assert len([line for line in said if line.startswith("error: ")]) == 1, done.stderr[-3000:]
    assert "the second process looked for itself" not in done.stderr


@pytest.mark.slow
def test_two_processes_add_nothing_to_a_finished_run(folder: Path):
    """One knew that the last step had been evaluated, the other waited for it to do it again."""
    assert main(command(folder, "run")) == 0
    before = lines(folder / "run")
    done = both(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert lines(folder / "run") == before


def checkpoint(folder: Path) -> Path:
    found = folder / "checkpoint-5"
    found.mkdir()
    (found / "weights").write_bytes(b"1234")
    (found / saving.MANIFEST).write_text(json.dumps({"weights": {"bytes": 4, "blake2b": "never read"}}))
    return found


@pytest.mark.slow
def test_files_that_come_late_are_waited_for(tmp_path: Path):
    found = checkpoint(tmp_path)
    wait_until_seen(found, patience=0)
    (found / "weights").rename(tmp_path / "late")

    def arrive() -> None:
        time.sleep(0.2)
        (tmp_path / "late").rename(found / "weights")

    threading.Thread(target=arrive).start()
    wait_until_seen(found, patience=30)
    assert (found / "weights").is_file()


@pytest.mark.parametrize("lacking", ["weights", saving.MANIFEST, "half"])
def test_files_that_never_come_are_named(tmp_path: Path, lacking: str):
    found = checkpoint(tmp_path)
    if lacking == "half":
        (found / "weights").write_bytes(b"12")
    else:
        (found / lacking).unlink()
    name = "weights" if lacking == "half" else lacking
    with pytest.raises(RunError, match=rf"does not see all of it \({name}\); put train\.output_dir on a file system"):
        wait_until_seen(found, patience=0.1)


def test_one_process_asks_nobody(folder: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = read_recipe(None, command(folder, "run"))
    assert resume.agree(recipe, "ddp", 2) == Resume()  # nothing to go on from: nothing to agree on
    recipe = read_recipe(None, command(folder, "run", "--resume_from_checkpoint=auto"))
    assert resume.agree(recipe, "single", 1) == decide(recipe, "single", 1) == Resume()
