"""Pages of ``docs/`` that are made from the code: written, or checked for being up to date."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def write_or_check(
    module: str, about: str | None, path: Path, page: Callable[[], str], arguments: Sequence[str] | None
) -> int:
    """The command of a page.

    Args:
        module: name to run it by.
        about: docstring of the module.
        path: where the page stands.
        page: makes its text.
        arguments: the command line; ``--check`` writes nothing.
    Returns:
        The exit status: 1 where a page that was to be checked is out of date.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=(about or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="say whether the page is up to date")
    name = path.relative_to(ROOT)
    if parser.parse_args(arguments).check:
        current = path.is_file() and path.read_text(encoding="utf-8") == page()
        print("up to date" if current else f"{name} is out of date: run `python -m {module}`")
        return 0 if current else 1
    path.write_text(page(), encoding="utf-8")
    print(f"wrote {name}")
    return 0
