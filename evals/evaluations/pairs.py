"""Evaluations of pairs, all from one pass over them: ranking, CHES, reward models."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from align.errors import RunError
from evals.evaluation import EVALS, EvalNeeds, Found
from objectives.checks import require

if TYPE_CHECKING:
    from evals.context import Context, PairTable
    from evals.ranking import Pairs
    from evals.results import Result
    from evals.run_settings import Job

BETAS = (0.01, 0.1, 1.0, 5.0, 10.0)


@EVALS.register("ranking")
@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Ranking accuracy of policy and reference, summed and per token, idealised accuracy and gap, flow, difficulty.

    References:
        Chen et al. 2024, arXiv:2405.19534.
    """

    betas: tuple[float, ...] = BETAS
    """Grid of β for the idealised accuracy; the paper's."""
    alpha: float | str = 0.75
    """Share of raters who prefer the chosen response, for the idealised accuracy: one number for all pairs (results
    then say that it is simulated), or data: the column rater_share of each row."""

    @property
    def needs(self) -> EvalNeeds:
        """Raters' shares where they are asked for."""
        return EvalNeeds(pairs=True, columns=("rater_share",) if self.alpha == "data" else ())

    def __post_init__(self) -> None:
        require("betas", self.betas, bool(self.betas) and all(beta > 0 for beta in self.betas), "numbers > 0")
        fine = self.alpha == "data" if isinstance(self.alpha, str) else 0 < self.alpha < 1
        require("alpha", self.alpha, fine, "in (0, 1), or data")

    def check(self, job: Job) -> None:
        """Nothing that settings tell."""

    def __call__(self, context: Context) -> Found:
        """See ``evals.ranking`` and ``evals.idealised``; all pairs, then each dataset and group of rows."""
        from evals.parts import marked, parts_of
        from evals.ranking import rank
        from evals.scores import Scores

        table = context.pairs
        _refuse_reward_model(context, "ranking")
        where: dict[str, Any] = {"dataset": table.dataset, "split": table.name, "step": context.step}
        everything, conditions = np.ones(len(table), dtype=bool), _conditions(context)
        parts, left_out = parts_of(table.split, range(len(table)), table.dataset, table.name)
        whole = rank(pairs_of(table))
        results = [
            *_under(conditions, whole.results(**where)),
            *_under(conditions, self._idealised(table, everything, where)),
        ]
        if left_out:
            results[0] = replace(results[0], extra={**results[0].extra, "groups_left_out": left_out})
        for part in parts:
            if not pairs_of(table, part.members).usable().any():
                continue
            own = {**where, "dataset": part.dataset, "split": part.split}
            found = rank(pairs_of(table, part.members)).results(**own)
            with contextlib.suppress(ValueError):  # raters tie all pairs of the part, which then has no ideal
                found += self._idealised(table, part.members, own)
            results += marked(_under(conditions, found), table.dataset, table.name)
        scores = [
            Scores(metric=name, **where, by_prompt={str(prompt): score for prompt, score in by.items()})
            for name, by in whole.by_prompt.items()
        ]
        return Found(results=results, scores=scores)

    def _idealised(self, table: PairTable, members: np.ndarray, where: Mapping[str, Any]) -> list[Result]:
        """Accuracy of the optimum on some of the pairs, and the gap to it; nothing without a reference."""
        from evals.idealised import alignment_gap

        pairs = pairs_of(table, members)
        if pairs.ref_chosen is None or pairs.ref_rejected is None:
            return []
        alpha = table["column/rater_share"][members] if self.alpha == "data" else self.alpha
        assert not isinstance(alpha, str)
        simulated = {} if self.alpha == "data" else {"simulated_alpha": self.alpha}
        found: list[Result] = []
        for lengths in ({}, {"length_chosen": pairs.length_chosen, "length_rejected": pairs.length_rejected}):
            measured = alignment_gap(
                pairs.policy_chosen,
                pairs.policy_rejected,
                pairs.ref_chosen,
                pairs.ref_rejected,
                alpha,
                betas=self.betas,
                prompts=pairs.prompts,
                **lengths,
            )
            found += measured.results(**where, extra=simulated)
        return found


@EVALS.register("ches")
@dataclass(frozen=True, kw_only=True)
class Ches:
    """CHES of every pair under the reference, and how well it foretells the displacement of the chosen response.

    References:
        Razin et al. 2024, arXiv:2410.08847.
    """

    edit_similarity: bool = False
    """Also the edit distance of both responses, the paper's baseline: milliseconds a pair."""

    needs: ClassVar[EvalNeeds] = EvalNeeds(pairs=True, states=True)

    def check(self, job: Job) -> None:
        """Nothing that settings tell."""

    def __call__(self, context: Context) -> Found:
        """See ``evals.ches``."""
        from evals.ches import displacement, edit_distance, measure
        from evals.scores import Scores

        table = context.pairs
        _refuse_reward_model(context, "ches")
        scores = {name: table[name] for name in ("ches", "ln_ches", "last_hidden")}
        if self.edit_similarity:
            chosen, rejected = (table.split.table.legs[leg] for leg in ("chosen", "rejected"))
            scores["edit_similarity"] = np.array(
                [-edit_distance(chosen[row].tolist(), rejected[row].tolist()) for row in range(len(table))]
            )
        pairs = pairs_of(table)
        change, warnings = None, []
        if pairs.ref_chosen is not None:
            change = pairs.policy_chosen - pairs.ref_chosen
            if not np.ptp(change[np.isfinite(change)]) > 0:
                change = None
                warnings.append("policy and reference are alike: there is no displacement that CHES could foretell")
        where: dict[str, Any] = {"dataset": table.dataset, "split": table.name, "step": context.step}
        extra = _conditions(context)
        results = measure(scores, change, table.prompts).results(**where, extra=extra)
        if pairs.ref_chosen is not None and pairs.ref_rejected is not None:
            moved = displacement(
                pairs.policy_chosen, pairs.policy_rejected, pairs.ref_chosen, pairs.ref_rejected, table.prompts
            )
            results += moved.results(**where, extra=extra)
        kept = {name: _by_prompt(values, table.prompts) for name, values in scores.items()}
        return Found(
            results=results,
            scores=[Scores(metric=f"ches/{name}", **where, by_prompt=by) for name, by in kept.items() if by],
            warnings=warnings,
        )


@EVALS.register("reward_model")
@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """Accuracy and calibration of a reward model on pairs, whole, per group of rows and per strength of preference."""

    needs: ClassVar[EvalNeeds] = EvalNeeds(pairs=True, reward_model=True)

    def check(self, job: Job) -> None:
        """Nothing that settings tell."""

    def __call__(self, context: Context) -> Found:
        """See ``evals.reward_model``."""
        from align.value_head import output_names
        from evals import reward_model
        from evals.parts import marked, parts_of
        from evals.scores import Scores
        from objectives.stats import beats

        table = context.pairs
        if not context.is_reward_model:
            raise RunError(f"evals: reward_model measures models with a scalar head, and {context.job.name} has none")
        names = output_names(context.config)
        by_row = {f"length_{leg}": table[f"length/{leg}"] for leg in ("chosen", "rejected")}
        for leg in ("chosen", "rejected"):
            for number, name in enumerate(names):
                by_row[f"value_{leg}/{name}"] = table[f"policy/value/{leg}/{number}"]
        where: dict[str, Any] = {"dataset": table.dataset, "split": table.name, "step": context.step}
        results = reward_model.measure(by_row, table.prompts, **where)
        parts, left_out = parts_of(table.split, range(len(table)), table.dataset, table.name)
        if left_out:
            results[0] = replace(results[0], extra={**results[0].extra, "groups_left_out": left_out})
        apart: list[Result] = []
        for part in parts:
            own = {key: values[part.members] for key, values in by_row.items()}
            prompts = [prompt for prompt, member in zip(table.prompts, part.members, strict=True) if member]
            named = {**where, "dataset": part.dataset, "split": part.split}
            apart += reward_model.measure(own, prompts, **named, part=True)
        apart += reward_model.apart(by_row, table.prompts, **where)
        results += marked(apart, table.dataset, table.name)
        right = beats(table["policy/value/chosen/0"], table["policy/value/rejected/0"])
        groups = np.array(list(table.split.groups) if len(table.split.groups) else [""] * len(table))
        results += _reward_bench(right, groups, where)
        scores = Scores(metric="reward_model/accuracy", **where, by_prompt=_by_prompt(right, table.prompts))
        return Found(results=results, scores=[scores])


def _under(conditions: Mapping[str, Any], results: Sequence[Result]) -> list[Result]:
    return [replace(each, extra={**conditions, **each.extra}) for each in results]


def _conditions(context: Context) -> dict[str, Any]:
    """What numbers of pairs depend on besides the policy, as ``evals.compare`` reads it."""
    report = context.pairs.report
    return {
        "template": context.template,
        "reference": context.reference_fingerprint,
        "dataset_hash": report["dataset_hash"],
        "max_length": report["max_length"],
        "truncation": report["truncation"],
    }


def pairs_of(table: PairTable, rows: np.ndarray | None = None) -> Pairs:
    """The pairs of a table as ``evals.ranking.rank`` takes them.

    Args:
        table: scored pairs.
        rows: mask of those wanted; None for all.
    """
    from evals.ranking import Pairs

    keep = np.ones(len(table), dtype=bool) if rows is None else rows
    numbers: Mapping[str, np.ndarray] = table.numbers

    def of(key: str) -> np.ndarray | None:
        return numbers[key][keep] if key in numbers else None

    return Pairs(
        policy_chosen=numbers["policy/sum/chosen"][keep],
        policy_rejected=numbers["policy/sum/rejected"][keep],
        length_chosen=numbers["length/chosen"][keep],
        length_rejected=numbers["length/rejected"][keep],
        prompts=[prompt for prompt, kept in zip(table.prompts, keep, strict=True) if kept],
        ref_chosen=of("reference/sum/chosen"),
        ref_rejected=of("reference/sum/rejected"),
    )


def _reward_bench(right: np.ndarray, groups: np.ndarray, where: Mapping[str, Any]) -> list[Any]:
    """Sections of RewardBench, where groups are its subsets; a tie is wrong there."""
    from evals.ranking import share_of
    from evals.reward_bench import PRIOR, SECTIONS, reward_bench

    known = {name for counts in SECTIONS.values() for name in counts} | set(PRIOR)
    strict = (right == 1).astype(np.float64)
    subsets = {
        name: share_of(strict[groups == name], range(int((groups == name).sum())))
        for name in dict.fromkeys(groups.tolist())
        if name in known
    }
    return reward_bench(subsets).results(**where) if subsets else []


def _by_prompt(values: np.ndarray, prompts: list[str]) -> dict[str, float]:
    from evals.context import by_prompt_of

    return by_prompt_of(values, prompts)


def _refuse_reward_model(context: Context, name: str) -> None:
    if context.is_reward_model:
        raise RunError(f"evals: {name} needs a language model, and {context.job.name} is a reward model")
