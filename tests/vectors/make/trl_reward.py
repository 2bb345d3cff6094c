"""Makes ``bradley_terry.json`` and ``margin_bt.json`` with the installed TRL's RewardTrainer, in float64.

    python -m tests.vectors.make.trl_reward

TRL subtracts a ``margin`` column as it is, whatever its sign, and centres rewards beside it where it is told to, which
our ``margin_bt`` can't.
"""

from __future__ import annotations

import torch

from tests.vectors.make import transcriptions_reward_model as transcriptions
from tests.vectors.make import trl_stand_in
from tests.vectors.make.writing import (
    PAIR,
    Case,
    Heads,
    OfHeads,
    assert_six_places,
    case_of_heads,
    random_values,
    write,
)

ATTRIBUTE = "reward"


def named(result: OfHeads, attribute: str = ATTRIBUTE) -> OfHeads:
    """What has its gradient by leg, by leg and output."""
    return result[0], {f"{leg}/{attribute}": slopes for leg, slopes in result[1].items()}


def heads_of(pairs: dict[str, list[float]], attribute: str = ATTRIBUTE) -> Heads:
    return {leg: {attribute: pairs[leg]} for leg in PAIR}


def plain(batches: dict[str, dict[str, list[float]]]) -> list[Case]:
    cases = []
    for batch, pairs in batches.items():
        for center in (0.0, 0.01, 0.5):
            # TRL's default is None; 0 is the same loss.
            result = named(trl_stand_in.reward_model(pairs["chosen"], pairs["rejected"], center=center or None))
            check = named(transcriptions.bradley_terry(pairs["chosen"], pairs["rejected"], center=center))
            config = {"center_rewards_coefficient": center}
            how = f"center_rewards_coefficient={center or None}"
            cases.append(case_of_heads(f"{batch}-c{center}", how, config, heads_of(pairs), result, check))
    assert_six_places(cases[0]["loss"], 0.403186)
    assert_six_places(cases[1]["loss"], 0.432086)
    return cases


def with_margin(batches: dict[str, dict[str, list[float]]], strengths: dict[str, list[float]]) -> list[Case]:
    cases = []
    for batch, pairs in batches.items():
        strength = strengths[batch]
        result = named(trl_stand_in.reward_model(pairs["chosen"], pairs["rejected"], margin=strength))
        check = named(transcriptions.margin_bt(pairs["chosen"], pairs["rejected"], strength))
        # Scores whose difference is m to the last bit.
        below = [0.25 * i for i in range(len(strength))]
        scores = {"chosen": [m + score for m, score in zip(strength, below, strict=True)], "rejected": below}
        cases.append(case_of_heads(batch, "margin", {}, heads_of(pairs), result, check, scores=scores))
    assert_six_places(cases[0]["loss"], 1.541008)
    return cases


def files() -> dict[str, list[Case]]:
    """The cases of each file that this script writes."""
    generator = torch.Generator().manual_seed(50)

    def drawn(rows: int, scale: float) -> dict[str, list[float]]:
        return {leg: random_values(generator, rows, scale=scale) for leg in PAIR}

    batches = {
        "one": {"chosen": [1.2], "rejected": [0.5]},
        "drawn": drawn(7, 2.0),
        # Differences of a hundred, in either direction.
        "far": drawn(4, 80.0),
        "equal": {"chosen": [0.0, 1.5, -40.0], "rejected": [0.0, 1.5, -40.0]},
    }
    strengths = {
        "one": [2.0],
        # None, and one that contradicts the label, are among them.
        "drawn": [1.0, 3.0, 2.0, 0.0, 1.0, -2.0, 0.5],
        "far": [3.0, 1.0, 2.0, 1.0],
        "equal": [1.0, 2.0, 3.0],
    }
    return {"bradley_terry": plain(batches), "margin_bt": with_margin(batches, strengths)}


def main() -> None:
    for name, cases in files().items():
        source = "trl, RewardTrainer.compute_loss, float64"
        source += ", its margin" if name == "margin_bt" else ""
        write(name, source, "tests/vectors/make/trl_reward.py", cases, ["torch", "trl"])


if __name__ == "__main__":
    main()
