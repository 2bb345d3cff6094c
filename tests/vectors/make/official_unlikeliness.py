"""Makes ``transforms/unlikeliness.json`` with the authors' code of the unlikeliness reward, in float64.

    git clone https://github.com/AndreHe02/rewarding-unlikely-release
    git -C rewarding-unlikely-release checkout ca1cff05ebdf2cfe9737fd416897da838a93e11a
    python -m tests.vectors.make.official_unlikeliness rewarding-unlikely-release

``_compute_advantages`` of ``RayLeanTrainer`` gives GRPO's advantages of the rewards that it has multiplied, (r − mean)
/ (standard deviation + 10⁻⁶). Rewards and log-probs are prescribed, every response has two tokens of the same log-prob
and one of padding. No two log-probs of a prompt are equal: the order of such is left to ``argsort``.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests.objectives import transcriptions_online
from tests.vectors.make.writing import excerpt, write

COMMIT = "ca1cff05ebdf2cfe9737fd416897da838a93e11a"


def advantages(checkout: Path, rewards: list[float], logps: list[float], beta_rank: float) -> list[float]:
    """Of the responses to one prompt."""
    mean = excerpt(checkout / "verl" / "utils" / "torch_functional.py", "masked_mean", {})
    scope: dict[str, Any] = {"torch": torch, "defaultdict": defaultdict, "masked_mean": mean}
    path = checkout / "verl" / "trainer" / "ppo" / "ray_lean_trainer.py"
    trainer = excerpt(path, "RayLeanTrainer", scope, methods=("_compute_advantages",))
    group = len(rewards)
    batch: Any = SimpleNamespace(
        batch={
            "rewards": torch.tensor(rewards),
            "old_log_probs": torch.tensor([[x, x, 9.0] for x in logps]),
            "attention_mask": torch.tensor([[1, 1, 1, 0]] * group),
            "responses": torch.zeros(group, 3),
        },
        non_tensor_batch={"uid": ["one"] * group},
    )
    itself = SimpleNamespace(config=SimpleNamespace(lean={"rank_penalty": beta_rank}))
    return trainer._compute_advantages(itself, batch).batch["advantages"][:, 0].tolist()


def main(checkout: Path) -> None:
    torch.set_default_dtype(torch.float64)
    generator = torch.Generator().manual_seed(41)
    groups = {"known": ([1.0, 1.0, 0.0, 1.0], [-0.5, -2.0, -0.1, -1.0])}
    for number, size in enumerate((2, 5, 16)):
        right = (torch.rand(size, generator=generator) < 0.6).double().tolist()
        logps = [round(-x, 4) for x in torch.empty(size).exponential_(generator=generator).tolist()]
        groups[f"random-{number}"] = [1.0, *right[1:]], logps
    groups["all-right"] = ([1.0] * 4, [-0.4, -0.3, -0.2, -0.1])
    cases = []
    for name, (rewards, logps) in groups.items():
        for beta_rank in (0.25, 1.0):
            found = advantages(checkout, rewards, logps, beta_rank)
            check = transcriptions_online.unlikeliness(rewards, logps, beta_rank=beta_rank)
            mean = math.fsum(check) / len(check)
            spread = math.sqrt(math.fsum((r - mean) ** 2 for r in check) / (len(check) - 1))
            for a, r in zip(found, check, strict=True):
                assert math.isclose(a, (r - mean) / (spread + 1e-6), rel_tol=1e-11, abs_tol=1e-12), name
            config = {"beta_rank": beta_rank}
            given = {"scores": rewards, "mean_logps": logps}
            cases.append({"name": f"{name}-{beta_rank}", "config": config, **given, "advantages": found})
    known = [round(x, 6) for x in cases[0]["advantages"]]  # type: ignore[attr-defined]
    assert known == [0.364512, 0.629612, -1.491186, 0.497062], known
    source = f"AndreHe02/rewarding-unlikely-release at {COMMIT}, RayLeanTrainer._compute_advantages, float64"
    write("transforms/unlikeliness", source, "tests/vectors/make/official_unlikeliness.py", cases, ["torch"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
