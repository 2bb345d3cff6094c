"""Evaluation from the command line.

python -m evals compare A B C        which run is better at what, with corrected p-values, and what can't be said
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path


def _compare(options: argparse.Namespace) -> str:
    from evals.compare import compare, read_run
    from evals.compare_text import rendered

    found = compare(
        [read_run(path, options.step) for path in options.runs],
        metrics=options.metric,
        splits=options.split,
        baseline=None if options.baseline is None else str(options.baseline),
        correction=options.correction,
        level=options.level,
        allow=options.allow,
    )
    if options.json:
        return json.dumps([asdict(each) for each in found.pairs], indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return rendered(found)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, or their results.json")
    parser.add_argument("--metric", action="append", default=[], help="compare this one; may be repeated")
    parser.add_argument("--split", action="append", default=[], help="compare on this one; may be repeated")
    parser.add_argument("--step", type=int, help="compare at this step instead of the last of each")
    parser.add_argument("--baseline", type=Path, metavar="RUN", help="compare the others with this run only")
    parser.add_argument("--correction", default="holm", help="of p-values: holm for claims (default), bh for sweeps")
    parser.add_argument("--level", type=float, default=0.05, help="of the tests (default 0.05)")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="WHAT",
        help="compare although template, sampling, judge, baseline, data or n differ; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print every comparison as JSON")


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], str]]] = {
    "compare": ("which run is better at what, and what can't be said", _add_compare, _compare),
}
"""Help, arguments, and what makes the text, by name."""


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m evals", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (help_, add, _) in COMMANDS.items():
        add(commands.add_parser(name, help=help_, description=help_))
    options = parser.parse_args(arguments)
    try:
        print(COMMANDS[options.command][2](options), end="")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
