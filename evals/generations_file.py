"""``generations.jsonl``: what models answered to the prompts of an evaluation, with what was found of each answer.

    {"version": 1, "dataset": "acme/asked", "split": "test", "step": 300, "model": "runs/dpo", "prompt_id": "5f0c…",
     "prompt": "…", "sample": 0, "text": "…", "finish_reason": "stop", "tokens": 57,
     "scores": {"win_rate/raw": 1.0, "judge": 0.75}}

One line per answer. Several models may have answered the same prompt: the policy, its baseline, another run. An
evaluation that is repeated replaces the lines of the same model, dataset, split and step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evals.lines import read_lines, write_lines

VERSION = 1
"""Of the file format; raised when a reader of the old one would misunderstand the new one."""
NAME = "generations.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One answer.

    Raises:
        ValueError: a score that is not finite.
    """

    dataset: str
    split: str
    step: int
    model: str
    """Who answered, as reports show it."""
    prompt_id: str
    """As ``align.samples.prompt_id`` gives it."""
    prompt: str | Sequence[Mapping[str, Any]]
    """As it stands in the dataset: text, or messages."""
    sample: int
    text: str
    finish_reason: str
    tokens: int
    """Of the answer, end token included; 0 where a server does not tell."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """What was found of this answer, by metric or scorer."""

    def __post_init__(self) -> None:
        for name, value in self.scores.items():
            if not math.isfinite(value):
                raise ValueError(f"{name} of an answer to prompt {self.prompt_id} is {value}: leave the score out")

    @property
    def of(self) -> tuple[str, str, int, str]:
        """The evaluation and the model that it belongs to."""
        return self.dataset, self.split, self.step, self.model


def write_generations(run_dir: Path, generations: Iterable[Generation]) -> None:
    """Adds answers to a run's file; those of the same model, dataset, split and step are replaced.

    Args:
        run_dir: where ``results.json`` lies.
        generations: all answers of each model on each split.
    """
    new = list(generations)
    replaced = {each.of for each in new}
    write_lines(run_dir / NAME, new, VERSION, lambda old: old.of in replaced, read=_generation)


def read_generations(run_dir: Path) -> Iterator[Generation]:
    """The answers of a run, one at a time; none where there is no file.

    Raises:
        ValueError: in one sentence, if a line can't be read.
    """
    return read_lines(run_dir / NAME, VERSION, _generation)


def _generation(values: dict[str, Any]) -> Generation:
    return Generation(**values)
