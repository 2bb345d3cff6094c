"""What the benchmark of selections works with: how much is drawn, a reward that errs, and stored samples."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit  # pyright: ignore[reportMissingTypeStubs]
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.fingerprints import weights_on_disk
from align.groups import Samples, group_samples
from align.sampling import Request, Sampling, decoded, draw, encoded, spread, without_end
from data.worlds import POLICY, Problem, answer_of, problems

BATCH = 128
ERRORS = {"none": 0.0, "medium": 0.3, "large": 1.0}
"""Sizes of the reward's error, in units of the difference between right and wrong."""


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


def paired(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """How much higher the first is, over the same problems; a 95 % interval of Student's t.

    Not ``mean_with_interval``: where differences happen to be all 0 or 1 it takes them for successes, and a single one
    in a hundred would be above zero for certain.
    """
    differences = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    n, value = len(differences), float(differences.mean())
    half = float(stdtrit(n - 1, 0.975) * differences.std(ddof=1) / n**0.5)
    return {"value": value, "low": value - half, "high": value + half, "n": n}
