"""Line plots with bands as SVG: axes with names, lines with their names at the end, readable in dark and in light."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

LIGHT = ("#b4532a", "#5c636d", "#6b4fa0", "#0f7b8a", "#8a6d00", "#a8326e")
DARK = ("#f0915f", "#a9b1ba", "#b39ddb", "#4fc3d3", "#dcb73c", "#ee82b4")
LEFT, RIGHT, TOP, BOTTOM = 46, 104, 26, 40
HEIGHT = 300
LINE = 12
"""Pixels between two names at the end of lines."""


def _style() -> str:
    def colours(which: Sequence[str]) -> str:
        return "".join(
            f".l{i}{{stroke:{each}}}.a{i}{{fill:{each}}}.t{i}{{fill:{each}}}" for i, each in enumerate(which)
        )

    return (
        "text{font:11px system-ui,sans-serif;fill:#24292f}.h{font-weight:600}.q{fill:#59616b}.g{stroke:#d0d5db}"
        ".b{fill-opacity:.15}polyline{fill:none;stroke-width:1.8;stroke-linejoin:round}"
        f"{colours(LIGHT)}@media(prefers-color-scheme:dark){{text{{fill:#e6edf3}}.q{{fill:#9aa3ad}}"
        f".g{{stroke:#3a424c}}{colours(DARK)}}}"
    )


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line: a name and its points with intervals."""

    name: str
    points: Sequence[Mapping[str, Any]]
    """``value``, ``low`` and ``high`` of each x."""
    colour: int
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes."""

    title: str
    x: Sequence[float]
    lines: Sequence[Line]


def plot(
    title: str, panels: Sequence[Panel], *, x_name: str, y_name: str, log: bool = False, panel_width: int = 320
) -> str:
    """Panels beside each other on the same scales.

    Args:
        title: what is drawn, for readers that see no picture.
        panels: each with its own lines.
        x_name: under every panel.
        y_name: beside the first panel.
        log: x in powers of two.
        panel_width: in pixels, names of lines included.
    """
    points = [point for panel in panels for line in panel.lines for point in line.points]
    low, high, step = _range(min(p["low"] for p in points), max(p["high"] for p in points))
    parts = [
        _panel(panel, number * panel_width, panel_width, (low, high, step), x_name, y_name if not number else "", log)
        for number, panel in enumerate(panels)
    ]
    width = panel_width * len(panels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" role="img" '
        f'aria-label="{escape(title)}"><style>{_style()}</style>{"".join(parts)}</svg>\n'
    )


def _range(low: float, high: float) -> tuple[float, float, float]:
    step = next(each for each in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1e9) if (high - low) / each <= 6)
    return max(0.0, math.floor(low / step) * step), min(1.0, math.ceil(high / step) * step), step


def _panel(
    panel: Panel,
    left: int,
    width: int,
    y_range: tuple[float, float, float],
    x_name: str,
    y_name: str,
    log: bool,
) -> str:
    low, high, step = y_range
    place: Callable[[float], float] = math.log2 if log else float
    first, last = place(panel.x[0]), place(panel.x[-1])
    start, end, floor, ceiling = left + LEFT, left + width - RIGHT, HEIGHT - BOTTOM, TOP

    def at_x(x: float) -> float:
        return start + (end - start) * ((place(x) - first) / (last - first) if last > first else 0.5)

    def at_y(y: float) -> float:
        return floor - (floor - ceiling) * (min(max(y, low), high) - low) / (high - low)

    parts = [f'<text class="h" x="{start}" y="15">{escape(panel.title)}</text>']
    for i in range(round((high - low) / step) + 1):
        y = at_y(low + i * step)
        parts.append(f'<path class="g" d="M{start} {y:.1f}H{end}" stroke-width="1"/>')
        label = f"{low + i * step:.2f}"
        parts.append(f'<text class="q" x="{start - 5}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for i, x in enumerate(panel.x):
        if len(panel.x) <= 7 or i % 2 == (len(panel.x) - 1) % 2:
            parts.append(f'<text class="q" x="{at_x(x):.1f}" y="{floor + 15}" text-anchor="middle">{x:g}</text>')
    middle = (start + end) / 2
    parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_name)}</text>')
    if y_name:
        turned = f'transform="translate({left + 10} {(floor + ceiling) / 2:.1f}) rotate(-90)"'
        parts.append(f'<text {turned} text-anchor="middle">{escape(y_name)}</text>')
    for line in panel.lines:
        tops = [(at_x(x), at_y(point["high"])) for x, point in zip(panel.x, line.points, strict=True)]
        bottoms = [(at_x(x), at_y(point["low"])) for x, point in zip(panel.x, line.points, strict=True)]
        parts.append(f'<polygon class="b a{line.colour}" points="{_listed([*tops, *reversed(bottoms)])}"/>')
    for line in panel.lines:
        values = [(at_x(x), at_y(point["value"])) for x, point in zip(panel.x, line.points, strict=True)]
        dash = ' stroke-dasharray="5 3"' if line.dashed else ""
        parts.append(f'<polyline class="l{line.colour}"{dash} points="{_listed(values)}"/>')
    wanted = [at_y(line.points[-1]["value"]) for line in panel.lines]
    for line, y in zip(panel.lines, apart(wanted, ceiling, floor), strict=True):
        parts.append(f'<text class="t{line.colour}" x="{end + 6}" y="{y + 4:.1f}">{escape(line.name)}</text>')
    return "".join(parts)


def _listed(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def apart(wanted: Sequence[float], top: float, bottom: float) -> list[float]:
    """Heights of names, in their order from above, moved as little as keeps them readable.

    Args:
        wanted: where each belongs, in pixels from above.
        top: least height.
        bottom: greatest, unless there is no room for all above it.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed: list[float] = []
    for i in order:
        placed.append(max(wanted[i], placed[-1] + LINE if placed else top))
    for n in reversed(range(len(placed))):
        most = bottom if n == len(placed) - 1 else placed[n + 1] - LINE
        placed[n] = min(placed[n], most)
    return [placed[order.index(i)] for i in range(len(wanted))]
