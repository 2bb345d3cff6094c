"""Filters: rows of a dataset that are left out before anything is made of them. ``FILTERS`` are what ``filter:`` names.

A filter sees all training rows as they were read, before reward transforms, rule, relabelers and tokens, and says which
leave. Filters run in their order, each on what the one before left. The evaluation set stays as it is, so that runs
can be compared. ``python -m data check --write`` removes rows by the same code.

A filter that needs numbers of a model (``needs_model = True``, see ``ModelFilter``) sees training rows as tokens, after
all others and whatever its place in the list: a run, and ``data check``, score the rows that are left under the initial
policy or a reward model, once. What says which rows leave is ``leaving`` in either case.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np

from objectives.checks import require
from objectives.registry import Registry

if TYPE_CHECKING:
    from data.surveyed import Surveyed

FILTERS = Registry(
    "filter",
    elsewhere={"dedup": "exact_duplicates", "minhash": "near_duplicates", "shared_prompts": "shared_with_eval"},
)
"""Everything a recipe's ``filter`` section can name."""

Mask = np.ndarray
"""Whether, for each row, bool, (row,)."""


class Filter(Protocol):
    """What a filter is: a frozen dataclass whose fields are its keys."""

    needs_model: ClassVar[bool]
    reason: ClassVar[str]
    """Why a row leaves; names no content, so that rows can be counted by it."""

    def refuse(self, rows: Surveyed) -> str | None:
        """Why it can have no effect on such rows; None where it can."""
        ...

    def leaving(self, rows: Surveyed, stays: Mask) -> Mask:
        """Which of the rows that are still there leave."""
        ...


@runtime_checkable
class ModelFilter(Protocol):
    """What a filter is that needs numbers of a model: a frozen dataclass whose fields are its keys."""

    needs_model: ClassVar[bool]
    reason: ClassVar[str]

    @property
    def column(self) -> str:
        """Which number of a pair decides: one of those that ``evals.row_scores`` has."""
        ...

    @property
    def judge(self) -> str | None:
        """The reward model whose numbers are needed; None for those of the initial policy."""
        ...

    def leaving(self, scores: np.ndarray, stays: Mask) -> Mask:
        """Which of the pairs that are still there leave.

        Args:
            scores: of every pair, NaN where it has none: such a pair stays, (row,).
            stays: whether each pair is still there.
        """
        ...


@FILTERS.register("exact_duplicates")
@dataclass(frozen=True, slots=True, kw_only=True)
class ExactDuplicates:
    """Rows that are the same as an earlier one: prompt, responses, scores and label.

    leaves(i)  ⇔  row j = row i for some j < i
    """

    needs_model: ClassVar[bool] = False
    reason: ClassVar[str] = "the same as an earlier row"

    def refuse(self, rows: Surveyed) -> str | None:
        return None

    def leaving(self, rows: Surveyed, stays: Mask) -> Mask:
        from data.duplicates import later_copies

        found = np.zeros(len(rows), dtype=bool)
        found[stays] = later_copies(rows.traits.contents[stays])
        return found


@FILTERS.register("same_answers")
@dataclass(frozen=True, slots=True, kw_only=True)
class SameAnswers:
    """Rows with a response that an earlier row, which stays, has for the same prompt.

        leaves(i)  ⇔  responses i ∩ responses j ≠ ∅ for some j < i of the same prompt that stays

    Of pairs made of a ranking, what stays shares no response, so that none counts twice.
    """

    needs_model: ClassVar[bool] = False
    reason: ClassVar[str] = "an earlier row has one of its responses"

    def refuse(self, rows: Surveyed) -> str | None:
        return None

    def leaving(self, rows: Surveyed, stays: Mask) -> Mask:
        from data.duplicates import answers_of_rows_that_stay

        return answers_of_rows_that_stay(rows.traits.answers, rows.traits.answered, stays)


@FILTERS.register("near_duplicates")
@dataclass(frozen=True, slots=True, kw_only=True)
class NearDuplicates:
    """Rows that are nearly the same as an earlier one that stays.

        leaves(i)  ⇔  min over pieces of |A ∩ B| / |A ∪ B| ≥ threshold for some j < i that stays

    Pieces are the prompt and each response, as sets of word n-grams; found by MinHash, and checked exactly.

    References:
        Broder 1997, On the resemblance and containment of documents; Lee et al. 2021, arXiv:2107.06499.
    """

    threshold: float = 0.8
    """Least Jaccard similarity of prompts and of responses, in [0.5, 1]."""
    ngram: int = 3
    """Words of a shingle, in [1, 13]; shorter texts are compared whole."""

    needs_model: ClassVar[bool] = False
    reason: ClassVar[str] = "nearly the same as an earlier row"

    def __post_init__(self) -> None:
        require("threshold", self.threshold, 0.5 <= self.threshold <= 1, "in [0.5, 1]")
        require("ngram", self.ngram, 1 <= self.ngram <= 13, "in [1, 13]")

    def refuse(self, rows: Surveyed) -> str | None:
        return None

    def leaving(self, rows: Surveyed, stays: Mask) -> Mask:
        from data.duplicates import near_copies

        return near_copies(rows, stays, threshold=self.threshold, ngram=self.ngram)


@FILTERS.register("identical_pairs")
@dataclass(frozen=True, slots=True, kw_only=True)
class IdenticalPairs:
    """Pairs whose responses differ in nothing but white space and letter case.

        leaves(i)  ⇔  fold(chosen) = fold(rejected)

    Pairs that are equal to the letter are never read, whatever the filters.
    """

    needs_model: ClassVar[bool] = False
    reason: ClassVar[str] = "chosen and rejected differ in white space or letter case only"

    def refuse(self, rows: Surveyed) -> str | None:
        return _no_pairs(rows, "data.rule makes none of equal responses")

    def leaving(self, rows: Surveyed, stays: Mask) -> Mask:
        return stays & rows.traits.has("identical_pairs")


@FILTERS.register("length_ratio")
@dataclass(frozen=True, slots=True, kw_only=True)
class LengthRatio:
    """Pairs of which one response is many times as long as the other, against a model that learns length.

    leaves(i)  ⇔  max(|chosen|, |rejected|) > most · min(|chosen|, |rejected|),    in characters
    """

    most: float = 4.0
    """How many times as long as the shorter response the longer one may be, ≥ 1."""

    needs_model: ClassVar[bool] = False
    reason: ClassVar[str] = "one response is many times as long as the other"

    def __post_init__(self) -> None:
        require("most", self.most, math.isfinite(self.most) and self.most >= 1, ">= 1 and finite")

    def refuse(self, rows: Surveyed) -> str | None:
        return _no_pairs(rows, "data.max_length_ratio does this for scored responses")

    def leaving(self, rows: Surveyed, stays: Mask) -> Mask:
        chosen, rejected = rows.traits.length("chosen"), rows.traits.length("rejected")
        pair = (chosen >= 0) & (rejected >= 0)
        return stays & pair & (np.maximum(chosen, rejected) > self.most * np.minimum(chosen, rejected))


@FILTERS.register("shared_with_eval")
@dataclass(frozen=True, slots=True, kw_only=True)
class SharedWithEval:
    """Training rows whose prompt is in the evaluation set.

    leaves(i)  ⇔  prompt i ∈ prompts of data.eval_dataset_name
    """

    needs_model: ClassVar[bool] = False
    reason: ClassVar[str] = "the evaluation set has its prompt"

    def refuse(self, rows: Surveyed) -> str | None:
        if rows.held is not None:
            return None
        return (
            "there is no data.eval_dataset_name to compare with, and prompts that data.eval_share holds out are in "
            "one half only"
        )

    def leaving(self, rows: Surveyed, stays: Mask) -> Mask:
        return stays & rows.shared_prompts()


@FILTERS.register("overlap")
@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Rows that share a word n-gram with the texts of evaluation sets.

        leaves(i)  ⇔  grams(prompt i, responses i) ∩ grams(evaluation sets) ≠ ∅

    In lower case and without punctuation; texts of fewer than n words are compared whole.

    References:
        Brown et al. 2020, arXiv:2005.14165, appendix C (n = 13).
    """

    against: tuple[str, ...]
    """Files or folders of evaluation sets, or Hub ids: every text in them counts."""
    ngram: int = 13
    """Words of a gram, in [5, 50]."""

    needs_model: ClassVar[bool] = False
    reason: ClassVar[str] = "it shares words in a row with an evaluation set"

    def __post_init__(self) -> None:
        named = bool(self.against) and all(isinstance(name, str) and name.strip() for name in self.against)
        require("against", list(self.against), named, "a list of files")
        require("ngram", self.ngram, 5 <= self.ngram <= 50, "in [5, 50]")

    @classmethod
    def example(cls) -> Overlap:
        """An instance, where one is needed to show keys."""
        return cls(against=("eval.jsonl",))

    def refuse(self, rows: Surveyed) -> str | None:
        return None

    def leaving(self, rows: Surveyed, stays: Mask) -> Mask:
        from data.overlap import overlaps

        return stays & overlaps(rows, self.against, self.ngram)


@FILTERS.register("echo")
@dataclass(frozen=True, slots=True, kw_only=True)
class Echo:
    """Rows of which a response starts with what was asked.

    leaves(i)  ⇔  some response begins with the prompt, or with its last question,    at least 12 characters
    """

    needs_model: ClassVar[bool] = False
    reason: ClassVar[str] = "a response starts with what was asked"

    def refuse(self, rows: Surveyed) -> str | None:
        return None

    def leaving(self, rows: Surveyed, stays: Mask) -> Mask:
        return stays & rows.traits.has("echo")


@FILTERS.register("contradictions")
@dataclass(frozen=True, slots=True, kw_only=True)
class Contradictions:
    """Rows that say the opposite of another: the same pair the other way round, one completion labelled good and bad.

        leaves(i)  ⇔  some j has the same prompt and responses, and the other one is better

    All of them leave: which one is right, the data does not say.
    """

    needs_model: ClassVar[bool] = False
    reason: ClassVar[str] = "another row says the opposite"

    def refuse(self, rows: Surveyed) -> str | None:
        if rows.pairs.any() or rows.labelled.any():
            return None
        return "the rows have neither pairs of chosen and rejected nor labels"

    def leaving(self, rows: Surveyed, stays: Mask) -> Mask:
        from data.duplicates import contradictory

        return contradictory(rows.traits.compared, rows.traits.side, stays)


@FILTERS.register("ches")
@dataclass(frozen=True, slots=True, kw_only=True)
class Ches:
    """Pairs whose responses are most alike in the initial policy's eyes: training on them takes probability from both.

        leaves(i)  ⇔  score(i) is among the round(share · n) highest,    LN-CHES = ⟨m⁺, m⁻ − m⁺⟩,  m = S/tokens

    S sums the final hidden states that predict a response's tokens; of equal scores the later row leaves.

    References:
        Razin et al. 2024, arXiv:2410.08847 (Def. 2 and 3, section 6).
    """

    share: float = 0.05
    """Share of the pairs that leave, in (0, 1); at least one does."""
    kind: Literal["ln_ches", "ches"] = "ln_ches"
    """ln_ches: of mean states. ches: of sums, ⟨S⁺, S⁻ − S⁺⟩, which grows with the length of the rejected response."""

    needs_model: ClassVar[bool] = True
    reason: ClassVar[str] = "its responses are too alike for the initial policy (CHES)"

    def __post_init__(self) -> None:
        require("share", self.share, 0 < self.share < 1, "in (0, 1)")

    @property
    def column(self) -> str:
        return self.kind

    @property
    def judge(self) -> str | None:
        return None

    def leaving(self, scores: np.ndarray, stays: Mask) -> Mask:
        return _highest(scores, stays, self.share)


@FILTERS.register("label_noise")
@dataclass(frozen=True, slots=True, kw_only=True)
class LabelNoise:
    """Pairs of which a model prefers the rejected response, and by most.

        leaves(i)  ⇔  s(i) > margin,  and s(i) is among the round(share · n) highest

        reference:     s = log π(rejected)/tokens − log π(chosen)/tokens    of the initial policy, nats
        reward model:  s = score(rejected) − score(chosen)                   log-odds, of one trained by Bradley-Terry

    A model that is wrong removes what is right: look at the rows first (``python -m data check``).
    """

    reward_model: str | None = None
    """Folder or Hub id of a reward model with the policy's tokenizer; null asks the initial policy."""
    share: float = 0.05
    """Largest share of the pairs that leaves, in (0, 1]; at least one does."""
    margin: float = 0.0
    """How much more the rejected response must be preferred, ≥ 0."""

    needs_model: ClassVar[bool] = True
    reason: ClassVar[str] = "a model prefers the rejected response"

    def __post_init__(self) -> None:
        named = self.reward_model is None or bool(self.reward_model.strip())
        require("reward_model", self.reward_model, named, "a folder, a Hub id, or null")
        require("share", self.share, 0 < self.share <= 1, "in (0, 1]")
        require("margin", self.margin, math.isfinite(self.margin) and self.margin >= 0, ">= 0 and finite")

    @property
    def column(self) -> str:
        return "reference_margin" if self.reward_model is None else "reward_margin"

    @property
    def judge(self) -> str | None:
        return self.reward_model

    def leaving(self, scores: np.ndarray, stays: Mask) -> Mask:
        return _highest(scores, stays, self.share) & (scores > self.margin)


def _highest(scores: np.ndarray, stays: Mask, share: float) -> Mask:
    """The pairs with the highest scores of those that stay and have one; of equal ones the last in the dataset."""
    own = np.flatnonzero(stays & np.isfinite(scores))
    found = np.zeros(len(scores), dtype=bool)
    if len(own):
        found[own[np.argsort(scores[own], kind="stable")[-max(1, round(share * len(own))) :]]] = True
    return found


def _no_pairs(rows: Surveyed, other: str) -> str | None:
    return None if rows.pairs.any() else f"the rows have no pairs of chosen and rejected ({other})"
