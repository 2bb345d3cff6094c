"""What objectives there are.

python -m objectives            name, formula, needs, defaults and source of each
python -m objectives show dpo   one in full
"""

from __future__ import annotations

import argparse
import inspect
import sys

from objectives import OBJECTIVES
from objectives.registry import defaults, field_docs, formula, source


def summary(name: str) -> str:
    """A few lines on one objective."""
    cls = OBJECTIVES[name]
    needs = cls().needs
    legs = " + ".join(needs.legs) + (", reference" if needs.reference else "")
    keys = ", ".join(f"{key}={value!r}" for key, value in defaults(cls).items()) or "none"
    body = "\n".join(f"    {line}" for line in formula(cls).splitlines())
    return f"{name}\n{body}\n    needs    {legs}\n    defaults {keys}\n    source   {source(cls)}"


def full(name: str) -> str:
    """The whole docstring and every key."""
    cls = OBJECTIVES[name]
    keys = [f"    {key} (default {value!r}): {field_docs(cls)[key]}" for key, value in defaults(cls).items()]
    return "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", "Keys:", *keys])


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m objectives", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    show = commands.add_parser("show", help="one objective in full")
    show.add_argument("name")
    options = parser.parse_args(arguments)
    if options.command != "show":
        print("\n\n".join(summary(name) for name in OBJECTIVES))
        return 0
    try:
        print(full(options.name))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
