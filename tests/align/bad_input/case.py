"""What one case of a user's fault is, and how things are broken for it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM, MambaConfig

from tests.align.runs import pairs, tiny_tokenizer

BASE = {
    "--model_name_or_path": "./model",
    "--dataset_name": "rows.jsonl",
    "--output_dir": "run",
    "--objective.name": "dpo",
    "--eval_share": "0",
    "--rows_per_step": "4",
    "--num_train_epochs": "2",
    "--save_strategy": "no",
}
"""A command line that trains four steps. A case's words replace those of the same name."""

RECIPE = """
model: {model_name_or_path: ./model}
data: {dataset_name: rows.jsonl, eval_share: 0}
objective: {name: dpo}
train: {output_dir: run, rows_per_step: 4, save_strategy: 'no'}
"""
"""The same as a file, for faults that only a file can have."""


def recipe(old: str = "", new: str = "", *, more: str = "") -> str:
    """``RECIPE`` with ``new`` in the place of ``old``, and more lines."""
    assert old in RECIPE
    return (RECIPE.replace(old, new) if old else RECIPE) + more


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    says: list[str]
    """Parts of the sentence, in this order: what is at fault, then the way out."""
    words: str = ""
    """Of the command line, as in a shell."""
    file: str | None = None
    """A recipe, which is then all that is read besides ``words``."""
    rows: list[Any] | str | bytes | None = None
    """What ``rows.jsonl`` holds instead of eight pairs."""
    arrange: Callable[[], object] = lambda: None
    """Breaks something in the current folder."""
    trained: bool = False
    """Whether ``run`` holds a finished run with checkpoints 2 and 4."""
    model_loaded: bool = False


# ---- arrangements ----


def chats(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [{key: [{"role": roles[key], "content": text}] for key, text in row.items()} for row in rows]


def renamed(**names: str) -> list[dict[str, Any]]:
    return [{names.get(key, key): text for key, text in row.items()} for row in pairs()]


def each(**values: Any) -> list[dict[str, Any]]:
    return [row | values for row in pairs()]


def write(path: str, content: str | bytes = "") -> Callable[[], object]:
    return lambda: Path(path).write_bytes(content.encode() if isinstance(content, str) else content)


def remove(path: str) -> Callable[[], object]:
    return lambda: Path(path).unlink()


def flip_a_bit(path: str) -> Callable[[], object]:
    def flip() -> None:
        content = bytearray(Path(path).read_bytes())
        content[-5] ^= 1
        Path(path).write_bytes(content)

    return flip


def cut_in_half(path: str) -> Callable[[], object]:
    return lambda: os.truncate(path, Path(path).stat().st_size // 2)


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[], object]:
    def rewrite() -> None:
        weights = load_file("model/model.safetensors")
        change(weights)
        save_file(weights, "model/model.safetensors", metadata={"format": "pt"})

    return rewrite


def change_config(**values: Any) -> Callable[[], object]:
    """Keys of the model's configuration."""

    def change() -> None:
        path = Path("model/config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def an_encoder() -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(vocab_size=260, **shape)).save_pretrained("bert")
    tiny_tokenizer(Path("bert"))


def a_tokenizer_without_end() -> None:
    shutil.rmtree("tokenizer", ignore_errors=True)
    tiny_tokenizer(Path("tokenizer"), end_token=None)


def a_larger_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained("model")
    tokenizer.add_tokens([f"<{i}>" for i in range(50)] + ["Say"])
    tokenizer.save_pretrained("tokenizer")


def a_mamba() -> None:
    config = MambaConfig(vocab_size=260, hidden_size=32, num_hidden_layers=2, state_size=4, eos_token_id=256)
    AutoModelForCausalLM.from_config(config).save_pretrained("mamba")
    tiny_tokenizer(Path("mamba"))


def without_digits() -> None:
    """Of the tokenizer's digits only 0 is left a token."""
    path = Path("model/tokenizer.json")
    stored = json.loads(path.read_text())
    vocabulary = stored["model"]["vocab"]
    for digit in "123456789":
        vocabulary[f"<{digit}>"] = vocabulary.pop(digit)
    path.write_text(json.dumps(stored))
