"""Pairs: what objectives on a chosen and a rejected response have in common.

    margin = β·[score(chosen) − score(rejected)] (+ what a modifier adds)

The score of a response is its log-ratio to the reference, or its log-prob where there is no reference, summed or per
token. Modifiers act here: an f-divergence on log-ratios, MM-DPO on β, a length reward on the margin.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from objectives.batch import Leg, LegBatch
from objectives.metrics import preference_metrics
from objectives.needs import Needs
from objectives.output import Output, Term

PAIR = Needs(legs=("chosen", "rejected"))
PAIR_AND_REFERENCE = Needs(legs=("chosen", "rejected"), reference=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Both responses of each row, reduced to numbers."""

    chosen: Float[Tensor, " row"]
    """Reward of the chosen response: β times its log-ratio (or log-prob)."""
    rejected: Float[Tensor, " row"]
    difference: Float[Tensor, " row"]
    """Score of the chosen response − score of the rejected one, nats; margin / β."""
    beta: Float[Tensor, " row"] | float
    per_token: bool

    @property
    def margin(self) -> Float[Tensor, " row"]:
        """β times the difference of scores."""
        return self.beta * self.difference


def pair_of(batch: LegBatch, beta: float, *, reference: bool = True, per_token: bool = False) -> Pair:
    """The pairs of a batch.

    Args:
        batch: with legs ``chosen`` and ``rejected``.
        beta: inverse temperature.
        reference: scores are log-ratios rather than log-probs.
        per_token: scores are divided by the response's length.
    """

    def score(leg: Leg) -> Tensor:
        return leg.logratio() if reference else leg.sum_logps()

    adjust = batch.adjust
    legs = batch["chosen"], batch["rejected"]
    lengths = [leg.length().clamp(min=1) if per_token else 1.0 for leg in legs]
    raw = [score(leg) for leg in legs]
    scores = raw if adjust.divergence is None else [adjust.divergence(each) for each in raw]
    chosen, rejected = (each / length for each, length in zip(scores, lengths, strict=True))
    own = beta if adjust.beta is None else beta * adjust.beta
    difference = chosen - rejected
    if adjust.margin is not None:
        difference = difference + adjust.margin / own
    return Pair(
        chosen=own * raw[0] / lengths[0],
        rejected=own * raw[1] / lengths[1],
        difference=difference,
        beta=own,
        per_token=per_token,
    )


def smoothed(margin: Float[Tensor, " row"], label_smoothing: float = 0.0) -> Float[Tensor, " row"]:
    """−(1−ε)·log σ(margin) − ε·log σ(−margin): cross-entropy with a share ε of flipped labels."""
    if not label_smoothing:
        return -logsigmoid(margin)
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def preference(batch: LegBatch, pair: Pair, losses: Float[Tensor, " row"], **further: Term) -> Output:
    """A preference term averaged over rows, further terms, and the metrics of all pairwise objectives."""
    return Output(
        terms={"preference": Term(values=losses, per="row"), **further},
        metrics=preference_metrics(batch, pair.chosen, pair.rejected, pair.beta, per_token=pair.per_token),
    )
