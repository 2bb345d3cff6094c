"""Makes the vectors of every other pairwise loss of TRL's DPOTrainer, with the code of the installed TRL, in float64.

    python -m tests.vectors.make.trl_pairs

``NAMES`` says which of our objectives TRL calls what. TRL's ``bco_pair`` has no reward shift since 0.29 (``shift:
none``); shifted ones are made by ``trl_bco_pair``. The sorts of ``aot`` and ``aot_unpaired`` are over the whole batch.

The batch ``far`` is one in which the policy has moved dozens of nats away from the reference.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.objectives import transcriptions_pairs as transcriptions
from tests.vectors.make import trl_stand_in
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
    write,
)

NAMES = {
    "robust": "robust",
    "hinge": "hinge",
    "ipo": "ipo",
    "exo": "exo_pair",
    "nca": "nca_pair",
    "bco_pair": "bco_pair",
    "sppo": "sppo_hard",
    "aot": "aot",
    "aot_unpaired": "aot_unpaired",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
    "discopop": "discopop",
    "dpo_norm": "sigmoid_norm",
}
"""Our names of objectives to TRL's ``loss_type``."""

CONFIGS: dict[str, list[dict[str, Any]]] = {
    "robust": [{"beta": 0.1, "label_smoothing": 0.1}, {"beta": 0.7, "label_smoothing": 0.3}],
    "hinge": [{"beta": 0.1}, {"beta": 0.7}],
    "ipo": [{"beta": 0.1, "reduction": "mean"}, {"beta": 1.5, "reduction": "mean"}],
    "exo": [{"beta": 0.1, "label_smoothing": 1e-3}, {"beta": 0.7, "label_smoothing": 0.2}],
    "nca": [{"beta": 0.1}, {"beta": 0.7}],
    "bco_pair": [{"beta": 0.1, "shift": "none"}, {"beta": 0.7, "shift": "none"}],
    "sppo": [{"beta": 0.1}, {"beta": 0.5}, {"beta": 0.001}],
    "aot": [{"beta": 0.1, "label_smoothing": 0.0}, {"beta": 0.7, "label_smoothing": 0.1}],
    "aot_unpaired": [{"beta": 0.1, "label_smoothing": 0.0}, {"beta": 0.7, "label_smoothing": 0.1}],
    "apo_zero": [{"beta": 0.1}, {"beta": 0.7}],
    "apo_down": [{"beta": 0.1}, {"beta": 0.7}],
    "discopop": [{"beta": 0.1, "tau": 0.05}, {"beta": 0.7, "tau": 1.0}],
    "dpo_norm": [{"beta": 0.1}, {"beta": 5.0}],
}
"""Those of the cases; the first is the one whose loss on ``SMALL`` is in ``KNOWN``."""

KNOWN = {
    "robust": 0.717717,
    "hinge": 1.037500,
    "ipo": 25.7265625,
    "exo": 2.826981,
    "nca": 1.396118,
    "bco_pair": 1.405864,
    "sppo": 54.406250,
    "apo_zero": 1.009366,
    "apo_down": 1.006231,
    "discopop": 0.830634,
    "dpo_norm": 0.696399,
}


def theirs(name: str, legs: Legs, config: dict[str, Any], **modified: Any) -> Result:
    """TRL's loss under our name and configuration."""
    options = {key: value for key, value in config.items() if key not in ("reduction", "shift")}
    return trl_stand_in.dpo(legs, loss_type=NAMES[name], **options, **modified)


def transcribed(name: str, legs: Legs, config: dict[str, Any]) -> Result:
    if name in ("aot", "aot_unpaired"):
        return transcriptions.aot(*pair_arrays(legs), **config, paired=name == "aot")
    return transcriptions.over_rows(row_loss(name, config), *pair_arrays(legs))


def row_loss(name: str, config: dict[str, Any]) -> transcriptions.RowLoss:
    """The transcription of a loss in which rows do not meet."""
    options = {"beta": config["beta"], "delta": 0.0} if name == "bco_pair" else config
    return getattr(transcriptions, name)(**options)


def sums(chosen: list[float], rejected: list[float], ref_chosen: list[float], ref_rejected: list[float]) -> Legs:
    """Pairs of one token each."""
    values = {"chosen": (chosen, ref_chosen), "rejected": (rejected, ref_rejected)}
    return {
        name: {"logps": [[x] for x in values[name][0]], "ref_logps": [[x] for x in values[name][1]]} for name in PAIR
    }


def check_sorts() -> None:
    """Three rows whose sorted losses are known; TRL knows no label smoothing for pairs beside this one."""
    paired = sums([-1.0, -2.0, -1.0], [-3.0, -1.0, -1.5], [-1.5, -1.0, -1.0], [-1.0, -2.0, -1.0])
    for smoothing, expected in ((0.0, 0.677105), (0.1, 0.680439)):
        assert_six_places(theirs("aot", paired, {"beta": 0.1, "label_smoothing": smoothing})[0], expected)
    assert_six_places(trl_stand_in.dpo(paired, loss_type="sigmoid", beta=0.1)[0], 0.680846)
    unpaired = sums([-3.0, -3.25, -1.0], [-1.5, -3.5, -2.0], [-3.0] * 3, [-3.0] * 3)
    assert_six_places(theirs("aot_unpaired", unpaired, {"beta": 0.1, "label_smoothing": 0.0})[0], 0.697861)


def files() -> dict[str, list[Case]]:
    """The cases of each file that this script writes."""
    check_sorts()
    generator = torch.Generator().manual_seed(30)
    batches = {"small": SMALL, "ragged": pairs(generator, 5), "far": pairs(generator, 4, scale=12.0)}
    found: dict[str, list[Case]] = {}
    for name, loss_type in NAMES.items():
        found[name] = []
        for batch, legs in batches.items():
            for config in CONFIGS[name]:
                result = theirs(name, legs, config)
                check = transcribed(name, legs, config)
                label = f"{batch}-beta{config['beta']}"
                found[name].append(case(label, f"loss_type={loss_type}", config, legs, result, check))
        if name in KNOWN:
            assert_six_places(found[name][0]["loss"], KNOWN[name])
    by_eye = {name: {entry["name"]: entry["loss"] for entry in cases} for name, cases in found.items()}
    assert_six_places(by_eye["sppo"]["small-beta0.5"], 3.406250)
    assert_six_places(by_eye["dpo_norm"]["small-beta5.0"], 1.134802)
    return found


def main() -> None:
    for name, cases in files().items():
        source = f"trl, DPOTrainer._compute_loss, loss_type={NAMES[name]}, float64"
        write(name, source, "tests/vectors/make/trl_pairs.py", cases, ["torch", "trl"])


if __name__ == "__main__":
    main()
