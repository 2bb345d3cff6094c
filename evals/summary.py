"""What a run comes down to: the one comparison at the top, and what a reader should be told unasked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evals.curves import show_number, show_share
from evals.metrics import METRICS
from evals.parts import PART_OF, of_part
from evals.ranking import Metric
from evals.redact import public, shown_name
from evals.results import Result
from evals.run_files import RunFiles
from objectives import OBJECTIVES
from objectives.needs import Needs

REWARD_MODEL = "reward_model/"
"""What the names of a reward model's metrics begin with."""
OF_PARTS = (
    *("ranking/accuracy", "ranking/idealised", "ranking/gap"),
    *("ranking/accuracy_per_token", "ranking/idealised_per_token", "ranking/gap_per_token"),
    *("ranking/gain", "displacement/chosen"),
)
"""What tables of parts show where pairs were ranked; of other rows they show everything."""

TIED = ("ranking/idealised", "ranking/gap")
"""Beginnings of metrics of which ``n_dropped`` also counts pairs that raters tie, which could be scored."""

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
    """Some of an evaluation's rows: a dataset, a group, a strength of preference, an attribute."""

    name: str
    cells: Mapping[str, Result]
    """Result by metric."""

    @property
    def n(self) -> int:
        """Pairs or ratings among them."""
        return max(result.n for result in self.cells.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class PartTable:
    """Parts of the rows of one evaluation, a line each."""

    where: str
    """Dataset and split of all the rows; empty where there is one table only."""
    metrics: Sequence[str]
    """What is shown of each; ``results.json`` has everything."""
    parts: Sequence[Part]

    @property
    def assumed(self) -> str:
        """What idealised accuracies take for granted; empty where raters' shares are the data's own."""
        cells = [part.cells[metric] for part in self.parts for metric in self.metrics if metric in part.cells]
        shares = dict.fromkeys(cell.extra["simulated_alpha"] for cell in cells if "simulated_alpha" in cell.extra)
        told = " or ".join(f"{share:g}" for share in shares)
        return f"Shares of raters are not known; {told} is assumed for every pair." if told else ""

    @property
    def shown(self) -> int:
        """Results in the table."""
        return sum(metric in part.cells for part in self.parts for metric in self.metrics)


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


def tables(run: RunFiles) -> list[PartTable]:
    """The latest results on parts of the rows, a table for each evaluation that has any, in the order of results."""
    found: dict[tuple[str, str], list[Result]] = {}
    for result in run.results.results if run.results else ():
        if of_part(result):
            dataset, split = result.extra[PART_OF]
            found.setdefault((dataset, split), []).append(result)
    return [_table(dataset, split, members, len(found) > 1) for (dataset, split), members in found.items()]


def _table(dataset: str, split: str, members: Sequence[Result], several: bool) -> PartTable:
    step = max(result.step for result in members)
    cells: dict[tuple[str, str], dict[str, Result]] = {}
    for result in members:
        if result.step == step:
            cells.setdefault((result.dataset, result.split), {})[result.metric] = result
    measured = list(dict.fromkeys(metric for own in cells.values() for metric in own))
    return PartTable(
        where=f"{shown_name(dataset)}, {public(split)}" if several else "",
        metrics=[metric for metric in OF_PARTS if metric in measured] or measured,
        parts=[
            Part(
                name=public(own.removeprefix(f"{split}, ")) if where == dataset else shown_name(where),
                cells=by_metric,
            )
            for (where, own), by_metric in cells.items()
        ],
    )


def calibration(run: RunFiles) -> Calibration | None:
    """Of a reward model's latest evaluation, over all pairs; None where there is none."""
    whole = [r for r in (run.results.results if run.results else ()) if not of_part(r)]
    latest = {result.metric: result for result in sorted(whole, key=lambda result: result.step)}
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
    scored = [r for r in (run.results.results if run.results else ()) if not r.metric.startswith(TIED)]
    dropped = [r.extra.get("n_dropped", 0) for r in scored]
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
