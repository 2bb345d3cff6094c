"""What a run comes down to: the one comparison at the top, and what a reader should be told unasked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evals.curves import show_number, show_share
from evals.metrics import METRICS
from evals.ranking import Metric
from evals.redact import shown_name
from evals.results import Result
from evals.run_files import RunFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A value with its 95 % interval, and how many pairs it is over; None where that is not known."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """Ranking accuracy before and after."""

    before: Point | None
    after: Point
    gain: Point | None
    """The difference on the same pairs, whose interval is narrower than the two intervals suggest."""
    where: str
    """Dataset and split."""


@dataclass(frozen=True, slots=True)
class Note:
    """Something a reader should know."""

    level: str
    """``warning``: look at this before believing the result; ``remark``: good to know."""
    text: str


def headline(run: RunFiles) -> Headline | None:
    """From ``results.json`` if it has a ranking, else from the evaluation lines of ``metrics.jsonl``, else None."""
    after = run.result("ranking/accuracy")
    if after is not None:
        # The pairs are the same, so the untrained policy is either an earlier result or the reference of this one.
        assert run.results is not None
        earlier = [
            r
            for r in run.results.results
            if (r.metric, r.dataset, r.split) == (after.metric, after.dataset, after.split) and r.step < after.step
        ]
        first = min(earlier, key=lambda r: r.step, default=None)
        reference = run.result("ranking/reference", like=after)
        before = _point(first, f"step {first.step}") if first else _point(reference, "reference")
        gain = _point(run.result("ranking/gain", like=after), "gain")
        where = f"{shown_name(after.dataset)}, {after.split}"
        return Headline(before=before, after=_must(_point(after, f"step {after.step}")), gain=gain, where=where)
    lines = [line for line in run.metrics if math.isfinite(_value(line, "eval/ranking/accuracy"))]
    if not lines:
        return None
    before = _from_line(lines[0]) if len(lines) > 1 else None
    return Headline(before=before, after=_from_line(lines[-1]), gain=None, where="held-out pairs")


def notes(run: RunFiles) -> list[Note]:
    """What the numbers say beyond themselves; warnings first."""
    found = [*_check_notes(run), *_number_notes(run), *_data_notes(run.data)]
    return sorted(found, key=lambda note: note.level != "warning")


def unit_of(metric: str) -> str:
    """``share``, ``points``, ``nats`` or, for metrics this package does not know, ``""``."""
    return METRICS.get(metric, Metric("", "")).unit


def show(metric: str, value: float | None, *, signed: bool = False) -> str:
    """A value in the unit of its metric; an unknown one is an em dash."""
    if value is None:
        return "—"
    unit = unit_of(metric)
    text = (
        show_share(value)
        if unit == "share"
        else f"{show_number(round(100 * value, 1))} pp"
        if unit == "points"
        else show_number(value)
    )
    return f"+{text}" if (signed or unit == "points") and value > 0 else text


def show_interval(metric: str, low: float | None, high: float | None) -> str:
    """``[57.0, 65.3]`` in the unit of the value, or an em dash where the spread is unknown."""
    if low is None or high is None:
        return "—"
    if unit_of(metric) in ("share", "points"):
        return f"[{_one(100 * low)}, {_one(100 * high)}]"
    # Two digits of the interval's width: more would say nothing.
    decimals = max(0, 1 - math.floor(math.log10(high - low))) if high > low else 4
    return (
        f"[{low:.{decimals}f}, {high:.{decimals}f}]".replace("-", "−") if decimals < 7 else f"[{low:.3g}, {high:.3g}]"
    )


def _check_notes(run: RunFiles) -> list[Note]:
    failed = [str(check.get("check", "?")) for check in run.checks if check.get("passed") is not True]
    if not failed:
        return []
    return [
        Note(
            "warning",
            f"Start-up checks that did not pass: {', '.join(failed)}. Numbers below may not mean what they say.",
        )
    ]


def _number_notes(run: RunFiles) -> list[Note]:
    found: list[Note] = []
    steps, losses = run.series("loss")
    broken = [step for step, loss in zip(steps, losses, strict=True) if not math.isfinite(loss)]
    if broken:
        found.append(Note("warning", f"The loss was not finite at step {broken[0]:g}."))
    if run.torn:
        found.append(
            Note(
                "remark",
                f"{run.torn} unreadable line(s) of metrics.jsonl were left out; a killed process leaves one.",
            )
        )
    down, fell = run.result("displacement/chosen"), run.result("displacement/chosen_fell")
    whole = run.series("eval/logps/chosen")[1]
    # As much as the alarm during training asks for: a change that is certain can still be too small to matter.
    large = down is not None and (not whole or -down.value > 0.01 * abs(whole[-1]))
    if down is not None and down.high is not None and down.high < 0 and large:
        share = f", in {show_share(fell.value)} of pairs" if fell is not None else ""
        found.append(
            Note(
                "warning",
                f"Likelihood displacement: the chosen responses became less probable, by {show_number(-down.value)} "
                f"nats on average{share}. Margins can grow while both responses fall. Adding a likelihood term on the "
                "chosen responses, or leaving out the pairs most alike, usually helps.",
            )
        )
    gain = run.result("ranking/gain")
    if gain is not None and gain.low is not None and gain.high is not None and gain.low <= 0 <= gain.high:
        found.append(
            Note(
                "remark",
                "The interval of the gain in ranking accuracy includes zero: these pairs show no change either way.",
            )
        )
    ties = run.result("ranking/ties")
    if ties is not None and ties.value > 0.1:
        found.append(
            Note("remark", f"{show_share(ties.value)} of the pairs are ties for the policy; each counts one half.")
        )
    dropped = [r.extra.get("n_dropped", 0) for r in (run.results.results if run.results else ())]
    if any(dropped):
        found.append(
            Note(
                "remark",
                f"Up to {max(dropped)} evaluation pairs could not be scored (empty response or non-finite log-prob).",
            )
        )
    return found


def _data_notes(data: Mapping[str, Any]) -> list[Note]:
    rows = data.get("rows") or {}
    read, kept = rows.get("read", 0), rows.get("kept", 0)
    found: list[Note] = []
    if read and (read - kept) / read > 0.05:
        found.append(
            Note(
                "remark",
                f"{show_share((read - kept) / read)} of the rows read were dropped; the data section says why.",
            )
        )
    cut = {leg: n for leg, n in (data.get("truncated") or {}).items() if n}
    if kept and cut and max(cut.values()) / kept > 0.1:
        leg = max(cut, key=lambda name: cut[name])
        found.append(
            Note("remark", f"{show_share(cut[leg] / kept)} of the rows had their {leg} response or prompt cut to fit.")
        )
    mismatches = data.get("boundary_mismatches", 0)
    if kept and mismatches / kept > 0.01:
        found.append(Note("remark", f"In {mismatches} rows the prompt's tokens are not a prefix of the whole text's."))
    return found


def _point(result: Result | None, label: str) -> Point | None:
    if result is None:
        return None
    return Point(label=label, value=result.value, low=result.low, high=result.high, n=result.n)


def _must(point: Point | None) -> Point:
    assert point is not None
    return point


def _from_line(line: Mapping[str, Any]) -> Point:
    low, high = (_value(line, f"eval/ranking/accuracy_{end}") for end in ("low", "high"))
    known = math.isfinite(low) and math.isfinite(high)
    return Point(
        label=f"step {line['step']:g}",
        value=_value(line, "eval/ranking/accuracy"),
        low=low if known else None,
        high=high if known else None,
    )


def _value(line: Mapping[str, Any], key: str) -> float:
    value = line.get(key)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _one(value: float) -> str:
    return f"{value:.1f}".replace("-", "−")
