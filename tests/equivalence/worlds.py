"""A model and rows small enough to train in seconds, made on the spot."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from tests.equivalence.runs import write_rows

WORDS = "the cat sat on a mat and then it ran to see what was there for you".split()  # noqa: SIM905


def save_model(folder: Path, seed: int = 0, **config: object) -> Path:
    """A Llama of two layers with a byte-level tokenizer, 8 thousand parameters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    torch.manual_seed(seed)
    shape = {
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        **config,
    }
    AutoModelForCausalLM.from_config(LlamaConfig(**shape)).save_pretrained(folder)  # type: ignore[arg-type]
    tokenizer.save_pretrained(folder)
    return folder


def save_pairs(path: Path, number: int = 48, seed: int = 0) -> Path:
    """Pairs of sentences of unequal lengths."""
    rng = random.Random(seed)

    def sentence(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))

    rows = [
        {"prompt": f"{i} {sentence(2, 8)}:", "chosen": f" {sentence(2, 9)}.", "rejected": f" {sentence(2, 9)}!"}
        for i in range(number)
    ]
    return write_rows(path, rows)
