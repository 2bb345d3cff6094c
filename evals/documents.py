"""Documents to look for in a model: whole texts, or rows as they are trained on, as token ids; and which are the same.

A text is one token that is given, and the rest; a row is its prompt, and the response that was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from align import assemble
from align import model as models
from align.errors import RunError
from data.arranging import renamed
from data.errors import DataError
from data.formats import recognise, to_row
from data.narrowed import narrowed
from data.plan import times_trained
from data.preparation import DataSpec, Prepared, Split, prepare
from data.reading import read
from data.sources import HEAD, Source
from data.store import Ragged, TokenTable, digest
from data.tokens import TokenPolicy
from objectives.checks import require
from objectives.rows import Row

if TYPE_CHECKING:
    from align.recipe import Recipe
    from evals.evaluations.memorisation import DocumentSection

FILTERED, NOT_REACHED = "a filter with a model left it out", "the run's {steps} steps did not reach it"
"""Why a row of the run's data was not trained on."""
RESPONSES = ("gold", "chosen", "completion")
"""What is taken for the trained response where none is named, the first that rows have."""
BATCH = 1000


@dataclass(frozen=True, kw_only=True, eq=False)
class Documents:
    """Documents as token ids."""

    name: str
    split: str
    given: Ragged
    """What stands before the tokens that count: the prompt, or the first token of a text."""
    trained: Ragged
    """The tokens that count."""
    dropped: int
    """Rows that can't be used: no text, no response, or too long for the model."""
    apart: Mapping[str, int] = field(default_factory=dict)
    """Of a run's rows, how many were not trained on, by reason."""

    def __len__(self) -> int:
        return len(self.trained)

    def ids(self, row: int) -> np.ndarray:
        """All tokens of a document."""
        return np.concatenate([self.given[row], self.trained[row]])

    def name_of(self, row: int) -> str:
        """The same name for the same tokens, so that checkpoints can be compared document by document."""
        return digest(np.asarray(self.ids(row), dtype=np.int32))

    def table(self, rows: Sequence[int], longest: int) -> TokenTable:
        """Some of them as rows to score, each cut to the model's context."""
        given = [self.given[row].tolist() for row in rows]
        trained = [self.trained[row][: longest - len(before)].tolist() for row, before in zip(rows, given, strict=True)]
        return TokenTable(Ragged.of(given), {"document": Ragged.of(trained)})


def read_documents(section: DocumentSection, tokenizer: Any, max_length: int) -> Documents:
    """The documents of a dataset.

    Args:
        section: where from.
        tokenizer: of the model.
        max_length: tokens after which rows for training are cut.
    Raises:
        DataError: the dataset can't be read, or holds neither texts nor rows with that response.
    """
    name = section.dataset_name
    raws = read(name, split=section.split, config=section.dataset_config, limit=section.max_rows)
    head = list(islice(raws, HEAD))
    if not head:
        raise DataError(f"{name}: the dataset has no rows in split {section.split!r}; name one that has")
    split = "all" if Path(name).is_file() else section.split
    column = section.column or _texts_in(head, section)
    if column is not None:
        return _of_texts(chain(head, raws), column, tokenizer, name, split)
    response = _response_of(head, section)
    spec = DataSpec(
        train=(
            Source(
                dataset_name=name,
                split=section.split,
                config=section.dataset_config,
                columns=section.columns,
                format=section.format,
                as_chat=section.as_chat,
            ),
        ),
        eval=None,
        eval_share=0.0,
        legs=(response,),
        policy=TokenPolicy(max_length=max_length),
        max_dropped_share=1.0,
        seed=0,
        max_rows=section.max_rows,
    )
    prepared = prepare(spec, tokenizer)
    return _of_rows(prepared.train, response, name, split, prepared.report)


def trained_rows(run_dir: Path, tokenizer: Any, config: Any, steps: int) -> tuple[Documents, Documents | None]:
    """What a run was trained on, and what it was not.

    Trained on are the rows that its steps reached, of those that filters with a model left: both are what the run did,
    by its data report and the plan's own order, and the rows' hash must be the run's. Not trained on are the rows it
    held out; where it held out none, those that its steps did not reach and whose prompts they did not reach either,
    which differ from the others by the draw of the order alone. None where there are neither.

    Args:
        run_dir: a run's.
        tokenizer: of its model.
        config: of its model.
        steps: optimizer steps that it took.
    Raises:
        RunError: its objective trains no response, or its rows are not there any more.
    """
    from align.recipe import read_recipe
    from evals.run_directory import dataset_names, eval_name
    from evals.run_settings import TRAINING

    recipe = read_recipe(run_dir / "recipe.yaml", (), TRAINING)
    spec = assemble.data_spec(recipe, models.max_length(recipe.data.max_length, config))
    response = next((leg for leg in RESPONSES if leg in spec.legs), None)
    if response is None:
        raise RunError(f"{run_dir}: its rows have no response that was trained on; name documents in the evaluation")
    prepared = prepare(spec, tokenizer)
    dropped, read = prepared.report, len(prepared.train.table)
    prepared = _as_trained(prepared, spec, recipe, run_dir)
    train, name = prepared.train, dataset_names(recipe)
    section = recipe.train
    reached = times_trained(len(train.table), section.rows_per_step, steps, section.seed) > 0
    told = {FILTERED: read - len(train.table), NOT_REACHED.format(steps=steps): int((~reached).sum())}
    rows = train if reached.all() else train.take(np.flatnonzero(reached))
    documents = _of_rows(rows, response, name, "trained on", dropped)
    documents = replace(documents, apart={reason: number for reason, number in told.items() if number})
    if prepared.eval is not None:
        return documents, _of_rows(prepared.eval, response, *eval_name(recipe), {})
    other = np.flatnonzero(~np.isin(train.prompts, train.prompts[reached]))
    return documents, _of_rows(train.take(other), response, name, "not reached", {}) if len(other) else None


def _as_trained(prepared: Prepared, spec: DataSpec, recipe: Recipe, run_dir: Path) -> Prepared:
    """The rows that a run's plan was made of, by what its data report says of them."""
    path = run_dir / "data_report.json"
    way_out = "name what was trained on in documents"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        gone, wanted = kept.get("narrowed", []), kept["dataset_hash"]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise RunError(f"{path}, which says what the run was trained on, can't be read ({error}); {way_out}") from None
    if not gone and any(entry.built.needs_model for entry in recipe.filters):
        raise RunError(f"{path} does not say which rows filters with a model left out; {way_out}")
    found = narrowed(prepared, dict.fromkeys(gone, FILTERED), spec)
    if found.report["dataset_hash"] != wanted:
        raise RunError(
            f"the rows that {run_dir} would be trained on now are not those it was trained on (data_report.json has "
            f"another hash): files, tokenizer or template have changed; restore them, or {way_out}"
        )
    return found


def _texts_in(head: Sequence[Any], section: DocumentSection) -> str | None:
    plain = section.format == "auto" and not section.columns and section.response == "auto"
    others = {"prompt", "chosen", "completion", "messages", "responses"}
    columns = {str(column) for raw in head if isinstance(raw, Mapping) for column in raw}
    return "text" if plain and "text" in columns and not columns & others else None


def _response_of(head: Sequence[Any], section: DocumentSection) -> str:
    name = section.dataset_name
    first = [renamed(raw, section.columns) for raw in head]
    form = recognise(first, where=name, name=section.format)
    if section.response != "auto":
        return section.response
    for index, raw in enumerate(first):
        row = to_row(raw, form, source=name, index=index, as_chat=section.as_chat)
        if isinstance(row, Row):
            return "chosen" if row.candidates else next((leg for leg in RESPONSES if leg in row.responses), "gold")
    raise DataError(f"{name}: none of the first {len(head)} rows can be read; name a column of texts with column")


def _of_texts(raws: Iterator[Any], column: str, tokenizer: Any, name: str, split: str) -> Documents:
    given: list[list[int]] = []
    trained: list[list[int]] = []
    dropped = read_rows = 0
    while batch := list(islice(raws, BATCH)):
        read_rows += len(batch)
        texts = [raw.get(column) if isinstance(raw, Mapping) else None for raw in batch]
        usable = [text for text in texts if isinstance(text, str) and text]
        for ids in tokenizer(usable)["input_ids"] if usable else ():
            if len(ids) > 1:
                given.append(ids[:1])
                trained.append(ids[1:])
        dropped = read_rows - len(trained)
    if not trained:
        raise DataError(f"{name}: none of {read_rows} rows has a text of two tokens or more in the column {column!r}")
    return Documents(name=name, split=split, given=Ragged.of(given), trained=Ragged.of(trained), dropped=dropped)


def _of_rows(split: Split, response: str, name: str, called: str, report: Mapping[str, Any]) -> Documents:
    dropped = sum(report.get("dropped", {}).values())
    table = split.table
    return Documents(name=name, split=called, given=table.prompts, trained=table.legs[response], dropped=dropped)


# ---- the same text on both sides ----


def overlapping(control: Sequence[np.ndarray], trained: Ragged, tokens: int) -> np.ndarray:
    """True where a control document holds so many tokens in a row that some trained document holds too; (document,).

    Control documents that are shorter count where a trained document is the same.

    Args:
        control: token ids of each.
        trained: token ids of everything that was trained on; read once, in blocks.
        tokens: in a row, ≥ 1.
    """
    require("tokens", tokens, tokens >= 1, ">= 1")
    whole = {np.asarray(ids, dtype=np.int32).tobytes() for ids in control if len(ids) < tokens}
    windows = [_windows(np.asarray(ids), np.array([0, len(ids)]), tokens) for ids in control]
    wanted = np.unique(np.concatenate([np.empty(0, dtype=np.uint64), *windows]))
    seen, same = np.zeros(len(wanted), dtype=bool), set[bytes]()
    for start in range(0, len(trained), BATCH):
        offsets = np.asarray(trained.offsets[start : start + BATCH + 1])
        ids = np.asarray(trained.values[offsets[0] : offsets[-1]])
        found = _windows(ids, offsets - offsets[0], tokens)
        if len(wanted):
            at = np.minimum(np.searchsorted(wanted, found), len(wanted) - 1)
            seen[at[wanted[at] == found]] = True
        if whole:
            parts = (np.asarray(part, dtype=np.int32).tobytes() for part in np.split(ids, offsets[1:-1] - offsets[0]))
            same.update(part for part in parts if part in whole)
    return np.array(
        [
            np.asarray(ids, dtype=np.int32).tobytes() in same
            if len(ids) < tokens
            else bool(seen[np.searchsorted(wanted, own)].any())
            for ids, own in zip(control, windows, strict=True)
        ],
        dtype=bool,
    )


def _windows(ids: np.ndarray, offsets: np.ndarray, tokens: int) -> np.ndarray:
    """64-bit hashes of all runs of so many tokens that lie within one document."""
    if len(ids) < tokens:
        return np.empty(0, dtype=np.uint64)
    mixed = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    count = len(ids) - tokens + 1
    hashes = np.zeros(count, dtype=np.uint64)
    for step in range(tokens):
        hashes = hashes * np.uint64(0x100000001B3) + mixed[step : step + count]
    first = np.searchsorted(offsets, np.arange(count), side="right")
    return hashes[np.arange(count) + tokens <= offsets[first]]
