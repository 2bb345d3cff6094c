"""Rows under the policy and its reference, one model after the other, in one pass each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from align import model as models
from align.scoring import OfLogps, OfStates, RowScorer, telling
from align.sections import ModelSection
from data.store import TokenTable
from evals import loading
from evals.run_settings import Job


def under_models(
    job: Job,
    config: Any,
    table: TokenTable,
    say: Callable[[str], None],
    *,
    of_states: OfStates | None = None,
    of_logps: OfLogps | None = None,
    what: str = "pairs",
) -> dict[str, np.ndarray]:
    """Numbers of every row: ``policy/sum/<leg>`` and, where there is a reference, ``reference/sum/<leg>``.

    Args:
        job: says which models.
        config: of the policy.
        table: the rows.
        say: told what is done.
        of_states: what is wanted of hidden states, of the reference where there is one; its names stay as they are.
        of_logps: what is wanted of single tokens' log-probs; its names get ``policy/`` or ``reference/`` in front.
        what: the rows are called when progress is told.
    Raises:
        RunError: a model can't score a row.
    """
    base, compared = job.base, job.compared_with
    own_states = of_states if compared is None else None
    numbers: dict[str, np.ndarray] = {}

    def add(who: str, section: ModelSection, model: Any, states: OfStates | None) -> None:
        scorer = RowScorer(section, model, table, models.compute_dtype(section), job.out.token_budget)
        say(f"{'✓' if scorer.check.passed else '–'} {scorer.check.check}: {scorer.check.detail}")
        of_models: set[str] = set()

        def noted(leg: str, logps: Tensor, mask: Tensor) -> Mapping[str, Tensor]:
            assert of_logps is not None
            found = of_logps(leg, logps, mask)
            of_models.update(found)
            return found

        found = scorer(states, telling(say, who, what), None if of_logps is None else noted)
        for key, values in found.items():
            head = key.split("/")[0]
            if head in ("sum", "value") or key in of_models:
                numbers[f"{who}/{key}"] = values
            elif head != "length":
                numbers[key] = values  # of hidden states

    with loading.loaded(base, job.adapter, config) as model:
        add("policy", base, model, own_states)
        if compared == "base":
            with model.disable_adapter():  # type: ignore[operator]
                add("reference", base, model, of_states)
    if compared not in (None, "base"):
        section, adapter = job.located(str(compared))
        other = models.load_config(section)
        models.check_vocabulary(section, other, table)
        with loading.loaded(section, adapter, other) as model:
            add("reference", section, model, of_states)
    return numbers
