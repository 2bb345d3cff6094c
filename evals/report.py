"""``report.html``: one self-contained page that says what a run did, from the files the run left.

Nothing is loaded from elsewhere: the page can be mailed, archived and opened offline. What comes from data or recipe is
escaped, credentials are left out, and so are absolute paths in names. ``python -m evals report RUN`` makes it anew.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from evals.curves import SMOOTH_FROM, show_share, whisker
from evals.doctor_section import doctor
from evals.length_plots import ridges
from evals.pair_columns import PairColumns, columns
from evals.pair_plots import MOST_DOTS, ches_against_displacement, difficulty_by_rightness
from evals.pair_rows import read_pairs
from evals.parts import of_part
from evals.prompt_data import prompt_data
from evals.redact import public, redact, scrub, shown_name
from evals.report_curves import panels_of
from evals.report_page import render
from evals.report_results import Figure, ches_said, flat, flow_figures, groups, ideal_figures, pass_at_k_figures
from evals.response_lengths import response_lengths
from evals.result_plots import reliability
from evals.results import Result, write_atomically
from evals.run_files import RunFiles, read_run
from evals.summary import Point, calibration, headline, notes, tables, unit_of
from evals.win_table import against_baselines

MOST_ROWS = 50
"""Dropped rows listed by name; all of them are counted."""
MOST_TEXT = 20_000
"""Characters of the example row and of the recipe that are shown."""


def write_report(run_dir: Path, output: Path | None = None) -> Path:
    """Writes the report of a run directory and returns its path.

    Args:
        run_dir: holds of ``metrics.jsonl``, ``results.json``, ``pairs.jsonl``, ``generations.jsonl``, ``doctor.json``,
            ``recipe.yaml``, ``data_report.json``, ``checks.json`` and ``example.txt`` what there is; sections without a
            source are left out.
        output: the file; ``report.html`` in the run directory where left out.

    Raises:
        ValueError: in one sentence, if there is nothing to report on, or a file cannot be read.
    """
    run = read_run(run_dir)
    data = prompt_data([(_name(run), run_dir)])
    context = _context(run)
    context["browser"] = data
    path = run_dir / "report.html" if output is None else output
    write_atomically(path, render("report.html.jinja", context, data=data.json if data else ""))
    return path


def _context(run: RunFiles) -> dict[str, Any]:
    top = headline(run)
    points = [p for p in ((top.before, top.after) if top else ()) if p is not None]
    parts, curve = tables(run), calibration(run)
    span = _span([v for p in points for v in (p.value, p.low, p.high) if v is not None] + [0.5])
    results = list(run.results.results) if run.results else []
    whole = [result for result in results if not of_part(result)]
    ends = _ends(whole)
    pairs = columns(read_pairs(run.path))
    return {
        "title": _title(run),
        "model": shown_name(str(run.get("model.model_name_or_path") or _run(run).get("model") or "a model")),
        "datasets": [shown_name(name) for name in run.datasets],
        "objectives": [public(name) for name in run.objectives],
        "adapter": run.has_adapter,
        "trained": bool(run.metrics),
        "steps": run.steps,
        "rows": (run.data.get("rows") or {}).get("train"),
        "headline": top,
        "points": [(p, _point_bar(p, span, colour)) for colour, p in enumerate(points)],
        "axis": (show_share(span[0]), show_share(span[1])),
        "notes": notes(run),
        "panels": panels_of(run),
        "smooth_from": SMOOTH_FROM,
        "groups": groups(ends),
        "between": len(results) - len(ends) - sum(table.shown for table in parts),
        "parts": [(table, [(part, _bar(part.cells.get(table.metrics[0]))) for part in table.parts]) for table in parts],
        "calibration": curve,
        "reliability": reliability(curve.bins) if curve else "",
        "with_steps": len({r.step for r in ends}) > 1,
        "ranking": [*ideal_figures(whole), *flow_figures(whole), *_difficulty(pairs)],
        "ches": _ches(pairs, results),
        "wins": [table for table in (against_baselines(results),) if table is not None],
        "pass_at_k": pass_at_k_figures({"": results}),
        "lengths": _lengths([("", run)]),
        "doctor": doctor(run.doctor),
        "data": scrub(run.data),
        "dropped": sorted((run.data.get("dropped") or {}).items(), key=lambda item: -item[1]),
        "dropped_rows": [scrub(row) for row in (run.data.get("dropped_rows") or [])[:MOST_ROWS]],
        "legs": _legs(run.data),
        "checks": [scrub(check) for check in run.checks],
        "passed": sum(check.get("passed") is True for check in run.checks),
        "example": redact(run.example)[:MOST_TEXT],
        "example_cut": len(run.example) > MOST_TEXT,
        "recipe": public(run.recipe_text)[:MOST_TEXT],
        "facts": flat(scrub(_run(run))),
    }


def _ches(pairs: Sequence[PairColumns], results: Sequence[Result]) -> list[Figure]:
    figures: list[Figure] = []
    for each in pairs:
        drawing = ches_against_displacement(each)
        if drawing is None:
            continue
        how = "Each dot is a pair" if each.n <= MOST_DOTS else "The darker a hexagon, the more pairs"
        said = ches_said(results, each.dataset, each.split)
        note = f"{said} {how}; large dots are medians of tenths of the pairs, with 95 % intervals.".strip()
        title = f"{shown_name(each.dataset)}, {public(each.split)}, step {each.step}"
        figures.append(Figure(title=title, svg=drawing, note=note))
    return figures


def _difficulty(pairs: Sequence[PairColumns]) -> list[Figure]:
    figures: list[Figure] = []
    for each in pairs:
        drawing = difficulty_by_rightness(each)
        if drawing is not None:
            title = f"Difficulty of pairs, {public(each.split)}"
            note = "How much more probable the reference finds the rejected response. Outer values lie in the end bars."
            legend = [("policy right", 0, False, ""), ("policy wrong", 1, False, "")] if each.right is not None else []
            figures.append(Figure(title=title, svg=drawing, note=note, legend=legend))
    return figures


def _lengths(runs: Sequence[tuple[str, RunFiles]]) -> list[Figure]:
    figures: list[Figure] = []
    for unit, samples in response_lengths([(name, run.path) for name, run in runs]).items():
        drawing = ridges(samples, x_name=f"length of a response, {unit}", title=f"Lengths of responses, {unit}")
        if drawing is not None:
            note = "Upright lines are medians, lines below the middle half; outer values lie in the end bars."
            figures.append(Figure(title=f"In {unit}", svg=drawing, note=note))
    return figures


def _name(run: RunFiles) -> str:
    return shown_name(run.path.resolve().name)


def _ends(results: Sequence[Result]) -> list[Result]:
    """Results of the first and the last evaluation, metric by metric; the curves show those in between.

    Args:
        results: without those of parts, which have tables of their own.
    """
    steps = {result.step for result in results}
    kept = [result for result in results if result.step in (min(steps), max(steps))]
    order = {metric: i for i, metric in enumerate(dict.fromkeys(result.metric for result in results))}
    return sorted(kept, key=lambda result: (order[result.metric], result.dataset, result.split, result.step))


def _title(run: RunFiles) -> str:
    objective = " + ".join(public(name).upper() for name in run.objectives) or "Training run"
    model = run.get("model.model_name_or_path") or _run(run).get("model")
    return f"{objective} on {shown_name(str(model))}" if model else objective


def _run(run: RunFiles) -> Mapping[str, Any]:
    return run.results.run if run.results else {}


def _bar(result: Result | None) -> Markup | None:
    """Shares get a whisker on [0, 1]; nats have no common axis."""
    if result is None or unit_of(result.metric) != "share" or result.low is None or result.high is None:
        return None
    return whisker(result.value, result.low, result.high, span=(0.0, 1.0))


def _point_bar(point: Point, span: tuple[float, float], colour: int) -> Markup:
    low = point.value if point.low is None else point.low
    high = point.value if point.high is None else point.high
    return whisker(point.value, low, high, span=span, colour=colour)


def _span(values: Sequence[float]) -> tuple[float, float]:
    """A range of whole tenths around shares, with some air."""
    low, high = math.floor(10 * (min(values) - 0.02)) / 10, math.ceil(10 * (max(values) + 0.02)) / 10
    return max(0.0, low), min(1.0, high)


def _legs(data: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    cut, tokens = data.get("truncated") or {}, data.get("tokens") or {}
    return [(str(leg), tokens.get(leg), cut.get(leg)) for leg in dict.fromkeys([*tokens, *cut])]
