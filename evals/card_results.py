"""Results as a card has them: one table for each kind of evaluation, its conditions once above it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evals.metrics import METRICS
from evals.redact import scrub
from evals.results import Result

TITLES = {
    "ranking": "Ranking of given pairs",
    "rewards": "Implicit rewards",
    "displacement": "Displacement of log-probs",
    "flow": "Flow of pairs, reference to policy",
    "ches": "Similarity of the two responses (CHES)",
    "reward_model": "Reward model",
    "labels": "Labelled completions",
    "answers": "Sampled answers",
    "win_rate": "Win rate against a baseline",
    "wildbench": "WildBench",
    "arena": "Arena",
    "judge": "Judges",
    "pass_at_k": "Several answers to a prompt (pass@k)",
    "extraction": "Memorisation: extraction",
    "membership": "Memorisation: membership",
    "memorisation": "Memorisation",
    "retention": "What was kept of other abilities",
    "generations": "What the model writes",
}
"""Of the part of a metric's name before the slash; any other stands for itself."""

CONDITIONS = ("judge", "baseline", "sampling", "template", "model", "engine", "reward_model")
"""Of a result's ``extra``: what makes two numbers of one metric two results."""
LONGEST = 160
"""Characters of a condition that are shown."""
MOST_ITEMS = 8
"""A longer list is no condition but a result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Results of one kind of evaluation."""

    name: str
    title: str
    conditions: Sequence[tuple[str, str]]
    """Name and value, the same for all rows."""
    rows: Sequence[tuple[Result, str]]
    """Results, each with what is said of it alone."""

    @property
    def noted(self) -> bool:
        """Whether anything is said of single rows."""
        return any(note for _, note in self.rows)


def final(results: Sequence[Result]) -> list[Result]:
    """Of each metric on each split under the same conditions, the result at the latest step."""
    latest: dict[tuple[str, ...], Result] = {}
    for result in results:
        conditions = {key: result.extra[key] for key in CONDITIONS if key in result.extra}
        key = (result.metric, result.dataset, result.split, json.dumps(conditions, sort_keys=True, default=str))
        if key not in latest or result.step >= latest[key].step:
            latest[key] = result
    return list(latest.values())


def groups(results: Sequence[Result]) -> list[Group]:
    """Results by what stands before the slash, in the order in which they come; unknown metrics too."""
    by_name: dict[str, list[Result]] = {}
    for result in results:
        by_name.setdefault(result.metric.partition("/")[0], []).append(result)
    return [_group(name, members) for name, members in by_name.items()]


def label(metric: str) -> str:
    """What a metric means; empty for those this package does not know."""
    return METRICS[metric].label if metric in METRICS else ""


def conditions(extra: Mapping[str, Any]) -> dict[str, str]:
    """What of a result's ``extra`` can be told in a line: no lists of results, nothing nested in lists."""
    return {
        key: text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
        for key, value in scrub(extra).items()
        if (text := _told(value)) is not None
    }


def _group(name: str, members: Sequence[Result]) -> Group:
    told = [conditions(result.extra) for result in members]
    shared = {key: text for key, text in told[0].items() if all(each.get(key) == text for each in told)}
    rows = [
        (result, "; ".join(f"{_spoken(key)} {text}" for key, text in own.items() if _noted(key, text, shared)))
        for result, own in zip(members, told, strict=True)
    ]
    return Group(
        name=name,
        title=TITLES.get(name, name),
        conditions=[(_spoken(key), text) for key, text in shared.items()],
        rows=rows,
    )


def _noted(key: str, text: str, shared: Mapping[str, str]) -> bool:
    """Whether a condition is said of a row; that nothing was left out is said of all rows or not at all."""
    return key not in shared and (key, text) != ("n_dropped", "0")


def _spoken(key: str) -> str:
    return "left out" if key == "n_dropped" else key.replace("_", " ")


def _told(value: Any) -> str | None:
    if isinstance(value, Mapping):
        parts = {str(key): _told(item) for key, item in value.items()}
        known = [f"{key} {text}" for key, text in parts.items() if text is not None]
        return ", ".join(known) if known and len(known) <= 2 * MOST_ITEMS else None
    if isinstance(value, (list, tuple)):
        flat = value and len(value) <= MOST_ITEMS and not any(isinstance(item, (Mapping, list)) for item in value)
        return ", ".join(str(item) for item in value) if flat else None
    if isinstance(value, bool):
        return "yes" if value else "no"
    return None if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
