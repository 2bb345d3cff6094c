"""Answers in the embedded world: is what the policy says right, and better than what it said at the start?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from align.sampling import Sampling, sample
from data.worlds import Problem, answer_of, gold_score
from evals.ranking import Metric, mean_of
from evals.results import Result
from objectives.relabel import RewardAugmented
from objectives.stats import beats, mean_with_interval

METRICS: Mapping[str, Metric] = {
    "answers/accuracy": Metric("Sampled answers that are right", "share", "higher"),
    "answers/win_rate": Metric("Sampled answers with a higher gold score than the start's", "share", "higher"),
    "answers/score": Metric("Gold score of sampled answers", "", "higher"),
}
"""Every metric of this module."""
BATCH = 512
"""Sequences drawn together."""


class Answers:
    """Samples answers to held-out problems and measures them; called before and after training.

    The win rate compares every sample with every sample of the same problem at the start; a tie counts one half. At the
    start itself it compares two independent draws.

    Args:
        problems: by split; every split is reported apart.
        how: number of samples, temperature, length and seed.
        goal: for a policy trained on reward-augmented rows.
    """

    def __init__(
        self, problems: Mapping[str, Sequence[Problem]], how: Sampling, goal: RewardAugmented | None = None
    ) -> None:
        self.problems, self.how, self.goal = problems, how, goal
        self.start: dict[str, list[list[float]]] = {}

    def __call__(self, model: Any, tokenizer: Any, step: int) -> list[Result]:
        """Estimates at this step, with 95 % intervals clustered by problem."""
        results: list[Result] = []
        for split, asked in self.problems.items():
            right, scores = self._draw(model, tokenizer, asked, self.how.seed)
            if split not in self.start:
                self.start[split] = scores
                _, scores_again = self._draw(model, tokenizer, asked, self.how.seed + 1)
                compared = scores_again
            else:
                compared = scores
            results += self._results(asked, right, scores, compared, split, step)
        return results

    def _draw(
        self, model: Any, tokenizer: Any, asked: Sequence[Problem], seed: int
    ) -> tuple[list[list[float]], list[list[float]]]:
        how = replace(self.how, seed=seed)
        prompts = [({"role": "user", "content": problem.question},) for problem in asked]
        texts = sample(model, tokenizer, prompts, how, goal=self.goal, batch=BATCH)
        right = [[float(answer_of(t) == p.answer) for t in drawn] for p, drawn in zip(asked, texts, strict=True)]
        scores = [[gold_score(p, t) for t in drawn] for p, drawn in zip(asked, texts, strict=True)]
        return right, scores

    def _results(
        self,
        asked: Sequence[Problem],
        right: list[list[float]],
        scores: list[list[float]],
        compared: list[list[float]],
        split: str,
        step: int,
    ) -> list[Result]:
        clusters = [number for number, drawn in enumerate(right) for _ in drawn]
        wins = [
            float(beats(np.array(now)[:, None], np.array(then)[None, :]).mean())
            for now, then in zip(compared, self.start[split], strict=True)
        ]
        estimates = {
            "answers/accuracy": mean_with_interval([value for drawn in right for value in drawn], clusters),
            "answers/win_rate": mean_of(np.array(wins), list(range(len(wins)))),
            "answers/score": mean_of(np.array([value for drawn in scores for value in drawn]), clusters),
        }
        extra = {
            "samples": self.how.n,
            "temperature": self.how.temperature,
            "max_tokens": self.how.max_tokens,
            "seed": self.how.seed,
        }
        return [
            Result.of(estimate, metric=metric, dataset="world", split=split.replace("_", " "), step=step, extra=extra)
            for metric, estimate in estimates.items()
        ]
