"""Metrics that several objectives share, under the names dashboards already read."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from objectives.batch import LegBatch
from objectives.output import Mean
from objectives.stats import FLOAT32_SUM


def preference_metrics(
    batch: LegBatch, chosen: Float[Tensor, " row"], rejected: Float[Tensor, " row"], scale: float
) -> dict[str, Mean]:
    """What every pairwise objective logs.

    Args:
        batch: supplies the policy's log-probs of both legs.
        chosen: rewards of the chosen responses, in the objective's own unit.
        rejected: those of the rejected ones.
        scale: what a nat of summed log-prob is worth in that unit (β).
    Returns:
        Rewards, margins, accuracies (a tie counts one half), and summed log-probs of both legs.
    """
    chosen, rejected = chosen.detach(), rejected.detach()
    margins = chosen - rejected
    # A tie is a margin within the rounding of the sums it comes from: before the first update all pairs are ties.
    noise = FLOAT32_SUM * scale * sum(batch[name].sum_logps().detach().abs() for name in ("chosen", "rejected"))
    wins = torch.where(margins.abs() <= noise, 0.0, torch.sign(margins))
    metrics = {
        "rewards/chosen": Mean.of(chosen),
        "rewards/rejected": Mean.of(rejected),
        "rewards/margins": Mean.of(margins),
        "rewards/accuracies": Mean.of((wins + 1) / 2),
    }
    for name in ("chosen", "rejected"):
        metrics[f"logps/{name}"] = Mean.of(batch[name].sum_logps())
        if batch[name].ref_logps is not None:
            metrics[f"displacement/{name}"] = Mean.of(batch[name].logratio())
    return metrics
