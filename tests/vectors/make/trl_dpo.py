"""Makes ``dpo.json`` and ``sft.json`` with the loss code of the installed TRL, in float64.

    python -m tests.vectors.make.trl_dpo

TRL 1.16 ignores ``label_smoothing`` for ``sigmoid`` but not for ``aot``. On a single row the sort in ``aot`` does
nothing and what is left is DPO with label smoothing, so the smoothed cases are means over rows taken one at a time.
"""

from __future__ import annotations

import torch

from tests.objectives import transcriptions
from tests.vectors.make import trl_stand_in
from tests.vectors.make.writing import SMALL, Case, Legs, case, one_row_at_a_time, pair_arrays, pairs, write

SOURCE = "trl, DPOTrainer._compute_loss, float64"


def files() -> dict[str, list[Case]]:
    """The cases of each file that this script writes."""
    batches = {"small": SMALL, "ragged": pairs(torch.Generator().manual_seed(20), 5)}
    dpo, sft = [], []
    for batch, legs in batches.items():
        for beta in (0.1, 0.7):
            config = {"beta": beta, "label_smoothing": 0.0}
            result = trl_stand_in.dpo(legs, loss_type="sigmoid", beta=beta)
            check = transcriptions.dpo(*pair_arrays(legs), **config)
            dpo.append(case(f"{batch}-beta{beta}", "loss_type=sigmoid", config, legs, result, check))
        config = {"beta": 0.1, "label_smoothing": 0.1}
        result = one_row_at_a_time(trl_stand_in.dpo, legs, loss_type="aot", **config)
        check = transcriptions.dpo(*pair_arrays(legs), **config)
        how = "loss_type=aot, one row at a time, mean over rows"
        dpo.append(case(f"{batch}-smoothed", how, config, legs, result, check))
    for batch, legs in batches.items():
        for leg in ("chosen", "gold"):
            alone: Legs = {leg: {"logps": legs["chosen"]["logps"]}}
            loss, grad = trl_stand_in.dpo(legs, loss_type="sft", beta=0.1)
            check_loss, check_grad = transcriptions.sft(alone[leg]["logps"])
            how = "loss_type=sft, the response in the place of TRL's chosen one"
            result, check = (loss, {leg: grad["chosen"]}), (check_loss, {leg: check_grad})
            sft.append(case(f"{batch}-{leg}", how, {"leg": leg}, alone, result, check))
    return {"dpo": dpo, "sft": sft}


def main() -> None:
    for name, cases in files().items():
        write(name, SOURCE, "tests/vectors/make/trl_dpo.py", cases, ["torch", "trl"])


if __name__ == "__main__":
    main()
