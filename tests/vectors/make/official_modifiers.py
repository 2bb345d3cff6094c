"""Makes ``modifiers/r_dpo.json``, ``wpo_clamped.json`` and ``ld_dpo_policy.json`` with code of others, in float64.

    git clone https://github.com/ZHZisZZ/modpo
    git -C modpo checkout 2e2df20f73b35b09f88ae1fb7d8e19880a6bc3fc
    git clone https://github.com/wzhouad/WPO
    git -C WPO checkout a1044581c5477328e9e0ceb71c536b5e663747ba
    git clone https://github.com/hiyouga/LLaMA-Factory
    git -C LLaMA-Factory checkout ff6d4d12eeb035d6ce06805a5733dd7b29f2ac30
    python -m tests.vectors.make.official_modifiers modpo WPO LLaMA-Factory

All import packages that need not be installed for this: only what is named is compiled. What is cast to single
precision there is double here. Log-probs are prescribed through logits over two tokens.

R-DPO: its authors published no code. MODPO's reproduces their paper, with −|y| as the reward of a second objective of
weight α (``scripts/modpo/summarize_w_length_penalty``): its lengths are in bfloat16, exact up to 256 tokens.

WPO: the authors' code, in which W is at most 1. ``log_sum_p2`` is that of the two tokens.

LD-DPO on the policy alone: LLaMA-Factory's ``get_batch_logps`` with its ``compute_sigmoid_dpo_loss``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.objectives import transcriptions_pairs as transcriptions
from tests.objectives import transcriptions_pairs_modified as modified
from tests.vectors.make.official_pairs import differentiate
from tests.vectors.make.writing import (
    ALONE,
    IGNORED,
    PAIR,
    SMALL,
    Case,
    Legs,
    Result,
    assert_six_places,
    case,
    excerpt,
    logits_and_labels,
    pair_arrays,
    pairs,
    write,
)

MADE_BY = "tests/vectors/make/official_modifiers.py"
BATCHES: dict[str, Legs] = {"small": SMALL, "ragged": pairs(torch.Generator().manual_seed(39), 5)}
LIKELY = pairs(torch.Generator().manual_seed(40), 5, scale=0.5)
"""Pairs of which some have a W above 1."""


def modpo(checkout: Path, legs: Legs, *, beta: float, alpha: float, loss_type: str) -> Result:
    scope: dict[str, Any] = {"torch": torch, "F": F, "nn": nn, "RewardWrapperInput": SimpleNamespace}
    trainer = excerpt(
        checkout / "src" / "trainer" / "modpo_trainer.py",
        "MODPOTrainer",
        scope,
        methods=("modpo_loss", "get_batch_metrics"),
    )()
    path = checkout / "scripts" / "modpo" / "summarize_w_length_penalty" / "modpo.py"
    penalty = excerpt(
        path, "LengthPenaltyWrapper", {"torch": torch, "dataclass": dataclass, "RewardWrapperBase": object}
    )
    # A response is its list of tokens.
    length_penalty = penalty(tokenizer=lambda responses: {"input_ids": responses})
    trainer.wrapped_margin_reward_model_list = lambda inputs: [length_penalty(inputs)]
    trainer.accelerator, trainer.beta, trainer.loss_type = ALONE, beta, loss_type
    trainer.w = torch.tensor([1.0, alpha], dtype=torch.float64)
    trainer.ref_model = "reference"
    responses = [row for name in PAIR for row in legs[name]["logps"]]
    utils = ModuleType("src.utils")
    utils.prepare_input = lambda values: values  # it moves them to the device

    def loss(logps: Tensor, references: Tensor, _: Tensor) -> Tensor:
        sums = {"policy": logps.sum(dim=1), "reference": references.sum(dim=1)}
        trainer.forward = lambda model, _: (*sums[model].chunk(2), None, None)
        with mock.patch.dict(sys.modules, {"src": ModuleType("src"), "src.utils": utils}):
            return trainer.get_batch_metrics("policy", {"raw_prompt": None, "response": responses})[0]

    return differentiate(legs, loss)[1]


def wpo(checkout: Path, legs: Legs, *, beta: float, label_smoothing: float) -> tuple[Legs, Result]:
    """With the legs' ``log_sum_p2``."""
    trainer = excerpt(
        checkout / "scripts" / "run_wpo.py",
        "WPOTrainer",
        {"torch": torch, "F": F, "nn": nn},
        methods=("get_batch_logps", "dpo_loss"),
    )
    settings = SimpleNamespace(accelerator=ALONE, beta=beta, label_smoothing=label_smoothing, reference_free=False)

    def losses(logps: Tensor, references: Tensor, mask: Tensor) -> Tensor:
        sums, weights = trainer.get_batch_logps(*logits_and_labels(logps, mask))
        ref_sums, _ = trainer.get_batch_logps(*logits_and_labels(references, mask))
        return trainer.dpo_loss(settings, *sums.chunk(2), *ref_sums.chunk(2), weights)[0]

    weighted: Legs = {}
    for name, leg in legs.items():
        p = [torch.tensor(row, dtype=torch.float64).exp() for row in leg["logps"]]
        weighted[name] = {**leg, "log_sum_p2": [(row**2 + (1 - row) ** 2).log().tolist() for row in p]}
    return weighted, differentiate(legs, losses)[1]


def ld_of_policy(checkout: Path, legs: Legs, *, beta: float, label_smoothing: float, alpha: float) -> Result:
    folder = checkout / "src" / "llamafactory"
    scope: dict[str, Any] = {"torch": torch, "F": F, "IGNORE_INDEX": IGNORED}
    get_batch_logps = excerpt(folder / "train" / "trainer_utils.py", "get_batch_logps", scope)
    loss_function = excerpt(folder / "v1" / "trainers" / "dpo_trainer.py", "compute_sigmoid_dpo_loss", scope)

    def losses(logps: Tensor, references: Tensor, mask: Tensor) -> Tensor:
        sums, _ = get_batch_logps(*logits_and_labels(logps, mask), ld_alpha=alpha)
        ref_sums, _ = get_batch_logps(*logits_and_labels(references, mask), ld_alpha=None)
        return loss_function(*sums.chunk(2), *ref_sums.chunk(2), beta=beta, label_smoothing=label_smoothing)

    return differentiate(legs, losses)[1]


def write_r_dpo(checkout: Path) -> None:
    cases: list[Case] = []
    row_losses: dict[str, Callable[..., transcriptions.RowLoss]] = {
        "dpo": lambda beta: transcriptions.dpo(beta=beta),
        "hinge": lambda beta: transcriptions.hinge(beta=beta),
    }
    for batch, legs in BATCHES.items():
        for name, loss_type in (("dpo", "sigmoid"), ("hinge", "hinge")):
            for beta, alpha in ((0.1, 0.05), (0.7, 0.3), (0.1, -0.05)):
                config = {"beta": beta, **({"label_smoothing": 0.0} if name == "dpo" else {})}
                result = modpo(checkout, legs, beta=beta, alpha=alpha, loss_type=loss_type)
                longer = modified.r_dpo(row_losses[name](beta=beta), beta=beta, alpha=alpha)
                check = transcriptions.over_rows(longer, *pair_arrays(legs))
                rest = {"objective": name, "modifier": "r_dpo", "modifier_config": {"length_alpha": alpha}}
                how = f"loss_type={loss_type}, w=(1, {alpha})"
                cases.append(case(f"{batch}-{name}-beta{beta}-{alpha}", how, config, legs, result, check, **rest))
    assert_six_places(cases[0]["loss"], 0.728179)
    source = "ZHZisZZ/modpo at 2e2df20f73b35b09f88ae1fb7d8e19880a6bc3fc, MODPOTrainer.get_batch_metrics, float64"
    write("modifiers/r_dpo", source, MADE_BY, cases, ["torch"])


def write_wpo(checkout: Path) -> None:
    cases: list[Case] = []
    limited = 0
    for batch, legs in {**BATCHES, "likely": LIKELY}.items():
        for config in ({"beta": 0.1, "label_smoothing": 0.0}, {"beta": 0.7, "label_smoothing": 0.1}):
            weighted, result = wpo(checkout, legs, **config)
            arrays = [weighted[leg][key] for key in ("logps", "log_sum_p2") for leg in PAIR]
            weights = modified.wpo_weights(*arrays, clamped=True)
            limited += sum(weight == 1 for weight in weights)
            assert not all(weight == 1 for weight in weights)
            row_loss = transcriptions.dpo(**config)
            check = modified.of_each_row([row_loss] * len(weights), weights, *pair_arrays(legs))
            rest = {"objective": "dpo", "modifier": "wpo", "modifier_config": {"clamp": True}}
            cases.append(case(f"{batch}-beta{config['beta']}", "dpo_loss", config, weighted, result, check, **rest))
    assert limited > 0
    source = "wzhouad/WPO at a1044581c5477328e9e0ceb71c536b5e663747ba, WPOTrainer, float64"
    write("modifiers/wpo_clamped", source, MADE_BY, cases, ["torch"])


def write_ld_of_policy(checkout: Path) -> None:
    cases: list[Case] = []
    for batch, legs in BATCHES.items():
        for smoothing, alpha in ((0.0, 0.5), (0.0, 0.0), (0.1, 0.5)):
            config = {"beta": 0.1, "label_smoothing": smoothing}
            result = ld_of_policy(checkout, legs, **config, alpha=alpha)
            row_loss = transcriptions.dpo(**config)
            check = modified.ld_dpo(row_loss, *pair_arrays(legs), alpha=alpha, reference=False)
            settings = {"ld_alpha": alpha, "applies_to": "policy"}
            rest = {"objective": "dpo", "modifier": "ld_dpo", "modifier_config": settings}
            name = f"{batch}-{alpha}" + ("-smoothed" if smoothing else "")
            cases.append(case(name, f"ld_alpha={alpha}", config, legs, result, check, **rest))
    assert_six_places(cases[0]["loss"], 0.729269)
    source = "hiyouga/LLaMA-Factory at ff6d4d12eeb035d6ce06805a5733dd7b29f2ac30, get_batch_logps, float64"
    write("modifiers/ld_dpo_policy", source, MADE_BY, cases, ["torch"])


def main(of_modpo: Path, of_wpo: Path, of_llama_factory: Path) -> None:
    write_r_dpo(of_modpo)
    write_wpo(of_wpo)
    write_ld_of_policy(of_llama_factory)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
