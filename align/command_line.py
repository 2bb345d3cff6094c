"""``--key value`` on the command line: pairs, and the full path of a key that may lack its section."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import OmegaConf

from align.errors import RecipeError
from align.keys import Schema, elsewhere, fields_of, types_of


def is_text(path: str, schema: Schema) -> bool:
    """Whether the key at this path takes text, so that 7 and [END] are not read as YAML."""
    section, _, key = path.partition(".")
    return section in schema.sections and types_of(schema.sections[section]).get(key) in (str, str | None)


def pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str, bool]]:
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


def place(key: str, merged: Any, schema: Schema) -> str:
    """The full path of a key that may lack its section.

    Args:
        key: as it stands on the command line, without the dashes.
        merged: the recipe so far.
        schema: which keys there are.
    """
    if "." in key:
        return _full(key, merged, schema)
    if key == "objective" and key in schema.named:
        return "objective.name"
    if key in schema.named:
        return key
    if key in schema.sections:
        raise RecipeError(f"--{key} is a section: write --{key}.KEY VALUE, or --{key} '{{key: value, …}}'")
    homes = [name for name, cls in schema.sections.items() if key in fields_of(cls)]
    own: list[str] = []
    listed: list[str] = []
    for kind in schema.named:
        for path, known in _entries(kind, merged, schema):
            several = kind == "objective" and path != "objective"
            own += [] if several else known
            if key in known:
                (listed if several else homes).append(path)
    if len(homes) > 1:
        raise RecipeError(f"--{key} is ambiguous: write one of {', '.join(f'--{home}.{key}' for home in homes)}")
    if not homes and listed:
        raise RecipeError(f"--{key}: the recipe lists several objectives; write --{listed[0]}.{key}")
    if not homes:
        raise RecipeError(f"unknown key --{key}{elsewhere(key, own, schema)}")
    return f"{homes[0]}.{key}"


def _full(key: str, merged: Any, schema: Schema) -> str:
    head, *rest = key.split(".")
    if head not in schema.named and head not in schema.sections:
        raise RecipeError(f"unknown key --{key}{elsewhere(rest[-1], (), schema)}")
    if head in schema.sections and rest[0] not in (known := fields_of(schema.sections[head])):
        raise RecipeError(f"unknown key --{key}{elsewhere(rest[0], known, schema)}")
    listed = OmegaConf.is_list(merged.get(head))
    what = "objectives" if head == "objective" else head
    if head in schema.named and rest[0].isdigit():
        count = len(merged[head]) if listed else 0
        if int(rest[0]) >= count:
            raise RecipeError(f"--{key}: the recipe has {count} listed {what}, numbered from 0")
    elif head in schema.named and listed:
        raise RecipeError(f"--{key}: the recipe lists several {what}; write --{head}.0.{'.'.join(rest)}")
    return key


def _entries(kind: str, merged: Any, schema: Schema) -> Iterator[tuple[str, list[str]]]:
    """The paths of a named section's entries, each with the keys it may have."""
    values = merged.get(kind)
    several = enumerate(values) if OmegaConf.is_list(values) else ()
    for path, entry in [(kind, values), *((f"{kind}.{number}", value) for number, value in several)]:
        if not OmegaConf.is_dict(entry):
            continue
        name = entry.get("name")
        if isinstance(name, str) and name in schema.named[kind]:
            own = ["weight"] if path == "objective" else []
            yield path, [*fields_of(schema.named[kind][name]), *own]
