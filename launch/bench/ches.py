"""Does leaving out the pairs with the highest CHES reduce likelihood displacement? Measured on the embedded world.

    python -m launch.bench.ches [--problems 600] [--seeds 3] [--near 0.05] [--drop 0.05] [--into docs/ches.json]
    python -m launch.bench.ches --real            also the correlation on real HH pairs (needs ALIGN_SHARED)

A share of the pairs is built to be near-identical: a right answer against the same with one digit changed. The shipped
policy is trained by DPO on all pairs, on those left when the highest share by LN-CHES is dropped, and on those left
when as many are dropped at random, in three runs that differ in nothing else; then again with the next seed.
Displacement is the change of log-prob of held-out chosen responses, which no arm has seen: a paired difference over
prompts and seeds, with a 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align.console import quiet_libraries
from align.train import main as train
from data.worlds import POLICY, Flaws, candidates, pairs, problems
from evals.correlation import correlations
from evals.pair_rows import read_pairs
from evals.results import Results
from evals.run import run as evaluate
from evals.run_settings import read_job
from evals.scores import read_scores
from evals.seeds import over_seeds
from launch.bench.workloads import shared

ARMS = ("all", "ches", "random")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=600)
    parser.add_argument("--held_out", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--near", type=float, default=0.05, help="share of pairs built to be near-identical")
    parser.add_argument("--drop", type=float, default=0.05, help="share that is dropped")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--real", action="store_true", help="also real pairs with a real model")
    parser.add_argument("--into", type=Path, help="a JSON file")
    options = parser.parse_args(arguments)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(options, Path(temporary))
        if options.real:
            found["real"] = real(options, Path(temporary))
    text = json.dumps(found, indent=1)
    print(text)
    if options.into is not None:
        options.into.write_text(text + "\n")
    return 0


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Displacement of every arm, and paired differences, over seeds and prompts."""
    held = problems("held_out", options.held_out, seed=5)
    _write(folder / "held.jsonl", pairs(held, candidates(held, 6, seed=5), seed=5).rows)
    moved: dict[str, list[np.ndarray]] = {arm: [] for arm in ARMS}
    foretold, caught, dropped = [], 0, 0
    for seed in range(options.seeds):
        asked = problems("train", options.problems, seed=seed)
        made = pairs(asked, candidates(asked, 6, seed=seed), flaws=Flaws(near_identical=options.near), seed=seed).rows
        near = [_alike(row) for row in made]
        _write(folder / f"all-{seed}.jsonl", made)
        scores = _ches(folder / f"all-{seed}.jsonl", folder / f"scored-{seed}")
        count = round(options.drop * len(made))
        order = np.argsort(scores, kind="stable")
        away = {
            "all": set(),
            "ches": set(order[-count:].tolist()),
            "random": set(random.Random(seed).sample(range(len(made)), count)),
        }
        caught += sum(near[row] for row in away["ches"])
        dropped += count
        for arm in ARMS:
            name = folder / f"{arm}-{seed}.jsonl"
            _write(name, [row for number, row in enumerate(made) if number not in away[arm]])
            run = _train(options, POLICY, name, folder / "held.jsonl", folder / f"run-{arm}-{seed}", seed)
            by_prompt = next(
                each.by_prompt for each in read_scores(run).values() if each.metric == "displacement/chosen"
            )
            moved[arm].append(np.array([by_prompt[prompt] for prompt in sorted(by_prompt)]))
            if arm == "all":
                foretold.append(_foretold(folder / f"all-{seed}.jsonl", run, scores))
    arms = {arm: np.stack(values) for arm, values in moved.items()}
    return {
        "settings": {key: value for key, value in vars(options).items() if key not in ("into", "real")},
        "near_identical_among_dropped": caught / dropped,
        "displacement_chosen_nats": {arm: _estimate(values) for arm, values in arms.items()},
        "difference_nats": {
            "ches − all": _estimate(arms["ches"] - arms["all"]),
            "random − all": _estimate(arms["random"] - arms["all"]),
            "ches − random": _estimate(arms["ches"] - arms["random"]),
        },
        "correlation_on_training_pairs": foretold,
    }


def real(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """CHES against displacement on real pairs with a real model, as it is."""
    run = folder / "real"
    status = train(
        [
            "--objective.name=dpo",
            f"--model_name_or_path={shared() / 'models' / 'stories260k'}",
            f"--dataset_name={shared() / 'data' / 'hh_harmless.jsonl.gz'}",
            f"--output_dir={run}",
            "--eval_share=0.3",
            "--learning_rate=5e-4",
            "--num_train_epochs=1",
            "--rows_per_step=32",
            "--save_strategy=no",
            "--evals=[ranking, {name: ches, edit_similarity: true}]",
        ]
    )
    assert status == 0
    found = {
        each.metric: [each.value, each.low, each.high, each.n]
        for each in Results.read(run / "results.json").results
        if each.step and (each.metric.startswith("ches/") or each.metric == "displacement/chosen")
    }
    return {"displacement/chosen": found.pop("displacement/chosen"), **found}


def _train(options: argparse.Namespace, model: Path, rows: Path, held: Path, output: Path, seed: int) -> Path:
    status = train(
        [
            "--objective.name=dpo",
            f"--beta={options.beta}",
            f"--model_name_or_path={model}",
            f"--dataset_name={rows}",
            f"--eval_dataset_name={held}",
            f"--output_dir={output}",
            f"--learning_rate={options.learning_rate}",
            f"--max_steps={options.steps}",
            "--rows_per_step=32",
            "--save_strategy=no",
            f"--train.seed={seed}",
        ]
    )
    assert status == 0
    return output


def _ches(rows: Path, output: Path) -> np.ndarray:
    """LN-CHES of every row under the shipped policy, in the rows' order."""
    words = [f"--model_name_or_path={POLICY}", f"--data.dataset_name={rows}", f"--output_dir={output}", "--evals=ches"]
    evaluate(read_job(None, [*words, "--reference.model=none"]), say=lambda line: None, report=False)
    return np.array([pair.numbers["ln_ches"] for pair in read_pairs(output)])


def _foretold(rows: Path, run: Path, scores: np.ndarray) -> dict[str, list[float | None]]:
    """How well LN-CHES foretold how far the chosen responses of the training pairs fell."""
    output = run / "training pairs"
    words = [f"--model_name_or_path={run}", f"--data.dataset_name={rows}", f"--output_dir={output}", "--evals=ranking"]
    evaluate(read_job(None, [*words, f"--reference.model={POLICY}"]), say=lambda line: None, report=False)
    numbers = [pair.numbers for pair in read_pairs(output)]
    fell = np.array([each["ref_chosen"] - each["policy_chosen"] for each in numbers])
    found = correlations(scores, fell, range(len(fell)))
    return {kind: [each.value, each.low, each.high] for kind, each in found.items()}


def _alike(row: Any) -> bool:
    """Whether a pair was built to be near-identical: one digit differs."""
    chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
    return len(chosen) == len(rejected) and sum(a != b for a, b in zip(chosen, rejected, strict=True)) == 1


def _estimate(values: np.ndarray) -> dict[str, float | None]:
    if len(values) < 2:
        return {"value": float(values.mean()), "low": None, "high": None}
    found = over_seeds(values)
    return {"value": found.value, "low": found.low, "high": found.high}


def _write(path: Path, rows: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
