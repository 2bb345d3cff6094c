"""Reward transforms: what a prompt's scored responses are worth, before a rule makes pairs of them.

    Answers (responses × rewards) ─► transform ─► … ─► transform ─► sum over rewards: one score per response

Each maps all answers to one prompt to the same answers with other scores, and never edits what it was given. They run
in the order listed. A response may have several rewards (helpful, harmless); what they add up to is its score.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from objectives.checks import require
from objectives.registry import REWARD_TRANSFORMS
from objectives.rows import Row, Text

Embed = Callable[[list[str]], np.ndarray]
"""Maps texts to their vectors, (text, hidden)."""


def _no_encoders() -> Mapping[str, Embed]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """All scored responses to one prompt."""

    prompt: str
    responses: Sequence[str]
    scores: Float[np.ndarray, "response reward"]
    names: tuple[str, ...] = ("score",)
    """Of the rewards."""
    gold: str | None = None
    """A response known to be right, where there is one."""
    mean_logps: Float[np.ndarray, " response"] | None = None
    """Mean log-prob of each response's tokens under the policy that drew them, nats; None where one has none."""
    encoders: Mapping[str, Embed] = field(default_factory=_no_encoders)
    """Sentence encoders by the name that a transform asks for."""

    def total(self) -> Float[np.ndarray, " response"]:
        """Each response's score: the sum of its rewards."""
        return self.scores.sum(axis=1)


@runtime_checkable
class RewardTransform(Protocol):
    """A frozen dataclass whose fields are its recipe keys and whose call is its formula.

    One that takes nothing from the scores it is given says ``replaces = True``. One that reads vectors of texts has a
    field ``encoder`` and a method ``reads(answers)``, which lists those texts.
    """

    replaces: ClassVar[bool]

    def __call__(self, answers: Answers) -> Answers: ...


@REWARD_TRANSFORMS.register("log_sigmoid_centered")
@dataclass(frozen=True, slots=True, kw_only=True)
class LogSigmoidCentered:
    """Log-probability of being good enough: rewards far above good enough are worth no more, those below cost.

        u_j = log σ(r_j − r_ref,j),    score = Σ_j u_j

    for the rewards j of a response, each on the log-odds scale of a Bradley-Terry reward model; in (−∞, 0]. At r_ref it
    is −log 2. The sum is the log-probability of being good in **all** respects (a logical AND, if independent): a
    response that fails in one is not saved by excelling in another.

    r_ref is what is good enough **for this prompt**: a quantile of the prompt's own scores, or a fixed value. It is
    never taken over a batch, because rewards of different prompts are not comparable. UNVERIFIED: the choice of r_ref;
    the authors take a quantile of samples of the base policy, and for harmlessness the reward of a canned refusal.
    With a single reward the order of a prompt's responses stays as it was.

    References:
        Wang et al. 2024, arXiv:2402.00742.
    """

    quantile: float = 0.85
    """r_ref is this quantile of the prompt's scores, reward by reward, in [0, 1]."""
    value: float | dict[str, float] | None = None
    """r_ref itself instead: one number for every reward, or one for each by name, {helpful: 1.0, harmless: 0.5}."""

    replaces: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require("quantile", self.quantile, 0 <= self.quantile <= 1, "in [0, 1]")
        given = self.value.values() if isinstance(self.value, dict) else [] if self.value is None else [self.value]
        holds = self.value != {} and all(math.isfinite(number) for number in given)
        require("value", self.value, holds, "a finite number, or one for each reward by name")

    def idle(self) -> dict[str, str]:
        return {} if self.value is None else {"quantile": "value says what is good enough"}

    def __call__(self, answers: Answers) -> Answers:
        return replace(answers, scores=-np.logaddexp(0.0, self._reference(answers) - answers.scores))

    def _reference(self, answers: Answers) -> Float[np.ndarray, " reward"]:
        if self.value is None:
            return np.quantile(answers.scores, self.quantile, axis=0)
        if not isinstance(self.value, dict):
            return np.full(len(answers.names), self.value)
        if set(self.value) != set(answers.names):
            raise ValueError(
                f"log_sigmoid_centered has a value of {', '.join(self.value)}, and the rewards are "
                f"{', '.join(answers.names)}; write one for each of them"
            )
        return np.array([self.value[name] for name in answers.names])


@REWARD_TRANSFORMS.register("z_score")
@dataclass(frozen=True, slots=True, kw_only=True)
class ZScore:
    """Standardised per prompt: how far above the prompt's other responses, in standard deviations.

        z_j = (r_j − mean of the prompt's r_j) / (standard deviation of the prompt's r_j)

    reward by reward, with the sample standard deviation (n − 1); 0 where all are equal. Rewards on different scales
    then count alike in the sum, and prompts on which scores spread little count as much as others. With a single
    reward the order of a prompt's responses stays as it was.

    References:
        Shao et al. 2024 (GRPO's group-relative rewards), arXiv:2402.03300.
    """

    replaces: ClassVar[bool] = False

    def __call__(self, answers: Answers) -> Answers:
        if len(answers.responses) < 2:
            return replace(answers, scores=np.zeros_like(answers.scores))
        width = np.ptp(answers.scores, axis=0)
        alike = width == 0  # not a standard deviation of 0: rounding of the mean can make it 1e-17
        centred = (answers.scores - answers.scores.mean(axis=0)) / np.where(alike, 1.0, width)  # 1e-300² would be 0
        spread = np.where(alike, 1.0, centred.std(axis=0, ddof=1))
        return replace(answers, scores=np.where(alike, 0.0, centred / spread))


@REWARD_TRANSFORMS.register("clip")
@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """Scores beyond a range count as its end, so that no outlier makes a pair.

        r_j → min(max(r_j, lowest), highest)

    reward by reward. Responses beyond the same end are then equal, and equal scores never form a pair.

    References:
        Zheng et al. 2023 (reward clipping in RLHF), arXiv:2307.04964.
    """

    lowest: float | None = None
    """Lower end; null leaves it open."""
    highest: float | None = None
    """Upper end, above lowest; null leaves it open."""

    replaces: ClassVar[bool] = False

    def __post_init__(self) -> None:
        ends = [end for end in (self.lowest, self.highest) if end is not None]
        require("lowest", self.lowest, bool(ends), "a finite number, unless highest is one")
        for key in ("lowest", "highest"):
            end = getattr(self, key)
            require(key, end, end is None or math.isfinite(end), "a finite number, or null")
        holds = self.lowest is None or self.highest is None or self.lowest < self.highest
        require("highest", self.highest, holds, f"above lowest ({self.lowest})")

    def __call__(self, answers: Answers) -> Answers:
        return replace(answers, scores=np.clip(answers.scores, self.lowest, self.highest))


@REWARD_TRANSFORMS.register("length_penalty")
@dataclass(frozen=True, slots=True, kw_only=True)
class LengthPenalty:
    """Each word costs: of two responses that score alike the shorter one is better.

        score → score − α·words(response)

    Words are what white space separates; tokens do not exist yet, and are about 1.3 to a word of English. With several
    rewards the cost is shared among them, so that the score, their sum, bears it once.

    References:
        Park et al. 2024 (length-regularised preference optimization, in tokens), arXiv:2403.19159.
    """

    alpha: float
    """α, cost of a word in units of the score, > 0."""

    replaces: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require("alpha", self.alpha, 0 < self.alpha < math.inf, "> 0 and finite")

    def __call__(self, answers: Answers) -> Answers:
        words = np.array([float(len(response.split())) for response in answers.responses])
        return replace(answers, scores=answers.scores - self.alpha / len(answers.names) * words[:, None])


@REWARD_TRANSFORMS.register("unlikeliness")
@dataclass(frozen=True, slots=True, kw_only=True)
class Unlikeliness:
    """Unlikeliness reward: of responses that are equally right, those that the policy hardly finds are worth more.

        r_i = R_i·(1 − β·ρ_i/G),    ρ_i = rank of response i among the prompt's G by mean log-prob of a token

    reward by reward, with rank 0 for the least likely; equal log-probs share the mean of their ranks, where the authors
    leave the order to the sort. Responses worth 0 stay at 0. R = 1, 1, 0, 1 with log-probs −0.5, −2, −0.1, −1 become
    0.875, 1, 0, 0.9375 for β = 0.25: the rule that makes pairs then takes the second for the best, and z_score after it
    gives the authors' advantages. A prompt whose responses are all right tells them apart too, against the likely ones.

    Log-probs are those of the policy that was sampled: ``responses: [{text, score, mean_logp}, …]``. All responses of
    the prompt are ranked, the wrong ones too. A score below 0 would turn round, the likely response losing less, so it
    is refused: use scores like 1 for right and 0 for wrong.

    References:
        He et al. 2025, arXiv:2506.02355; ranks and default as in AndreHe02/rewarding-unlikely-release.
    """

    beta_rank: float = 0.25
    """β: share of its reward that the likeliest response loses, nearly; in (0, 1]."""

    replaces: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require("beta_rank", self.beta_rank, 0 < self.beta_rank <= 1, "in (0, 1], 0.25 in the authors' code")

    def __call__(self, answers: Answers) -> Answers:
        if answers.mean_logps is None:
            raise ValueError(
                "unlikeliness ranks responses by their log-probs, and a response has no mean_logp; give each its mean "
                "log-prob per token under the policy that drew it, or leave unlikeliness out"
            )
        if (answers.scores < 0).any():
            raise ValueError(
                "unlikeliness multiplies scores, and one is below 0, where the likely response would lose less; give "
                "scores >= 0, or put clip with lowest: 0 before it"
            )
        logps = answers.mean_logps
        below = (logps[None, :] < logps[:, None]).sum(axis=1)
        equal = (logps[None, :] == logps[:, None]).sum(axis=1)
        ranks = below + (equal - 1) / 2
        return replace(answers, scores=answers.scores * (1 - self.beta_rank * ranks / len(logps))[:, None])


@REWARD_TRANSFORMS.register("r3")
@dataclass(frozen=True, slots=True, kw_only=True)
class R3:
    """Regularized Relevance Reward: relevant, long enough and not repetitive, without any preference data.

        open-ended prompts:  R = rel(prompt, response) · LI · RP
        closed questions:    R = F(rel(gold, response)) · RP

    with rel(a, b) = M(a)·M(b) for a sentence encoder M, LI = words/100 (length incentive, up to most_words/100),
    RP = distinct trigrams / trigrams of words (repetition penalty; 1 for responses of fewer than three words) and
    F(rel) = rel/highest_relevance · most_words/100, which brings relevance to the range of LI. It takes the place of
    the scores that responses had. 120 words with 100 distinct of 118 trigrams and a relevance of 0.6 have R = 0.610169.

    Words are counted as the authors do: runs of letters and digits, and runs of punctuation. What is theirs too: the
    encoder, its range from 0 to 3.5, and 512 as the longest response, which they generate in tokens. What is ours: the
    cap on LI, because lists of responses, other than their samples, have no longest one; and a key in place of their
    labels of open and closed prompts.

    References:
        Kim and Seo 2024, arXiv:2402.03469; F and words as in the authors' code, naver-ai/rethinking-proxy-reward;
        encoder of Izacard et al. 2021 (Contriever), arXiv:2112.09118.
    """

    encoder: str = "facebook/contriever"
    """M: Hub id or folder of a sentence encoder; a text's vector is the mean over its tokens."""
    questions: str = "open"
    """``open``; ``closed``, where every row needs a gold response; ``mixed``, where rows with a gold response are."""
    most_words: int = 512
    """Words beyond this many add nothing to LI, ≥ 1."""
    highest_relevance: float = 3.5
    """Relevance of equal texts, about, by which F divides, > 0; 1 with normalize."""
    normalize: bool = False
    """Divide vectors by their lengths, so that rel is a cosine: for encoders that were trained that way."""

    replaces: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require("encoder", self.encoder, bool(self.encoder.strip()), "a Hub id or folder of a sentence encoder")
        kinds = ("open", "closed", "mixed")
        require("questions", self.questions, self.questions in kinds, "'open', 'closed' or 'mixed'")
        require("most_words", self.most_words, self.most_words >= 1, ">= 1")
        highest = self.highest_relevance
        require("highest_relevance", highest, 0 < highest < math.inf, "> 0 and finite")

    def idle(self) -> dict[str, str]:
        return {"highest_relevance": "it is about closed questions"} if self.questions == "open" else {}

    def reads(self, answers: Answers) -> list[str]:
        """The text that responses should be relevant to, and the responses.

        Raises:
            ValueError: a closed question has no gold response.
        """
        if self.questions == "closed" and answers.gold is None:
            raise ValueError(
                "r3 compares answers to closed questions with a gold response, and there is none; add a gold column, "
                "or set reward_transforms' questions to mixed or open"
            )
        about = answers.gold if self._closed(answers) and answers.gold is not None else answers.prompt
        return [about, *answers.responses]

    def __call__(self, answers: Answers) -> Answers:
        vectors = np.asarray(answers.encoders[self.encoder](self.reads(answers)), dtype=np.float64)
        if self.normalize:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        relevance = vectors[1:] @ vectors[0]
        words = [_WORDS.findall(response) for response in answers.responses]
        if self._closed(answers):
            relevance = relevance / self.highest_relevance * self.most_words / 100
        else:
            relevance = relevance * np.array([min(len(each), self.most_words) / 100 for each in words])
        penalty = np.array([distinct_trigrams(each) for each in words])
        return replace(answers, scores=(relevance * penalty)[:, None], names=("r3",))

    def _closed(self, answers: Answers) -> bool:
        return self.questions == "closed" or (self.questions == "mixed" and answers.gold is not None)


_WORDS = re.compile(r"\w+|[^\w\s]+")


def distinct_trigrams(words: Sequence[str]) -> float:
    """Share of a text's trigrams of words that are distinct, in (0, 1]; 1 where there are none."""
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(trigrams)) / len(trigrams) if trigrams else 1.0


# ---- rows ----


def answers_of(row: Row, encoders: Mapping[str, Embed] | None = None) -> Answers:
    """The candidates of a row as transforms see them.

    Raises:
        ValueError: some responses have rewards of other names than others.
    """
    names = tuple(row.candidates[0].rewards) or ("score",)
    for each in row.candidates:
        if set(each.rewards or ("score",)) != set(names):
            raise ValueError(
                f"one response has the rewards {', '.join(names)}, another {', '.join(each.rewards) or 'a score only'}"
            )
    scores = [[each.rewards[name] for name in names] if each.rewards else [each.score] for each in row.candidates]
    gold = row.responses.get("gold")
    logps = [each.mean_logp for each in row.candidates if each.mean_logp is not None]
    return Answers(
        prompt=asked(row.prompt),
        responses=[plain(each.text) for each in row.candidates],
        scores=np.array(scores, dtype=np.float64),
        names=names,
        gold=None if gold is None else plain(gold),
        mean_logps=np.array(logps, dtype=np.float64) if len(logps) == len(row.candidates) else None,
        encoders=encoders or {},
    )


def with_scores(row: Row, scores: Sequence[float]) -> Row:
    """The row with other scores of its candidates, best first and equal ones in their order."""
    candidates = [replace(each, score=float(score)) for each, score in zip(row.candidates, scores, strict=True)]
    return replace(row, candidates=tuple(sorted(candidates, key=lambda each: -each.score)))


def asked(prompt: Text) -> str:
    """A prompt as plain text: of messages, the user's."""
    if isinstance(prompt, str):
        return plain(prompt)
    return plain(tuple(message for message in prompt if message["role"] == "user") or prompt)


def plain(text: Text) -> str:
    """What is said: a text as it is, of messages their contents, a line each."""
    if isinstance(text, str):
        return text.strip()
    return "\n".join(str(message.get("content") or "") for message in text).strip()
