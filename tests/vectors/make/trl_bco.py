"""Makes ``bco.json`` with the loss code of TRL 1.13.0, the last release that has a BCO trainer, in float64.

    pip download trl==1.13.0 --no-deps --dest WHEELS
    unzip WHEELS/trl-1.13.0-py3-none-any.whl -d TRL
    PYTHONPATH=TRL python -m tests.vectors.make.trl_bco

``get_batch_loss_metrics`` runs on a trainer made without its constructor, with log-probs prescribed through logits over
two tokens and with prompt embeddings whose classifier answers prescribed probabilities.

The running shift is TRL's, updated before use and carried from batch to batch. ``state`` holds what it has summed up
so far, the current batch included: δ = reward_total / reward_count. TRL keeps δ in single precision; here the two
casts that do so are lifted, which moves δ by less than 10⁻⁶, asserted below.

TRL's density ratio is p / (1 − p + 10⁻⁸), clamped; ``density_ratio`` is that quotient before the clamp, the 10⁻⁸
included. It is written for desirable rows too, which TRL and we weigh with 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from trl.experimental.bco.bco_trainer import BCOTrainer, RunningMoments

from tests.objectives import transcriptions
from tests.vectors.make.writing import (
    ALONE,
    SMALL,
    Legs,
    PrescribedLogits,
    Ragged,
    Result,
    case,
    logits_of,
    mask_of,
    padded,
    ragged,
    random_leg,
    write,
)

Batch = tuple[Legs, list[bool]]


class Answers:
    """Stands where the classifier of prompts would: the probability of row i is at place i."""

    def __init__(self, probabilities: Sequence[float]) -> None:
        self.probabilities = np.array(probabilities)

    def predict_proba(self, embeddings: np.ndarray) -> np.ndarray:
        desirable = self.probabilities[embeddings[:, 0].astype(int) - 1]
        return np.stack([1 - desirable, desirable], axis=1)


def make_trainer(running: RunningMoments, config: dict[str, Any], probabilities: list[float] | None) -> BCOTrainer:
    trainer = object.__new__(BCOTrainer)
    trainer.accelerator = ALONE
    trainer.args = SimpleNamespace(
        min_density_ratio=config["min_density_ratio"], max_density_ratio=config["max_density_ratio"]
    )
    trainer.beta = config["beta"]
    trainer.running = running
    trainer.is_encoder_decoder = False
    trainer.aux_loss_enabled = False
    trainer.embedding_func = None
    trainer.embedding_tokenizer = None
    if probabilities is not None:
        # The embedding of row i is the number i + 1; 0 is the padding.
        trainer.embedding_func = lambda input_ids, attention_mask: input_ids.double()
        trainer.embedding_tokenizer = SimpleNamespace(pad_token_id=0)
        trainer.processing_class = SimpleNamespace(pad_token_id=0)
        trainer.clf = Answers(probabilities)
    return trainer


def trl_loss(trainer: BCOTrainer, legs: Legs, labels: list[bool]) -> Result:
    """TRL's loss on these responses, and its gradient with respect to each log-prob."""
    responses = legs["completion"]["logps"]
    width = max(map(len, responses))
    mask = mask_of(responses, width)
    logps = padded(responses, width).requires_grad_()
    logits = logits_of(logps, mask, torch.zeros_like(mask))
    # One prompt token in front, and a last position that predicts nothing.
    model = PrescribedLogits(torch.cat([logits, torch.zeros_like(logits[:, :1])], dim=1))
    ignored = torch.full_like(mask[:, :1], -100)
    prompts = torch.arange(1, len(responses) + 1)[:, None]
    batch = {
        "completion_input_ids": torch.zeros(len(responses), width + 1, dtype=torch.int64),
        "completion_attention_mask": torch.ones(len(responses), width + 1, dtype=torch.int64),
        "completion_labels": torch.cat([ignored, torch.where(mask.bool(), 0, -100)], dim=1),
        "label": labels,
        "reference_logps": padded(legs["completion"]["ref_logps"], width).sum(dim=1),
        "embedding_input_ids": prompts,
        "embedding_attention_mask": torch.ones_like(prompts),
    }
    loss, _ = trainer.get_batch_loss_metrics(model, batch)
    (slopes,) = torch.autograd.grad(loss, logps)
    return loss.item(), {"completion": ragged(slopes, responses)}


def rewards(legs: Legs, beta: float) -> list[float]:
    completion = legs["completion"]
    pairs: zip[tuple[list[float], list[float]]] = zip(completion["logps"], completion["ref_logps"], strict=True)
    return [beta * (math.fsum(policy) - math.fsum(reference)) for policy, reference in pairs]


def run(
    name: str, batches: Sequence[Batch], config: dict[str, Any], probabilities: Sequence[list[float]] | None = None
) -> list[dict[str, object]]:
    """Consecutive batches of one training run, one case each."""
    running = RunningMoments(ALONE)
    in_single_precision = RunningMoments(ALONE)
    cases = []
    seen: list[float] = []
    for i, (legs, labels) in enumerate(batches):
        trainer = make_trainer(running, config, None if probabilities is None else probabilities[i])
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            result = trl_loss(trainer, legs, labels)
        seen = seen + rewards(legs, config["beta"])
        in_single_precision.update(torch.tensor(rewards(legs, config["beta"])))
        state = {"reward_total": math.fsum(seen), "reward_count": len(seen)}
        delta = state["reward_total"] / state["reward_count"]
        assert math.isclose(running.mean, delta, rel_tol=1e-12, abs_tol=1e-15)
        assert math.isclose(in_single_precision.mean, delta, abs_tol=1e-6)
        rest: dict[str, Any] = {"labels": labels, "state": state}
        limits: dict[str, Any] = {}
        if probabilities is not None:
            rest["density_ratio"] = [p / (1 - p + 1e-8) for p in probabilities[i]]
            limits = {
                "density_ratio": rest["density_ratio"],
                "minimum": config["min_density_ratio"],
                "maximum": config["max_density_ratio"],
            }
        completion: dict[str, Ragged] = legs["completion"]
        check = transcriptions.bco(
            completion["logps"], completion["ref_logps"], labels, beta=config["beta"], delta=delta, **limits
        )
        how = f"batch {i + 1} of a run" + (", weighted by prompt" if probabilities is not None else "")
        cases.append(case(f"{name}-{i + 1}", how, config, legs, result, check, **rest))
    return cases


def main() -> None:
    torch.set_default_dtype(torch.float64)
    generator = torch.Generator().manual_seed(22)

    def random_batch(labels: list[bool]) -> Batch:
        return {"completion": random_leg(generator, len(labels), reference=True)}, labels

    small: Batch = (
        {"completion": {key: SMALL["chosen"][key] + SMALL["rejected"][key] for key in ("logps", "ref_logps")}},
        [True, True, False, False],
    )
    mixed = random_batch([False, True, True, False, False])
    desirable = random_batch([True, True, True])
    undesirable = random_batch([False, False])
    single = random_batch([True])
    plain = {"beta": 0.1, "prompt_encoder": None, "min_density_ratio": 0.5, "max_density_ratio": 10.0}
    weighted = {**plain, "prompt_encoder": "policy"}
    cases = [
        *run("mixed", [small, mixed, mixed], plain),
        *run("one-class", [desirable, undesirable, single, small], {**plain, "beta": 0.7}),
        *run("weighted", [small, mixed], weighted, [[0.5, 0.3, 0.2, 0.9], [0.35, 0.8, 0.1, 0.99, 0.6]]),
        *run(
            "weighted-within-0.8-and-1.5",
            [mixed, undesirable],
            {**weighted, "min_density_ratio": 0.8, "max_density_ratio": 1.5},
            [[0.35, 0.8, 0.1, 0.99, 0.5], [0.55, 0.01]],
        ),
    ]
    source = "trl 1.13.0, BCOTrainer.get_batch_loss_metrics, float64"
    write("bco", source, "tests/vectors/make/trl_bco.py", cases, ["torch", "trl"])


if __name__ == "__main__":
    main()
