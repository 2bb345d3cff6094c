"""Makes the policy that ships with the embedded world: tokenizer and weights, from nothing, in about ten minutes.

    OMP_NUM_THREADS=1 python -m launch.pretrain_world --output_dir data/worlds/policy

It learns from what a base model learns from, good and flawed answers mixed (``data.worlds.candidates``) and some
arithmetic, so that it knows both, its samples vary, and preferences have something to choose from.

The same seed, thread count, library versions and kind of processor give the same files, bit for bit. Of these, another
thread count, version or processor changes the order of sums and so the weights, not how good they are; the tokenizer
depends on seed and versions alone.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from align.console import quiet_libraries
from align.sampling import Sampling, sample
from data.worlds import POLICY, SPLITS, answer_of, candidates, problems
from objectives.stats import mean_with_interval

PAD, END, SYSTEM, USER, ASSISTANT = SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + (message['content'] or '') + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
VOCABULARY = 512
SYSTEM_TURNS = (
    "Answer the question.",
    "You are good with numbers.",
    "Answer in a few words.",
    "Be a friend to all who ask.",
)
"""What some conversations begin with, so that a system turn is nothing new."""
SYSTEM_SHARE, TABLE_SHARE = 0.1, 0.25
"""Shares of conversations that begin with a system turn, and of documents that are steps of problems without story."""
ROWS_PER_STEP, LEARNING_RATE = 32, 3e-3
EIGHT = Sampling(n=8, max_tokens=80)
GREEDY = Sampling(temperature=0, max_tokens=80)
SHARD = 100
"""Steps whose rows are made, and sorted by length, at once."""


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that it has a token for any text; each digit is a token of its own."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    asked = problems("train", 10_000, seed)
    texts = [problem.question for problem in asked] + [text for [text] in candidates(asked, 1, seed)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([*texts, *SYSTEM_TURNS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=256,
    )


def make_model(seed: int) -> LlamaForCausalLM:
    """A Llama of 0.9 million random parameters. Head dimension 32 is the least that vLLM runs on CPUs."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            pad_token_id=SPECIAL.index(PAD),
            eos_token_id=SPECIAL.index(END),
        )
    )


def corpus(tokenizer: PreTrainedTokenizerBase, number: int, seed: int) -> Iterator[tuple[list[int], int]]:
    """Documents as token ids, each with the number of its first tokens that are not learned."""
    rng = random.Random(f"corpus/{seed}")
    asked = problems("train", number, seed)
    texts: list[tuple[str, str]] = []
    for problem, [response] in zip(asked, candidates(asked, 1, seed), strict=True):
        if rng.random() < TABLE_SHARE:
            steps = [step for other in rng.sample(asked, 5) for step in other.steps]
            texts.append(("", " ".join(f"{step}." for step in steps) + END))
        else:
            system = f"{SYSTEM}{rng.choice(SYSTEM_TURNS)}{END}" if rng.random() < SYSTEM_SHARE else ""
            texts.append((f"{system}{USER}{problem.question}{END}{ASSISTANT}", f"{response}{END}"))
    prompts = tokenizer([prompt for prompt, _ in texts])["input_ids"]
    responses = tokenizer([response for _, response in texts])["input_ids"]
    for prompt, response in zip(prompts, responses, strict=True):  # type: ignore[arg-type]
        yield [*prompt, *response], len(prompt)


def batches(tokenizer: PreTrainedTokenizerBase, steps: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and labels of each step, (row, token), padded on the right; rows of a step are about equally long."""
    rng = random.Random(f"batches/{seed}")
    for shard in range(-(-steps // SHARD)):  # rounded up
        rows = sorted(corpus(tokenizer, SHARD * ROWS_PER_STEP, seed * 1000 + shard), key=lambda row: len(row[0]))
        starts = list(range(0, len(rows), ROWS_PER_STEP))
        rng.shuffle(starts)
        for start in starts[: steps - shard * SHARD]:
            part = rows[start : start + ROWS_PER_STEP]
            shape = len(part), max(len(ids) for ids, _ in part)
            inputs, labels = torch.full(shape, SPECIAL.index(PAD)), torch.full(shape, -100)
            for i, (ids, prompt) in enumerate(part):
                inputs[i, : len(ids)] = torch.tensor(ids)
                labels[i, prompt : len(ids)] = torch.tensor(ids[prompt:])
            yield inputs, labels


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, steps: int, seed: int) -> None:
    """AdamW with warm-up and a cosine to zero, next-token loss on responses."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.98),
    )
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, max(steps // 20, 1))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - steps // 20)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [steps // 20])
    model.train()
    start, seen, total = time.monotonic(), 0, 0.0
    for step, (inputs, labels) in enumerate(batches(tokenizer, steps, seed), start=1):
        # Padding stands on the right, where causal attention never looks: no mask is needed.
        loss = model(input_ids=inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seen, total = seen + inputs.numel(), total + loss.item()
        if step % SHARD == 0 or step == steps:
            took = time.monotonic() - start
            print(
                f"step {step}/{steps}   loss {total / SHARD:.4f}   {took:.0f} s   {seen / took:.0f} tokens/s",
                flush=True,
            )
            total = 0.0


def accuracies(model: Any, tokenizer: PreTrainedTokenizerBase, number: int = 300) -> str:
    """A table of how often answers are right: one problem in a line, 8 samples to each, and the most probable one."""
    lines = []
    for split in SPLITS:
        asked = problems(split, number, seed=1)
        prompts = [({"role": "user", "content": problem.question},) for problem in asked]
        right = [
            [float(answer_of(text) == problem.answer) for text in texts]
            for problem, texts in zip(asked, sample(model, tokenizer, prompts, EIGHT), strict=True)
        ]
        greedy = [
            float(answer_of(text) == problem.answer)
            for problem, [text] in zip(asked, sample(model, tokenizer, prompts, GREEDY), strict=True)
        ]
        cells = []
        for name, values, clusters in (
            ("sampled", [value for row in right for value in row], [i for i in range(number) for _ in range(8)]),
            ("greedy", greedy, range(number)),
            ("best of 8", [max(row) for row in right], range(number)),
        ):
            estimate = mean_with_interval(values, list(clusters))
            cells.append(f"{name} {estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]")
        lines.append(f"{split:<20}" + "   ".join(cells))
    return "\n".join(lines)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> LlamaForCausalLM:
    """Saves weights in half the bytes of float32, to be loaded as float32; returns them as loaded."""
    model.to(torch.float16).save_pretrained(folder)  # type: ignore[arg-type]
    config = LlamaConfig.from_pretrained(folder)
    config.dtype = torch.float32
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


def main(arguments: list[str] | None = None) -> int:
    """Makes the policy and prints how good it is."""
    parser = argparse.ArgumentParser(prog="python -m launch.pretrain_world")
    parser.add_argument("--output_dir", type=Path, default=POLICY)
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    quiet_libraries()
    tokenizer = make_tokenizer(options.seed)
    model = make_model(options.seed)
    print(
        f"{model.num_parameters()} parameters, {len(tokenizer)} tokens, {torch.get_num_threads()} threads", flush=True
    )
    pretrain(model, tokenizer, options.steps, options.seed)
    model = save(model, tokenizer, options.output_dir)
    for path in sorted(options.output_dir.iterdir()):
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}  {path.stat().st_size:>8}  {path.name}")
    print(accuracies(model, tokenizer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
