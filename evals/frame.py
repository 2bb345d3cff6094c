"""Axes of a drawing: where a value lies, grid, numbers, and the names of both axes with their units.

Colours and fonts are the page's: its style sheet gives them by class, in light and in dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from evals.curves import show_number, ticks, well_formed

COLOURS = 6
"""Of the style sheet, ``c0`` to ``c5``; they stay apart under the common kinds of colour blindness."""

WIDE = 620.0
"""Width of a drawing that has a section of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A pair of axes."""

    x: tuple[float, float]
    """Range in view."""
    y: tuple[float, float]
    x_name: str
    """With the unit."""
    y_name: str
    width: float = 560.0
    height: float = 340.0
    left: float = 58.0
    right: float = 18.0
    top: float = 30.0
    bottom: float = 46.0
    log_x: bool = False
    show_x: Callable[[float], str] = show_number
    show_y: Callable[[float], str] = show_number
    x_ticks: Sequence[float] | None = None
    """Instead of round numbers."""
    y_ticks: Sequence[float] | None = None

    def at_x(self, value: float) -> float:
        """Horizontal place of a value, clipped to the view."""
        low, high = self.x
        value = min(max(value, low), high)
        if self.log_x:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.left + (self.width - self.left - self.right) * (value - low) / (high - low)

    def at_y(self, value: float) -> float:
        """Vertical place of a value, clipped to the view."""
        low, high = self.y
        value = min(max(value, low), high)
        return self.top + (self.height - self.top - self.bottom) * (high - value) / (high - low)

    @property
    def floor(self) -> float:
        """Height of the abscissa."""
        return self.height - self.bottom

    @property
    def end(self) -> float:
        """Right end of the abscissa."""
        return self.width - self.right

    def points(self, pairs: Sequence[tuple[float, float]]) -> str:
        """Values as the attribute of a line."""
        return " ".join(f"{self.at_x(x):.1f},{self.at_y(y):.1f}" for x, y in pairs)

    def axes(self) -> list[str]:
        """Grid, numbers and names."""
        parts: list[str] = []
        for value in ticks(*self.y) if self.y_ticks is None else self.y_ticks:
            y = self.at_y(value)
            parts.append(f'<line class="grid" x1="{self.left:g}" x2="{self.end:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
            shown = escape(self.show_y(_zero(value)))
            parts.append(f'<text class="tick" x="{self.left - 7:g}" y="{y + 4:.1f}" text-anchor="end">{shown}</text>')
        parts.append(f'<path class="axis" d="M{self.left:g} {self.floor:g}H{self.end:g}"/>')
        for value in ticks(*self.x) if self.x_ticks is None else self.x_ticks:
            x, shown = self.at_x(value), escape(self.show_x(_zero(value)))
            parts.append(f'<path class="axis" d="M{x:.1f} {self.floor:g}v4"/>')
            parts.append(f'<text class="tick" x="{x:.1f}" y="{self.floor + 17:g}" text-anchor="middle">{shown}</text>')
        middle = (self.left + self.end) / 2
        parts.append(
            f'<text class="axis-name" x="{middle:.1f}" y="{self.height - 8:g}" text-anchor="middle">'
            f"{escape(self.x_name)}</text>"
        )
        if self.y_name:
            parts.append(f'<text class="axis-name" x="6" y="15">{escape(self.y_name)}</text>')
        return parts

    def mark(self, *, x: float | None = None, y: float | None = None) -> str:
        """A hairline at a level, nothing where that lies out of view."""
        if x is not None and self.x[0] < x < self.x[1]:
            at = self.at_x(x)
            return f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{self.top:g}" y2="{self.floor:g}"/>'
        if y is not None and self.y[0] < y < self.y[1]:
            at = self.at_y(y)
            return f'<line class="mark" x1="{self.left:g}" x2="{self.end:g}" y1="{at:.1f}" y2="{at:.1f}"/>'
        return ""

    def drawing(self, parts: Sequence[str], about: str, *, attributes: str = "") -> Markup:
        """The whole of it.

        Args:
            parts: what lies over the axes, as markup.
            about: what is seen, for readers that see no picture.
            attributes: more of them, as markup.
        """
        return svg([*self.axes(), *parts], self.width, self.height, about, attributes=attributes)

    @property
    def box(self) -> str:
        """Attributes by which a script finds the value of a place."""
        return (
            f'data-x0="{self.x[0]!r}" data-x1="{self.x[1]!r}" data-y0="{self.y[0]!r}" data-y1="{self.y[1]!r}" '
            f'data-left="{self.left:g}" data-right="{self.end:g}" data-top="{self.top:g}" data-floor="{self.floor:g}"'
        )


def svg(parts: Sequence[str], width: float, height: float, about: str, *, attributes: str = "") -> Markup:
    """A drawing with its name, in a view of its own size."""
    told = escape(well_formed(about))
    return Markup(
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{told}"{" " if attributes else ""}'
        f"{attributes}><title>{told}</title>{''.join(parts)}</svg>"
    )


def padded(low: float, high: float, share: float = 0.05) -> tuple[float, float]:
    """A range with air on both sides; never empty."""
    air = share * (high - low) or 0.1 * abs(high) or 0.5
    return low - air, high + air


def _zero(value: float) -> float:
    return 0.0 if abs(value) < 1e-12 else value
