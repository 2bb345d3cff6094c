"""lm-evaluation-harness as a subprocess: what it is asked, and its samples read back document by document.

    {"model": "hf", "model_args": {"pretrained": …, "peft": …}, "tasks": […], "log_samples": true, …}   (--config FILE)

It runs in a process of its own, so that its libraries, its memory and its faults stay there. References:
    github.com/EleutherAI/lm-evaluation-harness, 0.4.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import RunError

PREFERRED = ("acc_norm", "exact_match", "pass@1", "acc", "prompt_level_strict_acc", "em", "f1")
"""Which metric of a task counts where it has several and none is named, the first that it has."""
END = 6
"""Lines of its log that are told where it fails."""


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """One task: a score of every document."""

    task: str
    metric: str
    """As lm-eval names it, its filter after a comma: ``exact_match,strict-match``."""
    by_document: Mapping[str, float]
    """By document's hash, and number among those of the same hash."""
    aggregated: float | None
    """What lm-eval says of the task."""
    version: Any
    num_fewshot: int | None
    task_hash: str | None


@dataclass(frozen=True, kw_only=True)
class Harness:
    """One run of it."""

    tasks: Mapping[str, TaskScores]
    version: str
    chat_template: str | None
    """Hash of the chat template, where it was applied."""


def installed() -> str:
    """Its version.

    Raises:
        RunError: it is not installed, or not of the release that is known here.
    """
    try:
        found = importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise RunError("lm-eval is not installed; pip install 'align-preferences[lm_eval]'") from None
    if not found.startswith("0.4."):
        raise RunError(f"lm-eval {found} is not supported; install a release of 0.4")
    return found


def evaluate(settings: Mapping[str, Any], folder: Path, metrics: Mapping[str, str], timeout: float) -> Harness:
    """Runs it, and reads what it wrote.

    Args:
        settings: the keys of its configuration file.
        folder: for its files; made where it is missing.
        metrics: by task, which of its metrics counts; others by ``PREFERRED``.
        timeout: seconds after which it is stopped.
    Raises:
        RunError: it failed, with the end of its log; or it left no scores of single documents.
    """
    version = installed()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("**/*.json*"):
        old.unlink()
    config, log = folder / "config.yaml", folder / "log.txt"
    config.write_text(json.dumps({**settings, "output_path": str(folder), "log_samples": True}, indent=1))
    program = "evals.lm_eval_process" if settings.get("model") == "vllm" else "lm_eval"
    command = [sys.executable, "-m", program, "run", "--config", str(config)]
    try:
        with log.open("w") as file:
            done = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=_environment(), timeout=timeout, check=False
            )
    except subprocess.TimeoutExpired:
        raise RunError(f"lm-eval did not end within {timeout:g} s (its log is {log}); raise timeout") from None
    if done.returncode:
        raise RunError(f"lm-eval failed: {_reason(log.read_text(errors='replace'), settings)} (its log is {log})")
    return read_results(folder, metrics, version)


def read_results(folder: Path, metrics: Mapping[str, str], version: str) -> Harness:
    """What a run left.

    Args:
        folder: where it wrote.
        metrics: by task, which of its metrics counts.
        version: of lm-eval.
    Raises:
        RunError: no results, an unknown metric, or one that single documents have no score of.
    """
    paths = sorted(folder.glob("**/results_*.json"))
    if not paths:
        raise RunError(f"lm-eval left no results in {folder}; see {folder / 'log.txt'}")
    body = json.loads(paths[-1].read_text())
    stamp = paths[-1].stem.removeprefix("results_")
    tasks: dict[str, TaskScores] = {}
    for name in body["n-samples"]:  # tasks; groups of them have none
        path = next(iter(folder.glob(f"**/samples_{name}_{stamp}.jsonl")), None)
        if path is None:
            raise RunError(f"lm-eval left no samples of {name} in {folder}; see {folder / 'log.txt'}")
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
        tasks[name] = _task(name, body, lines, metrics.get(name))
    return Harness(tasks=tasks, version=version, chat_template=body.get("chat_template_sha"))


def _task(name: str, body: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], asked: str | None) -> TaskScores:
    said = {key: value for key, value in body["results"][name].items() if "," in key and "_stderr" not in key}
    metric = _metric(name, list(said), asked)
    base, _, filtered = metric.partition(",")
    own = [line for line in lines if line.get("filter", "none") == filtered]
    by_document: dict[str, float] = {}
    repeated: dict[str, int] = {}
    for line in own:
        value = line.get(base)
        if isinstance(value, bool | int | float) and math.isfinite(value):
            key = str(line["doc_hash"])
            repeated[key] = repeated.get(key, 0) + 1
            by_document[key if repeated[key] == 1 else f"{key}-{repeated[key]}"] = float(value)
    if not by_document:
        raise RunError(f"task {name}: single documents have no score {base!r}; name another of its metrics in metrics")
    outside = [value for value in by_document.values() if not 0 <= value <= 1]
    if outside:
        raise RunError(
            f"task {name}: {base} of a document is {outside[0]:g}, and shares lie in [0, 1]; name another metric in "
            f"metrics (it has {', '.join(said)})"
        )
    if body.get("higher_is_better", {}).get(name, {}).get(base) is False:
        raise RunError(f"task {name}: {base} is better where it is lower; name one of which more is better in metrics")
    aggregated = said[metric]
    return TaskScores(
        task=name,
        metric=metric,
        by_document=by_document,
        aggregated=float(aggregated) if isinstance(aggregated, int | float) else None,
        version=body.get("versions", {}).get(name),
        num_fewshot=body.get("n-shot", {}).get(name),
        task_hash=body.get("task_hashes", {}).get(name),
    )


def _metric(task: str, there: Sequence[str], asked: str | None) -> str:
    if asked is not None:
        found = [each for each in there if asked in (each, each.partition(",")[0])]
        if not found:
            raise RunError(f"task {task} has no metric {asked!r}; it has {', '.join(there)}")
        return found[0]
    for name in PREFERRED:
        for each in there:
            if each.partition(",")[0] == name:
                return each
    raise RunError(f"task {task} has none of the usual metrics; name one in metrics: {{{task}: …}}: {', '.join(there)}")


def _environment() -> dict[str, str]:
    """Ours, with our own path for modules, and without the network where we are without it."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    if environment.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        environment.setdefault("HF_DATASETS_OFFLINE", "1")
    return environment


def _reason(log: str, settings: Mapping[str, Any]) -> str:
    """One sentence: what is known of the common faults, or the end of the log."""
    missing = re.findall(r"Error: Tasks not found: (.*)", log)  # not the line of code that a traceback shows
    if missing:
        return (
            f"it knows no task {missing[-1].strip()}; see python -m lm_eval ls tasks, or name the folder of your own "
            "tasks in include_path"
        )
    marks = ("OfflineModeIsEnabled", "ConnectionError", "LocalEntryNotFoundError", "Couldn't reach", "Couldn't find")
    if any(mark in log for mark in marks):
        dataset = re.search(r"(?:Couldn't (?:reach|find)[^']*|for )'([^']+)'", log)
        what = f"the data {dataset[1]!r}" if dataset else f"the data of {', '.join(settings['tasks'])}"
        return (
            f"{what} is not in the cache, and the Hub can't be reached; run the task once with a network, or leave it "
            "out"
        )
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return "its log ends with: " + " | ".join(lines[-END:])[-600:]
