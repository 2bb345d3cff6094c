"""What every test starts from: no network, fixed seeds, few threads, the same examples on each run."""

from __future__ import annotations

import gc
import os
import random

# Before anything imports transformers or tokenizers: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from tests.support import SHARED
from tests.support import plain_runs as make_runs_plain

# One thread: models here are tiny, tests run side by side, and OpenMP's threads wait for each other by spinning, which
# on a busy machine makes two of them twenty times slower than one.
torch.set_num_threads(1)

# Derandomized, so that a red run is red again; without a deadline, because a busy machine is not a fault.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None, max_examples=20)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True, scope="module")
def _what_lives_long_is_not_looked_at() -> None:
    """Trainers collect garbage in every run, and would take long to look at all that was ever imported."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """What is left frozen would be told as leaked at the end of the process, by libraries that count."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _same_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def plain_runs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are shortened where only their numbers are looked at; those of tests marked ``whole_runs`` are not."""
    if request.node.get_closest_marker("whole_runs") is None:
        make_runs_plain(monkeypatch)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of models and data sets that are too large for the repository; tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder {SHARED}: set ALIGN_SHARED to where models and data sets lie")
    return SHARED


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny ``model``, ``pairs.jsonl`` to train it on, and a cache of its own."""
    from tests.equivalence.worlds import save_model, save_pairs

    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    save_model(tmp_path / "model")
    save_pairs(tmp_path / "pairs.jsonl")
    return tmp_path
