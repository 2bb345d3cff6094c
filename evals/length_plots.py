"""Distributions side by side: how long responses are, and what the data doctor counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from evals.curves import show_number
from evals.frame import COLOURS, WIDE, Frame

BINS = 48
ROW = 46.0
"""Pixels for each distribution."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """Values of one kind."""

    name: str
    values: np.ndarray
    """Shape (item,), finite."""


def ridges(samples: Sequence[Sample], *, x_name: str, title: str) -> Markup | None:
    """A row for each sample on one abscissa: its outline, the middle half of it, and its median.

    The abscissa is logarithmic where the values span more than a factor of 30. None where there are no values.
    """
    samples = [sample for sample in samples if len(sample.values)]
    if not samples:
        return None
    together = np.concatenate([sample.values for sample in samples])
    low, high = float(np.quantile(together, 0.001)), float(np.quantile(together, 0.999))
    log = low > 0 and high / low > 30
    if high <= low:
        low, high = low - 0.5, high + 0.5
    edges = np.geomspace(low, high, BINS + 1) if log else np.linspace(low, high, BINS + 1)
    height = 34 + ROW * len(samples) + 46
    frame = Frame(
        x=(low, high),
        y=(0.0, float(len(samples))),
        x_name=x_name,
        y_name="",
        log_x=log,
        x_ticks=_log_ticks(low, high) if log else None,
        y_ticks=[],
        width=WIDE,
        height=height,
        left=150,
        right=72,
        top=20,
    )
    parts: list[str] = []
    for i, sample in enumerate(samples):
        floor = frame.top + (frame.floor - frame.top) / len(samples) * (i + 1)
        density, _ = np.histogram(np.clip(sample.values, low, high), bins=edges)
        tall = density / max(1, density.max()) * (ROW - 12)
        outline = [f"M{frame.at_x(edges[0]):.1f} {floor:.1f}"]
        for j, each in enumerate(tall):
            outline.append(f"V{floor - each:.1f}H{frame.at_x(edges[j + 1]):.1f}")
        colour = f"c{i % COLOURS}"
        quarter, median, third = (float(q) for q in np.quantile(sample.values, [0.25, 0.5, 0.75]))
        told = (
            f"{sample.name}: median {show_number(median)}, middle half {show_number(quarter)} to {show_number(third)}, "
            f"{show_number(len(sample.values))} texts"
        )
        parts += [
            f'<path class="ridge {colour}" d="{"".join(outline)}V{floor:.1f}z"><title>{escape(told)}</title></path>',
            f'<line class="quartiles {colour}" x1="{frame.at_x(quarter):.1f}" x2="{frame.at_x(third):.1f}" '
            f'y1="{floor + 3:.1f}" y2="{floor + 3:.1f}"/>',
            f'<line class="median {colour}" x1="{frame.at_x(median):.1f}" x2="{frame.at_x(median):.1f}" '
            f'y1="{floor - ROW + 14:.1f}" y2="{floor + 4:.1f}"/>',
            f'<text class="label" x="{frame.left - 10:g}" y="{floor - 15:.1f}" text-anchor="end">'
            f"{escape(_short(sample.name))}</text>",
            f'<text class="tick" x="{frame.left - 10:g}" y="{floor:.1f}" text-anchor="end">'
            f"{show_number(len(sample.values))} texts</text>",
            f'<text class="tick" x="{frame.end + 6:g}" y="{floor - 4:.1f}">{show_number(median)}</text>',
        ]
    parts.append(f'<text class="axis-name" x="{frame.end + 6:g}" y="15">median</text>')
    return frame.drawing(parts, title)


def counted(distribution: Mapping[str, Sequence[float]], *, name: str, title: str, colour: int = 0) -> Markup | None:
    """A histogram that was counted elsewhere; None where edges and counts do not fit each other.

    Args:
        distribution: ``edges``, rising, and one less ``counts``.
        name: of the abscissa.
        title: for readers that see no picture.
        colour: of the style sheet's.
    """
    edges, counts = list(distribution.get("edges") or ()), list(distribution.get("counts") or ())
    if not counts or len(edges) != len(counts) + 1 or not edges[0] < edges[-1] or max(counts) <= 0:
        return None
    frame = Frame(
        x=(edges[0], edges[-1]),
        y=(0.0, 1.06 * max(counts)),
        x_name=name,
        y_name="rows",
        width=360,
        height=226,
        left=48,
        right=12,
        top=24,
        bottom=40,
    )
    parts = [
        f'<rect class="bar-fill c{colour}" x="{frame.at_x(a) + 0.3:.1f}" '
        f'width="{max(0.4, frame.at_x(b) - frame.at_x(a) - 0.6):.1f}" y="{frame.at_y(n):.1f}" '
        f'height="{frame.floor - frame.at_y(n):.1f}"><title>{show_number(a)} to {show_number(b)}: '
        f"{show_number(n)}</title></rect>"
        for a, b, n in zip(edges, edges[1:], counts, strict=False)
        if n > 0
    ]
    return frame.drawing(parts, title)


def _short(name: str) -> str:
    return name if len(name) <= 20 else f"{name[:8]}…{name[-11:]}"


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(-3, 10)
    return [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]
