"""What the data doctor found before training, as reports show it: ``doctor.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evals.curves import show_number
from evals.length_plots import counted
from evals.redact import scrub
from evals.report_results import Figure

VERDICTS = ("fault", "warning", "remark", "fine")
"""The worst first."""
MOST_EXAMPLES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One check, in words."""

    check: str
    verdict: str
    text: str
    key: str
    """Of the recipe, that mends it."""
    value: str
    """With its interval, where there is one."""
    rows: str
    examples: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Doctor:
    """The whole of the section."""

    dataset: str
    rows: str
    counts: tuple[tuple[str, int], ...]
    """Findings by verdict."""
    findings: tuple[Finding, ...]
    figures: tuple[Figure, ...]


def doctor(found: Mapping[str, Any]) -> Doctor | None:
    """The findings, faults first, and a histogram for each distribution; None where nothing was found."""
    if not found.get("findings") and not found.get("distributions"):
        return None
    clean = scrub(dict(found))
    findings = [_finding(each) for each in clean.get("findings") or () if isinstance(each, Mapping)]
    findings.sort(key=lambda each: VERDICTS.index(each.verdict) if each.verdict in VERDICTS else len(VERDICTS))
    figures: list[Figure] = []
    for i, (name, distribution) in enumerate((clean.get("distributions") or {}).items()):
        if not isinstance(distribution, Mapping):
            continue
        title = str(name).replace("_", " ")
        drawing = counted(distribution, name=_named(str(name)), title=title, colour=i % 3)
        if drawing is not None:
            figures.append(Figure(title=title, svg=drawing))
    rows = clean.get("rows")
    return Doctor(
        dataset=str(clean.get("dataset") or ""),
        rows=_number(rows) if _is_number(rows) else "",
        counts=tuple((v, n) for v in VERDICTS if (n := sum(each.verdict == v for each in findings))),
        findings=tuple(findings),
        figures=tuple(figures),
    )


def _finding(each: Mapping[str, Any]) -> Finding:
    value, low, high = (each.get(name) for name in ("value", "low", "high"))
    shown = _number(value) if _is_number(value) else "" if value is None else str(value)
    if _is_number(low) and _is_number(high):
        shown += f" [{_number(low)}, {_number(high)}]"
    if _is_number(each.get("n")):
        shown += f" of {_number(each['n'])}"
    rows = each.get("rows")
    examples = each.get("examples") or ()
    listed = [examples] if isinstance(examples, (str, Mapping)) else list(examples)
    return Finding(
        check=str(each.get("check") or ""),
        verdict=str(each.get("verdict") or ""),
        text=str(each.get("text") or ""),
        key=str(each.get("key") or ""),
        value=shown.strip(),
        rows=_number(len(rows)) if isinstance(rows, list) else _number(rows) if _is_number(rows) else "",
        examples=tuple(_example(one) for one in listed[:MOST_EXAMPLES]),
    )


def _example(one: Any) -> str:
    if isinstance(one, Mapping):
        return "; ".join(f"{key}: {value}" for key, value in one.items())
    return str(one)


def _named(name: str) -> str:
    return f"{name.replace('_', ' ')}, tokens" if name.startswith("length") else name.replace("_", " ")


def _number(value: Any) -> str:
    return show_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
