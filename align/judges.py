"""Language models as judges: which of two answers is better, or how good one is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import xxhash

from align import judge_games, judge_prompts
from align.judge_asking import Asking
from align.judge_games import Judged, Meeting, Pair, Question, Shown
from align.judge_prompts import PLAIN, RUBRIC, SOFT, conversation, unmarked
from align.samples import Group, Sample
from align.scorers import SCORERS, Scored, column_of, without_thoughts
from objectives.checks import require
from objectives.rows import Text

OF_VLLM = ("revision", "engine_args", "start_timeout")
"""Keys of engine vllm alone."""
EXCLUDED = Scored(score=None, reason="cut off at its length limit")


@SCORERS.register("judge")
@dataclass(frozen=True, kw_only=True)
class Judge:
    """What another language model says of a response, asked through any endpoint that speaks OpenAI's protocol, or in a
    vLLM server that is started for it.

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
    """The judge, as the endpoint calls it; with engine vllm a Hub id or a folder. A model of another family than the
    policy's prefers it less."""
    engine: str = "server"
    """``server``: one that is running, at base_url. ``vllm``: one on this machine, started when the first question is
    asked and stopped afterwards."""
    base_url: str | None = None
    """With engine server: address of the endpoint up to /v1, e.g. http://localhost:8000/v1."""
    revision: str = "main"
    """With engine vllm: of a model on the Hub."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """With engine vllm: any further arguments of its server, e.g. {tensor_parallel_size: 2, max_model_len: 16384}."""
    start_timeout: float = 1800.0
    """With engine vllm: seconds until a server that is not ready is given up; a large model is read for minutes."""
    api_key_env: str | None = None
    """With engine server: name of the variable that holds the key; null sends none."""
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
    concurrency: int | None = None
    """Requests under way at a time. Default: 8, and 64 with engine vllm."""
    requests_per_minute: float | None = None
    """Most requests; null for no limit."""

    answers: ClassVar[bool] = False
    free: ClassVar[frozenset[str]] = frozenset(
        {"api_key_env", "attempts", "timeout", "concurrency", "requests_per_minute", "engine", *OF_VLLM}
    )
    """Of engine, revision and engine_args the fingerprint tells what scores depend on."""

    @classmethod
    def example(cls) -> Judge:
        """A model served on this machine."""
        return cls(model="judge", base_url="http://localhost:8000/v1")

    def __post_init__(self) -> None:
        require("model", self.model, bool(self.model.strip()), "a model's name")
        choices = {"engine": ("server", "vllm"), "mode": ("pairwise", "pointwise"), "scale": ("soft", "plain"),
                   "policy": ("mean", "strict"), "truncated": ("mark", "exclude")}  # fmt: skip
        for key, known in choices.items():
            require(key, getattr(self, key), getattr(self, key) in known, " or ".join(known))
        if self.engine == "vllm" and self.base_url is not None:
            raise ValueError("base_url names an endpoint, and engine vllm starts a server here: remove one of them")
        if self.engine == "server" and not str(self.base_url).startswith(("http://", "https://")):
            raise ValueError(
                f"base_url must be an address that begins with http:// or https://, got {self.base_url!r}; or set "
                "engine to vllm, which starts a server here"
            )
        _ = self._asking.served  # refuses arguments that are not the user's to set
        require("opponents", self.opponents, self.opponents is None or self.opponents >= 1, ">= 1, or null")
        require("temperature", self.temperature, 0 <= self.temperature < float("inf"), ">= 0 and finite")
        for key in ("max_tokens", "attempts"):
            require(key, getattr(self, key), getattr(self, key) >= 1, ">= 1")
        require("concurrency", self.concurrency, self.concurrency is None or self.concurrency >= 1, ">= 1, or null")
        require("retries", self.retries, self.retries >= 0, ">= 0")
        for key in ("timeout", "start_timeout"):
            require(key, getattr(self, key), 0 < getattr(self, key) < float("inf"), "> 0 and finite")
        rate = self.requests_per_minute
        require("requests_per_minute", rate, rate is None or 0 < rate < float("inf"), "> 0 and finite, or null")

    def idle(self) -> dict[str, str]:
        """Keys that have no effect beside the others."""
        own = ["api_key_env"] if self.engine == "vllm" else list(OF_VLLM)
        found = dict.fromkeys(own, f"engine is {self.engine}")
        if self.mode == "pointwise":
            return found | dict.fromkeys(("baseline", "opponents", "scale", "policy"), "mode is pointwise")
        if self.baseline is not None:
            found["opponents"] = "baseline is the only one"
        return found | ({"scale": "policy strict asks only who is better"} if self.policy == "strict" else {})

    def check(self) -> None:
        """Refuses what can't work, before anything is read or drawn.

        Raises:
            RunError: the variable with the key is not set; with engine vllm, vLLM or the model is not there.
        """
        self._asking.check()

    def fingerprint(self) -> str:
        """Hash of the instructions and, with engine vllm, of the model.

        Raises:
            RunError: as ``check``; or nobody tells what the model is.
        """
        self.check()
        model = self._asking.identity if self.engine == "vllm" else ""
        return xxhash.xxh3_64_hexdigest((judge_prompts.PAIRWISE + judge_prompts.POINTWISE + model).encode())

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
        judged = self._asking([each for of_pair in questions for each in of_pair])
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
        """Closes connections, and stops the server that was started."""
        self._asking.close()

    @cached_property
    def _asking(self) -> Asking:
        return Asking(self)

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
        judged = self._asking([question for question in asked if question is not None])
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
        judged = self._asking([each for of_group in questions for of_pair in of_group for each in of_pair])
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


def _baseline(value: Any) -> str:
    """A response in a column: text, or messages."""
    if isinstance(value, list | tuple):
        messages: Text = tuple(message for message in value if isinstance(message, Mapping))
        return conversation(messages[-1:])
    return "" if value is None else str(value)
