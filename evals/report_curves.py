"""Curves of a run over optimizer steps, from ``metrics.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from evals.curves import Series, panel, show_number, show_share
from evals.frame import COLOURS
from evals.report_results import Figure
from evals.run_files import RunFiles
from evals.summary import is_reward_model

COMPARED = {
    "eval/ranking/accuracy": ("Held-out ranking accuracy", {"share": True, "mark": 0.5}),
    "eval/reward_model/accuracy": ("Held-out accuracy", {"share": True, "mark": 0.5}),
    "eval/displacement/chosen": ("Held-out displacement of the chosen response", {"mark": 0.0, "y_name": "nats"}),
    "eval/displacement/rejected": ("Held-out displacement of the rejected response", {"mark": 0.0, "y_name": "nats"}),
    "loss": ("Training loss", {"y_name": "loss"}),
    "rewards/margins": ("Reward margin in training", {"mark": 0.0, "y_name": "difference of rewards"}),
}
"""Curves that several runs are drawn in together, with their titles and how they are drawn."""


def compared_panels(runs: Mapping[str, RunFiles]) -> list[Figure]:
    """One panel for each of ``COMPARED`` that a run logged, with a line for each run that did.

    Args:
        runs: by the names they are shown under.
    """
    panels: list[Figure] = []
    for key, (title, options) in COMPARED.items():
        series = [_series(run, key, name, i % COLOURS) for i, (name, run) in enumerate(runs.items())]
        drawn = [s for s in series if s is not None]
        if drawn:
            panels.append(_panel(title, "", drawn, options))
    return panels


def panels_of(run: RunFiles) -> list[Figure]:
    """What the run logged, a panel for each kind of number."""
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
            "Held-out displacement",
            "Change of log-prob since the reference. Both falling is likelihood displacement.",
            displaced,
            {"mark": 0.0, "y_name": "nats"},
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
            {"y_name": "units of the ratings"},
        ),
        (
            "Held-out rank correlation",
            "Of predicted with given ratings. Band: 95 %.",
            [_series(run, "eval/reward_model/spearman", "Spearman", 0)],
            {"mark": 0.0, "y_name": "Spearman’s ρ"},
        ),
        ("Loss", "As the objective defines it, over whole optimizer steps.", loss, {"y_name": "loss"}),
        (
            "Reward margin",
            "Score of the chosen response minus that of the rejected one."
            if of_scores
            else "β-scaled log-ratio, chosen minus rejected.",
            [_series(run, "rewards/margins", "training", 0)],
            {"mark": 0.0, "y_name": "difference of scores" if of_scores else "nats · β"},
        ),
        (
            "Training accuracy",
            "Share of pairs with a positive margin; ties count one half.",
            accuracy,
            {"share": True, "mark": 0.5},
        ),
        (
            "Training log-probs",
            "Change since the first logged step; each step has other rows, so this wavers.",
            _log_prob_change(run),
            {"mark": 0.0, "y_name": "nats"},
        ),
        (
            "Gradient norm",
            "Before clipping.",
            [_series(run, "grad_norm", "norm", 0)],
            {"log": True, "y_name": "L2 norm"},
        ),
        ("Learning rate", "As scheduled.", [_series(run, "learning_rate", "rate", 0)], {"y_name": "per step"}),
    ]
    panels: list[Figure] = []
    for title, note, candidates, options in specs:
        series = [s for s in candidates if s is not None]
        if series:
            if title == "Gradient norm":
                options["log"] = _wide(series[0].values)
            panels.append(_panel(title, note, series, options))
    return panels


def _panel(title: str, note: str, series: Sequence[Series], options: Mapping[str, Any]) -> Figure:
    shown = show_share if options.get("share") else show_number
    legend = [(s.label, s.colour, s.dashed, shown(s.last)) for s in series]
    return Figure(title=title, note=note, svg=panel(series, title=title, **options), legend=legend)


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
