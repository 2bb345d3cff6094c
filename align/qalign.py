"""QAlign: samples from the aligned policy without training it, by a Markov chain over responses of the unaligned one.

    prompts ─► first draws ─► (keep a prefix, draw the rest anew, accept or repeat) × steps ─► Chain ─► vote or mbr

    target    π*(y|x) ∝ p(y|x)·exp(r(x, y)/β)
    proposal  keep the first i tokens of y, i uniform on {0, …, |y|−1}, and draw the rest from p(·|x, y_{<i})
    accept    with probability min(1, exp(clip((r(x, y′) − r(x, y))/β + log|y| − log|y′|, −20, 20)))

Probabilities of the model cancel, because the proposal is the model itself; what remains of the proposal is that i was
uniform, the ratio of lengths. |y| counts the stop token. A rejected proposal repeats the state before it, and that
repetition counts: votes among accepted proposals only would not be votes of π*.

The sampler must be plain, at one temperature throughout: no top-p, top-k, min-p or penalties, or p is another
distribution at every i. A response of ``t_max`` tokens without a stop token has stopped there; a continuation gets what
the prefix has left of ``t_max``, so that the length limit is the same for all i (ours: the authors' code gives it all
of the limit, which makes p another distribution for every i).

References:
    Faria and Smith 2025, arXiv:2504.03790; proposal of Faria et al. 2024 (QUEST), arXiv:2406.00049.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array  # pyright: ignore[reportMissingTypeStubs]

from align.groups import group_samples
from align.selection import Choice, Majority
from objectives.checks import require

Request = tuple[Sequence[int], Sequence[int], int]
"""Token ids of a prompt, those kept of its response, and how many may follow, ≥ 1."""
ContinueFrom = Callable[[list[Request]], list[list[int]]]
"""A sampler: for each request the tokens that follow, with the stop token if it stopped."""
Reward = Callable[[list[tuple[int, Sequence[int]]]], list[float]]
"""A reward: for each prompt's number and response one number, higher is better."""

SMALLEST_LOG = -20.0
"""Where log acceptance is clipped: no proposal is rejected for certain."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chain:
    """One chain: the state after each step, the first draw included."""

    prompt: int
    """Number of its prompt."""
    states: tuple[tuple[int, ...], ...]
    """steps + 1 responses, token ids; equal to the one before where the proposal was rejected."""
    rewards: tuple[float, ...]
    """Of the states, as the reward gave them."""
    accepts: tuple[bool, ...]
    """Whether each state was a proposal; the first draw always is."""
    tokens: int
    """Tokens that the model generated for it."""
    burn_in: int = 0
    """States at the beginning that do not count."""

    @property
    def acceptance_rate(self) -> float:
        """Share of the proposals that were accepted, the first draw aside."""
        return sum(self.accepts[1:]) / (len(self.accepts) - 1)

    @property
    def counted(self) -> tuple[tuple[int, ...], ...]:
        """The states after the burn-in: dependent samples, approximately of π*."""
        return self.states[self.burn_in :]


@dataclass(slots=True)
class _Walk:
    """A chain while it is made."""

    prompt: int
    draws: np.random.Generator
    states: list[tuple[int, ...]]
    rewards: list[float]
    accepts: list[bool]
    tokens: int


def qalign(
    continue_from: ContinueFrom,
    reward: Reward,
    prompts: Sequence[Sequence[int]],
    *,
    steps: int,
    beta: float,
    chains: int = 1,
    t_max: int = 800,
    seed: int = 0,
    burn_in: int = 0,
    reward_limit: float | None = 40.0,
) -> list[tuple[Chain, ...]]:
    """Runs ``chains`` Markov chains for each prompt, all of them side by side: one call of the sampler for each step.

    Args:
        continue_from: the model at one temperature; see above for what it must not do. It keeps its own seed.
        reward: r.
        prompts: token ids.
        steps: proposals of each chain, ≥ 1; the authors take 1024 to 4096. About half of a response is drawn anew
            in each.
        beta: β, in units of the reward, > 0. The smaller, the more reward and the fewer acceptances.
        chains: of each prompt, ≥ 1.
        t_max: longest response, in tokens.
        seed: of prefixes and acceptances, ≥ 0. A chain's do not depend on the other chains and prompts.
        burn_in: states at the beginning of each chain that do not count, in [0, steps].
        reward_limit: rewards beyond ± this count as it, > 0; None leaves them.
    Returns:
        For each prompt its chains.
    Raises:
        ValueError: a value is out of range; the sampler's or the reward's answers do not fit what they were asked;
            a first draw is empty; a reward is not a number.
    """
    require("steps", steps, steps >= 1, ">= 1")
    require("beta", beta, 0 < beta < math.inf, "> 0 and finite")
    require("chains", chains, chains >= 1, ">= 1")
    require("t_max", t_max, t_max >= 1, ">= 1")
    require("seed", seed, seed >= 0, ">= 0")
    require("burn_in", burn_in, 0 <= burn_in <= steps, f"in [0, {steps}], the number of steps")
    require("reward_limit", reward_limit, reward_limit is None or reward_limit > 0, "> 0, or None")
    limit = math.inf if reward_limit is None else reward_limit
    walks = _first_draws(continue_from, reward, prompts, chains, t_max, seed)
    for _ in range(steps):
        prefixes = [walk.states[-1][: walk.draws.integers(len(walk.states[-1]))] for walk in walks]
        proposed = _continued(continue_from, prompts, walks, prefixes, t_max)
        scores = iter(_scored(reward, [(w.prompt, y) for w, y in zip(walks, proposed, strict=True) if y]))
        for walk, proposal in zip(walks, proposed, strict=True):
            state, now = walk.states[-1], walk.rewards[-1]
            then, chance = now, 0.0
            if proposal:
                then = next(scores)
                chance = acceptance(_within(then, limit), _within(now, limit), beta, len(proposal), len(state))
            taken = walk.draws.random() < chance
            walk.states.append(proposal if taken else state)
            walk.rewards.append(then if taken else now)
            walk.accepts.append(taken)
    done = [
        Chain(
            prompt=walk.prompt,
            states=tuple(walk.states),
            rewards=tuple(walk.rewards),
            accepts=tuple(walk.accepts),
            tokens=walk.tokens,
            burn_in=burn_in,
        )
        for walk in walks
    ]
    return [tuple(done[start : start + chains]) for start in range(0, len(done), chains)]


def acceptance(proposed: float, now: float, beta: float, proposed_length: int, length: int) -> float:
    """Probability that a proposal is accepted.

        a = min(1, exp(clip((r′ − r)/β + log|y| − log|y′|, −20, 20)))

    Half a unit of reward less at β = 0.5 and equal lengths: exp(−1) = 0.367879. At the clip a state is left with
    probability 2·10⁻⁹ where π* would have it less: a chain cannot get stuck for ever, and the bias is of that size.

    Args:
        proposed: r′, reward of the proposal; finite.
        now: r, of the state; finite.
        beta: β, > 0.
        proposed_length: |y′|, tokens with the stop token, ≥ 1.
        length: |y|, likewise.
    """
    log = (proposed - now) / beta + math.log(length) - math.log(proposed_length)
    return math.exp(min(max(log, SMALLEST_LOG), 0.0))  # a bound of 20 above would be cut to 1 anyway


def _within(reward: float, limit: float) -> float:
    return max(-limit, min(reward, limit))


def _first_draws(
    continue_from: ContinueFrom,
    reward: Reward,
    prompts: Sequence[Sequence[int]],
    chains: int,
    t_max: int,
    seed: int,
) -> list[_Walk]:
    walks = [
        _Walk(prompt, np.random.default_rng([seed, prompt, chain]), [], [], [True], 0)
        for prompt in range(len(prompts))
        for chain in range(chains)
    ]
    for walk, state in zip(walks, _continued(continue_from, prompts, walks, [()] * len(walks), t_max), strict=True):
        if not state:
            raise ValueError(
                f"the sampler returned nothing for prompt {walk.prompt}; it must return the stop token where it stops"
            )
        walk.states.append(state)
    for walk, score in zip(walks, _scored(reward, [(w.prompt, w.states[0]) for w in walks]), strict=True):
        walk.rewards.append(score)
    return walks


def _continued(
    continue_from: ContinueFrom,
    prompts: Sequence[Sequence[int]],
    walks: Sequence[_Walk],
    prefixes: Sequence[tuple[int, ...]],
    t_max: int,
) -> list[tuple[int, ...]]:
    """Whole responses; empty where nothing followed the prefix, a move that has no way back."""
    asked: list[Request] = [
        (prompts[walk.prompt], prefix, t_max - len(prefix)) for walk, prefix in zip(walks, prefixes, strict=True)
    ]
    drawn = continue_from(asked) if asked else []
    if len(drawn) != len(asked):
        raise ValueError(f"the sampler was asked for {len(asked)} continuations and returned {len(drawn)}")
    whole: list[tuple[int, ...]] = []
    for walk, (_, prefix, most), tokens in zip(walks, asked, drawn, strict=True):
        if len(tokens) > most:
            raise ValueError(f"the sampler was asked for at most {most} tokens and returned {len(tokens)}")
        walk.tokens += len(tokens)
        whole.append((*prefix, *tokens) if len(tokens) else ())
    return whole


def _scored(reward: Reward, responses: list[tuple[int, Sequence[int]]]) -> list[float]:
    scores = list(reward(responses)) if responses else []
    if len(scores) != len(responses):
        raise ValueError(f"the reward was asked about {len(responses)} responses and returned {len(scores)} numbers")
    for (prompt, _), score in zip(responses, scores, strict=True):
        if not math.isfinite(score):
            raise ValueError(f"the reward of a response to prompt {prompt} is {score}; it must be a finite number")
    return [float(score) for score in scores]


# ---- one answer from many states ----


def vote(chains: Sequence[Chain], answer: Callable[[int, tuple[int, ...]], Hashable | None]) -> Choice:
    """Majority vote over the states that count; of equal numbers the answer seen first, chain after chain.

    Args:
        chains: of one prompt.
        answer: from a prompt's number and a response to the answer in canonical form; None where it has none. Asked
            once for each response that differs.
    Returns:
        The choice; its index is the state's among those counted of all chains, the one with the highest reward.
    """
    states = [(chain.prompt, state) for chain in chains for state in chain.counted]
    rewards = [reward for chain in chains for reward in chain.rewards[chain.burn_in :]]
    answers = {each: answer(*each) for each in dict.fromkeys(states)}
    return Majority()(group_samples([answers[each] for each in states], rewards))


def rouge1_f1(first: Sequence[int], second: Sequence[int]) -> float:
    """How much two token lists share, whatever the order.

        F1 = 2·|first ∩ second| / (|first| + |second|)

    of their multisets of token ids, in [0, 1]: ROUGE-1 on tokens. [1, 2, 3, 4] and [1, 2, 6, 7] have 0.5.
    """
    if not len(first) or not len(second):
        raise ValueError("an empty response shares nothing with any other; leave it out")
    shared = (Counter(first) & Counter(second)).total()
    return 2 * shared / (len(first) + len(second))


def minimum_bayes_risk(states: Sequence[Sequence[int]]) -> int:
    """The response most like all others: for answers in free text, where a vote has nothing to count.

        argmax_i mean_j F1(states_i, states_j)

    over all states j, i itself and repetitions included; of equal ones the lowest index. Pass the counted states of a
    prompt's chains.

    Args:
        states: one or more, none of them empty.
    """
    if not states:
        raise ValueError("there are no responses to choose among")
    if not all(map(len, states)):
        raise ValueError("an empty response shares nothing with any other; leave it out")
    times = Counter(tuple(state) for state in states)
    distinct = list(times)  # in the order in which they were first seen; a chain repeats itself, so far fewer
    repeats = np.array([times[state] for state in distinct])
    shared = _shared(distinct)
    lengths = np.array([len(state) for state in distinct])
    means = [
        # fsum: rows of the same numbers in another order have the same sum, so ties are ties.
        math.fsum(np.repeat(2 * shared[i] / (lengths[i] + lengths), repeats))
        for i in range(len(distinct))
    ]
    best = distinct[int(np.argmax(means))]
    return next(i for i, state in enumerate(states) if tuple(state) == best)


def _shared(responses: Sequence[Sequence[int]]) -> np.ndarray:
    """How many tokens each two responses share, as multisets; (response, response).

    The second 7 of a response is another thing than its first one: so counted, multisets are sets, and what they share
    is a product of matrices.
    """
    columns: dict[tuple[int, int], int] = {}
    rows, places = [], []
    for row, response in enumerate(responses):
        seen: Counter[int] = Counter()
        for token in response:
            seen[token] += 1
            rows.append(row)
            places.append(columns.setdefault((token, seen[token]), len(columns)))
    held = csr_array((np.ones(len(rows), dtype=np.int64), (rows, places)), shape=(len(responses), len(columns)))
    return (held @ held.T).toarray()
