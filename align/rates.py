"""How fast a device computes, moves bytes and starts operations, found by measuring it for a moment."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Of one device, measured."""

    flops: float
    """Floating-point operations per second of a large matrix product."""
    bandwidth: float
    """Bytes per second read or written by a large addition."""
    start: float
    """Seconds that an operation takes which has next to nothing to do."""


def measured(device: torch.device, dtype: torch.dtype, seconds: float = 0.05) -> Rates:
    """Rates of a device: the best of a few large products and additions."""
    rates = _measured(device, dtype, seconds)
    if device.type == "cuda":  # else the allocator keeps what was measured with, and it counts as the program's
        gc.collect()
        torch.cuda.empty_cache()
    return rates


def _measured(device: torch.device, dtype: torch.dtype, seconds: float) -> Rates:
    size = 1024 if device.type == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = _best(lambda: left @ right, device, seconds)
    numbers = torch.zeros(2**24 if device.type == "cpu" else 2**28, device=device)
    addition = _best(lambda: numbers.add_(1.0), device, seconds)
    few = torch.zeros(64, device=device, requires_grad=True)
    chain = _best(lambda: _many(few).backward(), device, seconds)
    return Rates(
        flops=2 * size**3 / product, bandwidth=2 * numbers.nbytes / addition, start=chain / (2 * SMALL_OPERATIONS)
    )


SMALL_OPERATIONS = 200
"""Of a pass whose time is divided by their number."""


def _many(few: torch.Tensor) -> torch.Tensor:
    for _ in range(SMALL_OPERATIONS):
        few = few * 1.0
    return few.sum()


def _best(work: Any, device: torch.device, seconds: float) -> float:
    state, taken, started = None, [], time.perf_counter()
    while len(taken) < 3 or time.perf_counter() - started < seconds:
        before = time.perf_counter()
        state = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - before)
    del state
    return min(taken)
