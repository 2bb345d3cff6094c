"""``report.html``: one self-contained page that says what a run did, from the files the run left.

No script, no font, no request: the page can be mailed, archived and opened offline. What comes from data or recipe is
escaped, credentials and absolute paths are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from evals.curves import SMOOTH_FROM, Series, panel, reliability, show_number, show_share, whisker
from evals.metrics import METRICS
from evals.redact import public, redact, scrub, shown_name
from evals.results import Result, write_atomically
from evals.run_files import RunFiles, read_run
from evals.summary import (
    Point,
    calibration,
    headline,
    is_reward_model,
    notes,
    of_part,
    parts,
    show,
    show_interval,
    unit_of,
    whole,
)

MOST_ROWS = 50
"""Dropped rows listed by name; all of them are counted."""
MOST_TEXT = 20_000
"""Characters of the example row and of the recipe that are shown."""


def write_report(run_dir: Path) -> Path:
    """Writes ``report.html`` into a run directory and returns its path.

    Args:
        run_dir: holds ``metrics.jsonl``, and of ``recipe.yaml``, ``results.json``, ``data_report.json``,
            ``checks.json`` and ``example.txt`` what there is; sections without a source are left out.

    Raises:
        ValueError: in one sentence, if ``metrics.jsonl`` is missing or empty or another file cannot be read.
    """
    run = read_run(run_dir)
    environment = Environment(
        loader=PackageLoader("evals", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(show=show, show_interval=show_interval, show_number=show_number, show_share=show_share)
    environment.globals.update(public=public)
    page = environment.get_template("report.html.jinja").render(**_context(run))
    path = run_dir / "report.html"
    # Inputs are redacted one by one; a token's shape survives escaping, so the whole page is looked through once more.
    write_atomically(path, redact(page))
    return path


@dataclass(frozen=True, slots=True)
class _Panel:
    title: str
    note: str
    svg: Markup
    legend: Sequence[tuple[str, int, bool, str]]


def _context(run: RunFiles) -> dict[str, Any]:
    top = headline(run)
    points = [p for p in ((top.before, top.after) if top else ()) if p is not None]
    of_parts, curve = parts(run), calibration(run)
    metrics = list(dict.fromkeys(metric for part in of_parts for metric in part.cells))
    span = _span([v for p in points for v in (p.value, p.low, p.high) if v is not None] + [0.5])
    return {
        "title": _title(run),
        "model": shown_name(str(run.get("model.model_name_or_path") or _run(run).get("model") or "a model")),
        "datasets": [shown_name(name) for name in run.datasets],
        "objectives": [public(name) for name in run.objectives],
        "adapter": run.has_adapter,
        "steps": run.steps,
        "rows": (run.data.get("rows") or {}).get("train"),
        "headline": top,
        "points": [(p, _point_bar(p, span, colour)) for colour, p in enumerate(points)],
        "axis": (show_share(span[0]), show_share(span[1])),
        "notes": notes(run),
        "panels": _panels(run),
        "smooth_from": SMOOTH_FROM,
        "results": [(_label(r), r, _bar(r)) for r in _ends(run)],
        "between": len(run.results.results) - len(_ends(run)) - sum(len(part.cells) for part in of_parts)
        if run.results
        else 0,
        "parts": [(part, _bar(part.cells[metrics[0]]) if metrics[0] in part.cells else None) for part in of_parts],
        "part_metrics": metrics,
        "calibration": curve,
        "reliability": reliability(curve.bins) if curve else "",
        "with_datasets": len({(r.dataset, r.split) for r in _ends(run)}) > 1,
        "name": shown_name,
        "data": scrub(run.data),
        "dropped": sorted((run.data.get("dropped") or {}).items(), key=lambda item: -item[1]),
        "dropped_rows": [scrub(row) for row in (run.data.get("dropped_rows") or [])[:MOST_ROWS]],
        "legs": _legs(run.data),
        "checks": [scrub(check) for check in run.checks],
        "passed": sum(check.get("passed") is True for check in run.checks),
        "example": redact(run.example)[:MOST_TEXT],
        "example_cut": len(run.example) > MOST_TEXT,
        "recipe": public(run.recipe_text)[:MOST_TEXT],
        "facts": _flat(scrub(_run(run))),
        "now": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _ends(run: RunFiles) -> list[Result]:
    """Results of the first and the last evaluation, metric by metric; the curves show those in between.

    Those of parts of a reward model's rows have a table of their own.
    """
    together = whole(run)
    results = [r for r in (run.results.results if run.results else ()) if not of_part(r, together)]
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


def _label(result: Result) -> str:
    return METRICS[result.metric].label if result.metric in METRICS else ""


def _bar(result: Result) -> Markup | None:
    """Shares get a whisker on [0, 1]; nats have no common axis."""
    if unit_of(result.metric) != "share" or result.low is None or result.high is None:
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


def _flat(value: Any, key: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [item for name, inner in value.items() for item in _flat(inner, f"{key}.{name}" if key else str(name))]
    if isinstance(value, float):
        return [(key, show_number(value))]
    return [(key, ", ".join(map(str, value)) if isinstance(value, list) else str(value))]


def _panels(run: RunFiles) -> list[_Panel]:
    terms = sorted({key for line in run.metrics for key in line if key.startswith("loss/")})
    # One term is the loss itself; drawing it twice says nothing.
    terms = terms if len(terms) > 1 else []
    ranking = [
        _series(run, "eval/ranking/accuracy", "policy", 0),
        _series(run, "eval/ranking/reference", "reference", 3, dashed=True, band=False),
    ]
    displaced = [_series(run, f"eval/displacement/{leg}", leg, i) for i, leg in enumerate(("chosen", "rejected"))]
    loss = [
        _series(run, key, name, i) for i, (key, name) in enumerate([("loss", "training"), ("eval/loss", "held out")])
    ]
    loss += [_series(run, key, key, 2 + i % 3) for i, key in enumerate(terms)]
    accuracy = [_series(run, "rewards/accuracies", "rewards", 0), _series(run, "ranking/accuracy", "ranking", 2)]
    of_scores = is_reward_model(run)
    specs: list[tuple[str, str, list[Series | None], dict[str, Any]]] = [
        (
            "Held-out ranking accuracy",
            "How often the policy itself gives the chosen response more probability. Band: 95 %.",
            ranking,
            {"share": True, "mark": 0.5},
        ),
        (
            "Held-out displacement, nats",
            "Change of log-prob since the reference. Both falling is likelihood displacement.",
            displaced,
            {"mark": 0.0},
        ),
        (
            "Held-out accuracy",
            "How often the chosen response has the higher score. Band: 95 %.",
            [_series(run, "eval/reward_model/accuracy", "accuracy", 0)],
            {"share": True, "mark": 0.5},
        ),
        (
            "Held-out calibration error",
            "How far accuracy is from confidence; with few pairs it is never zero. Band: 95 %.",
            [_series(run, "eval/reward_model/ece", "ECE", 1)],
            {"share": True},
        ),
        (
            "Held-out errors of ratings",
            "In units of the ratings, over all attributes. Band: 95 %.",
            [
                _series(run, "eval/reward_model/absolute_error", "absolute", 0),
                _series(run, "eval/reward_model/rmse", "root mean square", 1),
            ],
            {},
        ),
        (
            "Held-out rank correlation",
            "Of predicted with given ratings. Band: 95 %.",
            [_series(run, "eval/reward_model/spearman", "Spearman", 0)],
            {"mark": 0.0},
        ),
        ("Loss", "As the objective defines it, over whole optimizer steps.", loss, {}),
        (
            "Reward margin",
            "Score of the chosen response minus that of the rejected one."
            if of_scores
            else "β-scaled log-ratio, chosen minus rejected.",
            [_series(run, "rewards/margins", "training", 0)],
            {"mark": 0.0},
        ),
        (
            "Training accuracy",
            "Share of pairs with a positive margin; ties count one half.",
            accuracy,
            {"share": True, "mark": 0.5},
        ),
        (
            "Training log-probs, nats",
            "Change since the first logged step; each step has other rows, so this wavers.",
            _log_prob_change(run),
            {"mark": 0.0},
        ),
        ("Gradient norm", "Before clipping.", [_series(run, "grad_norm", "norm", 0)], {"log": True}),
        ("Learning rate", "As scheduled.", [_series(run, "learning_rate", "rate", 0)], {}),
    ]
    panels: list[_Panel] = []
    for title, note, candidates, options in specs:
        series = [s for s in candidates if s is not None]
        if series:
            if title == "Gradient norm":
                options["log"] = _wide(series[0].values)
            shown = show_share if options.get("share") else show_number
            legend = [(s.label, s.colour, s.dashed, shown(s.last)) for s in series]
            panels.append(_Panel(title, note, panel(series, title=title, **options), legend))
    return panels


def _series(
    run: RunFiles, key: str, label: str, colour: int, *, dashed: bool = False, band: bool = True
) -> Series | None:
    steps, values = run.series(key)
    if not steps:
        return None
    low, high = run.series(f"{key}_low"), run.series(f"{key}_high")
    known = band and low[0] == steps == high[0]  # a step without an interval would shift the band
    return Series(
        label=label,
        steps=steps,
        values=values,
        low=low[1] if known else None,
        high=high[1] if known else None,
        colour=colour,
        dashed=dashed,
    )


def _log_prob_change(run: RunFiles) -> list[Series | None]:
    """Logged displacement where the objective has a reference, else log-probs minus their first finite value."""
    found: list[Series | None] = []
    for colour, leg in enumerate(("chosen", "rejected")):
        steps, values = run.series(f"displacement/{leg}")
        if not steps:
            steps, values = run.series(f"logps/{leg}")
            first = next((value for value in values if math.isfinite(value)), 0.0)
            values = [value - first for value in values]
        found.append(Series(label=leg, steps=steps, values=values, colour=colour) if steps else None)
    return found


def _wide(values: Sequence[float]) -> bool:
    finite = [value for value in values if math.isfinite(value) and value > 0]
    return bool(finite) and max(finite) / min(finite) > 50
