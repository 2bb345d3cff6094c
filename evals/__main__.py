"""Evaluation from the command line.

python -m evals run --config FILE    measures a checkpoint, an adapter or a Hub id (--help lists every key)
python -m evals compare A B C        which run is better at what, with corrected p-values, and what can't be said
python -m evals report RUN [RUN …]   one self-contained HTML page on a run, or on several compared
python -m evals card RUN             writes the card of a finished run again, from its files
python -m evals card push RUN        also pushes the run to the Hub, again or to another repository
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
        help="compare although template, sampling, judge, baseline, controls, reference, data or n differ; repeatable",
    )
    parser.add_argument("--json", action="store_true", help="print every comparison as JSON")


def _report(options: argparse.Namespace) -> str:
    from evals.comparison_report import write_comparison
    from evals.report import write_report

    if len(options.runs) == 1:
        written = write_report(options.runs[0], options.output)
    else:
        written = write_comparison(options.runs, options.output)
    return f"wrote {written}\n"


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory, or several to be compared")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="report.html of the run, or comparison.html, where left out"
    )


def _card(options: argparse.Namespace) -> str:
    from evals.card_again import card_again, push_again

    words = options.run
    if len(words) == 1:
        return f"{card_again(Path(words[0]), repo_id=options.repo_id)}\n"
    if words[0] != "push" or len(words) != 2:
        raise ValueError("card takes one run directory: python -m evals card RUN, or python -m evals card push RUN")
    return push_again(Path(words[1]), repo_id=options.repo_id, private=options.private, samples=options.samples) + "\n"


def _add_card(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="+", metavar="[push] RUN", help="a finished run, after `push` to upload it")
    parser.add_argument("--repo_id", help="repository, user/name (default: hub.hub_model_id of the recipe)")
    flag = argparse.BooleanOptionalAction
    parser.add_argument("--private", action=flag, help="create it private (default: hub.hub_private_repo)")
    parser.add_argument("--samples", action=flag, help="with prompts and responses (default: hub.push_samples)")


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], str]]] = {
    "compare": ("which run is better at what, and what can't be said", _add_compare, _compare),
    "report": ("one self-contained HTML page on a run, or on several compared", _add_report, _report),
    "card": ("writes the card of a finished run again; `card push RUN` also pushes the run", _add_card, _card),
}
"""Help, arguments, and what makes the text, by name."""


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["run"]:  # whose keys are a recipe's
        from evals.run import main as evaluate

        return evaluate(words[1:])
    parser = argparse.ArgumentParser(
        prog="python -m evals", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (help_, add, _) in COMMANDS.items():
        add(commands.add_parser(name, help=help_, description=help_))
    options = parser.parse_args(words)
    try:
        print(COMMANDS[options.command][2](options), end="")
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
