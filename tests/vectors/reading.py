"""Reads vector files: what ``make/writing.py`` wrote, as batches of our objectives."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from objectives import OBJECTIVES, Leg, LegBatch, Objective, with_own_step
from tests.objectives.batches import inputs_of, loss_and_grad
from tests.support import VECTORS

ANOTHER_IMPLEMENTATION = {"rtol": 1e-10, "atol": 1e-12}  # float64 on both sides, steps in another order

Rows = list[list[float | None]]
OfRows = list[float | None]
OF_A_LEG = ("logps", "ref_logps", "weight", "mask")
"""Arrays of a leg that are no extras."""


def contents(name: str) -> dict[str, Any]:
    """A file, by its path under ``tests/vectors`` without its ending."""
    return json.loads((VECTORS / f"{name}.json").read_text(encoding="utf-8"))


def vectors_of(name: str) -> Path:
    """An objective's file; for one of another package it lies beside its module."""
    module = OBJECTIVES[name].__module__
    if module.split(".")[0] == "objectives":
        return VECTORS / f"{name}.json"
    return Path(str(sys.modules[module].__file__)).parent / f"{name}.json"


def cases(folder: str = "") -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Of every case in a folder: an id, the objective's name, and the case."""
    paths = sorted((VECTORS / folder).glob("*.json"))
    if not folder:  # and those of objectives in other packages
        paths += [
            path for name in OBJECTIVES.names() if (path := vectors_of(name)).parent != VECTORS and path.is_file()
        ]
    for path in paths:
        vectors = json.loads(path.read_text(encoding="utf-8"))
        for case in vectors["cases"]:
            objective = case.get("objective") or vectors.get("objective") or path.stem
            yield f"{path.stem}-{case['name']}", objective, case


def matrix(rows: Rows | OfRows) -> Tensor:
    """Numbers per token, (row, token), or per row, (row,); null is NaN."""
    with_nan = [[_number(x) for x in row] if isinstance(row, list) else _number(row) for row in rows]
    return torch.tensor(with_nan, dtype=torch.float64)


def _number(x: float | None) -> float:
    return math.nan if x is None else x


def vector(values: OfRows) -> Tensor:
    """Numbers per row; null is NaN."""
    return torch.tensor([_number(x) for x in values], dtype=torch.float64)


def leg_of(arrays: dict[str, Any]) -> Leg:
    """A leg; of one that is recorded as outputs of a scalar head, each response has one token, which nothing reads."""
    if "values" in arrays:
        values = {key: vector(numbers) for key, numbers in arrays["values"].items()}
        one_token = torch.zeros(len(next(iter(values.values()))), 1, dtype=torch.float64)
        mask = torch.ones_like(one_token, dtype=torch.bool)
        return Leg(logps=one_token, mask=mask, tokens=torch.zeros_like(mask, dtype=torch.int64), values=values)
    mask = matrix(arrays["mask"]).bool()
    return Leg(
        logps=matrix(arrays["logps"]),
        mask=mask,
        tokens=torch.zeros_like(mask, dtype=torch.int64),
        ref_logps=matrix(arrays["ref_logps"]) if "ref_logps" in arrays else None,
        weight=matrix(arrays["weight"]) if "weight" in arrays else None,
        extras={key: matrix(rows) for key, rows in arrays.items() if key not in OF_A_LEG},
    )


def batch_of(case: dict[str, Any]) -> LegBatch:
    """One step whose microbatch is the whole batch."""
    return LegBatch(
        legs={leg: leg_of(arrays) for leg, arrays in case["legs"].items()},
        labels=torch.tensor(case["labels"]) if "labels" in case else None,
        density_ratio=vector(case["density_ratio"]) if "density_ratio" in case else None,
        scores={name: vector(values) for name, values in case.get("scores", {}).items()},
        state={key: torch.tensor(float(value), dtype=torch.float64) for key, value in case.get("state", {}).items()},
    )


def objective_of(name: str, case: dict[str, Any]) -> Objective:
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in case["config"].items()}
    return OBJECTIVES[name](**config)


def assert_recorded(objective: Objective, case: dict[str, Any]) -> None:
    """The objective's loss, and its gradient by everything it may be differentiated by, are those of the case.

    Log-probs that are not recorded, beside outputs of a scalar head, have no gradient.
    """
    batch = with_own_step(objective, batch_of(case))
    expected = {name: matrix(slopes) for name, slopes in case["grad"].items()}
    expected |= {leg: torch.zeros_like(batch[leg].logps) for leg, arrays in case["legs"].items() if "values" in arrays}
    assert set(expected) == set(inputs_of(batch))
    loss, grad = loss_and_grad(objective, batch)
    assert_close(loss, torch.tensor(case["loss"], dtype=torch.float64), **ANOTHER_IMPLEMENTATION)
    for name, slopes in expected.items():
        assert_close(grad[name], slopes, **ANOTHER_IMPLEMENTATION)
