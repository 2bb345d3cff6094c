"""How often does ``evals compare`` claim a difference where there is none? Measured, through its own functions.

python -m launch.bench.false_claims        some minutes on one core; docs/intervals.md has its table

Two or three runs that are equally good answer the same prompts, which are easy or hard for all of them; every pair of
runs is compared, and p-values are corrected by Holm. A family is false where any claim is made.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import numpy as np

from evals.compare import Run, compare
from evals.ranking import share_of
from evals.results import Result
from evals.scores import Scores
from objectives.stats import wilson

FAMILIES, RUNS, SEED, LEVEL = 2000, 3, 11, 0.05
PROMPTS = (30, 100, 300)
WHERE = {"metric": "win_rate/raw", "dataset": "simulated", "split": "test", "step": 0}
Draw = Callable[[int, np.random.Generator], np.ndarray]


def right_or_wrong(prompts: int, rng: np.random.Generator) -> np.ndarray:
    """One answer per prompt, right or wrong; shape (run, prompt)."""
    return (rng.random((RUNS, prompts)) < rng.beta(1, 1, prompts)).astype(np.float64)


def four_answers(prompts: int, rng: np.random.Generator) -> np.ndarray:
    """Share of right ones among four."""
    return rng.binomial(4, rng.beta(1, 1, prompts), (RUNS, prompts)) / 4


def judged(prompts: int, rng: np.random.Generator) -> np.ndarray:
    """0, ½ or 1, a fifth of them ties."""
    won = right_or_wrong(prompts, rng)
    return np.where(rng.random(won.shape) < 0.2, 0.5, won)


KINDS: dict[str, Draw] = {
    "right or wrong, one answer": right_or_wrong,
    "right or wrong, four answers": four_answers,
    "0, ½ or 1 from a judge": judged,
}


def runs_of(scores: np.ndarray, *, paired: bool) -> list[Run]:
    """Runs as they would be read from ``results.json`` and ``scores.jsonl``.

    Args:
        scores: shape (run, prompt).
        paired: whether the score of every prompt was kept.
    """
    names = [f"p{i}" for i in range(scores.shape[1])]
    key = WHERE["metric"], WHERE["dataset"], WHERE["split"]
    found: list[Run] = []
    for number, own in enumerate(scores):
        result = Result.of(share_of(own, names), **WHERE)
        kept = {key: Scores(**WHERE, by_prompt=dict(zip(names, own.tolist(), strict=True)))} if paired else {}
        found.append(Run(name=f"run{number}", facts={}, results={key: result}, scores=kept))
    return found


def false_families(
    draw: Draw, prompts: int, *, runs: int = RUNS, paired: bool = True, families: int = FAMILIES, seed: int = SEED
) -> int:
    """Families in which any claim was made.

    Args:
        draw: scores of runs that are equally good.
        prompts: of every run.
        runs: that are compared, up to ``RUNS``.
        paired: whether runs have ``scores.jsonl``.
        families: simulated.
        seed: of the simulation.
    """
    rng = np.random.default_rng((seed, prompts, paired))
    false = 0
    for _ in range(families):
        found = compare(runs_of(draw(prompts, rng)[:runs], paired=paired), level=LEVEL)
        false += any(each.better is not None for each in found.pairs)
    return false


CASES = [(name, runs, paired) for name in KINDS for runs, paired in ((2, True), (RUNS, True), (RUNS, False))]


def line(name: str, runs: int, paired: bool, families: int = FAMILIES) -> str:
    """One line of the table."""
    test = ("McNemar" if KINDS[name] is right_or_wrong else "sign flips") if paired else "without scores.jsonl"
    cells: list[str] = []
    for prompts in PROMPTS:
        false = false_families(KINDS[name], prompts, runs=runs, paired=paired, families=families)
        low, high = wilson(false, families)
        cells.append(f"{100 * false / families:.1f} ({100 * low:.1f}–{100 * high:.1f})")
    return f"| {name} | {runs} | {test} | {' | '.join(cells)} |"


def table(families: int = FAMILIES) -> Iterator[str]:
    """Lines of the table: share of families with a false claim, and its 95 % interval, in percent."""
    yield f"| scores of a prompt | runs | test | {' | '.join(str(n) for n in PROMPTS)} |"
    yield "|---|---|---|" + "---|" * len(PROMPTS)
    for case in CASES:
        yield line(*case, families=families)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", type=int, default=FAMILIES)
    for each in table(parser.parse_args().families):
        print(each, flush=True)


if __name__ == "__main__":
    main()
