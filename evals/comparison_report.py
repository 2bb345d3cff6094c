"""One page for several runs: which is better at what, what can't be said, and their answers side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from evals.compare import Compared, Comparison, Run, better_way, compare, read_run
from evals.compare_text import grouped, legend, sentence, short_names
from evals.curves import whisker
from evals.length_plots import ridges
from evals.prompt_data import prompt_data
from evals.redact import public, shown_name
from evals.report_curves import compared_panels
from evals.report_page import render
from evals.report_results import Figure, flat, label_of, pass_at_k_figures
from evals.response_lengths import response_lengths
from evals.results import Result, write_atomically
from evals.run_files import RunFiles
from evals.run_files import read_run as read_files
from evals.summary import show, show_interval, unit_of
from evals.win_table import all_against_all

NAME = "comparison.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One pair of runs on one metric."""

    text: str
    bar: Markup | None
    """The difference with its interval, on what spans all differences in its unit; zero is marked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run's value."""

    value: str
    interval: str
    best: bool
    """The best of the row, which need not be beyond chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """A metric of all runs."""

    metric: str
    label: str
    cells: Sequence[Cell | None]


def write_comparison(run_dirs: Sequence[Path], output: Path | None = None) -> Path:
    """Writes a report on several runs and returns its path.

    Args:
        run_dirs: two or more, with ``results.json``; of ``scores.jsonl``, ``pairs.jsonl``, ``generations.jsonl`` and
            ``metrics.jsonl`` what there is.
        output: the file; ``comparison.html`` in the working directory where left out.

    Raises:
        ValueError: in one sentence, if there is nothing to compare, or a file cannot be read.
    """
    runs = [read_run(path) for path in run_dirs]
    comparison = compare(runs)
    names = {full: shown_name(short) for full, short in short_names([run.name for run in runs]).items()}
    folders = {
        names[run.name]: path.parent if path.suffix == ".json" else path
        for run, path in zip(runs, run_dirs, strict=True)
    }
    files = {name: read_files(folder) for name, folder in folders.items()}
    data = prompt_data(list(folders.items()))
    path = Path(NAME) if output is None else output
    context = {**_context(comparison, names, files), "browser": data}
    write_atomically(path, render("comparison.html.jinja", context, data=data.json if data else ""))
    return path


def _context(comparison: Comparison, names: dict[str, str], files: Mapping[str, RunFiles]) -> dict[str, Any]:
    shown = list(names.values())
    claims = {title: [_claim(each, names, comparison) for each in pairs] for title, pairs in grouped(comparison)}
    results = {name: list(run.results.results) if run.results else [] for name, run in files.items()}
    lengths = response_lengths([(name, run.path) for name, run in files.items()])
    return {
        "title": " and ".join(shown) if len(shown) < 3 else f"{', '.join(shown[:-1])} and {shown[-1]}",
        "names": shown,
        "claims": claims,
        "legend": legend(comparison).partition("\n")[::2],
        "tables": _tables(comparison),
        "wins": all_against_all(comparison.runs, names),
        "pass_at_k": pass_at_k_figures(results),
        "panels": compared_panels({name: run for name, run in files.items() if run.metrics}),
        "lengths": [
            Figure(title=f"In {unit}", svg=drawing)
            for unit, samples in lengths.items()
            if (drawing := ridges(samples, x_name=f"length of a response, {unit}", title=f"Lengths, {unit}"))
            is not None
        ],
        "facts": [(names[run.name], _facts(run)) for run in comparison.runs],
    }


def _claim(each: Compared, names: dict[str, str], comparison: Comparison) -> Claim:
    several = len({key[1:] for key in comparison.keys}) > 1
    return Claim(text=public(sentence(each, names, several)), bar=_bar(each, comparison))


def _bar(each: Compared, comparison: Comparison) -> Markup | None:
    if each.difference is None or each.low is None or each.high is None:
        return None
    unit = unit_of(each.metric)
    alike = [
        abs(value)
        for other in comparison.pairs
        if unit_of(other.metric) == unit and (unit or other.metric == each.metric)
        for value in (other.difference, other.low, other.high)
        if value is not None
    ]
    reach = max(alike, default=0.0)
    if reach == 0:
        return None
    # As the sentence: from the side of the better run.
    sign = -1 if each.better == each.second else 1
    low, high = sorted((sign * each.low, sign * each.high))
    colour = 0 if each.better is not None else 3
    return whisker(sign * each.difference, low, high, span=(-reach, reach), colour=colour, middle=True)


def _tables(comparison: Comparison) -> list[tuple[str, list[Values]]]:
    """Of every split, the values of all runs."""
    tables: list[tuple[str, list[Values]]] = []
    for dataset, split in dict.fromkeys(key[1:] for key in comparison.keys):
        rows: list[Values] = []
        for metric in [key[0] for key in comparison.keys if key[1:] == (dataset, split)]:
            found = [run.results.get((metric, dataset, split)) for run in comparison.runs]
            rows.append(Values(metric=metric, label=label_of(metric), cells=_cells(metric, found)))
        tables.append((f"{shown_name(dataset)}, {public(split)}", rows))
    return tables


def _cells(metric: str, found: Sequence[Result | None]) -> list[Cell | None]:
    values = [each.value for each in found if each is not None]
    way = better_way(metric)
    best = max(values) if way == "higher" else min(values) if way == "lower" else None
    return [
        None
        if each is None
        else Cell(
            value=show(metric, each.value),
            interval=show_interval(metric, each.low, each.high),
            best=len(values) > 1 and each.value == best,
        )
        for each in found
    ]


def _facts(run: Run) -> list[tuple[str, str]]:
    wanted = ("model", "fingerprint", "objective", "dataset", "seed", "steps", "template", "commit")
    return [(key, public(text)) for key in wanted if key in run.facts for _, text in flat({key: run.facts[key]})]
