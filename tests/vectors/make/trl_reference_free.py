"""Makes ``cpo.json``, ``simpo.json``, ``alpha_po.json`` and ``orpo.json`` with the installed TRL's code, in float64.

    python -m tests.vectors.make.trl_reference_free

CPO, SimPO and AlphaPO are one trainer there; ``how`` says what it is set to. Its NLL is over the chosen response.

ORPO's NLL is over prompt *and* chosen response there, ours over the response. Nothing predicts the first token of a
sequence, so that a prompt of a single token has no scored tokens, and both are the same: so it is here. TRL's NLL is a
mean over the tokens of the batch (``nll: token``); ``sequence`` is TRL one row at a time, mean over rows.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.objectives import transcriptions_pairs_free as transcriptions
from tests.vectors.make import trl_stand_in
from tests.vectors.make.writing import (
    PAIR,
    SMALL,
    Case,
    Legs,
    Result,
    assert_six_places,
    case,
    one_row_at_a_time,
    random_leg,
    write,
)

SOURCES = {
    "cpo": "trl, CPOTrainer.get_batch_loss_metrics, float64",
    "simpo": "trl, CPOTrainer.get_batch_loss_metrics, loss_type=simpo, float64",
    "alpha_po": "trl, CPOTrainer.get_batch_loss_metrics, loss_type=simpo with alpha, float64",
    "orpo": "trl, ORPOTrainer.get_batch_loss_metrics, one-token prompt, float64",
}

CONFIGS: dict[str, list[dict[str, Any]]] = {
    "cpo": [
        {"beta": 0.1, "cpo_alpha": 1.0, "label_smoothing": 0.0, "link": "sigmoid"},
        {"beta": 0.7, "cpo_alpha": 0.3, "label_smoothing": 0.1, "link": "sigmoid"},
        {"beta": 0.1, "cpo_alpha": 0.0, "label_smoothing": 0.0, "link": "sigmoid"},
        {"beta": 0.7, "cpo_alpha": 0.5, "label_smoothing": 0.0, "link": "hinge"},
        {"beta": 0.5, "cpo_alpha": 1.0, "label_smoothing": 0.0, "link": "ipo"},
    ],
    "simpo": [
        {"beta": 2.5, "gamma": 1.375, "label_smoothing": 0.0},
        {"beta": 2.0, "gamma": 0.5, "label_smoothing": 0.0},
        {"beta": 10.0, "gamma": 3.0, "label_smoothing": 0.1},
    ],
    "alpha_po": [
        {"beta": 2.5, "alpha": 0.25, "gamma": 0.1},
        {"beta": 2.0, "alpha": -0.5, "gamma": 0.5},
        {"beta": 2.0, "alpha": 0.0, "gamma": 0.5},
    ],
    "orpo": [{"beta": 0.1, "nll": "token"}, {"beta": 0.7, "nll": "token"}, {"beta": 0.7, "nll": "sequence"}],
}


def theirs(name: str, legs: Legs, config: dict[str, Any]) -> tuple[Result, str]:
    """TRL's loss under our name and configuration, and what TRL was set to."""
    beta = config["beta"]
    if name == "orpo":
        if config["nll"] == "token":
            return trl_stand_in.orpo(legs, beta=beta), f"beta={beta}"
        return one_row_at_a_time(trl_stand_in.orpo, legs, beta=beta), f"beta={beta}, one row at a time, mean over rows"
    if name == "cpo":
        options = {"loss_type": config["link"], "cpo_alpha": config["cpo_alpha"]}
    else:
        options = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": config["gamma"]}
    if "label_smoothing" in config:
        options["label_smoothing"] = config["label_smoothing"]
    if "alpha" in config:
        options["alpha"] = config["alpha"]
    how = ", ".join(f"{key}={value}" for key, value in options.items())
    return trl_stand_in.cpo(legs, beta=beta, **options), how


def transcribed(name: str, legs: Legs, config: dict[str, Any]) -> Result:
    responses = [legs[leg]["logps"] for leg in PAIR]
    if name == "cpo":
        options = {key: value for key, value in config.items() if key != "cpo_alpha"}
        return transcriptions.cpo(*responses, alpha=config["cpo_alpha"], **options)
    if name == "orpo":
        return transcriptions.orpo(*responses, weight=config["beta"], form=config["nll"])
    if name == "alpha_po" and config["alpha"] == 0:
        return transcriptions.simpo(*responses, beta=config["beta"], gamma=config["gamma"])
    return getattr(transcriptions, name)(*responses, **config)


def files() -> dict[str, list[Case]]:
    """The cases of each file that this script writes."""
    generator = torch.Generator().manual_seed(31)
    batches: dict[str, Legs] = {
        "small": {name: {"logps": SMALL[name]["logps"]} for name in PAIR},
        "ragged": {name: random_leg(generator, 5, reference=False) for name in PAIR},
        # Nearly certain responses and nearly impossible ones.
        "extreme": {
            "chosen": {"logps": [[-0.001, -0.0002], [-30.0, -12.5, -40.0], [-0.003]]},
            "rejected": {"logps": [[-25.0], [-0.0005, -0.001], [-0.002, -0.001, -0.004]]},
        },
    }
    found: dict[str, list[Case]] = {}
    for name, configs in CONFIGS.items():
        found[name] = []
        for batch, legs in batches.items():
            for number, config in enumerate(configs, start=1):
                result, how = theirs(name, legs, config)
                check = transcribed(name, legs, config)
                found[name].append(case(f"{batch}-{number}", how, config, legs, result, check))
    assert_six_places(found["cpo"][0]["loss"], 1.726934)
    assert_six_places(found["cpo"][2]["loss"], 0.676934)
    assert_six_places(found["simpo"][0]["loss"], 1.728820)
    assert_six_places(found["simpo"][1]["loss"], 1.055474)
    assert_six_places(found["alpha_po"][0]["loss"], 0.861604)
    assert_six_places(found["orpo"][0]["loss"], 1.124321)
    return found


def main() -> None:
    for name, cases in files().items():
        write(name, SOURCES[name], "tests/vectors/make/trl_reference_free.py", cases, ["torch", "trl"])


if __name__ == "__main__":
    main()
