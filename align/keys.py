"""What keys there are, and what to answer to one that is not there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, get_type_hints

from align.errors import RecipeError
from align.sections import SECTIONS
from data.filters import FILTERS
from objectives import MODIFIERS, OBJECTIVES, REGULARIZERS, RELABELERS, REWARD_TRANSFORMS, TOKEN_WEIGHTS
from objectives.registry import Registry, did_you_mean

NAMED: dict[str, Registry] = {
    "objective": OBJECTIVES,
    "modifiers": MODIFIERS,
    "token_weights": TOKEN_WEIGHTS,
    "regularizers": REGULARIZERS,
    "relabel": RELABELERS,
    "reward_transforms": REWARD_TRANSFORMS,
    "filter": FILTERS,
}
"""Sections that hold one entry, or a list of entries, whose keys depend on its name."""

ELSEWHERE = {
    "loss_type": "objective.name",
    "use_peft": "the lora section: write it to train adapters, leave it out to train all weights",
    "per_device_train_batch_size": "train.rows_per_step (the global batch) and train.token_budget",
    "per_device_eval_batch_size": "train.token_budget",
    "gradient_accumulation_steps": "train.rows_per_step; how many microbatches it takes is derived",
    "precompute_ref_log_probs": "reference.source: cached, the default",
    "ref_model": "reference.model",
    "bf16": "model.dtype: bfloat16",
    "fp16": "model.dtype: bfloat16",
    "torch_dtype": "model.dtype",
    "lora_r": "lora.r",
    "lora_target_modules": "lora.target_modules",
    "max_prompt_length": "data.max_length and data.truncation",
    "truncation_mode": "data.truncation",
    "disable_dropout": "train.allow_dropout",
    "dataset_test_split": "data.eval_split",
    "eval_dataset": "data.eval_dataset_name",
    "warmup_ratio": "train.warmup_steps, a share of all steps when below 1",
    "activation_checkpointing": "train.gradient_checkpointing",
    "lr": "train.learning_rate",
    "batch_size": "train.rows_per_step (the global batch)",
    "train_batch_size": "train.rows_per_step (the global batch)",
    "epochs": "train.num_train_epochs",
    "evaluation_strategy": "train.eval_strategy",
    "max_seq_length": "data.max_length, of prompt and response together",
    "max_completion_length": "data.max_length, of prompt and response together",
    "rpo_alpha": "a second objective: [{name: dpo}, {name: sft, leg: chosen, weight: …}]",
    "deepspeed": "a file for the launcher: accelerate launch --config_file FILE align/train.py …",
    "fsdp": "a file for the launcher: accelerate launch --config_file FILE align/train.py …",
    "sync_ref_model": "modifiers: {name: tr_dpo}",
    "ref_model_mixup_alpha": "modifiers: {name: tr_dpo, sync_alpha: …}",
    "ref_model_sync_steps": "modifiers: {name: tr_dpo, sync_steps: …}",
    "use_weighting": "modifiers: {name: wpo}",
    "f_divergence_type": "modifiers: {name: f_divergence, divergence: …}",
    "f_alpha_divergence_coef": "modifiers: {name: f_divergence, divergence: alpha, divergence_alpha: …}",
    "simpo_gamma": "objective.gamma of simpo",
    "gamma_beta_ratio": "objective.gamma of simpo, which is β times that ratio",
    "hub_token": "the login of `hf auth login`, or the variable HF_TOKEN",
}
"""Keys of other trainers, recognised only to answer with ours."""

NEEDLESS = {
    "padding_free": "batches carry no padding that matters",
    "packing": "batches carry no padding that matters",
    "remove_unused_columns": "unused columns are never read",
    "reference_free": "an objective says itself whether it needs a reference",
    "do_train": "train.py always trains",
}
"""Keys of other trainers that nothing here corresponds to, and why."""


@dataclass(frozen=True, kw_only=True)
class Schema:
    """The sections that a command's recipes have."""

    sections: Mapping[str, Any]
    """Dataclasses by name; a field is a key."""
    named: Mapping[str, Registry] = field(default_factory=dict)
    """Sections that hold one entry, or a list of them, whose keys depend on its name."""
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    """Keys of other programs, to answer with ours."""
    needless: Mapping[str, str] = field(default_factory=dict)
    """Keys of other programs that nothing here corresponds to, and why."""
    required: tuple[str, ...]
    """Sections without which nothing can be done."""
    example: str
    """A complete recipe, for messages."""
    command: str
    """What lists every key with ``--help``."""


TRAINING = Schema(
    sections=SECTIONS,
    named=NAMED,
    elsewhere=ELSEWHERE,
    needless=NEEDLESS,
    required=("model", "data", "objective", "train"),
    example="launch/recipes/dpo.yaml",
    command="align/train.py",
)


def check_keys(tree: Mapping[str, Any], where: str, schema: Schema = TRAINING) -> None:
    """Refuses sections and keys that don't exist, naming the nearest that does."""
    for section, keys in tree.items():
        if section in schema.named:
            continue
        if section not in schema.sections:
            near = elsewhere(str(section), schema.sections, schema)
            raise RecipeError(f"{where}: unknown section {section!r}{near}")
        if not isinstance(keys, Mapping):
            raise RecipeError(
                f"{where}: section {section!r} must hold keys, got {keys!r}; write them, or leave the section out"
            )
        known = fields_of(schema.sections[section])
        for key in keys:
            if key not in known:
                raise RecipeError(f"{where}: unknown key {section}.{key}{elsewhere(str(key), known, schema)}")


def elsewhere(key: str, known: Iterable[str] = (), schema: Schema = TRAINING) -> str:
    """What to write instead of an unknown key. ``known`` are the names that could have been meant first."""
    if key in schema.elsewhere:
        return f": here it is {schema.elsewhere[key]}"
    if key in schema.needless:
        return f"; leave it out: {schema.needless[key]}"
    homes = [f"{section}.{key}" for section, cls in schema.sections.items() if key in fields_of(cls)]
    if homes:
        return f"; did you mean {homes[0]!r}?"
    every = [name for cls in schema.sections.values() for name in fields_of(cls)]
    near = did_you_mean(key, list(known)) or did_you_mean(key, [*every, *schema.sections, *schema.named])
    return near or f"; {schema.command} --help lists every key"


def fields_of(cls: type) -> list[str]:
    """The keys that a section or a registered class has."""
    return [f.name for f in dataclasses.fields(cls)]


@cache
def types_of(cls: type) -> dict[str, Any]:
    """Their types, by key."""
    return get_type_hints(cls)
