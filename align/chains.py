"""QAlign as a way to answer: chains on a sampling engine, with scorers as the reward, and one answer at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from align import sample as sampling_command
from align.adapters import read_adapter, refuse_other_base
from align.answers import Answer, answered
from align.errors import RecipeError, RunError
from align.groups import Pick
from align.prompts import Prompt, read_prompts
from align.qalign import Chain, minimum_bayes_risk, qalign, vote
from align.qalign import Request as Prefix
from align.sample_settings import Job
from align.samplers import end_tokens
from align.samples import Group, Origin, Sample
from align.sampling import Drawn, Request, decoded, encoded, spread, without_end
from align.scores import SampleScore, Scoring
from align.selection import Choice
from align.typed import Entry
from objectives.checks import require
from objectives.reward_transforms import RewardTransform

Say = Callable[[str], None]
LIMIT = 40.0
"""Scores beyond ± this count as it, as in the authors' code."""
EVERY = 20.0
"""Seconds between two lines about progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QAlign:
    """Samples of the aligned policy without training it: a Markov chain over responses; see ``align.qalign``.

        π*(y|x) ∝ p(y|x)·exp(r(x, y)/β)

    One proposal of every chain is drawn in each step, about half of a response anew. Sampling must be plain: top_p 1,
    top_k 0, min_p 0, at one temperature.

    References:
        Faria and Smith 2025, arXiv:2504.03790.
    """

    steps: int = 128
    """Proposals of each chain, ≥ 1."""
    beta: float = 1.0
    """β, in units of the score, > 0. The smaller, the more it is worth."""
    chains: int = 1
    """Of each prompt, ≥ 1."""
    burn_in: int = 0
    """States at the beginning of a chain that do not count, in [0, steps]."""
    final: Literal["vote", "mbr"] = "vote"
    """vote: the answer that most states have. mbr: the response most like the others, where there are no answers."""

    def __post_init__(self) -> None:
        require("steps", self.steps, self.steps >= 1, ">= 1")
        require("beta", self.beta, 0 < self.beta < float("inf"), "> 0 and finite")
        require("chains", self.chains, self.chains >= 1, ">= 1")
        require("burn_in", self.burn_in, 0 <= self.burn_in <= self.steps, f"in [0, {self.steps}], the number of steps")


def run_chains(
    job: Job, how: QAlign, scorers: Sequence[Entry], transforms: Sequence[RewardTransform], say: Say
) -> Iterator[Answer]:
    """Answers of QAlign, one for each prompt, when all chains are done.

    Args:
        job: model, prompts, temperature, longest response, seed and engine; n has no say.
        how: the chains.
        scorers: whose combined score is the reward; the first that finds answers says what is voted on.
        transforms: none, because they compare the responses to a prompt.
        say: told how the chains went.
    Raises:
        RecipeError, DataError, RunError: one sentence on what is wrong and what to do.
    """
    sampling = job.sampling
    if (sampling.top_p, sampling.top_k, sampling.min_p) != (1.0, 0, 0.0) or sampling.temperature == 0 or sampling.stop:
        raise RecipeError(
            "strategy qalign needs plain sampling: top_p 1, top_k 0, min_p 0, no stop texts and a temperature above 0"
        )
    if transforms:
        raise RecipeError("reward_transforms compare responses to a prompt, and qalign looks at one; leave them out")
    if job.serving.data_parallel_size > 1:
        raise RecipeError("serving.data_parallel_size has no effect with strategy qalign, whose chains go side by side")
    if how.final == "vote" and not any(getattr(entry.built, "answers", False) for entry in scorers):
        raise RecipeError("strategy qalign with final vote needs a scorer that finds answers (math, regex, …); or mbr")
    run = _Run(job, scorers, say)
    try:
        yield from run.answers(how)
    finally:
        run.close()


class _Run:
    """Prompts, engine and scorers of one call."""

    def __init__(self, job: Job, scorers: Sequence[Entry], say: Say) -> None:
        from align import model as models

        self.job, self.say = job, say
        config = models.load_config(job.model.section)
        self.tokenizer: Any = models.load_tokenizer(job.model.section)
        self.scoring = Scoring(scorers)
        adapter = None
        if job.model.adapter_name_or_path is not None:
            adapter = read_adapter(job.model.adapter_name_or_path)
            refuse_other_base(adapter, job.model.model_name_or_path)
        self.ends = end_tokens(job.model.model_name_or_path, self.tokenizer)
        served = sampling_command.connected(job, self.tokenizer) if job.serving.chosen == "server" else None
        fingerprint = sampling_command.fingerprint_of(job, adapter, served)
        self.length = sampling_command.longest(job, models.context_length(config), served)
        self.prompts: list[Prompt] = []
        self.ids: list[list[int]] = []
        self.before: list[list[int]] = []
        self._encode()
        self.sampler: Any = served or sampling_command.started(job, self.tokenizer, adapter, self.length, say)
        self.origin = Origin(
            engine=self.sampler.engine,
            model=job.model.model_name_or_path,
            fingerprint=fingerprint,
            template="",
            sampling={},
        )
        self.asked = self.unscored = 0
        self.told = time.monotonic()
        self.known: dict[tuple[int, tuple[int, ...]], SampleScore] = {}

    def _encode(self) -> None:
        too_long = 0
        for prompt in read_prompts(self.job.data).found:
            text = prompt.text if self.job.goal is None else self.job.goal.condition(prompt.text)
            rendered, ids = encoded(text, self.tokenizer)
            if len(ids) + self.job.sampling.max_tokens > self.length:
                too_long += 1  # every chain needs the same limit, or its distribution would be another one
                continue
            self.prompts.append(prompt)
            self.ids.append(ids)
            self.before.append([] if rendered.chat else ids)
        if too_long:
            self.say(f"{too_long} prompts leave no room for max_tokens {self.job.sampling.max_tokens}: left out")
        if not self.prompts:
            raise RunError(
                f"no prompt leaves room for sampling.max_tokens {self.job.sampling.max_tokens} within {self.length} "
                "tokens; lower it, or shorten the prompts"
            )

    def close(self) -> None:
        """Ends engine and scorers."""
        self.sampler.close()
        self.scoring.__exit__()

    def answers(self, how: QAlign) -> Iterator[Answer]:
        """Runs the chains."""
        done = qalign(
            self.continue_from,
            self.reward,
            self.ids,
            steps=how.steps,
            beta=how.beta,
            chains=how.chains,
            t_max=self.job.sampling.max_tokens,
            seed=self.job.sampling.seed,
            burn_in=how.burn_in,
            reward_limit=LIMIT,
        )
        if self.unscored:
            self.say(f"{self.unscored} responses have no score: chains leave them as soon as they can")
        rates = [chain.acceptance_rate for chains in done for chain in chains]
        tokens = sum(chain.tokens for chains in done for chain in chains)
        self.say(
            f"{len(rates)} chains of {how.steps} steps, {tokens} tokens; "
            f"{sum(rates) / len(rates):.0%} of the proposals accepted"
        )
        for number, chains in enumerate(done):
            yield self._answer(number, chains, how)

    def continue_from(self, asked: list[Prefix]) -> list[list[int]]:
        """One continuation for each prefix."""
        requests = []
        for number, (prompt, kept, most) in enumerate(asked):
            self.asked += 1
            seed = spread(self.job.sampling.seed, self.asked)
            requests.append(Request(number=number, prompt=(*prompt, *kept), n=1, max_tokens=most, seed=seed))
        if time.monotonic() - self.told >= EVERY:
            self.told = time.monotonic()
            self.say(f"{self.asked // len(asked) - 1} steps of every chain are done")
        found: dict[int, list[Drawn]] = dict(self.sampler.draw(requests, self.job.sampling))
        return [list(found[number][0].token_ids) for number in range(len(asked))]

    def reward(self, responses: list[tuple[int, Sequence[int]]]) -> list[float]:
        """The combined score of each response; equal ones are scored once."""
        keys = [(number, tuple(ids)) for number, ids in responses]
        new = [key for key in dict.fromkeys(keys) if key not in self.known]
        for key, (score,) in zip(new, self.scoring([self._group(*key) for key in new]), strict=True):
            self.known[key] = score
            self.unscored += score.score is None
        return [self._reward(key) for key in keys]

    def _reward(self, key: tuple[int, tuple[int, ...]]) -> float:
        """The score; the lowest that a chain can have where there is none, so that such states are left at once."""
        score = self.known[key].score
        return -LIMIT if score is None else score

    def _group(self, number: int, ids: tuple[int, ...]) -> Group:
        prompt = self.prompts[number]
        drawn = Drawn(token_ids=ids, logprob=None, finish_reason="stop" if ids[-1] in self.ends else "length")
        sample = Sample(
            prompt_id=prompt.id,
            index=0,
            row=prompt.row,
            prompt=prompt.text,
            text=decoded(self.tokenizer, without_end(drawn, self.ends), self.before[number]),
            token_ids=ids,
            logprob=None,
            finish_reason=drawn.finish_reason,
            seed=0,
            origin=self.origin,
            columns=prompt.columns,
        )
        return Group(samples=(sample,))

    def _answer(self, number: int, chains: Sequence[Chain], how: QAlign) -> Answer:
        states = [state for chain in chains for state in chain.counted]
        if how.final == "vote":
            choice = vote(chains, lambda prompt, state: self.known[prompt, state].answer)
        else:
            best = minimum_bayes_risk(states)
            reward = self._reward((number, states[best]))
            pick = Pick(answer=None, index=best, count=states.count(states[best]), mean_reward=reward)
            choice = Choice(picks=(pick,), n_survivors=len(set(states)))
        samples = tuple(sample for state in states for sample in self._group(number, state).samples)
        return answered(Group(samples=samples), choice, range(len(states)), texts=how.final == "mbr")
