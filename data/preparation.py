"""From datasets to token tables: read, mix, hold out, tokenise, cache, report.

Prepared once per content, before any process group exists, and shared by all ranks: whichever process comes first holds
a file lock while it works, the others map the arrays it wrote.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock

from data.chat import template_fingerprint
from data.errors import DataError
from data.sources import LoadedRows, Source, load_rows, mix
from data.store import FORMAT, TokenTable, cache_dir, digest, write_folder
from data.tokens import Dropped, TokenPolicy, TokenStats, tokenize_rows
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """The rows of training or evaluation."""

    table: TokenTable
    where: Sequence[tuple[str, int]]
    """Source and row number of each row, for messages."""
    prompts: np.ndarray
    """Which prompt each row has, as a number: rows of one prompt form a cluster."""

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


def read_sources(spec: DataSpec) -> tuple[list[Row], list[Row], list[LoadedRows]]:
    """Training rows, evaluation rows and what was loaded. Needs no tokenizer and no model.

    Raises:
        DataError: see ``load_rows``; also when no row can be used.
    """
    loaded = [load_rows(source, limit=spec.max_rows) for source in spec.train]
    everything = [row for each in loaded for row in each.rows]
    if spec.eval is not None:
        from_eval = load_rows(spec.eval, limit=spec.max_rows)
        held, all_loaded = list(from_eval.rows), [*loaded, from_eval]
        train_parts = loaded
    else:
        # Before mixing: a weight says how often a row is trained on, not how often it is evaluated.
        _, held = hold_out(everything, spec.eval_share, spec.seed)
        prompts = {digest(row.prompt) for row in held}
        train_parts = [
            dataclasses.replace(each, rows=[row for row in each.rows if digest(row.prompt) not in prompts])
            for each in loaded
        ]
        all_loaded = loaded
    weights = [source.weight for source in spec.train]
    return mix(list(zip(train_parts, weights, strict=True)), spec.seed), held, all_loaded


def hold_out(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Splits off ``share`` of the **prompts**, so that no prompt is on both sides. Order is kept."""
    keys = [digest(row.prompt) for row in rows]
    prompts = list(dict.fromkeys(keys))
    number = round(share * len(prompts))
    if share > 0 and len(prompts) >= 2:
        number = min(max(number, 1), len(prompts) - 1)
    chosen = np.random.default_rng([seed, 0xE7A1]).permutation(len(prompts))[:number]
    held = {prompts[i] for i in chosen}
    train = [row for row, key in zip(rows, keys, strict=True) if key not in held]
    return train, [row for row, key in zip(rows, keys, strict=True) if key in held]


def prepare(spec: DataSpec, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Token tables of training and evaluation rows, from the cache where the content was prepared before.

    Raises:
        DataError: a dataset can't be used; one sentence on why and what to do.
    """
    train, held, loaded = read_sources(spec)
    key = digest(
        FORMAT,
        [dataclasses.astuple(spec.policy), spec.legs, tokenizer_fingerprint(tokenizer)],
        [_content(row) for row in train],
        [_content(row) for row in held],
        [[dataclasses.astuple(problem) for problem in each.problems] for each in loaded],
    )
    folder = cache_dir() / "rows" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "report.json").is_file():
            write_folder(folder, lambda path: _prepare_into(path, spec, tokenizer, train, held, loaded))
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
    return [row.prompt, dict(row.responses), dict(row.scores), row.source, row.index]


def _prepare_into(
    folder: Path,
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Row],
    held: Sequence[Row],
    loaded: Sequence[LoadedRows],
) -> None:
    dropped = [
        Dropped(source=problem.source, index=problem.index, reason=problem.reason)
        for each in loaded
        for problem in each.problems
    ]
    stats = TokenStats()
    kept: dict[str, int] = {}
    prompts: dict[str, set[str]] = {}
    duplicates = 0
    tables: dict[str, TokenTable] = {}
    for name, rows in (("train", train), ("eval", held)):
        token_rows, lost, stats_here = tokenize_rows(rows, tokenizer, spec.policy, spec.legs)
        dropped += lost
        _add(stats, stats_here)
        kept[name] = len(token_rows)
        keys = [digest(row.prompt) for row in token_rows]
        prompts[name] = set(keys)
        duplicates += len(token_rows) - len({(row.prompt, tuple(row.legs.items())) for row in token_rows})
        if not token_rows:
            continue
        tables[name] = TokenTable.of(token_rows, spec.legs)
        (folder / name).mkdir()
        tables[name].save(folder / name)
        numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(keys))}
        np.save(folder / name / "prompts.npy", np.array([numbers[prompt] for prompt in keys], dtype=np.int64))
        (folder / name / "where.json").write_text(json.dumps([[row.source, row.index] for row in token_rows]))
    report = {
        "rows": {
            "read": sum(len(each.rows) + len(each.problems) for each in loaded),
            "kept": kept["train"] + kept["eval"],
            **kept,
        },
        "formats": [each.format for each in loaded],
        "dropped": dict(Counter(row.reason for row in dropped).most_common()),
        "dropped_rows": [dataclasses.asdict(row) for row in dropped],
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


def _add(total: TokenStats, more: TokenStats) -> None:
    for field in dataclasses.fields(TokenStats):
        setattr(total, field.name, getattr(total, field.name) + getattr(more, field.name))


def _token_totals(tables: Mapping[str, TokenTable]) -> dict[str, int]:
    totals: Counter[str] = Counter()
    for table in tables.values():
        totals["prompt"] += int(table.prompts.lengths().sum())
        for leg, ragged in table.legs.items():
            totals[leg] += int(ragged.lengths().sum())
    return dict(totals)


def _load(folder: Path) -> Split:
    where = [(source, index) for source, index in json.loads((folder / "where.json").read_text())]
    return Split(table=TokenTable.load(folder), where=where, prompts=np.load(folder / "prompts.npy"))


def _refuse_losses(report: Mapping[str, Any], spec: DataSpec) -> None:
    """Stops a run whose data is mostly unusable."""
    rows, reasons = report["rows"], report["dropped"]
    names = ", ".join(source.dataset_name for source in spec.train)
    why = ", ".join(f"{count} × {reason}" for reason, count in list(reasons.items())[:4])
    why, way_out = why or "the dataset is empty", f"mend the data, or raise data.max_length ({spec.policy.max_length})"
    if rows["train"] == 0:
        raise DataError(f"{names}: no row can be trained on ({why}); {way_out}")
    if spec.eval is not None and rows["eval"] == 0:
        raise DataError(f"{spec.eval.dataset_name}: no row can be evaluated on ({why}); {way_out}")
    lost = sum(reasons.values())
    share = lost / (rows["kept"] + lost)
    if share > spec.max_dropped_share:
        raise DataError(
            f"{names}: {share:.0%} of {rows['read']} rows can't be used ({why}); mend the data, raise data.max_length, "
            f"or accept it with data.max_dropped_share {min(1.0, round(share + 0.01, 2))}"
        )
