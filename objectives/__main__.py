"""What objectives, modifiers, token weights, regularizers, relabelers and reward transforms there are.

python -m objectives            name, formula, needs, defaults and source of each
python -m objectives show dpo   one in full
python -m objectives explain dpo        the logical program a loss corresponds to, and what it is stronger than
python -m objectives explain dpo cpo    how two losses relate
"""

from __future__ import annotations

import argparse
import inspect
import sys

from objectives import MODIFIERS, OBJECTIVES, REGULARIZERS, RELABELERS, REWARD_TRANSFORMS, TOKEN_WEIGHTS
from objectives.columns import COLUMNS
from objectives.needs import Needs
from objectives.programs import UNREGISTERED, compared, explained
from objectives.registry import Registry, defaults, did_you_mean, example, field_docs, formula, source

REGISTRIES: dict[str, Registry] = {
    "objective": OBJECTIVES,
    "modifiers": MODIFIERS,
    "token_weights": TOKEN_WEIGHTS,
    "regularizers": REGULARIZERS,
    "relabel": RELABELERS,
    "reward_transforms": REWARD_TRANSFORMS,
}
"""By the section of a recipe that names their entries."""


def summary(name: str, section: str = "objective") -> str:
    """A few lines on one entry."""
    cls = REGISTRIES[section][name]
    needs = f"\n    needs    {shown(example(cls).needs)}" if section == "objective" else ""
    keys = ", ".join(f"{key}={value!r}" for key, value in defaults(cls).items()) or "none"
    body = "\n".join(f"    {line}" for line in formula(cls).splitlines())
    return f"{name}\n{body}{needs}\n    defaults {keys}\n    source   {source(cls)}"


def shown(needs: Needs) -> str:
    """What an objective needs, in words: ``chosen + rejected, reference``."""
    further = [word for word, needed in (("labels", needs.labels), ("reference", needs.reference)) if needed]
    further += [f"scores of {' and '.join(needs.scores)}"] * bool(needs.scores)
    further += [f"a column {name} ({COLUMNS[name].expects})" for name in needs.columns]
    further += [f"{extra} of every token" for extra in needs.extras]
    further += [f"a scalar head: {', '.join(needs.values)}"] * bool(needs.values)
    return ", ".join([" + ".join(needs.legs), *further])


def full(name: str) -> str:
    """The whole docstring and every key.

    Raises:
        ValueError: there is no such entry.
    """
    section = next((section for section, registry in REGISTRIES.items() if name in registry), None)
    if section is None:
        known = [entry for registry in REGISTRIES.values() for entry in registry]
        if OBJECTIVES.ours(name) is None and did_you_mean(name, known):
            raise ValueError(f"unknown name {name!r}{did_you_mean(name, known)} (known: {', '.join(known)})")
        section = "objective"  # whose registry knows what others call it
    cls = REGISTRIES[section][name]
    docs = field_docs(cls)
    keys = [f"    {key} (default {value!r}): {docs[key]}" for key, value in defaults(cls).items()]
    return "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", f"Keys (section {section}):", *keys])


def _explain(names: list[str]) -> int:
    try:
        for name in names:
            if name not in UNREGISTERED:
                _ = OBJECTIVES[name]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if len(names) > 2:
        print("error: explain takes one name, or two to compare", file=sys.stderr)
        return 2
    print(explained(names[0]) if len(names) == 1 else compared(names[0], names[1]))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m objectives", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    show = commands.add_parser("show", help="one in full")
    show.add_argument("name")
    explain = commands.add_parser("explain", help="the logical program of a loss, or how two losses relate")
    explain.add_argument("names", nargs="+", metavar="NAME", help="one name, or two to compare")
    options = parser.parse_args(arguments)
    if options.command == "explain":
        return _explain(options.names)
    if options.command != "show":
        for section, registry in REGISTRIES.items():
            print(f"# {section}\n")
            print("\n\n".join(summary(name, section) for name in registry) + "\n")
        return 0
    try:
        print(full(options.name))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
