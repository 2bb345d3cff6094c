"""Rounds of online DPO on the embedded world, judged by problems that no round has seen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from align import rounds as command
from align import samples as stored
from align.score_lines import read_scores
from align.selection_curves import pass_at_k
from data.worlds import POLICY, Problem, problems
from launch.bench.selection_samples import Numbers, aligned, paired
from objectives.stats import mean_with_interval

RECIPE = Path(__file__).parents[1] / "recipes" / "dpo.yaml"
TRAINING = {"beta": 0.3, "learning_rate": 2e-4, "rows_per_step": 32, "rule": "best_vs_random"}
"""Keys of every round's training, found by hand on 300 other problems before anything here was measured."""


def rounds(numbers: Numbers, folder: Path) -> dict[str, Any]:
    """Accuracy, its paired changes since the start and since the round before, and pass@k, for every seed.

    Pairs are a right answer and a wrong one, as ``world_answer`` says; nobody tells the policy more than that.
    """
    asked = problems("held_out", numbers.held_out, seed=3)
    runs = []
    for seed in numbers.seeds:
        prompts = problems("train", numbers.train_problems, seed=100 + seed)
        run = aligned(folder, seed, 0).parents[1]
        _rounds(numbers, run, seed, prompts, asked)
        right = [_right(run / f"round-{number}") for number in range(numbers.rounds + 1)]
        measured = [
            _measured(now, numbers.held_out_n) | {"change": _change(now, right[0]), "gain": _change(now, before)}
            for before, now in zip([right[0], *right], right, strict=False)
        ]
        runs.append({"seed": seed, "rounds": measured})
    return {
        "problems": numbers.train_problems,
        "samples": numbers.samples_per_round,
        "held_out": numbers.held_out,
        "held_out_samples": numbers.held_out_n,
        "training": TRAINING | {"num_train_epochs": numbers.epochs},
        "runs": runs,
    }


def _rounds(numbers: Numbers, run: Path, seed: int, prompts: Sequence[Problem], asked: Sequence[Problem]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    files = {name: run / f"{name}.jsonl" for name in ("prompts", "held_out")}
    for name, listed in (("prompts", prompts), ("held_out", asked)):
        lines = [json.dumps({"prompt": [{"role": "user", "content": each.question}]}) for each in listed]
        files[name].write_text("\n".join(lines) + "\n", encoding="utf-8")
    training = TRAINING | {"num_train_epochs": numbers.epochs, "seed": 1000 * seed, "eval_share": 0}
    config = run / "rounds.yaml"
    settings = {
        "model": {"model_name_or_path": str(POLICY)},
        "data": {"dataset_name": str(files["prompts"])},
        "held_out": {"dataset_name": str(files["held_out"]), "n": numbers.held_out_n},
        "sampling": {"n": numbers.samples_per_round, "max_tokens": numbers.max_tokens, "seed": 1000 * seed},
        "serving": {"engine": "transformers"},
        "scorers": [{"name": "world_answer"}],
        "run": {
            "output_dir": str(run),
            "recipe": str(RECIPE),
            "overrides": [f"--{key}={value}" for key, value in training.items()] + ["--save_strategy=no"],
            "rounds": numbers.rounds,
        },
    }
    config.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    if status := command.main(["--config", str(config)]):
        raise SystemExit(status)


def _right(folder: Path) -> dict[str, list[float]]:
    """Of each held-out problem, which samples are right."""
    read = read_scores(folder / "held_out.scores.jsonl", stored.read(folder / "held_out.jsonl"))
    return {group.prompt_id: [float(each.score or 0.0) for each in scores] for group, scores in read}


def _measured(right: dict[str, list[float]], n: int) -> dict[str, Any]:
    ks = [k for k in (1, 2, 4, 8, 16) if k <= n]
    reached = {str(k): [pass_at_k(n, int(sum(each)), k) for each in right.values()] for k in ks}
    found = {k: asdict(mean_with_interval(values, list(right))) for k, values in reached.items()}
    return {"accuracy": found["1"], "pass_at": found}


def _change(now: dict[str, list[float]], before: dict[str, list[float]]) -> dict[str, Any]:
    """Of the accuracy, over the same problems."""
    means = [np.array([np.mean(right[key]) for key in now]) for right in (now, before)]
    return paired(*means)
