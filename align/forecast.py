"""What a run will need and take, told before it starts, and what it needed and took, told at its end.

Memory and arithmetic come from tracing the run's own forward and backward pass (``align.tracing``), the machine's rates
from measuring them for a moment. A step is expected to take as long as its matrix products at the rate of a large one,
plus as long as all other operations need to move their bytes, plus what starting each of them costs: on one device they
take turns.
"""

from __future__ import annotations

import resource
import statistics
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import psutil
import torch

from align.assemble import bytes_to_copy, optimizer_bytes, total_steps, train_plan
from align.engines import launched, on_gpu, shards_weights
from align.errors import RecipeError, RunError
from align.forward import bind
from align.logps import positions_per_chunk
from align.model import add_adapter, attention, compute_dtype, dense_attention, keep_input_dtype
from align.quantized import largest_layer, weights_held
from align.rates import Rates, measured
from align.recipe import Recipe
from align.segments import NAME
from align.tracing import MOMENTS, Traced, by_layers, fewer_layers, trace, without_random_numbers
from align.value_head import with_head
from data.errors import DataError
from data.loader import step_counts
from data.pack import pack
from data.plan import Plan
from data.store import TokenTable

KEPT_BY_ALLOCATOR = 1.1
"""How much more memory passes take on CPUs than they ask for: blocks that the C library keeps. Runs of 16, 20 and 135
million weights then took 0.9 to 1.0 of what was forecast."""
STILL_TO_LOAD = 0.09 * 2**30
"""Bytes of libraries that training loads later."""
SPARE_ON_GPUS = 0.1
"""Share of a GPU's memory that no plan uses: its allocator can't fill every gap that freed blocks leave."""
TRACED_ROWS = 2
SAMPLED_STEPS = 50
"""Steps of the plan that are looked at for what a step holds on average."""


class ForecastError(Exception):
    """Nothing can be told beforehand for this model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What a run does because of how much memory there is."""

    most: int | None
    """Positions of a microbatch that fit, where the budget had to be lowered."""
    checkpointing: bool
    """Whether activations are computed again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Of one process. Bytes, seconds, useful tokens (prompts once plus responses)."""

    memory: dict[str, float]
    """Bytes at the worst moment, by what they are for."""
    fixed: float
    """Bytes of gradients and activations that do not depend on the rows."""
    costliest: int
    """Positions of the microbatch that takes the most."""
    available: float
    """Bytes there are, those of this process included."""
    rates: Rates
    microbatches: int
    token_budget: int
    chunk: int
    """Positions whose logits are there at a time; 0 where that is all of them or none."""
    checkpointing: bool
    steps: int
    useful_per_step: float
    """Useful tokens of an average step, all processes."""
    padding: float
    """Share of positions that hold no token."""
    arithmetic: float
    """Seconds of a step's matrix products, those that are computed again included."""
    moving: float
    """Seconds of a step's other operations."""
    starting: float
    """Seconds it takes to start a step's operations, one after the other."""
    useful_flops: float
    """Operations of a step that the result needs: nothing computed twice, no padding. Of this process."""
    reference: float
    """Seconds of the reference pass over all rows."""
    world: int
    share: bool
    """Whether responses share their prompt."""
    most: int | None = None
    """Positions of a microbatch that fit, where the budget had to be lowered."""
    chosen: bool = False
    """Whether ``checkpointing`` was turned on because of memory."""
    spare: float = 0.0
    """Share of ``available`` that has to stay free."""

    @property
    def fit(self) -> Fit:
        """What the run is to do."""
        return Fit(most=self.most, checkpointing=self.checkpointing)

    def fitting(self) -> int:
        """Positions whose activations fit beside everything else; a tenth of memory is left free."""
        passes = self.memory["gradients and activations"]
        fixed = self.peak - passes + self.fixed
        each = max(passes - self.fixed, 1.0) / self.costliest
        return max(int((0.9 * self.available - fixed) / each), 1)

    @property
    def peak(self) -> float:
        """Most bytes of this process."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether that is little enough for the run to be made as it is."""
        return self.peak <= (1 - self.spare) * self.available

    @property
    def step(self) -> float:
        """Seconds an average step is expected to take."""
        return self.arithmetic + self.moving + self.starting

    def lines(self) -> list[str]:
        """What to say before the start."""
        parts = ", ".join(f"{name} {_gib(size)}" for name, size in self.memory.items() if size >= 2**20)
        limit = self.useful_per_step / max(self.arithmetic, 1e-12)
        budget = f"{self.token_budget} positions a microbatch, {self.microbatches} of them a step"
        budget += f", {self.chunk} positions a chunk of the head" if self.chunk else ""
        again = "activations computed again" if self.checkpointing else "activations kept"
        again += "" if self.share else ", every response with its own copy of the prompt"
        lines = [
            f"forecast: {_gib(self.peak)} GiB at most of {_gib(self.available)} ({parts}); {budget}, {again}",
            f"forecast: {self.useful_per_step / self.step:.0f} useful tokens/s (arithmetic alone would allow "
            f"{limit:.0f}), {self.step:.2f} s a step, {self.padding:.1%} padding; {self.steps} steps in "
            f"{_duration(self.steps * self.step)}"
            + (f", after {_duration(self.reference)} for the reference" if self.reference else ""),
        ]
        if self.most is not None:
            lines.append(f"note: train.token_budget auto is {self.token_budget} here, so that it fits into memory")
        if self.chosen:
            lines.append("note: train.gradient_checkpointing auto is true here, because memory is short")
        if self.peak > self.available:
            lines.append(
                "warning: that is more memory than there is; lower train.token_budget"
                + ("" if self.checkpointing else ", set train.gradient_checkpointing")
                + ", or train an adapter (lora)"
            )
        return lines

    def refuse_copies(self) -> None:
        """Raises ``RunError`` where copies of checkpoints (``train.async_save``) have no place beside everything else;
        what doesn't fit without them is warned of, as ever."""
        copies = self.memory["copy of a checkpoint"]
        if self.peak > self.available >= self.peak - copies:
            raise RunError(
                f"train.async_save copies checkpoints of {_gib(copies)} GiB into host memory, and the run would need "
                f"{_gib(self.peak)} GiB of {_gib(self.available)}; leave it out, or lower train.token_budget"
            )

    def verdict(
        self, seconds: list[float], peak: float, reference: float | None = None
    ) -> tuple[list[str], dict[str, Any]]:
        """What to say at the end, and the same as numbers.

        Args:
            seconds: of each step, without evaluating and saving.
            peak: most bytes that this process had.
            reference: seconds of the reference pass over all training rows; None where there was none.
        """
        step = statistics.median(seconds)
        mfu = self.useful_flops / step / self.rates.flops
        shares = {
            "arithmetic": self.arithmetic / step,
            "memory traffic": self.moving / step,
            "starting operations": self.starting / step,
        }
        over = max(sum(shares.values()), 1.0)  # where it went faster than expected
        shares = {name: share / over for name, share in shares.items()}
        shares["the rest (Python, waiting)"] = 1 - sum(shares.values())
        limit = max(shares, key=lambda name: shares[name])
        told = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        found = {
            "forecast": asdict(self) | {"peak": self.peak, "step": self.step},
            "step": step,
            "peak": peak,
            "useful_tokens_per_second": self.useful_per_step / step,
            "mfu": mfu,
            "shares": shares,
            "reference": reference,
        }
        also = f", {_duration(reference)} for the reference (forecast {_duration(self.reference)})" if reference else ""
        return [
            f"verdict: {self.useful_per_step / step:.0f} useful tokens/s, {step:.2f} s a step (median; forecast "
            f"{self.step:.2f}), {_gib(peak)} GiB at most (forecast {_gib(self.peak)}){also}",
            f"verdict: {mfu:.0%} of the device's measured {self.rates.flops / 1e9:,.0f} GFLOP/s went into useful "
            f"arithmetic; limited by {limit} ({told})",
        ], found


def look_ahead(recipe: Recipe, config: Any, table: TokenTable) -> Forecast:
    """A forecast with shared prompts, or with separate sequences where the model's layers can't share them.

    Args:
        recipe: the run's.
        config: of the model.
        table: training rows.
    Raises:
        ForecastError: the model's forward pass depends on numbers that are not there yet.
    """
    kept = _budgeted(_checkpointing(recipe, recipe.train.gradient_checkpointing is True), config, table)
    short = kept.most is not None or not kept.fits
    if recipe.train.gradient_checkpointing != "auto" or not short:
        return kept
    try:
        again = _budgeted(_checkpointing(recipe, True), config, table)
    except ForecastError:  # the model has no such thing
        return kept
    # Where nothing fits, what needs less; else what is faster.
    better = again.step < kept.step if kept.fits and again.fits else again.fits or again.peak < kept.peak
    return replace(again, chosen=True) if better else kept


def _checkpointing(recipe: Recipe, on: bool) -> Recipe:
    return replace(recipe, train=replace(recipe.train, gradient_checkpointing=on))


def _budgeted(recipe: Recipe, config: Any, table: TokenTable) -> Forecast:
    """As ``look_ahead``, with activations kept or computed again as the recipe says."""
    way = attention(recipe.model, config)
    why: Exception | None = None
    for share in (True, False):
        try:
            plan = train_plan(recipe, table, share=share, way=way)
            steps = total_steps(recipe, plan.steps_per_epoch)
            ahead = forecast(recipe, config, plan, table, steps, share=share)
            if ahead.fits or recipe.train.token_budget != "auto":
                return ahead
            most = ahead.fitting()
            plan = train_plan(recipe, table, share=share, way=way, most=most)
            return replace(forecast(recipe, config, plan, table, steps, share=share), most=most)
        except Exception as error:  # a model's own code may fail in any way on tensors without contents
            # What the run itself would refuse; whether sequences will be separate is not known yet.
            if share and isinstance(error, RecipeError | DataError | RunError):
                raise
            why = why or error
    assert why is not None
    raise ForecastError(f"{type(why).__name__}: {str(why).splitlines()[0] if str(why) else ''}") from why


def forecast(recipe: Recipe, config: Any, plan: Plan, table: TokenTable, steps: int, *, share: bool = True) -> Forecast:
    """Looks ahead, before a weight is read.

    Args:
        recipe: the run's.
        config: of the model.
        plan: as the run will make it.
        table: training rows.
        steps: optimizer steps of the run.
        share: whether responses share their prompt's positions.
    """
    dtype = compute_dtype(recipe.model)
    device = torch.device("cuda" if on_gpu() else "cpu")
    rows = plan.costliest()
    checkpointing = recipe.train.gradient_checkpointing is True
    traced, constant = _of_rows(recipe, config, plan, table, rows, dtype, device, share=share)
    rates = measured(device, dtype)
    bins = [part for step in plan.epoch(0)[:SAMPLED_STEPS] for ranks in step for part in ranks if len(part)]
    some = min(plan.steps_per_epoch, SAMPLED_STEPS)
    positions = sum(plan.positions(part) for part in bins) / some / plan.world
    useful = float(table.shared_lengths()[np.concatenate(bins)].sum()) / some
    scale = positions / plan.positions(rows)
    full = recipe.lora is None
    live = recipe.needs_reference and recipe.reference.source != "cached"
    forward = traced.forward_flops * scale
    reference = 0.0
    if recipe.needs_reference and not live:
        of_step = forward / rates.flops + traced.moved * scale / 3 / rates.bandwidth
        of_step += traced.calls / 3 * plan.microbatches * rates.start
        reference = len(table) / recipe.train.rows_per_step * of_step
    return Forecast(
        memory=_memory(recipe, traced, device, plan.world),
        fixed=_passes(constant, device, plan.world),
        costliest=plan.positions(rows),
        available=_available(device),
        rates=rates,
        microbatches=plan.microbatches,
        token_budget=plan.token_budget,
        chunk=positions_per_chunk(_vocabulary(config), device) if share and not recipe.mixture.needs.values else 0,
        checkpointing=checkpointing,
        steps=steps,
        useful_per_step=useful,
        padding=1 - useful / (positions * plan.world),
        arithmetic=(traced.total_flops * scale + live * forward) / rates.flops,
        # The optimizer reads gradient, weight and two moments, and writes the latter three; clipping reads gradients.
        moving=(traced.moved * scale * (4 / 3 if live else 1) + 8 * 4 * traced.trained) / rates.bandwidth,
        starting=traced.calls * plan.microbatches * (4 / 3 if live else 1) * rates.start,
        useful_flops=forward * (3 if full else 2) * useful / (positions * plan.world),
        reference=reference,
        world=plan.world,
        share=share,
        spare=SPARE_ON_GPUS if device.type == "cuda" else 0.0,
    )


def _of_rows(
    recipe: Recipe,
    config: Any,
    plan: Plan,
    table: TokenTable,
    rows: np.ndarray,
    dtype: torch.dtype,
    device: torch.device,
    *,
    share: bool,
) -> tuple[Traced, Traced]:
    """A microbatch of these rows, and what of it is there without any: a few of them are traced, once and twice, and
    the rest follows. Gradients and copies of weights do not grow with the rows."""
    some = rows[np.linspace(0, len(rows) - 1, min(len(rows), TRACED_ROWS)).astype(int)]
    divided = launched().startswith(("zero", "fsdp"))

    def traced(chosen: np.ndarray) -> Traced:
        whole = partial(
            trace,
            batch=pack(table, chosen, share=share, kind=plan.layout.kind, counts=step_counts(table, chosen)),
            make=lambda each: skeleton(recipe, each),
            dtype=dtype,
            checkpointing=recipe.train.gradient_checkpointing is True,
            held=lambda model: weights_held(model, recipe.model),
            copies=not divided,  # DeepSpeed and FSDP2 have weights in the type they compute in
        )
        return by_layers(config, whole)

    with without_random_numbers():
        once, twice = traced(some), traced(np.concatenate([some, some]))
        whole = _largest_layer(recipe, config)
    # Logits are there a chunk at a time. What is traced lies on a CPU, whatever the run's device.
    vocabulary = _vocabulary(config)
    tokens, tokens_of_some = (
        sum(int(leg.lengths()[each].sum()) for leg in table.legs.values()) for each in (rows, some)
    )
    chunk, chunk_of_some = (positions_per_chunk(vocabulary, each) for each in (device, torch.device("cpu")))
    logits = twice.logits * min(chunk, tokens) / min(chunk_of_some, 2 * tokens_of_some)

    def again(tokens: float, chunk: int) -> float:
        return once.head * max(tokens - chunk, 0.0)

    first = once.total_flops - again(tokens_of_some, chunk_of_some)
    further = twice.total_flops - again(2 * tokens_of_some, chunk_of_some) - first

    def of(times: float) -> Traced:
        found = once + (twice + once * -1.0) * (times - 1)
        peaks = {moment: max(getattr(found, moment), 0.0) + whole for moment in MOMENTS}
        total = first + further * (times - 1) + again(times * tokens_of_some, chunk)
        return replace(found, calls=once.calls, total_flops=total, logits=logits, **peaks)

    return of(plan.positions(rows) / plan.positions(some)), of(0.0)


def _vocabulary(config: Any) -> int:
    return int(config.get_text_config().vocab_size)


def _largest_layer(recipe: Recipe, config: Any) -> float:
    """Bytes of a quantized layer's weights while it computes."""
    if not recipe.model.quantized:
        return 0.0
    with torch.device("meta"):
        return largest_layer(skeleton(recipe, fewer_layers(config)), recipe.model)


def skeleton(recipe: Recipe, config: Any) -> torch.nn.Module:
    """The policy without contents."""
    from peft import PeftConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    values = recipe.mixture.needs.values
    kind: Any = AutoModelForSequenceClassification if values else AutoModelForCausalLM
    if values:
        config = with_head(config, values, recipe.model.model_name_or_path)
    way = NAME if dense_attention(config) == "sdpa" else "eager"
    dtype = torch.float32 if recipe.lora is None else compute_dtype(recipe.model)
    model: Any = kind.from_config(
        config, attn_implementation=way, dtype=dtype, trust_remote_code=recipe.model.trust_remote_code
    )
    if recipe.lora is not None and recipe.lora.adapter_name_or_path is not None:
        adapter = PeftConfig.from_pretrained(recipe.lora.adapter_name_or_path)
        adapter.inference_mode = False  # as it was saved; here it is trained on
        model = get_peft_model(model, adapter)
    elif recipe.lora is not None:
        model = add_adapter(model, recipe.lora)
    if recipe.lora is not None:
        keep_input_dtype(model)
    bind(model)
    return model


def _memory(recipe: Recipe, traced: Traced, device: torch.device, world: int) -> dict[str, float]:
    name, engine = recipe.train.optim, launched()
    of_weights = world if shards_weights(engine) else 1
    of_optimizer = world if engine.startswith(("zero", "fsdp")) else 1
    each = optimizer_bytes(name)
    paged = name.startswith("paged") and device.type == "cuda"
    second = recipe.needs_reference and (
        recipe.reference.source == "live" or recipe.reference.model not in ("initial", "base")
    )
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        program = float(total - free)
    else:
        program = psutil.Process().memory_info().rss + STILL_TO_LOAD
    return {
        "program": program,
        "weights": traced.parameter_bytes / of_weights,
        "optimizer": 0.0 if paged else each * traced.trained / of_optimizer,
        "gradients and activations": _passes(traced, device, world),
        "reference": traced.parameter_bytes / of_weights if second else 0.0,
        "copy of a checkpoint": 0.0
        if device.type == "cuda"
        else bytes_to_copy(recipe, traced.parameters, traced.trained, engine, world),
        "initial weights": traced.trained_bytes if recipe.regularizers else 0.0,
    }


def _passes(traced: Traced, device: torch.device, world: int) -> float:
    """Bytes of gradients and activations of one process."""
    engine, gradients = launched(), traced.trained_bytes
    if engine in ("zero2", "zero3", "fsdp2"):
        gradients /= world
    elif engine == "ddp":
        gradients *= 2  # DDP's buckets are copies of them unless it is told gradient_as_bucket_view
    return (gradients + traced.activations) * (KEPT_BY_ALLOCATOR if device.type == "cpu" else 1.0)


def most_memory() -> float:
    """Most bytes this process has had, on the accelerator where there is one."""
    if on_gpu():
        free, total = torch.cuda.mem_get_info()
        beside = total - free - torch.cuda.memory_reserved()
        return float(torch.cuda.max_memory_reserved() + beside)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _available(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[1])
    return float(psutil.virtual_memory().available + psutil.Process().memory_info().rss)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s" if minutes else f"{seconds:.1f} s"
