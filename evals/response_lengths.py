"""How long responses are, by who wrote them: the data's chosen and rejected ones, and every model's answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evals.generations_file import read_generations
from evals.length_plots import Sample
from evals.pair_rows import read_pairs
from evals.redact import shown_name

MOST_SAMPLES = 12
"""Rows of a drawing; of more models the rest is left to the table of results."""


def response_lengths(runs: Sequence[tuple[str, Path]]) -> dict[str, list[Sample]]:
    """Samples by their unit, tokens or characters; of models the answers of their last step on each split.

    A model whose server does not count tokens is measured in characters.

    Args:
        runs: name as it is shown, or nothing where there is one, and folder.
    """
    pairs: dict[str, dict[str, list[float]]] = {"chosen": {}, "rejected": {}}
    answers: dict[tuple[str, str], dict[str, tuple[int, list[tuple[int, int]]]]] = {}
    for run, folder in runs:
        for row in read_pairs(folder):
            for leg, by_row in pairs.items():
                length = row.numbers.get(f"length_{leg}")
                if length is not None:  # a pair that is evaluated again, or by another run, is one pair
                    by_row[f"{row.dataset}\n{row.split}\n{row.row}"] = [length]
        for each in read_generations(folder):
            splits = answers.setdefault((run, shown_name(each.model)), {})
            step, found = splits.setdefault(f"{each.dataset}\n{each.split}", (each.step, []))
            if each.step > step:
                step, found = each.step, []
                splits[f"{each.dataset}\n{each.split}"] = step, found
            if each.step == step:
                found.append((each.tokens, len(each.text)))
    samples: dict[str, list[Sample]] = {"tokens": [], "characters": []}
    for leg, by_row in pairs.items():
        if by_row:
            values = np.array([value for values in by_row.values() for value in values])
            samples["tokens"].append(Sample(name=leg, values=values))
    counts_of: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for (run, model), splits in answers.items():
        counts = [count for _, found in splits.values() for count in found]
        # The answers of a baseline that several runs were judged against are one sample.
        if counts not in [known for (_, other), known in counts_of.items() if other == model]:
            counts_of[run, model] = counts
    models = [model for _, model in counts_of]
    for (run, model), counts in counts_of.items():
        counted = all(tokens > 0 for tokens, _ in counts)
        values = np.array([float(count[0 if counted else 1]) for count in counts])
        name = f"{model} ({run})" if models.count(model) > 1 else model
        samples["tokens" if counted else "characters"].append(Sample(name=name, values=values))
    return {unit: found[:MOST_SAMPLES] for unit, found in samples.items() if found}
