"""What is wrong with a dataset, before anything is trained on it.

    python -m data check --config RECIPE [--key value …]      the data of a recipe, with its own tokenizer and filters
    python -m data check --dataset_name FILE                  a dataset alone; with --model_name_or_path, its tokens too

Every check says how bad it is (fine, remark, warning, fault), which key or command mends it, and which rows to look at.
--with_model and --reward_model NAME score every pair: how hard it is, how alike its responses are, how doubtful its
label is. --write CLEAN writes the dataset without the rows that --drop names; `filter:` in a recipe does so in a run.
Exit status: 0 without a fault, 1 with one, 2 where something can't be read.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from data.clean import LeftRow
    from data.findings import Diagnosis
    from data.gathering import DataSpec

DEFAULT_DROP = ("exact_duplicates", "identical_pairs", "contradictions", "shared_with_eval", "overlap")
"""What ``--write`` removes unless ``--drop`` says otherwise; of these only what can be there."""
DEFAULT_LENGTH = 2048
"""Most tokens of a row, where neither the command line nor a model says."""


def parser() -> argparse.ArgumentParser:
    """The command line, without a recipe's keys."""
    from data.filters import FILTERS

    made = argparse.ArgumentParser(
        prog="python -m data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = made.add_subparsers(dest="command", required=True)
    about = "what is wrong with a dataset, and what mends it"
    check = commands.add_parser(
        "check",
        help=about,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Any key of a training recipe's sections (align/train.py --help) may follow, such as --max_length 1024.",
    )
    check.add_argument("--config", metavar="RECIPE", help="a training recipe; nothing is trained")
    check.add_argument(
        "--with_model",
        action="store_true",
        help="score pairs under the recipe's model (or --model_name_or_path): difficulty, CHES, label noise",
    )
    check.add_argument("--reward_model", metavar="NAME", help="a reward model that labels are compared with")
    check.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="FILE",
        help="evaluation sets to look for in the rows",
    )
    check.add_argument("--ngram", type=int, default=13, help="words in a row that count as overlap (default 13)")
    check.add_argument(
        "--threshold", type=float, default=0.8, help="least Jaccard similarity of near duplicates (default 0.8)"
    )
    check.add_argument("--shingle", type=int, default=3, help="words of their shingles (default 3)")
    check.add_argument("--no_near", action="store_true", help="leave out near duplicates, which take most of the time")
    check.add_argument("--output", type=Path, metavar="doctor.json", help="write the findings to this file")
    check.add_argument("--write", type=Path, metavar="CLEAN", help="folder for the dataset without faulty rows")
    check.add_argument(
        "--drop",
        metavar="A,B",
        help="which filters remove rows in --write, after the recipe's own, with their default keys (default: those of "
        f"{', '.join(DEFAULT_DROP)} that fit the data; known: {', '.join(FILTERS.names())})",
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options, rest = parser().parse_known_args(words)
    from align.console import quiet_libraries, tell
    from align.errors import RecipeError, RunError
    from data.errors import DataError

    quiet_libraries()
    try:
        return check(options, rest, command=shlex.join(["python", "-m", "data", *words]))
    except (DataError, RecipeError, RunError, OSError) as error:
        tell(f"error: {' '.join(str(error).split())}")
        return 2
    except KeyboardInterrupt:
        tell("stopped; nothing was written")
        return 130


def check(options: argparse.Namespace, rest: list[str], command: str) -> int:
    """Looks at the data, tells what it finds, and writes what was asked for.

    Args:
        options: of ``parser``.
        rest: keys of the recipe and their values.
        command: as it was typed.
    """
    from data.clean import refuse_folder, write_clean
    from data.doctor import examine
    from data.doctor_text import told
    from data.errors import DataError
    from data.filters import NearDuplicates, Overlap

    _refuse_options(options)
    models = options.with_model or options.reward_model is not None
    if options.write is not None:
        refuse_folder(options.write)
    try:  # the same ranges as in a recipe
        NearDuplicates(threshold=options.threshold, ngram=options.shingle)
        if options.against:
            Overlap(against=tuple(options.against), ngram=options.ngram)
    except ValueError as error:
        raise DataError(f"python -m data check: {error}") from None
    made = from_recipe(options.config, rest) if options.config else from_words(rest, whole=models)
    spec, tokenizer, recipe = made
    if models and recipe is None:
        raise DataError("--with_model and --reward_model need --model_name_or_path, whose tokenizer reads the rows")
    found = examine(
        spec,
        tokenizer,
        against=options.against,
        ngram=options.ngram,
        threshold=options.threshold,
        shingle=options.shingle,
        near=not options.no_near,
        command=command,
    )
    if models:
        found = _examined(options, spec, tokenizer, recipe, found)
    print(told(found, tokens=tokenizer is not None), end="", flush=True)
    if options.output is not None:
        found.write(options.output)
        print(f"written: {options.output}")
    if options.write is not None:
        dropped = _dropped(options, spec, found.findings)
        spec = replace(spec, filters=(*spec.filters, *(each for each in dropped if not each.needs_model)))
        own = () if recipe is None else [entry.built for entry in recipe.filters]
        judged = [each for each in (*own, *dropped) if each.needs_model]
        left = _left(judged, spec, tokenizer, recipe) if judged else []
        manifest = write_clean(spec, options.write, command=command, judged=judged, left=left)
        for each in manifest["files"]:
            print(f"written: {options.write / each['file']}: {each['rows_kept']} of {each['rows_read']} rows")
    return int(found.worst == "fault")


def _refuse_options(options: argparse.Namespace) -> None:
    from data.errors import DataError

    if options.drop is not None and options.write is None:
        raise DataError("--drop has no effect without --write; say where the cleaned dataset goes")
    if options.no_near and (options.threshold != 0.8 or options.shingle != 3):
        raise DataError("--threshold and --shingle have no effect with --no_near; leave one of them out")
    if options.ngram != 13 and not options.against:
        raise DataError("--ngram has no effect without --against; name the evaluation sets")


def _dropped(options: argparse.Namespace, spec: DataSpec, findings: Sequence[Any]) -> list[Any]:
    """The filters of ``--drop``, or of the default those that fit the data."""
    from data.errors import DataError
    from data.filters import FILTERS

    checked = {each.check for each in findings}
    if options.drop is None:
        fits = {
            "identical_pairs": "identical_pairs" in checked,
            "contradictions": "contradictions" in checked,
            "shared_with_eval": spec.eval is not None,
            "overlap": bool(options.against),
        }
        names = [name for name in DEFAULT_DROP if fits.get(name, True)]
    else:
        names = [name.strip() for name in options.drop.split(",")]
    keys: dict[str, dict[str, Any]] = {
        "near_duplicates": {"threshold": options.threshold, "ngram": options.shingle},
        "overlap": {"against": tuple(options.against), "ngram": options.ngram},
        "label_noise": {"reward_model": options.reward_model},
    }
    made: list[Any] = []
    for name in names:
        own = FILTERS.ours(name) or name
        try:
            made.append(FILTERS[own](**keys.get(own, {})))
        except ValueError as error:
            raise DataError(f"--drop {name}: {error}") from None
        if made[-1].needs_model and made[-1].judge is None and not options.with_model:
            raise DataError(f"--drop {name} needs the model's numbers; add --with_model")
    return made


def _examined(options: argparse.Namespace, spec: DataSpec, tokenizer: Any, recipe: Any, found: Diagnosis) -> Diagnosis:
    """With what models find about the rows that a run would train on."""
    from align.console import tell
    from data.preparation import prepare
    from evals import doctor

    split = prepare(replace(spec, max_dropped_share=1.0), tokenizer).train
    asked = [*([None] if options.with_model else []), *([options.reward_model] if options.reward_model else [])]
    beta = next((entry.built.beta for entry in recipe.objectives if hasattr(entry.built, "beta")), 0.1)
    return doctor.examined(found, split, _columns(split, tokenizer, recipe, tell), asked=asked, beta=beta)


def _left(judged: list[Any], spec: DataSpec, tokenizer: Any, recipe: Any) -> list[LeftRow]:
    """The rows that filters with a model remove, from those that the others leave."""
    from align.console import tell
    from data.errors import DataError
    from data.preparation import prepare
    from evals import doctor

    names = [source.dataset_name for source in spec.train]
    if len(set(names)) < len(names):
        raise DataError(f"--write: {names[0]} is named twice, and rows go by name; clean its splits one at a time")
    split = prepare(replace(spec, max_dropped_share=1.0), tokenizer).train
    doctor.refuse(judged, split, trains_reward_model=recipe.trains_reward_model)
    return doctor.raw_rows(split, doctor.left_out(judged, split, _columns(split, tokenizer, recipe, tell)))


def _columns(split: Any, tokenizer: Any, recipe: Any, say: Any) -> Any:
    """Maps a judge to its numbers of every pair."""
    from align import model as models
    from align.errors import RunError
    from evals.doctor import policy_of
    from evals.row_scores import PAIR, columns

    if not set(PAIR) <= split.table.legs.keys():
        raise RunError(f"models are asked about pairs, and the rows have {', '.join(split.table.legs)}; leave them out")
    policy = policy_of(recipe, models.load_config(recipe.model), tokenizer)
    return lambda judge: columns(split, policy, judge, say)


def from_recipe(config: str, words: list[str]) -> tuple[DataSpec, PreTrainedTokenizerBase, Any]:
    """What a training recipe reads, with its tokenizer, and the ``align.recipe.Recipe``. No weight is read."""
    from align import model as models
    from align.assemble import data_spec
    from align.recipe import read_recipe
    from align.saving import AFTERWARDS

    recipe = read_recipe(config, words, without=AFTERWARDS)
    for line in recipe.idle:
        print(f"note: {line}")
    length = models.max_length(recipe.data.max_length, models.load_config(recipe.model))
    return data_spec(recipe, length), models.load_tokenizer(recipe.model), recipe


def from_words(words: list[str], *, whole: bool = False) -> tuple[DataSpec, PreTrainedTokenizerBase | None, Any]:
    """A dataset that no recipe names, by keys of the sections data, model and filter; seed 42, as a recipe's default.

    Legs and labels are those that the rows have: pairs, labelled completions, or gold responses. Without a model there
    is neither tokenizer nor recipe.

    Args:
        words: keys and values.
        whole: hold no prompts out, unless the words say so.
    """
    from align import model as models
    from align.assemble import data_spec
    from align.errors import RecipeError
    from align.keys import TRAINING
    from align.recipe import read_recipe
    from align.settings import merge

    own = replace(TRAINING, required=("data",))
    found = merge(None, words, own)
    extra = sorted(set(found.values) - {"data", "model", "filter"})
    if extra:
        raise RecipeError(f"{extra[0]!r} says nothing about a dataset alone; leave it out, or give a recipe (--config)")
    if "data" not in found.values:
        raise RecipeError("what is to be checked? give --config RECIPE or --dataset_name FILE")
    name = found.values.get("model", {}).get("model_name_or_path")
    if name is None and set(found.values.get("model", {})):
        raise RecipeError("keys of the model have no effect without --model_name_or_path; name the model")
    # A recipe that would train on it: what an objective needs is put right below, by what the rows are.
    complete = [*words, "--objective=dpo", "--output_dir=none"]
    recipe = read_recipe(None, complete if name is not None else [*complete, "--model_name_or_path=none"])
    length = recipe.data.max_length or DEFAULT_LENGTH
    tokenizer = None
    if name is not None:
        length = models.max_length(recipe.data.max_length, models.load_config(recipe.model))
        tokenizer = models.load_tokenizer(recipe.model)
    spec = data_spec(recipe, length)
    legs, labels = _offered(spec)
    share = 0.0 if whole and "eval_share" not in found.values["data"] else spec.eval_share
    spec = replace(spec, legs=legs, labels=labels, eval_share=share)
    return spec, tokenizer, None if name is None else recipe


def _offered(spec: DataSpec) -> tuple[tuple[str, ...], bool]:
    """The legs that the first dataset can give, and whether it has labels, by its format."""
    from data.sources import load_rows

    (first, *_) = load_rows(spec.train[0], limit=64).rows
    if first.candidates or {"chosen", "rejected"} <= first.responses.keys():
        return ("chosen", "rejected"), False
    if first.label is not None:
        return ("completion",), True
    return ("gold",), False


if __name__ == "__main__":
    sys.exit(main())
