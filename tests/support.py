"""Plain helpers that several test packages import. Nothing here is a fixture."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

REPOSITORY = Path(__file__).resolve().parents[1]

SHARED = Path(os.environ.get("ALIGN_SHARED") or REPOSITORY.parent / "shared")
"""Models and data sets too large for the repository. Tests ask for the fixture ``shared``, which skips without it."""

VECTORS = REPOSITORY / "tests" / "vectors"

VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "CUDA_VISIBLE_DEVICES": "",
}
"""For processes that start vLLM on the CPU."""


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder that the first test process to ask for it fills, and all others read.

    Args:
        folder: below what all processes of a test run share.
        make: fills it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            part = folder.with_suffix(".part")
            part.mkdir()
            make(part)
            part.rename(folder)
    return folder


def common_folder(base: Path, worker: str) -> Path:
    """What all processes of a test run share.

    Args:
        base: ``tmp_path_factory.getbasetemp()``.
        worker: the fixture ``worker_id``: ``master`` where there is one process.
    """
    return base if worker == "master" else base.parent


def without_forecast(patch: pytest.MonkeyPatch) -> None:
    """Runs in this process start without looking ahead, which is a quarter of the time of a run of a few steps."""
    from align import forecast

    def no_forecast(*_: Any) -> Any:
        raise forecast.ForecastError("not wanted")

    patch.setattr(forecast, "look_ahead", no_forecast)


def plain_runs(patch: pytest.MonkeyPatch) -> None:
    """They also write neither report nor card, another quarter."""
    from evals import run_directory

    without_forecast(patch)
    for name in ("write_report", "write_card"):
        patch.setattr(run_directory, name, lambda *_: None)
