"""``scores.jsonl``: the score of every prompt, beside ``results.json``, so that runs can be compared prompt by prompt.

    {"version": 1, "metric": "win_rate/raw", "dataset": "acme/asked", "split": "test", "step": 300,
     "by_prompt": {"5f0c…": 1.0, "77ab…": 0.5}}

One line per metric, dataset, split and step; a prompt with several answers has their mean. Prompts are named by
``align.samples.prompt_id``, the same in every run. The file is written anew as a whole: it appears complete or not at
all, and an evaluation that is repeated replaces its lines. ``python -m evals compare`` reads it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.lines import read_lines, write_lines

VERSION = 1
"""Of the file format; raised when a reader of the old one would misunderstand the new one."""
NAME = "scores.jsonl"
Key = tuple[str, str, str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """One metric on one split of one dataset, at one step.

    Raises:
        ValueError: no prompts, or a score that is not finite.
    """

    metric: str
    dataset: str
    split: str
    step: int
    by_prompt: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.by_prompt:
            raise ValueError(f"{self.metric!r} on {self.dataset!r} has no prompts; leave it out")
        for prompt, score in self.by_prompt.items():
            if not math.isfinite(score):
                raise ValueError(
                    f"{self.metric!r} on {self.dataset!r} is {score} of prompt {prompt!r}: drop and count it"
                )

    @property
    def key(self) -> Key:
        """What it is a score of."""
        return self.metric, self.dataset, self.split, self.step


def write_scores(run_dir: Path, scores: Iterable[Scores]) -> None:
    """Adds scores to a run's file; those of the same metric, dataset, split and step are replaced.

    Args:
        run_dir: where ``results.json`` lies.
        scores: as ``Measured.scores`` gives them.

    Raises:
        ValueError: the file that is there can't be read.
    """
    new = {each.key: each for each in scores}
    write_lines(run_dir / NAME, new.values(), VERSION, lambda each: each.key in new, _read)


def read_scores(run_dir: Path) -> dict[Key, Scores]:
    """The scores of a run by metric, dataset, split and step; none where there is no file.

    Args:
        run_dir: where ``results.json`` lies.

    Raises:
        ValueError: in one sentence, if a line is not JSON, has another version, or lacks something.
    """
    return {each.key: each for each in read_lines(run_dir / NAME, VERSION, _read)}


def _read(body: dict[str, Any]) -> Scores:
    return Scores(
        metric=str(body["metric"]),
        dataset=str(body["dataset"]),
        split=str(body["split"]),
        step=int(body["step"]),
        by_prompt={str(prompt): float(score) for prompt, score in body["by_prompt"].items()},
    )
