"""Evaluates a checkpoint, an adapter or a Hub id: every number with its interval, and everything it depends on.

    python -m evals run --config launch/recipes/eval.yaml --model_name_or_path runs/dpo --output_dir runs/dpo
    python -m evals run runs/dpo                     what the run's own recipe asks for, on its held-out rows
    python -m evals run --help                       every key, its default and what it means

Cheap things come first: settings, then data, then models. What one evaluation finds is written before the next begins,
so that a failure costs that one alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align import settings
from align.console import quiet_libraries
from align.errors import RecipeError, RunError
from data.errors import DataError
from evals import card_info
from evals.card import write_card
from evals.ches import of_batch
from evals.context import Context, PairTable
from evals.evaluation import Found, describe
from evals.generations_file import write_generations
from evals.pair_rows import PairRow, write_pairs
from evals.report import write_report
from evals.results import Result, Results
from evals.run_directory import code_versions, commit
from evals.run_settings import SCHEMA, Job, read_job
from evals.scores import write_scores

Say = Callable[[str], None]


def run(job: Job, say: Say = print, report: bool = True) -> Path:
    """Evaluates, and leaves ``results.json`` and what goes with it in the output folder.

    Args:
        job: the settings.
        say: told what is done.
        report: write ``report.html`` too.
    Returns:
        The output folder.
    Raises:
        RecipeError, DataError, RunError: one sentence on what is wrong; after a failed evaluation the others' results
            are there.
    """
    wants_states = any(entry.built.needs.states for entry in job.evals)
    failed: list[str] = []
    with Context(job, say, of_batch if wants_states else None) as context:
        _refuse_kind(job, context)
        context.out.mkdir(parents=True, exist_ok=True)
        earlier = _earlier(context)
        facts = describe_run(context)
        kept = False
        for entry in job.evals:
            began = time.perf_counter()
            try:
                if entry.built.needs.pairs and not kept:
                    _keep_pairs(context)
                    kept = True
                found: Found = entry.built(context)
            except (RuntimeError, DataError, ValueError, OSError, KeyError) as error:
                why = " ".join(str(error).split()) or type(error).__name__
                failed.append(f"{entry.name}: {why}")
                say(f"– {entry.name} could not be measured: {why}")
                continue
            earlier = _filed(context, earlier, facts, entry, found)
            say(f"✓ {entry.name}: {len(found.results)} results in {time.perf_counter() - began:.1f} s")
            for line in found.warnings:
                say(f"  warning: {line}")
    if report and earlier is not None:
        say(f"wrote {write_report(context.out)}")
    if report and (context.out / card_info.NAME).exists():
        write_card(context.out)
    if failed:
        raise RunError(f"{len(failed)} of {len(job.evals)} evaluations could not be measured: {'; '.join(failed)}")
    return context.out


def describe_run(context: Context) -> dict[str, Any]:
    """What was evaluated and with what."""
    job = context.job
    compared = job.compared_with
    return {
        "model": job.name,
        "fingerprint": context.fingerprint,
        "adapter": job.adapter is not None,
        "reference": None if context.is_reward_model else compared,
        "template": context.template,
        "seed": job.out.seed,
        "steps": context.step,
        "dtype": job.model.dtype,
        "commit": commit(),
        "versions": code_versions(),
        "evaluations": [describe(entry.built) for entry in job.evals],
    }


def _refuse_kind(job: Job, context: Context) -> None:
    for entry in job.evals:
        needs = entry.built.needs
        if needs.reward_model and not context.is_reward_model:
            raise RecipeError(f"evals: {entry.name} measures reward models, and {job.name} is a language model")
        if (needs.samples or needs.states) and context.is_reward_model:
            raise RecipeError(f"evals: {entry.name} measures language models, and {job.name} is a reward model")


def _earlier(context: Context) -> Results | None:
    """Results that are there already, if they are this model's."""
    path = context.out / "results.json"
    try:
        found = Results.read(path) if path.exists() else None
    except ValueError as error:
        raise RunError(f"{error}; remove it, or give another out.output_dir") from None
    evaluated = Path(context.job.model.model_name_or_path).resolve()
    out = context.out.resolve()
    if found is not None and found.run.get("objective") and out not in (evaluated, *evaluated.parents):
        raise RunError(f"{context.out} is the folder of another model's training; give another out.output_dir")
    for result in found.results if found is not None else ():
        other = result.extra.get("fingerprint")
        if result.step == context.step and other not in (None, context.fingerprint):
            raise RunError(
                f"{path} holds results of another model ({result.extra.get('model')}) at step {result.step}; give "
                "another out.output_dir, or tell checkpoints apart by out.step"
            )
    return found


def _filed(context: Context, earlier: Results | None, facts: dict[str, Any], entry: Any, found: Found) -> Results:
    """Results on disk, with those of other evaluations that were there."""
    extra: dict[str, Any] = {"model": context.job.name, "fingerprint": context.fingerprint}
    extra |= {"warnings": list(found.warnings)} if found.warnings else {}
    new = [_with(result, extra) for result in found.results]
    replaced = {_key(result) for result in new}
    kept = [result for result in (earlier.results if earlier else ()) if _key(result) not in replaced]
    # A training run's own description stays; that of the evaluation stands beside it.
    about = facts if earlier is None or not earlier.run.get("objective") else {**earlier.run, "evaluated": facts}
    results = Results(run=about, results=[*kept, *new])
    results.write(context.out / "results.json")
    if found.scores:
        write_scores(context.out, found.scores)
    if found.generations:
        write_generations(context.out, found.generations)
    return results


def _with(result: Result, extra: dict[str, Any]) -> Result:
    from dataclasses import replace

    return replace(result, extra={**result.extra, **extra}) if extra else result


def _key(result: Result) -> tuple[str, str, str, int]:
    return result.metric, result.dataset, result.split, result.step


def _keep_pairs(context: Context) -> None:
    """Every pair with what was found of it, unless it is a reward model's."""
    table = context.pairs
    if context.is_reward_model:
        return
    write_pairs(
        context.out,
        pair_rows(table, context.tokenizer, context.step),
        dataset=table.dataset,
        split=table.name,
        step=context.step,
    )


def pair_rows(table: PairTable, tokenizer: Any, step: int) -> Iterator[PairRow]:
    """The lines of ``pairs.jsonl``.

    Args:
        table: scored pairs.
        tokenizer: turns tokens back into text.
        step: optimizer steps taken.
    """
    names = {
        "policy_chosen": "policy/sum/chosen",
        "policy_rejected": "policy/sum/rejected",
        "ref_chosen": "reference/sum/chosen",
        "ref_rejected": "reference/sum/rejected",
        "length_chosen": "length/chosen",
        "length_rejected": "length/rejected",
        "ches": "ches",
        "ln_ches": "ln_ches",
        "last_hidden": "last_hidden",
    }
    columns = {name: table.numbers[key] for name, key in names.items() if key in table.numbers}
    if "ref_chosen" in columns:
        columns["difficulty"] = columns["ref_rejected"] - columns["ref_chosen"]
    tokens = table.split.table
    for row in range(len(table)):
        numbers = {name: float(values[row]) for name, values in columns.items() if np.isfinite(values[row])}
        yield PairRow(
            dataset=table.dataset,
            split=table.name,
            step=step,
            row=table.split.name(row),
            prompt_id=table.prompts[row],
            prompt=tokenizer.decode(tokens.prompts[row]),
            chosen=tokenizer.decode(tokens.legs["chosen"][row]),
            rejected=tokenizer.decode(tokens.legs["rejected"][row]),
            numbers=numbers,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluates; see ``align.settings.command``."""

    def do(config: str | None, words: list[str]) -> None:
        job = read_job(config, words)
        quiet_libraries()
        run(job, settings.say)

    return settings.command(arguments, __doc__, SCHEMA, do)
