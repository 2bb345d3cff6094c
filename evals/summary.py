"""What a run comes down to: the one comparison at the top, and what a reader should be told unasked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evals.curves import show_number, show_share
from evals.metrics import METRICS
from evals.ranking import Metric
from evals.redact import public, shown_name
from evals.results import Result
from evals.run_files import RunFiles
from objectives import OBJECTIVES
from objectives.needs import Needs

REWARD_MODEL = "reward_model/"
"""What the names of a reward model's metrics begin with."""

HEADLINES = {
    "ranking/accuracy": ("Ranking accuracy", "gives the chosen response more probability than the rejected one"),
    "reward_model/accuracy": ("Accuracy", "scores the chosen response above the rejected one"),
}
"""Metrics that a run can come down to, with a name and what the model does in that share of pairs."""


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
    """Accuracy on held-out pairs, before and after."""

    metric: str
    """One of ``HEADLINES``."""
    before: Point | None
    after: Point
    gain: Point | None
    """The difference on the same pairs, whose interval is narrower than the two intervals suggest."""
    where: str
    """Dataset and split."""

    @property
    def title(self) -> str:
        """What is measured."""
        return HEADLINES[self.metric][0]

    @property
    def does(self) -> str:
        """What the model does in that share of pairs."""
        return HEADLINES[self.metric][1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some of a reward model's held-out rows: a subset, a dataset, a strength of preference, an attribute."""

    name: str
    cells: Mapping[str, Result]
    """Result by metric."""

    @property
    def n(self) -> int:
        """Pairs or ratings among them."""
        return max(result.n for result in self.cells.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Whether a reward model's differences of scores can be believed."""

    error: Result
    """``reward_model/ece``, over all held-out pairs."""
    temperature: Result | None

    @property
    def bins(self) -> Sequence[Mapping[str, float]]:
        """As ``evals.reward_model.reliability`` made them."""
        return self.error.extra["bins"]


@dataclass(frozen=True, slots=True)
class Note:
    """Something a reader should know."""

    level: str
    """``warning``: look at this before believing the result; ``remark``: good to know."""
    text: str


def headline(run: RunFiles) -> Headline | None:
    """From ``results.json`` if it has an accuracy, else from the evaluation lines of ``metrics.jsonl``, else None."""
    for metric in HEADLINES:
        after = run.result(metric)
        if after is None:
            continue
        # The pairs are the same, so the untrained policy is either an earlier result or the reference of this one.
        assert run.results is not None
        earlier = [
            r
            for r in run.results.results
            if (r.metric, r.dataset, r.split) == (after.metric, after.dataset, after.split) and r.step < after.step
        ]
        first = min(earlier, key=lambda r: r.step, default=None)
        ranked = metric == "ranking/accuracy"
        reference = run.result("ranking/reference", like=after) if ranked else None
        before = _point(first, f"step {first.step}") if first else _point(reference, "reference")
        gain = _point(run.result("ranking/gain", like=after), "gain") if ranked else None
        where = f"{shown_name(after.dataset)}, {public(after.split)}"
        point = _must(_point(after, f"step {after.step}"))
        return Headline(metric=metric, before=before, after=point, gain=gain, where=where)
    for metric in HEADLINES:
        lines = [line for line in run.metrics if math.isfinite(_value(line, f"eval/{metric}"))]
        if lines:
            before = _from_line(lines[0], metric) if len(lines) > 1 else None
            after = _from_line(lines[-1], metric)
            return Headline(metric=metric, before=before, after=after, gain=None, where="held-out pairs")
    return None


def is_reward_model(run: RunFiles) -> bool:
    """Whether the run trained a scalar head, by the objectives of its recipe."""
    return any(name in OBJECTIVES and _needs(OBJECTIVES[name]).values for name in run.objectives)


def whole(run: RunFiles) -> list[Result]:
    """Of a reward model, the results over all held-out rows; the others are in ``parts``."""
    results = [r for r in (run.results.results if run.results else ()) if r.metric.startswith(REWARD_MODEL)]
    return [r for r in results if (r.dataset, r.split) == (results[0].dataset, results[0].split)]


def of_part(result: Result, together: Sequence[Result]) -> bool:
    """Whether a reward model's result is not over all held-out rows.

    Args:
        result: any result.
        together: what ``whole`` gave.
    """
    if not together or not result.metric.startswith(REWARD_MODEL):
        return False
    return (result.dataset, result.split) != (together[0].dataset, together[0].split)


def parts(run: RunFiles) -> list[Part]:
    """Of a reward model, the latest results on parts of the held-out rows, in the order of the results."""
    together = whole(run)
    if not together:
        return []
    assert run.results is not None
    of_all, step = together[0], max(result.step for result in together)
    found: dict[tuple[str, str], dict[str, Result]] = {}
    for result in run.results.results:
        if result.step == step and of_part(result, together):
            found.setdefault((result.dataset, result.split), {})[result.metric] = result
    return [
        Part(
            name=public(split.removeprefix(f"{of_all.split}, ")) if dataset == of_all.dataset else shown_name(dataset),
            cells=cells,
        )
        for (dataset, split), cells in found.items()
    ]


def calibration(run: RunFiles) -> Calibration | None:
    """Of a reward model's latest evaluation, over all pairs; None where there is none."""
    latest = {result.metric: result for result in sorted(whole(run), key=lambda result: result.step)}
    error = latest.get("reward_model/ece")
    if error is None or not error.extra.get("bins"):
        return None
    return Calibration(error=error, temperature=latest.get("reward_model/temperature"))


def notes(run: RunFiles) -> list[Note]:
    """What the numbers say beyond themselves; warnings first."""
    found = [*_check_notes(run), *_number_notes(run), *_data_notes(run.data)]
    return sorted(found, key=lambda note: note.level != "warning")


def unit_of(metric: str) -> str:
    """``share``, ``points``, ``nats`` or, for pure numbers and metrics this package does not know, ``""``."""
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
    for metric, who in (("ranking/ties", "policy"), ("reward_model/ties", "reward model")):
        ties = run.result(metric)
        if ties is not None and ties.value > 0.1:
            found.append(
                Note("remark", f"{show_share(ties.value)} of the pairs are ties for the {who}; each counts one half.")
            )
    found += _temperature_notes(run)
    left_out = [r.extra.get("groups_left_out", 0) for r in (run.results.results if run.results else ())]
    if any(left_out):
        found.append(Note("remark", f"{max(left_out)} smaller groups of held-out rows are not reported apart."))
    dropped = [r.extra.get("n_dropped", 0) for r in (run.results.results if run.results else ())]
    if any(dropped):
        found.append(
            Note(
                "remark",
                f"Up to {max(dropped)} evaluation rows could not be scored (empty response or non-finite number).",
            )
        )
    return found


def _temperature_notes(run: RunFiles) -> list[Note]:
    found = calibration(run)
    if found is None or found.temperature is None:
        return []
    best = found.temperature
    if best.extra.get("boundary"):
        why = "every pair is ranked right" if best.extra["boundary"] == "lowest" else "scores do not tell pairs apart"
        return [Note("remark", f"No temperature fits the held-out pairs, because {why}: confidence can't be judged.")]
    if best.low is None or best.high is None or best.low <= 1 <= best.high:
        return []
    way = "overconfident" if best.low > 1 else "underconfident"
    return [
        Note(
            "remark",
            f"Differences of scores are {way} as log-odds: divided by {show_number(best.value)} they fit the held-out "
            "pairs best.",
        )
    ]


def _needs(cls: Any) -> Needs:
    return (cls.example() if hasattr(cls, "example") else cls()).needs


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


def _from_line(line: Mapping[str, Any], metric: str) -> Point:
    low, high = (_value(line, f"eval/{metric}_{end}") for end in ("low", "high"))
    known = math.isfinite(low) and math.isfinite(high)
    return Point(
        label=f"step {line['step']:g}",
        value=_value(line, f"eval/{metric}"),
        low=low if known else None,
        high=high if known else None,
    )


def _value(line: Mapping[str, Any], key: str) -> float:
    value = line.get(key)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _one(value: float) -> str:
    return f"{value:.1f}".replace("-", "−")
