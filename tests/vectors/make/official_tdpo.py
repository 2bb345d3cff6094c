"""Makes ``tdpo.json`` with the authors' code of Token-level Direct Preference Optimization, in float64.

    git clone https://github.com/Vance0124/Token-level-Direct-Preference-Optimization TDPO
    git -C TDPO checkout 2a736ecb285394a8419b461816bce1ba3b093cc9
    python -m tests.vectors.make.official_tdpo TDPO

``get_batch_metrics`` of their ``BasicTrainer`` runs on a stand-in whose models return prescribed logits. The file
imports packages that need not be installed for this: only what is named is compiled. Its casts to float32 are lifted.

``logps``, ``ref_logps`` and ``ref_kl`` are computed from the logits here, position by position. The code is
differentiated by the logits; that gradient is a combination of the gradients of ``logps`` and ``ref_kl``, and what they
are multiplied with is written down.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.objectives import transcriptions_pairs as transcriptions
from tests.vectors.make.writing import (
    IGNORED,
    PAIR,
    Case,
    Legs,
    PrescribedLogits,
    Ragged,
    Result,
    assert_six_places,
    case,
    excerpt,
    in_double,
    mask_of,
    pair_arrays,
    ragged,
    slopes_through,
    write,
)

Logits = dict[str, list[list[list[float]]]]
"""By leg: for each row, for each token, over the vocabulary."""

Tokens = dict[str, list[list[int]]]


def stacked(rows: list[list[list[float]]], width: int) -> Tensor:
    """(row, position, vocabulary); the last position and those of padding are uniform."""
    nothing = [0.0] * len(rows[0][0])
    return torch.tensor([row + [nothing] * (width - len(row)) for row in rows], dtype=torch.float64)


@dataclass
class Run:
    """One call of the authors' code, and what it was given; rows of chosen responses come first."""

    loss: Tensor
    kl: dict[str, list[float]]
    logits: Tensor
    ref_logits: Tensor
    ids: Tensor
    mask: Tensor
    """1 where a position predicts a token of the response."""


def run(checkout: Path, policy: Logits, reference: Logits, tokens: Tokens, config: dict[str, Any]) -> Run:
    scope: dict[str, Any] = {"torch": torch, "F": F}
    for name in ("pad_to_length", "all_gather_if_needed"):
        excerpt(checkout / "utils.py", name, scope)
    for name in ("tdpo_loss", "_tdpo_get_batch_logps", "concatenated_inputs"):
        excerpt(checkout / "trainers.py", name, scope)
    methods = ("get_batch_metrics", "tdpo_concatenated_forward")
    trainer = excerpt(checkout / "trainers.py", "BasicTrainer", scope, methods=methods)()
    rows = [row for name in PAIR for row in tokens[name]]
    width = max(map(len, rows)) + 1
    ids = torch.tensor([[0, *row] + [0] * (width - 1 - len(row)) for row in rows])
    mask = mask_of(rows, width)
    labels = torch.where(mask.roll(1, dims=1).bool(), ids, IGNORED)
    logits = stacked([row for name in PAIR for row in policy[name]], width).requires_grad_()
    ref_logits = stacked([row for name in PAIR for row in reference[name]], width)
    trainer.policy, trainer.reference_model = PrescribedLogits(logits), PrescribedLogits(ref_logits)
    trainer.rank, trainer.world_size = 0, 1
    half = len(rows) // 2
    batch = {}
    for name, part in (("chosen", slice(0, half)), ("rejected", slice(half, None))):
        batch |= {f"{name}_input_ids": ids[part], f"{name}_labels": labels[part]}
        batch[f"{name}_attention_mask"] = torch.ones_like(ids[part])
    loss_config = SimpleNamespace(
        name="tdpo", beta=config["beta"], alpha=config["alpha"], if_tdpo2=config["variant"] == "tdpo2"
    )
    with in_double():
        loss, metrics = trainer.get_batch_metrics(batch, loss_config)
    kl = {name: metrics[f"kl_train/{name}"] for name in PAIR}
    return Run(loss, kl, logits, ref_logits, ids, mask)


def legs_and_result(theirs: Run, tokens: Tokens) -> tuple[Legs, Result]:
    """The numbers per token that the logits make, and the authors' loss with its gradient by them."""
    log_policy, log_reference = theirs.logits.log_softmax(-1), theirs.ref_logits.log_softmax(-1)
    at_token = theirs.ids.roll(-1, dims=1)[..., None]
    logps, ref_logps = (each.gather(-1, at_token)[..., 0] for each in (log_policy, log_reference))
    ref_kl = (log_reference.exp() * (log_reference - log_policy)).sum(-1)
    (by_logits,) = torch.autograd.grad(theirs.loss, theirs.logits)
    by_logps, by_kl = slopes_through(by_logits, theirs.logits, [logps, ref_kl], theirs.mask)

    def of_legs(values: Tensor) -> dict[str, Ragged]:
        return {name: ragged(part, tokens[name]) for name, part in zip(PAIR, values.detach().chunk(2), strict=True)}

    made = {"logps": of_legs(logps), "ref_logps": of_legs(ref_logps), "ref_kl": of_legs(ref_kl)}
    for name in PAIR:
        for row, expected in zip(made["ref_kl"][name], theirs.kl[name], strict=True):
            assert math.isclose(math.fsum(row), expected, rel_tol=1e-12)
    legs: Legs = {name: {key: values[name] for key, values in made.items()} for name in PAIR}
    grad = {**of_legs(by_logps), **{f"{name}/ref_kl": rows for name, rows in of_legs(by_kl).items()}}
    return legs, (theirs.loss.item(), grad)


def transcribed(legs: Legs, config: dict[str, Any]) -> Result:
    distances = [legs[name]["ref_kl"] for name in PAIR]
    alpha = config["alpha"] if config["variant"] == "tdpo2" else None
    return transcriptions.tdpo(*pair_arrays(legs), *distances, beta=config["beta"], alpha=alpha)


def drawn(generator: torch.Generator, rows: int, vocabulary: int) -> tuple[Logits, Logits, Tokens]:
    policy: Logits = {}
    reference: Logits = {}
    tokens: Tokens = {}
    for name in PAIR:
        lengths = torch.randint(1, 8, (rows,), generator=generator).tolist()
        policy[name] = [(2 * torch.randn(n, vocabulary, generator=generator)).tolist() for n in lengths]
        reference[name] = [(2 * torch.randn(n, vocabulary, generator=generator)).tolist() for n in lengths]
        tokens[name] = [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    return policy, reference, tokens


def check_by_eye(checkout: Path) -> None:
    """One pair whose losses are known; its gradients by log-prob and KL can't be told apart, so it is no case."""
    policy: Logits = {"chosen": [[[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]]], "rejected": [[[0.0, 1.0, 0.0]]]}
    reference: Logits = {"chosen": [[[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]], "rejected": [[[0.5, 0.0, 0.0]]]}
    tokens: Tokens = {"chosen": [[0, 1]], "rejected": [[1]]}
    for variant, expected in (("tdpo1", 0.686237), ("tdpo2", 0.686797)):
        config = {"beta": 0.1, "alpha": 0.5, "variant": variant}
        assert_six_places(run(checkout, policy, reference, tokens, config).loss.item(), expected)


def main(checkout: Path) -> None:
    check_by_eye(checkout)
    generator = torch.Generator().manual_seed(33)
    cases: list[Case] = []
    for vocabulary in (5, 12):
        policy, reference, tokens = drawn(generator, 5, vocabulary)
        for variant, beta, alpha in (
            ("tdpo1", 0.1, 0.5),
            ("tdpo2", 0.1, 0.5),
            ("tdpo1", 0.7, 0.5),
            ("tdpo2", 0.7, 1.3),
        ):
            config = {"beta": beta, "alpha": alpha, "variant": variant}
            legs, result = legs_and_result(run(checkout, policy, reference, tokens, config), tokens)
            how = f"if_tdpo2={variant == 'tdpo2'}, vocabulary of {vocabulary} tokens"
            name = f"vocabulary{vocabulary}-{variant}-beta{beta}"
            cases.append(case(name, how, config, legs, result, transcribed(legs, config)))
    source = (
        "Vance0124/Token-level-Direct-Preference-Optimization at 2a736ecb285394a8419b461816bce1ba3b093cc9, "
        "BasicTrainer.get_batch_metrics, float64"
    )
    write("tdpo", source, "tests/vectors/make/official_tdpo.py", cases, ["torch"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
