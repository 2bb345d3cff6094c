"""Makes ``tpo.json`` and ``tpo_l.json`` with the loss code of the installed TRL, in float64.

    python -m tests.vectors.make.trl_tpo

``TPOTrainer._compute_loss`` is called unbound on a stand-in that has only what it reads. Its model returns logits over
two tokens whose log-softmax is the prescribed log-prob.

Where TRL and our formulas could part, and do not: its γ is divided by β and multiplied by β again, ours is not; its
NLL is a mean over the gold tokens of the microbatch, which here is the batch; ``label_smoothing`` acts on ``sigmoid``
and ``tpo-l`` and is ignored by ``hinge`` and ``ipo``; ``ipo`` and ``tpo-l`` use means per token, the others sums. With
``tpo_alpha=0`` TRL drops the gold rows from the batch, so there the gradient for them is written down as 0.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import torch
from trl.experimental.tpo import TPOTrainer

from tests.objectives import transcriptions
from tests.vectors.make.writing import (
    ALONE,
    SMALL,
    SMALL_GOLD,
    Case,
    Legs,
    PrescribedLogits,
    Result,
    case,
    logits_of,
    mask_of,
    padded,
    ragged,
    random_leg,
    write,
)

NAMES = ("chosen", "rejected", "gold")


def trl_loss(
    legs: Legs, *, loss_type: str, beta: float, alpha: float, gamma: float = 0.0, label_smoothing: float = 0.0
) -> Result:
    """TRL's loss on these triples, and its gradient with respect to each log-prob."""
    branches = NAMES if alpha != 0 else NAMES[:2]
    responses = [row for name in branches for row in legs[name]["logps"]]
    width = max(map(len, responses))
    mask = mask_of(responses, width)
    logps = padded(responses, width).requires_grad_()
    logits = logits_of(logps, mask, torch.zeros_like(mask))
    # One prompt token in front, and a last position that predicts nothing.
    model = PrescribedLogits(torch.cat([logits, torch.zeros_like(logits[:, :1])], dim=1))
    completion_mask = torch.cat([torch.zeros_like(mask[:, :1]), mask], dim=1)
    trainer = SimpleNamespace(
        model=model,
        accelerator=ALONE,
        beta=beta,
        tpo_alpha=alpha,
        tpo_l_gamma=gamma,
        label_smoothing=label_smoothing,
        loss_type=loss_type,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
    }
    loss = TPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
    (slopes,) = torch.autograd.grad(loss, logps)
    rows = len(legs["chosen"]["logps"])
    grad = {name: ragged(slopes[i * rows : (i + 1) * rows], legs[name]["logps"]) for i, name in enumerate(branches)}
    if "gold" not in grad:
        grad["gold"] = [[0.0 for _ in row] for row in legs["gold"]["logps"]]
    return loss.item(), grad


def triples(source: Legs, gold: list[list[float]]) -> Legs:
    return {
        "chosen": {"logps": source["chosen"]["logps"]},
        "rejected": {"logps": source["rejected"]["logps"]},
        "gold": {"logps": gold},
    }


def files() -> dict[str, list[Case]]:
    """The cases of each file that this script writes."""
    generator = torch.Generator().manual_seed(21)
    batches = {
        "small": triples(SMALL, SMALL_GOLD),
        "ragged": {name: random_leg(generator, 5, reference=False) for name in NAMES},
    }
    tpo = []
    tpo_l = []
    for batch, legs in batches.items():
        responses = [legs[name]["logps"] for name in NAMES]
        for link, beta, alpha, smoothing in (
            ("sigmoid", 0.2, 0.9, 0.0),
            ("sigmoid", 0.01, 1.0, 0.0),
            ("sigmoid", 0.2, 0.9, 0.1),
            ("sigmoid", 0.7, 0.0, 0.0),
            ("hinge", 0.2, 0.9, 0.0),
            ("hinge", 1.5, 0.5, 0.0),
            ("ipo", 0.5, 0.9, 0.0),
            ("ipo", 0.01, 1.0, 0.0),
        ):
            config = {"beta": beta, "alpha": alpha, "label_smoothing": smoothing, "link": link}
            result = trl_loss(legs, loss_type=link, beta=beta, alpha=alpha, label_smoothing=smoothing)
            how = f"loss_type={link}, tpo_alpha={alpha}"
            how += ", the gold rows left out as TRL does then, gradient 0" if alpha == 0 else ""
            name = f"{batch}-{link}-beta{beta}" + ("-smoothed" if smoothing else "")
            tpo.append(case(name, how, config, legs, result, transcriptions.tpo(*responses, **config)))
        for beta, gamma, alpha, smoothing in ((2.0, 1.6, 0.05, 0.0), (0.01, 0.5, 1.0, 0.0), (10.0, 3.0, 0.05, 0.1)):
            config = {"beta": beta, "gamma": gamma, "alpha": alpha, "label_smoothing": smoothing}
            result = trl_loss(legs, loss_type="tpo-l", **config)
            name = f"{batch}-beta{beta}" + ("-smoothed" if smoothing else "")
            how = f"loss_type=tpo-l, tpo_alpha={alpha}, tpo_l_gamma={gamma}"
            tpo_l.append(case(name, how, config, legs, result, transcriptions.tpo_l(*responses, **config)))
    return {"tpo": tpo, "tpo_l": tpo_l}


def main() -> None:
    for name, cases in files().items():
        source = "trl, TPOTrainer._compute_loss, float64"
        write(name, source, "tests/vectors/make/trl_tpo.py", cases, ["torch", "trl"])


if __name__ == "__main__":
    main()
