"""Makes ``beta_dpo.json`` with the authors' code of β-DPO, in float64.

    git clone https://github.com/junkangwu/beta-DPO
    git -C beta-DPO checkout 1629047374915ba319477caa4f6c6b2d1f172e5d
    python -m tests.vectors.make.official_beta_dpo beta-DPO

``get_batch_metrics`` of their ``BasicTrainer`` runs on a stand-in of one process whose models return prescribed
logits, with its running means carried from step to step. The file imports packages that need not be installed for this:
only what is named is compiled. Its casts to float32 are lifted.

``state`` is what both sides start the step with; the means are updated before they are used. Which rows are learned
from is drawn at random there, by ``torch.multinomial``, and here by a hash of their tokens: two draws from one
distribution. In the cases that leave rows out, ``selected`` is prescribed to both sides. With ``filtered`` 0 the
authors' code draws all rows itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.objectives import transcriptions_pairs as transcriptions
from tests.vectors.make.writing import (
    PAIR,
    SMALL,
    Case,
    Legs,
    PrescribedLogits,
    Result,
    assert_six_places,
    both_legs,
    case,
    excerpt,
    in_double,
    logits_and_labels,
    mask_of,
    padded,
    pair_arrays,
    pairs,
    write,
)

KNOWN: Legs = {
    "chosen": {
        "logps": [[-0.5, -1.0], [-2.0, -0.25], [-1.0], [-1.0]],
        "ref_logps": [[-1.0, -1.0], [-1.0, -1.0], [-2.0], [-1.0]],
    },
    "rejected": {"logps": [[-1.0], [-1.0], [-3.0, -1.0], [-1.1]], "ref_logps": [[-1.0], [-2.0], [-2.0, -1.0], [-1.0]]},
}
"""Four rows whose log-ratios differ by 0.5, −1.25, 2 and 0.1."""


def make_trainer(checkout: Path) -> Any:
    scope: dict[str, Any] = {"torch": torch, "F": F, "dist": dist}
    for name in ("pad_to_length", "all_gather_if_needed"):
        excerpt(checkout / "utils.py", name, scope)
    for name in ("preference_loss", "_get_batch_logps", "concatenated_inputs"):
        excerpt(checkout / "trainers.py", name, scope)
    methods = ("get_batch_metrics", "concatenated_forward", "update_and_sync_tensor_mean")
    trainer = excerpt(checkout / "trainers.py", "BasicTrainer", scope, methods=methods)()
    trainer.rank, trainer.world_size = 0, 1
    for name in ("gap_mean", "gap_std", "loss_mean", "loss_std"):
        setattr(trainer, name, torch.zeros(1, dtype=torch.float64))
    return trainer


def step(trainer: Any, legs: Legs, config: dict[str, Any], selected: Sequence[int] | None) -> tuple[Result, float]:
    """The authors' loss of one step, its gradient with respect to each policy log-prob, and their β of the step."""
    responses = [row for name in PAIR for row in legs[name]["logps"]]
    width = max(map(len, responses))
    mask = mask_of(responses, width)
    logps = padded(responses, width).requires_grad_()
    references = padded([row for name in PAIR for row in legs[name]["ref_logps"]], width)
    logits, labels = logits_and_labels(logps, mask)
    trainer.policy = PrescribedLogits(logits)
    trainer.reference_model = PrescribedLogits(logits_and_labels(references, mask)[0])
    batch = {}
    for name, part in zip(PAIR, labels.chunk(2), strict=True):
        batch |= {f"{name}_input_ids": torch.zeros_like(part), f"{name}_labels": part}
        batch[f"{name}_attention_mask"] = torch.ones_like(part)
    loss_config = SimpleNamespace(
        name="dpo",
        mode_loss="beta_DPO",
        beta=config["beta"],
        a=config["modulation"],
        mode_weight=config["filtered"],
        reference_free=False,
    )
    draw = torch.multinomial

    def drawn(weights: Tensor, number: int, replacement: bool) -> Tensor:
        if selected is None:
            return draw(weights, number, replacement)
        assert number == len(selected)
        return torch.tensor(selected)

    with in_double(), mock.patch.object(torch, "multinomial", drawn):
        loss, metrics = trainer.get_batch_metrics(batch, loss_config)
        (slopes,) = torch.autograd.grad(loss, logps)
    (beta,) = metrics["record_train/beta_used"]
    return (loss.item(), both_legs(slopes, legs)), beta


def differences(legs: Legs) -> list[float]:
    sums = [[sum(row) for row in rows] for rows in pair_arrays(legs)]
    return [s_w - r_w - s_l + r_l for s_w, s_l, r_w, r_l in zip(*sums, strict=True)]


def run(
    checkout: Path, name: str, config: dict[str, Any], steps: Sequence[tuple[Legs, Sequence[int] | None]]
) -> list[Case]:
    """Consecutive steps of one training run, one case each."""
    trainer = make_trainer(checkout)
    history: list[list[float]] = []
    cases = []
    for number, (legs, selected) in enumerate(steps, start=1):
        state = {"mean": trainer.gap_mean.item(), "spread": trainer.gap_std.item(), "steps": number - 1}
        result, beta = step(trainer, legs, config, selected)
        history.append(differences(legs))
        mean, spread = transcriptions.beta_dpo_moments(history)[-1]
        assert abs(mean - trainer.gap_mean.item()) < 1e-12
        assert abs(spread - trainer.gap_std.item()) < 1e-12
        kept = range(len(history[-1])) if selected is None else selected
        expected = transcriptions.beta_dpo_beta(
            [history[-1][i] for i in kept], beta=config["beta"], a=config["modulation"], mu=mean
        )
        assert abs(beta - expected) < 1e-12
        check = transcriptions.beta_dpo(*pair_arrays(legs), step_beta=beta, selected=list(kept))
        rest: dict[str, Any] = {"state": state, **({} if selected is None else {"selected": list(selected)})}
        how = f"step {number} of a run, beta_used={beta:.6g}"
        cases.append(case(f"{name}-{number}", how, config, legs, result, check, **rest))
    return cases


def main(checkout: Path) -> None:
    generator = torch.Generator().manual_seed(34)
    first, second, third = (pairs(generator, rows) for rows in (5, 5, 7))
    plain = {"beta": 0.1, "modulation": 0.6, "filtered": 0.2, "momentum": 0.9}
    all_rows = {**plain, "filtered": 0.0}
    cases = [
        *run(checkout, "known", plain, [(KNOWN, [0, 2, 3])]),
        *run(checkout, "filtered", plain, [(first, [1, 2, 3, 4]), (second, [4, 0, 1, 2]), (third, [6, 5, 0, 3, 2])]),
        *run(checkout, "filtered-half", {**plain, "filtered": 0.5, "beta": 0.7}, [(third, [0, 4, 6]), (SMALL, [1])]),
        *run(checkout, "all", all_rows, [(SMALL, None), (second, None), (first, None)]),
        # The selected rows' margins lie so far below the mean that β would be negative.
        *run(checkout, "least-beta", {**plain, "modulation": 4.0}, [(KNOWN, [0, 1, 3])]),
    ]
    by_name = {entry["name"]: entry for entry in cases}
    assert_six_places(by_name["known-1"]["loss"], (0.656356 + 0.554377 + 0.685677) / 3)
    assert by_name["least-beta-1"]["how"].endswith("=0.001")
    source = (
        "junkangwu/beta-DPO at 1629047374915ba319477caa4f6c6b2d1f172e5d, BasicTrainer.get_batch_metrics with "
        "mode_loss=beta_DPO, float64"
    )
    write("beta_dpo", source, "tests/vectors/make/official_beta_dpo.py", cases, ["torch"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
