"""Plain values to typed objects: sections, and the named entries of objective, token_weights and relabel."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

from pydantic import TypeAdapter

from align.errors import RecipeError
from align.keys import TRAINING, Schema, fields_of, types_of
from align.sections import DatasetSection
from objectives.checks import require
from objectives.registry import Registry, did_you_mean

WEIGHTED = ("objective", "scorers")
"""Named sections whose entries are summed, each with a weight."""


def section(cls: type, values: Mapping[str, Any], path: str) -> Any:
    """An instance of ``cls`` from plain values, each converted to its field's type."""
    hints = types_of(cls)
    known = fields_of(cls)
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
            converted[key] = [section(DatasetSection, entry, f"{path}.{key}.{i}") for i, entry in enumerate(value)]
            continue
        nested = _nested(hints[key])
        if nested is not None and value is not None:
            if not isinstance(value, Mapping):
                raise RecipeError(f"{path}.{key} must hold keys ({', '.join(fields_of(nested))}), got {value!r}")
            converted[key] = section(nested, value, f"{path}.{key}")
            continue
        if value is False and "no" in get_args(hints[key]):
            value = "no"  # YAML reads a bare no as false
        if key == "report_to" and isinstance(value, str):
            value = [] if value == "none" else [value]
        try:
            if isinstance(value, bool) and not _allows(hints[key], bool):
                raise ValueError("pydantic would make it a number")
            converted[key] = _adapter(hints[key]).validate_python(value)
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


@cache  # making one takes longer than using it a hundred times
def _adapter(hint: Any) -> Any:
    return TypeAdapter(hint)


def _nested(hint: Any) -> Any:
    """The dataclass that a key holds, or None."""
    return next((each for each in (hint, *get_args(hint)) if dataclasses.is_dataclass(each)), None)


def _allows(hint: Any, kind: type) -> bool:
    return hint in (kind, Any) or any(_allows(option, kind) for option in get_args(hint))


def _expected(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if hint in names:
        return names[hint]
    options = get_args(hint)
    if options and all(isinstance(option, str) for option in options):
        return "one of " + ", ".join(options)
    if getattr(hint, "__origin__", None) in (list, tuple) or hint in (list, list[str]):
        return "a list"
    if getattr(hint, "__origin__", None) is dict:
        return "a mapping of names to names, e.g. {prompt: question} with a space after the colon"
    return " or ".join(_expected(option) for option in options) if options else str(hint)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry of a named section: its registered name, the object built from its keys, its weight in a sum."""

    name: str
    built: Any
    weight: float = 1.0

    def resolved(self) -> dict[str, Any]:
        """Its keys, without those that have no effect beside the others: reads back to this entry."""
        keys = dataclasses.asdict(self.built)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in keys.items() if key not in idle_keys(self)}


def idle_keys(entry: Entry) -> dict[str, str]:
    """Keys that have no effect beside the entry's others, with the reason."""
    return entry.built.idle() if hasattr(entry.built, "idle") else {}


def entries(
    kind: str,
    values: Any,
    written: Mapping[str, str],
    commanded: set[str],
    idle: list[str],
    schema: Schema = TRAINING,
) -> tuple[Entry, ...]:
    """The entries of a named section.

    Args:
        kind: the section: ``objective``, ``token_weights``, ``relabel``, …
        values: a name, a mapping with a name, or a list of these.
        written: paths that the recipe or the command line holds.
        commanded: those of the command line.
        idle: gets a line for each key that the command line made idle.
        schema: which keys there are.
    """
    listed = isinstance(values, list)
    if not values:
        way_out = (
            "name at least one (python -m objectives lists them)"
            if kind == "objective"
            else "leave it out, or write null"
        )
        raise RecipeError(f"{kind} is empty; {way_out}")
    built: list[Entry] = []
    for number, value in enumerate(values if listed else [values]):
        path = f"{kind}.{number}" if listed else kind
        built.append(_entry(schema.named[kind], kind, path, value, commanded, idle))
        for key, reason in idle_keys(built[-1]).items():
            if f"{path}.{key}" not in written or (isinstance(value, Mapping) and value.get(key) is None):
                continue
            made_so = any(other.startswith(f"{path}.") for other in commanded) and f"{path}.{key}" not in commanded
            if not made_so:
                raise RecipeError(f"{path}.{key} has no effect: {reason}; remove it")
            idle.append(f"{path}.{key} has no effect: {reason}")
    return tuple(built)


def _entry(registry: Registry, kind: str, path: str, value: Any, commanded: set[str], idle: list[str]) -> Entry:
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or "name" not in value:
        example = {
            "objective": "{name: dpo, beta: 0.1}",
            "modifiers": "{name: wpo}",
            "token_weights": "{name: goldfish, k: 4}",
            "regularizers": "{name: wise_ft, tuned_share: 0.5}",
            "reward_transforms": "{name: z_score}",
            "scorers": "{name: math, column: answer}",
            "filter": "{name: near_duplicates, threshold: 0.8}",
        }
        fits = example.get(kind, "{name: reward_augmented, form: system}")
        raise RecipeError(f"{path} must be a mapping with a name, e.g. {fits}, got {value!r}")
    name = value["name"]
    if not isinstance(name, str):
        raise RecipeError(f"{path}.name must be text, got {name!r}")
    try:
        cls = registry[name]
    except ValueError as error:
        raise RecipeError(f"{path}.name: {error}") from None
    own = ("name", "weight") if kind in WEIGHTED else ("name",)
    keys = {key: given for key, given in value.items() if key not in own}
    if f"{path}.name" in commanded:  # another entry than the file's: keys it does not have are idle now
        for key in [key for key in keys if key not in fields_of(cls) and f"{path}.{key}" not in commanded]:
            idle.append(f"{path}.{key} = {keys.pop(key)!r}: {name} has no such key")
    built = section(cls, keys, path)
    if kind not in WEIGHTED:
        return Entry(name=name, built=built)
    try:
        weight = _adapter(float).validate_python(value.get("weight", 1.0))
        free = kind == "scorers"  # whose scores may also count against a response, or only be recorded
        require("weight", weight, math.isfinite(weight) and (free or weight > 0), "> 0 and finite")
    except ValueError:  # pydantic's is one
        least = "" if kind == "scorers" else " > 0"
        raise RecipeError(f"{path}.weight must be a finite number{least}, got {value['weight']!r}") from None
    return Entry(name=name, built=built, weight=weight)
