"""Memorisation: what a model continues word for word, and what its losses give away, always against a control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from align.errors import RecipeError, RunError
from evals.evaluation import EVALS, EvalNeeds, Found
from objectives.checks import require

if TYPE_CHECKING:
    from evals.context import Context
    from evals.documents import Documents
    from evals.measured import Measured
    from evals.run_settings import Job

NAMES = {"extraction/exact": "exact", "extraction/longest_prefix": "longest_prefix"}
"""What generations.jsonl says of each continuation."""


@dataclass(frozen=True, kw_only=True)
class DocumentSection:
    """Where documents come from."""

    dataset_name: str
    """Hub id, or a local file or folder (json, jsonl, parquet, arrow, csv, also .gz): texts, or rows for training."""
    dataset_config: str | None = None
    """Name of the dataset's configuration on the Hub."""
    split: str = "train"
    """Which split to read; of a single file, all of it."""
    column: str | None = None
    """Column of whole texts. Default: text where rows have it, else rows are prompts with responses."""
    response: Literal["auto", "gold", "chosen", "completion", "rejected"] = "auto"
    """Of rows with responses: the one that was trained on. auto: the first of gold, chosen and completion."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our column names to theirs, e.g. {prompt: question, chosen: better}."""
    format: str = "auto"
    """How rows are written; auto recognises it."""
    as_chat: bool = False
    """Turn plain strings and HH transcripts into messages, rendered with the chat template."""
    max_rows: int | None = None
    """Read only this many rows."""

    def __post_init__(self) -> None:
        if self.max_rows is not None:
            require("max_rows", self.max_rows, self.max_rows >= 1, ">= 1")
        if self.column is not None and (self.response != "auto" or self.columns or self.as_chat):
            raise ValueError("column names whole texts, which have no prompt: remove response, columns and as_chat")


@EVALS.register("memorisation")
@dataclass(frozen=True, kw_only=True)
class Memorisation:
    """Extraction and membership inference on documents that were trained on, against a control that was not.

    Extraction: the model continues the beginning of a document greedily; how much of the rest does it write?
    Membership: how well its losses tell documents from control, alone and calibrated by the reference. Documents that
    are too short, and control documents that share text with training, are left out and counted.

    References:
        Hans et al. 2024, arXiv:2406.10209; Shi et al. 2024, arXiv:2310.16789.
    """

    documents: DocumentSection | None = None
    """What was trained on. Default, for a run: the rows that its steps reached, without those that filters left out."""
    control: DocumentSection | None = None
    """Documents of the same kind that were never trained on. Default, for a run: the rows that it held out, or, where
    it held out none, those that its steps did not reach."""
    suffix_tokens: int = 50
    """Tokens at the end of a document that the model has to write by itself."""
    prefix_tokens: int | None = None
    """Tokens at its beginning that the model is shown; a document is cut after these and the suffix. Default: all that
    come before the suffix."""
    max_length: int = 2048
    """Tokens after which documents are cut, or the model's context if that is smaller."""
    max_documents: int = 500
    """Documents that are measured on either side, drawn by out.seed where there are more."""
    overlap_tokens: int = 50
    """A control document that shares so many tokens in a row with any training document is left out."""

    needs: ClassVar[EvalNeeds] = EvalNeeds(samples=True)

    def __post_init__(self) -> None:
        for key in ("suffix_tokens", "overlap_tokens"):
            require(key, getattr(self, key), getattr(self, key) >= 1, ">= 1")
        if self.prefix_tokens is not None:
            require("prefix_tokens", self.prefix_tokens, self.prefix_tokens >= 1, ">= 1")
        require("max_documents", self.max_documents, self.max_documents >= 2, ">= 2")
        least = self.suffix_tokens + (self.prefix_tokens or 1)
        require("max_length", self.max_length, self.max_length >= least, f">= {least}, prefix and suffix together")
        if self.documents is not None and self.documents == self.control:
            raise ValueError("control names the same rows as documents; name documents that were never trained on")

    def check(self, job: Job) -> None:
        """Refuses a job without documents, or without a control."""
        for key in ("documents", "control"):
            if getattr(self, key) is None and job.run_dir is None:
                raise RecipeError(
                    f"evals: memorisation needs {key}; write {key}: {{dataset_name: …}}, which only a run's own folder "
                    "makes superfluous"
                )

    def __call__(self, context: Context) -> Found:
        """See ``evals.memorisation`` and ``evals.membership``."""
        from align.model import context_length
        from evals.membership import membership
        from evals.memorisation import over_control

        longest = min(self.max_length, context_length(context.config) or self.max_length)
        trained, control = self._both(context, longest)
        rng = np.random.default_rng(context.job.out.seed)
        of_trained, short_trained = self._chosen(trained, longest, rng)
        of_control, short_control, shared = self._apart(trained, control, longest, rng)
        sides = ((trained, of_trained), (control, of_control))
        for (side, rows), short in zip(sides, (short_trained, short_control), strict=True):
            if len(rows) < 2:
                raise RunError(
                    f"{len(rows)} of {len(side)} documents of {side.name} ({side.split}) can be used: "
                    f"{short} are too short"
                    + (f", {shared} are in the training documents too" if side is control else "")
                    + "; lower suffix_tokens or prefix_tokens, or name other documents"
                )
        scores = self._scores(context, sides, longest)
        found: list[Measured] = []
        generations: list[Any] = []
        engine = ""
        for side, rows in sides:
            measured, engine, written = self._extracted(context, side, rows, longest)
            found.append(measured)
            generations += written
        extra = {
            "template": context.template,
            "sampling": {"temperature": 0.0, "max_tokens": self.suffix_tokens},
            "engine": engine,
            "prefix_tokens": self.prefix_tokens,
            "suffix_tokens": self.suffix_tokens,
            "max_length": longest,
            "documents": {
                "of": len(trained),
                "too_short": short_trained,
                "unusable": trained.dropped,
                **({"not_trained_on": dict(trained.apart)} if trained.apart else {}),
            },
            "control": {
                "dataset": control.name,
                "split": control.split,
                "of": len(control),
                "too_short": short_control,
                "unusable": control.dropped,
                "also_trained_on": shared,
            },
            "reference": context.job.compared_with,
            "seed": context.job.out.seed,
        }
        where: dict[str, Any] = {"dataset": trained.name, "split": trained.split, "step": context.step}
        beside: dict[str, Any] = {**where, "dataset": control.name, "split": f"{control.split} (control)"}
        results = [
            *found[0].results(**where, extra=extra),
            *found[1].results(**beside, extra=extra),
            *over_control(*found).results(**where, extra=extra),
            *membership(*scores).results(**where, extra=extra),
        ]
        warnings = [
            f"{number} of the run's training rows do not count as trained on: {reason}"
            for reason, number in trained.apart.items()
        ]
        if shared:
            warnings.append(f"{shared} control documents are in the training documents too, and were left out")
        if context.job.compared_with is None:
            warnings.append("there is no reference, so that membership can't be calibrated: set reference.model")
        by_document = [*found[0].scores(**where), *found[1].scores(**beside)]
        return Found(results=results, scores=by_document, generations=generations, warnings=warnings)

    def _both(self, context: Context, longest: int) -> tuple[Documents, Documents]:
        from evals.documents import read_documents, trained_rows

        run_dir = context.job.run_dir
        trained = control = None
        if run_dir is not None and (self.documents is None or self.control is None):
            trained, control = trained_rows(run_dir, context.tokenizer, context.config, context.step)
        if self.documents is not None:
            trained = read_documents(self.documents, context.tokenizer, longest)
        if self.control is not None:
            control = read_documents(self.control, context.tokenizer, longest)
        assert trained is not None
        if control is None:
            raise RunError(
                f"{run_dir} held out no rows (data.eval_share 0) and its steps reached all of the others, so there is "
                "no control; name documents that were never trained on in control"
            )
        context.say(
            f"memorisation: {len(trained)} documents of {trained.name}, control {len(control)} of {control.name}"
        )
        return trained, control

    def _fitting(self, documents: Documents, longest: int) -> np.ndarray:
        """Documents whose withheld tokens are there, after everything that is given; (document,)."""
        given, trained = documents.given.lengths(), documents.trained.lengths()
        ends = np.minimum(given + trained, self._cut(longest))
        whole = given + trained >= self._cut(longest) if self.prefix_tokens is not None else np.ones(len(given), bool)
        return whole & (ends - self.suffix_tokens >= given)

    def _cut(self, longest: int) -> int:
        return longest if self.prefix_tokens is None else self.prefix_tokens + self.suffix_tokens

    def _chosen(self, documents: Documents, longest: int, rng: np.random.Generator) -> tuple[list[int], int]:
        """The documents that are measured, and how many are too short."""
        fits = np.flatnonzero(self._fitting(documents, longest))
        chosen = rng.permutation(fits)[: self.max_documents]
        return sorted(chosen.tolist()), len(documents) - len(fits)

    def _apart(
        self, trained: Documents, control: Documents, longest: int, rng: np.random.Generator
    ) -> tuple[list[int], int, int]:
        """Control documents that training did not see, how many are too short, and how many it did see."""
        from evals.documents import overlapping

        fits = np.flatnonzero(self._fitting(control, longest))
        order, kept, shared = rng.permutation(fits).tolist(), list[int](), 0
        while order and len(kept) < self.max_documents:
            some, order = order[: self.max_documents], order[self.max_documents :]
            seen = overlapping([control.trained[row] for row in some], trained.trained, self.overlap_tokens)
            shared += int(seen.sum())
            kept += [row for row, was in zip(some, seen, strict=True) if not was]
        return sorted(kept[: self.max_documents]), len(control) - len(fits), shared

    def _scores(
        self, context: Context, sides: Sequence[tuple[Documents, list[int]]], longest: int
    ) -> list[dict[str, np.ndarray]]:
        """Scores of every attack, of trained documents and control."""
        from data.store import Ragged, TokenTable
        from evals.membership import attack_scores, least_probable, zlib_bytes

        tables = [side.table(rows, longest) for side, rows in sides]
        legs = [table.legs["document"] for table in tables]
        both = TokenTable(
            Ragged.of([table.prompts[row].tolist() for table in tables for row in range(len(table))]),
            {"document": Ragged.of([leg[row].tolist() for leg in legs for row in range(len(leg))])},
        )
        numbers = context.under_models(
            both, of_logps=lambda _, logps, mask: {"min_k": least_probable(logps, mask)}, what="documents"
        )
        tokens = both.legs["document"].lengths()
        texts = [_text(context, both.legs["document"][row].tolist()) for row in range(len(both))]
        calibrated = "reference/sum/document" in numbers
        found = attack_scores(
            -numbers["policy/sum/document"] / tokens,
            tokens,
            np.array([zlib_bytes(text) for text in texts]),
            -numbers["reference/sum/document"] / tokens if calibrated else None,
            numbers["policy/min_k"],
        )
        first = len(tables[0])
        return [{name: v[:first] for name, v in found.items()}, {name: v[first:] for name, v in found.items()}]

    def _extracted(
        self, context: Context, side: Documents, rows: list[int], longest: int
    ) -> tuple[Measured, str, list[Any]]:
        """Extraction of documents, the engine that continued them, and what it wrote."""
        from align.samples import prompt_id
        from evals.generations_file import Generation
        from evals.memorisation import extraction, split_document

        cut = {"withheld": self.suffix_tokens, "max_length": self._cut(longest)}
        parts = [split_document(side.ids(row).tolist(), **cut) for row in rows]
        split = [part for part in parts if part is not None]
        assert len(split) == len(rows), "documents that are too short were left out before"
        drawn, engine = context.continued([given for given, _ in split], self.suffix_tokens, side.name)
        written = [list(each.token_ids) for each in drawn]
        ends = [withheld for _, withheld in split]
        texts = [(_text(context, end), _text(context, own)) for end, own in zip(ends, written, strict=True)]
        names = [side.name_of(row) for row in rows]
        measured = extraction(ends, written, texts, names)
        about: Mapping[str, Any] = {
            "dataset": side.name,
            "split": f"{side.split}, continued",
            "step": context.step,
            "model": context.job.name,
        }
        generations = [
            Generation(
                **about,
                prompt_id=prompt_id(_text(context, given)),
                prompt=_text(context, given),
                sample=0,
                text=own,
                finish_reason=each.finish_reason,
                tokens=len(each.token_ids),
                scores={metric: float(measured.by_prompt[metric][name]) for metric in NAMES},
            )
            for (given, _), (_, own), each, name in zip(split, texts, drawn, names, strict=True)
        ]
        return measured, engine, generations


def _text(context: Context, ids: Sequence[int]) -> str:
    return str(context.tokenizer.decode(list(ids), skip_special_tokens=True))
