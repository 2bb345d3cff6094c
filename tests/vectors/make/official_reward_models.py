"""Makes vectors of reward models with the authors' code of HelpSteer2's, NVIDIA's NeMo-Aligner, in float64.

    git clone https://github.com/NVIDIA/NeMo-Aligner
    git -C NeMo-Aligner checkout af2b3bd96ad78190f6ebfb552b9e599e313ce027
    python -m tests.vectors.make.official_reward_models NeMo-Aligner

``loss_func`` and what it calls are compiled alone, since the file imports packages that need not be installed for this,
and run unmodified. What they cast to single precision is double here.

Their head has nine outputs, of which Bradley-Terry losses read the fifth, helpfulness; the others are drawn here, and
the script checks that they get no gradient. A microbatch is one pair in the order of the data; the label of both is its
strength, below 0 where the first is preferred. The step is the mean over microbatches, so that the mean over rows is
theirs. ``bradley_terry_helpsteer2.json`` and ``margin_bt_helpsteer2.json`` are beside what TRL makes.

Regression divides the squares of a microbatch by its ratings, and averages over microbatches. Cases of
``reward_regression.json`` are of microbatches of one completion, where that is the mean over rows of the mean over a
row's ratings. ``differences/reward_regression.json`` has the same rows in one microbatch.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from tests.vectors.make import transcriptions_reward_model as transcriptions
from tests.vectors.make.writing import (
    PAIR,
    Case,
    OfHeads,
    assert_six_places,
    case_of_heads,
    excerpt,
    in_double,
    random_values,
    write,
)

MADE_BY = "tests/vectors/make/official_reward_models.py"
SOURCE = (
    "NVIDIA/NeMo-Aligner at af2b3bd96ad78190f6ebfb552b9e599e313ce027, "
    "MegatronGPTRegressionRewardModel.loss_func, float64"
)
OUTPUTS = 9
HELPFULNESS = 4
MASKED = -100.0

Columns = dict[str, list[float]]


def loss_and_slopes(checkout: Path, kind: str, outputs: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Their loss of one microbatch, and its gradient by every output of the head."""
    model = excerpt(
        checkout / "nemo_aligner" / "models" / "nlp" / "gpt" / "megatron_gpt_regression_reward_model.py",
        "MegatronGPTRegressionRewardModel",
        {"torch": torch},
        methods=("loss_func", "bt_loss_func", "reg_loss_func"),
    )()
    model.cfg = OmegaConf.create({"loss_func": kind, "loss_mask_val": MASKED})
    outputs = outputs.detach().requires_grad_()
    with in_double():
        loss = model.loss_func(outputs, labels)
        (slopes,) = torch.autograd.grad(loss, outputs)
    return loss.item(), slopes


def of_pairs(checkout: Path, kind: str, pairs: Columns, strength: list[float], generator: torch.Generator) -> OfHeads:
    rows = len(strength)
    loss, grad = 0.0, {f"{leg}/helpfulness": [] for leg in PAIR}
    for i, m in enumerate(strength):
        # Every other pair has the preferred response in front; where none is preferred the second counts as such.
        first_preferred = bool(i % 2) and m != 0
        order = PAIR if first_preferred else PAIR[::-1]
        outputs = torch.randn(2, OUTPUTS, generator=generator, dtype=torch.float64)
        outputs[:, HELPFULNESS] = torch.tensor([pairs[leg][i] for leg in order], dtype=torch.float64)
        labels = torch.full((2, OUTPUTS), MASKED, dtype=torch.float64)
        labels[:, 0] = -m if first_preferred else m
        value, slopes = loss_and_slopes(checkout, kind, outputs, labels)
        loss += value / rows
        for leg, of_response in zip(order, slopes, strict=True):
            assert of_response.count_nonzero() == of_response[HELPFULNESS].count_nonzero()
            grad[f"{leg}/helpfulness"].append(of_response[HELPFULNESS].item() / rows)
    return loss, grad


def stacked(columns: Columns, names: list[str]) -> Tensor:
    return torch.tensor([columns[name] for name in names], dtype=torch.float64).T


def of_microbatches(checkout: Path, values: Columns, ratings: Columns, *, size: int) -> OfHeads:
    """The mean over microbatches of ``size`` completions."""
    names = list(values)
    outputs, labels = stacked(values, names), stacked(ratings, names).nan_to_num(nan=MASKED)
    parts = list(zip(outputs.split(size), labels.split(size), strict=True))
    found = [loss_and_slopes(checkout, "regression", *part) for part in parts]
    slopes = torch.cat([slope for _, slope in found]) / len(parts)
    grad = {f"completion/{name}": slopes[:, i].tolist() for i, name in enumerate(names)}
    return math.fsum(loss for loss, _ in found) / len(parts), grad


def write_pairs(checkout: Path) -> None:
    generator = torch.Generator().manual_seed(51)
    drawn = {leg: random_values(generator, 8) for leg in PAIR}
    far = {leg: random_values(generator, 4, scale=80.0) for leg in PAIR}
    batches: dict[str, tuple[Columns, list[float]]] = {
        "one": ({"chosen": [1.2], "rejected": [0.5]}, [2.0]),
        "drawn": (drawn, [1.0, 3.0, 2.0, 0.0, 1.0, 2.0, 3.0, 0.0]),
        "far": (far, [3.0, 1.0, 2.0, 1.0]),
        "equal": ({"chosen": [0.0, 1.5, -40.0], "rejected": [0.0, 1.5, -40.0]}, [1.0, 2.0, 3.0]),
    }
    for name, kind, known in (
        ("bradley_terry", "regular_bt", 0.403186),
        ("margin_bt", "margin_bt", 1.541008),
        ("scaled_bt", "scaled_bt", 0.806372),
    ):
        cases: list[Case] = []
        for batch, (pairs, strength) in batches.items():
            result = of_pairs(checkout, kind, pairs, strength, generator)
            arguments = (strength,) if kind != "regular_bt" else ()
            value, by_leg = getattr(transcriptions, name)(pairs["chosen"], pairs["rejected"], *arguments)
            check = (value, {f"{leg}/helpfulness": slopes for leg, slopes in by_leg.items()})
            rest: dict[str, Any] = {}
            if kind != "regular_bt":
                rest["scores"] = {"chosen": strength, "rejected": [0.0] * len(strength)}
            heads = {leg: {"helpfulness": pairs[leg]} for leg in PAIR}
            config = {"attribute": "helpfulness"}
            cases.append(case_of_heads(batch, f"loss_func={kind}", config, heads, result, check, **rest))
        assert_six_places(cases[0]["loss"], known)
        if name == "scaled_bt":
            write(name, SOURCE, MADE_BY, cases, ["torch"])
        else:
            write(f"{name}_helpsteer2", SOURCE, MADE_BY, cases, ["torch"], objective=name)


def write_regression(checkout: Path) -> None:
    generator = torch.Generator().manual_seed(52)
    names = ["helpfulness", "correctness", "verbosity"]

    def drawn(rows: int, share: float) -> tuple[Columns, Columns]:
        """Values, and ratings from 0 to 4 of about that share of the attributes, at least one in a row."""
        values = {name: random_values(generator, rows) for name in names}
        ratings = torch.randint(0, 5, (rows, len(names)), generator=generator).double()
        rated = torch.rand(rows, len(names), generator=generator) < share
        rated[torch.arange(rows), torch.randint(0, len(names), (rows,), generator=generator)] = True
        columns = torch.where(rated, ratings, math.nan).T.tolist()
        return values, dict(zip(names, columns, strict=True))

    one = [3.1, 2.0, 4.0], [4.0, math.nan, 3.0]
    batches: dict[str, tuple[Columns, Columns]] = {
        "one": tuple({name: [x] for name, x in zip(names, numbers, strict=True)} for numbers in one),
        "score": ({"score": random_values(generator, 5)}, {"score": [4.0, 0.5, -1.25, 3.0, 2.0]}),
        "all-rated": drawn(5, 1.0),
        "some-rated": drawn(7, 0.5),
    }
    cases: list[Case] = []
    for batch, (values, ratings) in batches.items():
        result = of_microbatches(checkout, values, ratings, size=1)
        value, by_name = transcriptions.reward_regression(values, ratings)
        check = (value, {f"completion/{name}": slopes for name, slopes in by_name.items()})
        config = {"attributes": list(values)}
        how = "loss_func=regression, microbatches of one"
        cases.append(case_of_heads(batch, how, config, {"completion": values}, result, check, scores=ratings))
    assert_six_places(cases[0]["loss"], 0.905000)
    write("reward_regression", SOURCE, MADE_BY, cases, ["torch"])
    # Rows with one and with three ratings, in one microbatch and in two.
    values = {"helpfulness": [3.0, 1.0, 2.0], "correctness": [0.0, 2.0, 1.0], "verbosity": [0.0, 2.5, -1.0]}
    ratings = {"helpfulness": [1.0, 2.0, 4.0], "correctness": [math.nan, 4.0, 1.5], "verbosity": [math.nan, 2.0, 0.0]}
    apart = []
    for size in (3, 2):
        result = of_microbatches(checkout, values, ratings, size=size)
        how = f"loss_func=regression, microbatches of {size}"
        arguments = (f"of-{size}", how, {"attributes": names}, {"completion": values}, result, result)
        apart.append(case_of_heads(*arguments, scores=ratings))
    write("differences/reward_regression", SOURCE, MADE_BY, apart, ["torch"])


def main(checkout: Path) -> None:
    write_pairs(checkout)
    write_regression(checkout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
