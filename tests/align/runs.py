"""Tiny models, tokenizers and datasets in a folder, and whole runs of ``align.train.main`` over them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<end>"
CONTEXT = 128


def tiny_tokenizer(folder: Path, *, end_token: str | None = END) -> Path:
    """One token per byte, and an end token unless it is None."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    if end_token is not None:
        tokenizer.add_special_tokens({"eos_token": end_token})
    tokenizer.save_pretrained(folder)
    return folder


def tiny_model(folder: Path, *, context: int = CONTEXT) -> Path:
    """A random Llama of two layers with its tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        eos_token_id=256,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return tiny_tokenizer(folder)


def pairs(number: int = 8) -> list[dict[str, Any]]:
    """Preference pairs, all different."""
    return [
        {"prompt": f"Say {i}.", "chosen": f" It is {i}, with pleasure.", "rejected": f" No, {i * 7}!"}
        for i in range(number)
    ]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
