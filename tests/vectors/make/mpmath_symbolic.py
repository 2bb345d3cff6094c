"""Makes ``symbolic.json`` with mpmath, in 50 digits: programs of arXiv:2412.17696, world by world.

    python -m tests.vectors.make.mpmath_symbolic

No public implementation could be run. A loss is found here by its definition: in each of the 16 worlds of four
variables a program holds or not, which plain Python decides, and the probabilities of the worlds that count are added
up. Gradients are mpmath's numerical derivatives of that. Both are checked against closed forms of up and down, one per
program, in floats and differentiated by hand.

``PROGRAMS`` writes each formula twice, once in the language of the recipes and once in Python.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from mpmath import mp

from tests.objectives.transcriptions import minus_log_sigmoid, sigmoid
from tests.vectors.make.writing import (
    PAIR,
    Case,
    Legs,
    Ragged,
    Result,
    assert_six_places,
    case,
    pair_arrays,
    pairs,
    random_rows,
    write,
)

Formula = Callable[[bool, bool, bool, bool], bool]
"""Of chosen, rejected, ref_chosen and ref_rejected: c, r, rc and rr."""


@dataclass(frozen=True, kw_only=True)
class Program:
    program: str
    core: Formula
    condition: str = "true"
    where: Formula = lambda c, r, rc, rr: True
    addition: str = "false"
    both: Formula = lambda c, r, rc, rr: False

    def keys(self) -> dict[str, str]:
        return {"program": self.program, "condition": self.condition, "addition": self.addition}


def implied(premise: bool, conclusion: bool) -> bool:
    return not premise or conclusion


PROGRAMS = {
    "CE": Program(program="chosen", core=lambda c, r, rc, rr: c),
    "CPO": Program(
        program="rejected -> chosen",
        core=lambda c, r, rc, rr: implied(r, c),
        condition="chosen or rejected",
        where=lambda c, r, rc, rr: c or r,
        addition="chosen and rejected",
        both=lambda c, r, rc, rr: c and r,
    ),
    "ORPO": Program(
        program="rejected -> chosen",
        core=lambda c, r, rc, rr: implied(r, c),
        condition="(chosen and not rejected) or (rejected and not chosen)",
        where=lambda c, r, rc, rr: c != r,
    ),
    "cCPO": Program(
        program="rejected -> chosen",
        core=lambda c, r, rc, rr: implied(r, c),
        condition="chosen or rejected",
        where=lambda c, r, rc, rr: c or r,
    ),
    "unCPO": Program(program="rejected -> chosen", core=lambda c, r, rc, rr: implied(r, c)),
    "CEUnl": Program(program="chosen and not rejected", core=lambda c, r, rc, rr: c and not r),
    "DPO": Program(
        program="(rejected and ref_chosen) -> (chosen and ref_rejected)",
        core=lambda c, r, rc, rr: implied(r and rc, c and rr),
        condition="(chosen and ref_rejected) or (rejected and ref_chosen)",
        where=lambda c, r, rc, rr: (c and rr) or (r and rc),
        addition="chosen and ref_rejected and rejected and ref_chosen",
        both=lambda c, r, rc, rr: c and rr and r and rc,
    ),
}

KNOWN = {
    "CE": 1.203973,
    "CPO": 0.510826,
    "ORPO": 0.459532,
    "unCPO": 0.150823,
    "cCPO": 0.382992,
    "CEUnl": 1.427116,
    "DPO": 0.389465,
}
"""Logistic, β = 1; P(chosen) = 0.3, P(rejected) = 0.2, under the reference 0.25 and 0.35."""

KNOWN_RHO = {
    "CPO": 0.500000,
    "ORPO": 0.706193,
    "cCPO": 0.958675,
    "unCPO": 1.806636,
    "CE": -0.541325,
    "CEUnl": -0.915898,
}
"""Of log-probs −1 and −1.5."""


# Worlds, one by one


def rho(name: str, log_probs: list[Any]) -> Any:
    """log up − log down, by the log-probs of the four variables."""
    program = PROGRAMS[name]
    likely = [mp.exp(x) for x in log_probs]
    up = down = mp.mpf(0)
    for world in itertools.product((True, False), repeat=4):
        mass = mp.fprod(p if true else 1 - p for p, true in zip(likely, world, strict=True))
        if program.where(*world):
            up += mass if program.core(*world) or program.both(*world) else 0
            down += mass if not program.core(*world) or program.both(*world) else 0
    return mp.log(up) - mp.log(down)


def linked(link: str, beta: float, x: Any) -> Any:
    if link == "logistic":
        return mp.log(1 + mp.exp(-beta * x))
    if link == "squared":
        return (x - 1 / (2 * mp.mpf(beta))) ** 2
    assert abs(beta - x) > 1e-3, "a numerical derivative across the corner"
    return max(mp.mpf(0), beta - x)


def by_worlds(name: str, legs: Legs, *, link: str, beta: float, reduction: str, reference: bool) -> Result:
    total = mp.mpf(0)
    grad: dict[str, Ragged] = {leg: [] for leg in PAIR}
    rows = len(legs["chosen"]["logps"])
    with mp.workdps(50):
        for i in range(rows):
            lengths = [len(legs[leg]["logps"][i]) if reduction == "mean" else 1 for leg in PAIR] * 2
            given = [mp.fsum(map(mp.mpf, each[i])) / n for each, n in zip(pair_arrays(legs), lengths, strict=True)]
            of_reference = given[2:]
            base = rho(name, of_reference * 2) if reference else mp.mpf(0)

            def loss(c: Any, r: Any, base: Any = base, rest: list[Any] = of_reference) -> Any:
                return linked(link, beta, rho(name, [c, r, *rest]) - base)

            total += loss(*given[:2]) / rows
            for leg, n, order in zip(PAIR, lengths[:2], ((1, 0), (0, 1)), strict=True):
                slope = float(mp.diff(loss, tuple(given[:2]), order) / rows / n)
                grad[leg].append([slope] * len(legs[leg]["logps"][i]))
    return float(total), grad


# Closed forms


def log_not(x: float) -> float:
    """log(1 − eˣ)."""
    return math.log(-math.expm1(x))


def odds(x: float) -> float:
    """eˣ/(1 − eˣ), so that log(1 − eˣ) has the slope −odds."""
    return math.exp(x) / -math.expm1(x)


def closed(name: str, c: float, r: float, rc: float, rr: float) -> tuple[float, float, float]:
    """log up − log down, and its slopes by the log-probs c and r."""
    if name == "CE":  # P_c against 1 − P_c
        return c - log_not(c), 1 + odds(c), 0.0
    if name == "CPO":  # P_c against P_r
        return c - r, 1.0, -1.0
    if name == "ORPO":  # P_c(1 − P_r) against P_r(1 − P_c)
        return c + log_not(r) - r - log_not(c), 1 + odds(c), -odds(r) - 1
    if name == "cCPO":  # P_c against P_r(1 − P_c)
        return c - r - log_not(c), 1 + odds(c), -1.0
    if name == "DPO":  # P_c R_r against P_r R_c
        return c + rr - r - rc, 1.0, -1.0
    if name == "unCPO":  # 1 − d against d = P_r(1 − P_c); 1 − d = (1 − P_r) + P_r P_c
        down = r + log_not(c)
        rest = -math.expm1(r) + math.exp(r + c)
        slope = -(math.exp(down) / rest + 1)
        return math.log(rest) - down, slope * -odds(c), slope
    # CEUnl: u against 1 − u with u = P_c(1 − P_r); 1 − u = (1 − P_c) + P_c P_r
    up = c + log_not(r)
    rest = -math.expm1(c) + math.exp(c + r)
    slope = 1 + math.exp(up) / rest
    return up - math.log(rest), slope, slope * -odds(r)


def by_closed_forms(name: str, legs: Legs, *, link: str, beta: float, reduction: str, reference: bool) -> Result:
    total = 0.0
    grad: dict[str, Ragged] = {leg: [] for leg in PAIR}
    rows = len(legs["chosen"]["logps"])
    for i in range(rows):
        lengths = [len(legs[leg]["logps"][i]) if reduction == "mean" else 1 for leg in PAIR] * 2
        given = [math.fsum(each[i]) / n for each, n in zip(pair_arrays(legs), lengths, strict=True)]
        x, by_c, by_r = closed(name, *given)
        if reference:
            x -= closed(name, *given[2:] * 2)[0]
        if link == "logistic":
            value, slope = minus_log_sigmoid(beta * x), -beta * sigmoid(-beta * x)
        elif link == "squared":
            value, slope = (x - 1 / (2 * beta)) ** 2, 2 * (x - 1 / (2 * beta))
        else:
            value, slope = max(0.0, beta - x), -1.0 if x < beta else 0.0
        total += value / rows
        for leg, n, own in zip(PAIR, lengths[:2], (by_c, by_r), strict=True):
            grad[leg].append([slope * own / n / rows] * len(legs[leg]["logps"][i]))
    return total, grad


# Cases


def one_token(chosen: float, rejected: float, ref_chosen: float, ref_rejected: float) -> Legs:
    return {
        "chosen": {"logps": [[chosen]], "ref_logps": [[ref_chosen]]},
        "rejected": {"logps": [[rejected]], "ref_logps": [[ref_rejected]]},
    }


def made(batch: str, name: str, legs: Legs, **options: Any) -> Case:
    settings = {"link": "logistic", "beta": 1.0, "reduction": "mean", "reference": False, **options}
    words = [batch, name, settings["link"], settings["reduction"], f"beta{settings['beta']}"]
    label = "-".join([*words, *(["reference"] if settings["reference"] else [])])
    result, check = by_worlds(name, legs, **settings), by_closed_forms(name, legs, **settings)
    return case(label, name, {**PROGRAMS[name].keys(), **settings}, legs, result, check)


def main() -> None:
    generator = torch.Generator().manual_seed(53)
    ragged, far = pairs(generator, 2), pairs(generator, 2, scale=12.0)
    known = one_token(*map(math.log, (0.3, 0.2, 0.25, 0.35)))
    # Probabilities near 1, where 1 − P is what counts.
    likely = {
        leg: {
            key: [[round(x * 1e-3 - 1e-6, 6) for x in row] for row in random_rows(generator, [2, 5])]
            for key in ("logps", "ref_logps")
        }
        for leg in PAIR
    }
    cases: list[Case] = []
    for name in PROGRAMS:
        cases.append(made("known", name, known))
        assert_six_places(cases[-1]["loss"], KNOWN[name])
        if name in KNOWN_RHO:
            assert_six_places(float(rho(name, [mp.mpf(x) for x in (-1.0, -1.5, -1.0, -1.0)])), KNOWN_RHO[name])
        for reduction in ("mean", "sum"):
            for link, beta in (("logistic", 2.5), ("squared", 0.4), ("hinge", 0.7)):
                cases.append(made("ragged", name, ragged, link=link, beta=beta, reduction=reduction))
        cases.append(made("far", name, far, reduction="sum"))
        cases.append(made("likely", name, likely))
        if name != "DPO":  # whose program names the reference
            for link, beta, reduction in (
                ("logistic", 0.1, "mean"),
                ("logistic", 0.5, "sum"),
                ("squared", 2.0, "mean"),
                ("hinge", 0.25, "sum"),
            ):
                cases.append(made("ragged", name, ragged, link=link, beta=beta, reduction=reduction, reference=True))
    source = (
        "mpmath: worlds of the programs of arXiv:2412.17696, enumerated; no public implementation could be run. "
        "The forms of the squared and the hinge link are not confirmed by the paper"
    )
    write("symbolic", source, "tests/vectors/make/mpmath_symbolic.py", cases, ["mpmath"])


if __name__ == "__main__":
    main()
