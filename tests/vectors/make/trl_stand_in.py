"""The installed TRL's losses on prescribed log-probs: what ``trl_*`` scripts and ``test_oracle`` share.

Loss code is called unbound on stand-ins that have only what it reads. Their models return prescribed log-probs, so that
the gradient with respect to each of them is known. Sequences have one prompt token in front.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl import DPOTrainer, RewardTrainer, SFTTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from tests.vectors.make.writing import (
    ALONE,
    PAIR,
    Legs,
    OfHeads,
    PrescribedLogits,
    PrescribedLogps,
    Ragged,
    Result,
    both_legs,
    in_double,
    logits_of,
    mask_of,
    padded,
    ragged,
)


def dpo(
    legs: Legs,
    *,
    loss_type: str,
    beta: float,
    label_smoothing: float = 0.0,
    tau: float = 0.05,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Result:
    """``DPOTrainer._compute_loss`` on these pairs, and its gradient with respect to each policy log-prob.

    With ``use_weighting`` legs have ``log_sum_p2``. In float64 TRL's casts to single precision are lifted; in any other
    ``dtype`` it runs as it is.
    """
    responses = [row for name in PAIR for row in legs[name]["logps"]]
    width = max(map(len, responses))
    completion = mask_of(responses, width)
    # TRL shifts masks by one, log-probs arrive already shifted.
    completion_mask = torch.cat([torch.zeros_like(completion[:, :1]), completion], dim=1)

    def stacked(key: str) -> Tensor:
        return padded([row for name in PAIR for row in legs[name][key]], width).to(dtype)

    logps = stacked("logps").requires_grad_()
    references = stacked("ref_logps")
    further = {"log_sum_sq_probs": stacked("log_sum_p2")} if use_weighting else {}
    # The fused head that makes these log-probs writes 0 where the label is ignored.
    policy = PrescribedLogps(lambda _: torch.where(completion.bool(), logps, 0.0), **further)
    trainer = SimpleNamespace(
        model=policy,
        ref_model=PrescribedLogps(lambda _: references),
        accelerator=ALONE,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=tau),
        beta=beta,
        label_smoothing=label_smoothing,
        loss_types=[loss_type],
        loss_weights=[1.0],
        f_divergence_type=f_divergence_type,
        f_alpha_divergence_coef=f_alpha_divergence_coef,
        ld_alpha=ld_alpha,
        use_weighting=use_weighting,
        precompute_ref_logps=False,
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
    }
    with in_double() if dtype == torch.float64 else nullcontext():
        loss = DPOTrainer._compute_loss(trainer, policy, inputs, return_outputs=False)
        (slopes,) = torch.autograd.grad(loss, logps)
    return loss.item(), both_legs(slopes, legs)


def dft(rows: Ragged) -> tuple[float, Ragged]:
    """``SFTTrainer.compute_loss`` with ``loss_type="dft"`` on these responses, and its gradient by each log-prob."""
    width = max(map(len, rows))
    mask = mask_of(rows, width)
    logps = padded(rows, width).requires_grad_()
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(**vars(ALONE), parallelism_config=None),
        args=SimpleNamespace(loss_type="dft", average_tokens_across_devices=False),
        aux_loss_enabled=False,
        compute_loss_func=None,
        label_smoother=None,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    model = PrescribedLogps(lambda _: torch.where(mask.bool(), logps, 0.0), label_mask=mask)
    inputs = {"attention_mask": torch.ones_like(mask)}
    loss = SFTTrainer.compute_loss(trainer, model, inputs, num_items_in_batch=mask.sum())
    (slopes,) = torch.autograd.grad(loss, logps)
    return loss.item(), ragged(slopes, rows)


def cpo(
    legs: Legs,
    *,
    loss_type: str,
    beta: float,
    cpo_alpha: float,
    label_smoothing: float = 0.0,
    simpo_gamma: float = 0.0,
    alpha: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> Result:
    """``CPOTrainer.get_batch_loss_metrics`` on these pairs, and its gradient with respect to each log-prob."""
    trainer: Any = object.__new__(CPOTrainer)
    trainer.loss_type = loss_type
    trainer.cpo_alpha = cpo_alpha
    trainer.label_smoothing = label_smoothing
    trainer.simpo_gamma = simpo_gamma
    trainer.alpha = alpha
    trainer.pad_token_id = 0
    return _through_logits(trainer, legs, beta=beta, dtype=dtype)


def orpo(legs: Legs, *, beta: float, prompt: list[list[float]] | None = None) -> Result:
    """``ORPOTrainer.get_batch_loss_metrics`` on these pairs, and its gradient with respect to each log-prob.

    Its NLL is over all tokens of prompt and chosen response but the first of the sequence, which nothing predicts. A
    prompt of one token therefore leaves the NLL to the response. ``prompt`` holds log-probs of further prompt tokens,
    the same number in each row; gradients with respect to them are left out.
    """
    trainer: Any = object.__new__(ORPOTrainer)
    trainer.padding_value = 0
    return _through_logits(trainer, legs, beta=beta, prompt=prompt)


def _through_logits(
    trainer: Any,
    legs: Legs,
    *,
    beta: float,
    prompt: list[list[float]] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Result:
    """Loss and gradient of a trainer that makes its log-probs from logits."""
    responses = [row for name in PAIR for row in legs[name]["logps"]]
    further = (prompt or [[] for _ in legs["chosen"]["logps"]]) * 2
    before = len(further[0])
    width = max(map(len, responses))
    mask = mask_of(responses, width)
    logps = padded(responses, width).to(dtype).requires_grad_()
    predicted = torch.cat([torch.ones_like(mask[:, :before]), mask], dim=1)
    values = torch.cat([padded(further, before).to(dtype), logps], dim=1)
    # Every token has id 0; the last position predicts nothing.
    logits = logits_of(values, predicted, torch.zeros_like(predicted))
    model = PrescribedLogits(torch.cat([logits, torch.zeros_like(logits[:, :1])], dim=1))
    attention = torch.cat([torch.ones_like(mask[:, :1]), predicted], dim=1)
    ignored = torch.full((len(responses), before + 1), -100)
    labels = torch.cat([ignored, torch.where(mask.bool(), 0, -100)], dim=1)
    rows = len(responses) // 2
    batch = {}
    for name, part in zip(PAIR, (slice(0, rows), slice(rows, None)), strict=True):
        batch[f"{name}_input_ids"] = torch.zeros_like(attention[part])
        batch[f"{name}_attention_mask"] = attention[part]
        batch[f"{name}_labels"] = labels[part]
    trainer.beta = beta
    trainer.accelerator = ALONE
    trainer.is_encoder_decoder = False
    trainer.aux_loss_enabled = False
    with in_double() if dtype == torch.float64 else nullcontext():
        loss, _ = trainer.get_batch_loss_metrics(model, batch)
        (slopes,) = torch.autograd.grad(loss, logps)
    return loss.item(), both_legs(slopes, legs)


def reward_model(
    chosen: list[float], rejected: list[float], *, center: float | None = None, margin: list[float] | None = None
) -> OfHeads:
    """``RewardTrainer.compute_loss`` on these outputs of the head, and its gradient by each, under the leg's name."""
    rewards = torch.tensor([chosen + rejected], dtype=torch.float64).T.requires_grad_()
    model = PrescribedLogits(rewards)
    trainer: Any = SimpleNamespace(
        model=model,
        accelerator=ALONE,
        args=SimpleNamespace(center_rewards_coefficient=center),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(len(rewards), 1, dtype=torch.int64)}
    if margin is not None:
        inputs["margin"] = torch.tensor(margin, dtype=torch.float64)
    with in_double():
        loss = RewardTrainer.compute_loss(trainer, model, inputs)
        (slopes,) = torch.autograd.grad(loss, rewards)
    return loss.item(), {leg: part[:, 0].tolist() for leg, part in zip(PAIR, slopes.chunk(2), strict=True)}
