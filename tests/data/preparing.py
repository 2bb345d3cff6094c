"""What a second process runs in ``test_preparation``: importable by name, because processes are spawned."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import data.preparation as preparation
from data.preparation import DataSpec
from data.sources import Source
from data.tokens import TokenPolicy
from tests.data.byte_level import byte_level


def a_spec(*names: str | Path, **changes: Any) -> DataSpec:
    """Pairs from local files, a quarter of the prompts held out."""
    options = {
        "train": tuple(Source(dataset_name=str(name)) for name in names),
        "eval": None,
        "eval_share": 0.25,
        "legs": ("chosen", "rejected"),
        "policy": TokenPolicy(max_length=200),
        "max_dropped_share": 0.5,
        "seed": 0,
        **changes,
    }
    return DataSpec(**options)


def prepare_slowly(path: str, cache: str, log: str, start: Any) -> None:
    """Prepares one file when all processes are ready, and notes every tokenisation in ``log``."""
    os.environ["ALIGN_CACHE"] = cache
    tokenize_rows = preparation.tokenize_rows

    def noted(*args: Any, **options: Any) -> Any:
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.5)  # long enough for the other process to arrive
        return tokenize_rows(*args, **options)

    preparation.tokenize_rows = noted  # type: ignore[assignment]
    start.wait(120)
    prepared = preparation.prepare(a_spec(path), byte_level())
    with open(f"{log}.{os.getpid()}", "w") as file:
        file.write(f"{prepared.report['dataset_hash']} {prepared.train.table.fingerprint()}")
