"""Writes ``docs/scale.md``: what a run takes on 1, 8 and 64 GPUs, from formulas and from what was measured.

python -m launch.bench.engines --into docs/scale.json      measures (two CPU processes)
python -m launch.scale_page [--check]                      writes the page
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from launch.pages import ROOT, write_or_check

PAGE, NUMBERS = ROOT / "docs" / "scale.md", ROOT / "docs" / "scale.json"
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Model:
    """A shape of Llama's."""

    name: str
    parameters: float
    hidden: int
    layers: int


MODELS = (
    Model(name="1B", parameters=1.24e9, hidden=2048, layers=16),
    Model(name="8B", parameters=8.03e9, hidden=4096, layers=32),
    Model(name="70B", parameters=70.6e9, hidden=8192, layers=80),
)
GPUS = (1, 8, 64)
GPU_MEMORY = 80e9
BUDGET = 8192
"""Positions of a microbatch on one GPU."""
LORA_SHARE = 0.005
"""Trained weights of a LoRA with r 16 on all linear layers, as a share; 0.3 to 1 % by shape."""
PEAK = 989e12
"""An H100's dense bfloat16 operations a second, by its data sheet."""
SHARES = (0.22, 0.4)
"""Of the peak: 22.48 % are published for packed DPO of OLMo2-7B on 16 H100 (https://github.com/allenai/open-instruct,
pull request 1466); 40 % for long packed sequences is our assumption."""
WITHIN, BETWEEN = 450e9, 50e9
"""Bytes a second and direction of NVLink 4 within a machine and of 400 Gbit/s InfiniBand between, by data sheets."""


def memory(model: Model, engine: str, gpus: int, *, lora: bool = False) -> float:
    """Bytes on one GPU: weights, gradients, AdamW, activations with checkpointing, logits of a chunk.

    bfloat16 computation. Whole fine-tuning keeps weights, gradients and both moments in float32, which DeepSpeed splits
    into bfloat16 weights and gradients with float32 masters; with LoRA the frozen weights are in bfloat16.
    """
    count = model.parameters
    trained = count * LORA_SHARE if lora else count
    frozen = 2 * count if lora else 0.0
    layer = 2 * count / model.layers
    held = {
        "ddp": frozen + 16 * trained,
        "zero1": frozen + 4 * trained + 12 * trained / gpus,
        "zero2": frozen + 2 * trained + 14 * trained / gpus,
        "zero3": (frozen + 16 * trained) / gpus + 2 * layer,
        "fsdp2": (frozen + 16 * trained) / gpus + 2 * layer,
    }[engine]
    # Checkpointing keeps the input of every layer, and one layer's inside (about 34 bytes a hidden unit) at a time.
    activations = BUDGET * model.hidden * (2 * model.layers + 34)
    chunk = 8 * 2**24 * 8
    return held + activations + chunk


def communication(model: Model, engine: str, microbatches: int, *, lora: bool = False) -> float:
    """Bytes that one GPU sends in a step, for many GPUs."""
    count = model.parameters
    trained = count * LORA_SHARE if lora else count
    return {
        "ddp": 8 * trained,
        "zero1": 4 * trained,
        "zero2": 2 * trained + microbatches * 2 * trained,
        "zero3": microbatches * (4 * count + 2 * trained),
        "fsdp2": microbatches * (4 * count + 4 * trained),
    }[engine]


ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")


def advice(model: Model, gpus: int, *, lora: bool) -> str:
    """The first engine that fits with a tenth to spare, from what divides least to what divides most."""
    order = ("ddp", "zero1", "zero2", "fsdp2") if gpus > 1 else ("ddp",)
    for engine in order:
        if memory(model, engine, gpus, lora=lora) < 0.9 * GPU_MEMORY:
            return "single" if gpus == 1 else engine
    return "QLoRA or offload" if lora else "LoRA or offload"


def _memory_table(lora: bool) -> Iterator[str]:
    yield "| model | GPUs | " + " | ".join(ENGINES) + " | take |"
    yield "|---|---|" + "---|" * (len(ENGINES) + 1)
    for model in MODELS:
        for gpus in GPUS:
            sizes = [memory(model, engine, gpus, lora=lora) / 1e9 for engine in ENGINES]
            cells = [f"{size:,.0f}" if gpus > 1 or i == 0 else "" for i, size in enumerate(sizes)]
            yield f"| {model.name} | {gpus} | {' | '.join(cells)} | {advice(model, gpus, lora=lora)} |"


def _traffic_table() -> Iterator[str]:
    yield "| model | engine | GB a step, 1 microbatch | 8 microbatches | seconds within a machine | between machines |"
    yield "|---|---|---|---|---|---|"
    for model in MODELS:
        for engine in ENGINES:
            one, eight = (communication(model, engine, number) for number in (1, 8))
            times = f"{one / WITHIN:.2f} to {eight / WITHIN:.2f} | {one / BETWEEN:.1f} to {eight / BETWEEN:.1f}"
            yield f"| {model.name} | {engine} | {one / 1e9:,.0f} | {eight / 1e9:,.0f} | {times} |"


def _arithmetic_table() -> Iterator[str]:
    yield "| model | a step of 64 Ki tokens on 8 GPUs, s | a billion tokens, GPU hours | its reference, GPU hours |"
    yield "|---|---|---|---|"
    for model in MODELS:
        step = [6 * model.parameters * 65536 / (8 * PEAK * share) for share in reversed(SHARES)]
        train = [6 * model.parameters * 1e9 / (PEAK * share) / 3600 for share in reversed(SHARES)]
        reference = [2 * model.parameters * 1e9 / (PEAK * share) / 3600 for share in reversed(SHARES)]
        cells = [f"{low:,.1f} to {high:,.1f}" for low, high in (step, train, reference)]
        yield f"| {model.name} | {' | '.join(cells)} |"


def _measured_table(found: dict[str, Any]) -> Iterator[str]:
    yield "| engine | whole weights read, MiB | at the end, MiB | s a step | our own operations a step |"
    yield "|---|---|---|---|---|"
    for engine, numbers in found["engines"].items():
        operations = [
            f"{count:g} {name} of {numbers['bytes_per_step'].get(name, 0):g} bytes"
            for name, count in numbers["operations_per_step"].items()
            if count
        ]
        name = engine.removeprefix("cpu_")
        read, most = (" and ".join(f"{mib:,.0f}" for mib in numbers[key]) for key in ("read_mib", "peak_mib"))
        yield f"| {name} | {read} | {most} | {numbers['seconds']:.2f} | {', '.join(operations) or 'none'} |"


def page() -> str:
    """The whole page."""
    found = json.loads(NUMBERS.read_text(encoding="utf-8"))
    eight = MODELS[1]
    step = 6 * eight.parameters * 65536 / (8 * PEAK * SHARES[1])
    gathered = 4 * eight.parameters / BETWEEN
    host = {model.name: 4 * model.parameters / 1e9 for model in MODELS}
    tokens = 1e9 * 4 / 1e9
    lines = [
        "# Scale",
        "",
        "What a run takes beyond one GPU. The first table is measured; the others are arithmetic, with the formulas in",
        "`launch/scale_page.py`, and nobody here has run them: they say what to try first, not what you will get. A",
        "run's own `--plan` forecasts memory and time for its model, data and machine.",
        "",
        "## Measured",
        "",
        f"Two CPU processes, the {found['shape']} shape, KTO, {found['steps']} steps: "
        "`python -m launch.bench.engines --into",
        "docs/scale.json`. Counts are exact over all processes because the plan knows them beforehand; what is left is",
        "one sum a step, of bad losses, signals to stop and what objectives observe.",
        "",
        *_measured_table(found),
        "",
        "Memory is the most that the first and the second process have had: when the first one's weights are in host",
        "memory and the second has at most its part, and at the end. Under `zero3` and `fsdp2` one process reads for",
        "all; the others allocate memory for the weights and never write to it, so that it takes no physical memory.",
        "That shows for `fsdp2`, which sends one weight after the other. DeepSpeed sends all of them: on CPUs they are",
        "written to that memory after all, on GPUs to the GPU's (by its source, not measured). Most of all this is the",
        "program itself.",
        "",
        "## Memory of one GPU (GB), all weights trained",
        "",
        f"bfloat16, AdamW, {BUDGET} positions a microbatch, activations computed again, GPUs of "
        f"{GPU_MEMORY / 1e9:.0f} GB.",
        "",
        *_memory_table(lora=False),
        "",
        "## Memory of one GPU (GB), LoRA with r 16 on all linear layers",
        "",
        f"As above; trained weights are taken to be {LORA_SHARE:.1%} of all (0.3 to 1 % by shape), and grow with r.",
        "",
        *_memory_table(lora=True),
        "",
        "## Communication",
        "",
        "Bytes that each GPU sends, for many GPUs; times at 450 GB/s (NVLink 4) and 50 GB/s (400 Gbit/s InfiniBand).",
        "They hide behind arithmetic where they are shorter than it.",
        "",
        *_traffic_table(),
        "",
        "## Arithmetic",
        "",
        f"6 operations a weight and token to train, 2 for the reference, at {SHARES[1]:.0%} and {SHARES[0]:.0%} of an "
        "H100's peak. The latter is",
        "published for packed DPO of a 7B model on 16 H100 ([open-instruct, pull request",
        "1466](https://github.com/allenai/open-instruct/pull/1466): 22.48 %); the former is our assumption. Tokens are",
        "prompts once plus responses.",
        "",
        *_arithmetic_table(),
        "",
        "## Which to choose",
        "",
        "1. What fits on one GPU: `single`, several GPUs: `ddp`. LoRA makes 8B fit on one.",
        "2. What does not: `zero1` where weights and gradients still fit, which communicates least; then `zero2`; then",
        "   `fsdp2` or `zero3`, which divide everything. The column *take* follows this order, with a tenth of the GPU",
        "   to spare.",
        "3. Between machines the first bottleneck is the network: 8B under `fsdp2` gathers its weights in "
        f"{gathered:.1f} s a",
        f"   microbatch and computes 64 Ki tokens on 8 GPUs in {step:.1f} s. Fewer, larger microbatches (a larger",
        "   `train.token_budget`) and more rows a step are what helps.",
        "4. Before the first step the bottleneck is the host's memory: the first process reads whole weights,",
        f"   {host['8B']:.0f} GB for 8B and {host['70B']:.0f} GB for 70B in float32, half of that for LoRA in "
        "bfloat16. Under",
        "   `zero3` and `fsdp2` the others read none; elsewhere every process does, and holds them on its GPU anyhow.",
        "",
        "## A billion tokens of preferences",
        "",
        "About a million pairs of a thousand tokens. Prepared once, at the rate of docs/performance.md; the token",
        f"table is {tokens:.0f} GB on disk, mapped, not read. Reference log-probs are 4 bytes a response token,",
        "kept for every later run on the same rows. Training takes the GPU hours above; the reference, a third of",
        "one pass, is paid once. Checkpoints of 8B with optimizer state are 96 GB each: `train.save_total_limit` times",
        "that on a file system that all machines see.",
        "",
        "## Saving",
        "",
        "A save that waits costs the time to write, hash and sync a checkpoint: 96 GB at 1 GB/s are 1.6 minutes and",
        "more, every `train.save_steps`. `train.async_save` makes it the time of a copy to host memory; the rest",
        "happens in a thread while training goes on, on every engine. What it takes is that memory: weights and",
        "optimizer state, on the first process of a replica (`single`, `ddp`), in equal parts under `zero1` to `zero3`",
        "and `fsdp2`; under DeepSpeed the first process has whole weights as well. A copy that has no place is refused",
        "at the start. A checkpoint counts from its renaming, so that a killed run goes back further by the steps of",
        "one write. That, the memory, and on CPUs that writing takes cores from training, is why it is off by default.",
        "`python -m launch.bench.saving` measures both on your machine.",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes or checks the page; returns the exit status."""
    return write_or_check("launch.scale_page", __doc__, PAGE, page, arguments)


if __name__ == "__main__":
    sys.exit(main())
