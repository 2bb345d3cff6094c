"""How responses are drawn, and samples with plain transformers: small models, and machines without vLLM."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import xxhash
from torch import Tensor

from data.chat import Rendered, render
from objectives.checks import require
from objectives.relabel import RewardAugmented
from objectives.rows import Row, Text


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How responses are drawn, but for the seed."""

    n: int = 1
    """Samples of each prompt, ≥ 1."""
    temperature: float = 1.0
    """≥ 0; 0 takes the most probable token."""
    top_p: float = 1.0
    """Only the most probable tokens that together have this probability, in (0, 1]; 1 means all."""
    top_k: int = 0
    """Only this many most probable tokens; 0 means all."""
    min_p: float = 0.0
    """Only tokens at least this probable, compared with the most probable one, in [0, 1)."""
    max_tokens: int = 128
    """Longest response, in tokens, its end token included."""
    stop: list[str] = field(default_factory=list)
    """Texts before which a response ends, besides the model's end tokens."""

    def __post_init__(self) -> None:
        require("n", self.n, self.n >= 1, ">= 1")
        require("temperature", self.temperature, 0 <= self.temperature < float("inf"), ">= 0 and finite")
        require("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")
        require("top_k", self.top_k, self.top_k >= 0, ">= 0; 0 means all")
        require("min_p", self.min_p, 0 <= self.min_p < 1, "in [0, 1)")
        require("max_tokens", self.max_tokens, self.max_tokens >= 1, ">= 1")
        require("stop", self.stop, all(self.stop), "texts that are not empty")
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"n is {self.n}, but at temperature 0 all samples are the same; set n 1")


@dataclass(frozen=True, kw_only=True)
class Sampling(Drawing):
    """How responses are drawn."""

    seed: int = 0
    """The same seed gives the same samples, whatever else is drawn beside them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require("seed", self.seed, 0 <= self.seed < 2**31, "in [0, 2³¹)")

    def described(self) -> dict[str, Any]:
        """Every setting, as samples carry it."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt to be continued."""

    number: int
    """Whose: results come back in any order."""
    prompt: tuple[int, ...]
    """Its tokens, and those of the response that are kept."""
    n: int
    max_tokens: int
    seed: int
    """Sample i of the prompt is drawn with seed + i."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """One continuation."""

    token_ids: tuple[int, ...]
    """With the end token, where it ended with one."""
    logprob: float | None
    """log π in nats over ``token_ids``, at temperature 1 and over all tokens, whatever the sampling was."""
    finish_reason: str
    """``stop`` or ``length``."""


def encoded(prompt: Text, tokenizer: Any, where: Row | None = None) -> tuple[Rendered, list[int]]:
    """A prompt as the model reads it in training.

    Args:
        prompt: messages or plain text.
        tokenizer: with the chat template.
        where: the row it comes from, for messages.
    """
    row = where or Row(prompt=prompt, responses={})
    rendered = render(row, tokenizer)
    return rendered, list(tokenizer(rendered.prompt, add_special_tokens=not rendered.chat)["input_ids"])


def decoded(tokenizer: Any, ids: Sequence[int], before: Sequence[int], stop: Sequence[str] = ()) -> str:
    """Text of a response.

    Args:
        tokenizer: of the model.
        ids: the response, without its end token.
        before: the prompt's tokens where it is plain text, else nothing. By themselves, SentencePiece tokens lose the
            space that they begin with.
        stop: texts before which it ends.
    """
    start, whole = tokenizer.decode(list(before)), tokenizer.decode([*before, *ids])
    text = whole[len(start) :] if whole.startswith(start) else tokenizer.decode(list(ids))
    return text[: min((found for each in stop if (found := text.find(each)) >= 0), default=len(text))]


def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Text],
    how: Sampling,
    *,
    goal: RewardAugmented | None = None,
    batch: int = 256,
) -> list[list[str]]:
    """Responses to prompts, rendered as in training.

    Args:
        model: a causal language model of transformers; put into eval mode for the while.
        tokenizer: its tokenizer, with an end token.
        prompts: messages or plain text.
        how: number, temperature, length and seed. The same arguments give the same samples on the same machine.
        goal: for a policy trained on reward-augmented rows: asks for the highest score, in training's words.
        batch: sequences computed together.
    Returns:
        ``how.n`` texts for each prompt, without the end token; plain text keeps its leading space.
    """
    asked = [goal.condition(prompt) if goal is not None else prompt for prompt in prompts]
    texts = [encoded(prompt, tokenizer) for prompt in asked]
    requests = [
        Request(number=i, prompt=tuple(ids), n=how.n, max_tokens=how.max_tokens, seed=spread(how.seed, i))
        for i, (_, ids) in enumerate(texts)
    ]
    ends = {tokenizer.eos_token_id}
    samples: list[list[str]] = [[] for _ in prompts]
    for number, drawn in draw(model, requests, how, ends=ends, pad=_pad(tokenizer), batch=batch, tokenizer=tokenizer):
        rendered, ids = texts[number]
        before = [] if rendered.chat else ids
        samples[number] = [decoded(tokenizer, without_end(each, ends), before, how.stop) for each in drawn]
    return samples


def spread(seed: int, number: int) -> int:
    """A seed for each prompt, far from the seeds of its neighbours' samples."""
    return xxhash.xxh3_64_intdigest(f"{seed}/{number}".encode()) % 2**30


def without_end(drawn: Drawn, ends: set[int]) -> tuple[int, ...]:
    """The response's tokens up to its end token."""
    ids = drawn.token_ids
    return ids[:-1] if ids and ids[-1] in ends else ids


def _pad(tokenizer: Any) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def draw(
    model: Any,
    requests: Sequence[Request],
    how: Sampling,
    *,
    ends: set[int],
    pad: int,
    tokenizer: Any,
    batch: int = 256,
    mixture: tuple[Any, float] | None = None,
) -> Iterator[tuple[int, list[Drawn]]]:
    """Continues prompts with a model of transformers.

    Each sample has a random generator of its own, so that it does not depend on what is computed beside it, but for the
    rounding of matrix products.

    Args:
        model: put into eval mode for the while.
        requests: what to continue.
        how: everything but number, length and seed, which requests have of their own.
        ends: tokens that end a response.
        pad: any token; nothing attends to it.
        tokenizer: for stop texts.
        batch: sequences computed together.
        mixture: a second model and its share c: tokens are then drawn from softmax(c·second + (1 − c)·first) of their
            logits. Log-probs stay those of the first.
    Yields:
        The number of a request and its continuations, in the order in which they are done.
    """
    order = sorted(requests, key=lambda each: (each.max_tokens, len(each.prompt)))  # neighbours pad each other little
    was_training = model.training
    model.eval()
    try:
        while order:
            chosen = [order.pop()]
            width = chosen[0].n
            while order and width + order[-1].n <= batch:
                width += order[-1].n
                chosen.append(order.pop())
            yield from _generated(model, chosen, how, ends, pad, tokenizer, mixture)
    finally:
        model.train(was_training)


def _generated(
    model: Any,
    requests: Sequence[Request],
    how: Sampling,
    ends: set[int],
    pad: int,
    tokenizer: Any,
    mixture: tuple[Any, float] | None,
) -> Iterator[tuple[int, list[Drawn]]]:
    from transformers import GenerationConfig  # here, so that reading settings need not wait for it

    rows = [request.prompt for request in requests for _ in range(request.n)]
    seeds = [request.seed + i for request in requests for i in range(request.n)]
    width = max(map(len, rows))
    inputs = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    second = None if mixture is None else _Second(mixture[0], mixture[1], mask)
    choose = _Choose(how, seeds, second)
    # Not the model's own configuration, which may ask for penalties.
    config = GenerationConfig(
        max_new_tokens=max(request.max_tokens for request in requests),
        do_sample=False,
        eos_token_id=sorted(ends),
        pad_token_id=pad,
    )
    with torch.no_grad():
        output = model.generate(
            input_ids=inputs,
            attention_mask=mask,
            generation_config=config,
            logits_processor=[choose],
            stopping_criteria=[_Stop(tokenizer, how.stop, width)] if how.stop else None,
        )
    logprobs = torch.stack(choose.logprobs, dim=1).tolist()
    sequences = iter(zip(output[:, width:].tolist(), logprobs, strict=True))
    for request in requests:
        most = request.max_tokens  # others of the batch may have gone on for longer
        drawn = [next(sequences) for _ in range(request.n)]
        yield request.number, [_finished(ids[:most], logprobs[:most], ends, how, tokenizer) for ids, logprobs in drawn]


def _finished(ids: list[int], logprobs: list[float], ends: set[int], how: Sampling, tokenizer: Any) -> Drawn:
    """What was drawn, without the padding after its end."""
    length = next((i + 1 for i, token in enumerate(ids) if token in ends), None)
    if length is None and _holds(tokenizer.decode(ids), how.stop):  # and so does every piece longer than the first
        length = bisect_left(range(len(ids) + 1), True, key=lambda i: _holds(tokenizer.decode(ids[:i]), how.stop))
    stopped = length is not None
    length = len(ids) if length is None else length
    return Drawn(
        token_ids=tuple(ids[:length]),
        logprob=float(sum(logprobs[:length])),
        finish_reason="stop" if stopped else "length",
    )


def _holds(text: str, stop: Sequence[str]) -> bool:
    return any(each in text for each in stop)


class _Stop:
    """Stops rows whose response holds a stop text; transformers' own looks at the prompt's end too."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], width: int) -> None:
        self.tokenizer, self.stop, self.width = tokenizer, stop, width

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Any:
        """Whether to stop; (row,)."""
        found = [_holds(self.tokenizer.decode(row), self.stop) for row in input_ids[:, self.width :].tolist()]
        return torch.tensor(found, device=input_ids.device)


class _Second:
    """A second model that reads along, token by token."""

    def __init__(self, model: Any, share: float, mask: Tensor) -> None:
        self.model, self.share, self.mask = model, share, mask
        self.cache: Any = None

    def mixed(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits of the geometric mixture, up to a constant; (row, vocab)."""
        new = input_ids if self.cache is None else input_ids[:, -1:]
        if self.cache is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
        output = self.model(
            input_ids=new, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache, use_cache=True
        )
        self.cache = output.past_key_values
        return self.share * output.logits[:, -1].float() + (1 - self.share) * scores.float()


class _Choose:
    """Chooses each row's next token with the row's own generator, and notes its log-probability.

    By the Gumbel-max trick: the largest of log p + g, with g = −log E and E exponential, is a draw from p.
    """

    def __init__(self, how: Sampling, seeds: Sequence[int], second: _Second | None = None) -> None:
        from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self.how, self.second = how, second
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.logprobs: list[Tensor] = []
        self.warpers: list[Any] = []
        if how.temperature > 0:
            self.warpers.append(TemperatureLogitsWarper(how.temperature))
        if how.top_k > 0:
            self.warpers.append(TopKLogitsWarper(how.top_k))
        if how.top_p < 1:
            self.warpers.append(TopPLogitsWarper(how.top_p))
        if how.min_p > 0:
            self.warpers.append(MinPLogitsWarper(how.min_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores of which only the chosen token's is finite; (row, vocab)."""
        logps = torch.log_softmax(scores.float(), dim=-1)
        if self.second is not None:
            scores = self.second.mixed(input_ids, scores)
        if self.how.temperature == 0:
            chosen = scores.argmax(dim=-1)
        else:
            warped = scores.float()
            for warper in self.warpers:
                warped = warper(input_ids, warped)
            noise = torch.stack([torch.empty(scores.shape[-1]).exponential_(generator=g) for g in self.generators])
            chosen = (warped - noise.to(scores.device).log()).argmax(dim=-1)
        self.logprobs.append(logps.gather(-1, chosen[:, None])[:, 0].cpu())
        return torch.full_like(scores, float("-inf")).scatter_(-1, chosen[:, None], 0.0)
