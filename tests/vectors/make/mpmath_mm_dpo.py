"""Makes ``modifiers/mm_dpo.json`` with mpmath, in 50 digits: the formula of the paper, which no public code has.

    python -m tests.vectors.make.mpmath_mm_dpo

    git clone https://github.com/Kwai-YuanQi/MM-RLHF
    git -C MM-RLHF checkout 7c8af1d2cacc252e4310881d2af4f90eacf2a5f0
    python -m tests.vectors.make.mpmath_mm_dpo MM-RLHF

Gradients are mpmath's numerical derivatives. The released code takes β·(1 + w·factor) with a factor that the data must
bring, and by default (``implicit_beta``) replaces that by one β of the batch, drawn from the policy's own margins. The
second form of the command gives it factors 1 − exp(−k·δ), turns ``implicit_beta`` off, and checks that it then
agrees. Its ``label_smoothing`` is 1 where nothing is smoothed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from mpmath import mp
from torch import Tensor

from tests.objectives import transcriptions_pairs as transcriptions
from tests.objectives import transcriptions_pairs_modified as modified
from tests.vectors.make.official_pairs import differentiate
from tests.vectors.make.writing import (
    ALONE,
    PAIR,
    SMALL,
    Case,
    Legs,
    Ragged,
    Result,
    assert_same,
    assert_six_places,
    case,
    excerpt,
    pair_arrays,
    pairs,
    write,
)

Scores = dict[str, list[float]]
LOSSES: dict[str, Callable[[Any, Any, Any, int, int], Any]] = {
    "dpo": lambda beta, u, v, n_w, n_l: mp.log(1 + mp.exp(-beta * (u - v))),
    "hinge": lambda beta, u, v, n_w, n_l: max(mp.mpf(0), 1 - beta * (u - v)),
    "ipo": lambda beta, u, v, n_w, n_l: (u / n_w - v / n_l - 1 / (2 * beta)) ** 2,
}
"""Of one pair: of β, both log-ratios and both lengths."""


def scaled_beta(beta: float, scores: Scores, row: int, *, scaling: float, sharpness: float) -> Any:
    """β·[1 + w·(1 − e^(−k·δ))]; δ is the margin of a pair that scores order as labels do, and 0 of others."""
    delta = max(mp.mpf(0), mp.mpf(scores["chosen"][row]) - mp.mpf(scores["rejected"][row]))
    return mp.mpf(beta) * (1 + mp.mpf(scaling) * (1 - mp.exp(-mp.mpf(sharpness) * delta)))


def by_definition(name: str, legs: Legs, scores: Scores, *, beta: float, scaling: float, sharpness: float) -> Result:
    rows = len(scores["chosen"])
    total = mp.mpf(0)
    grad: dict[str, Ragged] = {leg: [] for leg in PAIR}
    with mp.workdps(50):
        for i in range(rows):
            sums = [mp.fsum(map(mp.mpf, rows[i])) for rows in pair_arrays(legs)]
            u, v = sums[0] - sums[2], sums[1] - sums[3]
            lengths = [len(legs[leg]["logps"][i]) for leg in PAIR]
            own = scaled_beta(beta, scores, i, scaling=scaling, sharpness=sharpness)

            def loss(x: Any, y: Any, own: Any = own, lengths: list[int] = lengths) -> Any:
                return LOSSES[name](own, x, y, *lengths)

            total += loss(u, v) / rows
            for leg, order in zip(PAIR, ((1, 0), (0, 1)), strict=True):
                slope = float(mp.diff(loss, (u, v), order) / rows)
                grad[leg].append([slope for _ in legs[leg]["logps"][i]])
    return float(total), grad


def transcribed(name: str, legs: Legs, scores: Scores, *, beta: float, scaling: float, sharpness: float) -> Result:
    options = {"ipo": {"reduction": "mean"}}.get(name, {})
    row_losses = []
    for above, below in zip(scores["chosen"], scores["rejected"], strict=True):
        own = modified.mm_dpo_beta(max(0.0, above - below), beta=beta, weight=scaling, rate=sharpness)
        row_losses.append(getattr(transcriptions, name)(beta=own, **options))
    return modified.of_each_row(row_losses, [1.0] * len(row_losses), *pair_arrays(legs))


def released(checkout: Path, legs: Legs, scores: Scores, *, beta: float, scaling: float, sharpness: float) -> Result:
    """The released code, given what the paper multiplies with."""
    path = checkout / "trl" / "trainer" / "dpo_trainer.py"
    trainer = excerpt(path, "DPOTrainer", {"torch": torch, "F": F}, methods=("dpo_loss",))
    settings = SimpleNamespace(
        accelerator=ALONE,
        args=SimpleNamespace(ls_factor_weight=scaling),
        beta=beta,
        label_smoothing=1.0,
        loss_type="sigmoid",
        reference_free=False,
    )
    apart = torch.tensor(scores["chosen"], dtype=torch.float64) - torch.tensor(scores["rejected"], dtype=torch.float64)
    factor = 1 - torch.exp(-sharpness * apart.clamp(min=0))

    def losses(logps: Tensor, references: Tensor, _: Tensor) -> Tensor:
        sums = (*logps.sum(dim=1).chunk(2), *references.sum(dim=1).chunk(2))
        return trainer.dpo_loss(settings, *sums, ls_factor=factor, implicit_beta=False)[0]

    return differentiate(legs, losses)[1]


def main(checkout: Path | None = None) -> None:
    for delta, expected in ((0.0, 0.100000), (1.0, 0.119673), (3.0, 0.138843)):
        scores = {"chosen": [delta], "rejected": [0.0]}
        assert_six_places(float(scaled_beta(0.1, scores, 0, scaling=0.5, sharpness=0.5)), expected)
    batches: dict[str, tuple[Legs, Scores]] = {
        "small": (SMALL, {"chosen": [4.0, 3.0], "rejected": [1.0, 2.5]}),
        # Scores that contradict a label, and equal ones, are among them.
        "ragged": (
            pairs(torch.Generator().manual_seed(41), 5),
            {"chosen": [4.0, -1.5, 0.25, 2.0, 7.0], "rejected": [1.0, 2.5, 0.25, -3.0, 6.5]},
        ),
    }
    cases: list[Case] = []
    for batch, (legs, scores) in batches.items():
        for name in LOSSES:
            for beta, scaling, sharpness in ((0.1, 0.5, 0.5), (0.7, 2.0, 0.1)):
                config: dict[str, Any] = {"beta": beta, **({"reduction": "mean"} if name == "ipo" else {})}
                settings = {"scaling": scaling, "sharpness": sharpness}
                result = by_definition(name, legs, scores, beta=beta, **settings)
                check = transcribed(name, legs, scores, beta=beta, **settings)
                if name == "dpo" and checkout is not None:
                    assert_same(batch, result, released(checkout, legs, scores, beta=beta, **settings))
                rest = {"objective": name, "modifier": "mm_dpo", "modifier_config": settings, "scores": scores}
                label = f"{batch}-{name}-beta{beta}"
                cases.append(case(label, "β of each pair", config, legs, result, check, **rest))
    source = (
        "mpmath transcription of arXiv:2502.10391, dynamic reward scaling; no public implementation has this formula"
    )
    write("modifiers/mm_dpo", source, "tests/vectors/make/mpmath_mm_dpo.py", cases, ["mpmath"])


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
