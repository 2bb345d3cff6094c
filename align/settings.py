"""YAML and command line with the same keys, merged; the command line wins.

Reading and merging is OmegaConf's, conversion to the fields' types pydantic's; what is ours is that nothing is ever
ignored: unknown keys and values out of range are errors of one sentence. A key that occurs in one section only may be
written without it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from align.command_line import is_text, pairs, place
from align.console import tell
from align.errors import RecipeError, RunError
from align.keys import Schema, check_keys
from align.typed import Entry, entries, section
from data.errors import DataError
from objectives.registry import defaults, field_docs

MOST_IN_FULL = 12
"""Registered entries whose keys ``--help`` lists; of more it gives the names."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a recipe and the command line say together, still as plain values."""

    values: dict[str, Any]
    written: dict[str, str]
    """Paths of keys to where they were written."""
    commanded: set[str]
    """Those of the command line."""


def merge(config: str | Path | None, overrides: Sequence[str], schema: Schema, without: Sequence[str] = ()) -> Written:
    """Reads a recipe file and the command line's overrides.

    Args:
        config: YAML file; None means the command line says everything.
        overrides: ``--key value``, ``--key=value`` or ``--flag`` (true), as they stand on the command line.
        schema: which keys there are.
        without: sections of the file that are left out unread.
    Raises:
        RecipeError: one sentence on the first fault found.
    """
    tree = _load(Path(config), schema) if config is not None else {}
    tree = {key: value for key, value in tree.items() if key not in without}
    where = str(config) if config is not None else "the command line"
    check_keys(tree, where, schema)
    merged = OmegaConf.create(tree)
    written = dict.fromkeys(_paths(tree), where)
    commanded: set[str] = set()
    for key, value, flag in pairs(overrides):
        try:
            parsed = OmegaConf.from_dotlist([f"v={value}"])["v"] if value else None
            if key in schema.named and key != "objective" and isinstance(parsed, str):
                parsed = OmegaConf.create({"name": parsed})  # --token_weights goldfish
            whole = key in (*schema.sections, *schema.named) and OmegaConf.is_config(parsed)
            path = key if whole else place(key, merged, schema)
            if flag and is_text(path, schema):
                raise RecipeError(f"--{key} takes a value")
            if is_text(path, schema) and parsed is not None:
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
    check_keys(values, where, schema)
    return Written(values=values, written=written, commanded=commanded)


def read_settings(config: str | Path | None, overrides: Sequence[str], schema: Schema) -> dict[str, Any]:
    """Every section of a command's settings, built; named sections that are not written are empty.

    Raises:
        RecipeError: one sentence on the first fault found.
    """
    found = merge(config, overrides, schema)
    for required in schema.required:
        if required not in found.values:
            raise RecipeError(f"there is no {required!r} section; see {schema.example} for a complete recipe")
    built: dict[str, Any] = dict.fromkeys(schema.named, ())
    idle: list[str] = []
    for kind in schema.named:
        if found.values.get(kind) is not None:
            built[kind] = entries(kind, found.values[kind], found.written, found.commanded, idle, schema)
    for name, cls in schema.sections.items():
        built[name] = section(cls, found.values.get(name) or {}, name)
    return built


def resolved(entry: Entry) -> dict[str, Any]:
    """An entry as a recipe has it."""
    return {"name": entry.name, "weight": entry.weight, **entry.resolved()}


def split_config(words: Sequence[str], example: str) -> tuple[str | None, list[str]]:
    """Takes ``--config FILE`` out of the command line.

    Args:
        words: the command line.
        example: a recipe, for messages.
    """
    words = list(words)
    if sum(word == "--config" or word.startswith("--config=") for word in words) > 1:
        raise RecipeError("--config is given twice; write one recipe, and what differs as --key value")
    for i, word in enumerate(words):
        if word == "--config":
            if i + 1 == len(words):
                raise RecipeError(f"--config takes a YAML file, e.g. {example}")
            return words[i + 1], words[:i] + words[i + 2 :]
        if word.startswith("--config="):
            return word.partition("=")[2], words[:i] + words[i + 1 :]
    return None, words


def usage(about: str | None, schema: Schema) -> str:
    """Every key of every section, with default and meaning."""
    lines = [
        (about or "").strip(),
        "",
        "Keys (the section may be left out where the key is the only one of its name):",
    ]
    for name, cls in schema.sections.items():
        lines += ["", f"{name}: {(cls.__doc__ or '').splitlines()[0]}"]
        docs = field_docs(cls)
        for key, value in defaults(cls).items():
            lines += [f"  --{name}.{key} ({_default(value)})", f"      {docs[key]}"]
    for kind, registry in schema.named.items():
        lines += ["", f"{kind}: a name, {{name: …, key: …}}, or a list of these: {', '.join(registry.names())}"]
        if len(registry.names()) > MOST_IN_FULL:
            continue  # lists of their own: python -m objectives
        for name in registry.names():
            cls = registry[name]
            lines += [f"  {name}: {(cls.__doc__ or '').splitlines()[0]}"]
            docs = field_docs(cls)
            lines += [f"      {key} ({_default(value)}): {docs[key]}" for key, value in defaults(cls).items()]
    return "\n".join(lines)


def _default(value: Any) -> str:
    return "required" if value == "required" else f"default {value!r}"


def command(
    arguments: Sequence[str] | None,
    about: str | None,
    schema: Schema,
    do: Callable[[str | None, list[str]], None],
    stopped: str = "stopped; the same command goes on from here",
) -> int:
    """A command's ``main``.

    Args:
        arguments: of the command line; None takes the process's own.
        about: docstring of the module, shown by ``--help``.
        schema: which keys there are.
        do: takes the recipe's path and the other words.
        stopped: said after Ctrl-C.
    Returns:
        The exit status: 0, 2 after one sentence on what is wrong, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or "--help" in words or "-h" in words:
        print(usage(about, schema))
        return 0
    try:
        do(*split_config(words, schema.example))
    except (RecipeError, RunError, DataError) as error:
        tell(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        tell(stopped)
        return 130
    return 0


def say(line: str) -> None:
    """Prints a line at once, also where the output is a file."""
    print(line, flush=True)


def _load(path: Path, schema: Schema) -> dict[str, Any]:
    if not path.is_file():
        raise RecipeError(f"there is no recipe {str(path)!r}; --config takes a YAML file, e.g. {schema.example}")
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid YAML: {_one_line(error)}") from None
    if not isinstance(loaded, dict):
        names = ", ".join(schema.required)
        raise RecipeError(f"{path} must hold sections ({names}, …), not a {type(loaded).__name__}")
    return loaded  # type: ignore[return-value]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _paths(tree: Mapping[str, Any]) -> Iterator[str]:
    for head, keys in tree.items():
        yield head
        listed = enumerate(keys) if isinstance(keys, list) else [(None, keys)]
        for number, entry in listed:
            prefix = head if number is None else f"{head}.{number}"
            if isinstance(entry, Mapping):
                yield from (f"{prefix}.{key}" for key in entry)
