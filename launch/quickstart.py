"""The main job on the embedded world: sample from the shipped policy, score, make pairs, train, evaluate.

    make quickstart            or: python -m launch.quickstart [--output_dir runs/quickstart]

The policy is a language model of about one million parameters that answers short word problems, and gets less than half
of them right when sampled. Its own samples are scored against the known answers and paired, the best against a worse
one; RPO learns from the pairs. The table compares it before and after on problems whose numbers it has never seen, and
on stories it has never been told, with 95 % intervals. What is left behind is a complete run directory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.console import quiet_libraries
from align.sampling import Sampling, sample
from align.train import main as train
from data.worlds import POLICY, Problem, problems, scored
from evals.worlds import Answers

ROWS = (
    ("answers/accuracy", "held out", "right answers, unseen numbers"),
    ("answers/accuracy", "held out templates", "right answers, unseen stories"),
    ("answers/win_rate", "held out", "gold win rate against the start"),
    ("ranking/accuracy", "test", "better answer more probable"),
    ("displacement/chosen", "test", "log-prob of better answers, change"),
)
DRAW = Sampling(n=8, temperature=1.0, max_tokens=64)


def load_policy() -> tuple[Any, Any]:
    """The shipped model and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(POLICY)


def draw(model: Any, tokenizer: Any, asked: Sequence[Problem], seed: int) -> list[list[str]]:
    """Eight answers of the policy to each problem."""
    prompts = [({"role": "user", "content": problem.question},) for problem in asked]
    return sample(model, tokenizer, prompts, replace(DRAW, seed=seed), batch=512)


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """One JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def table(run: Path) -> str:
    """Before and after, with intervals, from ``results.json``."""
    results = json.loads((run / "results.json").read_text())["results"]
    last = max(result["step"] for result in results)
    lines = [f"{'':<36}{'before':>25}{'after':>25}"]
    for metric, split, label in ROWS:
        cells = []
        for step in (0, last):
            r = next(r for r in results if (r["metric"], r["split"], r["step"]) == (metric, split, step))
            cells.append(f"{r['value']:8.3f} [{r['low']:6.3f}, {r['high']:6.3f}]")
        lines.append(f"{label:<36}{cells[0]:>25}{cells[1]:>25}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Samples, scores, pairs, trains with the shipped recipe, and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m launch.quickstart", description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--problems", type=int, default=700, help="problems to sample and train on")
    parser.add_argument("--held_out", type=int, default=500, help="held-out problems to answer before and after")
    options = parser.parse_args(arguments)
    output_dir: Path = options.output_dir
    inputs = output_dir.with_name(output_dir.name + "-inputs")
    quiet_libraries()
    torch.set_num_threads(1)  # matrices this small gain nothing from more, and lose much where others compute too
    shutil.rmtree(inputs, ignore_errors=True)
    began = time.perf_counter()
    model, tokenizer = load_policy()
    for name, asked, seed in (
        ("train", problems("train", options.problems, seed=1), 1),
        ("test", problems("held_out", max(options.held_out * 2 // 5, 1), seed=2), 2),
    ):
        made = scored(asked, draw(model, tokenizer, asked, seed))
        write_rows(inputs / f"{name}.jsonl", made.rows)
        print(
            f"{name}: {len(asked)} problems, {DRAW.n} samples each, scored ({time.perf_counter() - began:.0f} s); "
            f"{made.left_out} problems with equal scores only",
            flush=True,
        )
    held_out = {
        "held_out": problems("held_out", options.held_out, seed=3),
        "held_out_templates": problems("held_out_templates", max(options.held_out * 2 // 5, 1), seed=3),
    }
    status = train(
        [
            f"--config={Path(__file__).parent / 'recipes' / 'rpo.yaml'}",
            f"--model_name_or_path={POLICY}",
            f"--dataset_name={inputs / 'train.jsonl'}",
            f"--eval_dataset_name={inputs / 'test.jsonl'}",
            f"--output_dir={output_dir}",
            "--overwrite_output_dir",
            "--rule=best_vs_random",
            "--form=average",
            "--beta=0.5",
            "--eta=0.5",
            "--learning_rate=5e-4",
            "--num_train_epochs=4",
            "--rows_per_step=32",
            "--logging_steps=10",
        ],
        measure=Answers(held_out, Sampling(n=4, max_tokens=64, seed=7)),
    )
    if status:
        return status
    print(f"\n{table(output_dir)}\n\nreport {output_dir}/report.html   card {output_dir}/README.md")
    print(f"{time.perf_counter() - began:.0f} s; the pairs are in {inputs}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
