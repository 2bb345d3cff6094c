"""What benchmarks run on: models with random weights, and rows that both sides read from the same file."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4, "heads": 4, "vocab_size": 512},
    "16m": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "heads": 6, "vocab_size": 8192},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "heads": 9, "vocab_size": 49152},
}
"""Llamas. ``stories260k`` is a trained one, from ``ALIGN_SHARED``."""
CASES = ("hh", "long", "turns", "tpo", "unpaired")
MAX_LENGTH = 1024
COLUMNS = {
    **dict.fromkeys(("hh", "long", "turns"), ("prompt", "chosen", "rejected")),
    "tpo": ("prompt", "chosen", "rejected", "reference"),
    "unpaired": ("prompt", "completion", "label"),
}
WORDS = "what do you think of the weather in winter and would it rain there when we go out".split()  # noqa: SIM905


def shared() -> Path:
    """``ALIGN_SHARED``, or ``../shared`` from the repository's root."""
    return Path(os.environ.get("ALIGN_SHARED") or Path(__file__).resolve().parents[3] / "shared")


def has_real_rows() -> bool:
    """Whether rows are real ones."""
    return (shared() / "data").is_dir()


def make_model(folder: Path, shape: str, texts: Iterator[str]) -> None:
    """A Llama with random weights, and a byte-level BPE of at most the shape's vocabulary trained on ``texts``."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

    if shape == "stories260k":
        source = shared() / "models" / shape
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(source)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        tokenizer.save_pretrained(folder)
        return
    size: dict[str, Any] = dict(SHAPES[shape])
    heads = size.pop("heads")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size["vocab_size"],
            special_tokens=["<s>", "</s>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        **size, num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=MAX_LENGTH,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def rows_of(case: str) -> list[dict[str, Any]]:
    """Every row there is of a case: real where ``ALIGN_SHARED`` has them, else made up.

    ``hh``: long prompts, short responses. ``long``: short prompts, the best and the worst of long responses.
    ``turns``: dialogues of at least three turns. ``tpo``: the best response as gold, the second and the worst as pair.
    ``unpaired``: single labelled completions.
    """
    pairs = list(_pairs("hh" if case == "unpaired" else case))
    if case != "unpaired":
        return [{key: value for key, value in row.items() if key in COLUMNS[case]} for row in pairs]
    good, bad = ({"completion": "chosen", "label": True}, {"completion": "rejected", "label": False})
    return [
        {"prompt": row["prompt"], "completion": row[kind["completion"]], "label": kind["label"]}
        for i, row in enumerate(pairs)
        for kind in ((good, bad)[i % 2],)
    ]


def _pairs(case: str) -> Iterator[dict[str, Any]]:
    if not has_real_rows():
        yield from made_up(case, 2000)
        return
    if case in ("long", "tpo"):
        for row in _lines("alpaca_eval_scored"):
            best, second, *_, worst = row["responses"]
            if len({each["text"].strip() for each in (best, second, worst)} - {""}) == 3:
                chosen = best if case == "long" else second
                texts = {"chosen": chosen, "rejected": worst, "reference": best}
                prompt = f"Human: {row['prompt']}\n\nAssistant:"
                yield {"prompt": prompt} | {name: f" {each['text']}" for name, each in texts.items()}
        return
    for row in _lines("hh_harmless"):
        marker = "\n\nAssistant:"
        (prompt, _, chosen), (other, _, rejected) = (row[name].rpartition(marker) for name in ("chosen", "rejected"))
        usable = prompt == other and chosen.strip() and rejected.strip() and chosen != rejected
        if usable and (case == "hh" or prompt.count("\n\nHuman:") >= 3):
            yield {"prompt": prompt + marker, "chosen": chosen, "rejected": rejected}


def _lines(name: str) -> Iterator[Any]:
    with gzip.open(shared() / "data" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def made_up(case: str, number: int) -> Iterator[dict[str, Any]]:
    """Random words, with lengths in bytes like those of the real ones."""
    rng = random.Random(0)
    ranges = {"hh": ((100, 900), (20, 350)), "turns": ((600, 1200), (20, 350))}
    ranges |= dict.fromkeys(("long", "tpo"), ((60, 300), (400, 1900)))

    def text(limits: tuple[int, int]) -> str:
        length, written, parts = rng.randint(*limits), 0, []
        while written < length:
            parts.append(rng.choice(WORDS) + " ")
            written += len(parts[-1])
        return "".join(parts)[:length].rstrip()

    of_prompt, of_response = ranges[case]
    for i in range(number):
        yield {
            "prompt": f"{i}: {text(of_prompt)}?", "chosen": f" {text(of_response)}.",
            "rejected": f" {text(of_response)}!", "reference": f" {text(of_response)};",
        }  # fmt: skip


def write_rows(path: Path, rows: list[dict[str, Any]], model: Path, number: int) -> None:
    """A random ``number`` of the rows that fit the context, so that nobody has anything to cut."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    limit = min(MAX_LENGTH, config["max_position_embeddings"]) - 2
    kept = []
    for row in random.Random(1).sample(rows, len(rows)):
        answers = [value for key, value in row.items() if key not in ("prompt", "label")]
        if all(len(tokenizer(row["prompt"] + answer)["input_ids"]) <= limit for answer in answers):
            kept.append(row)
        if len(kept) == number:
            break
    if len(kept) < number:
        raise SystemExit(f"only {len(kept)} rows fit {limit} tokens, {number} are wanted")
    path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
