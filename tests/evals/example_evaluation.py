"""A run that was evaluated in every way: believable numbers that hang together, in the formats of the real thing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from evals.ches import METRICS as CHES_METRICS
from evals.correlation import correlations
from evals.generations_file import Generation, write_generations
from evals.idealised import alignment_gap
from evals.pair_rows import PairRow, write_pairs
from evals.ranking import Pairs, mean_of, rank, share_of
from evals.results import Result, Results
from evals.scores import Scores, write_scores
from evals.win_rate import win_rate
from tests.evals.example_run import make_run

SUBJECTS = (
    "bread",
    "a bicycle",
    "tomato plants",
    "a wool jumper",
    "an old laptop",
    "a kettle",
    "a cast-iron pan",
    "bees",
)
ASKED = (
    "How do I keep {} in good shape over the winter?",
    "My neighbour gave me {}. What should I know first?",
    "Explain {} to a ten-year-old in three sentences.",
    "Write a short note that says why {} matters to our town.",
    "What goes wrong most often with {}, and how is it mended?",
)
SENTENCES = (
    "Keep it dry and away from direct light.",
    "Start by looking at it closely: what is worn, and what only looks so?",
    "A soft cloth and warm water do more than any product you can buy.",
    "If you are not sure, ask somebody who has one; most people like to be asked.",
    "Do it once a month, and write down what you changed.",
    "It is easier than it sounds, and mistakes can be put right.",
    "There are three things to watch: warmth, damp, and patience.",
    "Some say the opposite, but I have not found that it holds.",
)
STEP = 300
STRATEGIES = ("majority", "best_of_n", "weighted_majority", "any")
TEST = "test"


def question(i: int) -> str:
    return ASKED[i % len(ASKED)].format(SUBJECTS[i // len(ASKED) % len(SUBJECTS)]) + (f" ({i})" if i >= 40 else "")


def prose(rng: np.random.Generator, sentences: int) -> str:
    return " ".join(SENTENCES[int(i)] for i in rng.integers(0, len(SENTENCES), sentences))


def add_pairs(path: Path, *, name: str, n: int, seed: int = 3, better: float = 1.0) -> list[Result]:
    """Pairs whose chosen response fell the more, the more alike the two are to the reference; and their results."""
    rng, own = np.random.default_rng(3), np.random.default_rng([seed, 1])  # of the data, and of this run
    ln_ches = rng.normal(-0.8, 0.45, n)
    lengths = rng.lognormal(3.4, 0.5, (2, n)).astype(int) + 4
    ref_chosen = -60 - 0.4 * lengths[0] + rng.normal(0, 5, n)
    ref_rejected = -60 - 0.4 * lengths[1] + rng.normal(2, 5, n)
    fell = -3.0 - 7.0 * (ln_ches + 0.8) + own.normal(0, 3.5, n)
    policy_chosen = ref_chosen + fell
    policy_rejected = ref_rejected - 4 * better + 0.8 * fell + own.normal(0, 3, n)
    prompts = [f"p{i // 2:05d}" for i in range(n)]
    rows = [
        PairRow(
            dataset=name,
            split=TEST,
            step=STEP,
            row=f"{name}, row {i}",
            prompt_id=prompts[i],
            prompt=question(i // 2),
            chosen=prose(rng, 2 + int(lengths[0][i]) // 12),
            rejected=prose(rng, 2 + int(lengths[1][i]) // 12),
            numbers={
                "policy_chosen": float(policy_chosen[i]),
                "policy_rejected": float(policy_rejected[i]),
                "ref_chosen": float(ref_chosen[i]),
                "ref_rejected": float(ref_rejected[i]),
                "length_chosen": float(lengths[0][i]),
                "length_rejected": float(lengths[1][i]),
                "difficulty": float(ref_rejected[i] - ref_chosen[i]),
                "ches": float(ln_ches[i] * lengths[0][i] * 9),
                "ln_ches": float(ln_ches[i]),
            },
        )
        for i in range(n)
    ]
    write_pairs(path, rows, dataset=name, split=TEST, step=STEP)
    of = Pairs(
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        length_chosen=lengths[0],
        length_rejected=lengths[1],
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
        prompts=prompts,
    )
    measured = rank(of).results(dataset=name, split=TEST, step=STEP)
    ideal = alignment_gap(policy_chosen, policy_rejected, ref_chosen, ref_rejected, prompts=prompts)
    for metric, estimate in ideal.estimates.items():
        measured.append(
            Result.of(estimate, metric=metric, dataset=name, split=TEST, step=STEP, extra=dict(ideal.extra))
        )
    few = slice(0, 1000)  # a bootstrap of ranks over thousands of pairs is not what these tests are about
    for kind, estimate in correlations(ln_ches[few], -fell[few], prompts[few]).items():
        metric = f"ches/ln_ches_{kind}"
        assert metric in CHES_METRICS
        measured.append(Result.of(estimate, metric=metric, dataset=name, split=TEST, step=STEP))
    return measured


def add_generations(path: Path, *, name: str, models: dict[str, float], prompts: int, seed: int = 5) -> None:
    """Answers of several models, the longer the higher the number beside the model."""
    answers = []
    for model, length in models.items():
        rng = np.random.default_rng(len(model) if "/" in model else seed)  # baselines answer all runs alike
        for i in range(prompts):
            sentences = 1 + int(rng.poisson(length))
            text = prose(rng, sentences)
            answers.append(
                Generation(
                    dataset=name,
                    split=TEST,
                    step=STEP if "sft" not in model else 0,
                    model=model,
                    prompt_id=f"p{i:05d}",
                    prompt=[{"role": "user", "content": question(i)}],
                    sample=0,
                    text=text,
                    finish_reason="length" if sentences > 9 else "stop",
                    tokens=len(text) // 4,
                    scores={"judge": float(np.round(rng.beta(2 + length, 5), 3))},
                )
            )
    write_generations(path, answers)


def other_results(
    path: Path, *, name: str, rng: np.random.Generator, gain: float, baselines: tuple[str, ...]
) -> list[Result]:
    """Win rates, pass@k, and metrics that no table knows."""
    prompts = [f"p{i:05d}" for i in range(200)]
    found: list[Result] = []
    scores: list[Scores] = []
    for i, baseline in enumerate(baselines):
        preference = 1 + rng.choice([0.0, 0.5, 1.0], size=200, p=[0.45 - gain + 0.1 * i, 0.1, 0.45 + gain - 0.1 * i])
        measured = win_rate(preference, prompts)
        split = TEST if len(baselines) == 1 else f"{TEST} vs {baseline}"
        extra = {"baseline": baseline, "judge": "acme/judge-7b", "sampling": {"temperature": 0.7, "max_tokens": 512}}
        for metric, estimate in measured.estimates.items():
            found.append(Result.of(estimate, metric=metric, dataset=name, split=split, step=STEP, extra=extra))
        controlled = share_of(np.clip(preference - 1 - 0.04, 0, 1), prompts)
        found.append(
            Result.of(
                controlled, metric="win_rate/length_controlled", dataset=name, split=split, step=STEP, extra=extra
            )
        )
        by_prompt = measured.by_prompt["win_rate/raw"]
        scores.append(Scores(metric="win_rate/raw", dataset=name, split=split, step=STEP, by_prompt=by_prompt))
    write_scores(path, scores)
    for j, strategy in enumerate(STRATEGIES):
        luck = rng.beta(0.6, 1.4, 200)
        for k in (1, 2, 4, 8, 16, 32, 64):
            worth = k ** (0.35 + 0.2 * j)
            right = (rng.random(200) < 1 - (1 - luck) ** worth).astype(float)
            metric = f"pass_at_k/{strategy}@{k}"
            found.append(Result.of(share_of(right, prompts), metric=metric, dataset="acme/sums", split=TEST, step=STEP))
    for metric, values in (
        ("generations/length_tokens", rng.lognormal(4.5, 0.4, 200)),
        ("generations/repetition", rng.beta(1, 30, 200)),
        ("retention/general_change", rng.normal(-0.012, 0.05, 200)),
        ("novelty/oddness", rng.normal(0.3, 1.0, 200)),
    ):
        found.append(Result.of(mean_of(values, prompts), metric=metric, dataset=name, split=TEST, step=STEP))
    return found


def doctor() -> dict:
    rng = np.random.default_rng(1)
    counts, edges = np.histogram(rng.lognormal(4, 0.5, 11_000), bins=30)
    other, others = np.histogram(rng.lognormal(4.2, 0.5, 11_000), bins=30)
    return {
        "version": 1,
        "dataset": "acme/helpful-pairs",
        "rows": 11_212,
        "findings": [
            {
                "check": "exact duplicates",
                "verdict": "fine",
                "text": "No row occurs twice.",
                "key": "",
                "value": 0,
                "n": 11_212,
            },
            {
                "check": "length bias",
                "verdict": "warning",
                "text": "The longer response is the chosen one in 71 % of pairs; a model can learn length instead.",
                "key": "data.max_length_ratio",
                "value": 0.71,
                "low": 0.7,
                "high": 0.72,
                "n": 11_212,
                "rows": 7961,
                "examples": ["row 17", "row 204"],
            },
            {
                "check": "overlap with evaluation",
                "verdict": "fault",
                "text": "12 held-out prompts are among the training prompts.",
                "key": "data.decontaminate",
                "value": 12,
                "rows": [3, 17, 40, 41, 78, 90, 113, 190, 201, 202, 330, 401],
                "examples": [{"row": 17, "prompt": "How do I keep bread fresh?"}],
            },
            {
                "check": "near duplicates",
                "verdict": "remark",
                "text": "1.4 % of prompts have a near twin.",
                "key": "filter",
                "value": 0.014,
            },
        ],
        "distributions": {
            "length_chosen": {"edges": edges.tolist(), "counts": counts.tolist()},
            "length_rejected": {"edges": others.tolist(), "counts": other.tolist()},
        },
    }


def make_evaluated(
    path: Path,
    *,
    pairs: int = 500,
    prompts: int = 40,
    gain: float = 0.12,
    seed: int = 3,
    baselines: tuple[str, ...] = ("acme/sft", "acme/bigger-chat"),
    model: str = "acme/stories-260k",
) -> Path:
    """Every file of a run, those of its evaluation included; deterministic."""
    name = "acme/helpful-pairs"
    make_run(path, name=name, model=model, seed=seed)
    results = Results.read(path / "results.json")
    found = add_pairs(path, name=name, n=pairs, seed=seed, better=gain * 8)
    add_generations(
        path,
        name=name,
        models={path.name: 6.0 + 8 * gain, "acme/sft": 4.0, "acme/bigger-chat": 8.0},
        prompts=prompts,
        seed=seed,
    )
    found += other_results(path, name=name, rng=np.random.default_rng(seed), gain=gain, baselines=baselines)
    Results(run=results.run, results=[*results.results, *found]).write(path / "results.json")
    (path / "doctor.json").write_text(json.dumps(doctor()))
    return path
