"""Numbers of other implementations: losses and gradients recorded under ``tests/vectors``, by the scripts in ``make``.

Each case is one step whose microbatch is the whole batch. Where the other implementation updates a running mean before
it uses it, ``state`` is the mean after the update. Numbers are float64 on both sides. Those of token weights are in
``test_token_weights``.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from objectives import OBJECTIVES, Leg, LegBatch
from tests.objectives.batches import loss_and_grad
from tests.support import VECTORS

ANOTHER_IMPLEMENTATION = {"rtol": 1e-10, "atol": 1e-12}  # float64 on both sides, steps in another order


def cases() -> list[Any]:
    found = []
    for path in sorted(VECTORS.glob("*.json")):
        for case in json.loads(path.read_text(encoding="utf-8"))["cases"]:
            found.append(pytest.param(path.stem, case, id=f"{path.stem}-{case['name']}"))
    return found


def matrix(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def read_leg(arrays: dict[str, list[list[float]]]) -> Leg:
    mask = matrix(arrays["mask"]).bool()
    return Leg(
        logps=matrix(arrays["logps"]),
        mask=mask,
        tokens=torch.zeros_like(mask, dtype=torch.int64),
        ref_logps=matrix(arrays["ref_logps"]) if "ref_logps" in arrays else None,
        weight=matrix(arrays["weight"]) if "weight" in arrays else None,
    )


@pytest.mark.parametrize(("name", "case"), cases())
def test_vector(name: str, case: dict[str, Any]):
    objective = OBJECTIVES[name](**case["config"])
    batch = LegBatch(
        legs={leg: read_leg(arrays) for leg, arrays in case["legs"].items()},
        labels=torch.tensor(case["labels"]) if "labels" in case else None,
        density_ratio=torch.tensor(case["density_ratio"], dtype=torch.float64) if "density_ratio" in case else None,
        state={key: torch.tensor(float(value), dtype=torch.float64) for key, value in case.get("state", {}).items()},
    )
    assert set(case["grad"]) == set(batch)
    loss, grad = loss_and_grad(objective, batch)
    assert_close(loss, torch.tensor(case["loss"], dtype=torch.float64), **ANOTHER_IMPLEMENTATION)
    for leg, slopes in case["grad"].items():
        assert_close(grad[leg], matrix(slopes), **ANOTHER_IMPLEMENTATION)
