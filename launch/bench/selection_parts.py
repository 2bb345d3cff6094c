"""Pass@k and scaling curves of selections, from stored samples of the embedded world's policies."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.fingerprints import weights_on_disk
from align.groups import Samples, group_samples
from align.sampling import Request, Sampling, decoded, draw, encoded, spread, without_end
from align.selection import (
    BestOfMajority,
    BestOfN,
    BestOfNAnswers,
    Majority,
    Selection,
    SoftBestOfN,
    WeightedMajority,
)
from align.selection_curves import Curve, pass_at_k_curve, selection_curve
from data.worlds import POLICY, Problem, answer_of, problems
from objectives.stats import mean_with_interval

BATCH = 128
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CHOSEN = (1, 2, 3, 4, 6, 8)
"""Answers handed in, the k of selections."""
ERRORS = {"none": 0.0, "medium": 0.3, "large": 1.0}
"""Sizes of the reward's error, in units of the difference between right and wrong."""
ALPHA = 0.05


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """How much is drawn."""

    seeds: tuple[int, ...] = (0, 1)
    """Of rounds."""
    rounds: int = 3
    train_problems: int = 700
    samples_per_round: int = 8
    held_out: int = 500
    held_out_n: int = 8
    epochs: int = 2
    problems: int = 100
    """For everything that selects."""
    samples: int = 512
    """Of the shipped policy, for each of them."""
    pass_samples: int = 64
    """Of policies after rounds."""
    chain_problems: int = 64
    """For chains, the first of ``problems``."""
    steps: int = 96
    betas: tuple[float, ...] = (0.2, 1.0)
    max_tokens: int = 64


def aligned(folder: Path, seed: int, number: int) -> Path:
    """Where the policy after a round is."""
    return folder / f"rounds-{seed}" / f"round-{number}" / "train"


# ---- the reward with controllable error ----


def noisy_reward(problem: Problem, answer: int | None, size: float, seed: int = 0) -> float:
    """A reward model that errs as much as it is told to, and always in the same way.

        r = 1[answer is right] + size · t,    t = (2u − 1)/√(2u(1 − u)),    u from a hash of question, answer and seed

    u is uniform, so t has Student's distribution with 2 degrees of freedom: about half of the errors are below 0.82 and
    one in 200 above 9.9. The error belongs to the answer, so that further samples do not average it out, and which
    answers are overrated can only be seen by sampling them.

    Args:
        problem: what was asked.
        answer: what was answered. None, no answer, is worth 0 without an error: there is nothing to err about.
        size: of the error, in units of the difference between right and wrong, ≥ 0.
        seed: another reward model.
    """
    if answer is None:
        return 0.0
    digest = hashlib.sha256(f"{seed}/{problem.question}/{answer}".encode()).digest()
    u = (int.from_bytes(digest[:6]) + 0.5) / 2**48
    return float(answer == problem.answer) + size * (2 * u - 1) / (2 * u * (1 - u)) ** 0.5


# ---- samples ----


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The samples of one problem."""

    answers: tuple[int | None, ...]
    lengths: tuple[int, ...]
    """In tokens, the end included."""


def load(policy: Path) -> tuple[Any, Any]:
    """A policy and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(policy)


def prompt_of(problem: Problem, tokenizer: Any) -> tuple[int, ...]:
    """A problem as the policy reads it."""
    return tuple(encoded(({"role": "user", "content": problem.question},), tokenizer)[1])


def drawn(policy: Path, asked: Sequence[Problem], n: int, max_tokens: int, folder: Path, name: str) -> list[Drawn]:
    """Samples at temperature 1, stored as they come: what a file has is not drawn again."""
    how = Sampling(n=n, max_tokens=max_tokens, seed=17)
    header = json.dumps({"weights": weights_on_disk(str(policy)), "sampling": how.described()})
    path = folder / f"{name}.jsonl"
    known: dict[str, Drawn] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if lines and lines[0] == header:
        for line in lines[1:]:
            one = json.loads(line)
            known[one["question"]] = Drawn(answers=tuple(one["answers"]), lengths=tuple(one["lengths"]))
    else:
        path.write_text(header + "\n", encoding="utf-8")
    missing = [problem for problem in asked if problem.question not in known]
    model, tokenizer = load(policy)
    ends = {tokenizer.eos_token_id}
    for number, problem in enumerate(missing):
        seed = spread(how.seed, int(hashlib.sha256(problem.question.encode()).hexdigest()[:8], 16))
        ids = prompt_of(problem, tokenizer)
        requests = [
            Request(number=i, prompt=ids, n=min(BATCH, n - i), max_tokens=max_tokens, seed=seed + i)
            for i in range(0, n, BATCH)
        ]
        found = dict(
            draw(model, requests, how, ends=ends, pad=tokenizer.eos_token_id, tokenizer=tokenizer, batch=BATCH)
        )
        own = [each for i in sorted(found) for each in found[i]]
        answers = [answer_of(decoded(tokenizer, without_end(each, ends), [])) for each in own]
        lengths = [len(each.token_ids) for each in own]
        known[problem.question] = Drawn(answers=tuple(answers), lengths=tuple(lengths))
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"question": problem.question, "answers": answers, "lengths": lengths}) + "\n")
        if number % 20 == 0:
            print(f"  {name}: {number} of {len(missing)} problems", file=sys.stderr, flush=True)
    return [known[problem.question] for problem in asked]


def of_the_start(numbers: Numbers, folder: Path) -> tuple[list[Problem], list[Drawn]]:
    """The problems for everything that selects, with samples of the shipped policy."""
    asked = problems("held_out", numbers.problems, seed=5)
    return asked, drawn(POLICY, asked, numbers.samples, numbers.max_tokens, folder, "start")


def grouped(
    asked: Sequence[Problem], samples: Sequence[Drawn], size: float
) -> tuple[list[Samples], list[tuple[bool, ...]]]:
    """Samples with rewards of some error, and which answers are right."""
    groups = [
        group_samples(one.answers, [noisy_reward(problem, answer, size) for answer in one.answers], number=number)
        for number, (problem, one) in enumerate(zip(asked, samples, strict=True))
    ]
    right = [tuple(a == problem.answer for a in one.answers) for problem, one in zip(asked, groups, strict=True)]
    return groups, right


def up_to(sizes: Sequence[int], most: int) -> list[int]:
    """The sizes that there are samples for."""
    return [size for size in sizes if size <= most]


def estimates(curve: Curve) -> list[dict[str, Any]]:
    """A curve's points for JSON."""
    return [asdict(each) for each in curve.estimates]


def paired(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """How much higher the first is, over the same problems."""
    return asdict(mean_with_interval((first - second).tolist(), range(len(first))))


# ---- pass@k ----


def pass_at_k(numbers: Numbers, folder: Path) -> dict[str, Any]:
    """Unbiased pass@k of the shipped policy and of those after the last round, and the paired difference."""
    asked, start = of_the_start(numbers, folder)
    sizes = up_to((1, 2, 4, 8, 16, 32, 64), numbers.pass_samples)
    base = _passed(asked, start, sizes)
    runs = []
    for seed in numbers.seeds:
        policy = aligned(folder, seed, numbers.rounds)
        if not policy.is_dir():
            raise SystemExit(f"{policy} is not there; measure rounds first, with the same --output_dir")
        after = _passed(
            asked, drawn(policy, asked, numbers.pass_samples, numbers.max_tokens, folder, f"aligned-{seed}"), sizes
        )
        changes = [paired(after.per_prompt[:, i], base.per_prompt[:, i]) for i in range(len(sizes))]
        runs.append({"seed": seed, "values": estimates(after), "changes": changes})
    return {
        "problems": len(asked),
        "samples": {"start": numbers.samples, "aligned": numbers.pass_samples},
        "k": sizes,
        "start": estimates(base),
        "runs": runs,
    }


def _passed(asked: Sequence[Problem], samples: Sequence[Drawn], sizes: Sequence[int]) -> Curve:
    return pass_at_k_curve(*grouped(asked, samples, 0.0), sizes)


# ---- scaling curves ----


def strategies(k: int = 1) -> Mapping[str, Selection]:
    """What is compared, each at its defaults but for α."""
    return {
        "best_of_n": BestOfN() if k == 1 else BestOfNAnswers(k=k),
        "majority": Majority(k=k),
        "weighted_majority": WeightedMajority(k=k),
        "best_of_majority": BestOfMajority(alpha=ALPHA, k=k),
        "soft_best_of_n": SoftBestOfN(k=k),
    }


def curves(numbers: Numbers, folder: Path) -> dict[str, Any]:
    """Accuracy by number of samples and by number of answers, under rewards of several errors."""
    asked, samples = of_the_start(numbers, folder)
    sizes = up_to(SIZES, numbers.samples)
    by_error = {}
    for name, size in ERRORS.items():
        groups, right = grouped(asked, samples, size)
        found = {each: selection_curve(rule, groups, right, sizes) for each, rule in strategies().items()}
        handed_in = {
            each: [selection_curve(strategies(k)[each], groups, right, sizes[-1:]) for k in CHOSEN] for each in found
        }
        gate = found["best_of_majority"].per_prompt[:, -1]
        gates = [
            paired(majority.per_prompt[:, 0], best.per_prompt[:, 0])
            for majority, best in zip(handed_in["best_of_majority"], handed_in["best_of_n"], strict=True)
        ]
        by_error[name] = {
            "size": size,
            "ranks_right_first": ranked_right(groups, right),
            "by_samples": {each: estimates(curve) for each, curve in found.items()},
            "by_answers": {each: [estimates(curve)[0] for curve in listed] for each, listed in handed_in.items()},
            "gate_by_answers": gates,
            "since_peak": {each: since_peak(curve) for each, curve in found.items()},
            "since_middle": {each: since_middle(curve) for each, curve in found.items()},
            "best_of_majority_against": {
                each: paired(gate, found[each].per_prompt[:, -1]) for each in ("best_of_n", "majority")
            },
        }
    distinct = [len(one.answers) for one in grouped(asked, samples, 0.0)[0]]
    return {
        "problems": len(asked),
        "samples": numbers.samples,
        "alpha": ALPHA,
        "subsets": 200,
        "n": sizes,
        "k": list(CHOSEN),
        "distinct_answers": {"median": float(np.median(distinct)), "most": max(distinct)},
        "errors": by_error,
    }


def since_peak(curve: Curve) -> dict[str, Any]:
    """How accuracy at the largest N differs from that at its best N.

    The best N is looked for on one half of the problems and the difference measured on the other, both ways: where it
    is looked for, some N is best by luck, and any curve would seem to fall.
    """
    values = curve.per_prompt
    halves = np.arange(len(values)) % 2
    best = [int(values[halves == half].mean(axis=0).argmax()) for half in (0, 1)]
    peak = values[np.arange(len(values)), [best[1 - half] for half in halves]]
    return paired(values[:, -1], peak) | {"peak_at": [curve.sizes[place] for place in best]}


def since_middle(curve: Curve) -> dict[str, Any]:
    """How accuracy at the largest N differs from that at the N halfway along the sizes."""
    place = len(curve.sizes) // 2
    return paired(curve.per_prompt[:, -1], curve.per_prompt[:, place]) | {"from": curve.sizes[place]}


def ranked_right(groups: Sequence[Samples], right: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """How often the reward puts the right answer above a wrong one, over all wrong answers that were sampled."""
    shares = []
    for one, good in zip(groups, right, strict=True):
        rewards = [float(one.rewards[one.group == group].mean()) for group in range(len(one.answers))]
        for reward, is_right in zip(rewards, good, strict=True):
            if is_right and len(rewards) > 1:
                others = [other for other, same in zip(rewards, good, strict=True) if not same]
                shares.append(float(np.mean([reward > other for other in others])))
    return asdict(mean_with_interval(shares, range(len(shares)))) if shares else {}
