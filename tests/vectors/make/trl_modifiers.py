"""Makes ``modifiers/ld_dpo.json``, ``wpo.json`` and ``f_divergence.json`` with the installed TRL's code, in float64.

    python -m tests.vectors.make.trl_modifiers

Each case names an objective and a modifier, and TRL runs with the objective's ``loss_type`` and the modifier's option.

LD-DPO acts on policy and reference alike (``applies_to: both``). WPO's weights have no upper limit (``clamp: false``),
and TRL weighs neither ``hinge``, where its backward pass fails, nor the sorted losses. Its alpha divergence knows no
float64 and casts to float32: both are lifted here. f-divergences are allowed where the two scores enter through their
difference.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.objectives import transcriptions_pairs as transcriptions
from tests.objectives import transcriptions_pairs_modified as modified
from tests.vectors.make import trl_stand_in
from tests.vectors.make.trl_pairs import NAMES, row_loss, theirs
from tests.vectors.make.writing import (
    PAIR,
    SMALL,
    Case,
    Legs,
    Result,
    assert_six_places,
    case,
    pair_arrays,
    pairs,
    random_rows,
    write,
)

CONFIGS: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.1, "label_smoothing": 0.0},
    "hinge": {"beta": 0.3},
    "ipo": {"beta": 0.5, "reduction": "mean"},
    "exo": {"beta": 0.7, "label_smoothing": 0.1},
    "robust": {"beta": 0.7, "label_smoothing": 0.1},
    "discopop": {"beta": 0.7, "tau": 0.5},
    "dpo_norm": {"beta": 5.0},
    "nca": {"beta": 0.7},
    "bco_pair": {"beta": 0.7, "shift": "none"},
    "sppo": {"beta": 0.5},
    "apo_zero": {"beta": 0.7},
    "apo_down": {"beta": 0.7},
    "aot": {"beta": 0.7, "label_smoothing": 0.1},
    "aot_unpaired": {"beta": 0.7, "label_smoothing": 0.1},
}

DIFFERENCES = ("dpo", "hinge", "ipo", "exo", "robust", "discopop", "dpo_norm")
SORTED = ("aot", "aot_unpaired")

LOG_SUM_P2 = {"chosen": [[-1.0, -1.5, -1.25], [-1.75, -1.0]], "rejected": [[-1.0, -1.0], [-1.5, -1.25, -2.0, -0.75]]}
"""Of ``SMALL``."""


def run(name: str, legs: Legs, **options: Any) -> Result:
    config = CONFIGS[name]
    if name == "dpo":
        return trl_stand_in.dpo(legs, loss_type="sigmoid", beta=config["beta"], **options)
    return theirs(name, legs, config, **options)


def row_loss_of(name: str) -> transcriptions.RowLoss:
    return transcriptions.dpo(**CONFIGS[name]) if name == "dpo" else row_loss(name, CONFIGS[name])


def make_case(
    name: str, batch: str, how: str, legs: Legs, modifier: tuple[str, dict[str, Any]], result: Result, check: Result
) -> Case:
    loss_type = {"dpo": "sigmoid", **NAMES}[name]
    rest = {"objective": name, "modifier": modifier[0], "modifier_config": modifier[1]}
    return case(f"{batch}-{name}", f"loss_type={loss_type}, {how}", CONFIGS[name], legs, result, check, **rest)


def ld_dpo(batches: dict[str, Legs]) -> list[Case]:
    cases = []
    for batch, legs in batches.items():
        for name in CONFIGS if batch != "small" else ("dpo",):
            for alpha in (0.5, 0.0):
                result = run(name, legs, ld_alpha=alpha)
                check = ld_transcribed(name, legs, alpha)
                modifier = ("ld_dpo", {"ld_alpha": alpha, "applies_to": "both"})
                cases.append(make_case(name, f"{batch}-{alpha}", f"ld_alpha={alpha}", legs, modifier, result, check))
    assert_six_places(cases[0]["loss"], 0.703664)
    assert_six_places(cases[1]["loss"], 0.694397)
    return cases


def ld_transcribed(name: str, legs: Legs, alpha: float) -> Result:
    if name not in SORTED:
        return modified.ld_dpo(row_loss_of(name), *pair_arrays(legs), alpha=alpha, reference=True)
    # The sorts see sums in which each number of the tail counts α; so does its slope.
    common = [min(map(len, rows)) for rows in zip(legs["chosen"]["logps"], legs["rejected"]["logps"], strict=True)]

    def share(rows: list[list[float]]) -> list[list[float]]:
        return [[x if t < k else alpha * x for t, x in enumerate(row)] for row, k in zip(rows, common, strict=True)]

    loss, grad = transcriptions.aot(*map(share, pair_arrays(legs)), **CONFIGS[name], paired=name == "aot")
    return loss, {leg: share(rows) for leg, rows in grad.items()}


def wpo(batches: dict[str, Legs]) -> list[Case]:
    cases = []
    for batch, legs in batches.items():
        weights = modified.wpo_weights(
            *(legs[leg][key] for key in ("logps", "log_sum_p2") for leg in PAIR), clamped=False
        )
        for name in CONFIGS if batch != "small" else ("dpo",):
            if name in ("hinge", *SORTED):
                continue
            result = run(name, legs, use_weighting=True)
            check = modified.of_each_row([row_loss_of(name)] * len(weights), weights, *pair_arrays(legs))
            cases.append(make_case(name, batch, "use_weighting", legs, ("wpo", {"clamp": False}), result, check))
    assert_six_places(cases[0]["loss"], 1.136850)
    return cases


def f_divergence(batches: dict[str, Legs]) -> list[Case]:
    kinds: dict[str, tuple[str, float]] = {
        "forward_kl": ("forward_kl", 0.700620),
        "js": ("js_divergence", 0.699154),
        "alpha": ("alpha_divergence", 0.706171),
    }
    cases = []
    for batch, legs in batches.items():
        for name in DIFFERENCES if batch != "small" else ("dpo",):
            for kind, (theirs_called, known) in kinds.items():
                result = run(name, legs, f_divergence_type=theirs_called)
                changed = modified.f_divergence(row_loss_of(name), kind=kind, alpha=0.5)
                check = transcriptions.over_rows(changed, *pair_arrays(legs))
                modifier = ("f_divergence", {"divergence": kind, "divergence_alpha": 0.5})
                how = f"f_divergence_type={theirs_called}"
                cases.append(make_case(name, f"{batch}-{kind}", how, legs, modifier, result, check))
                if batch == "small":
                    assert_six_places(cases[-1]["loss"], known)
    return cases


def files() -> dict[str, list[Case]]:
    """The cases of each file that this script writes."""
    generator = torch.Generator().manual_seed(38)
    ragged = pairs(generator, 5)
    batches = {"small": SMALL, "ragged": ragged}
    log_sum_p2 = {name: random_rows(generator, [len(row) for row in ragged[name]["logps"]]) for name in PAIR}
    weighted: dict[str, Legs] = {
        "small": {name: {**SMALL[name], "log_sum_p2": LOG_SUM_P2[name]} for name in PAIR},
        "ragged": {name: {**ragged[name], "log_sum_p2": log_sum_p2[name]} for name in PAIR},
    }
    return {
        "modifiers/ld_dpo": ld_dpo(batches),
        "modifiers/wpo": wpo(weighted),
        "modifiers/f_divergence": f_divergence(batches),
    }


def main() -> None:
    for name, cases in files().items():
        source = "trl, DPOTrainer._compute_loss, float64"
        write(name, source, "tests/vectors/make/trl_modifiers.py", cases, ["torch", "trl"])


if __name__ == "__main__":
    main()
