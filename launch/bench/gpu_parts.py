"""What ``launch.bench.gpu`` measures beside training: a matrix product, attention kernels, and what bfloat16 costs."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.assemble import BLOCK
from align.forward import bind
from align.masks import MAKERS
from align.segments import NAME
from data.pack import PackedBatch, pack
from data.store import Ragged, TokenTable
from launch.bench.workloads import has_real_rows, rows_of

CHARACTERS_PER_TOKEN = 4
"""Of English text, about; lengths are wanted, not tokens."""
WAYS = ("flex_attention", NAME, "sdpa")


def ways(device: torch.device) -> list[str]:
    """Implementations of attention that train on a device."""
    return [way for way in WAYS if way != "flex_attention" or device.type == "cuda"]


def table_of(legs: tuple[str, ...], rows: int, longest: int, vocabulary: int) -> TokenTable:
    """Random tokens in the lengths of real rows (instructions with a best, a second and a worst answer), where
    ``ALIGN_SHARED`` has them, else in lengths of a long tail. Rows of more than ``longest`` tokens are passed over."""
    rng = np.random.default_rng(0)
    columns = {"chosen": "chosen", "rejected": "rejected", "gold": "reference"}
    found: list[list[int]] = []
    if has_real_rows():
        for row in rows_of("tpo"):
            texts = [row["prompt"], *(row[columns[leg]] for leg in legs)]
            found.append([max(len(text) // CHARACTERS_PER_TOKEN, 4) for text in texts])
        rng.shuffle(found)
    else:
        drawn = rng.lognormal(np.log([0.1, *[0.15] * len(legs)]), 0.6, (8 * rows, 1 + len(legs)))
        found = np.clip(drawn * longest, 4, None).astype(int).tolist()
    kept = [lengths for lengths in found if sum(lengths) <= longest]
    chosen = [kept[i % len(kept)] for i in range(rows)]
    parts = [
        Ragged.of([rng.integers(3, vocabulary, lengths[i]).tolist() for lengths in chosen])
        for i in range(1 + len(legs))
    ]
    return TokenTable(parts[0], dict(zip(legs, parts[1:], strict=True)))


def product(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    from align.rates import measured

    return measured(device, dtype, seconds=1.0).flops


def kernels(shape: dict[str, int], device: torch.device, dtype: torch.dtype, longest: int) -> dict[str, Any]:
    """Seconds of attention alone in one layer, forward and backward, on the same rows.

    ``varlen`` is PyTorch's kernel for sequences of any length, which has no shared prompts: every response brings its
    own copy. A kernel that does not work here is told by its error.
    """
    table = table_of(("chosen", "rejected"), 16, longest, shape["vocab_size"])
    batch = pack(table, range(8), share=True, kind="pack", counts={}, multiple=BLOCK).to(device)
    found: dict[str, Any] = {}
    for way in ways(device):
        found[way] = _timed(lambda way=way: _of_transformers(way, shape, batch, dtype), device)
    if device.type == "cuda":
        found["varlen"] = _timed(lambda: _varlen(shape, table, range(8), device, dtype), device)
    return found


def _timed(make: Callable[[], Callable[[], Tensor]], device: torch.device) -> float | str:
    """Median seconds of a pass there and back, or what went wrong."""
    try:
        call, taken = make(), []
        for _ in range(8):
            _wait(device)
            before = time.perf_counter()
            call().sum().backward()
            _wait(device)
            taken.append(time.perf_counter() - before)
        return statistics.median(taken[3:])
    except Exception as error:  # told in the place of a number: kernels fail in many ways
        return f"{type(error).__name__}: {error}"[:300]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _drawn(shape: dict[str, int], positions: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value, (1, head, position, size)."""
    size = shape["hidden_size"] // shape["num_attention_heads"]
    heads = shape["num_attention_heads"], shape["num_key_value_heads"], shape["num_key_value_heads"]
    return [torch.randn(1, n, positions, size, device=device, dtype=dtype, requires_grad=True) for n in heads]


def _of_transformers(way: str, shape: dict[str, int], batch: PackedBatch, dtype: torch.dtype) -> Callable[[], Tensor]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    groups = shape["num_attention_heads"] // shape["num_key_value_heads"]
    layer: Any = SimpleNamespace(num_key_value_groups=groups, is_causal=True, training=True)
    parts, mask = _drawn(shape, batch.input_ids.shape[1], batch.input_ids.device, dtype), MAKERS[way](batch)
    return lambda: ALL_ATTENTION_FUNCTIONS[way](layer, *parts, mask)[0]


def _varlen(
    shape: dict[str, int], table: TokenTable, rows: range, device: torch.device, dtype: torch.dtype
) -> Callable[[], Tensor]:
    from torch.nn.attention.varlen import varlen_attn

    lengths = [len(table.prompts[row]) + len(leg[row]) for row in rows for leg in table.legs.values()]
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    query, key, value = (
        each.detach()[0].transpose(0, 1).contiguous().requires_grad_()
        for each in _drawn(shape, sum(lengths), device, dtype)
    )
    longest, causal = max(lengths), (-1, 0)
    call: Any = varlen_attn  # a tensor, unless more is asked for
    return lambda: call(query, key, value, ends, ends, longest, longest, window_size=causal, enable_gqa=True)


def equality(shape: dict[str, int], device: torch.device, dtype: torch.dtype, longest: int) -> dict[str, Any]:
    """How far log-probs (nats a token) and gradients are from a computation in float32, each sequence by itself.

    ``plain`` is the model's own forward on separate sequences in the type of training; the others are shared prompts,
    four rows in one line, by each implementation of attention. They are as good as ``plain`` where they are no farther.
    Two layers with the whole vocabulary. Gradients: of a sum of log-probs with weights of both signs, the distance of
    all gradients together as a share of their length.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    table = table_of(("chosen", "rejected"), 4, longest, shape["vocab_size"])
    torch.manual_seed(0)
    few: dict[str, Any] = {**shape, "num_hidden_layers": 2, "attn_implementation": "sdpa"}
    with device:
        model: Any = LlamaForCausalLM(LlamaConfig(**few))
    bind(model)

    def passed(way: str, *, share: bool, low: bool) -> tuple[Tensor, Tensor]:
        model.set_attn_implementation(way)
        kind, multiple = ("pack", BLOCK) if share else ("bucket", 1)
        batch = pack(table, range(4), share=share, kind=kind, counts={}, multiple=multiple).to(device)
        model.zero_grad()
        with torch.autocast(device.type, dtype, enabled=low):
            logps = model(packed=batch)["logps"]
        (logps * torch.linspace(-1.0, 1.0, len(logps), device=device)).sum().backward()
        gradients = torch.cat([each.grad.flatten().cpu() for each in model.parameters()])
        return logps.detach().double(), gradients

    wanted, slopes = passed("sdpa", share=False, low=False)
    low = dtype != torch.float32

    def compared(way: str, share: bool) -> dict[str, float] | str:
        try:
            found, other = passed(way, share=share, low=low)
        except Exception as error:  # told in the place of the numbers
            return f"{type(error).__name__}: {error}"[:300]
        apart = (found - wanted).abs()
        return {
            "largest": float(apart.max()),
            "mean": float(apart.mean()),
            "gradient": float(torch.linalg.vector_norm(other - slopes) / torch.linalg.vector_norm(slopes)),
        }

    return {"plain": compared("sdpa", False), **{way: compared(way, True) for way in ways(device)}}
