"""Samples of a policy with plain transformers: small models, and machines without vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from data.chat import render
from objectives.checks import require
from objectives.relabel import RewardAugmented
from objectives.rows import Row, Text


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How responses are drawn."""

    n: int = 1
    """Samples of each prompt, ≥ 1."""
    temperature: float = 1.0
    """≥ 0; 0 takes the most probable token."""
    max_new_tokens: int = 128
    """Longest response, in tokens."""
    seed: int = 0
    batch: int = 256
    """Sequences computed together."""

    def __post_init__(self) -> None:
        require("n", self.n, self.n >= 1, ">= 1")
        require("temperature", self.temperature, 0 <= self.temperature < float("inf"), ">= 0 and finite")
        require("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, ">= 1")
        require("batch", self.batch, self.batch >= 1, ">= 1")
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"n is {self.n}, but at temperature 0 all samples are the same; set n 1")


def sample(
    model: Any, tokenizer: Any, prompts: Sequence[Text], how: Sampling, *, goal: RewardAugmented | None = None
) -> list[list[str]]:
    """Responses to prompts, rendered as in training.

    Args:
        model: a causal language model of transformers; put into eval mode for the while.
        tokenizer: its tokenizer, with an end token.
        prompts: messages or plain text.
        how: number, temperature, length and seed. The same arguments give the same samples on the same machine.
        goal: for a policy trained on reward-augmented rows: asks for the highest score, in training's words.
    Returns:
        ``how.n`` texts for each prompt, without the end token; plain text keeps its leading space.
    """
    asked = [goal.condition(prompt) if goal is not None else prompt for prompt in prompts]
    rendered = [render(Row(prompt=prompt, responses={}), tokenizer) for prompt in asked]
    ids = [tokenizer(one.prompt, add_special_tokens=not one.chat)["input_ids"] for one in rendered]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # neighbours pad each other little
    per_batch = max(how.batch // how.n, 1)
    samples: list[list[str]] = [[] for _ in prompts]
    generator_state, was_training = torch.get_rng_state(), model.training
    torch.manual_seed(how.seed)
    model.eval()
    try:
        for start in range(0, len(order), per_batch):
            chosen = order[start : start + per_batch]
            drawn = _generate(model, tokenizer, [ids[i] for i in chosen], how)
            for number, sequences in zip(chosen, drawn, strict=True):
                before = [] if rendered[number].chat else ids[number]
                samples[number] = [_text(tokenizer, sequence, before) for sequence in sequences]
    finally:
        torch.set_rng_state(generator_state)
        model.train(was_training)
    return samples


def _text(tokenizer: Any, ids: list[int], before: list[int]) -> str:
    """Decoded after ``before``: by themselves, SentencePiece tokens lose the space that they begin with."""
    start, whole = tokenizer.decode(before), tokenizer.decode([*before, *ids])
    return whole[len(start) :] if whole.startswith(start) else tokenizer.decode(ids)


def _generate(model: Any, tokenizer: Any, ids: Sequence[list[int]], how: Sampling) -> list[list[list[int]]]:
    width = max(map(len, ids))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    inputs = torch.tensor([[pad] * (width - len(one)) + one for one in ids], device=model.device)
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in ids], device=model.device)
    drawn = {"do_sample": True, "temperature": how.temperature, "top_k": 0, "top_p": 1.0} if how.temperature else {}
    with torch.no_grad():
        output = model.generate(
            input_ids=inputs,
            attention_mask=mask,
            max_new_tokens=how.max_new_tokens,
            num_return_sequences=how.n,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad,
            **(drawn or {"do_sample": False}),
        )
    drawn_ids: list[list[int]] = []
    for sequence in output[:, width:].tolist():
        end = sequence.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in sequence else len(sequence)
        drawn_ids.append(sequence[:end])
    return [drawn_ids[i : i + how.n] for i in range(0, len(drawn_ids), how.n)]
