"""Held-out rows during training: from per-row numbers to estimates."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from data.preparation import Split
from evals import reward_model
from evals.labelled import measure
from evals.parts import marked, parts_of
from evals.ranking import Pairs, rank
from evals.results import Result, as_metrics
from evals.scores import Scores


class HeldOut:
    """What the objective's rows allow to measure, at every evaluation of a run.

    Of pairs: ranking accuracy of policy and reference, displacement and flow. Of labelled completions: how well the two
    classes were told apart. Of reward models: accuracy and calibration of scores, errors of ratings. Rows of each
    ``Row.group`` are also reported apart, as a split of their own, and where rows come from several datasets, so is
    each of these.

    Args:
        split: the held-out rows; gives each row's prompt, by which intervals are clustered.
        dataset: where they come from.
        name: the split, as results have it.
        keep: told all results after every evaluation, so that a run that is killed has those it made.
    """

    def __init__(
        self, split: Split, dataset: str, name: str, keep: Callable[[Sequence[Result]], None] = lambda results: None
    ) -> None:
        self.split, self.dataset, self.name, self.keep = split, dataset, name, keep
        self.results: list[Result] = []
        self.scores: list[Scores] = []
        """Of every prompt at the latest evaluation, by which runs are compared."""
        self.last_step = -1

    def __call__(self, sums: Mapping[str, np.ndarray], step: int) -> dict[str, float]:
        """Estimates of one evaluation, as flat metrics; kept in ``results`` too.

        Args:
            sums: ``row``, and ``policy_<leg>``, ``ref_<leg>``, ``length_<leg>`` per row, in any order; of reward models
                ``value_<leg>/<output>``, and ``score_<name>`` where rows have ratings.
            step: optimizer steps taken.
        """
        self.last_step = step
        # Sorted by row, so that floating-point sums do not depend on how rows were distributed.
        order = np.argsort(sums["row"], kind="stable")
        by_row = {name: values[order] for name, values in sums.items()}
        found = self._measure(by_row, self.dataset, self.name, step)
        self.scores = self._scores(by_row, step)
        parts, left_out = parts_of(self.split, by_row["row"], self.dataset, self.name)
        if found and left_out:
            found[0] = replace(found[0], extra={**found[0].extra, "groups_left_out": left_out})
        apart: list[Result] = []
        for part in parts:
            own = {key: values[part.members] for key, values in by_row.items()}
            apart += self._measure(own, part.dataset, part.split, step, part=True)
        if _of_reward_model(by_row):
            apart += reward_model.apart(by_row, self._prompts(by_row), dataset=self.dataset, split=self.name, step=step)
        apart = marked(apart, self.dataset, self.name)
        self.results = [result for result in self.results if result.step != step] + found + apart
        self.keep(self.results)
        return as_metrics(found)

    def _scores(self, by_row: Mapping[str, np.ndarray], step: int) -> list[Scores]:
        if not _has_pairs(by_row) or self.split.texts is None:
            return []
        prompts = [self.split.prompt_id(row) for row in by_row["row"].tolist()]
        return [
            Scores(
                metric=metric,
                dataset=self.dataset,
                split=self.name,
                step=step,
                by_prompt={str(prompt): score for prompt, score in found.items()},
            )
            for metric, found in rank(_pairs(by_row, prompts)).by_prompt.items()
        ]

    def _prompts(self, by_row: Mapping[str, np.ndarray]) -> list[int]:
        return self.split.prompts[by_row["row"]].tolist()

    def _measure(
        self, by_row: Mapping[str, np.ndarray], dataset: str, name: str, step: int, *, part: bool = False
    ) -> list[Result]:
        prompts = self._prompts(by_row)
        if _of_reward_model(by_row):
            return reward_model.measure(by_row, prompts, dataset=dataset, split=name, step=step, part=part)
        if _has_pairs(by_row):
            return rank(_pairs(by_row, prompts)).results(dataset=dataset, split=name, step=step)
        labels = self.split.table.labels
        if labels is not None and {"policy_completion", "ref_completion"} <= set(by_row):
            return measure(
                by_row["policy_completion"],
                by_row["ref_completion"],
                np.asarray(labels, dtype=bool)[by_row["row"]],
                prompts,
                dataset=dataset,
                split=name,
                step=step,
            )
        return []  # supervised rows have nothing to rank


def _of_reward_model(by_row: Mapping[str, np.ndarray]) -> bool:
    return any(name.startswith("value_") for name in by_row)


def _has_pairs(by_row: Mapping[str, np.ndarray]) -> bool:
    return {"policy_chosen", "policy_rejected"} <= set(by_row)


def _pairs(by_row: Mapping[str, np.ndarray], prompts: Sequence[Hashable]) -> Pairs:
    return Pairs(
        policy_chosen=by_row["policy_chosen"],
        policy_rejected=by_row["policy_rejected"],
        length_chosen=by_row["length_chosen"],
        length_rejected=by_row["length_rejected"],
        prompts=prompts,
        ref_chosen=by_row.get("ref_chosen"),
        ref_rejected=by_row.get("ref_rejected"),
    )
