"""Drawings of pairs: CHES against displacement, difficulty by right and wrong, and the four-way flow."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from markupsafe import Markup, escape

from evals.curves import show_number, show_share
from evals.frame import WIDE, Frame, padded, svg
from evals.pair_columns import PairColumns
from evals.redact import public, shown_name
from evals.results import Result

MOST_DOTS = 1500
"""Pairs drawn one by one; more are drawn as hexagons shaded by how many lie in each."""
HEXAGON = 7.0
"""Radius in pixels."""
GROUPS = 10
"""Equal parts of the pairs by CHES, whose medians are drawn."""
BARS = 32


def ches_against_displacement(pairs: PairColumns) -> Markup | None:
    """The change of the chosen response over LN-CHES, with medians of tenths of the pairs and their 95 % intervals.

    None where fewer than three pairs have both. The view spans the middle 99 % of either; what lies out of it is drawn
    at the edge.
    """
    change = pairs.chosen_change
    if change is None or not pairs.has("ln_ches"):
        return None
    ches = pairs.numbers["ln_ches"]
    both = np.isfinite(ches) & np.isfinite(change)
    if both.sum() < 3:
        return None
    x, y = ches[both], change[both]
    frame = Frame(
        x=padded(*_middle(x)),
        y=padded(*_middle(np.append(y, 0.0))),
        x_name="LN-CHES under the reference (higher: more alike)",
        y_name="change of log-prob of the chosen response, nats",
        width=WIDE,
        height=380,
    )
    drawn = _dots(frame, x, y) if len(x) <= MOST_DOTS else _hexagons(frame, x, y)
    parts = [frame.mark(y=0.0), *drawn, *_medians(frame, x, y)]
    about = f"{show_number(len(x))} pairs: change of log-prob of the chosen response over LN-CHES, {pairs.split}"
    of = escape(f"{shown_name(pairs.dataset)}, {public(pairs.split)}")  # as the browser of prompts names sets
    return frame.drawing(parts, about, attributes=f'class="pick" data-set="{of}" data-step="{pairs.step}" {frame.box}')


def difficulty_by_rightness(pairs: PairColumns) -> Markup | None:
    """Histogram of c, with the pairs that the policy ranks rightly below and wrongly above; None where c is unknown."""
    c = pairs.difficulty
    if c is None or not np.isfinite(c).any():
        return None
    right = pairs.right
    known = np.isfinite(c) & (np.isfinite(right) if right is not None else True)
    if not known.any():
        return None
    c = c[known]
    share = right[known] if right is not None else np.ones(len(c))
    low, high = _middle(np.append(c, 0.0))
    # Zero is an edge of bars: left of it the reference ranks rightly.
    width = (high - low) / BARS or 1.0
    first = math.floor(low / width)
    edges = width * np.arange(first, max(math.ceil(high / width), first + 1) + 1)
    place = np.clip(np.searchsorted(edges, c, side="right") - 1, 0, len(edges) - 2)
    good = np.bincount(place, weights=share, minlength=len(edges) - 1)
    all_ = np.bincount(place, minlength=len(edges) - 1)
    frame = Frame(
        x=(float(edges[0]), float(edges[-1])),
        y=(0.0, 1.06 * float(all_.max())),
        x_name="difficulty c = log π_ref(rejected) − log π_ref(chosen), nats",
        y_name="pairs",
    )
    parts: list[str] = []
    for i, n in enumerate(all_):
        left, end = frame.at_x(edges[i]) + 0.4, frame.at_x(edges[i + 1]) - 0.4
        for colour, low_, high_, what in (
            (0, 0.0, good[i], "right" if right is not None else "pairs"),
            (1, good[i], float(n), "wrong"),
        ):
            if high_ > low_:
                top, floor = frame.at_y(high_), frame.at_y(low_)
                parts.append(
                    f'<rect class="bar-fill c{colour}" x="{left:.1f}" width="{end - left:.1f}" y="{top:.1f}" '
                    f'height="{floor - top:.1f}"><title>c from {show_number(edges[i])} to {show_number(edges[i + 1])}: '
                    f"{show_number(float(high_ - low_))} {what}</title></rect>"
                )
    parts.append(frame.mark(x=0.0))
    sides = (("reference right", 0.0, -6, "end"), ("reference wrong", 0.0, 6, "start"))
    for name, at, shift, anchor in sides:
        place_ = frame.at_x(at) + shift
        parts.append(f'<text class="tick" x="{place_:.1f}" y="{frame.top - 1:g}" text-anchor="{anchor}">{name}</text>')
    return frame.drawing(parts, f"Difficulty of {show_number(len(c))} pairs, {pairs.split}")


def flow(found: Mapping[str, Result]) -> Markup | None:
    """From right and wrong with the reference (left) to right and wrong with the policy (right); None if incomplete.

    Args:
        found: results of one evaluation by metric.
    """
    names = ("right_to_right", "right_to_wrong", "wrong_to_right", "wrong_to_wrong")
    if any(f"flow/{name}" not in found for name in names):
        return None
    share = {name: found[f"flow/{name}"].value for name in names}
    width, top, tall, gap = 560.0, 30.0, 220.0, 14.0
    left, end, thick = 96.0, width - 96.0, 12.0
    before = {"right": share["right_to_right"] + share["right_to_wrong"]}
    after = {"right": share["right_to_right"] + share["wrong_to_right"]}
    before["wrong"], after["wrong"] = 1 - before["right"], 1 - after["right"]

    def starts(of: Mapping[str, float]) -> dict[str, float]:
        return {"right": top, "wrong": top + tall * of["right"] + gap}

    at_left, at_right = starts(before), starts(after)
    parts: list[str] = []
    for side, of, starting in ((left - thick, before, at_left), (end, after, at_right)):
        anchor, text = ("end", side - 8) if side < width / 2 else ("start", side + thick + 8)
        for colour, word in ((0, "right"), (1, "wrong")):
            y, height = starting[word], tall * of[word]
            parts.append(
                f'<rect class="solid c{colour}" x="{side:g}" width="{thick:g}" y="{y:.1f}" height="{height:.1f}"/>'
            )
            middle = y + height / 2
            parts.append(
                f'<text class="label" x="{text:g}" y="{middle - 2:.1f}" text-anchor="{anchor}">{word}</text>'
                f'<text class="tick" x="{text:g}" y="{middle + 13:.1f}" text-anchor="{anchor}">'
                f"{show_share(of[word])}</text>"
            )
    from_, to = dict(at_left), dict(at_right)
    middle = (left + end) / 2
    labels: list[str] = []
    for name in names:
        source, _, target = name.partition("_to_")
        y0, y1, height = from_[source], to[target], tall * share[name]
        from_[source] += height
        to[target] += height
        result = found[f"flow/{name}"]
        spread = (
            "" if result.low is None or result.high is None else f" [{100 * result.low:.1f}, {100 * result.high:.1f}]"
        )
        told = f"{source} to {target}: {show_share(share[name])}{spread}"
        changed = " changed" if source != target else ""
        parts.append(
            f'<path class="ribbon c{0 if target == "right" else 1}{changed}" d="M{left:g} {y0:.1f}C{middle:g} {y0:.1f} '
            f"{middle:g} {y1:.1f} {end:g} {y1:.1f}v{height:.1f}C{middle:g} {y1 + height:.1f} {middle:g} "
            f'{y0 + height:.1f} {left:g} {y0 + height:.1f}z"><title>{escape(told)}</title></path>'
        )
        if height > 15:
            # Near the end that it goes to, where ribbons have parted again.
            at = 0.2 if source == target else 0.82
            bend = at * at * (3 - 2 * at)
            y = y0 + (y1 - y0) * bend + height / 2 + 4
            labels.append(
                f'<text class="label" x="{left + (end - left) * at:.1f}" y="{y:.1f}" text-anchor="middle">'
                f"{show_share(share[name])}</text>"
            )
    parts += labels
    for x, anchor, name in ((left - thick, "start", "reference"), (end + thick, "end", "policy")):
        parts.append(f'<text class="axis-name" x="{x:g}" y="18" text-anchor="{anchor}">{name}</text>')
    about = "; ".join(f"{name.replace('_', ' ')} {show_share(share[name])}" for name in names)
    return svg(parts, width, top + tall + gap + 16, f"Pairs that the reference and the policy rank: {about}")


def _middle(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [0.005, 0.995])
    return float(low), float(high)


def _dots(frame: Frame, x: np.ndarray, y: np.ndarray) -> list[str]:
    return [
        f'<circle class="pair c0" cx="{frame.at_x(a):.1f}" cy="{frame.at_y(b):.1f}" r="2.4"/>'
        for a, b in zip(x.tolist(), y.tolist(), strict=True)
    ]


def _hexagons(frame: Frame, x: np.ndarray, y: np.ndarray) -> list[str]:
    wide, tall = math.sqrt(3) * HEXAGON, 1.5 * HEXAGON
    counts: dict[tuple[int, int], int] = {}
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        # Those at the edge of the view lie whole within it.
        across = min(max(frame.at_x(a), frame.left + wide / 2), frame.end - wide / 2)
        down = min(max(frame.at_y(b), frame.top + HEXAGON), frame.floor - HEXAGON)
        cell = _cell(across, down, wide, tall)
        counts[cell] = counts.get(cell, 0) + 1
    most = max(counts.values())
    outline = "l".join(
        f"{HEXAGON * dx:.2f} {HEXAGON * dy:.2f}"
        for dx, dy in ((0.866, 0.5), (0, 1), (-0.866, 0.5), (-0.866, -0.5), (0, -1))
    )
    return [
        f'<path class="hexagon c0" opacity="{0.15 + 0.85 * math.log1p(n) / math.log1p(most):.2f}" '
        f'd="M{(column + row % 2 / 2) * wide:.1f} {row * tall - HEXAGON:.1f}l{outline}z">'
        f"<title>{n} pairs</title></path>"
        for (column, row), n in sorted(counts.items())
    ]


def _cell(x: float, y: float, wide: float, tall: float) -> tuple[int, int]:
    """Column and row of the hexagon around a place: the nearest of the centres of the two rows beside it."""
    nearest, least = (0, 0), math.inf
    for row in (math.floor(y / tall), math.floor(y / tall) + 1):
        column = round(x / wide - row % 2 / 2)
        away = (x - (column + row % 2 / 2) * wide) ** 2 + (y - row * tall) ** 2
        if away < least:
            nearest, least = (column, row), away
    return nearest


def _medians(frame: Frame, x: np.ndarray, y: np.ndarray) -> list[str]:
    """With the order statistics that hold the median of 95 of 100 samples."""
    if len(x) < 6 * GROUPS:
        return []
    from scipy.stats import binom  # a third of a second, which a run would begin with

    parts: list[str] = []
    points: list[tuple[float, float]] = []
    for group in np.array_split(np.argsort(x, kind="stable"), GROUPS):
        values = np.sort(y[group])
        below = int(binom.ppf(0.025, len(values), 0.5))
        low, high = values[max(0, below - 1)], values[min(len(values) - 1, len(values) - below)]
        a, b = float(np.median(x[group])), float(np.median(values))
        points.append((a, b))
        at = frame.at_x(a)
        parts.append(
            f'<line class="whisker-line c1" x1="{at:.1f}" x2="{at:.1f}" y1="{frame.at_y(low):.1f}" '
            f'y2="{frame.at_y(high):.1f}"/><circle class="dot c1" cx="{at:.1f}" cy="{frame.at_y(b):.1f}" r="4">'
            f"<title>LN-CHES near {show_number(a)}: median {show_number(b)} nats, 95 % "
            f"[{show_number(float(low))}, {show_number(float(high))}], {len(group)} pairs</title></circle>"
        )
    return [f'<polyline class="line c1" points="{frame.points(points)}"/>', *parts]
