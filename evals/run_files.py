"""Reads a run directory: what training left there, checked just enough that a report can be made of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from evals.redact import redact
from evals.results import Result, Results

SOURCES = ("metrics.jsonl", "results.json", "pairs.jsonl", "generations.jsonl", "doctor.json")
"""Files any of which is enough to report on."""
DOCTOR_VERSION = 1
"""Of ``doctor.json``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """The files of a run directory, parsed; absent ones are empty."""

    path: Path
    metrics: Sequence[Mapping[str, Any]]
    """Lines of ``metrics.jsonl`` in the order of their steps; of a step logged twice, the later value of each key."""
    torn: int = 0
    """Lines that were not JSON, as a killed process leaves its last one."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    recipe_text: str = ""
    results: Results | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    checks: Sequence[Mapping[str, Any]] = ()
    example: str = ""
    doctor: Mapping[str, Any] = field(default_factory=dict)
    """What the data doctor found, as ``doctor.json`` has it."""

    def get(self, key: str, default: Any = None) -> Any:
        """A recipe value by dotted key: ``get("train.learning_rate")``."""
        found: Any = self.recipe
        for part in key.split("."):
            if not isinstance(found, Mapping) or part not in found:
                return default
            found = found[part]
        return found

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric; a logged value that is not finite is NaN here."""
        points = [(line["step"], line[key]) for line in self.metrics if _is_number(line.get(key))]
        return [float(step) for step, _ in points], [float(v) if math.isfinite(v) else math.nan for _, v in points]

    def result(self, metric: str, *, like: Result | None = None) -> Result | None:
        """The latest result of a metric, if asked on the dataset, split and step of another one."""
        found = [r for r in (self.results.results if self.results else ()) if r.metric == metric]
        if like is not None:
            found = [r for r in found if (r.dataset, r.split, r.step) == (like.dataset, like.split, like.step)]
        return max(found, key=lambda r: r.step, default=None)

    @property
    def steps(self) -> int:
        """The last step logged, or evaluated where nothing was logged."""
        evaluated = [result.step for result in self.results.results] if self.results and not self.metrics else []
        return int(max([*(line["step"] for line in self.metrics), *evaluated], default=0))

    @property
    def objectives(self) -> list[str]:
        """Names of the objectives, in the recipe's order."""
        section = self.recipe.get("objective") or ()
        entries = [section] if isinstance(section, (Mapping, str)) else section
        return [str(entry.get("name", "")) if isinstance(entry, Mapping) else str(entry) for entry in entries]

    @property
    def datasets(self) -> list[str]:
        """Names of the training datasets, as the recipe has them: one name, a list, or a list of mappings."""
        section = self.get("data.datasets") or self.get("data.dataset_name") or ()
        entries = [section] if isinstance(section, (Mapping, str)) else section
        return [
            str(entry.get("dataset_name") or entry.get("name") or "") if isinstance(entry, Mapping) else str(entry)
            for entry in entries
        ]

    @property
    def has_adapter(self) -> bool:
        """Whether the recipe trains a LoRA adapter."""
        return bool(self.recipe.get("lora"))


def read_run(run_dir: Path) -> RunFiles:
    """Reads a run directory; of an evaluation alone there is no ``metrics.jsonl``, and any other file may be absent.

    Raises:
        ValueError: in one sentence, if nothing was trained, evaluated or looked at there, ``metrics.jsonl`` is empty,
            or a file that is there cannot be read.
    """
    if not any((run_dir / name).exists() for name in SOURCES):
        raise ValueError(
            f"{run_dir} has no metrics.jsonl and no results.json, so nothing was trained or evaluated there"
        )
    metrics, torn = _metrics(run_dir / "metrics.jsonl") if (run_dir / "metrics.jsonl").exists() else ([], 0)
    recipe_text = _text(run_dir / "recipe.yaml")
    try:
        recipe = yaml.safe_load(recipe_text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{run_dir / 'recipe.yaml'} is not YAML: {' '.join(str(error).split())}") from error
    results = run_dir / "results.json"
    data, checks = _json(run_dir / "data_report.json", {}), _json(run_dir / "checks.json", [])
    doctor = _json(run_dir / "doctor.json", {})
    for name, value, kind in (
        ("recipe.yaml", recipe, dict),
        ("data_report.json", data, dict),
        ("checks.json", checks, list),
        ("doctor.json", doctor, dict),
    ):
        if not isinstance(value, kind):
            raise ValueError(f"{run_dir / name} holds a {type(value).__name__}, not a {kind.__name__}")
    if doctor and doctor.get("version") != DOCTOR_VERSION:
        path, found = run_dir / "doctor.json", doctor.get("version")
        raise ValueError(f"{path} has version {found!r}, and this code reads version {DOCTOR_VERSION}")
    return RunFiles(
        path=run_dir,
        metrics=metrics,
        torn=torn,
        recipe=recipe,
        recipe_text=redact(recipe_text),
        results=Results.read(results) if results.exists() else None,
        data=data,
        checks=[check for check in checks if isinstance(check, dict)],
        example=_text(run_dir / "example.txt"),
        doctor=doctor,
    )


def _metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    by_step: dict[float, dict[str, Any]] = {}
    torn = 0
    for text in _text(path).splitlines():
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or not _is_number(line.get("step")) or not math.isfinite(line["step"]):
            torn += 1
            continue
        # A resumed run logs again what it repeats, and evaluation is logged on its own line of the same step.
        by_step.setdefault(line["step"], {}).update(line)
    if not by_step:
        raise ValueError(f"{path} has no line with a step, so there is nothing to report")
    return [by_step[step] for step in sorted(by_step)], torn


def _json(path: Path, absent: Any) -> Any:
    if not path.exists():
        return absent
    try:
        return json.loads(_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _text(path: Path) -> str:
    # errors="replace": a report with one odd character is better than no report.
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
