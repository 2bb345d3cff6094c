"""Drawings of results: ranking accuracy against its ideal, pass@k, calibration, and intervals of comparisons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from evals.curves import show_number, show_share
from evals.frame import COLOURS, Frame, padded
from evals.results import Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A value of a line, with its limits where they are known."""

    x: float
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Named points in the order of x."""

    name: str
    points: Sequence[Point]


def lines(
    drawn: Sequence[Line], *, x_name: str, y_name: str, title: str, log: bool = False, width: float = 560
) -> Markup:
    """Lines of shares with 95 % bands, their names at their ends.

    Args:
        drawn: at most as many as there are colours can be told apart by colour; each is also named at its end.
        x_name: of the abscissa, with its unit.
        y_name: of the ordinate.
        title: for readers that see no picture.
        log: abscissa in powers of two.
        width: in pixels of the view.
    """
    points = [point for line in drawn for point in line.points]
    low, high = padded(*_extremes([v for p in points for v in (p.value, p.low, p.high) if v is not None]))
    xs = sorted({point.x for point in points})
    first, last = xs[0], xs[-1]
    if first == last:
        first, last = (first / 2, last * 2) if log else (first - 1, last + 1)
    longest = max(len(_short(line.name)) for line in drawn)
    frame = Frame(
        x=(first, last),
        y=(max(low, -0.02), min(high, 1.02)) if low > -0.1 and high < 1.1 else (low, high),
        x_name=x_name,
        y_name=y_name,
        width=width,
        right=24 + 8.6 * longest,
        log_x=log,
        show_y=_percent,
        x_ticks=xs if len(xs) <= 9 else xs[:: math.ceil(len(xs) / 9)],
    )
    parts: list[str] = []
    ends: list[tuple[float, int]] = []
    for i, line in enumerate(drawn):
        colour = f"c{i % COLOURS}"
        known = [p for p in line.points if p.low is not None and p.high is not None]
        if len(known) > 1:
            outline = [(p.x, p.high or 0.0) for p in known] + [(p.x, p.low or 0.0) for p in reversed(known)]
            parts.append(f'<polygon class="band {colour}" points="{frame.points(outline)}"/>')
        parts += [_error_bar(frame, p, colour) for p in known]
        outline = [(p.x, p.value) for p in line.points]
        parts.append(f'<polyline class="line {colour} d{i % COLOURS}" points="{frame.points(outline)}"/>')
        for p in line.points:
            told = f"{line.name}, {x_name.partition(',')[0]} {show_number(p.x)}: {show_share(p.value)}{_limits(p)}"
            at = f'cx="{frame.at_x(p.x):.1f}" cy="{frame.at_y(p.value):.1f}"'
            parts.append(f'<circle class="dot {colour}" {at} r="3.2"><title>{escape(told)}</title></circle>')
        ends.append((frame.at_y(line.points[-1].value), i))
    for y, i in _apart(ends, frame.top, frame.floor):
        name = escape(_short(drawn[i].name))
        parts.append(f'<text class="label c{i % COLOURS} named" x="{frame.end + 10:.1f}" y="{y + 4:.1f}">{name}</text>')
    return frame.drawing(parts, title)


def idealised(found: Mapping[str, Result], suffix: str = "") -> Markup | None:
    """Ranking accuracy of the exact optimum over β, beside the policy's and the reference's own with their intervals.

    None where the evaluation has no idealised accuracy by β.

    Args:
        found: results of one evaluation by metric.
        suffix: ``_per_token`` for accuracies per token.
    """
    points = idealised_points(found, suffix)
    own, reference = found.get(f"ranking/accuracy{suffix}"), found.get(f"ranking/reference{suffix}")
    if len(points) < 2 or own is None:
        return None
    levels = [(own, 0, "policy"), *([(reference, 3, "reference")] if reference is not None else [])]
    values = [v for p in points for v in (p.value, p.low, p.high) if v is not None]
    values += [v for each, _, _ in levels for v in (each.value, each.low, each.high) if v is not None]
    low, high = padded(min(values), max(values), 0.08)
    xs = [point.x for point in points]
    frame = Frame(
        x=(xs[0], xs[-1]),
        y=(max(0.0, low), min(1.0, high)),
        x_name="β of the objective (logarithmic)",
        y_name="ranking accuracy" + (", per token" if suffix else ""),
        right=106,
        log_x=True,
        show_y=_percent,
        x_ticks=xs,
    )
    parts: list[str] = []
    ends: list[tuple[float, int]] = []
    names = {0: "policy", 2: "idealised", 3: "reference"}
    for result, colour, _ in levels:
        y = frame.at_y(result.value)
        if result.low is not None and result.high is not None:
            outline = [(xs[0], result.high), (xs[-1], result.high), (xs[-1], result.low), (xs[0], result.low)]
            parts.append(f'<polygon class="band c{colour}" points="{frame.points(outline)}"/>')
        dash = " dashed" if colour == 3 else ""
        parts.append(
            f'<line class="line{dash} c{colour}" x1="{frame.left:g}" x2="{frame.end:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        ends.append((y, colour))
    known = [p for p in points if p.low is not None and p.high is not None]
    if len(known) > 1:
        outline = [(p.x, p.high or 0.0) for p in known] + [(p.x, p.low or 0.0) for p in reversed(known)]
        parts.append(f'<polygon class="band c2" points="{frame.points(outline)}"/>')
    parts.append(f'<polyline class="line c2" points="{frame.points([(p.x, p.value) for p in points])}"/>')
    for p in points:
        at = f'cx="{frame.at_x(p.x):.1f}" cy="{frame.at_y(p.value):.1f}"'
        told = f"β = {show_number(p.x)}: {show_share(p.value)}{_limits(p)}"
        parts.append(f'<circle class="dot c2" {at} r="3.6"><title>{told}</title></circle>')
    ends.append((frame.at_y(points[-1].value), 2))
    for y, colour in _apart(ends, frame.top, frame.floor):
        parts.append(
            f'<text class="label named c{colour}" x="{frame.end + 10:g}" y="{y + 4:.1f}">{names[colour]}</text>'
        )
    told = f"Ranking accuracy of the policy {show_share(own.value)}; idealised {_told(points)}"
    return frame.drawing(parts, told)


def idealised_points(found: Mapping[str, Result], suffix: str = "") -> list[Point]:
    """The idealised accuracy by β: from ``ranking/idealised@0.1`` and the like, else from ``extra``, without limits."""
    start = f"ranking/idealised{suffix}@"
    points = [
        Point(x=float(name.removeprefix(start)), value=r.value, low=r.low, high=r.high)
        for name, r in found.items()
        if name.startswith(start)
    ]
    median = found.get(f"ranking/idealised{suffix}")
    if not points and median is not None:
        extra: Mapping[str, Any] = median.extra
        betas, values = extra.get("betas") or (), extra.get("per_beta") or ()
        points = [Point(x=float(b), value=float(v)) for b, v in zip(betas, values, strict=False)]
    return sorted((p for p in points if p.x > 0), key=lambda p: p.x)


def reliability(bins: Sequence[Mapping[str, float]]) -> Markup:
    """Share that is right over confidence, both from 0 to 1, a dot for each bin with an area by its number of pairs.

    Args:
        bins: as ``evals.reward_model.reliability`` makes them.
    """
    most = max(bin["n"] for bin in bins)
    frame = Frame(
        x=(0.48, 1.02),
        y=(-0.04, 1.04),
        x_name="confidence",
        y_name="share that is right",
        show_x=_percent,
        show_y=_percent,
        x_ticks=(0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
        y_ticks=(0.0, 0.25, 0.5, 0.75, 1.0),
    )
    parts = [f'<polyline class="mark" points="{frame.points([(0.5, 0.5), (1.0, 1.0)])}"/>']
    for bin in bins:
        parts.append(
            f'<circle class="dot c0" cx="{frame.at_x(bin["confidence"]):.1f}" cy="{frame.at_y(bin["accuracy"]):.1f}" '
            f'r="{2 + 8 * math.sqrt(bin["n"] / most):.1f}"><title>{show_number(bin["n"])} pairs, confidence '
            f"{show_share(bin['confidence'])}: {show_share(bin['accuracy'])} right</title></circle>"
        )
    return frame.drawing(parts, "Share that is right over confidence")


def _error_bar(frame: Frame, point: Point, colour: str) -> str:
    x, low, high = frame.at_x(point.x), frame.at_y(point.low or 0.0), frame.at_y(point.high or 0.0)
    return f'<line class="bar {colour}" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'


def _limits(point: Point) -> str:
    if point.low is None or point.high is None:
        return ""
    return f" [{100 * point.low:.1f}, {100 * point.high:.1f}]"


def _told(points: Sequence[Point]) -> str:
    return ", ".join(f"{show_share(p.value)} at β {show_number(p.x)}" for p in points)


def _extremes(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %".replace("-", "−")


def _short(name: str) -> str:
    return name if len(name) <= 20 else f"{name[:9]}…{name[-10:]}"


def _apart(
    wanted: Sequence[tuple[float, int]], top: float, bottom: float, line: float = 17.0
) -> list[tuple[float, int]]:
    """Heights of names, moved as little as keeps them readable, with what they belong to."""
    placed: list[tuple[float, int]] = []
    for y, which in sorted(wanted):
        placed.append((max(y, placed[-1][0] + line if placed else top), which))
    for n in reversed(range(len(placed))):
        most = bottom if n == len(placed) - 1 else placed[n + 1][0] - line
        placed[n] = min(placed[n][0], most), placed[n][1]
    return placed
