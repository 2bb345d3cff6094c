"""A recipe turned into the arguments of the parts: data spec, plan, TrainingArguments."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from align.engines import launched, on_gpu, rehearse_on_cpu
from align.errors import RecipeError
from align.model import PACKING, compute_dtype
from align.recipe import Recipe
from align.sections import DataSection, DatasetSection
from align.tracker_adapters import KINDS, PACKAGES, refuse_without_login
from data.plan import Layout, Plan
from data.preparation import DataSpec
from data.shapes import Rule, attributes_in
from data.sources import Source
from data.store import TokenTable
from data.tokens import TokenPolicy
from objectives.registry import did_you_mean

Say = Callable[[str], None]


def data_spec(recipe: Recipe, max_length: int) -> DataSpec:
    """What to prepare, from the recipe's data section."""
    data = recipe.data
    attributes = tuple(attributes_in(recipe.mixture.needs.numbers))
    held_out = None
    if data.eval_dataset_name is not None:
        held_out = Source(
            dataset_name=data.eval_dataset_name,
            config=data.eval_dataset_config,
            split=data.eval_split or ("train" if Path(data.eval_dataset_name).is_file() else "test"),
            columns=data.columns,
            format=data.format,
            as_chat=data.as_chat,
            streaming=data.streaming,
            attributes=attributes,
        )
    return DataSpec(
        train=tuple(_source(entry, data, attributes) for entry in data.datasets or [data]),
        eval=held_out,
        eval_share=data.eval_share,
        legs=recipe.mixture.needs.legs,
        labels=recipe.mixture.needs.labels,
        scores=recipe.mixture.needs.numbers,
        rule=Rule(
            name=data.rule,
            threshold=data.threshold,
            margin=data.margin,
            max_length_ratio=data.max_length_ratio,
        ),
        reward_transforms=tuple(entry.built for entry in recipe.reward_transforms),
        relabel=tuple(entry.built for entry in recipe.relabel),
        # Those that need a model come later, by tokens: see evals.doctor.
        filters=tuple(entry.built for entry in recipe.filters if not entry.built.needs_model),
        policy=TokenPolicy(max_length=max_length, truncation=data.truncation),
        max_dropped_share=data.max_dropped_share,
        seed=recipe.train.seed,
        max_rows=data.max_rows,
    )


def _source(entry: DataSection | DatasetSection, data: DataSection, attributes: tuple[str, ...]) -> Source:
    assert entry.dataset_name is not None
    return Source(
        dataset_name=entry.dataset_name,
        split=entry.dataset_train_split,
        config=entry.dataset_config,
        columns=entry.columns,
        weight=entry.weight if isinstance(entry, DatasetSection) else 1.0,
        format=entry.format,
        as_chat=data.as_chat,
        streaming=data.streaming,
        attributes=attributes,
    )


def world_size() -> int:
    """Processes of this launch, before a process group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


BLOCK = 128
"""Positions of a block of FlexAttention."""
CPU_BUDGET, GPU_BUDGET = 1024, 16384
"""Positions of a microbatch that keep the device busy. More would only take more memory for activations."""


def token_budget(asked: int | str, lengths: np.ndarray, most: int | None = None) -> int:
    """What ``train.token_budget`` resolves to.

    Args:
        asked: a number, or auto.
        lengths: positions of every row.
        most: positions that fit into memory, where that is known; auto stays below, but for a row that is longer.
    """
    if asked != "auto":
        return int(asked)
    enough = GPU_BUDGET if on_gpu() else CPU_BUDGET
    return max(min(enough, most or enough), int(lengths.max(initial=0)))


def train_plan(recipe: Recipe, table: TokenTable, *, share: bool, way: str, most: int | None = None) -> Plan:
    """Which rows are computed together.

    Args:
        recipe: for rows per step, token budget, length of the run and seed.
        table: training rows.
        share: whether responses share their prompt's positions.
        way: implementation of attention, which decides whether rows lie end to end (segments, FlexAttention's blocks)
            or one per line (dense masks).
        most: positions of a microbatch that fit into memory, where that is known.
    Raises:
        DataError: a row does not fit the token budget.
    """
    epochs = math.ceil(recipe.train.num_train_epochs)
    if recipe.train.max_steps > 0:
        epochs = math.ceil(recipe.train.max_steps / -(-len(table) // recipe.train.rows_per_step))
    lengths = table.shared_lengths() if share else table.separate_lengths()
    return Plan(
        lengths=lengths,
        rows_per_step=recipe.train.rows_per_step,
        token_budget=token_budget(recipe.train.token_budget, lengths, most),
        epochs=epochs,
        world=world_size(),
        layout=Layout(
            kind="pack" if share and way in PACKING else "bucket",
            multiple=BLOCK if share and way == "flex_attention" else 1,
        ),
        seed=recipe.train.seed,
    )


def check_names(recipe: Recipe) -> None:
    """Refuses an optimizer, schedule or tracker that is not there, before data and model are read.

    Raises:
        RecipeError: a name is unknown, or the package behind it is not installed.
    """
    train = recipe.train
    _known("optim", "optimizer", train.optim, [name.value for name in OptimizerNames])
    _known("lr_scheduler_type", "schedule", train.lr_scheduler_type, [name.value for name in SchedulerType])
    if train.optim.startswith("paged_") and not on_gpu():
        raise RecipeError(
            f"train.optim {train.optim} moves state between a GPU and its host, and there is no GPU; use "
            f"{train.optim.removeprefix('paged_')}"
        )
    evaluates = recipe.data.eval_dataset_name is not None or recipe.data.eval_share > 0
    if train.lr_scheduler_type == "reduce_lr_on_plateau" and not (evaluates and train.eval_strategy != "no"):
        raise RecipeError("train.lr_scheduler_type reduce_lr_on_plateau needs evaluations; set train.eval_strategy")
    try:
        get_scheduler(train.lr_scheduler_type, torch.optim.SGD([torch.zeros(1)]), 0, 1)
    except (ValueError, TypeError) as error:
        raise RecipeError(
            f"train.lr_scheduler_type {train.lr_scheduler_type} takes settings that recipes don't have "
            f"({_one_line(error)}); use linear or cosine"
        ) from None
    for tracker in train.report_to:
        _known("report_to", "tracker", tracker, list(INTEGRATION_TO_CALLBACK))
        if tracker not in get_available_reporting_integrations():
            package = PACKAGES.get(tracker, tracker)
            raise RecipeError(
                f"train.report_to: {tracker} is not installed here; `pip install {package}`, or leave it out"
            )
    refuse_without_login(train.report_to)


def _known(key: str, what: str, name: str, names: list[str]) -> None:
    if name not in names:
        near, known = did_you_mean(name, names), ", ".join(names)
        raise RecipeError(f"train.{key}: unknown {what} {name!r}{near} (known: {known})")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def training_arguments(recipe: Recipe, microbatches: int, *, evaluate: bool) -> TrainingArguments:
    """transformers' arguments; what the recipe does not say is fixed here, with the reason.

    Raises:
        RecipeError: transformers refuses a value (an optimizer whose package is not installed).
    """
    train = recipe.train
    on_cpu = not on_gpu()
    try:
        arguments = TrainingArguments(
            output_dir=train.output_dir,
            per_device_train_batch_size=1,  # one planned microbatch
            gradient_accumulation_steps=microbatches,
            learning_rate=train.learning_rate,
            num_train_epochs=train.num_train_epochs,
            max_steps=train.max_steps,
            lr_scheduler_type=train.lr_scheduler_type,
            warmup_steps=train.warmup_steps,
            optim=train.optim,
            weight_decay=train.weight_decay,
            adam_beta1=train.adam_beta1,
            adam_beta2=train.adam_beta2,
            adam_epsilon=train.adam_epsilon,
            max_grad_norm=train.max_grad_norm,
            activation_checkpointing=train.gradient_checkpointing is True,  # auto is settled by what fits, see build
            activation_checkpointing_kwargs={"use_reentrant": False},
            bf16=compute_dtype(recipe.model) == torch.bfloat16,
            seed=train.seed,
            logging_steps=train.logging_steps,
            eval_strategy=train.eval_strategy if evaluate else "no",
            eval_steps=train.eval_steps,
            save_strategy=train.save_strategy,
            save_steps=int(train.save_steps) if train.save_steps >= 1 else train.save_steps,
            save_total_limit=train.save_total_limit,
            dataloader_num_workers=train.dataloader_num_workers,
            report_to=[name for name in train.report_to if name not in KINDS] or "none",
            run_name=train.run_name,
            use_cpu=on_cpu,
            ddp_backend="gloo" if on_cpu and world_size() > 1 else None,
            # Later than our own, which says more; the first batch of a large model may compile for minutes.
            ddp_timeout=train.ddp_timeout + 60,
            ddp_find_unused_parameters=False,
            # Else FSDP2 keeps gradients of all weights on every device until the last microbatch.
            accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": launched() == "fsdp2"}},
            remove_unused_columns=False,
            label_names=[],
            # The default logs the running mean in place of a NaN loss, which hides a diverged run.
            logging_nan_inf_filter=False,
        )
    except (ValueError, ImportError) as error:
        raise RecipeError(f"train: {_one_line(error)}; change that key") from None
    # One process takes one GPU: transformers would wrap the model for all it sees, with threads that share one batch.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    if arguments.world_size > 1:  # which makes the process group
        rehearse_on_cpu()
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)  # imports the optimizer's package
    except (ValueError, ImportError) as error:
        raise RecipeError(f"train.optim {train.optim}: {_one_line(error)}; or use adamw_torch_fused") from None
    return arguments


def bytes_needed(recipe: Recipe) -> int:
    """Disk a run takes at least: weights, and two float32 moments with them in every checkpoint kept."""
    folder = Path(recipe.model.model_name_or_path)
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0
    if recipe.lora is not None:
        weights //= 20
    kept = 0 if recipe.train.save_strategy == "no" else (recipe.train.save_total_limit or 1)
    return weights * (1 + 3 * kept) + 2**20


def total_steps(recipe: Recipe, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    train = recipe.train
    return train.max_steps if train.max_steps > 0 else math.ceil(steps_per_epoch * train.num_train_epochs)


def bytes_to_save(recipe: Recipe, total: int, trained: int, steps: int) -> int:
    """Disk the run will take: weights in float32, in every checkpoint kept two moments with them.

    Args:
        recipe: the run's.
        total: parameters of the model.
        trained: those that are trained; with an adapter only they are saved.
        steps: optimizer steps of the run.
    """
    train, saved = recipe.train, 4 * (trained if recipe.lora is not None else total)
    every = {
        "no": 0,
        "epoch": math.ceil(train.num_train_epochs),
        "steps": math.ceil(steps / train.save_steps if train.save_steps >= 1 else 1 / train.save_steps),
    }
    kept = min(every[train.save_strategy], train.save_total_limit or every[train.save_strategy])
    # While a new checkpoint is written, the oldest is still there.
    return saved + (saved + 8 * trained) * (kept + 1 if kept else 0)


def optimizer_bytes(optim: str) -> int:
    """Bytes of an optimizer's state for each weight that is trained."""
    return 0 if optim in ("sgd", "adafactor") else 2 if "8bit" in optim else 8


def bytes_to_copy(
    recipe: Recipe, total: float, trained: float, engine: str, processes: int, *, first: bool = True
) -> float:
    """Host memory of one process that the copy of a checkpoint takes, with ``train.async_save``.

    Args:
        recipe: the run's.
        total: parameters of the model.
        trained: those that are trained; with an adapter only they are saved.
        engine: of ``align.support.ENGINES``.
        processes: of the run.
        first: whether it is the first process, which writes what is there once.
    """
    if not recipe.train.async_save:
        return 0.0
    saved, states = 4 * (trained if recipe.lora is not None else total), optimizer_bytes(recipe.train.optim) * trained
    whole = 4 * total if recipe.synced is not None else 0.0
    if engine == "fsdp2":
        divided = saved + states
    elif engine.startswith("zero"):  # which keeps float32 weights with its states, and replicas beside whole weights
        divided = 4 * trained + states
        whole += saved if engine == "zero3" else 2 * saved
    else:
        divided = 0.0
        whole += saved + states
    return divided / processes + (whole if first else 0.0)


def tell_data(report: Mapping[str, Any], say: Say) -> None:
    """Says what was read, dropped and cut."""
    rows = report["rows"]
    dropped = sum(report["dropped"].values())
    say(
        f"data: {rows['read']} rows read, {rows['train']} to train on, {rows['eval']} held out, {dropped} dropped"
        + ("" if not dropped else " (listed in data_report.json)")
    )
    for reason, count in report["dropped"].items():
        say(f"  dropped {count}: {reason}")
    shaped, labels = report["shaped"], report["labels"]
    if shaped["rows_relabelled"] != shaped["rows_read"]:
        rule = "" if shaped["rule"] is None else f" by rule {shaped['rule']}"
        say(f"  {shaped['rows_read']} rows became {shaped['rows_relabelled']}{rule}")
    if (rescored := shaped.get("reward_transforms")) is not None:
        say(
            f"  scores changed by {', '.join(rescored['names'])}: of {rescored['rows']} lists of responses, "
            f"{rescored['best_changed']} have another best one"
        )
    if labels is not None:
        say(f"  labels to train on: {labels['desirable']} desirable, {labels['undesirable']} undesirable")
    for side, count in report["truncated"].items():
        say(f"  cut {count} × {side}: {report['tokens_lost'][side]} tokens beyond max_length {report['max_length']}")
    if report["boundary_mismatches"]:
        say(f"  {report['boundary_mismatches']} rows whose prompt and response share a token: the boundary moved left")
    if report["eval_prompts_in_training"]:
        say(f"  warning: {report['eval_prompts_in_training']} evaluation prompts are in the training data too")
