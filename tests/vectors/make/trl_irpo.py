"""Makes ``irpo.json`` with the loss code of TRL 0.28.0, the last release with ``rpo_alpha``, in float64.

    pip download trl==0.28.0 --no-deps --dest WHEELS
    unzip WHEELS/trl-0.28.0-py3-none-any.whl -d TRL
    PYTHONPATH=TRL python -m tests.vectors.make.trl_irpo

``get_batch_loss_metrics`` runs on a trainer made without its constructor; log-probs are prescribed through logits over
two tokens.

TRL's NLL is a mean over the chosen tokens of the batch: ``form=token``. The paper divides each row's NLL by its own
length; with one row in the batch the two are the same, so ``form=sequence`` is TRL one row at a time, mean over rows.

TRL writes id 0 over what the mask excludes and then ignores id 0 in the NLL, and with it real tokens that have id 0,
though not in the preference term. Responses here consist of id 1. In the one case where some tokens have id 0, those
have weight 0: that is what TRL does to them, and not what we would.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import trl.import_utils as import_utils

_is_package_available = import_utils._is_package_available
# TRL 0.28 takes the answer for a boolean. transformers 5 answers with a pair, which is true for missing packages too.
import_utils._is_package_available = lambda name, return_version=False: (
    _is_package_available(name, return_version) if return_version else _is_package_available(name)[0]
)

from trl.trainer.dpo_config import FDivergenceType  # noqa: E402
from trl.trainer.dpo_trainer import DPOTrainer  # noqa: E402

from tests.objectives import transcriptions  # noqa: E402
from tests.vectors.make.writing import (  # noqa: E402
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

NAMES = ("chosen", "rejected")


def trl_loss(legs: Legs, *, beta: float, alpha: float) -> Result:
    """TRL's loss on these pairs, and its gradient with respect to each log-prob. Tokens of weight 0 get id 0."""
    responses = [row for name in NAMES for row in legs[name]["logps"]]
    width = max(map(len, responses))
    mask = mask_of(responses, width)
    ids = mask.clone()
    if "weight" in legs["chosen"]:
        ids[: len(responses) // 2] = padded(legs["chosen"]["weight"], width).long()
    logps = padded(responses, width).requires_grad_()
    logits = logits_of(logps, mask, ids)
    # One prompt token in front, and a last position that predicts nothing.
    model = PrescribedLogits(torch.cat([logits, torch.zeros_like(logits[:, :1])], dim=1))
    trainer = object.__new__(DPOTrainer)
    trainer.accelerator = ALONE
    trainer.args = SimpleNamespace(rpo_alpha=alpha, use_liger_kernel=False, ld_alpha=None)
    trainer.beta = beta
    trainer.label_smoothing = 0.0
    trainer.loss_type = ["sigmoid"]
    trainer.loss_weights = None
    trainer.reference_free = False
    trainer.f_divergence_type = FDivergenceType.REVERSE_KL
    trainer.is_encoder_decoder = False
    trainer.aux_loss_enabled = False
    trainer.padding_free = False
    trainer.use_logits_to_keep = False
    trainer.use_weighting = False
    trainer.max_length = None
    trainer.pad_token_id = 0
    rows = len(responses) // 2
    references = padded([row for name in NAMES for row in legs[name]["ref_logps"]], width).sum(dim=1)
    batch = {
        "prompt_input_ids": torch.ones(rows, 1, dtype=torch.int64),
        "prompt_attention_mask": torch.ones(rows, 1, dtype=torch.int64),
        "chosen_input_ids": ids[:rows],
        "chosen_attention_mask": mask[:rows],
        "rejected_input_ids": ids[rows:],
        "rejected_attention_mask": mask[rows:],
        "ref_chosen_logps": references[:rows],
        "ref_rejected_logps": references[rows:],
    }
    loss, _ = trainer.get_batch_loss_metrics(model, batch)
    (slopes,) = torch.autograd.grad(loss, logps)
    grad = {name: ragged(slopes[i * rows : (i + 1) * rows], legs[name]["logps"]) for i, name in enumerate(NAMES)}
    return loss.item(), grad


def one_row_at_a_time(legs: Legs, *, beta: float, alpha: float) -> Result:
    """The mean over rows of the loss of each row alone."""
    rows = len(legs["chosen"]["logps"])
    total = 0.0
    grad: dict[str, Ragged] = {name: [] for name in NAMES}
    for i in range(rows):
        alone = {name: {key: [values[i]] for key, values in leg.items()} for name, leg in legs.items()}
        loss, slopes = trl_loss(alone, beta=beta, alpha=alpha)
        total += loss / rows
        for name, (row,) in slopes.items():
            grad[name].append([slope / rows for slope in row])
    return total, grad


def make_case(name: str, legs: Legs, config: dict[str, Any]) -> dict[str, object]:
    function, how = {
        "token": (trl_loss, "rpo_alpha"),
        "sequence": (one_row_at_a_time, "rpo_alpha, one row at a time, mean over rows"),
    }[config["form"]]
    weight = legs["chosen"].get("weight")
    if weight is not None:
        how += "; chosen tokens of weight 0 have id 0, which TRL ignores"
    result = function(legs, beta=config["beta"], alpha=config["alpha"])
    arrays = [legs[leg][key] for key in ("logps", "ref_logps") for leg in NAMES]
    return case(name, how, config, legs, result, transcriptions.irpo(*arrays, **config, chosen_weight=weight))


def main() -> None:
    generator = torch.Generator().manual_seed(25)
    batches = {"small": SMALL, "ragged": {name: random_leg(generator, 5, reference=True) for name in NAMES}}
    cases = []
    for batch, legs in batches.items():
        for form in ("token", "sequence"):
            for beta, alpha in ((0.1, 1.0), (0.7, 0.3)):
                config = {"beta": beta, "alpha": alpha, "form": form}
                cases.append(make_case(f"{batch}-{form}-beta{beta}", legs, config))
    weighted = {"chosen": {**SMALL["chosen"], "weight": [[1.0, 0.0, 1.0], [0.0, 1.0]]}, "rejected": SMALL["rejected"]}
    cases.append(make_case("small-token-weighted", weighted, {"beta": 0.1, "alpha": 1.0, "form": "token"}))
    source = "trl 0.28.0, DPOTrainer.get_batch_loss_metrics, float64"
    write("irpo", source, "tests/vectors/make/trl_irpo.py", cases, ["torch", "trl"])


if __name__ == "__main__":
    main()
