"""What numbers on rounds, selection and QAlign show: verdicts from intervals, by rules that stand here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Interval = Mapping[str, Any]
"""``value``, ``low`` and ``high`` of an estimate, at 95 %."""
FLAT = 0.03
"""A change that lies with its whole interval within ± this is none worth speaking of."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One claim, and whether it shows."""

    claim: str
    numbers: str
    shows: bool


def rises(change: Interval) -> bool:
    """Whether a change is above zero with its whole interval."""
    return change["low"] > 0


def falls(change: Interval) -> bool:
    """Whether it is below zero with its whole interval."""
    return change["high"] < 0


def flat(change: Interval) -> bool:
    """Whether it is known to be small, which is more than not being known to differ from zero."""
    return change["low"] > -FLAT and change["high"] < FLAT


def holds(change: Interval) -> bool:
    """Whether nothing worth speaking of is lost."""
    return change["low"] > -FLAT


def word(change: Interval) -> str:
    """A difference in words."""
    return "higher" if rises(change) else "lower" if falls(change) else "no difference seen"


def shown(interval: Interval, *, signed: bool = False) -> str:
    """A value with its interval."""
    form = "{:+.3f}" if signed else "{:.3f}"
    return f"{form.format(interval['value'])} [{form.format(interval['low'])}, {form.format(interval['high'])}]"


def of_rounds(part: Mapping[str, Any]) -> Iterator[Verdict]:
    """Whether rounds raise accuracy, all together and each."""
    runs = part["runs"]
    last = [run["rounds"][-1]["change"] for run in runs]
    yield Verdict(
        claim=f"{len(runs[0]['rounds']) - 1} rounds raise accuracy on unseen problems",
        numbers="; ".join(f"seed {r['seed']}: {shown(c, signed=True)}" for r, c in zip(runs, last, strict=True)),
        shows=all(map(rises, last)),
    )
    for number in range(1, len(runs[0]["rounds"])):
        gains = [run["rounds"][number]["gain"] for run in runs]
        yield Verdict(
            claim=f"round {number} raises it over the round before",
            numbers="; ".join(f"seed {r['seed']}: {shown(g, signed=True)}" for r, g in zip(runs, gains, strict=True)),
            shows=all(map(rises, gains)),
        )


def of_pass_at_k(part: Mapping[str, Any]) -> Iterator[Verdict]:
    """Whether alignment raises pass@1, and what it does at the largest k."""
    most, runs = part["k"][-1], part["runs"]
    ends = {1: [run["changes"][0] for run in runs], most: [run["changes"][-1] for run in runs]}
    told = {
        k: "; ".join(f"seed {r['seed']}: {shown(c, signed=True)}" for r, c in zip(runs, changes, strict=True))
        for k, changes in ends.items()
    }
    yield Verdict(claim="alignment raises pass@1", numbers=told[1], shows=all(map(rises, ends[1])))
    yield Verdict(
        claim=f"and lowers pass@{most}: it narrows what the policy can reach",
        numbers=told[most],
        shows=all(map(falls, ends[most])),
    )


def of_curves(part: Mapping[str, Any]) -> Iterator[Verdict]:
    """The claims of arXiv:2510.03199, for each error of the reward."""
    most = part["n"][-1]
    for name, found in part["errors"].items():
        error = f"error {name} ({found['size']:g})"
        peak, middle = found["since_peak"], found["since_middle"]
        over = found["best_of_majority_against"]
        yield Verdict(
            claim=f"{error}: best_of_n falls from its best N to {most}",
            numbers=shown(peak["best_of_n"], signed=True),
            shows=falls(peak["best_of_n"]),
        )
        yield Verdict(
            claim=f"{error}: majority stays flat from {middle['majority']['from']} to {most} samples",
            numbers=shown(middle["majority"], signed=True),
            shows=flat(middle["majority"]),
        )
        yield Verdict(
            claim=f"{error}: best_of_majority does not fall from its best N to {most}",
            numbers=shown(peak["best_of_majority"], signed=True),
            shows=holds(peak["best_of_majority"]),
        )
        yield Verdict(
            claim=f"{error}: nor on the way, from {found['open_gate']['from']} to {found['open_gate']['to']}, where a "
            "single sample still passes its gate",
            numbers=shown(found["open_gate"], signed=True),
            shows=holds(found["open_gate"]),
        )
        for other in over:
            yield Verdict(
                claim=f"{error}: best_of_majority is above {other} at {most}",
                numbers=shown(over[other], signed=True),
                shows=rises(over[other]),
            )


def of_chains(part: Mapping[str, Any]) -> Iterator[Verdict]:
    """The claims of arXiv:2504.03790, for each error and β: above best-of-N and the vote, no fall with more tokens."""
    budget = part["budgets"][-1]
    for name, found in part["errors"].items():
        for chain, others in found["against"].items():
            error = f"error {name} ({found['size']:g}): {chain}"
            for other in ("best_of_n", "majority"):
                yield Verdict(
                    claim=f"{error} is above {other} at {budget} tokens",
                    numbers=shown(others[other], signed=True),
                    shows=rises(others[other]),
                )
            yield Verdict(
                claim=f"{error} does not fall from its best budget to {budget} tokens",
                numbers=shown(found["since_peak"][chain], signed=True),
                shows=holds(found["since_peak"][chain]),
            )
