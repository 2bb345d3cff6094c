"""Recipes: YAML and command line with the same keys; the command line wins.

    python align/train.py --config dpo.yaml --learning_rate 1e-6 --objective.beta 0.2

A key that occurs in one section only may be written without it. Reading and merging is OmegaConf's, conversion to the
fields' types pydantic's; what is ours is that nothing is ever ignored: unknown keys, values out of range and keys that
would have no effect are errors of one sentence.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter

from align.contradictions import SINGLE_DATASET, is_adam, refuse_contradictions, refuse_idle, refuse_idle_reference
from align.errors import RecipeError
from align.sections import (
    SECTIONS,
    DataSection,
    DatasetSection,
    HubSection,
    LoraSection,
    ModelSection,
    ReferenceSection,
    TrainSection,
)
from objectives import OBJECTIVES, Mixture, mixture
from objectives.checks import require
from objectives.registry import did_you_mean

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
    "hub_token": "the login of `hf auth login`, or the variable HF_TOKEN",
}
"""Keys of other trainers, recognised only to answer with ours."""

NEEDLESS = {
    "padding_free": "batches carry no padding that matters",
    "packing": "batches carry no padding that matters",
    "remove_unused_columns": "unused columns are never read",
    "sync_ref_model": "the reference is frozen",
    "reference_free": "an objective says itself whether it needs a reference",
    "do_train": "train.py always trains",
}
"""Keys of other trainers that nothing here corresponds to, and why."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveEntry:
    """One objective of a recipe: its registered name, its weight in the sum, the object built from its keys."""

    name: str
    weight: float
    objective: Any


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run, described completely."""

    model: ModelSection
    data: DataSection
    train: TrainSection
    objectives: tuple[ObjectiveEntry, ...]
    lora: LoraSection | None = None
    reference: ReferenceSection = field(default_factory=ReferenceSection)
    hub: HubSection = field(default_factory=HubSection)
    idle: tuple[str, ...] = ()
    """Keys of the file that the command line made idle, with the reason: printed at the start."""

    @cached_property
    def mixture(self) -> Mixture:
        """The objectives as one."""
        return mixture([(entry.name, entry.objective, entry.weight) for entry in self.objectives])

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, as a mapping that reads back to this recipe."""
        sections = {
            name: dataclasses.asdict(getattr(self, name))
            for name in ("model", "lora", "data", "reference", "train", "hub")
            if getattr(self, name) is not None
        }
        # How this run was started, not what it is; run again from its own recipe it must not delete itself.
        del sections["train"]["resume_from_checkpoint"], sections["train"]["overwrite_output_dir"]
        if not self.mixture.needs.reference:
            del sections["reference"]
        if sections["data"]["datasets"] is not None:
            for key in SINGLE_DATASET:
                del sections["data"][key]
        if sections["data"]["eval_dataset_name"] is not None:
            del sections["data"]["eval_share"]
        else:
            del sections["data"]["eval_split"]
        if sections["train"]["max_steps"] > 0:
            del sections["train"]["num_train_epochs"]
        if sections["train"]["eval_strategy"] != "steps":
            del sections["train"]["eval_steps"]
        if sections["train"]["save_strategy"] != "steps":
            del sections["train"]["save_steps"]
        if not is_adam(sections):
            for key in ("adam_beta1", "adam_beta2", "adam_epsilon"):
                del sections["train"][key]
        held_out = self.data.eval_dataset_name is not None or self.data.eval_share > 0
        if sections["train"]["eval_strategy"] != "no" and not held_out:
            del sections["train"]["eval_strategy"]
        if (lora := sections.get("lora")) and lora["adapter_name_or_path"]:
            sections["lora"] = {"adapter_name_or_path": lora["adapter_name_or_path"]}
        entries = [
            {"name": entry.name, "weight": entry.weight, **dataclasses.asdict(entry.objective)}
            for entry in self.objectives
        ]
        return {**sections, "objective": entries}

    def to_yaml(self) -> str:
        """``resolved`` as YAML."""
        return yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True)


def read_recipe(config: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file and the command line's overrides.

    Args:
        config: YAML file; None means the command line says everything.
        overrides: ``--key value``, ``--key=value`` or ``--flag`` (true), as they stand on the command line.
    Raises:
        RecipeError: one sentence on the first fault found.
    """
    tree = _load(Path(config)) if config is not None else {}
    where = str(config) if config is not None else "the command line"
    _check_keys(tree, where)
    merged = OmegaConf.create(tree)
    written = dict.fromkeys(_paths(tree), where)
    commanded: set[str] = set()
    for key, value, flag in _pairs(overrides):
        try:
            parsed = OmegaConf.from_dotlist([f"v={value}"])["v"] if value else None
            whole = key in (*SECTIONS, "objective") and OmegaConf.is_config(parsed)
            path = key if whole else _place(key, merged)
            if flag and _is_text(path):
                raise RecipeError(f"--{key} takes a value")
            if _is_text(path) and parsed is not None:
                parsed = parsed if isinstance(parsed, str) else value  # --run_name 7 and --eos_token [END] are text
            OmegaConf.update(merged, path, parsed, merge=False, force_add=True)
        except (OmegaConfBaseException, yaml.YAMLError, TypeError, IndexError) as error:
            raise RecipeError(f"--{key} can't be set to {value!r} ({_one_line(error)}); write it as in YAML") from None
        paths = list(_paths({key: OmegaConf.to_container(parsed)})) if whole else [path]
        commanded.update(paths)
        written.update(dict.fromkeys(paths, "the command line"))
    try:
        values: Any = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise RecipeError(f"{where}: {_one_line(error)}") from None
    assert isinstance(values, dict)
    _check_keys(values, where)
    return _build(values, written, commanded)


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RecipeError(f"there is no recipe {str(path)!r}; --config takes a YAML file, e.g. launch/recipes/dpo.yaml")
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid YAML: {_one_line(error)}") from None
    if not isinstance(loaded, dict):
        raise RecipeError(
            f"{path} must hold sections (model, data, objective, train, …), not a {type(loaded).__name__}"
        )
    return loaded  # type: ignore[return-value]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _check_keys(tree: Mapping[str, Any], where: str) -> None:
    """Refuses sections and keys that don't exist, naming the nearest that does."""
    for section, keys in tree.items():
        if section == "objective":
            continue
        if section not in SECTIONS:
            raise RecipeError(f"{where}: unknown section {section!r}{_elsewhere(str(section), SECTIONS)}")
        if not isinstance(keys, Mapping):
            raise RecipeError(
                f"{where}: section {section!r} must hold keys, got {keys!r}; write them, or leave the section out"
            )
        known = [f.name for f in dataclasses.fields(SECTIONS[section])]
        for key in keys:
            if key not in known:
                raise RecipeError(f"{where}: unknown key {section}.{key}{_elsewhere(str(key), known)}")


def _elsewhere(key: str, known: Iterable[str] = ()) -> str:
    """What to write instead of an unknown key. ``known`` are the names that could have been meant first."""
    if key in ELSEWHERE:
        return f": here it is {ELSEWHERE[key]}"
    if key in NEEDLESS:
        return f"; leave it out: {NEEDLESS[key]}"
    homes = [f"{section}.{key}" for section, cls in SECTIONS.items() if key in _fields(cls)]
    if homes:
        return f"; did you mean {homes[0]!r}?"
    every = [name for cls in SECTIONS.values() for name in _fields(cls)]
    near = did_you_mean(key, list(known)) or did_you_mean(key, [*every, *SECTIONS, "objective"])
    return near or "; align/train.py --help lists every key"


def _fields(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _is_text(path: str) -> bool:
    section, _, key = path.partition(".")
    return section in SECTIONS and get_type_hints(SECTIONS[section]).get(key) in (str, str | None)


def _paths(tree: Mapping[str, Any]) -> Iterator[str]:
    for section, keys in tree.items():
        yield section
        entries = enumerate(keys) if isinstance(keys, list) else [(None, keys)]
        for number, entry in entries:
            prefix = section if number is None else f"{section}.{number}"
            if isinstance(entry, Mapping):
                yield from (f"{prefix}.{key}" for key in entry)


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str, bool]]:
    """``--key value`` pairs, and whether the value was left out, which means true."""
    i = 0
    while i < len(arguments):
        word = arguments[i]
        if not word.startswith("--"):
            raise RecipeError(f"expected --key value on the command line, got {word!r}")
        key, equals, value = word[2:].partition("=")
        i += 1
        flag = not equals and (i == len(arguments) or arguments[i].startswith("--"))
        if flag:
            value = "true"
        elif not equals:
            value, i = arguments[i], i + 1
        yield key, value, flag


def _place(key: str, merged: Any) -> str:
    """The full path of a key that may lack its section."""
    head, *rest = key.split(".")
    if rest:
        if head != "objective" and head not in SECTIONS:
            raise RecipeError(f"unknown key --{key}{_elsewhere(rest[-1])}")
        if head in SECTIONS and rest[0] not in (known := _fields(SECTIONS[head])):
            raise RecipeError(f"unknown key --{key}{_elsewhere(rest[0], known)}")
        listed = OmegaConf.is_list(merged.get("objective"))
        if head == "objective" and rest[0].isdigit():
            count = len(merged.objective) if listed else 0
            if int(rest[0]) >= count:
                raise RecipeError(f"--{key}: the recipe has {count} listed objectives, numbered from 0")
        elif head == "objective" and listed:
            raise RecipeError(f"--{key}: the recipe lists several objectives; write --objective.0.{'.'.join(rest)}")
        return key
    if key == "objective":
        return "objective.name"
    if key in SECTIONS:
        raise RecipeError(f"--{key} is a section: write --{key}.KEY VALUE, or --{key} '{{key: value, …}}'")
    homes = [section for section, cls in SECTIONS.items() if key in _fields(cls)]
    objective = merged.get("objective")
    own: list[str] = []
    if OmegaConf.is_dict(objective):
        name = objective.get("name")
        own = [*_fields(OBJECTIVES[name]), "weight"] if isinstance(name, str) and name in OBJECTIVES else []
        if key in own:
            homes.append("objective")
    if len(homes) > 1:
        raise RecipeError(f"--{key} is ambiguous: write one of {', '.join(f'--{home}.{key}' for home in homes)}")
    if not homes:
        listed = enumerate(objective) if OmegaConf.is_list(objective) else ()
        for number, entry in listed:
            if OmegaConf.is_dict(entry) and entry.get("name") in OBJECTIVES and key in _fields(OBJECTIVES[entry.name]):
                raise RecipeError(f"--{key}: the recipe lists several objectives; write --objective.{number}.{key}")
        raise RecipeError(f"unknown key --{key}{_elsewhere(key, own)}")
    return f"{homes[0]}.{key}"


def _build(values: dict[str, Any], written: Mapping[str, str], commanded: set[str]) -> Recipe:
    idle: list[str] = []
    for section in ("model", "data", "objective", "train"):
        if section not in values:
            raise RecipeError(f"the recipe has no {section!r} section; see launch/recipes/dpo.yaml for a complete one")
    refuse_idle(values, written, commanded, idle)
    objectives = _objectives(values["objective"], commanded, idle)
    if not any(entry.objective.needs.reference for entry in objectives):
        names = ", ".join(entry.name for entry in objectives)
        refuse_idle_reference(values, names, written, commanded, idle)
    sections = {name: _section(SECTIONS[name], values[name], name) for name in SECTIONS if values.get(name) is not None}
    recipe = Recipe(objectives=objectives, idle=tuple(idle), **sections)
    refuse_contradictions(recipe, values, written)
    return recipe


def _section(cls: type, values: Mapping[str, Any], path: str) -> Any:
    """An instance of ``cls`` from plain values, each converted to its field's type."""
    hints = get_type_hints(cls)
    known = _fields(cls)
    converted: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise RecipeError(f"unknown key {path}.{key}{did_you_mean(str(key), known)} (known: {', '.join(known)})")
        if hints[key] == (list[DatasetSection] | None) and value is not None:
            if not isinstance(value, list):
                raise RecipeError(f"{path}.{key} must be a list of datasets, got {value!r}")
            for i, entry in enumerate(value):
                if not isinstance(entry, Mapping):
                    raise RecipeError(
                        f"{path}.{key}.{i} must be a mapping, e.g. {{dataset_name: …, weight: 1}}, got {entry!r}"
                    )
            converted[key] = [_section(DatasetSection, entry, f"{path}.{key}.{i}") for i, entry in enumerate(value)]
            continue
        if value is False and "no" in get_args(hints[key]):
            value = "no"  # YAML reads a bare no as false
        if key == "report_to" and isinstance(value, str):
            value = [] if value == "none" else [value]
        try:
            if isinstance(value, bool) and not _allows(hints[key], bool):
                raise ValueError("pydantic would make it a number")
            converted[key] = TypeAdapter(hints[key]).validate_python(value)
        except ValueError:  # pydantic's is one
            raise RecipeError(f"{path}.{key} must be {_expected(hints[key])}, got {value!r}") from None
        if isinstance(converted[key], str) and converted[key].startswith("~"):
            converted[key] = os.path.expanduser(converted[key])  # some libraries would, some would not
        if isinstance(converted[key], float) and not math.isfinite(converted[key]):
            raise RecipeError(f"{path}.{key} must be a finite number, got {value!r}")
    for f in dataclasses.fields(cls):
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in converted:
            raise RecipeError(f"{path}.{f.name} is required; write it in the recipe or as --{f.name} VALUE")
    try:
        return cls(**converted)
    except ValueError as error:
        begins_with_key = str(error).split(" ")[0] in known
        raise RecipeError(f"{path}{'.' if begins_with_key else ': '}{error}") from None


def _allows(hint: Any, kind: type) -> bool:
    return hint in (kind, Any) or any(_allows(option, kind) for option in get_args(hint))


def _expected(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if hint in names:
        return names[hint]
    options = get_args(hint)
    if options and all(isinstance(option, str) for option in options):
        return "one of " + ", ".join(options)
    if getattr(hint, "__origin__", None) is list or hint in (list, list[str]):
        return "a list"
    if getattr(hint, "__origin__", None) is dict:
        return "a mapping of names to names, e.g. {prompt: question} with a space after the colon"
    return " or ".join(_expected(option) for option in options) if options else str(hint)


def _objectives(values: Any, commanded: set[str], idle: list[str]) -> tuple[ObjectiveEntry, ...]:
    listed = isinstance(values, list)
    entries = values if listed else [values]
    if not entries:
        raise RecipeError("objective is empty; name at least one (python -m objectives lists them)")
    built = []
    for number, entry in enumerate(entries):
        path = f"objective.{number}" if listed else "objective"
        if isinstance(entry, str):
            entry = {"name": entry}
        if not isinstance(entry, Mapping) or "name" not in entry:
            raise RecipeError(f"{path} must be a mapping with a name, e.g. {{name: dpo, beta: 0.1}}, got {entry!r}")
        if not isinstance(entry["name"], str):
            raise RecipeError(f"{path}.name must be text, got {entry['name']!r}")
        try:
            cls = OBJECTIVES[entry["name"]]
        except ValueError as error:
            raise RecipeError(f"{path}.name: {error}") from None
        keys = {key: value for key, value in entry.items() if key not in ("name", "weight")}
        if f"{path}.name" in commanded:  # another objective than the file's: keys it does not have are idle now
            for key in [key for key in keys if key not in _fields(cls) and f"{path}.{key}" not in commanded]:
                idle.append(f"{path}.{key} = {keys.pop(key)!r}: {entry['name']} has no such key")
        objective = _section(cls, keys, path)
        try:
            weight = TypeAdapter(float).validate_python(entry.get("weight", 1.0))
            require("weight", weight, 0 < weight < math.inf, "> 0 and finite")
        except ValueError:  # pydantic's is one
            raise RecipeError(f"{path}.weight must be a finite number > 0, got {entry['weight']!r}") from None
        built.append(ObjectiveEntry(name=entry["name"], weight=weight, objective=objective))
    return tuple(built)
