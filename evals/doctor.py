"""What the data doctor needs a model for: which pairs leave, by one function, and what it finds about all of them.

    filtered(recipe, prepared, spec, …)      inside a run: the prepared rows without those that its filters remove
    left_out(filters, split, …)              the same rows for `python -m data check --write`
    examined(diagnosis, split, …)            findings: difficulty, ches, label_noise, label_noise_reward_model

Rows are those a run would train on, as tokens. Held-out rows are never scored and never leave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from align.errors import RunError
from data.clean import LeftRow
from data.errors import DataError
from data.filters import FILTERS, ModelFilter
from data.findings import Diagnosis
from data.narrowed import narrowed
from data.preparation import DataSpec, Prepared, Split
from evals.doctor_findings import histograms, of_policy, of_reward_model
from evals.row_scores import PAIR, Policy, Say, columns

if TYPE_CHECKING:
    from align.recipe import Recipe

Columns = Callable[[str | None], Mapping[str, np.ndarray]]
"""Maps a judge (None: the initial policy) to numbers of every pair."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Which rows filters remove."""

    by: np.ndarray
    """For each row the number of the filter, −1 where it stays, (row,)."""
    scores: np.ndarray
    """The number for which it leaves, NaN where it stays, (row,)."""
    reasons: Sequence[str]
    """Of each filter."""

    def gone(self) -> dict[int, str]:
        """Why each row that leaves does."""
        return {row: self.reasons[int(self.by[row])] for row in np.flatnonzero(self.by >= 0).tolist()}


def policy_of(recipe: Recipe, config: Any, tokenizer: Any) -> Policy:
    """The model that a recipe's run starts from."""
    adapter = None if recipe.lora is None else recipe.lora.adapter_name_or_path
    return Policy(section=recipe.model, adapter=adapter, config=config, tokenizer=tokenizer)


def filtered(recipe: Recipe, prepared: Prepared, spec: DataSpec, config: Any, tokenizer: Any, say: Say) -> Prepared:
    """The rows of a run without those that filters with a model remove, which the report counts.

    The model that scores is the one the run starts from, whatever has been trained since: a resumed run reads its
    scores or computes them again, and trains on the same rows.

    Args:
        recipe: of the run.
        prepared: its rows.
        spec: by which they were prepared.
        config: of the model.
        tokenizer: of the model.
        say: told what is done.
    Raises:
        RunError, DataError: a filter does not fit the objective or the model, or leaves too few rows.
    """
    filters = [entry.built for entry in recipe.filters if entry.built.needs_model]
    if not filters:
        return prepared
    refuse(filters, prepared.train, trains_reward_model=recipe.trains_reward_model)
    policy = policy_of(recipe, config, tokenizer)
    found = left_out(filters, prepared.train, lambda judge: columns(prepared.train, policy, judge, say))
    return narrowed(prepared, found.gone(), spec)


def refuse(filters: Sequence[ModelFilter], split: Split, *, trains_reward_model: bool) -> None:
    """Raises ``RunError`` where a filter has no numbers to go by."""
    for each in filters:
        name = FILTERS.name_of(each)
        if not set(PAIR) <= split.table.legs.keys():
            raise RunError(
                f"filter {name} compares chosen with rejected, and the objective's rows have "
                f"{', '.join(split.table.legs)}; leave it out, or train on pairs"
            )
        if trains_reward_model and each.judge is None:
            way_out = "" if name == "ches" else ", or name a reward model (reward_model)"
            raise RunError(
                f"filter {name} asks the initial policy, and the objective trains a reward model, whose scalar head "
                f"has no say yet; leave it out{way_out}"
            )


def left_out(filters: Sequence[ModelFilter], split: Split, columns_of: Columns) -> LeftOut:
    """The rows that leave, each by the first filter that removes it: the one place where this is decided.

    Args:
        filters: in their order, each on what the one before left.
        split: training rows.
        columns_of: called once for every judge.
    Raises:
        DataError: no row is left.
    """
    number = len(split.table)
    by, scores = np.full(number, -1, dtype=np.int32), np.full(number, np.nan)
    known = {judge: columns_of(judge) for judge in dict.fromkeys(each.judge for each in filters)}
    for place, each in enumerate(filters):
        own = known[each.judge][each.column]
        leaves = each.leaving(own, by < 0)
        by[leaves], scores[leaves] = place, own[leaves]
    reasons = [f"filter {FILTERS.name_of(each)}: {each.reason}" for each in filters]
    if number and (by >= 0).all():
        names = ", ".join(FILTERS.name_of(each) for each in filters)
        raise DataError(f"filter ({names}) leaves none of {number} training rows; lower its share, or remove it")
    return LeftOut(by=by, scores=scores, reasons=reasons)


def raw_rows(split: Split, found: LeftOut) -> list[LeftRow]:
    """The rows of the datasets that leave, by source and number.

    Raises:
        DataError: of one of them only a part leaves, which a cleaned dataset can't say.
    """
    places: dict[tuple[str, int], list[int]] = {}
    for row in range(len(split.table)):
        places.setdefault(split.where[row], []).append(row)
    rows: list[LeftRow] = []
    for (source, index), own in places.items():
        leaves = [row for row in own if found.by[row] >= 0]
        if leaves and len(leaves) < len(own):
            raise DataError(
                f"{source}, row {index} gives {len(own)} training rows, of which {len(leaves)} leave: a cleaned "
                "dataset can't hold a part of a row; put the filter into the recipe, which removes the others alone"
            )
        if leaves:
            first = leaves[0]
            why, score = found.reasons[int(found.by[first])], float(found.scores[first])
            rows.append(LeftRow(source=source, index=index, reason=why, score=score))
    return sorted(rows, key=lambda each: (each.source, each.index))


def examined(
    diagnosis: Diagnosis, split: Split, columns_of: Columns, *, asked: Sequence[str | None], beta: float
) -> Diagnosis:
    """The diagnosis with what models find.

    Args:
        diagnosis: what was found without one.
        split: training rows, with the legs chosen and rejected.
        columns_of: numbers by judge.
        asked: the judges: None for the initial policy, names of reward models.
        beta: of the loss that pairs have to reach.
    """
    findings = list(diagnosis.findings)
    drawn = dict(diagnosis.distributions)
    for judge in asked:
        found = columns_of(judge)
        findings += of_policy(split, found, beta) if judge is None else of_reward_model(split, found, judge)
        drawn |= histograms(found)
    return replace(diagnosis, findings=findings, distributions=drawn)
