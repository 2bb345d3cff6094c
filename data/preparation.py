"""From datasets to token tables: read, mix, hold out, tokenise, cache, report.

Prepared once per content, before any process group exists, and shared by all ranks: whichever process comes first holds
a file lock while it works, the others map the arrays it wrote.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock

from data.chat import template_fingerprint
from data.errors import DataError
from data.formats import RowProblem
from data.rescoring import check_transforms, name_of, rescored, told
from data.shapes import (
    COMPLETION,
    MISMATCHED,
    Rule,
    arrange,
    prompt_key,
    refuse_one_class,
    require,
    rule_matters,
    with_mismatched,
)
from data.sources import LoadedRows, Source, load_rows, mix
from data.store import FORMAT, TokenTable, cache_dir, digest, write_folder
from data.tokens import Dropped, TokenPolicy, TokenRow, TokenStats, tokenize_rows
from objectives.relabel import LeftOut, Relabeler
from objectives.reward_transforms import RewardTransform
from objectives.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    """Scores each row needs: of legs, or attributes of the completion."""
    rule: Rule = field(default_factory=Rule)
    """How scored responses become pairs."""
    reward_transforms: tuple[RewardTransform, ...] = ()
    """What becomes of the scores of a prompt's responses before that, one after the other."""
    relabel: tuple[Relabeler, ...] = ()
    """Each maps a row to the rows that replace it, one after the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The rows of training or evaluation."""

    table: TokenTable
    where: Sequence[tuple[str, int]]
    """Source and row number of each row, for messages."""
    prompts: np.ndarray
    """Which prompt each row has, as a number: rows of one prompt form a cluster."""
    groups: Sequence[str] = ()
    """``Row.group`` of each row: what evaluation reports apart; "" where it has none."""

    def name(self, row: int) -> str:
        """``source, row index``, for messages."""
        source, index = self.where[row]
        return f"{source}, row {index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What a run needs to know of its data."""

    train: Split
    eval: Split | None
    report: Mapping[str, Any]
    """Counts of what was read, dropped, cut and changed; written to ``data_report.json``."""

    def tables(self) -> list[TokenTable]:
        """The tokens of training and, where there is one, of evaluation."""
        return [split.table for split in (self.train, self.eval) if split is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """Text rows with the legs that are wanted, and what became of those without."""

    train: list[Row]
    held: list[Row]
    loaded: list[LoadedRows]
    """What was read: the training sources, then the evaluation set."""
    problems: list[RowProblem]
    """Rows that were read well, and then left out: no pair could be made, or a relabeler had no use for them."""
    shaped: Mapping[str, Any]
    """Rows before and after rule and relabelers; see the report."""
    kept_share: float
    """Share of the rows read that is left, each step's losses counted against the rows of that step."""


def read_sources(spec: DataSpec) -> Gathered:
    """Training and evaluation rows: read, rescored, given their legs, held out, relabelled, mixed. Needs no tokenizer.

    Raises:
        DataError: see ``load_rows``, ``rescored``, ``arrange`` and ``with_mismatched``; also when rule, reward
            transforms or relabelers don't go with data or objective.
    """
    check_transforms(spec.reward_transforms)
    loaded = [load_rows(source, limit=spec.max_rows) for source in spec.train]
    evaluated = [] if spec.eval is None else [load_rows(spec.eval, limit=spec.max_rows)]
    legs = _legs_to_arrange(spec)
    _refuse_idle_rule(spec, [*loaded, *evaluated], legs)
    as_read = [*loaded, *evaluated]
    if spec.reward_transforms:
        new = _rescored(as_read, spec, legs)
        loaded, evaluated = new[: len(loaded)], new[len(loaded) :]
    problems: list[RowProblem] = []

    def arranged(each: LoadedRows) -> LoadedRows:
        rows, left_out = arrange(
            each.rows, legs=legs, labels=spec.labels, rule=spec.rule, seed=spec.seed, scores=spec.scores
        )
        problems.extend(left_out)
        return dataclasses.replace(each, rows=rows)

    def relabelled(rows: Sequence[Row]) -> list[Row]:
        new, left_out = _relabelled(rows, spec)
        problems.extend(left_out)
        return new

    parts, held_parts = [arranged(each) for each in loaded], [arranged(each) for each in evaluated]
    # What is held out is decided on rows as they were read: however many a row becomes, its prompt is on one side.
    # Before mixing: a weight says how often a row is trained on, not how often it is evaluated.
    least = 2 if MISMATCHED in spec.legs else 1
    everything = [] if evaluated else [row for each in loaded for row in each.rows]
    prompts = {prompt_key(row.prompt) for row in hold_out(everything, spec.eval_share, spec.seed, least=least)[1]}
    sides = [_divided(part.rows, prompts) for part in parts]
    held = [row for part in held_parts for row in part.rows] + [row for _, rows in sides for row in rows]
    before, usable = sum(len(each.rows) for each in (*loaded, *evaluated)), len(problems)
    count = sum(len(part.rows) for part in (*parts, *held_parts))
    parts = [dataclasses.replace(part, rows=relabelled(rows)) for part, (rows, _) in zip(parts, sides, strict=True)]
    held = relabelled(held)
    after = sum(len(part.rows) for part in parts) + len(held)
    train = mix([(part, source.weight) for part, source in zip(parts, spec.train, strict=True)], spec.seed)
    if spec.labels:
        desirable = sum(bool(row.label) for row in train)
        refuse_one_class(desirable, len(train) - desirable, _names(spec))
    if MISMATCHED in spec.legs:
        train, held = with_mismatched(train, spec.seed), _held_with_mismatched(held, spec)
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


def _held_with_mismatched(held: Sequence[Row], spec: DataSpec) -> list[Row]:
    try:
        return with_mismatched(held, spec.seed)
    except DataError as error:
        way_out = "raise data.eval_share, or set it to 0" if spec.eval is None else "or leave the evaluation set out"
        raise DataError(f"rows to evaluate on: {error}, {way_out}") from error


def _names(spec: DataSpec) -> str:
    return ", ".join(source.dataset_name for source in spec.train)


def _legs_to_arrange(spec: DataSpec) -> list[str]:
    """What the objective needs, and what relabelers rewrite."""
    rewritten = [leg for relabel in spec.relabel for leg in getattr(relabel, "legs", ())]
    if rewritten and COMPLETION in spec.legs:
        raise DataError(
            f"relabel rewrites {' and '.join(dict.fromkeys(rewritten))}, and the objective learns from single labelled "
            "completions; leave relabel out, or use an objective that learns from pairs"
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
            f"{names}: data.rule, data.threshold and data.margin say how scored responses become pairs, and the rows "
            "have none; leave them out"
        )
    if not rule_matters(legs, labels=spec.labels):
        which = "every one" if list(legs) == [COMPLETION] else "the best"
        raise DataError(
            f"data.rule {spec.rule.name} has no effect: the objective takes {which} of the scored responses "
            f"({' and '.join(legs)}); leave out data.rule, data.threshold and data.margin"
        )
    if spec.rule.name == "threshold" and spec.rule.margin and set(legs) <= {COMPLETION, MISMATCHED}:
        raise DataError(
            "data.margin has no effect: with data.rule threshold every response gets a label; leave data.margin out"
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
            f"{_names(spec)}: reward_transforms ({names}) have no effect: the same responses are trained on as without "
            "them, and nothing reads their scores; change them, or leave them out"
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


def _divided(rows: Sequence[Row], prompts: Set[str]) -> tuple[list[Row], list[Row]]:
    """Rows whose prompt is not held out, and those whose is."""
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        sides[bool(prompts) and prompt_key(row.prompt) in prompts].append(row)
    return sides


def _relabelled(rows: Sequence[Row], spec: DataSpec) -> tuple[list[Row], list[RowProblem]]:
    if not spec.relabel:
        return list(rows), []
    current, problems = list(rows), []
    for relabel in spec.relabel:
        new: list[Row] = []
        for row in current:
            try:
                new += relabel(row)
            except LeftOut as reason:
                problems.append(RowProblem(source=row.source, index=row.index, reason=str(reason)))
            except DataError:
                raise
            except ValueError as error:
                raise DataError(str(error)) from error
        current = new
    require(current, [leg for leg in spec.legs if leg != MISMATCHED], labels=spec.labels, scores=spec.scores)
    return current, problems


def hold_out(rows: Sequence[Row], share: float, seed: int, *, least: int = 1) -> tuple[list[Row], list[Row]]:
    """Splits off ``share`` of the **prompts**, so that no prompt is on both sides. Order is kept.

    Where there are enough prompts, at least ``least`` are on either side (unless the share is 0).
    """
    prompts = list(dict.fromkeys(prompt_key(row.prompt) for row in rows))
    number = round(share * len(prompts))
    if share > 0 and len(prompts) >= 2:
        least = min(least, len(prompts) // 2)
        number = min(max(number, least), len(prompts) - least)
    chosen = np.random.default_rng([seed, 0xE7A1]).permutation(len(prompts))[:number]
    return _divided(rows, {prompts[i] for i in chosen})


def prepare(spec: DataSpec, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Token tables of training and evaluation rows, from the cache where the content was prepared before.

    Raises:
        DataError: a dataset can't be used; one sentence on why and what to do.
    """
    rows = read_sources(spec)
    key = digest(
        FORMAT,
        [dataclasses.astuple(spec.policy), spec.legs, spec.labels, spec.scores, tokenizer_fingerprint(tokenizer)],
        [dict(rows.shaped), rows.kept_share, [each.format for each in rows.loaded]],
        [[each.source, each.index, each.reason] for each in _problems(rows)],
        [len(rows.train), len(rows.held)],
        *(_content(row) for row in (*rows.train, *rows.held)),
    )
    folder = cache_dir() / "rows" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "report.json").is_file():
            write_folder(folder, lambda path: _prepare_into(path, spec, tokenizer, rows))
    report = json.loads((folder / "report.json").read_text())
    _refuse_losses(report, spec)
    return Prepared(
        train=_load(folder / "train"),
        eval=_load(folder / "eval") if (folder / "eval").is_dir() else None,
        report=report,
    )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Content hash of everything about a tokenizer that can change token ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        model = json.loads(backend.to_str())
        # How the last call padded and cut; no call of ours does either.
        del model["padding"], model["truncation"]
    else:
        model = sorted(tokenizer.get_vocab().items())
    return digest(model, {k: str(v) for k, v in tokenizer.special_tokens_map.items()}, template_fingerprint(tokenizer))


def _content(row: Row) -> list[Any]:
    return [row.prompt, dict(row.responses), dict(row.scores), row.label, row.group, row.source, row.index]


def _problems(rows: Gathered) -> list[RowProblem]:
    return [problem for each in rows.loaded for problem in each.problems] + rows.problems


def _prepare_into(folder: Path, spec: DataSpec, tokenizer: PreTrainedTokenizerBase, rows: Gathered) -> None:
    dropped = [Dropped(source=each.source, index=each.index, reason=each.reason) for each in _problems(rows)]
    stats = TokenStats()
    kept: dict[str, int] = {}
    prompts: dict[str, set[tuple[int, ...]]] = {}
    duplicates = lost = 0
    labels: Counter[str] = Counter()
    tables: dict[str, TokenTable] = {}
    for name, text_rows in (("train", rows.train), ("eval", rows.held)):
        token_rows, lost_here, stats_here = tokenize_rows(
            text_rows, tokenizer, spec.policy, spec.legs, scores=spec.scores
        )
        dropped += lost_here
        lost += len(lost_here)
        _add(stats, stats_here)
        kept[name] = len(token_rows)
        prompts[name] = {row.prompt for row in token_rows}
        duplicates += len(token_rows) - len({_identity(row) for row in token_rows})
        if not token_rows:
            continue
        if name == "train":
            labels.update("desirable" if row.label else "undesirable" for row in token_rows if row.label is not None)
        tables[name] = TokenTable.of(token_rows, spec.legs)
        (folder / name).mkdir()
        tables[name].save(folder / name)
        numbers: dict[tuple[int, ...], int] = {}
        clusters = [numbers.setdefault(row.prompt, len(numbers)) for row in token_rows]
        np.save(folder / name / "prompts.npy", np.array(clusters, dtype=np.int64))
        where = [[row.source, row.index, row.group] for row in token_rows]
        (folder / name / "where.json").write_text(json.dumps(where))
    report = {
        "rows": {
            "read": sum(len(each.rows) + len(each.problems) for each in rows.loaded),
            "kept": kept["train"] + kept["eval"],
            **kept,
        },
        "formats": [each.format for each in rows.loaded],
        "shaped": dict(rows.shaped),
        "labels": {kind: labels[kind] for kind in ("desirable", "undesirable")} if spec.labels else None,
        "dropped": dict(Counter(row.reason for row in dropped).most_common()),
        "dropped_rows": [dataclasses.asdict(row) for row in dropped],
        # Rounded, so that a limit of 0.3 allows three of ten whatever floating point makes of them.
        "dropped_share": round(1 - rows.kept_share * (1 - lost / max(lost + sum(kept.values()), 1)), 12),
        "duplicate_rows": duplicates,
        "eval_prompts_in_training": len(prompts["train"] & prompts["eval"]),
        "truncated": dict(stats.truncated),
        "tokens_lost": dict(stats.tokens_lost),
        "boundary_mismatches": stats.boundary_mismatches,
        "bos_removed": stats.bos_removed,
        "terminator_added": dict(stats.terminator_added),
        "terminator_lost": dict(stats.terminator_lost),
        "tail_removed": dict(stats.tail_removed),
        "tokens": _token_totals(tables),
        "max_length": spec.policy.max_length,
        "truncation": spec.policy.truncation,
        "dataset_hash": digest([table.fingerprint() for table in tables.values()]),
    }
    (folder / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1))


def _identity(row: TokenRow) -> tuple[object, ...]:
    """What two rows share that are the same: a mismatched response is drawn for each anew."""
    return (row.prompt, row.label, tuple((leg, tokens) for leg, tokens in row.legs.items() if leg != MISMATCHED))


def _add(total: TokenStats, more: TokenStats) -> None:
    for each in dataclasses.fields(TokenStats):
        setattr(total, each.name, getattr(total, each.name) + getattr(more, each.name))


def _token_totals(tables: Mapping[str, TokenTable]) -> dict[str, int]:
    totals: Counter[str] = Counter()
    for table in tables.values():
        totals["prompt"] += int(table.prompts.lengths().sum())
        for leg, ragged in table.legs.items():
            totals[leg] += int(ragged.lengths().sum())
    return dict(totals)


def _load(folder: Path) -> Split:
    names = json.loads((folder / "where.json").read_text())
    return Split(
        table=TokenTable.load(folder),
        where=[(source, index) for source, index, _ in names],
        prompts=np.load(folder / "prompts.npy"),
        groups=[group for _, _, group in names],
    )


def _refuse_losses(report: Mapping[str, Any], spec: DataSpec) -> None:
    """Stops a run whose data is mostly unusable."""
    rows, reasons = report["rows"], report["dropped"]
    names = _names(spec)
    why = ", ".join(f"{count} × {reason}" for reason, count in list(reasons.items())[:4])
    rule = ", change data.rule" if report["shaped"]["rule"] else ""
    why = why or "the dataset is empty"
    way_out = f"mend the data{rule}, or raise data.max_length ({spec.policy.max_length})"
    if rows["train"] == 0:
        raise DataError(f"{names}: no row can be trained on ({why}); {way_out}")
    if spec.eval is not None and rows["eval"] == 0:
        raise DataError(f"{spec.eval.dataset_name}: no row can be evaluated on ({why}); {way_out}")
    if spec.labels:
        refuse_one_class(report["labels"]["desirable"], report["labels"]["undesirable"], names)
    share = report["dropped_share"]
    if share > spec.max_dropped_share:
        raise DataError(
            f"{names}: {share:.0%} of {rows['read']} rows can't be used ({why}); mend the data{rule}, raise "
            f"data.max_length, or accept it with data.max_dropped_share {min(1.0, round(share + 0.01, 2))}"
        )
