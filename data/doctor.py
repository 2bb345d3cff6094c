"""The data doctor: what is wrong with a run's data, before anything is trained.

    python -m data check --config RECIPE        every check, what mends it, and the rows to look at

Rows are looked at as they were read, after the recipe's own filters; what needs a tokenizer is read off the preparation
that the run itself would do, and stays in its cache.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np

from data.doctor_rows import CHECKS, Patient
from data.doctor_tokens import dropped_rows, token_findings
from data.errors import DataError
from data.filtering import surveyed
from data.findings import Diagnosis, Finding
from data.gathering import DataSpec, load, names_of
from data.preparation import prepare
from data.rowstore import RowStore
from data.sources import LoadedRows
from data.store import cache_dir
from data.traits import MARKERS, Traits
from data.workers import Workers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LIBRARIES = ("align-preferences", "datasets", "tokenizers", "transformers", "rensa")
BINS = 30
"""Of a histogram."""
TAIL = 0.99
"""Share of the lengths that bins of equal width cover; the last bin holds the rest."""


def examine(
    spec: DataSpec,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    against: Sequence[str] = (),
    ngram: int = 13,
    threshold: float = 0.8,
    shingle: int = 3,
    near: bool = True,
    command: str = "",
    workers: Workers | None = None,
) -> Diagnosis:
    """All findings about the data of a run.

    Args:
        spec: what the run would read.
        tokenizer: without one, what needs tokens is left out.
        against: evaluation sets to look for in the training rows.
        ngram: words of the n-grams that are looked for.
        threshold: least similarity of near duplicates.
        shingle: words of their shingles.
        near: whether to look for near duplicates.
        command: the command line, for the file.
        workers: look at large datasets.
    Raises:
        DataError: the data can't be read, or a filter does not fit it.
    """
    specials = MARKERS if tokenizer is None else tuple(dict.fromkeys([*MARKERS, *tokenizer.all_special_tokens]))
    own = Workers() if workers is None else workers
    with own, RowStore(cache_dir() / "rows") as store:
        loaded, held = load(spec, own, store)
        rows = surveyed(loaded, held, own, specials=specials)
        patient = Patient(
            rows=rows,
            loaded=loaded,
            held_out=_held_out(spec),
            against=tuple(against),
            ngram=ngram,
            threshold=threshold,
            shingle=shingle,
            near=near,
            max_dropped_share=spec.max_dropped_share,
        )
        findings = [finding for check in CHECKS for finding in check(patient)]
        distributions = _distributions(rows.traits)
        number = len(rows)
        chat = not any(kind.text for kind in rows.rows.kinds())
    if tokenizer is not None:
        findings, more = _with_tokens(findings, spec, tokenizer, chat=chat)
        distributions |= more
    return Diagnosis(
        dataset=names_of(spec),
        rows=number,
        findings=findings,
        distributions=distributions,
        sources=[_source(each) for each in loaded],
        versions=versions(),
        command=command,
    )


def _held_out(spec: DataSpec) -> str:
    if spec.eval is not None:
        return spec.eval.dataset_name
    if spec.eval_share == 0:
        return ""
    return f"{spec.eval_share:g} of the prompts are held out, and no row with one of them is trained on"


def _source(loaded: LoadedRows) -> dict[str, Any]:
    return {
        "source": loaded.source,
        "format": loaded.format,
        "rows": len(loaded.rows),
        "without_use": len(loaded.problems),
    }


def _with_tokens(
    findings: list[Finding], spec: DataSpec, tokenizer: PreTrainedTokenizerBase, *, chat: bool
) -> tuple[list[Finding], dict[str, Any]]:
    try:
        # However many rows are lost: that is for the finding to say.
        prepared = prepare(replace(spec, max_dropped_share=1.0), tokenizer)
    except DataError as error:
        lost = Finding(check="preparation", verdict="fault", text=f"No run can start: {error}.", key="see the sentence")
        return [lost, *findings], {}
    lost = dropped_rows(prepared.report, spec.max_dropped_share)
    findings = [lost if each.check == "dropped" else each for each in findings]
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int)
    legs = prepared.train.table.legs
    lengths = {f"tokens_{leg}": legs[leg].lengths() for leg in legs}
    return [*findings, *token_findings(prepared, eos, chat=chat)], _histograms(lengths)


def _distributions(traits: Traits) -> dict[str, Any]:
    lengths = {
        f"length_{leg}": values[values >= 0]
        for leg, values in ((leg, traits.length(leg)) for leg in ("chosen", "rejected", "gold", "completion"))
        if (values >= 0).any()
    }
    scores = np.concatenate([traits.candidate_scores, traits.scores[~np.isnan(traits.scores)]])
    found = _histograms(lengths)
    if len(scores):
        counts, edges = np.histogram(scores, bins=BINS)
        found["scores"] = {"edges": [round(float(each), 6) for each in edges], "counts": counts.tolist()}
    return found


def _histograms(lengths: dict[str, np.ndarray]) -> dict[str, Any]:
    """Counts of lengths in the same bins, so that they can be drawn over each other."""
    if not lengths:
        return {}
    every = np.concatenate(list(lengths.values()))
    most, last = int(every.max(initial=1)), max(int(np.quantile(every, TAIL)), 1)
    edges = np.unique(np.ceil(np.linspace(0, last, min(BINS, last) + 1)).astype(np.int64))
    edges = np.append(edges, most + 1) if most >= edges[-1] else edges
    return {
        name: {"edges": edges.tolist(), "counts": np.histogram(values, bins=edges)[0].tolist()}
        for name, values in lengths.items()
    }


def versions() -> dict[str, str]:
    """Of what reads and compares the rows."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
