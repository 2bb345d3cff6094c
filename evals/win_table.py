"""Win rates with intervals: of one run against its baselines, and of several runs against each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from evals.bradley_terry import bradley_terry
from evals.compare import Run
from evals.curves import show_share
from evals.metrics import METRICS
from evals.redact import public, shown_name
from evals.results import Result
from evals.summary import show, show_interval
from objectives.stats import Estimate

COLUMNS = {
    "win_rate/raw": "win rate",
    "win_rate/length_controlled": "length-controlled",
    "win_rate/length_controlled_difficulty": "length, difficulty",
    "win_rate/length_controlled_joint": "joint fit",
    "win_rate/style_controlled": "style-controlled",
    "judge/win_rate": "both orders",
    "arena/score": "arena score",
    "arena/style_controlled": "arena, style-controlled",
    "wildbench/reward": "WB-Reward",
}
"""Metrics against a baseline, and the names of their columns."""
SHADES = 4
"""Of either side of even."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One win rate, ready to be shown."""

    value: str
    interval: str = ""
    shade: int = 0
    """−4 (loses) to 4 (wins); colour says nothing that the text does not."""
    beyond: str = ""
    """``▲`` or ``▼`` where even lies outside the interval."""
    told: str = ""
    """By what and over how many prompts."""
    fitted: bool = False
    """Not played, but implied by games against others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WinTable:
    """Rows against columns."""

    title: str
    """Nothing where there is but one table."""
    corner: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, str, Sequence[Cell | None]]]
    """Name, what else is to be known of it, and cells; None where there is none."""
    notes: Sequence[str] = field(default_factory=tuple)


def against_baselines(results: Sequence[Result]) -> WinTable | None:
    """The latest win rates of one run: baselines as rows, kinds of win rate as columns. None where there is none."""
    found: dict[tuple[str, str, str, str], dict[str, Result]] = {}
    for result in sorted((r for r in results if r.metric in COLUMNS), key=lambda r: r.step):
        found.setdefault((*_opponent(result), result.dataset, result.split), {})[result.metric] = result
    if not found:
        return None
    columns = [metric for metric in COLUMNS if any(metric in row for row in found.values())]
    several = len({(key[2], key[3].partition(" vs ")[0]) for key in found}) > 1
    rows: list[tuple[str, str, list[Cell | None]]] = []
    for (baseline, judge, dataset, split), row in found.items():
        about = [f"judge {judge}"] if judge else []
        about += [f"{shown_name(dataset)}, {public(split.partition(' vs ')[0])}"] if several else []
        rows.append((baseline, ", ".join(about), [_cell(row[m]) if m in row else None for m in columns]))
    return WinTable(title="", corner="against", columns=[COLUMNS[metric] for metric in columns], rows=rows)


def all_against_all(runs: Sequence[Run], names: Mapping[str, str]) -> list[WinTable]:
    """Every run and baseline against every other, one table for each prompt set and judge.

    What was judged is shown as it was measured; games that were never played are filled in by Bradley-Terry strengths
    over the baselines that runs share, with a bootstrap over prompts, where runs have ``scores.jsonl``.

    Args:
        runs: as ``compare.read_run`` gives them.
        names: what to show of each.
    """
    groups: dict[tuple[str, str, str, str], list[tuple[Run, str, Result]]] = {}
    for run in runs:
        for metric, dataset, split in run.results:
            if metric not in ("win_rate/raw", "judge/win_rate"):
                continue
            result = run.results[metric, dataset, split]
            baseline, judge = _opponent(result)
            base = split.partition(" vs ")[0]
            groups.setdefault((metric, dataset, base, judge), []).append((run, baseline, result))
    tables: list[WinTable] = []
    for (metric, dataset, split, judge), played in groups.items():
        by = f", judge {judge}" if judge else ""
        title = f"{METRICS[metric].label}: {shown_name(dataset)}, {public(split)}{by}"
        tables.append(_all(played, names, title))
    return tables


def _all(played: Sequence[tuple[Run, str, Result]], names: Mapping[str, str], title: str) -> WinTable:
    runs = list(dict.fromkeys(names[run.name] for run, _, _ in played))
    of_model = {shown_name(str(run.facts.get("model", ""))): names[run.name] for run, _, _ in played}
    # A baseline that is one of the runs, by its name or its model, is that run.
    opponents = [baseline if baseline in runs else of_model.get(baseline, baseline) for _, baseline, _ in played]
    opponents = [
        baseline if opponent == names[run.name] else opponent
        for (run, baseline, _), opponent in zip(played, opponents, strict=True)
    ]
    players = list(dict.fromkeys([*runs, *opponents]))
    measured: dict[tuple[str, str], Cell] = {}
    first: list[str] = []
    second: list[str] = []
    scores: list[float] = []
    prompts: list[str] = []
    for (run, _, result), opponent in zip(played, opponents, strict=True):
        me = names[run.name]
        measured[me, opponent] = _cell(result)
        measured.setdefault((opponent, me), _cell(_mirrored(result)))
        own = run.scores.get((result.metric, result.dataset, result.split))
        for prompt, score in (own.by_prompt if own is not None else {}).items():
            if me != opponent:
                first.append(me)
                second.append(opponent)
                scores.append(score)
                prompts.append(prompt)
    fitted, notes = _fitted(players, measured.keys(), first, second, scores, prompts)
    rows = [
        (
            one,
            "",
            [None if one == two else measured.get((one, two), fitted.get((one, two))) for two in players],
        )
        for one in players
    ]
    if any(cell is not None and cell.fitted for _, _, cells in rows for cell in cells):
        notes.append(
            "Slanted: never judged against each other; implied by games with common opponents (Bradley-Terry)."
        )
    return WinTable(title=title, corner="beats", columns=players, rows=rows, notes=notes)


def _fitted(
    players: Sequence[str],
    known: Set[tuple[str, str]],
    first: Sequence[str],
    second: Sequence[str],
    scores: Sequence[float],
    prompts: Sequence[str],
) -> tuple[dict[tuple[str, str], Cell], list[str]]:
    found: dict[tuple[str, str], Cell] = {}
    if len(players) < 3 or not scores:
        return found, []
    try:
        for anchor in players:
            # A fit and its bootstrap take seconds: only what was not measured is asked for, and either way at once.
            wanted = [
                one for one in players if one != anchor and (one, anchor) not in known and (one, anchor) not in found
            ]
            if not wanted:
                continue
            strengths = bradley_terry(first, second, scores, anchor=anchor, prompts=prompts)
            for one, estimate in strengths.against_anchor().items():
                if one in wanted:
                    found[one, anchor], found[anchor, one] = _implied(estimate)
    except ValueError as error:
        return {}, [f"No common scale: {public(str(error))}."]
    return found, []


def _implied(estimate: Estimate) -> tuple[Cell, Cell]:
    """Both ways round."""
    value, low, high = estimate.value, estimate.low, estimate.high
    told = f"Bradley-Terry over {estimate.n} games on {estimate.clusters} prompts"
    if math.isnan(low) or math.isnan(high):
        return _shown(value, None, None, told, fitted=True), _shown(1 - value, None, None, told, fitted=True)
    return _shown(value, low, high, told, fitted=True), _shown(1 - value, 1 - high, 1 - low, told, fitted=True)


def _opponent(result: Result) -> tuple[str, str]:
    """Baseline and judge."""
    extra: Mapping[str, Any] = result.extra
    _, vs, named = result.split.partition(" vs ")
    baseline = extra.get("baseline") or (named if vs else "") or "baseline"
    return shown_name(_word(baseline)), shown_name(_word(extra.get("judge") or ""))


def _word(value: Any) -> str:
    """A model may be described by a mapping that has its name."""
    if isinstance(value, Mapping):
        return str(value.get("model") or value.get("name") or ", ".join(f"{k} {v}" for k, v in value.items()))
    return str(value)


def _mirrored(result: Result) -> Result:
    low = None if result.high is None else 1 - result.high
    high = None if result.low is None else 1 - result.low
    return Result(
        metric=result.metric,
        dataset=result.dataset,
        split=result.split,
        n=result.n,
        clusters=result.clusters,
        value=1 - result.value,
        stderr=result.stderr,
        low=low,
        high=high,
        interval=result.interval,
        step=result.step,
    )


def _cell(result: Result) -> Cell:
    told = f"{result.clusters} prompts, {result.interval}"
    if result.metric == "wildbench/reward":  # from −1 to 1: even is 0
        even = _shown((result.value + 1) / 2, _half(result.low), _half(result.high), told)
        return Cell(
            value=show(result.metric, result.value),
            interval=show_interval(result.metric, result.low, result.high),
            shade=even.shade,
            beyond=even.beyond,
            told=told,
        )
    return _shown(result.value, result.low, result.high, told)


def _half(value: float | None) -> float | None:
    return None if value is None else (value + 1) / 2


def _shown(value: float, low: float | None, high: float | None, told: str, *, fitted: bool = False) -> Cell:
    beyond = ""
    if low is not None and high is not None:
        beyond = "▲" if low > 0.5 else "▼" if high < 0.5 else ""
    return Cell(
        value=show_share(value),
        interval=show_interval("win_rate/raw", low, high) if low is not None else "",
        shade=max(-SHADES, min(SHADES, round((value - 0.5) * 2 * SHADES * 1.25))),
        beyond=beyond,
        told=told,
        fitted=fitted,
    )
