"""Held-out rows during training: from per-row sums to estimates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from data.preparation import Split
from evals.labelled import measure
from evals.ranking import Pairs, rank
from evals.results import Result, as_metrics


class HeldOut:
    """Ranking accuracy of policy and reference, displacement and flow, at every evaluation of a run.

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
        self.last_step = -1

    def __call__(self, sums: Mapping[str, np.ndarray], step: int) -> dict[str, float]:
        """Estimates of one evaluation, as flat metrics; kept in ``results`` too.

        Args:
            sums: ``row``, and ``policy_<leg>``, ``ref_<leg>``, ``length_<leg>`` per row, in any order.
            step: optimizer steps taken.
        """
        self.last_step = step
        # Sorted by row, so that floating-point sums do not depend on how rows were distributed.
        order = np.argsort(sums["row"], kind="stable")
        by_row = {name: values[order] for name, values in sums.items()}
        found = self._measure(by_row, self.name, step)
        groups = np.array([self.split.groups[row] for row in by_row["row"]]) if self.split.groups else np.array([])
        names = [str(group) for group in dict.fromkeys(groups.tolist())]
        apart: list[Result] = []
        if len(names) > 1:
            for name in names:
                own = {key: values[groups == name] for key, values in by_row.items()}
                apart += self._measure(own, f"{self.name}, {name or 'other'}", step)
        self.results = [result for result in self.results if result.step != step] + found + apart
        self.keep(self.results)
        return as_metrics(found)

    def _measure(self, by_row: Mapping[str, np.ndarray], name: str, step: int) -> list[Result]:
        prompts = self.split.prompts[by_row["row"]].tolist()
        if {"policy_chosen", "policy_rejected"} <= set(by_row):
            pairs = Pairs(
                policy_chosen=by_row["policy_chosen"],
                policy_rejected=by_row["policy_rejected"],
                length_chosen=by_row["length_chosen"],
                length_rejected=by_row["length_rejected"],
                prompts=prompts,
                ref_chosen=by_row.get("ref_chosen"),
                ref_rejected=by_row.get("ref_rejected"),
            )
            return rank(pairs).results(dataset=self.dataset, split=name, step=step)
        labels = self.split.table.labels
        if labels is not None and {"policy_completion", "ref_completion"} <= set(by_row):
            return measure(
                by_row["policy_completion"],
                by_row["ref_completion"],
                np.asarray(labels, dtype=bool)[by_row["row"]],
                prompts,
                dataset=self.dataset,
                split=name,
                step=step,
            )
        return []  # supervised rows have nothing to rank
