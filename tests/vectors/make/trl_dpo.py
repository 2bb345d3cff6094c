"""Makes ``dpo.json`` and ``sft.json`` with the loss code of the installed TRL, in float64.

    python tests/vectors/make/trl_dpo.py

``DPOTrainer._compute_loss`` is called unbound on a stand-in that has only what it reads; the stand-in's models return
prescribed log-probs, so that the gradient with respect to each of them can be recorded.

TRL 1.16 ignores ``label_smoothing`` for ``sigmoid`` but not for ``aot``. On a single row the sort in ``aot`` does
nothing and what is left is DPO with label smoothing, so the smoothed cases are means over rows taken one at a time.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
from trl import DPOTrainer

VECTORS = Path(__file__).resolve().parents[1]

Ragged = list[list[float]]

SMALL: dict[str, dict[str, Ragged]] = {
    "chosen": {
        "logps": [[-0.5, -1.0, -1.5], [-2.0, -0.25]],
        "ref_logps": [[-0.75, -1.25, -1.0], [-1.5, -0.5]],
    },
    "rejected": {
        "logps": [[-1.25, -0.75], [-0.5, -1.0, -2.0, -0.5]],
        "ref_logps": [[-1.0, -0.5], [-0.75, -1.5, -1.75, -1.0]],
    },
}
"""Two pairs whose numbers are round enough to follow by eye."""


def random_legs(*, seed: int, rows: int) -> dict[str, dict[str, Ragged]]:
    """Pairs of 1 to 9 tokens, each with a log-prob of about −1 under both models, rounded to four places."""
    generator = torch.Generator().manual_seed(seed)
    legs: dict[str, dict[str, Ragged]] = {}
    for name in ("chosen", "rejected"):
        lengths = torch.randint(1, 10, (rows,), generator=generator).tolist()
        legs[name] = {
            key: [
                [round(x, 4) for x in torch.empty(n).exponential_(generator=generator).neg().tolist()] for n in lengths
            ]
            for key in ("logps", "ref_logps")
        }
    return legs


class Prescribed(torch.nn.Module):
    """Stands where a language model would: whatever the input, these are the log-probs of its tokens."""

    is_gradient_checkpointing = False

    def __init__(self, log_probs: torch.Tensor) -> None:
        super().__init__()
        self.log_probs = log_probs

    def forward(self, **_: object) -> SimpleNamespace:
        nothing = torch.zeros_like(self.log_probs)
        return SimpleNamespace(log_probs=self.log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())


def padded(rows: Ragged, width: int) -> torch.Tensor:
    return torch.tensor([row + [0.0] * (width - len(row)) for row in rows], dtype=torch.float64)


def trl_loss(
    legs: dict[str, dict[str, Ragged]], *, loss_type: str, beta: float, label_smoothing: float = 0.0
) -> tuple[float, dict[str, Ragged]]:
    """TRL's loss on these pairs, and its gradient with respect to each policy log-prob."""
    responses = legs["chosen"]["logps"] + legs["rejected"]["logps"]
    references = legs["chosen"]["ref_logps"] + legs["rejected"]["ref_logps"]
    width = max(map(len, responses))
    completion = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in responses])
    # One prompt token in front: TRL shifts masks by one, log-probs arrive already shifted.
    completion_mask = torch.cat([torch.zeros_like(completion[:, :1]), completion], dim=1)
    logps = padded(responses, width).requires_grad_()
    # The fused head that makes these log-probs writes 0 where the label is ignored.
    policy = Prescribed(torch.where(completion.bool(), logps, 0.0))
    trainer = SimpleNamespace(
        model=policy,
        ref_model=Prescribed(padded(references, width)),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
        beta=beta,
        label_smoothing=label_smoothing,
        loss_types=[loss_type],
        loss_weights=[1.0],
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=False,
        precompute_ref_logps=False,
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
    }
    loss = DPOTrainer._compute_loss(trainer, policy, inputs, return_outputs=False)
    (slopes,) = torch.autograd.grad(loss, logps)
    ragged = [row[: len(response)].tolist() for row, response in zip(slopes, responses, strict=True)]
    rows = len(ragged) // 2
    return loss.item(), {"chosen": ragged[:rows], "rejected": ragged[rows:]}


def one_row_at_a_time(legs: dict[str, dict[str, Ragged]], **options: object) -> tuple[float, dict[str, Ragged]]:
    """The mean over rows of the loss of each row alone."""
    rows = len(legs["chosen"]["logps"])
    total = 0.0
    grad: dict[str, Ragged] = {"chosen": [], "rejected": []}
    for i in range(rows):
        alone = {name: {key: [values[i]] for key, values in leg.items()} for name, leg in legs.items()}
        loss, slopes = trl_loss(alone, **options)
        total += loss / rows
        for name, (row,) in slopes.items():
            grad[name].append([slope / rows for slope in row])
    return total, grad


def case(
    name: str,
    config: dict[str, object],
    legs: dict[str, dict[str, Ragged]],
    result: tuple[float, dict[str, Ragged]],
    how: str,
) -> dict[str, object]:
    """One entry of a vector file; legs are padded with 0 up to each leg's longest row, and ``mask`` says where."""
    loss, grad = result
    written = {}
    for leg, arrays in legs.items():
        width = max(map(len, arrays["logps"]))
        written[leg] = {key: padded(rows, width).tolist() for key, rows in arrays.items()}
        written[leg]["mask"] = [[1] * len(row) + [0] * (width - len(row)) for row in arrays["logps"]]
    gradient = {leg: padded(grad[leg], max(map(len, grad[leg]))).tolist() for leg in legs}
    return {"name": name, "how": how, "config": config, "legs": written, "loss": loss, "grad": gradient}


def write(name: str, cases: list[dict[str, object]]) -> None:
    """Writes one line per row of an array, so that a changed number is a changed line."""
    versions = {package: importlib.metadata.version(package) for package in ("torch", "trl")}
    contents = {
        "source": "trl, DPOTrainer._compute_loss, float64",
        "made_by": "tests/vectors/make/trl_dpo.py",
        "versions": versions,
        "cases": cases,
    }
    text = re.sub(r"\[[^\[\]{}]*\]", lambda row: json.dumps(json.loads(row[0])), json.dumps(contents, indent=1))
    (VECTORS / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    ragged = random_legs(seed=20, rows=5)
    dpo = []
    for batch, legs in (("small", SMALL), ("ragged", ragged)):
        for beta in (0.1, 0.7):
            plain = trl_loss(legs, loss_type="sigmoid", beta=beta)
            config = {"beta": beta, "label_smoothing": 0.0}
            dpo.append(case(f"{batch}-beta{beta}", config, legs, plain, "loss_type=sigmoid"))
        smooth = one_row_at_a_time(legs, loss_type="aot", beta=0.1, label_smoothing=0.1)
        config = {"beta": 0.1, "label_smoothing": 0.1}
        how = "loss_type=aot, one row at a time, mean over rows"
        dpo.append(case(f"{batch}-smoothed", config, legs, smooth, how))
    write("dpo", dpo)

    sft = []
    for batch, legs in (("small", SMALL), ("ragged", ragged)):
        for leg in ("chosen", "gold"):
            loss, grad = trl_loss(legs, loss_type="sft", beta=0.1)
            alone = {leg: {"logps": legs["chosen"]["logps"]}}
            how = "loss_type=sft, the response in the place of TRL's chosen one"
            sft.append(case(f"{batch}-{leg}", {"leg": leg}, alone, (loss, {leg: grad["chosen"]}), how))
    write("sft", sft)


if __name__ == "__main__":
    main()
