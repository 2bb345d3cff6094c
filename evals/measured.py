"""What an evaluation found: estimates by metric, what was left out, and each prompt's own score for paired tests."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evals.ranking import means_by_prompt
from evals.results import Result
from evals.scores import Scores
from objectives.stats import Estimate

__all__ = ["Measured", "kept_prompts", "means_by_prompt", "own_prompts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Estimates by metric name, over the items that could be used."""

    estimates: Mapping[str, Estimate]
    n_dropped: int = 0
    """Items left out: a verdict or a number that is missing."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Anything else that belongs to every number: counts, coefficients, a warning."""
    by_prompt: Mapping[str, Mapping[Hashable, float]] = field(default_factory=dict)
    """By metric, the mean score of each prompt; metrics that are no means over prompts are absent."""

    def results(self, *, dataset: str, split: str, step: int, extra: Mapping[str, Any] | None = None) -> list[Result]:
        """Ready for ``results.json``.

        Args:
            dataset: where the prompts come from.
            split: what they are called.
            step: optimizer steps taken.
            extra: conditions of the evaluation, e.g. ``{"sampling": {"temperature": 0.7, …}, "judge": …}``, by which
                comparisons tell what may be compared.
        """
        noted = {"n_dropped": self.n_dropped, **self.extra, **(extra or {})}
        return [
            Result.of(estimate, metric=metric, dataset=dataset, split=split, step=step, extra=noted)
            for metric, estimate in self.estimates.items()
        ]

    def scores(self, *, dataset: str, split: str, step: int) -> list[Scores]:
        """Ready for ``scores.jsonl``; prompts should be the ids that ``align.samples.prompt_id`` gives."""
        return [
            Scores(
                metric=metric, dataset=dataset, split=split, step=step, by_prompt={str(k): v for k, v in found.items()}
            )
            for metric, found in self.by_prompt.items()
        ]


def own_prompts(prompts: Sequence[Hashable] | None, items: int) -> Sequence[Hashable]:
    """The prompts as given, or one for each item; an error where their number is not that of the items."""
    if prompts is None:
        return range(items)
    if len(prompts) != items:
        raise ValueError(f"{len(prompts)} prompts were given for {items} items; give the prompt of each item")
    return prompts


def kept_prompts(prompts: Sequence[Hashable], keep: np.ndarray) -> list[Hashable]:
    """Those where ``keep`` holds."""
    return [prompt for prompt, kept in zip(prompts, keep, strict=True) if kept]
