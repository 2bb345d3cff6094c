"""Curves as inline SVG: no script, no font, no colour of their own (the page's style sheet colours them by class).

Written by hand rather than with matplotlib, whose SVG carries fixed colours and fonts and so cannot follow the reader's
light or dark mode, and weighs a hundred times as much.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 226
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 24, 40
MOST_POINTS = 400
"""A line with more is thinned, keeping each bucket's lowest and highest point, so that no spike is lost."""
SMOOTH_FROM = 80
"""From this many points on, a moving mean is drawn over the points as logged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line of a panel."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    """NaN where the logged value was not finite: the line breaks there and a mark shows it."""
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    colour: int = 0
    """Which of the style sheet's colours."""
    dashed: bool = False

    @property
    def last(self) -> float:
        """The last finite value, of the moving mean where one is drawn; NaN if there is none."""
        points = list(zip(self.steps, self.values, strict=True))
        drawn = _moving_mean(points) if len(points) >= SMOOTH_FROM else points
        return next((value for _, value in reversed(drawn) if math.isfinite(value)), math.nan)


def show_number(value: float) -> str:
    """Four significant digits, counts whole, thin thousands, a real minus sign: −38.22, 12 040, 5e−7."""
    if not math.isfinite(value):
        return "not finite"
    if isinstance(value, int) or 1e4 <= abs(value) < 1e9:
        text = f"{value:,.0f}".replace(",", "\u202f")
    else:
        text = _short_exponent(f"{value:.4g}")
    return text.replace("-", "−")


def _short_exponent(text: str) -> str:
    digits, e, exponent = text.partition("e")
    return f"{digits}e{int(exponent)}" if e else digits


def show_share(value: float) -> str:
    """A share as a percentage with one digit."""
    return f"{100 * value:.1f} %".replace("-", "−") if math.isfinite(value) else "not finite"


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers in [low, high], in steps of 1, 2 or 5 times a power of ten; ``about`` of them or fewer."""
    span = (high - low) / about
    power = 10.0 ** math.floor(math.log10(span))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= span * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def panel(
    series: Sequence[Series],
    *,
    title: str,
    share: bool = False,
    log: bool = False,
    mark: float | None = None,
    x_name: str = "optimizer step",
    y_name: str = "",
) -> Markup:
    """One panel: axes, bands, lines, and a mark for every value that was not finite.

    Args:
        series: lines; those without a finite value draw only their marks.
        title: for screen readers.
        share: values are shares, shown as percentages.
        log: logarithmic ordinate, if all values are positive.
        mark: a level to draw a hairline at, if it lies in view (zero, chance).
        x_name: of the abscissa.
        y_name: of the ordinate, with its unit; nothing where values are pure numbers.
    """
    show = show_share if share else show_number
    finite = [v for s in series for v in (*s.values, *(s.low or ()), *(s.high or ())) if math.isfinite(v)] or [0.0, 1.0]
    log = log and min(finite) > 0
    forward: Callable[[float], float] = math.log10 if log else float
    low, high = _range(forward(min(finite)), forward(max(finite)))
    if share:
        low, high = max(low, -0.02) if min(finite) >= 0 else low, min(high, 1.02) if max(finite) <= 1 else high
    steps = [step for s in series for step in s.steps] or [0.0, 1.0]
    first, last = min(steps), max(steps)
    last = last if last > first else first + 1

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / (last - first)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - forward(value)) / (high - low)

    parts: list[str] = []
    for level in [10.0**t for t in _log_ticks(low, high)] if log else ticks(low, high):
        text = escape(_tick(level, share))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(level):.1f}" y2="{y(level):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y(level) + 3.5:.1f}" text-anchor="end">{text}</text>')
    for step in ticks(first, last):
        if step == round(step):
            label = escape(_tick(step, False))
            parts.append(
                f'<text class="tick" x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{label}</text>'
            )
    if mark is not None and not log and low < mark < high:
        parts.append(f'<line class="mark" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(mark):.1f}" y2="{y(mark):.1f}"/>')
    for s in series:
        parts += _line(s, x, y, show)
    parts += _names(x_name, y_name or ("share" if share else ""))
    return _drawing(parts, f"{title}: {'; '.join(f'{s.label} ends at {show(s.last)}' for s in series)}")


def _names(x_name: str, y_name: str) -> list[str]:
    middle = (LEFT + WIDTH - RIGHT) / 2
    names = [f'<text class="axis-name" x="{middle:g}" y="{HEIGHT - 7}" text-anchor="middle">{escape(x_name)}</text>']
    return [*names, f'<text class="axis-name" x="4" y="13">{escape(y_name)}</text>'] if y_name else names


def _drawing(parts: Sequence[str], about: str) -> Markup:
    told = escape(well_formed(about))
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{told}"><title>{told}</title>'
        f"{''.join(parts)}</svg>"
    )


def well_formed(text: str) -> str:
    """The text with every character that XML and UTF-8 have no place for (NUL, half a surrogate pair) replaced."""
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)


_NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def whisker(
    value: float, low: float, high: float, *, span: tuple[float, float], colour: int = 0, middle: bool = False
) -> Markup:
    """A dot with its interval on a short axis from ``span[0]`` to ``span[1]``; decoration beside the numbers.

    With ``middle`` the middle of the axis is marked.
    """
    width, height, edge = 120.0, 14.0, 5.0

    def x(at: float) -> float:
        share = (min(max(at, span[0]), span[1]) - span[0]) / (span[1] - span[0])
        return edge + (width - 2 * edge) * share

    centre = f'<line class="mark" x1="{width / 2:g}" x2="{width / 2:g}" y1="0" y2="{height:g}"/>'
    return Markup(
        f'<svg class="whisker" viewBox="0 0 {width:g} {height:g}" aria-hidden="true">'
        f'<line class="grid" x1="{edge}" x2="{width - edge}" y1="7" y2="7"/>'
        f"{centre if middle else ''}"
        f'<line class="bar c{colour}" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="7" y2="7"/>'
        f'<circle class="dot c{colour}" cx="{x(value):.1f}" cy="7" r="3.4"/></svg>'
    )


def _line(
    s: Series, x: Callable[[float], float], y: Callable[[float], float], show: Callable[[float], str]
) -> list[str]:
    parts: list[str] = []
    points = [(step, value) for step, value in zip(s.steps, s.values, strict=True)]
    if s.low is not None and s.high is not None:
        band = [
            (a, b, c) for a, b, c in zip(s.steps, s.low, s.high, strict=True) if math.isfinite(b) and math.isfinite(c)
        ]
        outline = [(x(a), y(c)) for a, _, c in band] + [(x(a), y(b)) for a, b, _ in reversed(band)]
        if len(band) > 1:
            parts.append(f'<polygon class="band c{s.colour}" points="{_join(outline)}"/>')
        parts += [
            f'<line class="bar c{s.colour}" x1="{x(a):.1f}" x2="{x(a):.1f}" y1="{y(b):.1f}" y2="{y(c):.1f}"/>'
            for a, b, c in band
        ]
    smooth = len(points) >= SMOOTH_FROM
    for run in _unbroken(_thin(points)):
        kind = ("raw" if smooth else "line") + (" dashed" if s.dashed else "")
        parts.append(f'<polyline class="{kind} c{s.colour}" points="{_join([(x(a), y(b)) for a, b in run])}"/>')
    if smooth:
        for run in _unbroken(_thin(_moving_mean(points))):
            parts.append(f'<polyline class="line c{s.colour}" points="{_join([(x(a), y(b)) for a, b in run])}"/>')
    elif len(points) <= 40 and not s.dashed:
        parts += [
            f'<circle class="dot c{s.colour}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="{2.6 if s.low is not None else 1.7}">'
            f"<title>{escape(s.label)}, step {a:g}: {escape(show(b))}</title></circle>"
            for a, b in points
            if math.isfinite(b)
        ]
    parts += [
        f'<path class="broken" d="M{x(a) - 3:.1f} {HEIGHT - BOTTOM - 6}l6 6m0 -6l-6 6"><title>'
        f"{escape(s.label)}, step {a:g}: not finite</title></path>"
        for a, b in points
        if not math.isfinite(b)
    ][:MOST_POINTS]
    return parts


def _range(low: float, high: float) -> tuple[float, float]:
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 0.5
    return low - pad, high + pad


def _log_ticks(low: float, high: float) -> list[float]:
    """Exponents: whole decades, or 1, 2 and 5 within them where fewer than two decades are in view."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    whole = [float(d) for d in decades if low <= d <= high]
    if len(whole) > 2:
        return whole[:: math.ceil(len(whole) / 5)]
    return [t for d in decades for m in (1, 2, 5) if low <= (t := d + math.log10(m)) <= high]


def _tick(value: float, share: bool) -> str:
    if share:
        return f"{100 * value:.3g} %".replace("-", "−")
    text = (
        "0"
        if abs(value) < 1e-12
        else f"{value / 1000:.4g}k"
        if 1e4 <= abs(value) < 1e6
        else _short_exponent(f"{value:.4g}")
    )
    return text.replace("-", "−")


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(2 * len(points) / MOST_POINTS)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        broken = [p for p in bucket if not math.isfinite(p[1])]
        kept += broken[:1] or sorted({min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])})
    return kept


def _moving_mean(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    reach = max(2, len(points) // 50)
    values = np.array([value for _, value in points])
    finite = np.isfinite(values)
    # Sums over windows as differences of running sums: a window that slides costs nothing however wide it is.
    total, count = (np.concatenate([[0.0], np.cumsum(v)]) for v in (np.where(finite, values, 0.0), finite))
    start = np.maximum(np.arange(len(values)) - reach, 0)
    stop = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    means = np.where(finite, (total[stop] - total[start]) / np.maximum(count[stop] - count[start], 1), np.nan)
    return [(step, float(mean)) for (step, _), mean in zip(points, means, strict=True)]


def _unbroken(points: list[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if len(run) > 1]


def _join(points: list[tuple[float, float]]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
