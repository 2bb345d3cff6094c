"""What each objective is for, measured on the embedded world: a table with 95 % intervals.

    make objectives            or: python -m launch.bench.objectives [--only rpo,bco]

Every claim is one comparison of two or more runs that start from the shipped policy, on the same problems. Intervals
are over held-out problems, of one run each: they say how well a number of this run is known, not how much another seed
would change it. ``docs/what_each_is_for.md`` is the output.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.console import quiet_libraries
from align.sampling import Sampling, sample
from align.train import main as align_train
from data.worlds import POLICY, Flaws, Problem, candidates, gold_score, labels, problems, scored, triples
from evals.worlds import Answers
from objectives.relabel import RewardAugmented
from objectives.rows import Text
from objectives.stats import Z95, Estimate, mean_with_interval
from objectives.token_weights import Goldfish

RECIPES = Path(__file__).parents[1] / "recipes"
DOCUMENT = Path(__file__).parents[2] / "docs" / "what_each_is_for.md"
COMMON = (
    "--rows_per_step=32",
    "--logging_steps=10",
    "--save_strategy=no",
    "--overwrite_output_dir",
    "--warmup_steps=0.1",
)
SCALE = RewardAugmented(form="system", lowest=0.0, highest=1.0)


@dataclass
class Bench:
    """The shared inputs of all comparisons, made when they are first asked for."""

    folder: Path
    train_problems: int = 600
    held_out: int = 400
    timings: dict[str, float] = field(default_factory=dict)

    @cached_property
    def asked(self) -> list[Problem]:
        """Training problems."""
        return problems("train", self.train_problems, seed=1)

    @cached_property
    def samples(self) -> list[list[str]]:
        """Eight answers of the shipped policy to each."""
        model, tokenizer = load(POLICY)
        prompts = [({"role": "user", "content": problem.question},) for problem in self.asked]
        return sample(model, tokenizer, prompts, Sampling(n=8, max_tokens=64, seed=1), batch=512)

    @cached_property
    def start(self) -> Estimate:
        """Accuracy of the shipped policy on held-out problems."""
        return self.accuracy(POLICY)

    @cached_property
    def pairs(self) -> Path:
        """The policy's own answers with their scores."""
        return self.write("scored", scored(self.asked, self.samples).rows)

    def write(self, name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
        """Rows as a file."""
        path = self.folder / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def train(self, name: str, recipe: str, data: Path, *overrides: str, start: Path = POLICY) -> Path:
        """One run; returns its directory."""
        run, began = self.folder / name, time.perf_counter()
        words = [
            f"--config={RECIPES / f'{recipe}.yaml'}",
            f"--model_name_or_path={start}",
            f"--dataset_name={data}",
            "--format=auto",
            "--data.columns={}",
            f"--output_dir={run}",
            *COMMON,
            *overrides,
        ]
        log = self.folder / f"{name}.log"
        with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            status = align_train(words)
        if status:
            raise SystemExit(f"{name} failed:\n{log.read_text()[-2000:]}")
        self.timings[name] = time.perf_counter() - began
        print(f"  {name}: trained in {self.timings[name]:.0f} s", file=sys.stderr, flush=True)
        return run

    def accuracy(self, model_folder: Path, goal: RewardAugmented | None = None) -> Estimate:
        """Share of right answers among two samples of each held-out problem."""
        model, tokenizer = load(model_folder)
        measure = Answers(
            {"held_out": problems("held_out", self.held_out, seed=3)},
            Sampling(n=2, max_tokens=64, seed=7),
            goal=goal,
        )
        found = next(r for r in measure(model, tokenizer, 0) if r.metric == "answers/accuracy")
        return Estimate(
            value=found.value,
            stderr=found.stderr or 0.0,
            low=found.low or 0.0,
            high=found.high or 0.0,
            n=found.n,
            clusters=found.clusters,
            interval=found.interval,
        )


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    claim: str
    compared: str
    numbers: str
    shows: bool


def load(folder: Path) -> tuple[Any, Any]:
    """A model and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def shown(estimate: Estimate) -> str:
    """A value with its interval."""
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def above(first: Estimate, second: Estimate) -> bool:
    """Whether the difference of two independent estimates exceeds zero by more than its 95 % interval."""
    return first.value - second.value > Z95 * float(np.hypot(first.stderr, second.stderr))


# ---- comparisons ----


def rpo(bench: Bench) -> Iterator[Finding]:
    """Displacement of chosen responses at equal margin, DPO against RPO, on held-out pairs."""
    curves = {}
    for name, recipe, own in (
        ("dpo", "dpo", ("--beta=0.1",)),
        ("rpo", "rpo", ("--beta=0.1", "--eta=0.5", "--form=average")),
    ):
        run = bench.train(
            f"rpo-{name}",
            recipe,
            bench.pairs,
            *own,
            "--rule=best_vs_random",
            "--learning_rate=7e-4",
            "--num_train_epochs=4",
            "--eval_share=0.25",
            "--eval_strategy=steps",
            "--eval_steps=4",
        )
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        curves[name] = [line for line in lines if "eval/displacement/chosen" in line]
    margins = {name: [line["eval/rewards/margins"] for line in curve] for name, curve in curves.items()}
    level = 0.9 * min(max(values) for values in margins.values())
    at: dict[str, Estimate] = {}
    for name, curve in curves.items():
        line = next(line for line in curve if line["eval/rewards/margins"] >= level)
        value, low, high = (line[f"eval/displacement/chosen{end}"] for end in ("", "_low", "_high"))
        at[name] = Estimate(
            value=value,
            stderr=(high - low) / (2 * Z95),
            low=low,
            high=high,
            n=0,
            clusters=0,
            interval="clustered-t",
        )
    numbers = "; ".join(f"{name} {e.value:+.2f} [{e.low:+.2f}, {e.high:+.2f}] nats" for name, e in at.items())
    yield Finding(
        "rpo keeps chosen responses likelier than dpo at equal margin",
        f"change of chosen log-prob when the held-out margin reaches {level:.1f}; beta 0.1, rpo: form average, eta 0.5",
        numbers,
        above(at["rpo"], at["dpo"]),
    )


def tpo(bench: Bench) -> Iterator[Finding]:
    """One stage of TPO against SFT then DPO, and DPO alone, from the same base."""
    data = bench.write("triples", triples(bench.asked, bench.samples).rows)
    dpo = ("--beta=0.5", "--learning_rate=5e-4", "--eval_share=0")
    alone = bench.train("tpo-dpo-alone", "dpo", data, *dpo, "--num_train_epochs=4")
    sft = bench.train("tpo-sft", "sft", data, "--learning_rate=5e-4", "--eval_share=0", "--num_train_epochs=2")
    staged = bench.train("tpo-sft-then-dpo", "dpo", data, *dpo, "--num_train_epochs=2", start=sft)
    one = bench.train(
        "tpo-tpo", "tpo", data, "--beta=0.2", "--learning_rate=5e-4", "--eval_share=0", "--num_train_epochs=4"
    )
    found = {
        "start": bench.start,
        "dpo alone": bench.accuracy(alone),
        "sft": bench.accuracy(sft),
        "sft, then dpo": bench.accuracy(staged),
        "tpo": bench.accuracy(one),
    }
    numbers = "; ".join(f"{name} {shown(estimate)}" for name, estimate in found.items())
    settings = "beta 0.2, dpo: 0.5"
    yield Finding(
        "tpo in one stage is better than sft on its gold responses, then dpo",
        f"accuracy after four passes over the same triples (sft: two of them); {settings}",
        numbers,
        above(found["tpo"], found["sft, then dpo"]),
    )
    yield Finding(
        "tpo's preference adds to sft on its gold responses",
        f"accuracy; tpo of four passes against sft of two; {settings}",
        "; ".join(f"{name} {shown(found[name])}" for name in ("sft", "tpo")),
        above(found["tpo"], found["sft"]),
    )
    yield Finding(
        "dpo after sft on the gold responses lowers accuracy",
        "accuracy; two passes of each; beta 0.5",
        "; ".join(f"{name} {shown(found[name])}" for name in ("sft", "sft, then dpo")),
        above(found["sft"], found["sft, then dpo"]),
    )


def bco(bench: Bench) -> Iterator[Finding]:
    """Labels alone, as they come and with very unequal classes."""
    for share, what in ((None, "as they come"), (0.9, "90 % thumbs up"), (0.1, "10 % thumbs up")):
        made = labels(bench.asked, bench.samples, flaws=Flaws(thumbs_up_share=share))
        data, found = bench.write(f"labels-{share}", made.rows), {"start": bench.start}
        for shift in ("mean", "balanced"):
            run = bench.train(
                f"bco-{share}-{shift}",
                "bco",
                data,
                "--prompt_encoder=null",
                f"--shift={shift}",
                "--beta=2",
                "--learning_rate=2e-4",
                "--eval_share=0",
                "--max_steps=200",
            )
            found[f"shift {shift}"] = bench.accuracy(run)
        yield Finding(
            "bco learns from labels alone" + ("" if share is None else ", also from unequal ones"),
            f"accuracy; {len(made.rows)} labels, {what}; beta 2, no prompt_encoder",
            "; ".join(f"{name} {shown(estimate)}" for name, estimate in found.items()),
            above(found["shift balanced"], bench.start),
        )


def goldfish(bench: Bench) -> Iterator[Finding]:
    """Codes that can only be known by heart, read 150 times, with and without goldfish."""
    rng = random.Random(0)
    rows = [
        {"prompt": f"What is code {number}?", "completion": " " + "".join(rng.choices("0123456789", k=32))}
        for number in range(100, 132)
    ]
    data, mask = bench.write("codes", rows), Goldfish(k=4, h=4)
    common = ("--learning_rate=2e-3", "--eval_share=0", "--num_train_epochs=150", "--as_chat")
    runs = {
        "plain": bench.train("goldfish-plain", "sft", data, *common),
        "goldfish": bench.train("goldfish-goldfish", "goldfish", data, *common, "--h=4"),
    }
    found: dict[tuple[str, bool], Estimate] = {}
    for name, run in runs.items():
        recalled = {False: ([], []), True: ([], [])}  # kept?: items, clusters
        model, tokenizer = load(run)
        for cluster, row in enumerate(rows):
            messages = [{"role": "user", "content": row["prompt"]}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            response = tokenizer(row["completion"].strip(), add_special_tokens=False)["input_ids"]
            whole = torch.tensor([ids + response])
            with torch.no_grad():
                guesses = model(whole).logits[0, len(ids) - 1 : -1].argmax(-1).tolist()
            kept = mask.keep(np.array(ids + response), len(ids)).tolist()
            for guess, token, keep in zip(guesses, response, kept, strict=True):
                recalled[keep][0].append(float(guess == token))
                recalled[keep][1].append(cluster)
        for keep, (items, clusters) in recalled.items():
            found[name, keep] = mean_with_interval(items, clusters)
    yield Finding(
        "goldfish-dropped tokens are not memorised",
        "share of digits recalled after 150 readings (chance: 0.100); the tokens that goldfish drops",
        f"plain {shown(found['plain', False])}; goldfish {shown(found['goldfish', False])}"
        f" (tokens it keeps: plain {shown(found['plain', True])}, goldfish {shown(found['goldfish', True])})",
        above(found["plain", False], found["goldfish", False]) and found["goldfish", False].value < 0.3,
    )


def talr(bench: Bench) -> Iterator[Finding]:
    """Old skill (word problems) at the point where a new one (the next number) is learned, by kind of token weight."""
    rng = random.Random(0)
    numbers = [rng.randrange(10, 99) for _ in range(960)]
    rows = [{"prompt": f"What comes after {number}?", "completion": f"{number + 1}."} for number in numbers]
    tests = [{"prompt": f"What comes after {number}?", "completion": f"{number + 1}."} for number in range(10, 99)]
    data = bench.write("successors", rows)
    curves: dict[str, list[tuple[float, Estimate, int]]] = {}
    for name, recipe in (("sft", "sft"), ("talr", "talr"), ("flow", "flow")):
        run = bench.train(
            f"talr-{name}",
            recipe,
            data,
            "--as_chat",
            "--learning_rate=2e-4",
            "--eval_share=0",
            "--num_train_epochs=4",
            "--save_strategy=steps",
            "--save_steps=10",
            "--save_total_limit=null",
            "--lr_scheduler_type=constant_with_warmup",
        )
        curves[name] = []
        for checkpoint in sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1])):
            new = _new_skill(checkpoint, tests)
            curves[name].append((new, bench.accuracy(checkpoint), int(checkpoint.name.split("-")[-1])))
            if new >= 0.97:
                break
    reached = min(max(new for new, _, _ in curve) for curve in curves.values())
    at = {name: next(point for point in curve if point[0] >= reached) for name, curve in curves.items()}
    numbers = "; ".join(f"{name} {shown(old)} (new {new:.2f}, step {step})" for name, (new, old, step) in at.items())
    yield Finding(
        "talr keeps more of the old skill than sft where both have learned a new one",
        f"accuracy on word problems at each run's first checkpoint with {reached:.2f} or more of 89 successors right, "
        f"of which they have unequally many: *new*; start {shown(bench.start)}",
        numbers,
        above(at["talr"][1], at["sft"][1]),
    )


def _new_skill(folder: Path, tests: Sequence[Mapping[str, str]]) -> float:
    model, tokenizer = load(folder)
    prompts = [({"role": "user", "content": test["prompt"]},) for test in tests]
    answers = sample(model, tokenizer, prompts, Sampling(temperature=0, max_tokens=24), batch=512)
    return float(np.mean([drawn[0] == test["completion"] for drawn, test in zip(answers, tests, strict=True)]))


def reward_augmented(bench: Bench) -> Iterator[Finding]:
    """Pairs whose rejected response is right too, only more long-winded."""
    rows = []
    for problem, drawn in zip(bench.asked, candidates(bench.asked, 24, seed=5), strict=True):
        good = sorted(
            {text for text in drawn if gold_score(problem, text) >= 0.6}, key=lambda t: gold_score(problem, t)
        )
        if len(good) >= 2 and gold_score(problem, good[-1]) > gold_score(problem, good[0]):
            rows.append(
                {
                    "prompt": [{"role": "user", "content": problem.question}],
                    "chosen": [{"role": "assistant", "content": good[-1]}],
                    "rejected": [{"role": "assistant", "content": good[0]}],
                    "score_chosen": gold_score(problem, good[-1]),
                    "score_rejected": gold_score(problem, good[0]),
                }
            )
    data = bench.write("both-good", rows)
    start = bench.train(
        "augmented-start",
        "sft",
        bench.write("goals", _with_goals(bench)),
        "--learning_rate=5e-4",
        "--eval_share=0",
        "--num_train_epochs=2",
    )
    common = ("--beta=0.1", "--label_smoothing=0", "--learning_rate=1e-4", "--eval_share=0", "--max_steps=80")
    base = bench.train("augmented-dpo", "dpo", data, *common, start=start)
    run = bench.train(
        "augmented-augmented",
        "reward_augmented",
        data,
        *common,
        "--dataset_train_split=train",
        "--relabel.0.lowest=0",
        "--relabel.0.highest=1",
        start=start,
    )
    found = {
        "start": bench.accuracy(start),
        "start, asked for the highest score": bench.accuracy(start, goal=SCALE),
        "dpo": bench.accuracy(base),
        "reward-augmented dpo": bench.accuracy(run, goal=SCALE),
    }
    yield Finding(
        "reward-augmented beats its base loss where rejected responses are good",
        f"accuracy; {len(rows)} pairs of right answers, the rejected ones long-winded; the start has read goal texts",
        "; ".join(f"{name} {shown(estimate)}" for name, estimate in found.items()),
        above(found["reward-augmented dpo"], found["dpo"]),
    )


def _with_goals(bench: Bench) -> list[dict[str, Any]]:
    """The policy's own answers, every other one after its score as the goal: the shipped policy never read a goal."""
    rows: list[dict[str, Any]] = []
    for problem, drawn in zip(bench.asked, bench.samples, strict=True):
        for number, text in enumerate(drawn[:4]):
            prompt: Text = ({"role": "user", "content": problem.question},)
            if number % 2:
                prompt = SCALE.condition(prompt, gold_score(problem, text))
            rows.append({"prompt": list(prompt), "completion": [{"role": "assistant", "content": text}]})
    return rows


COMPARISONS: Mapping[str, Callable[[Bench], Iterator[Finding]]] = {
    "talr": talr,
    "rpo": rpo,
    "tpo": tpo,
    "bco": bco,
    "reward_augmented": reward_augmented,
    "goldfish": goldfish,
}


def markdown(findings: Sequence[Finding], seconds: float) -> str:
    """The document."""
    lines = [
        "# What each objective is for",
        "",
        "Measured on the embedded world with the shipped policy by `make objectives`"
        f" ({seconds / 60:.0f} minutes on two CPU cores). Intervals are 95 %, over held-out problems, of one run each:"
        " they do not hold the variation between seeds. A claim *shows* if the difference is larger than its interval."
        " Settings are those of the recipes but for learning rates, passes and what the table names;"
        " `launch/bench/objectives.py` has them all.",
        "",
        "| claim | what is compared | numbers | shows |",
        "|---|---|---|---|",
    ]
    lines += [f"| {f.claim} | {f.compared} | {f.numbers} | {'yes' if f.shows else '**no**'} |" for f in findings]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Runs the comparisons and writes the table."""
    parser = argparse.ArgumentParser(prog="python -m launch.bench.objectives", description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--only", default="", help=f"some of {','.join(COMPARISONS)}; the document is then not written")
    options = parser.parse_args(arguments)
    chosen = [name for name in options.only.split(",") if name] or list(COMPARISONS)
    for name in chosen:
        if name not in COMPARISONS:
            parser.error(f"unknown comparison {name!r} (known: {', '.join(COMPARISONS)})")
    quiet_libraries()
    shutil.rmtree(options.output_dir, ignore_errors=True)
    options.output_dir.mkdir(parents=True)
    bench, began = Bench(options.output_dir), time.perf_counter()
    findings: list[Finding] = []
    for name in chosen:
        print(f"{name} …", file=sys.stderr, flush=True)
        findings += COMPARISONS[name](bench)
    document = markdown(findings, time.perf_counter() - began)
    print(document)
    if not options.only:
        DOCUMENT.write_text(document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
