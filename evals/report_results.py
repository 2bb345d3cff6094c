"""Sections of reports that come from ``results.json``: the table of everything, and what has a drawing of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from evals.curves import show_number, whisker
from evals.frame import WIDE
from evals.metrics import METRICS
from evals.pair_plots import flow
from evals.redact import public, scrub, shown_name
from evals.result_plots import Line, Point, idealised, idealised_points, lines
from evals.results import Result
from evals.summary import show, show_interval, unit_of

MOST_OPEN = 20
"""Results that are unfolded from the start, whole groups at a time; the first group always is."""
_PASS_AT_K = re.compile(r"pass_at_k/(.+)@(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One result as the table shows it."""

    result: Result
    label: str
    bar: Markup | None
    extras: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Results whose names begin alike."""

    name: str
    parts: Sequence[tuple[str, Sequence[Row]]]
    """By dataset and split; nothing is said of these where all results of the page are of one."""
    unfolded: bool

    @property
    def rows(self) -> int:
        """Results."""
        return sum(len(rows) for _, rows in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A drawing with what is to be said of it; everything said is plain text."""

    title: str
    svg: Markup
    note: str = ""
    legend: Sequence[tuple[str, int, bool, str]] = ()
    """Name, colour, dashed, and a value."""


def groups(results: Iterable[Result]) -> list[Group]:
    """Results by the part of their name before the slash, metrics known or not."""
    found: dict[str, dict[tuple[str, str], list[Result]]] = {}
    for result in results:
        by_split = found.setdefault(result.metric.partition("/")[0], {})
        by_split.setdefault((result.dataset, result.split), []).append(result)
    several = len({key for by_split in found.values() for key in by_split}) > 1
    made: list[Group] = []
    shown = 0
    for name, by_split in found.items():
        members = [result for some in by_split.values() for result in some]
        parts = [
            (f"{shown_name(dataset)}, {public(split)}" if several else "", [_row(r, _span(members, r)) for r in some])
            for (dataset, split), some in by_split.items()
        ]
        shown += len(members)
        made.append(Group(name=name, parts=parts, unfolded=not made or shown <= MOST_OPEN))
    return made


def label_of(metric: str) -> str:
    """What a metric is, in words; nothing for one that is not known."""
    return METRICS[metric].label if metric in METRICS else ""


def latest(results: Iterable[Result]) -> dict[tuple[str, str], dict[str, Result]]:
    """By dataset and split, the last result of every metric."""
    found: dict[tuple[str, str], dict[str, Result]] = {}
    for result in sorted(results, key=lambda r: r.step):
        found.setdefault((result.dataset, result.split), {})[result.metric] = result
    return found


def ideal_figures(results: Sequence[Result]) -> list[Figure]:
    """Ranking accuracy against its ideal: of every split, summed and per token."""
    figures: list[Figure] = []
    by_split = latest(results)
    for (dataset, split), found in by_split.items():
        for suffix, name in (("", "summed"), ("_per_token", "per token")):
            drawing = idealised(found, suffix)
            if drawing is None:
                continue
            where = f", {shown_name(dataset)}, {public(split)}" if len(by_split) > 1 else ""
            figures.append(Figure(title=f"Log-probs {name}{where}", svg=drawing, note=_gap(found, suffix)))
    return figures


def flow_figures(results: Sequence[Result]) -> list[Figure]:
    """What became of pairs, of every split."""
    figures: list[Figure] = []
    for (dataset, split), found in latest(results).items():
        drawing = flow(found)
        if drawing is not None:
            n = show_number(found["flow/right_to_right"].n)
            note = f"{n} pairs of {shown_name(dataset)}, {public(split)}, ranked by log-prob; a tie is half of each."
            figures.append(Figure(title="From the reference to the policy", svg=drawing, note=note))
    return figures


def pass_at_k_figures(results: Mapping[str, Sequence[Result]]) -> list[Figure]:
    """Curves over k: of one run a drawing for every split, with a line for each strategy; of several runs a drawing for
    every split and strategy, with a line for each run.

    Args:
        results: by the name of the run.
    """
    several = len(results) > 1
    drawings: dict[tuple[str, str, str], dict[str, dict[int, Result]]] = {}
    for run, members in results.items():
        for result in sorted(members, key=lambda r: r.step):
            match = _PASS_AT_K.fullmatch(result.metric)
            if match:
                strategy, k = match[1], int(match[2])
                lines_of = drawings.setdefault((result.dataset, result.split, strategy if several else ""), {})
                lines_of.setdefault(run if several else strategy, {})[k] = result
    figures: list[Figure] = []
    for (dataset, split, strategy), lines_of in drawings.items():
        drawn = [
            Line(name=name, points=[Point(x=k, value=r.value, low=r.low, high=r.high) for k, r in sorted(at.items())])
            for name, at in lines_of.items()
        ]
        where = f"{shown_name(dataset)}, {public(split)}"
        title = f"{public(strategy)}: {where}" if strategy else where
        prompts = max(r.clusters for at in lines_of.values() for r in at.values())
        figures.append(
            Figure(
                title=title,
                svg=lines(
                    drawn,
                    x_name="answers submitted, k (logarithmic)",
                    y_name="prompts with a right answer among them",
                    title=f"pass@k, {title}: {', '.join(line.name for line in drawn)}",
                    log=True,
                    width=560 if several else WIDE,
                ),
                note=f"Over {show_number(prompts)} prompts; bands are 95 % intervals.",
            )
        )
    return figures


def ches_said(results: Sequence[Result], dataset: str, split: str) -> str:
    """The rank correlation of LN-CHES with displacement, as it was measured; nothing where it was not."""
    found = latest(results).get((dataset, split), {}).get("ches/ln_ches_spearman")
    if found is None:
        return ""
    known = found.low is not None and found.high is not None
    interval = show_interval(found.metric, found.low, found.high) if known else "(interval unknown)"
    return (
        f"Rank correlation (Spearman) of LN-CHES with how far the chosen response fell: {_rounded(found.value)} "
        f"{interval}, {show_number(found.n)} pairs, {found.interval}."
    )


def _gap(found: Mapping[str, Result], suffix: str) -> str:
    gap, ideal = found.get(f"ranking/gap{suffix}"), found.get(f"ranking/idealised{suffix}")
    own = found[f"ranking/accuracy{suffix}"]
    text = f"The policy ranks {show(own.metric, own.value)} {show_interval(own.metric, own.low, own.high)} rightly. "
    if gap is not None:
        text += (
            f"Gap to the median over β: {show(gap.metric, gap.value)} {show_interval(gap.metric, gap.low, gap.high)}. "
        )
    if ideal is not None and "simulated_alpha" in ideal.extra:
        text += f"Shares of raters are not known; {ideal.extra['simulated_alpha']} is assumed for every pair. "
    if all(point.low is None for point in idealised_points(found, suffix)):
        text += "Points over β have no intervals of their own."
    return text.strip()


def _row(result: Result, span: tuple[float, float] | None) -> Row:
    bar = None
    if span is not None and result.low is not None and result.high is not None:
        bar = whisker(result.value, result.low, result.high, span=span)
    return Row(result=result, label=label_of(result.metric), bar=bar, extras=_extras(result.extra))


def _span(members: Sequence[Result], result: Result) -> tuple[float, float] | None:
    """Shares lie on [0, 1]; other values on what spans all of their metric's values in the same unit, with zero."""
    unit = unit_of(result.metric)
    if unit == "share":
        return 0.0, 1.0
    alike = [r for r in members if unit_of(r.metric) == unit and (unit or r.metric == result.metric)]
    values = [v for r in alike for v in (r.value, r.low, r.high) if v is not None]
    low, high = min(0.0, *values), max(0.0, *values)
    return (low, high) if high > low else None


def _extras(extra: Mapping[str, Any]) -> list[tuple[str, str]]:
    told = {key: value for key, value in extra.items() if key != "n_dropped" or value}
    return [(key, text) for key, text in flat(scrub(told)) if text not in ("", "None") and len(text) <= 300]


def flat(value: Any, key: str = "") -> list[tuple[str, str]]:
    """Keys with dots, and values as text, of nested mappings."""
    if isinstance(value, Mapping):
        return [item for name, inner in value.items() for item in flat(inner, f"{key}.{name}" if key else str(name))]
    if isinstance(value, float):
        return [(key, show_number(value))]
    return [(key, ", ".join(map(str, value)) if isinstance(value, list) else str(value))]


def _rounded(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")
