"""``results.json``: every number a run reports, with its uncertainty and where it came from.

{"version": 1, "run": {"model": …, "commit": …, "seed": …}, "results": [{"metric": …, "value": …, "low": …, …}]}
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from data.files import write_atomically
from objectives.stats import Estimate

VERSION = 1
"""Of the file format; raised when a reader of the old one would misunderstand the new one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One number, on one split of one dataset, at one step.

    Raises:
        ValueError: if a number is NaN or infinite, naming the metric.
    """

    metric: str
    """``ranking/accuracy``, ``displacement/chosen``, …"""
    dataset: str
    split: str
    n: int
    """Items the value is a mean over."""
    clusters: int
    """Prompts among them."""
    value: float
    stderr: float | None
    """None, like ``low`` and ``high``, where a single prompt leaves the spread unknown."""
    low: float | None
    high: float | None
    interval: str
    """How ``low`` and ``high`` were made: ``wilson``, ``wilson-over-prompts``, ``clustered-t``, …; all at 95 %."""
    step: int
    """Optimizer steps taken; 0 is before training."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Anything else that belongs to the number: rows dropped, sampling parameters, a judge and its version."""

    def __post_init__(self) -> None:
        for name in ("value", "stderr", "low", "high", "extra"):
            if not _finite(getattr(self, name)):
                raise ValueError(f"{name} of {self.metric!r} on {self.dataset!r} is not a finite number")

    @classmethod
    def of(
        cls,
        estimate: Estimate,
        *,
        metric: str,
        dataset: str,
        split: str,
        step: int,
        extra: Mapping[str, Any] | None = None,
    ) -> Result:
        """An estimate, filed. A NaN spread, which one prompt alone has, becomes None; a NaN value is an error."""
        spread = {name: _known(getattr(estimate, name)) for name in ("stderr", "low", "high")}
        return cls(
            metric=metric,
            dataset=dataset,
            split=split,
            n=estimate.n,
            clusters=estimate.clusters,
            value=estimate.value,
            interval=estimate.interval,
            step=step,
            extra=dict(extra or {}),
            **spread,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What ``results.json`` holds."""

    run: Mapping[str, Any]
    """What was measured and with what: model, fingerprint, objective, seed, commit, template hash, versions, …"""
    results: Sequence[Result]
    version: int = VERSION

    def write(self, path: Path) -> None:
        """Writes the file; it appears complete or not at all."""
        if not _finite(self.run):
            raise ValueError("the description of the run holds a number that is not finite")
        body = {"version": self.version, "run": dict(self.run), "results": [asdict(result) for result in self.results]}
        write_atomically(path, json.dumps(body, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> Results:
        """Reads what :meth:`write` wrote.

        Raises:
            ValueError: in one sentence, if the file is missing, is not JSON, has another version, or a result in it
                lacks a field, has one too many, or holds a wrong type.
        """
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError both
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(body, dict) or body.get("version") != VERSION:
            found = body.get("version") if isinstance(body, dict) else None
            raise ValueError(f"{path} has version {found!r}, and this code reads version {VERSION}")
        entries = body.get("results")
        if not isinstance(body.get("run"), dict) or not isinstance(entries, list):
            raise ValueError(f"{path} needs a mapping 'run' and a list 'results'")
        return cls(
            run=body["run"], results=[_result(entry, f"result {i} of {path}") for i, entry in enumerate(entries)]
        )


def as_metrics(results: Iterable[Result]) -> dict[str, float]:
    """Flat keys for a line of ``metrics.jsonl``: ``eval/<metric>``, and with ``_low`` and ``_high`` where known."""
    line: dict[str, float] = {}
    for result in results:
        for suffix, value in (("", result.value), ("_low", result.low), ("_high", result.high)):
            if value is not None:
                line[f"eval/{result.metric}{suffix}"] = value
    return line


_TYPES: dict[str, tuple[type, ...]] = {
    "metric": (str,),
    "dataset": (str,),
    "split": (str,),
    "interval": (str,),
    "n": (int,),
    "clusters": (int,),
    "step": (int,),
    "value": (int, float),
    "stderr": (int, float, type(None)),
    "low": (int, float, type(None)),
    "high": (int, float, type(None)),
    "extra": (dict,),
}


def _result(entry: Any, where: str) -> Result:
    known = {f.name for f in fields(Result)}
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is not a mapping")
    missing, unknown = sorted(known - {"extra"} - set(entry)), sorted(set(entry) - known)
    if missing or unknown:
        raise ValueError(f"{where} lacks {missing}" if missing else f"{where} has unknown fields {unknown}")
    for name, value in entry.items():
        if not isinstance(value, _TYPES[name]) or isinstance(value, bool):
            raise ValueError(f"{name} in {where} is {value!r}, not {' or '.join(t.__name__ for t in _TYPES[name])}")
    numbers = {k: float(entry[k]) for k in ("value", "stderr", "low", "high") if entry[k] is not None}
    return Result(**{**entry, **numbers})


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(_finite(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return all(_finite(item) for item in value)
    return True
