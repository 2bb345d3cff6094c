"""Language models as judges: which of two answers is better, or how good one is."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import xxhash

from align import judge_games, judge_prompts
from align.completions import Endpoint, RefusedError, StoppedError
from align.errors import RunError
from align.judge_games import Judged, Meeting, Pair, Question, Shown
from align.judge_prompts import PLAIN, RUBRIC, SOFT, conversation, rating_of, unmarked, verdict_of
from align.reply_cache import ReplyCache
from align.samples import Group, Sample
from align.scorers import SCORERS, Scored, column_of, without_thoughts
from data.store import cache_dir
from objectives.checks import require
from objectives.rows import Text

T = TypeVar("T")

BUMP = 0.5
"""How much warmer the judge is each time it gave no verdict."""
REFUSED = "the judge's endpoint refuses the question"
NO_VERDICT = "the judge gave no verdict"
EXCLUDED = Scored(score=None, reason="cut off at its length limit")


@SCORERS.register("judge")
@dataclass(frozen=True, kw_only=True)
class Judge:
    """What another language model says of a response, asked through any endpoint that speaks OpenAI's protocol.

        pairwise:  score = mean over opponents of (first shown + second shown)/2,    each in [0, 1]
        pointwise: score = rating, 1 to 10

    A pair is judged in both orders; where a verdict is missing in one of them, the pair has none. Equal answers tie
    without a question. The judge sees what was said after thinking, never whose answer it is, and is told of answers
    that were cut off. Its last verdict counts; where there is none it is asked again, warmer, and then there is no
    score. Replies are kept in the cache folder: the same question is not asked twice.

    References:
        Zheng et al. 2023 (judges, and their bias towards the first answer), arXiv:2306.05685; verdicts as in Arena-Hard
        (Li et al. 2024), arXiv:2406.11939.
    """

    model: str
    """The judge, as the endpoint calls it. A model of another family than the policy's prefers it less."""
    base_url: str
    """Address of the endpoint up to /v1, e.g. http://localhost:8000/v1."""
    api_key_env: str | None = None
    """Name of the variable that holds the key; null sends none."""
    mode: str = "pairwise"
    """``pairwise`` or ``pointwise``."""
    baseline: str | None = None
    """Column with the response to compare with; null compares the samples of a prompt with each other."""
    opponents: int | None = None
    """Compare each sample with this many after it (and so with as many before it), which costs 2 × opponents questions
    a sample; null is with every other."""
    scale: str = "soft"
    """What verdicts are worth: ``soft``: 1, 0.75, 0.5, 0.25 and 0 for much better to much worse; ``plain``: 1, 1, 0.5,
    0 and 0."""
    policy: str = "mean"
    """What two orders are worth: ``mean``, or ``strict``: 1 if both favour the sample, 0 if neither, else 0.5."""
    rubric: str = RUBRIC
    """What makes an answer good."""
    reference: str | None = None
    """Column with a right answer that the judge is shown; null shows none."""
    truncated: str = "mark"
    """Responses that ended at their length limit: ``mark`` tells the judge, ``exclude`` gives them no score."""
    temperature: float = 0.0
    """≥ 0."""
    max_tokens: int = 1024
    """Longest reply, reasons included."""
    extra_body: dict[str, Any] = field(default_factory=dict)
    """What else a request holds, e.g. {seed: 0}, or what switches a model's thinking off."""
    retries: int = 2
    """How often the judge is asked again where its reply holds no verdict."""
    attempts: int = 6
    """How often a request is sent, at most, to an endpoint that is busy, failing or away."""
    timeout: float = 120.0
    """Seconds until a request is given up."""
    concurrency: int = 8
    """Requests under way at a time."""
    requests_per_minute: float | None = None
    """Most requests; null for no limit."""

    answers: ClassVar[bool] = False
    free: ClassVar[frozenset[str]] = frozenset(
        {"api_key_env", "attempts", "timeout", "concurrency", "requests_per_minute"}
    )

    @classmethod
    def example(cls) -> Judge:
        """A model served on this machine."""
        return cls(model="judge", base_url="http://localhost:8000/v1")

    def __post_init__(self) -> None:
        require("model", self.model, bool(self.model.strip()), "a model's name")
        holds = self.base_url.startswith(("http://", "https://"))
        require("base_url", self.base_url, holds, "an address that begins with http:// or https://")
        choices = {"mode": ("pairwise", "pointwise"), "scale": ("soft", "plain"), "policy": ("mean", "strict"),
                   "truncated": ("mark", "exclude")}  # fmt: skip
        for key, known in choices.items():
            require(key, getattr(self, key), getattr(self, key) in known, " or ".join(known))
        require("opponents", self.opponents, self.opponents is None or self.opponents >= 1, ">= 1, or null")
        require("temperature", self.temperature, 0 <= self.temperature < float("inf"), ">= 0 and finite")
        for key in ("max_tokens", "attempts", "concurrency"):
            require(key, getattr(self, key), getattr(self, key) >= 1, ">= 1")
        require("retries", self.retries, self.retries >= 0, ">= 0")
        require("timeout", self.timeout, 0 < self.timeout < float("inf"), "> 0 and finite")
        rate = self.requests_per_minute
        require("requests_per_minute", rate, rate is None or 0 < rate < float("inf"), "> 0 and finite, or null")

    def idle(self) -> dict[str, str]:
        """Keys that have no effect beside the others."""
        if self.mode == "pointwise":
            return dict.fromkeys(("baseline", "opponents", "scale", "policy"), "mode is pointwise")
        found = {} if self.baseline is None else {"opponents": "baseline is the only one"}
        return found | ({"scale": "policy strict asks only who is better"} if self.policy == "strict" else {})

    def fingerprint(self) -> str:
        """Hash of the instructions.

        Raises:
            RunError: the variable with the key is not set.
        """
        self._key()
        return xxhash.xxh3_64_hexdigest((judge_prompts.PAIRWISE + judge_prompts.POINTWISE).encode())

    def __call__(self, groups: Sequence[Group]) -> list[Scored]:
        """Scores: in [0, 1] of pairs, in [1, 10] of ratings; None where the judge gave no verdict.

        Raises:
            RunError: the endpoint does not answer, or refuses every question.
        """
        score = self._rated if self.mode == "pointwise" else self._compared
        return score([(group, [self._shown(sample) for sample in group.samples]) for group in groups])

    def meet(self, pairs: Sequence[tuple[Sample, Sample]], *, both: bool = True) -> list[Meeting]:
        """What is said of pairs of answers to the same prompt, whoever gave them; of mode ``pairwise``.

        Args:
            pairs: two answers each.
            both: show them in both orders; else only the first answer as A.
        Raises:
            RunError: the endpoint does not answer, or refuses every question.
        """
        worth = self._worth
        shown = [(self._shown(first), self._shown(second)) for first, second in pairs]
        met = [None if one is None or two is None else Pair(0, 1, (one, two)) for one, two in shown]
        questions = [
            []
            if pair is None
            else [self._question(Group(samples=two), *order) for order in pair.orders[: 2 if both else 1]]
            for two, pair in zip(pairs, met, strict=True)
        ]
        judged = self._answers([each for of_pair in questions for each in of_pair])
        return [
            Meeting(None, (), EXCLUDED.reason)
            if pair is None
            else judge_games.meeting(pair, [judged[each] for each in asked], worth, self.policy)
            for pair, asked in zip(met, questions, strict=True)
        ]

    def rates(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Shares that tell how far the judge can be trusted, from the sum of all samples' counts."""

        return judge_games.rates(counts)

    def close(self) -> None:
        """Closes connections."""
        if (endpoint := vars(self).pop("_endpoint", None)) is not None:
            endpoint.close()
        vars(self).pop("_cache", None)

    # ---- what is asked ----

    def _shown(self, sample: Sample) -> Shown | None:
        """None for what is excluded."""
        cut_off = sample.finish_reason == "length"
        if cut_off and self.truncated == "exclude":
            return None
        return Shown(unmarked(without_thoughts(sample.text)), cut_off)

    def _question(self, group: Group, *answers: Shown) -> Question:
        reference = None if self.reference is None else column_of(group.samples[0], self.reference)
        return Question(conversation(group.prompt), None if reference is None else str(reference), answers)

    def _rated(self, work: Sequence[tuple[Group, list[Shown | None]]]) -> list[Scored]:
        asked = [None if shown is None else self._question(group, shown) for group, listed in work for shown in listed]
        judged = self._answers([question for question in asked if question is not None])
        return [
            Scored(score=judged[each].said, reason=judged[each].reason, counts=judge_games.rated(judged[each]))
            if each is not None
            else EXCLUDED
            for each in asked
        ]

    def _compared(self, work: Sequence[tuple[Group, list[Shown | None]]]) -> list[Scored]:
        pairs = [self._pairs(group, listed) for group, listed in work]
        questions = [
            [[self._question(group, *order) for order in pair.orders] for pair in met]
            for (group, _), met in zip(work, pairs, strict=True)
        ]
        judged = self._answers([each for of_group in questions for of_pair in of_group for each in of_pair])
        found: list[Scored] = []
        for (_, listed), met, of_group in zip(work, pairs, questions, strict=True):
            games = [[judged[each] for each in of_pair] for of_pair in of_group]
            found += self._of_group(listed, met, games)
        return found

    def _pairs(self, group: Group, listed: Sequence[Shown | None]) -> list[Pair]:
        if self.baseline is None:
            return judge_games.round_robin(listed, self.opponents)
        value = column_of(group.samples[0], self.baseline)
        against = Shown(unmarked(_baseline(value)), False)
        return [
            Pair(i, None, (shown, against)) for i, shown in enumerate(listed) if shown is not None and value is not None
        ]

    def _of_group(
        self, listed: Sequence[Shown | None], pairs: Sequence[Pair], games: Sequence[Sequence[Judged]]
    ) -> list[Scored]:
        """The mean over a sample's pairs. What is counted of a pair stands with the first of the two."""
        worth = self._worth
        values: list[list[float]] = [[] for _ in listed]
        counts: list[Counter[str]] = [Counter() for _ in listed]
        reasons = ["no other sample to compare with" if self.baseline is None else "no baseline"] * len(listed)
        for pair, of_pair in zip(pairs, games, strict=True):
            value, counted, reason = judge_games.outcome(pair, of_pair, worth, self.policy)
            counts[pair.first].update(counted)  # type: ignore[arg-type]  # halves are counted too
            for place in (pair.first, pair.second):
                if place is not None:
                    reasons[place] = reason
                    if value is not None:
                        values[place].append(value if place == pair.first else 1 - value)
        return [
            EXCLUDED
            if shown is None
            else Scored(score=sum(found) / len(found), counts=counted)
            if found
            else Scored(score=None, reason=reason, counts=counted)
            for shown, found, counted, reason in zip(listed, values, counts, reasons, strict=True)
        ]

    @property
    def _worth(self) -> Mapping[str, float]:
        return PLAIN if self.policy == "strict" or self.scale == "plain" else SOFT

    # ---- asking ----

    def _answers(self, questions: Sequence[Question]) -> dict[Question, Judged]:
        different = list(dict.fromkeys(questions))
        found = dict(zip(different, self._at_once(self._asked, different), strict=True))
        refused = [judged.reason for judged in found.values() if judged.reason.startswith(REFUSED)]
        if refused and len(refused) == len(found) and not self._cache.answered:
            raise RunError(f"judge: {self._endpoint.url}: {refused[0]}; check model, max_tokens and extra_body")
        return found

    def _asked(self, question: Question) -> Judged:
        """Asks until there is a verdict, warmer each time."""
        parse = verdict_of if len(question.answers) == 2 else rating_of
        for again in range(self.retries + 1):
            body = self._body(question, again)
            key = ReplyCache.key({"url": self.base_url.rstrip("/"), "again": again, **body})
            if (reply := self._cache.get(key)) is None:
                try:
                    reply = self._endpoint.ask(body)
                except RefusedError as error:
                    return Judged(None, again, f"{REFUSED}: {error}")
                self._cache.put(key, reply)
            if (said := parse(reply.text)) is not None:
                return Judged(said, again)
        return Judged(None, self.retries + 1, NO_VERDICT)

    def _body(self, question: Question, again: int) -> dict[str, Any]:
        how: dict[str, Any] = {"rubric": self.rubric, "reference": question.reference}
        texts = [shown.text for shown in question.answers]
        cut_off = [shown.cut_off for shown in question.answers]
        if len(texts) == 2:
            messages = judge_prompts.pairwise(question.prompt, *texts, cut_off=cut_off, **how)
        else:
            messages = judge_prompts.pointwise(question.prompt, *texts, cut_off=cut_off[0], **how)
        return {
            "model": self.model,
            "messages": messages,
            "temperature": self.temperature + BUMP * again,
            "max_tokens": self.max_tokens,
            **self.extra_body,
        }

    def _at_once(self, function: Callable[[Question], T], questions: Sequence[Question]) -> list[T]:
        """Results in order; the first fault stops the others, after what is under way."""
        endpoint = self._endpoint
        endpoint.stop.clear()

        def guarded(question: Question) -> T:
            if endpoint.stop.is_set():
                raise StoppedError
            try:
                return function(question)
            except BaseException:
                endpoint.stop.set()
                raise

        with ThreadPoolExecutor(self.concurrency) as threads:
            futures = [threads.submit(guarded, question) for question in questions]
        faults = [error for future in futures if (error := future.exception()) is not None]
        for error in sorted(faults, key=lambda error: isinstance(error, StoppedError)):
            raise error
        return [future.result() for future in futures]

    def _key(self) -> str:
        if self.api_key_env is None:
            return ""
        if not (key := os.environ.get(self.api_key_env, "").strip()):
            raise RunError(
                f"judge: the variable {self.api_key_env} is not set; export it with the endpoint's key, or set "
                "api_key_env to null"
            )
        return key

    @cached_property
    def _endpoint(self) -> Endpoint:
        return Endpoint(
            self.base_url,
            key=self._key(),
            key_name=self.api_key_env or "",
            timeout=self.timeout,
            attempts=self.attempts,
            per_minute=self.requests_per_minute,
        )

    @cached_property
    def _cache(self) -> ReplyCache:
        name = xxhash.xxh3_64_hexdigest(f"{self.base_url.rstrip('/')} {self.model}".encode())
        return ReplyCache(cache_dir() / "judge" / f"{name}.jsonl")


def _baseline(value: Any) -> str:
    """A response in a column: text, or messages."""
    if isinstance(value, list | tuple):
        messages: Text = tuple(message for message in value if isinstance(message, Mapping))
        return conversation(messages[-1:])
    return "" if value is None else str(value)
