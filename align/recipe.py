"""Recipes: YAML and command line with the same keys; the command line wins.

    python align/train.py --config dpo.yaml --learning_rate 1e-6 --objective.beta 0.2

A key that occurs in one section only may be written without it. Reading and merging is OmegaConf's, conversion to the
fields' types pydantic's; what is ours is that nothing is ever ignored: unknown keys, values out of range and keys that
would have no effect are errors of one sentence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from align.contradictions import SINGLE_DATASET, refuse_contradictions, refuse_idle
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
    "sync_ref_model": "nothing yet: the reference is frozen",
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
    "padding_free": "nothing: batches carry no padding that matters",
    "packing": "nothing: batches carry no padding that matters",
    "warmup_ratio": "train.warmup_steps, a share of all steps when below 1",
    "activation_checkpointing": "train.gradient_checkpointing",
}
"""Keys of other trainers, recognised only to answer with ours."""


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
    for key, value in _pairs(overrides):
        try:
            parsed = OmegaConf.from_dotlist([f"v={value}"])["v"]
            whole = key in (*SECTIONS, "objective") and OmegaConf.is_config(
                parsed
            )
            path = key if whole else _place(key, merged)
            OmegaConf.update(merged, path, parsed, merge=False, force_add=True)
        except (OmegaConfBaseException, yaml.YAMLError, TypeError, IndexError) as error:
            raise RecipeError(f"--{key} can't be set to {value!r}: {_one_line(error)}") from None
        commanded.add(path)
        written[path] = "the command line"
    try:
        values = OmegaConf.to_container(merged, resolve=True)
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
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
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
            raise RecipeError(f"{where}: unknown section {section!r}{_elsewhere(section)}")
        if not isinstance(keys, Mapping):
            raise RecipeError(f"{where}: section {section!r} must hold keys, got {keys!r}")
        known = [f.name for f in dataclasses.fields(SECTIONS[section])]
        for key in keys:
            if key not in known:
                raise RecipeError(f"{where}: unknown key {section}.{key}{_elsewhere(str(key), known)}")


def _elsewhere(key: str, known: Sequence[str] = ()) -> str:
    """What to write instead of an unknown key."""
    if key in ELSEWHERE:
        return f": here it is {ELSEWHERE[key]}"
    homes = [f"{section}.{key}" for section, cls in SECTIONS.items() if key in _fields(cls)]
    if homes:
        return f"; did you mean {homes[0]!r}?"
    near = did_you_mean(key, list(known)) if known else ""
    every = {f.name: f"{section}.{f.name}" for section, cls in SECTIONS.items() for f in dataclasses.fields(cls)}
    return near or did_you_mean(key, [*every, *SECTIONS, "objective"]) or f" (known: {', '.join(known or SECTIONS)})"


def _fields(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _paths(tree: Mapping[str, Any]) -> Iterator[str]:
    for section, keys in tree.items():
        yield section
        entries = enumerate(keys) if isinstance(keys, list) else [(None, keys)]
        for number, entry in entries:
            prefix = section if number is None else f"{section}.{number}"
            if isinstance(entry, Mapping):
                yield from (f"{prefix}.{key}" for key in entry)


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """``--key value`` pairs. A flag without value means true."""
    i = 0
    while i < len(arguments):
        word = arguments[i]
        if not word.startswith("--"):
            raise RecipeError(f"expected --key value on the command line, got {word!r}")
        key, equals, value = word[2:].partition("=")
        i += 1
        if not equals:
            following = arguments[i] if i < len(arguments) else "--"
            if following.startswith("--"):
                value = "true"
            else:
                value, i = following, i + 1
        yield key, value


def _place(key: str, merged: Any) -> str:
    """The full path of a key that may lack its section."""
    head, *rest = key.split(".")
    if rest:
        if head != "objective" and head not in SECTIONS:
            raise RecipeError(f"unknown key --{key}{_elsewhere(rest[-1])}")
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
    homes = [section for section, cls in SECTIONS.items() if key in _fields(cls)]
    objective = merged.get("objective")
    if OmegaConf.is_dict(objective):
        name = objective.get("name")
        if isinstance(name, str) and name in OBJECTIVES and (key in _fields(OBJECTIVES[name]) or key == "weight"):
            homes.append("objective")
    if len(homes) > 1:
        raise RecipeError(f"--{key} is ambiguous: write one of {', '.join(f'--{home}.{key}' for home in homes)}")
    if not homes:
        raise RecipeError(f"unknown key --{key}{_elsewhere(key)}")
    return f"{homes[0]}.{key}"


def _build(values: dict[str, Any], written: Mapping[str, str], commanded: set[str]) -> Recipe:
    idle: list[str] = []
    for section in ("model", "data", "objective", "train"):
        if section not in values:
            raise RecipeError(f"the recipe has no {section!r} section; see launch/recipes/dpo.yaml for a complete one")
    refuse_idle(values, written, commanded, idle)
    objectives = _objectives(values["objective"], commanded, idle)
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
            converted[key] = [_section(DatasetSection, entry, f"{path}.{key}.{i}") for i, entry in enumerate(value)]
            continue
        if value is False and "no" in get_args(hints[key]):
            value = "no"  # YAML reads a bare no as false
        if key == "report_to" and isinstance(value, str):
            value = [] if value == "none" else [value]
        try:
            converted[key] = TypeAdapter(hints[key]).validate_python(value)
        except ValidationError:
            raise RecipeError(f"{path}.{key} must be {_expected(hints[key])}, got {value!r}") from None
    for f in dataclasses.fields(cls):
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in converted:
            raise RecipeError(f"{path}.{f.name} is required; write it in the recipe or as --{f.name} VALUE")
    try:
        return cls(**converted)
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from None


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
        return "a mapping of names to names"
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
            require("weight", weight, weight > 0, "> 0")
        except (ValidationError, ValueError):
            raise RecipeError(f"{path}.weight must be a number > 0, got {entry['weight']!r}") from None
        built.append(ObjectiveEntry(name=entry["name"], weight=weight, objective=objective))
    return tuple(built)
