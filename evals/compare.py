"""Which run is better at what, and what can't be said: ``python -m evals compare A B C``.

    results.json of every run ─► what may be compared ─► paired tests (scores.jsonl) ─► corrected p-values ─► sentences

Runs are compared prompt by prompt where both have ``scores.jsonl`` (``evals.scores``), and from means and standard
errors elsewhere, which claims less. Numbers that were measured under different conditions are not compared: another
dataset, chat template, sampling, judge, baseline, or number of prompts. The reason is told, and some can be allowed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtr

from evals.metrics import METRICS
from evals.ranking import Metric
from evals.results import Result, Results
from evals.scores import Scores, read_scores
from evals.significance import benjamini_hochberg, holm, paired, prompts_needed, smallest_difference
from objectives.registry import did_you_mean
from objectives.stats import Z95

CONDITIONS: Mapping[str, tuple[str, ...]] = {
    "template": ("template",),
    "sampling": ("sampling", "samples", "temperature", "top_p", "top_k", "min_p", "max_tokens", "stop", "system"),
    "judge": ("judge", "judge_template", "judge_settings", "orders", "tau", "truncated_policy", "verifier", "scorers",
              "strategy", "right_at", "policy", "kind", "margin", "strict", "betas"),
    "baseline": ("baseline",),
    "controls": ("style_features", "difficulty"),
    "reference": ("reference",),
    "data": ("dataset_hash", "max_length", "truncation"),
}  # fmt: skip
"""What must be alike, and the keys of a result's ``extra`` it is read from; the template's is also one of the run."""
MAY_BE_UNKNOWN = ("reference", "max_length", "truncation")
"""Keys that held-out rows of a run's own evaluations do not carry: absent is not different."""
ALLOWABLE = (*CONDITIONS, "n")
"""Differences that can be allowed by name; ``n`` is the number of prompts of an unpaired comparison."""
CORRECTIONS = {"holm": holm, "bh": benjamini_hochberg}
Key = tuple[str, str, str]
"""Metric, dataset, split."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """One run's numbers at one step of each."""

    name: str
    facts: Mapping[str, Any]
    results: Mapping[Key, Result]
    scores: Mapping[Key, Scores]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Two runs on one metric of one split."""

    metric: str
    dataset: str
    split: str
    first: str
    second: str
    refused: str | None = None
    """Why the two can't be compared; everything below is None then."""
    difference: float | None = None
    """First minus second."""
    low: float | None = None
    high: float | None = None
    """95 % limits of this one difference, not corrected for others; None where the spread is unknown."""
    p_value: float | None = None
    p_corrected: float | None = None
    test: str | None = None
    """``sign-flip``, ``sign-flip-exact``, ``mcnemar``, or ``unpaired``."""
    prompts: int | None = None
    better: str | None = None
    """The run that is better, at the level, after correction (the higher one where a metric has no better way)."""
    needed: int | None = None
    """Prompts with which a difference as large as this one would be found in four of five evaluations."""
    smallest: float | None = None
    """The smallest difference that as many prompts as there were would show in four of five."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Comparison:
    """Several runs, side by side and pair by pair."""

    runs: Sequence[Run]
    keys: Sequence[Key]
    pairs: Sequence[Compared]
    correction: str
    level: float
    left_out: Sequence[str]
    """Metrics that were measured and not compared: they say nothing of which run is better."""


def read_run(path: Path, step: int | None = None) -> Run:
    """Reads a run directory, or a ``results.json``; of every metric the last step, or the one asked for.

    Args:
        path: the directory or the file.
        step: optimizer steps.

    Raises:
        ValueError: in one sentence, if a file can't be read or nothing was measured (at that step).
    """
    folder = path.parent if path.suffix == ".json" else path
    found = Results.read(path if path.suffix == ".json" else path / "results.json")
    results: dict[Key, Result] = {}
    for each in found.results:
        key = each.metric, each.dataset, each.split
        if (step is None or each.step == step) and (key not in results or each.step >= results[key].step):
            results[key] = each
    if not results:
        raise ValueError(f"{path} has no results{'' if step is None else f' at step {step}'}; evaluate the run first")
    by_step = read_scores(folder)
    scores = {key: by_step[*key, each.step] for key, each in results.items() if (*key, each.step) in by_step}
    return Run(name=str(path), facts=found.run, results=results, scores=scores)


def compare(
    runs: Sequence[Run],
    *,
    metrics: Collection[str] = (),
    splits: Collection[str] = (),
    baseline: str | None = None,
    correction: str = "holm",
    level: float = 0.05,
    allow: Collection[str] = (),
) -> Comparison:
    """Compares every pair of runs on everything that two or more of them measured.

    All tests of one call form one family, for which p-values are corrected.

    Args:
        runs: two or more, of different names.
        metrics: which to compare; by default all that have a better way.
        splits: which to compare; by default all but parts of a split (``held out, strength 2``).
        baseline: compares the others with this run only.
        correction: ``holm`` for claims, ``bh`` for sweeps.
        level: of the tests, in (0, 1).
        allow: differences of conditions (``ALLOWABLE``) that become a note instead of a refusal.

    Raises:
        ValueError: fewer than two runs, an unknown name, or nothing that two runs measured.
    """
    names = [run.name for run in runs]
    if len(runs) < 2 or len(set(names)) < len(names):
        raise ValueError(f"comparing takes two runs or more, each once, got {', '.join(names) or 'none'}")
    for what, given, known in (
        ("correction", [correction], CORRECTIONS),
        ("--allow", allow, ALLOWABLE),
        ("run", [] if baseline is None else [baseline], names),
        ("metric", metrics, {key[0] for run in runs for key in run.results}),
        ("split", splits, {key[2] for run in runs for key in run.results}),
    ):
        for name in given:
            if name not in known:
                near = did_you_mean(name, sorted(known))
                raise ValueError(f"unknown {what} {name!r}{near} (known: {', '.join(sorted(known))})")
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    everything = list(dict.fromkeys(key for run in runs for key in run.results))
    keys = [key for key in everything if _wanted(key, everything, metrics, splits)]
    if not keys:
        raise ValueError("the runs measured nothing that tells which is better; name metrics with --metric")
    found = [
        _pair(one, two, key, allow)
        for key in keys
        for one, two in combinations(runs, 2)
        if baseline is None or baseline in (one.name, two.name)
        if key in one.results or key in two.results
    ]
    if all(each.refused == _MISSING for each, _ in found):
        raise ValueError("no two runs measured the same on the same split; evaluate them on the same data")
    left = sorted({key[0] for key in everything} - {key[0] for key in keys})
    return Comparison(
        runs=runs,
        keys=keys,
        pairs=_corrected(found, correction, level),
        correction=correction,
        level=level,
        left_out=left,
    )


_MISSING = "only one of them was evaluated on it"


def better_way(metric: str) -> str:
    """``higher``, ``lower``, or nothing for metrics that have no better way or are not known."""
    return METRICS.get(metric, Metric("", "")).better


def _wanted(key: Key, everything: Collection[Key], metrics: Collection[str], splits: Collection[str]) -> bool:
    metric, dataset, split = key
    whole = split.partition(", ")[0]
    part = whole != split and any(k == (metric, dataset, whole) for k in everything)
    return (metric in metrics if metrics else bool(better_way(metric))) and (split in splits if splits else not part)


def _pair(one: Run, two: Run, key: Key, allow: Collection[str]) -> tuple[Compared, float | None]:
    """The pair, and the spread of differences per prompt where a test was made."""
    metric, dataset, split = key
    blank = Compared(metric=metric, dataset=dataset, split=split, first=one.name, second=two.name)
    if key not in one.results or key not in two.results:
        return replace(blank, refused=_MISSING), None
    a, b = one.results[key], two.results[key]
    notes: list[str] = []
    for condition, here, there in _differing(one, two, a, b):
        said = f"different {condition}: {here} and {there}"
        if condition not in allow:
            return replace(blank, refused=f"{said} (--allow {condition} compares them all the same)"), None
        notes.append(said)
    if key in one.scores and key in two.scores:
        first, second = one.scores[key].by_prompt, two.scores[key].by_prompt
        common = sorted(first.keys() & second.keys())
        if len(common) < 2:
            said = f"they have {len(common)} prompts in common; evaluate both on the same"
            return replace(blank, refused=said), None
        if len(common) < max(len(first), len(second)):
            notes.append(f"on the {len(common)} prompts that both have, of {len(first)} and {len(second)}")
        test = paired([first[p] for p in common], [second[p] for p in common])
        d = test.difference
        done = replace(
            blank,
            difference=d.value,
            low=None if math.isnan(d.low) else d.low,
            high=None if math.isnan(d.high) else d.high,
            p_value=test.p_value,
            test=test.test,
            prompts=len(common),
            notes=tuple(notes),
        )
        return done, test.spread
    if a.clusters != b.clusters:
        said = f"different n: {a.clusters} and {b.clusters} prompts"
        if "n" not in allow:
            return replace(blank, refused=f"{said} (--allow n, or store scores.jsonl and compare common prompts)"), None
        notes.append(said)
    if a.stderr is None or b.stderr is None:
        return replace(blank, refused="the spread of one of them is unknown; evaluate on more prompts"), None
    return _unpaired(blank, a, b, notes)


def _unpaired(blank: Compared, a: Result, b: Result, notes: list[str]) -> tuple[Compared, float | None]:
    """Of two means: as if the prompts had been different ones, which claims too little where they were the same."""
    stderr, n = math.hypot(_stderr(a), _stderr(b)), min(a.clusters, b.clusters)
    difference = a.value - b.value
    if stderr == 0 and difference != 0:
        return replace(blank, refused="neither varies over prompts, so that nothing is known of chance"), None
    freedom = max(1, a.clusters + b.clusters - 2)
    p = 2 * float(stdtr(freedom, -abs(difference) / stderr)) if stderr > 0 else 1.0
    done = replace(
        blank,
        difference=difference,
        low=difference - Z95 * stderr,
        high=difference + Z95 * stderr,
        p_value=p,
        test="unpaired",
        prompts=n,
        notes=(*notes, "not paired, for want of scores.jsonl, which claims less than could be"),
    )
    return done, stderr * math.sqrt(n)


def _stderr(result: Result) -> float:
    """Of shares near 0 or 1 what Wilson's interval says: all right of 20 is no certainty."""
    assert result.stderr is not None
    if result.interval.startswith("wilson") and result.low is not None and result.high is not None:
        return max(result.stderr, (result.high - result.low) / (2 * Z95))
    return result.stderr


def _differing(one: Run, two: Run, a: Result, b: Result) -> Iterator[tuple[str, str, str]]:
    for condition, keys in CONDITIONS.items():
        for key in keys:
            here, there = (_condition(key, run, result) for run, result in ((one, a), (two, b)))
            if here != there and not (key in MAY_BE_UNKNOWN and None in (here, there)):
                yield condition, f"{key} {_short(here)}", _short(there)
                break


def _condition(key: str, run: Run, result: Result) -> Any:
    # Rows held out of the training data are known by the training data's hash; other sets are known by their names.
    of_run = key == "template" or (key == "dataset_hash" and result.split.startswith("held out"))
    return result.extra.get(key, run.facts.get(key) if of_run else None)


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _corrected(found: Sequence[tuple[Compared, float | None]], correction: str, level: float) -> list[Compared]:
    tested = [i for i, (each, _) in enumerate(found) if each.p_value is not None]
    p_values = [each.p_value for each, _ in found if each.p_value is not None]
    corrected = dict(zip(tested, CORRECTIONS[correction](p_values), strict=True))
    # The strictest level a corrected test is held to: what is needed is needed for that.
    strictest = level / max(1, len(tested))
    done: list[Compared] = []
    for i, (each, spread) in enumerate(found):
        if i not in corrected or each.difference is None or each.prompts is None:
            done.append(each)
            continue
        sign = np.sign(each.difference) * (-1 if better_way(each.metric) == "lower" else 1)
        claimed = corrected[i] <= level and sign != 0
        needed = smallest = None
        if spread is not None and spread > 0:
            smallest = smallest_difference(spread, each.prompts, level=strictest)
            needed = prompts_needed(spread, each.difference, level=strictest) if each.difference else None
        winner = (each.first if sign > 0 else each.second) if claimed else None
        done.append(replace(each, p_corrected=corrected[i], better=winner, needed=needed, smallest=smallest))
    return done
