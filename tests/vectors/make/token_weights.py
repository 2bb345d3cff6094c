"""Makes the files in ``weights``: token and sample weights, not objectives.

    git clone https://github.com/ahans30/goldfish-loss
    git -C goldfish-loss checkout 35d29f96553462f6c30417f8065225aa6b89e172
    git clone https://github.com/shankarp8/distillation-retains-capabilities
    git -C distillation-retains-capabilities checkout 591331d251880789f943a313101d857e9b3da9ee
    git clone https://github.com/sanyalsunny111/FLOW_finetuning
    git -C FLOW_finetuning checkout f0011b7d6339e13c6ce6ebc79e08ac8b14689835
    git clone https://github.com/sowmaster/Sample-Level-Loss-Reweighting-ICLR-2025
    git -C Sample-Level-Loss-Reweighting-ICLR-2025 checkout edd6f1525892ea04274e85db9ba8639a58acdcae
    python -m tests.vectors.make.token_weights goldfish-loss distillation-retains-capabilities FLOW_finetuning \\
        Sample-Level-Loss-Reweighting-ICLR-2025

The first, the third and the last are the authors' code. TALR has none; the second is a re-implementation by others. All
import packages that need not be installed for this: only the functions named are compiled. DFT is the installed TRL's.

Goldfish: ``keep`` says for each token of the response, ``tokens[prompt_length:]``, whether it stays in the loss. The
code is given targets, which are the tokens after the first. Static masks count positions in the whole sequence, prompt
included. Products of ids are int64 and wrap around. A sequence with fewer targets than a window is an error there.

TALR: ``state`` holds τ, given to the code as the true median of the mean losses, where its own ``torch.median`` would
take the lower of two middle values. It also clamps p at 10⁻⁶ before the power, which no case here reaches. ``weight``
is read from the gradient, −w / N for each of N tokens.

FLOW: ``initial_logps`` are those of the initial model, τ is ``np.median`` of their mean losses as in the authors'
statistics; ``weight`` is one number per row. The loss divides by the number of tokens.

LinUpper, Quadratic, Extremes: of the authors' trainer the functions g, h and f, and of their README the losses per row,
put together as there, where the loss is the sum of shares times losses; ``share`` is one number per row. Their trainer
multiplies shares by lengths besides.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.objectives import transcriptions_weights as transcriptions
from tests.vectors.make import trl_stand_in
from tests.vectors.make.writing import (
    IGNORED,
    PrescribedLogits,
    Ragged,
    assert_same,
    assert_six_places,
    excerpt,
    logits_and_labels,
    mask_of,
    padded,
    ragged,
    random_rows,
    write,
)


def goldfish(checkout: Path) -> None:
    scope: dict[str, Any] = {"torch": torch, "hash_table": None, "table_size": transcriptions.TABLE_SIZE}
    path = checkout / "lit_gpt" / "utils.py"
    excerpt(path, "_load_hash_table", scope)
    apply = excerpt(path, "apply_goldfish", scope)
    scope["_load_hash_table"]("cpu")
    table = scope["hash_table"].tolist()
    assert [round(value, 6) for value in table[:4]] == [0.233684, 0.441264, 0.741148, 0.909272]

    generator = torch.Generator().manual_seed(26)
    counting = [99, *range(11, 23)]
    repeating = [99, *[3, 5, 7] * 4]
    drawn = torch.randint(1, 32000, (48,), generator=generator).tolist()
    with_zeros = torch.randint(0, 6, (40,), generator=generator).tolist()
    cases = []
    wrapped = 0
    for name, strategy, tokens, prompt_length, k, number in (
        ("static-from-0", "static", counting, 1, 4, 0),
        ("static-from-3", "static", counting, 1, 4, 3),
        ("static-after-prompt", "static", drawn, 12, 3, 0),
        ("counting-h4", "hash", counting, 1, 4, 4),
        ("counting-h3", "hash", counting, 1, 4, 3),
        ("repeating-h4", "hash", repeating, 1, 4, 4),
        ("repeating-h3", "hash", repeating, 1, 4, 3),
        ("drawn-h4", "hash", drawn, 10, 4, 4),
        ("drawn-h4-k3", "hash", drawn, 10, 3, 4),
        ("drawn-h13-wraps", "hash", drawn, 10, 4, 13),
        ("drawn-h13-short-prompt-wraps", "hash", drawn, 2, 3, 13),
        ("drawn-h1", "hash", drawn, 1, 8, 1),
        ("zeros-h4", "hash", with_zeros, 5, 4, 4),
        ("zeros-h4-k8", "hash", with_zeros, 5, 8, 4),
    ):
        targets = torch.tensor([tokens[1:]])
        if strategy == "static":
            config = {"strategy": strategy, "k": k, "start": number}
            masked, _ = apply(targets, "static", k, number, IGNORED)
            check = transcriptions.goldfish_static(tokens, k=k, start=number)
        else:
            config = {"strategy": strategy, "k": k, "h": number}
            masked, _ = apply(targets, "hash-table", k, 0, IGNORED, goldfish_context_width=number)
            check = transcriptions.goldfish_hash_int64(tokens, k=k, h=number, table=table)
            wrapped += check != transcriptions.goldfish_hash(tokens, k=k, h=number, table=table)
        keep = [True, *(masked[0] != IGNORED).tolist()]
        assert keep == check, name
        cases.append(
            {
                "name": name,
                "how": "apply_goldfish, strategy " + ("static" if strategy == "static" else "hash-table"),
                "config": config,
                "tokens": tokens,
                "prompt_length": prompt_length,
                "keep": keep[prompt_length:],
            }
        )
    dropped = {case["name"]: [i for i, kept in enumerate(case["keep"]) if not kept] for case in cases}
    assert dropped["static-from-0"] == [0, 4, 8]
    assert dropped["static-from-3"] == [3, 7, 11]
    assert dropped["counting-h4"] == [3, 9]
    assert dropped["counting-h3"] == [6, 10]
    assert dropped["repeating-h4"] == dropped["repeating-h3"] == []
    # An implementation with exact products would fail on some case.
    assert wrapped > 0
    source = "ahans30/goldfish-loss at 35d29f96553462f6c30417f8065225aa6b89e172, apply_goldfish"
    write("weights/goldfish", source, "tests/vectors/make/token_weights.py", cases, ["torch"])


def weight_case(
    name: str, how: str, config: dict[str, Any], arrays: dict[str, Ragged], temperature: float, **results: Any
) -> dict[str, object]:
    width = max(map(len, arrays["logps"]))
    written = {key: padded(rows, width).tolist() for key, rows in arrays.items()}
    written["mask"] = mask_of(arrays["logps"], width).tolist()
    state = {"temperature": temperature}
    return {"name": name, "how": how, "config": config, "state": state, "legs": {"response": written}, **results}


def batches() -> dict[str, Ragged]:
    generator = torch.Generator().manual_seed(27)
    return {
        "odd": [[-0.1, -0.2, -2.0], [-0.05, -1.0], [-3.0, -0.5, -0.7, -0.2]],
        "even": [[-0.1, -0.2, -2.0], [-0.05, -1.0]],
        "one": [[-0.4, -6.0, -0.001]],
        "drawn": random_rows(generator, [5, 1, 8, 3, 7, 2]),
    }


def talr(checkout: Path) -> None:
    scope: dict[str, Any] = {"torch": torch, "IGNORE_INDEX": IGNORED}
    path = checkout / "src" / "disc" / "objectives.py"
    their_temperature = excerpt(path, "compute_dynamic_tau", scope)
    their_loss = excerpt(path, "talr_loss", scope)
    cases = []
    for batch, rows in batches().items():
        for floor in (0.01, 0.3):
            width = max(map(len, rows))
            number = sum(map(len, rows))
            temperature = transcriptions.talr_temperature(rows)
            logps = padded(rows, width).requires_grad_()
            logits, labels = logits_and_labels(logps, mask_of(rows, width))
            if len(rows) % 2 == 1:
                assert abs(their_temperature(logits, labels) - temperature) < 1e-12
            loss = their_loss(logits, labels, tau=temperature, weight_floor=floor)
            (slopes,) = torch.autograd.grad(loss, logps)
            weights = transcriptions.talr(rows, temperature=temperature, floor=floor)
            check_loss, check_grad = transcriptions.weighted_nll(rows, weights)
            result = loss.item(), {"response": ragged(slopes, rows)}
            assert_same(batch, result, (check_loss, {"response": check_grad}))
            cases.append(
                weight_case(
                    f"{batch}-floor{floor}",
                    "talr_loss with tau and weight_floor",
                    {"floor": floor},
                    {"logps": rows},
                    temperature,
                    weight=(0.0 - slopes * number).tolist(),
                    loss=loss.item(),
                    grad={"response": slopes.tolist()},
                )
            )
    assert abs(cases[0]["loss"] - 0.162520) < 1e-6
    source = (
        "shankarp8/distillation-retains-capabilities at 591331d251880789f943a313101d857e9b3da9ee, talr_loss, float64;"
        " not by the authors of TALR"
    )
    write("weights/talr", source, "tests/vectors/make/token_weights.py", cases, ["torch"])


def flow(checkout: Path) -> None:
    folder = checkout / "language"
    scope: dict[str, Any] = {"torch": torch, "IGNORE_INDEX": IGNORED}
    process_batch = excerpt(folder / "create_weighted_dataset.py", "process_batch", scope)
    trainer_class = excerpt(
        folder / "utils" / "trainer_utils.py",
        "WeightedLossTrainer",
        {"torch": torch, "nn": nn},
        methods=("compute_loss",),
    )
    trainer = trainer_class()
    trainer.loss_type = "sequence"
    trainer.ignore_index = IGNORED
    trainer.weight_regularization = "none"
    trainer.model_accepts_loss_kwargs = False
    trainer.args = SimpleNamespace(average_tokens_across_devices=False)
    generator = torch.Generator().manual_seed(28)
    by_eye = [[-0.8], [-1.5, -1.5], [-0.3, -0.5], [-2.0], [-1.2, -1.0]]
    cases = []
    for batch, initial in {"by-eye": by_eye, **batches()}.items():
        rows = random_rows(generator, [len(row) for row in initial])
        width = max(map(len, rows))
        mask = mask_of(rows, width)
        temperature = float(np.median([-np.mean(row) for row in initial]))
        assert abs(temperature - transcriptions.flow_temperature(initial)) < 1e-12
        logits, labels = logits_and_labels(padded(initial, width), mask)
        inputs = {"input_ids": labels, "attention_mask": torch.ones_like(labels), "labels": labels}
        settings = SimpleNamespace(loss_type="sequence", temperature=temperature, device="cpu")
        weights, _ = process_batch(inputs, PrescribedLogits(logits), None, settings)
        logps = padded(rows, width).requires_grad_()
        logits, labels = logits_and_labels(logps, mask)
        inputs = {"labels": labels, "sequence_weights": torch.tensor(weights, dtype=torch.float64)}
        # sequence_weights reach the model too, which pays no attention.
        loss = trainer.compute_loss(lambda logits=logits, **_: {"logits": logits}, inputs)
        (slopes,) = torch.autograd.grad(loss, logps)
        expected = transcriptions.flow(initial, temperature=temperature)
        assert np.allclose(weights, expected, rtol=1e-12, atol=0)
        per_token = [[w for _ in row] for w, row in zip(expected, rows, strict=True)]
        check_loss, check_grad = transcriptions.weighted_nll(rows, per_token)
        assert_same(batch, (loss.item(), {"response": ragged(slopes, rows)}), (check_loss, {"response": check_grad}))
        cases.append(
            weight_case(
                batch,
                "process_batch and WeightedLossTrainer.compute_loss, loss_type sequence",
                {},
                {"logps": rows, "initial_logps": initial},
                temperature,
                weight=weights,
                loss=loss.item(),
                grad={"response": slopes.tolist()},
            )
        )
    found = [round(weight, 6) for weight in cases[0]["weight"]]
    assert found == [0.483225, 0.255729, 0.695144, 0.162321, 0.367879]
    source = "sanyalsunny111/FLOW_finetuning at f0011b7d6339e13c6ce6ebc79e08ac8b14689835, float64"
    write("weights/flow", source, "tests/vectors/make/token_weights.py", cases, ["torch"])


def dft() -> None:
    cases = []
    for batch, rows in batches().items():
        loss, slopes = trl_stand_in.dft(rows)
        check = transcriptions.weighted_nll(rows, transcriptions.dft(rows))
        assert_same(batch, (loss, {"response": slopes}), (check[0], {"response": check[1]}))
        number = sum(map(len, rows))
        width = max(map(len, rows))
        cases.append(
            weight_case(
                batch,
                'SFTTrainer.compute_loss, loss_type="dft"',
                {},
                {"logps": rows},
                1.0,
                weight=(0.0 - padded(slopes, width) * number).tolist(),
                loss=loss,
                grad={"response": padded(slopes, width).tolist()},
            )
        )
    assert_six_places(cases[0]["loss"], 0.211592)
    write("weights/dft", "TRL's SFTTrainer, float64", "tests/vectors/make/token_weights.py", cases, ["trl", "torch"])


def sample_weights(checkout: Path) -> None:
    scope: dict[str, Any] = {"torch": torch}
    h, g = (excerpt(checkout / "src" / "trainer.py", name, scope) for name in ("h_func", "g_func"))
    readme = (checkout / "README.md").read_text(encoding="utf-8")
    exec(readme.partition("```python")[2].partition("# Define reweighting function mapping")[0], scope)
    known = {"lin_upper": 2.523125, "quadratic": 1.779563, "extremes": 1.827313}
    for name, theirs in {"lin_upper": "linupper", "quadratic": "mid", "extremes": "extremes"}.items():
        f = excerpt(checkout / "src" / "trainer.py", f"f_func_{theirs}", scope)
        cases = []
        given = {"known": [[-0.5, -0.5], [-1.0], [-2.0, -3.0, -1.0], [-3.5]], **batches()}
        given["equal"] = [[-0.5, -1.5], [-1.0], [-1.25, -0.75, -1.0]]
        for batch, rows in given.items():
            for temperature in (0.4, 1.0):
                width = max(map(len, rows))
                logps = padded(rows, width).requires_grad_()
                losses, _ = scope["get_batch_loss_from_logits"](*logits_and_labels(logps, mask_of(rows, width)))
                with torch.no_grad():
                    low, high = losses.min().item(), losses.max().item()
                    scores = f(h(losses, delta=1.0, l_min=low, l_max=high))
                    scores = g(scores - scores.max().item(), l=temperature)
                    shares = scores / scores.sum()
                loss = (shares * losses).sum()
                (slopes,) = torch.autograd.grad(loss, logps)
                check = transcriptions.weighted_rows(
                    rows,
                    transcriptions.sample_shares(
                        [-sum(row) / len(row) for row in rows], strategy=name, temperature=temperature
                    ),
                )
                result = loss.item(), {"response": ragged(slopes, rows)}
                assert_same(batch, result, (check[0], {"response": check[1]}))
                written = {"logps": padded(rows, width).tolist(), "mask": mask_of(rows, width).tolist()}
                cases.append(
                    {
                        "name": f"{batch}-r{temperature}",
                        "how": f"h_func, f_func_{theirs}, g_func and get_batch_loss_from_logits",
                        "config": {"temperature": temperature},
                        "legs": {"response": written},
                        "share": shares.tolist(),
                        "loss": loss.item(),
                        "grad": {"response": slopes.tolist()},
                    }
                )
        assert_six_places(cases[0]["loss"], known[name])
        source = (
            "sowmaster/Sample-Level-Loss-Reweighting-ICLR-2025 at edd6f1525892ea04274e85db9ba8639a58acdcae, float64"
        )
        write(f"weights/{name}", source, "tests/vectors/make/token_weights.py", cases, ["torch"])


if __name__ == "__main__":
    goldfish(Path(sys.argv[1]))
    talr(Path(sys.argv[2]))
    flow(Path(sys.argv[3]))
    dft()
    sample_weights(Path(sys.argv[4]))
