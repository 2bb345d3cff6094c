"""A run directory as training leaves it, with odd names on request."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from evals.ranking import Pairs, rank
from evals.results import Results, as_metrics

CHECKS = [
    {"check": "loss at step 0", "passed": True, "detail": "0.693147, expected log 2 = 0.693147"},
    {"check": "policy equals reference", "passed": True, "detail": "largest difference 0 nats over 412 tokens"},
    {
        "check": "fast path equals plain path",
        "passed": True,
        "detail": "shared prompts against separate sequences: 3.1e-06",
    },
    {"check": "prompt tokens have no effect on the loss", "passed": True, "detail": "gradient of prompt labels is 0"},
    {"check": "longest batch fits", "passed": True, "detail": "4096 tokens, 1.2 GiB"},
]


def make_run(
    path: Path,
    *,
    steps: int = 300,
    name: str = "acme/helpful-pairs",
    model: str = "acme/stories-260k",
    seed: int = 7,
) -> Path:
    """Writes every file of a run of ``steps`` steps; deterministic."""
    path.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    lines, last = [], None
    pairs = 400
    ref_chosen, ref_rejected = rng.normal(-80, 20, pairs), rng.normal(-78, 20, pairs)
    lengths = rng.integers(10, 60, (2, pairs))
    for step in range(0, steps + 1, max(1, steps // 12)):
        done = step / steps
        drift = rng.normal(0, 1, (2, pairs)) * 12 * done
        scored = rank(
            Pairs(
                policy_chosen=ref_chosen + drift[0] - 3 * done,
                policy_rejected=ref_rejected + drift[1] - 14 * done,
                length_chosen=lengths[0],
                length_rejected=lengths[1],
                ref_chosen=ref_chosen,
                ref_rejected=ref_rejected,
                prompts=[i // 2 for i in range(pairs)],
            )
        )
        last = scored.results(dataset=name, split="held out", step=step)
        lines.append({"step": step, **as_metrics(last)})
    for step in range(1, steps + 1):
        done = step / steps
        lines.append(
            {
                "step": step,
                "loss": 0.693 * math.exp(-1.1 * done) + 0.04 * rng.normal(),
                "rewards/margins": 1.1 * done + 0.12 * rng.normal(),
                "rewards/accuracies": float(np.clip(0.5 + 0.3 * (1 - math.exp(-4 * done)) + 0.08 * rng.normal(), 0, 1)),
                "logps/chosen": -80 - 3 * done + 4 * rng.normal(),
                "logps/rejected": -78 - 14 * done + 4 * rng.normal(),
                "grad_norm": 6 * math.exp(-2 * done) + abs(rng.normal()),
                "learning_rate": 5e-7 * min(1, 10 * done) * (1 - 0.9 * done),
                "time/step": 0.41,
            }
        )
    (path / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    Results(
        run={
            "model": model,
            "fingerprint": "9f2c1d7e",
            "objective": "dpo",
            "seed": 0,
            "commit": "4be1a90c",
            "versions": {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
        },
        results=last or [],
    ).write(path / "results.json")
    (path / "recipe.yaml").write_text(
        f"model:\n  model_name_or_path: {json.dumps(model)}\n  dtype: bfloat16\n"
        f"data:\n  dataset_name: {json.dumps(name)}\n"
        "objective:\n  name: dpo\n  beta: 0.1\n  label_smoothing: 0.0\nreference:\n  model: initial\n  source: cached\n"
        f"train:\n  learning_rate: 5.0e-7\n  rows_per_step: 64\n  max_steps: {steps}\n  seed: 0\n"
    )
    (path / "data_report.json").write_text(
        json.dumps(
            {
                "rows": {"read": 12040, "kept": 11212, "train": 10651, "eval": 561},
                "dropped": {"prompt leaves fewer than 16 response tokens": 611, "chosen equals rejected": 217},
                "dropped_rows": [
                    {"source": name, "index": i, "reason": "chosen equals rejected"} for i in range(3, 300, 4)
                ],
                "truncated": {"chosen": 312, "rejected": 355, "prompt": 0},
                "tokens": {"prompt": 1204411, "chosen": 840021, "rejected": 861377},
                "boundary_mismatches": 4,
                "terminator_added": 11212,
                "dataset_hash": "sha256:5a1e77c0b3",
            }
        )
    )
    (path / "checks.json").write_text(json.dumps(CHECKS))
    (path / "example.txt").write_text(
        "Human: How do I keep bread fresh?\n\nAssistant:[ Wrap it in cloth and keep it away from light.<eos>]\n"
    )
    return path
