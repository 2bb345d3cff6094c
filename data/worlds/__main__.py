"""The embedded world on the command line.

python -m data.worlds show                                  a few problems with responses and scores
python -m data.worlds write --kind pairs --out pairs.jsonl  a dataset; see write --help
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import fields
from pathlib import Path

from data.worlds import KINDS, ROW_KINDS, SPLITS, Flaws, candidates, gold, gold_score, problems, respond
from data.worlds.rows import MAKERS


def main(arguments: list[str] | None = None) -> int:
    """Runs a command. Returns the exit status: 0, or 2 after one sentence on what is wrong."""
    try:
        options = _parser().parse_args(arguments)
        print(_write(options) if options.command == "write" else _show(options))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        """One sentence, without the usage before it."""
        raise ValueError(message)


def _parser() -> argparse.ArgumentParser:
    summary, _, _ = (__doc__ or "").partition("\n\n")
    parser = _Parser(prog="python -m data.worlds", description=summary)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="a few problems with responses and scores")
    write = commands.add_parser("write", help="a dataset in JSON lines")
    write.add_argument("--kind", choices=ROW_KINDS, required=True)
    write.add_argument("--out", type=Path, required=True, help="file to write; replaced if it is there")
    write.add_argument("--responses", type=int, default=8, help="responses to each problem (default 8)")
    for command, number in ((show, 3), (write, 2000)):
        command.add_argument("--split", choices=SPLITS, default="train")
        command.add_argument("--number", type=int, default=number, help=f"problems (default {number})")
        command.add_argument("--seed", type=int, default=0)
    for field in fields(Flaws):
        write.add_argument(f"--{field.name}", type=float, default=field.default, help="see data/worlds/flaws.py")
    return parser


def _write(options: argparse.Namespace) -> str:
    flaws = Flaws(**{field.name: getattr(options, field.name) for field in fields(Flaws)})
    asked = problems(options.split, options.number, options.seed)
    flaws.refuse_unused(options.kind)
    if options.kind == "gold":
        made = gold(asked)
    else:
        made = MAKERS[options.kind](
            asked, candidates(asked, options.responses, options.seed), flaws=flaws, seed=options.seed
        )
    options.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made.rows))
    return f"{options.out}: {len(made.rows)} {options.kind} of {len(asked)} problems, {made.left_out} left out"


def _show(options: argparse.Namespace) -> str:
    rng = random.Random(f"show/{options.seed}")
    lines = []
    for problem in problems(options.split, options.number, options.seed):
        lines += [problem.question, f"    {problem.template}, answer {problem.answer}"]
        for kind in KINDS:
            text = respond(problem, kind, rng)
            lines.append(f"    {gold_score(problem, text):.2f}  {kind:<16} {text}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
