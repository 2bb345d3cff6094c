"""QAlign against selection at equal numbers of generated tokens, on the embedded world."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from align.groups import Samples, group_samples
from align.qalign import Chain, qalign
from align.qalign import Request as Prefix
from align.sampling import Request, Sampling, decoded, draw, spread
from align.selection import BestOfMajority, BestOfN, Majority, Selection, WeightedMajority
from align.selection_curves import selection_curve
from data.worlds import POLICY, Problem, answer_of
from launch.bench.selection_parts import ALPHA, since_peak
from launch.bench.selection_samples import (
    BATCH,
    ERRORS,
    Drawn,
    Numbers,
    grouped,
    load,
    noisy_reward,
    of_the_start,
    paired,
    prompt_of,
)
from objectives.stats import mean_with_interval

BUDGETS = (32, 64, 128, 256, 512, 768, 1024, 2048)
"""Generated tokens of a problem."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a chain is after."""

    error: str
    beta: float


@dataclass
class Walking:
    """The policy as chains ask for it; all chains go on together, whatever their setting."""

    asked: Sequence[Problem]
    settings: Sequence[Setting]
    max_tokens: int
    lengths: list[list[int]] = field(default_factory=list)
    """Generated tokens, by step and chain."""
    requests: int = 0

    def __post_init__(self) -> None:
        self.model, self.tokenizer = load(POLICY)
        self.ends = {self.tokenizer.eos_token_id}

    def problem(self, chain: int) -> Problem:
        """A chain's problem."""
        return self.asked[chain % len(self.asked)]

    def setting(self, chain: int) -> Setting:
        """A chain's setting."""
        return self.settings[chain // len(self.asked)]

    def answer(self, state: Sequence[int]) -> int | None:
        """What a state answers."""
        ids = [token for token in state if token not in self.ends]
        return answer_of(decoded(self.tokenizer, ids, []))

    def continue_from(self, prefixes: list[Prefix]) -> list[list[int]]:
        """One continuation of each prefix.

        All are drawn with the same limit, so that they can be computed together, and then cut to what the prefix has
        left: a draw that is cut at a limit is a draw with that limit.
        """
        how = Sampling(max_tokens=self.max_tokens)
        asked = []
        for number, (prompt, kept, _) in enumerate(prefixes):
            self.requests += 1
            seed = spread(23, self.requests)
            whole = (*prompt, *kept)
            asked.append(Request(number=number, prompt=whole, n=1, max_tokens=self.max_tokens, seed=seed))
        pad = self.tokenizer.eos_token_id
        found = dict(draw(self.model, asked, how, ends=self.ends, pad=pad, tokenizer=self.tokenizer, batch=BATCH))
        cut = [list(found[number][0].token_ids[:most]) for number, (_, _, most) in enumerate(prefixes)]
        self.lengths.append([len(each) for each in cut])
        if len(self.lengths) % 16 == 1:
            print(f"  step {len(self.lengths) - 1}", file=sys.stderr, flush=True)
        return cut

    def reward(self, states: list[tuple[int, Sequence[int]]]) -> list[float]:
        """r/β: β of each chain is its own."""
        return [
            noisy_reward(self.problem(chain), self.answer(state), ERRORS[(how := self.setting(chain)).error]) / how.beta
            for chain, state in states
        ]


def chains(numbers: Numbers, folder: Path) -> dict[str, Any]:
    """Accuracy by generated tokens of QAlign's vote and of selections, under the same rewards."""
    problems, samples = of_the_start(numbers, folder)
    asked, drawn = problems[: numbers.chain_problems], samples[: numbers.chain_problems]
    settings = [Setting(error=error, beta=beta) for error in ERRORS for beta in numbers.betas]
    walking = Walking(asked, settings, numbers.max_tokens)
    prompts = [prompt_of(problem, walking.tokenizer) for problem in asked] * len(settings)
    done = qalign(
        walking.continue_from,
        walking.reward,
        prompts,
        steps=numbers.steps,
        beta=1.0,  # in the reward
        t_max=numbers.max_tokens,
        seed=29,
        reward_limit=None,
    )
    spent = np.cumsum(walking.lengths, axis=0).T  # (chain, step)
    budgets = [each for each in BUDGETS if each <= spent[:, -1].min()] or [int(spent[:, -1].min())]
    errors: dict[str, Any] = {}
    for error, size in ERRORS.items():
        reached = _selected(asked, drawn, size, budgets, numbers.betas)
        rates = {}
        for number, setting in enumerate(settings):
            if setting.error == error:
                here = range(number * len(asked), (number + 1) * len(asked))
                name = f"qalign, β {setting.beta:g}"
                reached[name] = np.array([_voted(walking, done[i][0], spent[i], budgets) for i in here])
                rates[name] = float(np.mean([done[i][0].acceptance_rate for i in here]))
        errors[error] = {
            "size": size,
            "by_tokens": {name: _points(values) for name, values in reached.items()},
            "accepted": rates,
            "since_peak": {name: since_peak(values, budgets) for name, values in reached.items()},
            "against": {
                name: {other: paired(reached[name][:, -1], reached[other][:, -1]) for other in reached if other != name}
                for name in rates
            },
        }
    return {
        "problems": len(asked),
        "steps": numbers.steps,
        "betas": list(numbers.betas),
        "alpha": ALPHA,
        "budgets": budgets,
        "samples_at_most": max(_affordable(one, budgets[-1]) for one in drawn),
        "states_at_most": int((spent <= budgets[-1]).sum(axis=1).max()),
        "errors": errors,
    }


def _points(values: np.ndarray) -> list[dict[str, Any]]:
    return [asdict(mean_with_interval(column.tolist(), range(len(column)))) for column in values.T]


def _voted(walking: Walking, chain: Chain, spent: np.ndarray, budgets: Sequence[int]) -> list[float]:
    """Whether the vote of the states that a budget pays for is right; the first state is always there."""
    answers = {state: walking.answer(state) for state in dict.fromkeys(chain.states)}
    right = walking.problem(chain.prompt).answer
    hits = []
    for budget in budgets:
        states = chain.states[: max(1, int((spent <= budget).sum()))]
        picks = Majority()(group_samples([answers[state] for state in states], [0.0] * len(states))).picks
        hits.append(float(bool(picks) and picks[0].answer == right))
    return hits


# ---- selection ----


def _selected(
    asked: Sequence[Problem], drawn: Sequence[Drawn], size: float, budgets: Sequence[int], betas: Sequence[float]
) -> dict[str, np.ndarray]:
    """Of each strategy, expected accuracy by problem and budget."""
    groups, right = grouped(asked, drawn, size)
    rules: Mapping[str, Selection] = {
        "best_of_n": BestOfN(),
        "majority": Majority(),
        **{f"weighted_majority, β {beta:g}": WeightedMajority(beta=beta) for beta in betas},
        "best_of_majority": BestOfMajority(alpha=ALPHA),
    }
    return {
        name: np.array(
            [_bought(rule, *each, budgets) for each in zip(groups, right, drawn, strict=True)],
        )
        for name, rule in rules.items()
    }


def _bought(
    rule: Selection, samples: Samples, right: Sequence[bool], drawn: Drawn, budgets: Sequence[int]
) -> list[float]:
    sizes = [_affordable(drawn, budget) for budget in budgets]
    different = sorted(set(sizes))
    values = selection_curve(rule, [samples], [right], different).per_prompt[0]
    return [float(values[different.index(size)]) for size in sizes]


def _affordable(drawn: Drawn, budget: int) -> int:
    """Samples that a budget pays for on average, one at least."""
    return min(max(1, int(budget / np.mean(drawn.lengths))), len(drawn.lengths))
