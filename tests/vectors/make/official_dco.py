"""Makes ``dco.json`` with the authors' code of Direct Coverage Optimization, and with mpmath, in float64.

    git clone https://github.com/allanraventos/refine
    git -C refine checkout 31a9e6e297cb60334c37cf97ad5a254d7f4e87a3
    python -m tests.vectors.make.official_dco refine

``custom_loss_function2`` returns F·(−log p) with F detached: its gradient is that of the loss, its value is not. So
``grad`` is theirs, and ``loss`` is −log[1 − (1 − p)^N] (arXiv:2502.07154) by mpmath in 50 digits. The gradient is
checked against mpmath's numerical derivative of that.

For N·p < 0.1 the authors take F from a quotient of series that end with the square, which is off by up to 1.3 in 10⁴
there: cases are of N = 1, and of rows outside that range or with an N·p below 10⁻¹², where F is 1 either way.
``differences/dco.json`` has rows inside the range, and the value that the code returns.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from mpmath import mp
from torch import nn

from tests.objectives import transcriptions_pairs_free as transcriptions
from tests.vectors.make.writing import (
    Case,
    Legs,
    Ragged,
    Result,
    assert_six_places,
    case,
    excerpt,
    in_double,
    logits_and_labels,
    mask_of,
    padded,
    ragged,
    random_rows,
    write,
)

MADE_BY = "tests/vectors/make/official_dco.py"
SERIES_BELOW = 0.1
"""Of N·p."""


def theirs(checkout: Path, rows: Ragged, attempts: int) -> Result:
    scope = {"torch": torch, "nn": nn}
    path = checkout / "refine" / "training" / "loss_functions.py"
    excerpt(path, "f", scope)
    loss_function = excerpt(path, "custom_loss_function2", scope)
    width = max(map(len, rows))
    logps = padded(rows, width).requires_grad_()
    with in_double():
        loss = loss_function(*logits_and_labels(logps, mask_of(rows, width)), attempts)
        (slopes,) = torch.autograd.grad(loss, logps)
    return loss.item(), {"gold": ragged(slopes, rows)}


def by_definition(rows: Ragged, attempts: int) -> Result:
    """The loss, and its derivative by each row's log-probability, in 50 digits."""
    total, grad = 0.0, []
    with mp.workdps(50):
        for row in rows:
            log_p = mp.fsum(map(mp.mpf, row))

            def loss(x: mp.mpf) -> mp.mpf:
                return -mp.log(1 - (1 - mp.exp(x)) ** attempts)

            total += loss(log_p) / len(rows)
            grad.append([float(mp.diff(loss, log_p) / len(rows))] * len(row))
    return float(total), {"gold": grad}


def check_by_eye() -> None:
    for log_p, attempts, expected in (
        (-1.0, 1, 1.000000),
        (-1.0, 8, 0.025822),
        (-5.0, 8, 2.944101),
        (-5.0, 256, 0.194983),
        (-20.0, 256, 14.454823),
    ):
        assert_six_places(by_definition([[log_p]], attempts)[0], expected)


def main(checkout: Path) -> None:
    check_by_eye()
    generator = torch.Generator().manual_seed(37)
    batches: dict[str, tuple[int, Ragged]] = {
        "likelihood": (1, random_rows(generator, [3, 1, 6, 9])),
        "small": (8, [[-0.5, -1.0, -1.5], [-2.0, -0.25]]),
        "likely": (8, [[-0.05, -0.01], [-0.3], [-0.9, -0.1, -0.2]]),
        "many-attempts": (256, [[-0.5, -1.0, -1.5], [-5.0], [-1.5, -4.0, -2.0], [-0.02]]),
        # F is 1 to rounding in the series as well.
        "improbable": (256, [[-9.0, -11.0, -10.0, -8.0], [-20.0, -15.0], [-60.0], [-1.0]]),
    }
    cases: list[Case] = []
    for name, (attempts, rows) in batches.items():
        for row in rows:
            covered = attempts * math.exp(math.fsum(row))
            assert attempts == 1 or not 1e-12 < covered < SERIES_BELOW, (name, covered)
        loss, grad = by_definition(rows, attempts)
        legs: Legs = {"gold": {"logps": rows}}
        result = (loss, theirs(checkout, rows, attempts)[1])
        check = transcriptions.dco(rows, attempts=attempts)
        config = {"attempts": attempts, "leg": "gold"}
        how = "gradient: custom_loss_function2; loss: mpmath"
        cases.append(case(name, how, config, legs, result, check))
        case(name, how, config, legs, result, (loss, grad))
    code = "allanraventos/refine at 31a9e6e297cb60334c37cf97ad5a254d7f4e87a3, custom_loss_function2, float64"
    source = f"gradients: {code}; losses: mpmath transcription of arXiv:2502.07154, as the code does not return them"
    write("dco", source, MADE_BY, cases, ["torch", "mpmath"])
    # N·p = 0.092, 0.015, 0.0033 with the authors' series.
    rows, attempts = [[-8.0], [-3.0, -6.5, -0.25], [-5.0, -6.25]], 256
    apart = theirs(checkout, rows, attempts)
    legs = {"gold": {"logps": rows}}
    config = {"attempts": attempts, "leg": "gold"}
    write(
        "differences/dco", code, MADE_BY, [case("series", "as it is", config, legs, apart, (apart[0], {}))], ["torch"]
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
