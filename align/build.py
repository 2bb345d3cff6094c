"""Puts the parts of a run together: model, path, plan, reference, trainer."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from align import checks
from align import model as models
from align.anchors import InitialWeights, MovingReference
from align.assemble import Say, bytes_to_copy, bytes_to_save, total_steps, train_plan, training_arguments, world_size
from align.density import DensityRatio
from align.engines import is_reader, launched, partition, shards_weights, size, whole_weights
from align.errors import RunError
from align.forecast import Fit, skeleton
from align.forward import causal_lm, router_weight
from align.losses import Losses
from align.paths import choose_path
from align.recipe import Recipe
from align.reference import ReferenceKey
from align.startup import Startup, adapter_off_scorer, frozen_scorer, load_frozen
from align.tracing import fewer_layers, without_random_numbers
from align.tracker_adapters import KINDS
from align.trackers import Trackers
from align.trainer import ObjectiveTrainer, PairSums
from align.value_head import is_reward_model, outputs_of, settle_padding
from align.watch import DisplacementAlarm, MetricsFile, Progress, Speed
from align.writing import BackgroundWriter
from data.loader import PlannedBatches, kept_tokens, number_counts
from data.number_tokens import number_values
from data.pack import Known
from data.plan import Plan
from data.preparation import Prepared
from data.store import TokenTable

Evaluations = Callable[[PairSums, int], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is ready to start."""

    recipe: Recipe
    prepared: Prepared
    tokenizer: Any
    trainer: ObjectiveTrainer
    startup: Startup
    metrics: MetricsFile
    alarm: DisplacementAlarm
    trackers: Trackers
    speed: Speed
    fingerprint: str
    """Content hash of the weights the run starts from."""

    def bytes_to_save(self) -> int:
        """Disk the run will take."""
        sizes = [(size(p), p.requires_grad) for p in self.trainer.wrapped.parameters()]
        steps = total_steps(self.recipe, self.trainer.batches.plan.steps_per_epoch)
        total, trained = sum(n for n, _ in sizes), sum(n for n, grad in sizes if grad)
        return bytes_to_save(self.recipe, total, trained, steps)

    def bytes_to_copy(self) -> float:
        """Host memory of this machine that copies of a checkpoint will take, all its processes together."""
        sizes = [(size(p), p.requires_grad) for p in self.trainer.wrapped.parameters()]
        total, trained = sum(n for n, _ in sizes), sum(n for n, grad in sizes if grad)
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return sum(
            bytes_to_copy(self.recipe, total, trained, launched(), world_size(), first=process == 0)
            for process in range(here)
        )


def build(
    recipe: Recipe,
    config: Any,
    tokenizer: Any,
    prepared: Prepared,
    evaluations: Evaluations | None,
    say: Say,
    fit: Fit | None = None,
) -> Run:
    """Loads the model, chooses its path, plans the steps and makes the trainer.

    Args:
        recipe: the run's.
        config: of the model, as ``load_config`` gave it.
        tokenizer: saved with the trained model.
        prepared: token tables.
        evaluations: maps per-row sums of held-out rows to metrics.
        say: prints on the first rank.
        fit: what fits into memory, as the first rank foresees it.
    """
    set_seed(recipe.train.seed)
    # Before the model is loaded: this is what starts the process group and finds the device.
    args = training_arguments(recipe, 1, evaluate=prepared.eval is not None)
    dtype = models.compute_dtype(recipe.model)
    say(f"model: {recipe.model.model_name_or_path}, computing in {str(dtype).removeprefix('torch.')} on {args.device}")
    values = recipe.mixture.needs.values
    model = models.policy(recipe.model, recipe.lora, config, dtype, values)
    if values:
        pads = settle_padding(causal_lm(model).config, tokenizer)
        alone = "" if pads else "; without a pad token beside the end token it will score one sequence at a time"
        say(f"scalar head: {'as loaded' if is_reward_model(config) else 'new'}, training {', '.join(values)}{alone}")
    if not recipe.train.allow_dropout:
        models.switch_off_dropout(model)
    _tell_parameters(model, say)
    # Read here, where weights are in host memory.
    fingerprint = models.weights_fingerprint(model)
    bare = recipe.needs_reference and (models.starts_as_base(model, recipe.lora) or recipe.reference.model == "base")
    of_reference = models.weights_fingerprint(model, without_adapter=True) if bare else fingerprint
    if shards_weights(launched()):  # whole, it may be larger than a device
        share, path_check = _path_of_a_part(recipe, config, model, prepared.train.table, dtype, args.device)
    else:
        model.to(args.device)
        share, path_check = choose_path(recipe.model, model, prepared.train.table, dtype, args.device)
    way = causal_lm(model).config.get_text_config()._attn_implementation
    ways = gather_object([(share, way)])
    if len(set(ways)) > 1:
        raise RunError(
            f"processes came to different ways of computing attention ({sorted({str(each) for each in ways})}); set "
            "model.attn_implementation to sdpa"
        )
    fit = broadcast_object_list([fit])[0] if args.world_size > 1 else fit  # all take as many microbatches
    plan = train_plan(recipe, prepared.train.table, share=share, way=way, most=fit.most if fit else None)
    if fit is not None and recipe.train.gradient_checkpointing == "auto":
        args.activation_checkpointing = fit.checkpointing
    args.gradient_accumulation_steps = plan.microbatches
    say(
        f"plan: {plan.steps_per_epoch} steps an epoch of {recipe.train.rows_per_step} rows, in {plan.microbatches} "
        f"microbatches on each of {plan.world} processes"
    )
    steps, warmup = total_steps(recipe, plan.steps_per_epoch), recipe.train.warmup_steps
    if warmup >= max(steps, 1):
        say(f"warning: train.warmup_steps {warmup:g} is as long as the run of {steps} steps")
    rank = args.process_index
    batches = PlannedBatches(prepared.train.table, plan, rank=rank, share=share)
    numbers = _number_values(recipe, model, tokenizer)
    batches.known = Known(kept=kept_tokens(prepared.train.table, recipe.weighting), numbers=_counted(numbers, batches))
    held_out = None if prepared.eval is None else _eval_batches(prepared, plan, rank=rank, share=share)
    if held_out is not None:
        held_out.known = Known(numbers=_counted(numbers, held_out))

    startup = _startup(recipe, model, tokenizer, prepared, dtype, share, of_reference, say)
    startup.checks.append(path_check)
    metrics = MetricsFile(Path(recipe.train.output_dir) / "metrics.jsonl")
    alarm, speed = DisplacementAlarm(say), Speed()
    trackers = Trackers([name for name in recipe.train.report_to if name in KINDS], alarm, say)
    penalties = {entry.name: entry.built for entry in recipe.regularizers}
    anchor = InitialWeights(model, penalties) if penalties else None
    if anchor is not None and launched() != "fsdp2" and is_reader():
        anchor.keep(model)
    if launched() == "zero3":
        partition(model)
    losses = Losses(
        recipe.mixture,
        recipe.weighting,
        outputs=outputs_of(causal_lm(model).config, values) if values else (),
        numbers=None if numbers is None else torch.from_numpy(numbers).to(args.device),
        router_coef=router_weight(causal_lm(model).config.get_text_config()),
    )
    trainer = ObjectiveTrainer(
        model=model,
        args=args,
        losses=losses,
        batches=batches,
        eval_batches=held_out,
        prepare=startup,
        evaluations=evaluations,
        row_name=prepared.train.name,
        recipe_yaml=recipe.to_yaml(),
        anchor=anchor,
        processing_class=tokenizer,
        callbacks=[speed, alarm, metrics, trackers],
    )
    speed.trainer = trainer
    if recipe.train.async_save:
        trainer.writer = BackgroundWriter(timeout=recipe.train.ddp_timeout + 60)
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Progress())
    losses.live_reference = _live_reference(recipe, startup, trainer)
    if recipe.synced is not None:
        assert startup.frozen is not None
        reference = startup.frozen()  # as frozen_scorer has sharded it
        trainer.moving_reference = MovingReference(recipe.synced, reference)
    return Run(
        recipe=recipe,
        prepared=prepared,
        tokenizer=tokenizer,
        trainer=trainer,
        startup=startup,
        metrics=metrics,
        alarm=alarm,
        trackers=trackers,
        speed=speed,
        fingerprint=fingerprint,
    )


def _path_of_a_part(
    recipe: Recipe, config: Any, model: nn.Module, table: TokenTable, dtype: torch.dtype, device: torch.device
) -> tuple[bool, checks.Check]:
    """The same for a model that is divided among devices: found out on a few layers, and asked again of the whole
    when it is divided (``checks.check_path``)."""
    with without_random_numbers(), whole_weights():
        part = skeleton(recipe, fewer_layers(config))
    wanted = models.attention(recipe.model, config)
    if wanted != causal_lm(part).config.get_text_config()._attn_implementation:
        with contextlib.suppress(ValueError):  # this architecture has no such attention
            causal_lm(part).set_attn_implementation(wanted)
    part.to(device)
    share, check = choose_path(recipe.model, part, table, dtype, device)
    inner, way = causal_lm(model), causal_lm(part).config.get_text_config()._attn_implementation
    if way != inner.config.get_text_config()._attn_implementation:
        inner.set_attn_implementation(way)
    return share, dataclasses.replace(check, detail=f"{check.detail} (of a few layers with random weights)")


def _tell_parameters(model: nn.Module, say: Say) -> None:
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"parameters: {total:,}, of which {trained:,} are trained ({trained / total:.2%})")


def _eval_batches(prepared: Prepared, plan: Plan, *, rank: int, share: bool) -> PlannedBatches:
    assert prepared.eval is not None
    table = prepared.eval.table
    lengths = table.shared_lengths() if share else table.separate_lengths()
    held_plan = Plan(
        lengths=lengths,
        rows_per_step=len(lengths),
        token_budget=max(plan.token_budget, int(lengths.max())),
        epochs=1,
        world=world_size(),
        layout=plan.layout,
        seed=plan.seed,
        shuffle=False,
    )
    return PlannedBatches(table, held_plan, rank=rank, share=share)


def _startup(
    recipe: Recipe,
    model: nn.Module,
    tokenizer: Any,
    prepared: Prepared,
    dtype: torch.dtype,
    share: bool,
    initial: str,
    say: Say,
) -> Startup:
    """What is done before the first step; ``initial`` is the weights' content hash, for a reference made of them."""
    as_base = models.starts_as_base(model, recipe.lora)
    needs, reference = recipe.needs_reference, recipe.reference
    own = reference.model == "initial" or (reference.model == "base" and as_base)
    separate = reference.model not in ("initial", "base")
    frozen: nn.Module | None = None

    def load() -> nn.Module:
        nonlocal frozen
        frozen = frozen or load_frozen(recipe, dtype, len(tokenizer))
        return frozen

    key = weights = None
    if needs and separate and (reference.source == "cached" or not shards_weights(launched())):
        weights = models.weights_fingerprint(load())
    elif needs and not separate:
        weights = initial
    if weights is not None and reference.source == "cached":
        attention = causal_lm(model).config.get_text_config()._attn_implementation
        path = f"{'shared' if share else 'separate'}, {attention}"
        key = ReferenceKey(weights=weights, precision=str(dtype), path=path)
    return Startup(
        recipe=recipe,
        key=key,
        density=_density(recipe, model, tokenizer, dtype),
        frozen=load if separate or reference.source == "live" else None,
        starts_as_reference=not needs or own,
        dtype=dtype,
        row_names=[split.name for split in (prepared.train, prepared.eval) if split is not None],
        reference=weights,
        say=say,
    )


def _number_values(recipe: Recipe, model: nn.Module, tokenizer: Any) -> np.ndarray | None:
    """Value of each number token, where an objective reads them."""
    if not any(name.startswith("number_") for name in recipe.mixture.needs.extras):
        return None
    values = number_values(tokenizer, int(causal_lm(model).config.get_text_config().vocab_size))
    known = np.isfinite(values)
    if len(set(values[known].tolist())) < 2:
        names = ", ".join(entry.name for entry in recipe.objectives)
        raise RunError(
            f"the tokenizer has {int(known.sum())} number tokens (tokens of the digits 0 to 9 alone), and {names} "
            "compares at least two; use a tokenizer that splits numbers into digits, or another objective"
        )
    return values


def _counted(numbers: np.ndarray | None, batches: PlannedBatches) -> dict[str, np.ndarray] | None:
    return None if numbers is None else number_counts(batches.table, numbers)


def _density(recipe: Recipe, model: nn.Module, tokenizer: Any, dtype: torch.dtype) -> DensityRatio | None:
    encoder = recipe.mixture.needs.density_ratio
    if encoder is None:
        return None
    entry = next(entry.built for entry in recipe.objectives if entry.built.needs.density_ratio is not None)
    weights = models.weights_fingerprint(model) if encoder == "policy" else None
    return DensityRatio(
        encoder=encoder,
        weights=weights,
        sample_size=entry.prompt_sample_size,
        seed=recipe.train.seed,
        tokenizer=tokenizer,
        precision=str(dtype),
    )


def _live_reference(recipe: Recipe, startup: Startup, trainer: ObjectiveTrainer) -> Any:
    if not recipe.needs_reference or recipe.reference.source == "cached":
        return None
    if recipe.reference.source == "adapter_off" or recipe.reference.model == "base":
        return adapter_off_scorer(trainer)
    assert startup.frozen is not None
    return frozen_scorer(startup.frozen(), trainer)
