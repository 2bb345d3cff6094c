"""Reward models: a scalar head on the last token, trained on preferences, on ratings, or on both.

Where the others of this package read log-probs, these read ``Leg.value``: the output of a scalar head at the response's
last token. A model has either a language model's head or a scalar one, so they don't mix with the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from objectives.batch import LegBatch
from objectives.checks import require
from objectives.columns import COLUMNS
from objectives.needs import Needs
from objectives.output import Mean, Output, Term
from objectives.registry import OBJECTIVES

LEGS = ("chosen", "rejected")


@OBJECTIVES.register("bradley_terry")
@dataclass(frozen=True, slots=True, kw_only=True)
class BradleyTerry:
    """Bradley-Terry reward model: the chosen response has the higher reward, by the log-odds of the preference.

        loss = −log σ(r_w − r_l) + c·(r_w + r_l)²

    with r_w and r_l the scalar head's outputs at the last token of the chosen and the rejected response; averaged over
    rows. Equal rewards of 0 cost log 2. c > 0 centres rewards at 0, which the preference leaves open.

    References:
        Ouyang et al. 2022, arXiv:2203.02155, Eq. 1; centring of Eisenstein et al. 2023, arXiv:2312.09244, as in TRL's
        RewardTrainer.
    """

    center_rewards_coefficient: float = 0.0
    """c ≥ 0; 0.01 is suggested."""
    attribute: str = "reward"
    """Output of the head that is trained; name one of a model that was trained by ``reward_regression`` to go on."""

    step0: ClassVar[None] = None

    def __post_init__(self) -> None:
        c = self.center_rewards_coefficient
        require("center_rewards_coefficient", c, 0 <= c < math.inf, ">= 0 and finite, 0.01 in TRL's documentation")
        require("attribute", self.attribute, bool(self.attribute.strip()), "the name of an output")

    @property
    def needs(self) -> Needs:
        return Needs(legs=LEGS, values=(self.attribute,))

    def __call__(self, batch: LegBatch) -> Output:
        chosen, rejected = (batch[leg].value(self.attribute) for leg in LEGS)
        losses = -logsigmoid(chosen - rejected)
        terms = {"preference": Term(values=losses, per="row")}
        if self.center_rewards_coefficient:
            square = (chosen + rejected) ** 2
            terms["centring"] = Term(values=square, per="row", coef=self.center_rewards_coefficient)
        return Output(terms=terms, metrics=_metrics(chosen, rejected))


@OBJECTIVES.register("margin_bt")
@dataclass(frozen=True, slots=True, kw_only=True)
class MarginBT:
    """Bradley-Terry with a margin: clearly better responses should be further ahead.

        loss = −log σ(r_w − r_l − m),    m = score(chosen) − score(rejected)

    with r_w and r_l the scalar head's outputs; averaged over rows. m is the strength of the preference (1, 2, 3 in
    HelpSteer2), from both scores or a ``margin`` column; rewards are led to its scale.

    References:
        Touvron et al. 2023 (Llama 2), arXiv:2307.09288, Eq. 2; Wang et al. 2024, arXiv:2410.01257, Eq. 2.
    """

    attribute: str = "reward"
    """Output of the head that is trained."""

    step0: ClassVar[None] = None

    def __post_init__(self) -> None:
        require("attribute", self.attribute, bool(self.attribute.strip()), "the name of an output")

    @property
    def needs(self) -> Needs:
        return Needs(legs=LEGS, values=(self.attribute,), scores=LEGS)

    def __call__(self, batch: LegBatch) -> Output:
        chosen, rejected = (batch[leg].value(self.attribute) for leg in LEGS)
        losses = -logsigmoid(chosen - rejected - _strength(batch, chosen))
        return Output(
            terms={"preference": Term(values=losses, per="row")},
            metrics={**_metrics(chosen, rejected), "rewards/strength": Mean.of(_strength(batch, chosen))},
        )


@OBJECTIVES.register("scaled_bt")
@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledBT:
    """Scaled Bradley-Terry: clearly better responses count more.

        loss = −m·log σ(r_w − r_l),    m = max(0, score(chosen) − score(rejected))

    with r_w and r_l the scalar head's outputs; averaged over rows, not over weights. m is the strength of the
    preference (1, 2, 3 in HelpSteer2), from both scores or a ``margin`` column: it is as if the row occurred m times.

    HelpSteer2's recipe: first ``reward_regression`` on helpfulness, then this from that model, with
    ``attribute: helpfulness``.

    References:
        Wang et al. 2024 (HelpSteer2-Preference), arXiv:2410.01257, Eq. 3.
    """

    attribute: str = "reward"
    """Output of the head that is trained; ``helpfulness`` to go on from a regression on it."""

    step0: ClassVar[None] = None

    def __post_init__(self) -> None:
        require("attribute", self.attribute, bool(self.attribute.strip()), "the name of an output")

    @property
    def needs(self) -> Needs:
        return Needs(legs=LEGS, values=(self.attribute,), scores=LEGS)

    def __call__(self, batch: LegBatch) -> Output:
        chosen, rejected = (batch[leg].value(self.attribute) for leg in LEGS)
        strength = _strength(batch, chosen).clamp(min=0)
        return Output(
            terms={"preference": Term(values=-strength * logsigmoid(chosen - rejected), per="row")},
            metrics={**_metrics(chosen, rejected), "rewards/strength": Mean.of(strength)},
        )


@OBJECTIVES.register("reward_regression")
@dataclass(frozen=True, slots=True, kw_only=True)
class RewardRegression:
    """Regression on ratings: each output of the head predicts one attribute of the completion.

        loss = mean over the row's rated attributes of (r_a − score_a)²

    averaged over rows. An attribute without a rating in a row is left out of that row; a row without any is dropped
    when the data is read, and counted. NeMo-Aligner divides by the ratings of a microbatch instead, where rows with
    more ratings count more and the loss depends on how a step is split.

    ``attributes: [score]`` reads the score of scored responses, or a ``score`` column; other names are columns
    (``helpfulness``, ``correctness``, … in HelpSteer2). The outputs of the head are named after them.

    References:
        Wang et al. 2024 (HelpSteer2), arXiv:2406.08673, and arXiv:2410.01257, section 3.1.
    """

    attributes: tuple[str, ...] = ("score",)
    """Columns with ratings, one output of the head for each."""

    step0: ClassVar[None] = None

    def __post_init__(self) -> None:
        names = self.attributes
        holds = bool(names) and all(name.strip() for name in names) and len(set(names)) == len(names)
        holds = holds and not {"chosen", "rejected", "gold", *COLUMNS} & set(names)
        expected = f"different names of columns with ratings, none of them a response's, {' or '.join(COLUMNS)}"
        require("attributes", names, holds, expected)

    @property
    def needs(self) -> Needs:
        return Needs(legs=("completion",), values=self.attributes, scores=self.attributes)

    def __call__(self, batch: LegBatch) -> Output:
        values = torch.stack([batch["completion"].value(name) for name in self.attributes], dim=-1)
        ratings = torch.stack([batch.score(name) for name in self.attributes], dim=-1).to(values)
        rated = ratings.isfinite()
        squares = (values.where(rated, 0.0) - ratings.where(rated, 0.0)) ** 2
        losses = squares.sum(dim=-1) / rated.sum(dim=-1).clamp(min=1)
        found = {"rewards/mean": Mean.of(values), "ratings/mean": Mean.of(ratings[rated])}
        errors = (values.detach() - ratings).abs()[rated]
        return Output(
            terms={"regression": Term(values=losses, per="row")},
            metrics={**found, "ratings/absolute_error": Mean.of(errors)},
        )


def _strength(batch: LegBatch, like: Tensor) -> Float[Tensor, " row"]:
    return (batch.score("chosen") - batch.score("rejected")).to(like)


def _metrics(chosen: Float[Tensor, " row"], rejected: Float[Tensor, " row"]) -> dict[str, Mean]:
    margins = (chosen - rejected).detach()
    return {
        "rewards/chosen": Mean.of(chosen),
        "rewards/rejected": Mean.of(rejected),
        "rewards/margins": Mean.of(margins),
        "rewards/accuracies": Mean.of((torch.sign(margins) + 1) / 2),
    }
