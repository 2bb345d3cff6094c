"""Makes ``rpo.json`` with the authors' code of Regularized Preference Optimization, in float64.

    git clone https://github.com/YSLIU627/Regularized-Preference-Optimization
    git -C Regularized-Preference-Optimization checkout d0389c4d9a8ab031cf25edd20a3e5fe283ee2c40
    python -m tests.vectors.make.official_rpo Regularized-Preference-Optimization

``cumulative`` is ``dpo_loss`` of alignment-handbook/scripts/rpo_trainer.py with its η, ``average`` is ``DPOLoss`` of
their OpenRLHF plus ``nll_loss_coef`` = η times the NLL that its trainer's ``concatenated_forward`` returns; the sum
itself, one line of the training loop, is repeated here. Both files import packages that need not be installed for this:
only the functions named are compiled. Log-probs are prescribed through logits over two tokens.

The authors take η below 10⁻⁶ (cumulative) or 10⁻⁸ (average) for 0. No case is near.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.objectives import transcriptions
from tests.vectors.make.writing import (
    ALONE,
    SMALL,
    Legs,
    Result,
    case,
    excerpt,
    logits_of,
    mask_of,
    padded,
    ragged,
    random_leg,
    write,
)

COMMIT = "d0389c4d9a8ab031cf25edd20a3e5fe283ee2c40"


def logits(rows: Tensor, mask: Tensor) -> Tensor:
    """Logits after one prompt token, with a last position that predicts nothing; every token has id 0."""
    at_tokens = logits_of(rows, mask, torch.zeros_like(mask))
    return torch.cat([at_tokens, torch.zeros_like(at_tokens[:, :1])], dim=1)


def differentiate(loss: Tensor, chosen: Tensor, rejected: Tensor, legs: Legs) -> Result:
    slopes = torch.autograd.grad(loss, [chosen, rejected])
    names = ("chosen", "rejected")
    grad = {name: ragged(slope, legs[name]["logps"]) for name, slope in zip(names, slopes, strict=True)}
    return loss.item(), grad


def cumulative(checkout: Path, legs: Legs, *, beta: float, eta: float) -> Result:
    kinds = SimpleNamespace(ALPHA_DIVERGENCE=SimpleNamespace(value="alpha"), JS_DIVERGENCE=SimpleNamespace(value="js"))
    trainer = excerpt(
        checkout / "alignment-handbook" / "scripts" / "rpo_trainer.py",
        "RPOTrainer",
        {"torch": torch, "F": F, "FDivergenceType": kinds},
        methods=("dpo_loss", "get_batch_logps"),
    )
    leaves, sums = {}, []
    for name in ("chosen", "rejected"):
        width = max(map(len, legs[name]["logps"]))
        mask = mask_of(legs[name]["logps"], width)
        labels = torch.cat([torch.full_like(mask[:, :1], -100), torch.where(mask.bool(), 0, -100)], dim=1)
        leaves[name] = padded(legs[name]["logps"], width).requires_grad_()
        sums.append(trainer.get_batch_logps(logits(leaves[name], mask), labels)[0])
    sums += [padded(legs[name]["ref_logps"], 9).sum(dim=1) for name in ("chosen", "rejected")]
    settings = SimpleNamespace(
        accelerator=ALONE,
        beta=beta,
        eta=eta,
        label_smoothing=0.0,
        loss_type="sigmoid",
        reference_free=False,
        f_divergence_type="reverse_kl",
    )
    losses, _, _ = trainer.dpo_loss(settings, *sums)
    return differentiate(losses.mean(), leaves["chosen"], leaves["rejected"], legs)


def average(checkout: Path, legs: Legs, *, beta: float, eta: float) -> Result:
    folder = checkout / "OpenRLHF" / "openrlhf"
    loss_fn = excerpt(folder / "models" / "loss.py", "DPOLoss", {"torch": torch, "nn": nn, "F": F})(beta)
    trainer_class = excerpt(
        folder / "trainer" / "dpo_trainer.py",
        "DPOTrainer",
        {"torch": torch},
        methods=("concatenated_forward", "concatenated_inputs", "_get_batch_logps"),
    )
    trainer = trainer_class()
    trainer.tokenizer = SimpleNamespace(pad_token_id=0)
    masks, leaves = {}, {}
    width = max(len(row) for leg in legs.values() for row in leg["logps"])
    for name, leg in legs.items():
        masks[name] = mask_of(leg["logps"], width)
        leaves[name] = padded(leg["logps"], width).requires_grad_()
    attention = {name: torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1) for name, mask in masks.items()}
    ids = {name: torch.zeros_like(mask) for name, mask in attention.items()}
    prompt_lengths = [1] * len(legs["chosen"]["logps"])

    def forward(values: dict[str, Tensor]) -> tuple[Tensor, Tensor, Any, Tensor]:
        every = torch.cat([logits(values[name], masks[name]) for name in ("chosen", "rejected")])
        return trainer.concatenated_forward(
            # The output is read both as a mapping and as an object that may lack an auxiliary loss.
            lambda *_, **__: {"logits": every},
            ids["chosen"],
            attention["chosen"],
            ids["rejected"],
            attention["rejected"],
            prompt_lengths,
        )

    chosen, rejected, _, nll = forward(leaves)
    with torch.no_grad():
        ref_chosen, ref_rejected, _, _ = forward({name: padded(leg["ref_logps"], width) for name, leg in legs.items()})
    preference, _, _ = loss_fn(chosen, rejected, ref_chosen, ref_rejected)
    return differentiate(preference + nll * eta, leaves["chosen"], leaves["rejected"], legs)


def main(checkout: Path) -> None:
    generator = torch.Generator().manual_seed(24)
    names = ("chosen", "rejected")
    batches = {"small": SMALL, "ragged": {name: random_leg(generator, 5, reference=True) for name in names}}
    cases = []
    for batch, legs in batches.items():
        arrays = [legs[name][key] for key in ("logps", "ref_logps") for name in names]
        for form, beta, eta in (
            ("cumulative", 0.01, 0.005),
            ("cumulative", 0.5, 0.2),
            ("average", 0.5, 0.2),
            ("average", 0.1, 1.0),
        ):
            config = {"beta": beta, "eta": eta, "form": form}
            function, how = {
                "cumulative": (cumulative, "alignment-handbook/scripts/rpo_trainer.py"),
                "average": (average, "OpenRLHF/openrlhf, nll_loss_coef"),
            }[form]
            result = function(checkout, legs, beta=beta, eta=eta)
            check = transcriptions.rpo(*arrays, beta=beta, eta=eta, form=form)
            cases.append(case(f"{batch}-{form}-beta{beta}", how, config, legs, result, check))
    by_eye = {entry["name"]: entry["loss"] for entry in cases}
    assert abs(float(str(by_eye["small-cumulative-beta0.01"])) - 0.695165) < 1e-6
    assert abs(float(str(by_eye["small-average-beta0.5"])) - 1.027320) < 1e-6
    source = f"YSLIU627/Regularized-Preference-Optimization at {COMMIT}, float64"
    write("rpo", source, "tests/vectors/make/official_rpo.py", cases, ["torch"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
