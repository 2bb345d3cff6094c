"""Makes ``irpo.json`` and ``bco_pair_shifted.json`` with the loss code of TRL 0.28.0, in float64.

It is the last release with ``rpo_alpha``, and with a reward shift in ``bco_pair``.

    pip download trl==0.28.0 --no-deps --dest WHEELS
    unzip WHEELS/trl-0.28.0-py3-none-any.whl -d TRL
    PYTHONPATH=TRL python -m tests.vectors.make.trl_irpo

``get_batch_loss_metrics`` runs on a trainer made without its constructor; log-probs are prescribed through logits over
two tokens.

TRL's NLL is a mean over the chosen tokens of the batch: ``form=token``. The paper divides each row's NLL by its own
length; with one row in the batch the two are the same, so ``form=sequence`` is TRL one row at a time, mean over rows.

TRL writes id 0 over what the mask excludes and then ignores id 0 in the NLL, and with it real tokens that have id 0,
though not in the preference term. Responses here consist of id 1. In the one case where some tokens have id 0, those
have weight 0: that is what TRL does to them, and not what we would.

The shift of ``bco_pair`` is updated before use there and carried from batch to batch, as a mean of the batches' means;
batches here are of one size, so that it is the mean of all rewards. ``state`` holds what has been summed up so far, the
current batch included: δ = reward_total / reward_count.
"""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import trl.import_utils as import_utils

_is_package_available = import_utils._is_package_available
# TRL 0.28 takes the answer for a boolean. transformers 5 answers with a pair, which is true for missing packages too.
import_utils._is_package_available = lambda name, return_version=False: (
    _is_package_available(name, return_version) if return_version else _is_package_available(name)[0]
)

from trl.trainer.dpo_config import FDivergenceType  # noqa: E402
from trl.trainer.dpo_trainer import DPOTrainer  # noqa: E402
from trl.trainer.utils import RunningMoments  # noqa: E402

from tests.objectives import transcriptions, transcriptions_pairs  # noqa: E402
from tests.vectors.make.writing import (  # noqa: E402
    ALONE,
    PAIR,
    SMALL,
    Case,
    Legs,
    PrescribedLogits,
    Result,
    assert_six_places,
    both_legs,
    case,
    in_double,
    logits_of,
    mask_of,
    one_row_at_a_time,
    padded,
    pair_arrays,
    pairs,
    random_leg,
    write,
)


def trl_loss(
    legs: Legs,
    *,
    beta: float,
    alpha: float | None = None,
    loss_type: str = "sigmoid",
    running: RunningMoments | None = None,
) -> Result:
    """TRL's loss on these pairs, and its gradient with respect to each log-prob. Tokens of weight 0 get id 0."""
    responses = [row for name in PAIR for row in legs[name]["logps"]]
    width = max(map(len, responses))
    mask = mask_of(responses, width)
    ids = mask.clone()
    if "weight" in legs["chosen"]:
        ids[: len(responses) // 2] = padded(legs["chosen"]["weight"], width).long()
    logps = padded(responses, width).requires_grad_()
    logits = logits_of(logps, mask, ids)
    # One prompt token in front, and a last position that predicts nothing.
    model = PrescribedLogits(torch.cat([logits, torch.zeros_like(logits[:, :1])], dim=1))
    trainer = object.__new__(DPOTrainer)
    trainer.accelerator = ALONE
    trainer.args = SimpleNamespace(rpo_alpha=alpha, use_liger_kernel=False, ld_alpha=None)
    trainer.beta = beta
    trainer.label_smoothing = 0.0
    trainer.loss_type = [loss_type]
    trainer.running = running
    trainer.loss_weights = None
    trainer.reference_free = False
    trainer.f_divergence_type = FDivergenceType.REVERSE_KL
    trainer.is_encoder_decoder = False
    trainer.aux_loss_enabled = False
    trainer.padding_free = False
    trainer.use_logits_to_keep = False
    trainer.use_weighting = False
    trainer.max_length = None
    trainer.pad_token_id = 0
    rows = len(responses) // 2
    references = padded([row for name in PAIR for row in legs[name]["ref_logps"]], width).sum(dim=1)
    batch = {
        "prompt_input_ids": torch.ones(rows, 1, dtype=torch.int64),
        "prompt_attention_mask": torch.ones(rows, 1, dtype=torch.int64),
        "chosen_input_ids": ids[:rows],
        "chosen_attention_mask": mask[:rows],
        "rejected_input_ids": ids[rows:],
        "rejected_attention_mask": mask[rows:],
        "ref_chosen_logps": references[:rows],
        "ref_rejected_logps": references[rows:],
    }
    loss, _ = trainer.get_batch_loss_metrics(model, batch)
    (slopes,) = torch.autograd.grad(loss, logps)
    return loss.item(), both_legs(slopes, legs)


def make_case(name: str, legs: Legs, config: dict[str, Any]) -> Case:
    function, how = {
        "token": (trl_loss, "rpo_alpha"),
        "sequence": (partial(one_row_at_a_time, trl_loss), "rpo_alpha, one row at a time, mean over rows"),
    }[config["form"]]
    weight = legs["chosen"].get("weight")
    if weight is not None:
        how += "; chosen tokens of weight 0 have id 0, which TRL ignores"
    result = function(legs, beta=config["beta"], alpha=config["alpha"])
    check = transcriptions.irpo(*pair_arrays(legs), **config, chosen_weight=weight)
    return case(name, how, config, legs, result, check)


def shifted(batches: list[Legs], *, beta: float) -> list[Case]:
    """Consecutive batches of one training run with ``bco_pair``, one case each."""
    running = RunningMoments(ALONE)
    cases = []
    seen: list[float] = []
    for number, legs in enumerate(batches, start=1):
        with in_double():
            result = trl_loss(legs, beta=beta, loss_type="bco_pair", running=running)
        sums = [[math.fsum(row) for row in rows] for rows in pair_arrays(legs)]
        seen += [
            beta * (s - r)
            for policy, reference in ((0, 2), (1, 3))
            for s, r in zip(sums[policy], sums[reference], strict=True)
        ]
        state = {"reward_total": math.fsum(seen), "reward_count": len(seen)}
        delta = state["reward_total"] / state["reward_count"]
        assert math.isclose(running.mean, delta, rel_tol=1e-12, abs_tol=1e-15)
        check = transcriptions_pairs.over_rows(
            transcriptions_pairs.bco_pair(beta=beta, delta=delta), *pair_arrays(legs)
        )
        config = {"beta": beta, "shift": "mean"}
        how = f"loss_type=bco_pair, batch {number} of a run"
        cases.append(case(f"beta{beta}-{number}", how, config, legs, result, check, state=state))
    return cases


def main() -> None:
    generator = torch.Generator().manual_seed(25)
    batches = {"small": SMALL, "ragged": {name: random_leg(generator, 5, reference=True) for name in PAIR}}
    cases = []
    for batch, legs in batches.items():
        for form in ("token", "sequence"):
            for beta, alpha in ((0.1, 1.0), (0.7, 0.3)):
                config = {"beta": beta, "alpha": alpha, "form": form}
                cases.append(make_case(f"{batch}-{form}-beta{beta}", legs, config))
    weighted = {"chosen": {**SMALL["chosen"], "weight": [[1.0, 0.0, 1.0], [0.0, 1.0]]}, "rejected": SMALL["rejected"]}
    cases.append(make_case("small-token-weighted", weighted, {"beta": 0.1, "alpha": 1.0, "form": "token"}))
    source = "trl 0.28.0, DPOTrainer.get_batch_loss_metrics, float64"
    write("irpo", source, "tests/vectors/make/trl_irpo.py", cases, ["torch", "trl"])
    run = shifted([SMALL], beta=0.1) + shifted([pairs(generator, 4) for _ in range(3)], beta=0.7)
    assert_six_places(run[0]["loss"], 1.405855)
    write("bco_pair_shifted", source, "tests/vectors/make/trl_irpo.py", run, ["torch", "trl"], objective="bco_pair")


if __name__ == "__main__":
    main()
