"""Makes ``xpo.json``, ``nash_md.json`` and ``ipo_sum.json`` with the loss code of TRL 1.10.0, in float64.

    pip download trl==1.10.0 --no-deps --dest WHEELS
    unzip WHEELS/trl-1.10.0-py3-none-any.whl -d TRL
    PYTHONPATH=TRL TRL_EXPERIMENTAL_SILENCE=1 python -m tests.vectors.make.trl_online

``XPOTrainer._compute_losses`` and ``NashMDTrainer._compute_losses`` run unbound, on prescribed log-probs that are 0
where a response has ended, as those that ``_compute_logprobs`` of the same trainers gives. XPO with ``loss_type="ipo"``
and α = 0 is the square of Online DPO: on sums, not on means as in DPOTrainer.

The first case of either file is the one whose numbers are known to six places.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl.experimental.nash_md.nash_md_trainer import NashMDTrainer
from trl.experimental.xpo.xpo_trainer import XPOTrainer

from objectives.columns import COLUMNS
from tests.objectives import transcriptions_online, transcriptions_pairs
from tests.vectors.make.writing import (
    PAIR,
    SMALL,
    Case,
    Legs,
    Result,
    assert_six_places,
    case,
    padded,
    pair_arrays,
    pairs,
    ragged,
    random_leg,
    write,
)

MADE_BY = "tests/vectors/make/trl_online.py"
KNOWN_PAIR: Legs = {
    "chosen": {"logps": [[-3.0]], "ref_logps": [[-3.5]]},
    "rejected": {"logps": [[-4.0]], "ref_logps": [[-3.8]]},
}
KNOWN_SAMPLE: Legs = {"completion": {"logps": [[-0.5, -1.0]], "ref_logps": [[-0.7, -0.6]]}}


def xpo(legs: Legs, chosen_by: Sequence[str], *, beta: float, alpha: float, loss_type: str = "sigmoid") -> Result:
    """TRL's loss, and its gradient by each log-prob of the policy. TRL has responses by who wrote them."""
    width = max(len(row) for leg in legs.values() for row in leg["logps"])
    leaves = {name: padded(legs[name]["logps"], width).requires_grad_() for name in PAIR}
    references = {name: padded(legs[name]["ref_logps"], width) for name in PAIR}
    by_policy = torch.tensor([who == "policy" for who in chosen_by])

    def of(values: dict[str, Tensor], which: Tensor) -> Tensor:
        return torch.where(which[:, None], values["chosen"], values["rejected"])

    trainer: Any = SimpleNamespace(beta=beta, alpha=alpha, args=SimpleNamespace(loss_type=loss_type))
    loss, _, _ = XPOTrainer._compute_losses(
        trainer,
        of(leaves, by_policy),
        of(leaves, ~by_policy),
        of(references, ~by_policy),
        of(references, by_policy),
        by_policy,
    )
    slopes = torch.autograd.grad(loss, [leaves[name] for name in PAIR])
    grad = {name: ragged(slope, legs[name]["logps"]) for name, slope in zip(PAIR, slopes, strict=True)}
    return loss.item(), grad


def nash_md(legs: Legs, preference: Sequence[float], *, beta: float) -> Result:
    rows = legs["completion"]["logps"]
    width = max(map(len, rows))
    logps = padded(rows, width).requires_grad_()
    trainer: Any = SimpleNamespace(beta=beta)
    references = padded(legs["completion"]["ref_logps"], width)
    loss, _, _ = NashMDTrainer._compute_losses(trainer, logps, references, torch.tensor(preference))
    (slopes,) = torch.autograd.grad(loss, logps)
    return loss.item(), {"completion": ragged(slopes, rows)}


def xpo_cases(batches: dict[str, tuple[Legs, list[str]]]) -> list[Case]:
    cases = []
    for name, (legs, chosen_by) in batches.items():
        for beta, alpha in ((0.1, 0.01), (0.7, 1e-5), (0.1, 0.3)):
            config = {"beta": beta, "alpha": alpha}
            result = xpo(legs, chosen_by, beta=beta, alpha=alpha)
            check = transcriptions_online.xpo(*pair_arrays(legs), chosen_by, beta=beta, alpha=alpha)
            scores = {"chosen_by": [COLUMNS["chosen_by"].words[who] for who in chosen_by]}
            label = f"{name}-beta{beta}-alpha{alpha:g}"
            cases.append(case(label, "loss_type=sigmoid", config, legs, result, check, scores=scores))
    return cases


def ipo_cases(batches: dict[str, tuple[Legs, list[str]]]) -> list[Case]:
    cases = []
    for name, (legs, chosen_by) in batches.items():
        for beta in (0.1, 1.5):
            result = xpo(legs, chosen_by, beta=beta, alpha=0.0, loss_type="ipo")
            row_loss = transcriptions_pairs.ipo(beta=beta, reduction="sum")
            check = transcriptions_pairs.over_rows(row_loss, *pair_arrays(legs))
            config = {"beta": beta, "reduction": "sum"}
            cases.append(case(f"{name}-beta{beta}", "XPOTrainer, loss_type=ipo, alpha=0", config, legs, result, check))
    return cases


def nash_md_cases(batches: dict[str, tuple[Legs, list[float]]]) -> list[Case]:
    cases = []
    for name, (legs, preference) in batches.items():
        for beta in (0.1, 0.7):
            result = nash_md(legs, preference, beta=beta)
            completion = legs["completion"]
            check = transcriptions_online.nash_md(completion["logps"], completion["ref_logps"], preference, beta=beta)
            scores = {"preference": preference}
            label = f"{name}-beta{beta}"
            cases.append(case(label, "_compute_losses", {"beta": beta}, legs, result, check, scores=scores))
    return cases


def main() -> None:
    torch.set_default_dtype(torch.float64)
    generator = torch.Generator().manual_seed(40)
    of_pairs = {
        "known": (KNOWN_PAIR, ["policy"]),
        "small": (SMALL, ["reference", "policy"]),
        "ragged": (pairs(generator, 5), ["policy", "reference", "reference", "policy", "policy"]),
        "far": (pairs(generator, 4, scale=12.0), ["reference", "policy", "policy", "reference"]),
    }
    small = {key: SMALL["chosen"][key] + SMALL["rejected"][key] for key in ("logps", "ref_logps")}
    of_samples: dict[str, tuple[Legs, list[float]]] = {
        "known": (KNOWN_SAMPLE, [torch.sigmoid(torch.tensor(1.2 - 0.4)).item()]),
        "small": ({"completion": small}, [0.0, 1.0, 0.5, 0.25]),
        "ragged": (
            {"completion": random_leg(generator, 5, reference=True)},
            [round(p, 4) for p in torch.rand(5, generator=generator).tolist()],
        ),
    }
    explored, mirrored, squared = xpo_cases(of_pairs), nash_md_cases(of_samples), ipo_cases(of_pairs)
    assert_six_places(explored[0]["loss"], 0.618760)
    assert_six_places(xpo(KNOWN_PAIR, ["policy"], beta=0.1, alpha=0.0)[0], 0.658760)
    assert_six_places(mirrored[0]["loss"], 0.314962)
    assert_six_places(squared[2]["loss"], 29.656250)
    source = "trl 1.10.0, {}._compute_losses, float64"
    write("xpo", source.format("XPOTrainer"), MADE_BY, explored, ["torch", "trl"])
    write("ipo_sum", source.format("XPOTrainer"), MADE_BY, squared, ["torch", "trl"], objective="ipo")
    write("nash_md", source.format("NashMDTrainer"), MADE_BY, mirrored, ["torch", "trl"])


if __name__ == "__main__":
    main()
