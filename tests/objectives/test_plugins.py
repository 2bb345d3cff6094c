"""Objectives of other packages: what docs/add_your_own.md tells is done here, file by file and command by command."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import REPOSITORY

PAGE = REPOSITORY / "docs" / "add_your_own.md"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the page, and what installing them leaves: a module on the path, and its entry points."""
    folder = tmp_path_factory.mktemp("site")
    blocks = re.findall(r"```\w+\n# (squared_hinge/\S+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    names = [Path(path).name for path, _ in blocks]
    assert names == [
        *("squared_hinge.py", "pyproject.toml", "test_squared_hinge.py", "squared_hinge.json", "squared_hinge.yaml")
    ]
    for path, text in blocks:
        (folder / Path(path).name).write_text(text, encoding="utf-8")
    about = folder / "squared_hinge-0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: squared-hinge\nVersion: 0.1\n")
    (about / "entry_points.txt").write_text("[align_preferences]\nsquared_hinge = squared_hinge\n")
    return folder


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )


@pytest.mark.slow
def test_it_is_listed_like_the_others(package: Path):
    shown = run(package, "objectives", "show", "squared_hinge")
    assert "loss = max(0, 1 − m)²" in shown.stdout, shown.stderr
    near = run(package, "objectives", "show", "squared_hings")
    assert "did you mean 'squared_hinge'?" in near.stderr


@pytest.mark.slow
def test_one_command_applies_the_whole_suite(package: Path):
    """The page's own test, its vector, and all laws; and a fault would be found."""
    own = run(package, "pytest", "-q", str(package / "test_squared_hinge.py"), "-p", "no:cacheprovider")
    assert own.returncode == 0, own.stdout
    laws = run(package, "pytest", "-q", "tests/objectives", "-k", "squared_hinge", "-p", "no:cacheprovider")
    assert laws.returncode == 0, laws.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", laws.stdout + " 0 passed")[1]) > 25 or "[100%]" in laws.stdout

    module = package / "squared_hinge.py"
    sound = module.read_text(encoding="utf-8")
    module.write_text(sound.replace("relu(1 - pair.margin)", "relu(1 + pair.margin)"), encoding="utf-8")
    try:
        broken = run(package, "pytest", "-q", "-x", "tests/objectives/test_vectors.py", "-k", "squared_hinge")
    finally:
        module.write_text(sound, encoding="utf-8")
    assert broken.returncode == 1, broken.stdout


@pytest.mark.slow
def test_a_broken_package_is_named(package: Path, tmp_path: Path):
    about = tmp_path / "broken-0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 0.1\n")
    (about / "entry_points.txt").write_text("[align_preferences]\nbroken = no_such_module\n")
    told = run(tmp_path, "objectives").stderr.splitlines()[-1]
    assert "broken adds objectives from 'no_such_module', which can't be imported" in told
    assert told.endswith("mend it, or uninstall broken")
