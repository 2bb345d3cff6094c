"""From datasets to the text rows of training and evaluation: read, filtered, rescored, arranged, held out, relabelled,
mixed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from data.arranging import arrange_view, mismatched_view
from data.errors import DataError
from data.filtering import filtered
from data.formats import RowProblem
from data.rescoring import check_transforms, name_of, rescored, told
from data.rowstore import RowStore, RowView, numbered, prompt_key
from data.shapes import (
    COMPLETION,
    MISMATCHED,
    Rule,
    arrange,
    refuse_one_class,
    require,
    rule_matters,
)
from data.sources import LoadedRows, Source, load_rows, repeated
from data.store import cache_dir
from data.tokens import TokenPolicy
from data.workers import Workers
from objectives.columns import COLUMNS
from objectives.relabel import LeftOut, Relabeler
from objectives.reward_transforms import RewardTransform
from objectives.rows import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """Everything that decides which token tables come out, besides the tokenizer."""

    train: tuple[Source, ...]
    eval: Source | None
    eval_share: float
    legs: tuple[str, ...]
    policy: TokenPolicy
    max_dropped_share: float
    seed: int
    max_rows: int | None = None
    labels: bool = False
    """Whether each row needs a label."""
    scores: tuple[str, ...] = ()
    """Scores each row needs, of legs or attributes of the completion, and columns of ``COLUMNS``."""
    rule: Rule = field(default_factory=Rule)
    """How scored responses become pairs."""
    reward_transforms: tuple[RewardTransform, ...] = ()
    """What becomes of the scores of a prompt's responses before that, one after the other."""
    relabel: tuple[Relabeler, ...] = ()
    """Each maps a row to the rows that replace it, one after the other."""
    filters: tuple[Any, ...] = ()
    """What removes rows as they were read, before all of that, one after the other; see ``data.filters``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """Text rows with the legs that are wanted, and what became of those without."""

    train: RowView
    held: RowView
    loaded: list[LoadedRows]
    """What was read: the training sources, then the evaluation set."""
    problems: list[RowProblem]
    """Rows that were read well, and then left out: no pair could be made, or a relabeler had no use for them."""
    shaped: Mapping[str, Any]
    """Rows before and after rule and relabelers; see the report."""
    kept_share: float
    """Share of the rows read that is left, each step's losses counted against the rows of that step."""


def read_sources(spec: DataSpec, workers: Workers | None = None, store: RowStore | None = None) -> Gathered:
    """Training and evaluation rows: read, filtered, rescored, given their legs, held out, relabelled, mixed.

    Args:
        spec: what to read.
        workers: convert and arrange large datasets.
        store: takes all rows.
    Raises:
        DataError: see ``load_rows``, ``filtered``, ``rescored``, ``arrange`` and ``with_mismatched``; also when rule,
            reward transforms or relabelers don't go with data or objective.
    """
    check_transforms(spec.reward_transforms)
    workers = Workers(0) if workers is None else workers
    store = RowStore(cache_dir() / "rows") if store is None else store  # an empty one is false

    loaded, evaluated = load(spec, workers, store)
    legs = _legs_to_arrange(spec)
    _refuse_idle_rule(spec, [*loaded, *evaluated], legs)
    as_read = [*loaded, *evaluated]
    if spec.reward_transforms:
        new = [replace(each, rows=store.add_rows(each.rows)) for each in _rescored(as_read, spec, legs)]
        loaded, evaluated = new[: len(loaded)], new[len(loaded) :]
    problems: list[RowProblem] = []

    def arranged(each: LoadedRows) -> RowView:
        rows, left_out = arrange_view(
            _view(each),
            legs=legs,
            labels=spec.labels,
            rule=spec.rule,
            seed=spec.seed,
            scores=spec.scores,
            workers=workers,
        )
        problems.extend(left_out)
        return rows

    def relabelled(rows: RowView) -> RowView:
        new, left_out = _relabelled(rows, spec)
        problems.extend(left_out)
        return new

    parts, held_parts = [arranged(each) for each in loaded], [arranged(each) for each in evaluated]
    # What is held out is decided on rows as they were read: however many a row becomes, its prompt is on one side.
    # Before mixing: a weight says how often a row is trained on, not how often it is evaluated.
    least = 2 if MISMATCHED in spec.legs else 1
    share = 0.0 if evaluated else spec.eval_share
    sides = _divided([_view(each) for each in loaded], parts, share, spec.seed, least)
    held = _joined([*held_parts, *(rows for _, rows in sides)], store)
    before, usable = sum(len(each.rows) for each in (*loaded, *evaluated)), len(problems)
    count = sum(len(part) for part in (*parts, *held_parts))
    parts = [relabelled(rows) for rows, _ in sides]
    held = relabelled(held)
    after = sum(len(part) for part in parts) + len(held)
    train = _mixed(parts, spec, store)
    if spec.labels:
        desirable = int((train.labels() == 1).sum())
        refuse_one_class(desirable, len(train) - desirable, names_of(spec))
    if MISMATCHED in spec.legs:
        train, held = mismatched_view(train, spec.seed), _held_with_mismatched(held, spec)
    unread = sum(len(each.problems) for each in (*loaded, *evaluated))
    lost = ((unread, before + unread), (usable, before), (len(problems) - usable, count))
    return Gathered(
        train=train,
        held=held,
        loaded=[*loaded, *evaluated],
        problems=problems,
        shaped={
            "rows_read": before,
            "rows_arranged": count,
            "rows_relabelled": after,
            "rule": spec.rule.name
            if _any_scored([*loaded, *evaluated]) and rule_matters(legs, labels=spec.labels)
            else None,
            **told(as_read, [*loaded, *evaluated], spec.reward_transforms),
        },
        kept_share=math.prod(1 - missing / max(total, 1) for missing, total in lost),
    )


def load(spec: DataSpec, workers: Workers, store: RowStore) -> tuple[list[LoadedRows], list[LoadedRows]]:
    """The training sources without what filters remove, and the evaluation set where one is named.

    Raises:
        DataError: see ``load_rows`` and ``filtered``.
    """

    def read(source: Source) -> LoadedRows:
        return load_rows(source, limit=spec.max_rows, store=store, workers=workers)

    loaded = [read(source) for source in spec.train]
    evaluated = [] if spec.eval is None else [read(spec.eval)]
    return filtered(spec.filters, loaded, evaluated, workers), evaluated


def _view(loaded: LoadedRows) -> RowView:
    assert isinstance(loaded.rows, RowView)
    return loaded.rows


def _joined(views: Sequence[RowView], store: RowStore) -> RowView:
    return RowView(store, np.concatenate([np.arange(0), *(view.numbers for view in views)]))


def _mixed(parts: Sequence[RowView], spec: DataSpec, store: RowStore) -> RowView:
    """``mix`` of a store's rows."""
    taken = []
    for position, (rows, source) in enumerate(zip(parts, spec.train, strict=True)):
        numbers = repeated(source.dataset_name, len(rows), source.weight, spec.seed, position)
        taken.append(rows.take(np.fromiter(numbers, dtype=np.int64)))
    return _joined(taken, store)


def _held_with_mismatched(held: RowView, spec: DataSpec) -> RowView:
    try:
        return mismatched_view(held, spec.seed)
    except DataError as error:
        way_out = "raise data.eval_share, or set it to 0" if spec.eval is None else "or leave the evaluation set out"
        raise DataError(f"rows to evaluate on: {error}, {way_out}") from error


def names_of(spec: DataSpec) -> str:
    """The training sources, for messages."""
    return ", ".join(source.dataset_name for source in spec.train)


def _legs_to_arrange(spec: DataSpec) -> list[str]:
    """What the objective needs, and what relabelers rewrite."""
    rewritten = [leg for relabel in spec.relabel for leg in getattr(relabel, "legs", ())]
    if rewritten and COMPLETION in spec.legs:
        raise DataError(
            f"relabel rewrites {' and '.join(dict.fromkeys(rewritten))}, and the objective learns from single labelled "
            "completions; leave relabel out, or use an objective that learns from pairs"
        )
    for name in spec.scores:
        if name in COLUMNS and COLUMNS[name].leg in rewritten:
            raise DataError(
                f"relabel rewrites {' and '.join(dict.fromkeys(rewritten))}, and the objective needs {name}, "
                f"{COLUMNS[name].about} in the data; leave relabel out, or use an objective that does not read it"
            )
    return list(dict.fromkeys([*spec.legs, *rewritten]))


def _any_scored(loaded: Sequence[LoadedRows]) -> bool:
    return any(row.candidates for each in loaded for row in each.rows[:1])  # a format gives candidates to all or none


def _refuse_idle_rule(spec: DataSpec, loaded: Sequence[LoadedRows], legs: Sequence[str]) -> None:
    if spec.rule == Rule():
        return
    if not _any_scored(loaded):
        names = ", ".join(each.source for each in loaded)
        raise DataError(
            f"{names}: data.rule, data.threshold, data.margin and data.max_length_ratio say how scored responses "
            "become pairs, and the rows have none; leave them out"
        )
    if not rule_matters(legs, labels=spec.labels):
        which = "every one" if list(legs) == [COMPLETION] else "the best"
        raise DataError(
            f"data.rule {spec.rule.name} has no effect: the objective takes {which} of the scored responses "
            f"({' and '.join(legs)}); leave out data.rule, data.threshold, data.margin and data.max_length_ratio"
        )
    if spec.rule.name == "threshold" and set(legs) <= {COMPLETION, MISMATCHED}:
        idle = "margin" if spec.rule.margin else "max_length_ratio" if spec.rule.max_length_ratio is not None else None
        if idle is not None:
            raise DataError(
                f"data.{idle} has no effect: with data.rule threshold every response gets a label; leave it out"
            )


def _rescored(loaded: Sequence[LoadedRows], spec: DataSpec, legs: Sequence[str]) -> list[LoadedRows]:
    """The rows with the scores of their candidates transformed, which must make a difference to training."""
    found = rescored(loaded, spec.reward_transforms)
    after = _what_is_read(found, spec, legs)
    try:
        idle = _what_is_read(loaded, spec, legs) == after
    except DataError:  # without them the rows could not be used
        idle = False
    if idle:
        names = ", ".join(map(name_of, spec.reward_transforms))
        raise DataError(
            f"{names_of(spec)}: reward_transforms ({names}) have no effect: the same responses are trained on as "
            "without them, and nothing reads their scores; change them, or leave them out"
        )
    return found


def _what_is_read(loaded: Sequence[LoadedRows], spec: DataSpec, legs: Sequence[str]) -> list[Any]:
    """All that training reads of rows."""
    found: list[Any] = []
    for each in loaded:
        rows, problems = arrange(
            each.rows, legs=legs, labels=spec.labels, rule=spec.rule, seed=spec.seed, scores=spec.scores
        )
        wanted = None if spec.relabel else set(spec.scores)
        scores = [{k: v for k, v in row.scores.items() if wanted is None or k in wanted} for row in rows]
        found += [[(row.responses, row.label) for row in rows], scores, problems]
    return found


def _relabelled(rows: RowView, spec: DataSpec) -> tuple[RowView, list[RowProblem]]:
    if not spec.relabel:
        return rows, []
    problems: list[RowProblem] = []

    def new(current: Iterable[Row], relabel: Relabeler) -> Iterator[Row]:
        for row in current:
            try:
                yield from relabel(row)
            except LeftOut as reason:
                problems.append(RowProblem(source=row.source, index=row.index, reason=str(reason)))
            except DataError:
                raise
            except ValueError as error:
                raise DataError(str(error)) from error

    for relabel in spec.relabel:
        rows = rows.store.add_rows(new(rows, relabel))
    wanted = [leg for leg in spec.legs if leg != MISMATCHED]
    require(rows.first_of_kinds(), wanted, labels=spec.labels, scores=spec.scores)
    return rows, problems


def hold_out(rows: Sequence[Row], share: float, seed: int, *, least: int = 1) -> tuple[list[Row], list[Row]]:
    """Splits off ``share`` of the **prompts**, so that no prompt is on both sides. Order is kept.

    Where there are enough prompts, at least ``least`` are on either side (unless the share is 0).
    """
    numbers: dict[str, int] = {}
    prompts = np.array([numbers.setdefault(prompt_key(row.prompt), len(numbers)) for row in rows], dtype=np.int64)
    held = held_out(len(numbers), share, seed, least)[prompts].tolist()
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row, side in zip(rows, held, strict=True):
        sides[side].append(row)
    return sides


def held_out(prompts: int, share: float, seed: int, least: int) -> np.ndarray:
    """Which of so many prompts are held out, (prompt,); see ``hold_out``."""
    number = round(share * prompts)
    if share > 0 and prompts >= 2:
        least = min(least, prompts // 2)
        number = min(max(number, least), prompts - least)
    held = np.zeros(prompts, dtype=bool)
    held[np.random.default_rng([seed, 0xE7A1]).permutation(prompts)[:number]] = True
    return held


def _divided(
    read: Sequence[RowView], parts: Sequence[RowView], share: float, seed: int, least: int
) -> list[tuple[RowView, RowView]]:
    """Rows of every part whose prompt is not held out, and those whose is; chosen are prompts of the rows as read."""
    if share == 0:
        return [(part, part.take(np.arange(0))) for part in parts]
    numbers = numbered(np.concatenate([rows.prompts() for rows in (*read, *parts)]))
    count = sum(map(len, read))
    held = held_out(int(numbers[:count].max(initial=-1)) + 1, share, seed, least)[numbers[count:]]
    ends = np.cumsum([len(part) for part in parts])
    return [
        (part.take(np.flatnonzero(~side)), part.take(np.flatnonzero(side)))
        for part, side in zip(parts, np.split(held, ends[:-1]), strict=True)
    ]
