"""Curves of a run as PNG files beside its card, ``card/<name>.png``.

PNG, since the Hub shows these wherever a card is shown; on a paper of their own, so that they can be read in dark mode
too, and twice as large as they are shown, so that they stay sharp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evals.curves import Series, show_number, show_share
from evals.run_files import RunFiles
from evals.summary import is_reward_model

FOLDER = "card"
PAPER, INK, SOFT, GRID = "#fbfaf7", "#1d1f23", "#62676f", "#e3e1da"
COLOURS = ("#1f5f99", "#b4532a", "#3b7d4f", "#7d7a72")
AXES = (0.085, 0.15, 0.655, 0.74)
"""Left, bottom, width and height in shares of the picture: legends, whose words are ours, have the rest. Margins that
are measured would draw everything twice."""
SMOOTH_FROM = 60
"""From this many points on, points as logged are faint and a moving mean is drawn over them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """One picture, before it is drawn."""

    name: str
    """Of the file, without ``.png``."""
    title: str
    caption: str
    series: Sequence[Series]
    share: bool = False
    """Values are shares, shown as percentages."""
    mark: float | None = None
    """A level with a hairline: zero, chance."""
    band: tuple[float, float, str] | None = None
    """From, to and what it is: a range that belongs to no step."""
    alarms: Sequence[float] = ()
    """Steps with a mark at the bottom."""

    @property
    def spoken(self) -> str:
        """What the picture shows, for those who do not see it."""
        show = show_share if self.share else show_number
        ends = "; ".join(f"{s.label} ends at {show(s.last)}" for s in self.series)
        return f"{self.title} over steps: {ends}"


def draw(run: RunFiles) -> list[Plot]:
    """Draws what the metrics allow into ``card/``, in place of what an earlier card left there.

    Returns:
        The pictures, in the order in which a card shows them.
    """
    folder = run.path / FOLDER
    for stale in folder.glob("*.png") if folder.is_dir() else ():
        stale.unlink()
    found = plots(run)
    for plot in found:
        folder.mkdir(exist_ok=True)
        _draw(plot, folder / f"{plot.name}.png")
    return found


def plots(run: RunFiles) -> list[Plot]:
    """The pictures there is something to show in."""
    of_scores = is_reward_model(run)
    accuracy = "reward_model/accuracy" if of_scores else "ranking/accuracy"
    alarms = run.series("alarm/displacement")[0]
    legs = (("chosen", 0), ("rejected", 1), ("desirable", 0), ("undesirable", 1))
    displaced = [_series(run, f"eval/displacement/{leg}", leg, colour) for leg, colour in legs]
    candidates = [
        Plot(
            name="loss",
            title="Loss",
            caption="As the objective defines it, over whole optimizer steps.",
            series=_kept([_series(run, "loss", "training", 0), _series(run, "eval/loss", "held out", 1)]),
        ),
        Plot(
            name="ranking",
            title="Held-out accuracy" if of_scores else "Held-out ranking accuracy",
            caption="How often the chosen response has the higher score."
            if of_scores
            else "How often the policy itself gives the chosen response more probability; bars are 95 % intervals.",
            series=_kept(
                [
                    _series(run, f"eval/{accuracy}", "reward model" if of_scores else "policy", 0),
                    _series(run, "eval/ranking/reference", "reference", 3, dashed=True, band=False),
                ]
            ),
            share=True,
            mark=0.5,
            band=_idealised(run),
        ),
        Plot(
            name="displacement",
            title="Change of log-prob since the reference, held-out responses, nats",
            caption="Both falling is likelihood displacement; bars are 95 % intervals."
            + (" Triangles mark the steps at which the run raised the alarm." if alarms else ""),
            series=_kept(displaced),
            mark=0.0,
            alarms=alarms,
        ),
        Plot(
            name="rewards",
            title="Difference of scores in training" if of_scores else "Implicit rewards in training",
            caption="Chosen, rejected, and their difference, the margin.",
            series=_kept(
                [
                    _series(run, "rewards/margins", "margin", 2),
                    _series(run, "rewards/chosen", "chosen", 0),
                    _series(run, "rewards/rejected", "rejected", 1),
                ]
            ),
            mark=0.0,
        ),
    ]
    return [plot for plot in candidates if any(len(s.steps) > 1 for s in plot.series)]


def _kept(series: Sequence[Series | None]) -> list[Series]:
    return [s for s in series if s is not None and any(map(math.isfinite, s.values))]


def _series(
    run: RunFiles, key: str, label: str, colour: int, *, dashed: bool = False, band: bool = True
) -> Series | None:
    steps, values = run.series(key)
    low, high = run.series(f"{key}_low"), run.series(f"{key}_high")
    known = band and bool(steps) and low[0] == steps == high[0]  # a step without an interval would shift the others
    bounds = {"low": low[1], "high": high[1]} if known else {}
    return Series(label=label, steps=steps, values=values, colour=colour, dashed=dashed, **bounds) if steps else None


def _idealised(run: RunFiles) -> tuple[float, float, str] | None:
    low, high = run.result("ranking/idealised_min"), run.result("ranking/idealised_max")
    return None if low is None or high is None else (low.value, high.value, "optimum, over β")


def _draw(plot: Plot, path: Path) -> None:
    # Imported here: only who writes a card waits for it.
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(9.0, 3.5), dpi=200, facecolor=PAPER)
    axes = figure.add_axes(AXES, facecolor=PAPER)
    if plot.mark is not None:
        axes.axhline(plot.mark, color=SOFT, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
    if plot.band is not None:
        axes.axhspan(plot.band[0], plot.band[1], color=COLOURS[2], alpha=0.14, linewidth=0, label=plot.band[2])
    for series in plot.series:
        _line(axes, series)
    if plot.alarms:
        low = axes.get_ylim()[0]
        bottom = [low] * len(plot.alarms)
        axes.plot(plot.alarms, bottom, "^", color="#9a3412", markersize=7, label="alarm", clip_on=False, zorder=4)
        axes.set_ylim(bottom=low)
    axes.set_title(plot.title, loc="left", color=INK, fontsize=11, pad=10)
    axes.set_xlabel("step", color=SOFT, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    if plot.share:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=SOFT, labelsize=9, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(
            *_named_ends(axes, plot), loc="upper left", bbox_to_anchor=(1.0, 1.02), frameon=False, fontsize=9,
            labelcolor=INK, handlelength=1.6,
        )  # fmt: skip
    figure.savefig(path, facecolor=PAPER)


def _named_ends(axes: Any, plot: Plot) -> tuple[list[Any], list[str]]:
    """Legend entries, a line's with the value it ends at."""
    show = show_share if plot.share else show_number
    ends = {s.label: show(s.last) for s in plot.series}
    handles, labels = axes.get_legend_handles_labels()
    return handles, [f"{label}  {ends[label]}" if label in ends else label for label in labels]


def _line(axes: Any, series: Series) -> None:
    colour = COLOURS[series.colour]
    steps, values = np.asarray(series.steps), np.asarray(series.values)
    style: dict[str, Any] = {"color": colour, "label": series.label, "linewidth": 1.9, "zorder": 3}
    style["linestyle"] = (0, (4, 2)) if series.dashed else "-"
    if len(steps) >= SMOOTH_FROM:
        axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.28, zorder=2)
        axes.plot(steps, _moving_mean(values), **style)
    else:
        axes.plot(steps, values, **style, **({} if series.dashed else {"marker": "o", "markersize": 3.4}))
    if series.low is not None and series.high is not None:
        low, high = np.asarray(series.low), np.asarray(series.high)
        axes.vlines(steps, low, high, color=colour, linewidth=1.1, alpha=0.65, zorder=2)


def _moving_mean(values: np.ndarray) -> np.ndarray:
    """Over about a twenty-fifth of the run; what is not finite stays so and does not spread."""
    reach = max(2, len(values) // 50)
    finite = np.isfinite(values)
    window = np.ones(2 * reach + 1)
    total = np.convolve(np.where(finite, values, 0.0), window)[reach:-reach]
    count = np.convolve(finite.astype(float), window)[reach:-reach]
    return np.where(finite, total / np.maximum(count, 1.0), np.nan)
