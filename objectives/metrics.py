"""Metrics that several objectives share, under the names dashboards already read."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from objectives.batch import LegBatch
from objectives.output import Mean
from objectives.stats import FLOAT32_SUM


def preference_metrics(
    batch: LegBatch,
    chosen: Float[Tensor, " row"],
    rejected: Float[Tensor, " row"],
    scale: float | Float[Tensor, " row"],
    *,
    per_token: bool = False,
) -> dict[str, Mean]:
    """What every pairwise objective logs.

    Args:
        batch: supplies the policy's log-probs of both legs.
        chosen: rewards of the chosen responses, in the objective's own unit.
        rejected: those of the rejected ones.
        scale: what a nat is worth in that unit (β), for all or for each row.
        per_token: rewards are of mean log-probs rather than of summed ones.
    Returns:
        Rewards, margins, accuracies (a tie counts one half), and summed log-probs of both legs.
    """
    chosen, rejected = chosen.detach(), rejected.detach()
    margins = chosen - rejected
    # A tie is a margin within the rounding of the sums it comes from: before the first update all pairs are ties.
    # What is logged is of whole responses, whatever share of them a modifier lets into the loss.
    legs = [replace(batch[name], share=None, ref_share=None) for name in ("chosen", "rejected")]
    noise = FLOAT32_SUM * scale * sum((x.mean_logps() if per_token else x.sum_logps()).detach().abs() for x in legs)
    wins = torch.where(margins.abs() <= noise, 0.0, torch.sign(margins))
    metrics = {
        "rewards/chosen": Mean.of(chosen),
        "rewards/rejected": Mean.of(rejected),
        "rewards/margins": Mean.of(margins),
        "rewards/accuracies": Mean.of((wins + 1) / 2),
    }
    for name, leg in zip(("chosen", "rejected"), legs, strict=True):
        metrics[f"logps/{name}"] = Mean.of(leg.sum_logps())
        if leg.ref_logps is not None:
            metrics[f"displacement/{name}"] = Mean.of(leg.logratio())
    return metrics


def response_metrics(batch: LegBatch, legs: tuple[str, ...]) -> dict[str, Mean]:
    """Lengths of these legs in tokens, and the summed log-probs of those that no pairwise metric covers."""
    lengths = {f"lengths/{name}": Mean.of(batch[name].length()) for name in legs}
    return lengths | {f"logps/{name}": Mean.of(batch[name].sum_logps()) for name in legs if name == "gold"}


def label_metrics(
    batch: LegBatch, rewards: Float[Tensor, " row"], threshold: Float[Tensor, ""], scale: float
) -> dict[str, Mean]:
    """What every objective on labelled responses logs.

    Args:
        batch: supplies labels and the ``completion`` leg.
        rewards: of the completions.
        threshold: the reward that divides what is taken for desirable from what is not.
        scale: what a nat of summed log-prob is worth in rewards (β).
    Returns:
        Rewards of desirable (``chosen``) and undesirable (``rejected``) rows, the share of rows whose reward lies on
        their label's side of the threshold (a tie counts one half), the threshold, the share of desirable rows,
        log-ratios and summed log-probs by class.
    """
    leg, desirable, rewards = batch["completion"], batch.known("labels"), rewards.detach()
    noise = FLOAT32_SUM * scale * leg.sum_logps().detach().abs()
    distance = torch.where(desirable, rewards - threshold, threshold - rewards)
    wins = torch.where(distance.abs() <= noise, 0.0, torch.sign(distance))
    ratios = leg.logratio()
    return {
        "rewards/chosen": Mean.of(rewards[desirable]),
        "rewards/rejected": Mean.of(rewards[~desirable]),
        "rewards/accuracies": Mean.of((wins + 1) / 2),
        "rewards/threshold": Mean(total=threshold.detach() * batch.rows, count=float(batch.rows)),
        "labels/desirable": Mean.of(desirable.to(rewards)),
        "displacement/chosen": Mean.of(ratios[desirable]),
        "displacement/rejected": Mean.of(ratios[~desirable]),
        "logps/chosen": Mean.of(leg.sum_logps()[desirable]),
        "logps/rejected": Mean.of(leg.sum_logps()[~desirable]),
    }
