"""Makes ``ntl_mse.json`` and ``ntl_was.json`` with the authors' code of the number token loss, in float64.

    git clone https://github.com/tum-ai/number-token-loss
    git -C number-token-loss checkout df2aa8724ea8b9018f21ace4d7f65c563fb129d4
    python -m tests.vectors.make.official_number_tokens number-token-loss

``NumberTokenLoss`` is the squared error, ``AbsDiffNumberTokenLoss`` the Wasserstein distance; its other form, on
cumulative distributions (``WassersteinNumberTokenLoss``), is checked to be the same on digits. The tokenizer is a
stand-in that knows ``NUMBERS``. The files import packages that need not be installed for this: only what is named is
compiled.

``number_value``, ``number_mean`` and ``number_distance`` are computed from the logits here, position by position; null
where a token is no number. The code is differentiated by the logits; that gradient is at each position a multiple of
the gradient of mean or distance, and that multiple is written down. ``logps`` have no gradient.

The authors' squared error looks the value of masked labels, −100, up in its table: the token 100 places from the end.
Here that is no number. ``differences/ntl_mse.json`` has a vocabulary in which it is one, and a batch without numbers.
"""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.objectives import transcriptions_pairs_free as transcriptions
from tests.vectors.make.writing import (
    IGNORED,
    Case,
    Legs,
    Result,
    assert_six_places,
    case,
    excerpt,
    in_double,
    mask_of,
    padded,
    ragged,
    slopes_through,
    write,
)

MADE_BY = "tests/vectors/make/official_number_tokens.py"
COMMIT = "df2aa8724ea8b9018f21ace4d7f65c563fb129d4"
NUMBERS = {20 + digit: float(digit) for digit in range(10)} | {31: 12.0, 40: 345.0}
"""Ids of number tokens, and their values."""

DIGITS = {20 + digit: float(digit) for digit in range(10)}
FILES = {"ntl_mse": "number_token_loss.py", "ntl_was": "abs_diff_number_token_loss.py"}
CLASSES = {"ntl_mse": "NumberTokenLoss", "ntl_was": "AbsDiffNumberTokenLoss"}
FEATURES = {"ntl_mse": "number_mean", "ntl_was": "number_distance"}


class Tokenizer:
    """Stands where theirs would: what it knows of tokens are the numbers among them."""

    def __init__(self, numbers: dict[int, float]) -> None:
        self.values = {f"<{id_}>": value for id_, value in numbers.items()}

    def get_num_tokens(self) -> list[str]:
        return list(self.values)

    def get_vocab(self) -> dict[str, int]:
        return {token: int(token[1:-1]) for token in self.values}

    def decode_number_token(self, token: str, ignore_order: bool = True) -> float:
        return self.values[token]


def loss_function(checkout: Path, name: str, numbers: dict[int, float], vocabulary: int) -> Any:
    folder = checkout / "src" / "ntl"
    scope: dict[str, Any] = {"torch": torch, "F": F, "logging": logging}
    excerpt(folder / "utils" / "number_token_selector.py", "NumberTokenSelector", scope)
    cls = excerpt(folder / "loss_functions" / FILES[name], CLASSES[name], scope)
    return cls(Tokenizer(numbers), vocabulary, "cpu")


def features(logits: Tensor, labels: Tensor, numbers: dict[int, float]) -> dict[str, Tensor]:
    """What our objectives are given, of every position."""
    ids, values = list(numbers), torch.tensor(list(numbers.values()), dtype=torch.float64)
    p = logits[..., ids].softmax(-1)
    of_token = torch.full((logits.shape[-1],), math.nan, dtype=torch.float64)
    of_token[ids] = values
    value = of_token[labels.clamp(min=0)]
    distance = (p * (values - value.nan_to_num()[..., None]).abs()).sum(-1)
    return {
        "number_value": value,
        "number_mean": (p * values).sum(-1),
        "number_distance": torch.where(value.isnan(), math.nan, distance),
    }


def make_case(
    checkout: Path, name: str, label: str, tokens: list[list[int]], logits: Tensor, numbers: dict[int, float]
) -> Case:
    """``tokens`` are the responses', ``logits`` (row, token, vocabulary) what predicts them."""
    mask = mask_of([[0.0] * len(row) for row in tokens], logits.shape[1])
    labels = torch.where(
        mask.bool(), padded([[float(x) for x in row] for row in tokens], logits.shape[1]), IGNORED
    ).long()
    logits = logits.clone().requires_grad_()
    known = features(logits, labels, numbers)
    with in_double():
        loss = loss_function(checkout, name, numbers, logits.shape[-1]).forward(logits, labels)
        (by_logits,) = torch.autograd.grad(loss, logits)
    feature = FEATURES[name]
    (slopes,) = slopes_through(
        by_logits, logits, [known[feature].nan_to_num()], mask * known["number_value"].isfinite()
    )
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    shape = [[0.0] * len(row) for row in tokens]
    made = {"logps": logps, "number_value": known["number_value"], feature: known[feature]}
    legs: Legs = {"gold": {key: ragged(values.detach(), shape) for key, values in made.items()}}
    result: Result = (loss.item(), {"gold": shape, f"gold/{feature}": ragged(slopes, shape)})
    # Nothing flows where there is no number, which slopes_through was not shown.
    assert not by_logits[known["number_value"].isnan()].any()
    check_loss, check_grad = getattr(transcriptions, name)(legs["gold"]["number_value"], legs["gold"][feature])
    how = f"{CLASSES[name]}, {len(numbers)} number tokens of {logits.shape[-1]}"
    return case(label, how, {"leg": "gold"}, legs, result, (check_loss, {"gold": shape, f"gold/{feature}": check_grad}))


def check_by_eye(checkout: Path) -> None:
    """Ten digits, the answer 4: all logits 0 but those of 3, 4 and 5; then half of the mass on 0, half on 8."""
    near = torch.zeros(1, 1, 130, dtype=torch.float64)
    near[..., 23], near[..., 24], near[..., 25] = 1.0, 2.0, 1.0
    split = torch.full((1, 1, 130), -200.0, dtype=torch.float64)
    split[..., 20] = split[..., 28] = 0.0
    label = torch.tensor([[24]])
    with in_double():
        for name, of_near, of_split in (("ntl_mse", 0.063604, 0.0), ("ntl_was", 1.434334, 4.0)):
            forward = loss_function(checkout, name, DIGITS, 130).forward
            assert_six_places(forward(near, label).item(), of_near)
            assert_six_places(forward(split, label).item(), of_split)


def check_cumulative(checkout: Path, logits: Tensor, tokens: list[list[int]]) -> None:
    scope: dict[str, Any] = {"torch": torch, "F": F, "logging": logging}
    path = checkout / "src" / "ntl" / "loss_functions" / "wasserstein_distance_number_token_loss.py"
    # The stand-in's values are in order of its ids, as this class wants them.
    cumulative = excerpt(path, "WassersteinNumberTokenLoss", scope)
    labels = torch.tensor(tokens)
    with in_double():
        one = cumulative(Tokenizer(DIGITS), logits.shape[-1], "cpu", order_numbers=True).forward(logits, labels)
        other = loss_function(checkout, "ntl_was", DIGITS, logits.shape[-1]).forward(logits, labels)
    assert math.isclose(one.item(), other.item(), rel_tol=1e-12)


def main(checkout: Path) -> None:
    check_by_eye(checkout)
    generator = torch.Generator().manual_seed(35)

    def drawn(rows: int, width: int, vocabulary: int) -> Tensor:
        return 2 * torch.randn(rows, width, vocabulary, generator=generator, dtype=torch.float64)

    check_cumulative(checkout, drawn(2, 3, 130), [[20, 25, 29], [23, 5, 21]])
    mixed = [[24, 7, 29, 3, 20], [1, 28], [2, 3, 4], [40, 31, 22, 27]]
    batches = {
        "digits": (mixed[:3], drawn(3, 5, 130), DIGITS),
        "longer-numbers": (mixed, drawn(4, 5, 130), NUMBERS),
        "one-number": ([[5, 26, 6]], drawn(1, 3, 130), DIGITS),
    }
    source = f"tum-ai/number-token-loss at {COMMIT}"
    for name, cls in CLASSES.items():
        cases = [make_case(checkout, name, label, *batch) for label, batch in batches.items()]
        write(name, f"{source}, {cls}.forward, float64", MADE_BY, cases, ["torch"])
    write("differences/ntl_mse", f"{source}, NumberTokenLoss.forward, float64", MADE_BY, apart(checkout), ["torch"])


def apart(checkout: Path) -> list[Case]:
    """Where the squared error of the authors' code is not the mean over number tokens."""
    generator = torch.Generator().manual_seed(36)
    cases = []
    for name, tokens, how in (
        ("masked-label-is-a-number", [[24, 7, 29], [28]], "label −100 has the value of token 25 of 125, which is 5"),
        ("no-number", [[1, 2, 3], [4]], "no label is a number, nor is token 30 of 130"),
    ):
        vocabulary = 125 if name == "masked-label-is-a-number" else 130
        logits = torch.randn(2, 3, vocabulary, generator=generator, dtype=torch.float64)
        labels = torch.tensor([row + [IGNORED] * (3 - len(row)) for row in tokens])
        known = features(logits, labels, DIGITS)
        with in_double():
            loss = loss_function(checkout, "ntl_mse", DIGITS, vocabulary).forward(logits, labels).item()
        shape = [[0.0] * 3 for _ in tokens]
        leg = {key: ragged(known[key], shape) for key in ("number_value", "number_mean")}
        leg = {key: [[None if math.isnan(x) else x for x in row] for row in rows] for key, rows in leg.items()}
        leg |= {"logps": shape, "mask": mask_of([[0.0] * len(row) for row in tokens], 3).tolist()}
        loss = None if math.isnan(loss) else loss
        cases.append({"name": name, "how": how, "config": {"leg": "gold"}, "legs": {"gold": leg}, "loss": loss})
    return cases


if __name__ == "__main__":
    main(Path(sys.argv[1]))
