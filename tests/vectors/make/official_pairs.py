"""Makes ``cal_dpo.json``, ``dpop.json`` and ``rpo_reward_aware.json`` with code published by others, in float64.

    git clone https://github.com/tengxiao1/Cal-DPO
    git -C Cal-DPO checkout 7d16b466e52733269bbd6f7544a807faa555772b
    git clone https://github.com/Cerebras/modelzoo
    git -C modelzoo checkout f1fd1e091dc67917b91ec213ecd63e48fd144477
    git clone https://github.com/ElectricAlexis/NotaGen
    git -C NotaGen checkout 4553cd743b6b449732baf2a6cc58885fe853b11d
    git clone https://github.com/NVIDIA/NeMo-Aligner
    git -C NeMo-Aligner checkout af2b3bd96ad78190f6ebfb552b9e599e313ce027
    python -m tests.vectors.make.official_pairs Cal-DPO modelzoo NotaGen NeMo-Aligner

The first and the last are the authors' code. DPOP's authors (abacusai/smaug) published none; the other two are
implementations of their formula. All import packages that need not be installed for this: only what is named is
compiled. What is cast to single precision there is double here.

Cal-DPO adds the *batch mean* of the squares to each row's contrastive term. The mean over rows is the same, the values
per row are not: ``differences/cal_dpo.json`` has them.

DPOP's max(0, ·) has no slope where a chosen response is as likely as under the reference, as in every row of a first
step. Modelzoo's ``clamp`` takes 1 there, NotaGen's ``max`` takes 0, as we do. So modelzoo makes the cases without such
a row, NotaGen, which takes one row at a time, those with one; ``differences/dpop.json`` has modelzoo's gradient there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.objectives import transcriptions_pairs as transcriptions
from tests.vectors.make.writing import (
    ALONE,
    IGNORED,
    PAIR,
    SMALL,
    Legs,
    Result,
    assert_six_places,
    both_legs,
    case,
    excerpt,
    in_double,
    logits_and_labels,
    mask_of,
    one_row_at_a_time,
    padded,
    pair_arrays,
    pairs,
    write,
)

MADE_BY = "tests/vectors/make/official_pairs.py"


def differentiate(legs: Legs, loss_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[Tensor, Result]:
    """What a function of policy and reference log-probs and of a mask (chosen rows, then rejected) gives.

    Returns:
        Its value, which may be one per row, and the mean with its gradient with respect to each policy log-prob.
    """
    responses = [row for name in PAIR for row in legs[name]["logps"]]
    width = max(map(len, responses))
    logps = padded(responses, width).requires_grad_()
    references = padded([row for name in PAIR for row in legs[name]["ref_logps"]], width)
    with in_double():
        values = loss_of(logps, references, mask_of(responses, width))
        (slopes,) = torch.autograd.grad(values.mean(), logps)
    return values.detach(), (values.mean().item(), both_legs(slopes, legs))


def cal_dpo(checkout: Path, legs: Legs, *, beta: float) -> tuple[Tensor, Result]:
    trainer = excerpt(
        checkout / "scripts" / "dpo_trainer.py",
        "DPOTrainer",
        {"torch": torch, "F": F},
        methods=("dpo_loss", "get_batch_logps"),
    )
    settings = SimpleNamespace(accelerator=ALONE, beta=beta, loss_type="Cal-DPO")

    def losses(logps: Tensor, references: Tensor, mask: Tensor) -> Tensor:
        sums = [trainer.get_batch_logps(*logits_and_labels(values, mask)) for values in (logps, references)]
        return trainer.dpo_loss(settings, *sums[0].chunk(2), *sums[1].chunk(2))[0]

    return differentiate(legs, losses)


def dpop_of_modelzoo(checkout: Path, legs: Legs, *, beta: float, penalty: float) -> Result:
    path = checkout / "src" / "cerebras" / "modelzoo" / "losses" / "DPOLoss.py"
    loss_fn = excerpt(path, "DPOLoss", {"torch": torch, "nn": nn, "F": F, "DPOLossType": str})
    with_penalty = loss_fn(beta=beta, loss_type="dpop", dpop_penalty_weight=penalty)

    def loss(logps: Tensor, references: Tensor, _: Tensor) -> Tensor:
        return with_penalty(*logps.sum(dim=1).chunk(2), *references.sum(dim=1).chunk(2))

    return differentiate(legs, loss)[1]


def dpop_of_notagen(checkout: Path, legs: Legs, *, beta: float, penalty: float) -> Result:
    """Of one row."""

    def loss(logps: Tensor, references: Tensor, mask: Tensor) -> Tensor:
        # Patches of the chosen response are 0, of the rejected one 1: the row to answer with.
        scope = {"torch": torch, "BETA": beta, "LAMBDA": penalty}
        scope["model"] = lambda patches, _: logps.sum(dim=1)[patches[0]]
        scope["model_ref"] = lambda patches, _: references.sum(dim=1)[patches[0]]
        process_one_batch = excerpt(checkout / "RL" / "train.py", "process_one_batch", scope)
        chosen, rejected = torch.tensor([0]), torch.tensor([1])
        return process_one_batch((chosen, mask[:1], rejected, mask[1:]))

    return differentiate(legs, loss)[1]


def reward_aware(
    checkout: Path, legs: Legs, scores: dict[str, list[float]], *, beta: float, reward_scale: float, distance: str
) -> Result:
    model = excerpt(
        checkout / "nemo_aligner" / "models" / "nlp" / "gpt" / "megatron_gpt_dpo_model.py",
        "MegatronGPTDPOModel",
        {"torch": torch},
        methods=("loss_func", "split_output_tensor", "get_reduced_masked_logps"),
    )()
    model.ref_policy_kl_penalty = beta
    model.gt_reward_scale = reward_scale
    model.preference_loss = f"rpo_{distance}"
    rewards = torch.tensor(scores["chosen"] + scores["rejected"], dtype=torch.float64)

    def loss(logps: Tensor, references: Tensor, mask: Tensor) -> Tensor:
        return model.loss_func(logps, references, torch.where(mask.bool(), 0, IGNORED), rewards)[0]

    return differentiate(legs, loss)[1]


def write_cal_dpo(checkout: Path, batches: dict[str, Legs]) -> None:
    cases, apart = [], []
    for batch, legs in batches.items():
        for beta in (0.5, 0.001):
            config = {"beta": beta}
            losses, result = cal_dpo(checkout, legs, **config)
            check = transcriptions.over_rows(transcriptions.cal_dpo(**config), *pair_arrays(legs))
            cases.append(case(f"{batch}-beta{beta}", "loss_type=Cal-DPO", config, legs, result, check))
            apart.append({**cases[-1], "losses": losses.tolist()})
    assert_six_places(cases[0]["loss"], 2.691128)
    for found, expected in zip(apart[0]["losses"], (2.177202, 3.205054), strict=True):
        assert_six_places(found, expected)
    source = "tengxiao1/Cal-DPO at 7d16b466e52733269bbd6f7544a807faa555772b, DPOTrainer.dpo_loss, float64"
    write("cal_dpo", source, MADE_BY, cases, ["torch"])
    write("differences/cal_dpo", source, MADE_BY, apart[:1], ["torch"])


def write_dpop(modelzoo: Path, notagen: Path, batches: dict[str, Legs]) -> None:
    cases = []
    for batch, legs in batches.items():
        for config in ({"beta": 0.3, "penalty": 50.0}, {"beta": 0.1, "penalty": 5.0}):
            check = transcriptions.over_rows(transcriptions.dpop(**config), *pair_arrays(legs))
            result = one_row_at_a_time(lambda alone, of=config: dpop_of_notagen(notagen, alone, **of), legs)
            how = "NotaGen, one row at a time, mean over rows"
            if batch != "small":
                result, how = dpop_of_modelzoo(modelzoo, legs, **config), "modelzoo, loss_type=dpop"
            cases.append(case(f"{batch}-beta{config['beta']}", how, config, legs, result, check))
    assert_six_places(cases[0]["loss"], 2.380996)
    assert_six_places(cases[1]["loss"], 0.747200)
    from_modelzoo = "Cerebras/modelzoo at f1fd1e091dc67917b91ec213ecd63e48fd144477, DPOLoss"
    from_notagen = "ElectricAlexis/NotaGen at 4553cd743b6b449732baf2a6cc58885fe853b11d, RL/train.py"
    write("dpop", f"{from_modelzoo}; {from_notagen}; float64", MADE_BY, cases, ["torch"])
    # The first row of SMALL has a chosen log-ratio of exactly 0.
    theirs = dpop_of_modelzoo(modelzoo, SMALL, beta=0.3, penalty=50.0)
    apart = case(cases[0]["name"], "loss_type=dpop", cases[0]["config"], SMALL, theirs, (theirs[0], {}))
    write("differences/dpop", f"{from_modelzoo}, float64", MADE_BY, [apart], ["torch"])


def write_reward_aware(checkout: Path, batches: dict[str, Legs]) -> None:
    of_small = {"chosen": [4.0, 3.0], "rejected": [1.0, 2.5]}
    of_drawn = {"chosen": [4.0, -1.5, 0.25, 2.0, 7.0], "rejected": [1.0, 2.5, 0.25, -3.0, 6.5]}
    known = {"sq": 4.486250, "bwd_kl": 0.263491, "fwd_kl": 0.425760}
    distances = {"sq": "squared", "bwd_kl": "backward", "fwd_kl": "forward"}
    cases = []
    for batch, legs in batches.items():
        scores = {name: values[: len(legs[name]["logps"])] for name, values in of_drawn.items()}
        scores = of_small if batch == "small" else scores
        for distance, word in distances.items():
            for beta, scale in ((0.2, 1.0), (0.7, 0.5)):
                config = {"beta": beta, "reward_scale": scale, "distance": distance}
                result = reward_aware(checkout, legs, scores, **config)
                check = transcriptions.rpo_reward_aware(
                    *pair_arrays(legs), scores["chosen"], scores["rejected"], beta=beta, scale=scale, distance=word
                )
                name = f"{batch}-{distance}-beta{beta}"
                how = f"preference_loss=rpo_{distance}, gt_reward_scale={scale}"
                cases.append(case(name, how, config, legs, result, check, scores=scores))
    by_eye = {entry["name"]: entry["loss"] for entry in cases}
    for distance, expected in known.items():
        assert_six_places(by_eye[f"small-{distance}-beta0.2"], expected)
    source = "NVIDIA/NeMo-Aligner at af2b3bd96ad78190f6ebfb552b9e599e313ce027, MegatronGPTDPOModel.loss_func, float64"
    write("rpo_reward_aware", source, MADE_BY, cases, ["torch"])


def main(cal: Path, modelzoo: Path, notagen: Path, nemo: Path) -> None:
    generator = torch.Generator().manual_seed(32)
    batches = {"small": SMALL, "ragged": pairs(generator, 5), "far": pairs(generator, 4, scale=12.0)}
    write_cal_dpo(cal, batches)
    write_dpop(modelzoo, notagen, batches)
    write_reward_aware(nemo, batches)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
