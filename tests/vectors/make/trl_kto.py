"""Makes ``kto.json`` and ``apo_zero_unpaired.json`` with the loss code of the installed TRL, in float64.

    python -m tests.vectors.make.trl_kto

``_compute_loss`` runs on a trainer made without its constructor, whose models return prescribed log-probs. ``state``
holds z₀ as TRL computed it from the mismatched responses: the mean of their log-ratios, not below 0, in nats. It is a
constant of the gradient, so the gradient for the mismatched responses is 0.

z₀ here comes from this batch alone. Over several processes TRL takes the mean of the processes' means.

``apo_zero_unpaired`` has no z₀, and no mismatched responses.
"""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from trl import KTOTrainer

from tests.objectives import transcriptions, transcriptions_pairs_free
from tests.vectors.make.writing import (
    ALONE,
    SMALL,
    Case,
    Legs,
    PrescribedLogps,
    Ragged,
    Result,
    assert_six_places,
    case,
    mask_of,
    padded,
    ragged,
    random_leg,
    write,
)


def trl_loss(legs: Legs, labels: list[bool], config: dict[str, Any], loss_type: str = "kto") -> tuple[Result, float]:
    """TRL's loss on these responses, its gradient with respect to each log-prob, and its z₀, NaN where it has none."""
    width = {name: max(map(len, leg["logps"])) for name, leg in legs.items()}
    mask = {name: mask_of(leg["logps"], width[name]) for name, leg in legs.items()}
    logps = {name: padded(leg["logps"], width[name]).requires_grad_() for name, leg in legs.items()}
    references = {name: padded(leg["ref_logps"], width[name]) for name, leg in legs.items()}
    completion_mask = {name: torch.cat([torch.zeros_like(m[:, :1]), m], dim=1) for name, m in mask.items()}

    def model(values: dict[str, torch.Tensor]) -> PrescribedLogps:
        """The fused head writes 0 where the label is ignored. Token id 1 marks the mismatched responses."""

        def answer(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            name = "mismatched" if inputs["input_ids"][0, 0] == 1 else "completion"
            return torch.where(mask[name].bool(), values[name], 0.0)

        return PrescribedLogps(answer)

    trainer = object.__new__(KTOTrainer)
    trainer.model = model(logps)
    trainer.ref_model = model(references)
    trainer.accelerator = ALONE
    trainer.args = SimpleNamespace(gradient_checkpointing_kwargs=None)
    trainer.beta = config["beta"]
    trainer.desirable_weight = config["desirable_weight"]
    trainer.undesirable_weight = config["undesirable_weight"]
    trainer.loss_type = loss_type
    trainer.calculate_KL = loss_type == "kto"
    trainer.precompute_ref_logps = False
    trainer.aux_loss_enabled = False
    trainer._metrics = defaultdict(lambda: defaultdict(list))
    trainer._total_train_tokens = 0
    trainer._tp_size = 1
    inputs = {
        "input_ids": torch.zeros_like(completion_mask["completion"]),
        "attention_mask": torch.ones_like(completion_mask["completion"]),
        "completion_mask": completion_mask["completion"],
        "label": torch.tensor(labels),
    }
    if loss_type == "kto":
        inputs["KL_input_ids"] = torch.ones_like(completion_mask["mismatched"])
        inputs["KL_attention_mask"] = torch.ones_like(completion_mask["mismatched"])
        inputs["KL_completion_mask"] = completion_mask["mismatched"]
    loss = trainer._compute_loss(trainer.model, inputs, return_outputs=False)
    slopes = torch.autograd.grad(loss, list(logps.values()), allow_unused=True, materialize_grads=True)
    grad = {name: ragged(slope, legs[name]["logps"]) for name, slope in zip(logps, slopes, strict=True)}
    (kl,) = trainer._metrics["train"].get("kl", [math.nan])
    return (loss.item(), grad), kl


def without_reference_point(name: str, legs: Legs, labels: list[bool], config: dict[str, Any]) -> Case:
    result, _ = trl_loss(legs, labels, config, "apo_zero_unpaired")
    completion = legs["completion"]
    check = transcriptions_pairs_free.apo_zero_unpaired(completion["logps"], completion["ref_logps"], labels, **config)
    return case(name, "loss_type=apo_zero_unpaired", config, legs, result, check, labels=labels)


def make_case(name: str, how: str, legs: Legs, labels: list[bool], config: dict[str, Any]) -> Case:
    result, kl = trl_loss(legs, labels, config)
    completion, mismatched = legs["completion"], legs["mismatched"]
    expected_kl = transcriptions.kto_reference_point(mismatched["logps"], mismatched["ref_logps"])
    assert abs(kl - expected_kl) < 1e-13, (kl, expected_kl)
    assert not any(any(row) for row in result[1]["mismatched"])
    check = transcriptions.kto(completion["logps"], completion["ref_logps"], labels, kl=kl, **config)
    return case(name, how, config, legs, result, check, labels=labels, state={"kl": kl})


def files() -> dict[str, list[Case]]:
    """The cases of each file that this script writes."""
    generator = torch.Generator().manual_seed(23)
    responses = {key: SMALL["chosen"][key] + SMALL["rejected"][key] for key in ("logps", "ref_logps")}
    rotated: dict[str, Ragged] = {
        "logps": [[-1.0, -0.5], [-0.5, -1.0, -1.5], [-2.0, -0.75], [-1.25, -0.25]],
        "ref_logps": [[-1.5, -0.7], [-0.75, -1.0, -1.25], [-2.25, -0.5], [-1.25, -0.75]],
    }
    raised: dict[str, Ragged] = {"logps": rotated["ref_logps"], "ref_logps": rotated["logps"]}
    drawn = {name: random_leg(generator, 6, reference=True) for name in ("completion", "mismatched")}
    swapped = {"logps": drawn["mismatched"]["ref_logps"], "ref_logps": drawn["mismatched"]["logps"]}
    labels = [True, True, False, False]
    plain = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    weighted = {"beta": 0.5, "desirable_weight": 0.8, "undesirable_weight": 1.33}
    above = "mismatched log-ratios with a positive mean"
    below = "mismatched log-ratios with a negative mean, so z₀ = 0"
    cases = []
    small = {"completion": responses, "mismatched": rotated}
    small_below = {"completion": responses, "mismatched": raised}
    cases.append(make_case("small", above, small, labels, plain))
    cases.append(make_case("small-weighted", above, small, labels, weighted))
    cases.append(make_case("small-clamped", below, small_below, labels, plain))
    cases.append(make_case("small-desirable", "one class, " + above, small, [True] * 4, weighted))
    cases.append(make_case("small-undesirable", "one class, " + above, small, [False] * 4, weighted))
    mixed = [False, True, True, False, True, False]
    for name, legs in (("drawn", drawn), ("drawn-swapped", {**drawn, "mismatched": swapped})):
        point = transcriptions.kto_reference_point(legs["mismatched"]["logps"], legs["mismatched"]["ref_logps"])
        cases.append(make_case(name, above if point > 0 else below, legs, mixed, weighted))
    alone = {"completion": responses}
    unpaired = [
        without_reference_point("small", alone, labels, plain),
        without_reference_point("small-weighted", alone, labels, weighted),
        without_reference_point("small-desirable", alone, [True] * 4, weighted),
        without_reference_point("small-undesirable", alone, [False] * 4, weighted),
        without_reference_point("drawn", {"completion": drawn["completion"]}, mixed, weighted),
    ]
    # 1 − σ(0), 1 − σ(−0.025), σ(−0.05), σ(0.1)
    assert_six_places(unpaired[0]["loss"], (0.5 + 0.506250 + 0.487503 + 0.524979) / 4)
    return {"kto": cases, "apo_zero_unpaired": unpaired}


def main() -> None:
    for name, cases in files().items():
        source = "trl, KTOTrainer._compute_loss, float64"
        write(name, source, "tests/vectors/make/trl_kto.py", cases, ["torch", "trl"])


if __name__ == "__main__":
    main()
