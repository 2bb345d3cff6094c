"""What a user gets wrong: one sentence each, naming the key, file or row and the way out, before the model is loaded
wherever that is possible.

Every case runs ``align.train.main`` in a folder with a model (``./model``), pairs (``rows.jsonl``) and, where it asks
for one, a finished run with checkpoints (``run``).
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM, MambaConfig, T5Config

from align import model as models
from align import saving
from align.errors import RecipeError
from align.keys import NAMED
from align.recipe import read_recipe
from align.sections import SECTIONS
from align.train import main
from align.trainer import ObjectiveTrainer
from objectives.registry import defaults
from tests.align.runs import CONTEXT, pairs, tiny_model, tiny_tokenizer, write_rows
from tests.support import REPOSITORY

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


# ---- the table ----

RECIPES = [
    Case(name="no such recipe", words="--config nope.yaml", file="", says=["'nope.yaml'", "launch/recipes/dpo.yaml"]),
    Case(name="--config without a file", words="--config", file="", says=["--config takes a YAML file"]),
    Case(name="--config twice", words="--config a.yaml --config b.yaml", file="", says=["--config is given twice"]),
    Case(name="no YAML", file="model: [a\ntrain: {", says=["recipe.yaml is not valid YAML", "line 1"]),
    Case(name="a tab", file="model:\n\tname: x", says=["recipe.yaml is not valid YAML", "line 2"]),
    Case(name="a list", file="- a\n- b", says=["recipe.yaml must hold sections (model, data", "not a list"]),
    Case(name="an empty recipe", file="\n", says=["no 'model' section", "launch/recipes/dpo.yaml"]),
    Case(
        name="a key twice",
        file=recipe("output_dir: run", "output_dir: run, output_dir: other"),
        says=["recipe.yaml", "duplicate key output_dir"],
    ),
    Case(name="a section twice", file=recipe(more="model: {dtype: auto}"), says=["recipe.yaml", "duplicate key model"]),
    Case(name="a misspelt section", file=recipe("train:", "trian:"), says=["'trian'", "did you mean 'train'?"]),
    Case(name="a number for a section", file=recipe(more="3: {a: b}"), says=["unknown section 3"]),
    Case(name="a key without section", file=recipe(more="beta: 1"), says=["unknown section 'beta'"]),
    Case(
        name="a section's key without section",
        file=recipe(more="learning_rate: 1.0e-6"),
        says=["recipe.yaml: unknown section 'learning_rate'", "did you mean 'train.learning_rate'?"],
    ),
    Case(
        name="a misspelt key in YAML",
        file=recipe("rows_per_step: 4", "lerning_rate: 1.0e-6"),
        says=["recipe.yaml: unknown key train.lerning_rate", "did you mean 'learning_rate'?"],
    ),
    Case(
        name="a key of another section",
        file=recipe("rows_per_step: 4", "max_length: 64"),
        says=["unknown key train.max_length", "did you mean 'data.max_length'?"],
    ),
    Case(
        name="a misspelt key on the command line",
        words="--lerning_rate 1e-6",
        says=["--lerning_rate", "did you mean 'learning_rate'?"],
    ),
    Case(
        name="a misspelt key with its section",
        words="--train.lerning_rate 1e-6",
        says=["--train.lerning_rate", "did you mean 'learning_rate'?"],
    ),
    Case(
        name="a misspelt section on the command line",
        words="--trian.learning_rate 1e-6",
        says=["--trian.learning_rate", "did you mean 'train.learning_rate'?"],
    ),
    Case(name="a word that is no key", words="fast", says=["expected --key value", "'fast'"]),
    Case(name="a key like nothing", words="--zzz 1", says=["unknown key --zzz", "--help"]),
    Case(name="a section for a key", words="--lora 8", says=["--lora is a section", "--lora.KEY VALUE"]),
    Case(name="a key without its value", words="--output_dir --as_chat", says=["--output_dir takes a value"]),
    Case(name="a broken value", words="--columns '{a: ['", says=["--columns", "write it as in YAML"]),
    Case(name="an unknown reference in YAML", file=recipe("name: dpo", "name: '${x.y}'"), says=["recipe.yaml", "x.y"]),
    Case(
        name="a section without keys", file=recipe(more="lora:"), says=["section 'lora' must hold keys", "leave the se"]
    ),
    Case(
        name="a section that is text",
        file=recipe("{dataset_name: rows.jsonl, eval_share: 0}", "rows.jsonl"),
        says=["section 'data' must hold keys, got 'rows.jsonl'"],
    ),
    Case(
        name="a section missing",
        file=recipe("data: {dataset_name: rows.jsonl, eval_share: 0}", ""),
        says=["no 'data' section", "launch/recipes/dpo.yaml"],
    ),
    Case(
        name="a required key missing",
        file=recipe("output_dir: run, ", ""),
        says=["train.output_dir is required", "--output_dir VALUE"],
    ),
    Case(name="no dataset", file=recipe("dataset_name: rows.jsonl, ", ""), says=["data", "give dataset_name or"]),
]

OBJECTIVES = [
    Case(name="a misspelt objective", words="--objective.name dop", says=["objective.name", "did you mean 'dpo'?"]),
    Case(name="a misspelt objective key", words="--objective.bta 1", says=["objective.bta", "did you mean 'beta'?"]),
    Case(name="the same without section", words="--bta 1", says=["--bta", "did you mean 'beta'?"]),
    Case(
        name="the same in YAML",
        file=recipe("name: dpo", "name: dpo, bta: 1"),
        says=["objective.bta", "did you mean 'beta'?", "label_smoothing"],
    ),
    Case(name="an objective without name", file=recipe("name: dpo", "beta: 1"), says=["objective must", "{name: dpo"]),
    Case(name="a number for an objective", file=recipe("{name: dpo}", "3"), says=["objective must", "{name: dpo", "3"]),
    Case(name="a number for its name", file=recipe("name: dpo", "name: 3"), says=["objective.name must be text", "3"]),
    Case(name="no objective", file=recipe("{name: dpo}", "[]"), says=["objective is empty", "python -m objectives"]),
    Case(
        name="a weight that is no number",
        file=recipe("{name: dpo}", "[{name: dpo, weight: .nan}]"),
        says=["objective.0.weight must be a finite number > 0", "nan"],
    ),
    Case(
        name="a listed objective without its number",
        file=recipe("{name: dpo}", "[{name: sft, leg: chosen}, {name: dpo}]"),
        words="--beta 1",
        says=["--beta", "write --objective.1.beta"],
    ),
    Case(
        name="a number beyond the list",
        file=recipe("{name: dpo}", "[{name: dpo}]"),
        words="--objective.2.beta 1",
        says=["--objective.2.beta", "1 listed objectives, numbered from 0"],
    ),
    Case(
        name="an objective the data can't serve",
        words="--objective sft",
        says=["rows.jsonl, row 0", "a gold response", "data.columns maps names"],
    ),
]

OF_OTHER_TRAINERS = {
    "loss_type": "objective.name",
    "use_peft": "the lora section",
    "per_device_train_batch_size": "train.rows_per_step",
    "gradient_accumulation_steps": "train.rows_per_step",
    "precompute_ref_log_probs": "reference.source: cached",
    "ref_model": "reference.model",
    "bf16": "model.dtype",
    "lora_r": "lora.r",
    "max_prompt_length": "data.max_length",
    "warmup_ratio": "train.warmup_steps",
    "lr": "train.learning_rate",
    "evaluation_strategy": "train.eval_strategy",
    "deepspeed": "accelerate launch --config_file",
    "hub_token": "hf auth login",
    "padding_free": "leave it out",
    "packing": "leave it out",
    "reference_free": "leave it out: an objective says itself",
    "rpo_alpha": "a second objective: [{name: dpo}, {name: sft, leg: chosen, weight: …}]",
    "sync_ref_model": "modifiers: {name: tr_dpo}",
    "ref_model_mixup_alpha": "modifiers: {name: tr_dpo, sync_alpha: …}",
    "ref_model_sync_steps": "modifiers: {name: tr_dpo, sync_steps: …}",
    "use_weighting": "modifiers: {name: wpo}",
    "f_divergence_type": "modifiers: {name: f_divergence, divergence: …}",
    "f_alpha_divergence_coef": "{name: f_divergence, divergence: alpha, divergence_alpha: …}",
    "simpo_gamma": "objective.gamma of simpo",
    "gamma_beta_ratio": "objective.gamma of simpo, which is β times that ratio",
}
NAMES_OF_OTHERS = {
    "objective": {
        **dict.fromkeys(["cdpo", "sigmoid"], "dpo"),
        **dict.fromkeys(["dpo_positive", "smaug"], "dpop"),
        **dict.fromkeys(["rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq"], "rpo_reward_aware"),
        **dict.fromkeys(["tdpo1", "tdpo2"], "tdpo"),
        "alphapo": "alpha_po",
        "aot_pair": "aot_unpaired",
        "bt": "bradley_terry",
        "exo_pair": "exo",
        "lrml": "discopop",
        "nca_pair": "nca",
        "nll": "sft",
        "sigmoid_norm": "dpo_norm",
        "slic": "hinge",
        "sppo_hard": "sppo",
    },
    "modifiers": {"f_dpo": "f_divergence", "sync_ref_model": "tr_dpo", "tr-dpo": "tr_dpo", "use_weighting": "wpo"},
    "token_weights": {"linupper": "lin_upper"},
    "regularizers": {"l1_init": "l2_init", "l2_sp": "l2_init", "wise-ft": "wise_ft"},
    "reward_transforms": {"lsc": "log_sigmoid_centered", "standardize": "z_score", "clamp": "clip"},
}
"""What TRL, other trainers and papers call what is registered here."""
TRL = [
    *[
        Case(name=f"{key} on the command line", words=f"--{key} 1", says=[f"--{key}", answer])
        for key, answer in OF_OTHER_TRAINERS.items()
    ],
    *[
        Case(name=f"{key} in YAML", file=recipe("rows_per_step: 4", f"{key}: 1"), says=[f"train.{key}", answer])
        for key, answer in OF_OTHER_TRAINERS.items()
    ],
    *[
        Case(
            name=f"{theirs} for {ours} in {kind}",
            words=f"--{kind} {theirs}",
            says=[f"{kind}.name: unknown", f"{theirs!r}: it is called {ours!r} here"],
        )
        for kind, names in NAMES_OF_OTHERS.items()
        for theirs, ours in names.items()
    ],
    Case(
        name="the name of others in a list",
        words="--modifiers '[{name: r_dpo}, {name: use_weighting}]'",
        says=["modifiers.1.name: unknown modifier 'use_weighting': it is called 'wpo' here"],
    ),
]

VALUES = [
    Case(name=f"{key} {value}", words=f"--{key} '{value}'", says=[key, f"must be {expected}", f"got {got}"])
    for key, value, expected, got in [
        ("train.learning_rate", "fast", "a number", "'fast'"),
        ("train.learning_rate", "nan", "a finite number", "'nan'"),
        ("train.learning_rate", "inf", "a finite number", "'inf'"),
        ("train.learning_rate", "1e999", "a finite number", "inf"),
        ("train.learning_rate", "0", "> 0", "0.0"),
        ("train.learning_rate", "true", "a number", "True"),
        ("train.learning_rate", "null", "a number", "None"),
        ("train.rows_per_step", "[1, 2]", "a whole number", "[1, 2]"),
        ("train.rows_per_step", "3.5", "a whole number", "3.5"),
        ("train.rows_per_step", "0", ">= 1", "0"),
        ("train.token_budget", "-5", ">= 1", "-5"),
        ("train.num_train_epochs", "inf", "a finite number", "'inf'"),
        ("train.max_steps", "0", "-1 or >= 1", "0"),
        ("train.warmup_steps", "-1", ">= 0", "-1.0"),
        ("train.adam_beta1", "1", "in [0, 1)", "1.0"),
        ("train.max_grad_norm", "nan", "a finite number", "'nan'"),
        ("train.seed", "-1", "in [0, 2³²)", "-1"),
        ("train.gradient_checkpointing", "maybe", "true or false", "'maybe'"),
        ("train.eval_strategy", "sometimes", "one of no, steps, epoch", "'sometimes'"),
        ("train.output_dir", "null", "text", "None"),
        ("train.report_to", "5", "a list", "5"),
        ("model.dtype", "float16", "one of auto, float32, bfloat16", "'float16'"),
        ("model.trust_remote_code", "perhaps", "true or false", "'perhaps'"),
        ("data.eval_share", "0.7", "in [0, 0.5]", "0.7"),
        ("data.max_dropped_share", "nan", "a finite number", "'nan'"),
        ("data.max_length", "1", ">= 2", "1"),
        ("data.max_rows", "0", ">= 1", "0"),
        ("data.truncation", "left", "one of truncate_response_end, truncate_prompt_start, drop, raise", "'left'"),
        ("data.columns", "{prompt:question}", "a mapping of names to names", "{'prompt:question': None}"),
        ("data.datasets", "{dataset_name: a}", "a list of datasets", "{'dataset_name': 'a'}"),
        ("data.datasets", "[rows.jsonl]", "a mapping", "'rows.jsonl'"),
        ("lora.r", "0", ">= 1", "0"),
        ("lora.lora_alpha", "inf", "a finite number", "'inf'"),
        ("lora.lora_dropout", "1", "in [0, 1)", "1.0"),
        ("lora.target_modules", "5", "text or a list", "5"),
        ("reference.source", "cache", "one of cached, adapter_off, live", "'cache'"),
        ("objective.beta", "-1", "> 0 and finite", "-1.0"),
        ("objective.beta", "nan", "a finite number", "'nan'"),
        ("objective.label_smoothing", "0.7", "in [0, 0.5)", "0.7"),
    ]
]

CONTRADICTIONS = [
    Case(
        name="a reference that nothing needs",
        file=recipe("name: dpo", "name: sft") + "reference: {model: initial}",
        says=["reference has no effect: sft needs no reference model", "remove the section"],
    ),
    Case(
        name="the same on the command line",
        words="--objective sft --reference.source live",
        says=["reference has no effect: sft needs no reference model", "remove the section"],
    ),
    Case(
        name="epochs beside steps",
        file=recipe("rows_per_step: 4", "max_steps: 4, num_train_epochs: 1"),
        says=["train.num_train_epochs has no effect: train.max_steps decides", "remove it"],
    ),
    Case(
        name="eval_steps without steps",
        file=recipe("rows_per_step: 4", "eval_steps: 4"),
        says=["train.eval_steps has no effect: train.eval_strategy is not steps", "remove it"],
    ),
    Case(
        name="steps without eval_steps",
        words="--eval_strategy steps --eval_share 0.2",
        says=["train.eval_strategy steps needs train.eval_steps"],
    ),
    Case(
        name="evaluations of nothing",
        file=recipe("rows_per_step: 4", "eval_strategy: epoch"),
        says=["train.eval_strategy has no effect: data.eval_share 0", "remove it"],
    ),
    Case(
        name="save_steps without steps",
        file=recipe("save_strategy: 'no'", "save_strategy: epoch, save_steps: 1"),
        says=["train.save_steps has no effect", "remove it"],
    ),
    Case(
        name="a warm-up of a constant rate",
        file=recipe("rows_per_step: 4", "lr_scheduler_type: constant, warmup_steps: 0.1"),
        says=["train.warmup_steps has no effect", "constant_with_warmup", "remove it"],
    ),
    Case(
        name="a split of no eval set",
        file=recipe("eval_share: 0", "eval_split: test"),
        says=["data.eval_split has no effect: there is no data.eval_dataset_name", "remove it"],
    ),
    Case(
        name="a share beside an eval set",
        file=recipe("eval_share: 0", "eval_share: 0.1, eval_dataset_name: rows.jsonl"),
        says=["data.eval_share has no effect: data.eval_dataset_name gives the eval set", "remove it"],
    ),
    Case(
        name="one dataset beside several",
        file=recipe("dataset_name: rows.jsonl", "dataset_name: rows.jsonl, datasets: [{dataset_name: rows.jsonl}]"),
        says=["data", "give dataset_name or datasets, one of the two"],
    ),
    Case(
        name="columns beside several datasets",
        file=recipe("dataset_name: rows.jsonl", "datasets: [{dataset_name: rows.jsonl}]"),
        words="--data.columns.prompt question",
        says=["data.columns has no effect beside data.datasets", "write it inside each dataset"],
    ),
    Case(
        name="a list of no datasets",
        file=recipe("dataset_name: rows.jsonl", "datasets: []"),
        says=["data.datasets is empty", "name at least one"],
    ),
    Case(
        name="adapter_off without adapter",
        words="--reference.source adapter_off",
        says=["reference.source adapter_off needs a lora section", "use cached"],
    ),
    Case(
        name="base without adapter",
        words="--reference.model base",
        says=["reference.model base", "needs a lora section", "use initial"],
    ),
    Case(
        name="adapter_off of a trained adapter",
        words="--reference.source adapter_off --adapter_name_or_path ./adapter",
        says=["reference.source adapter_off is not the initial policy", "use source: cached, or model: base"],
    ),
    Case(
        name="dropout that is switched off",
        words="--lora_dropout 0.1",
        says=["lora.lora_dropout has no effect while train.allow_dropout is false", "set one of the two"],
    ),
    Case(
        name="settings of a trained adapter",
        words="--lora.r 4 --adapter_name_or_path ./adapter",
        says=["lora.r has no effect: it comes from lora.adapter_name_or_path", "remove it"],
    ),
    Case(
        name="resuming and overwriting",
        words="--resume_from_checkpoint last --overwrite_output_dir",
        says=["train.overwrite_output_dir would delete the checkpoint", "set one of the two"],
    ),
    Case(
        name="a private repository for nothing",
        words="--hub_private_repo",
        says=["hub.hub_private_repo has no effect: hub.push_to_hub is false", "remove it"],
    ),
]

NAMES = [
    Case(name="an unknown optimizer", words="--optim adam", says=["train.optim", "'adam'", "known: adamw_torch"]),
    Case(
        name="an unknown schedule",
        words="--lr_scheduler_type cosin",
        says=["train.lr_scheduler_type", "'cosin'", "did you mean 'cosine'?"],
    ),
    Case(
        name="a schedule that takes more than a recipe says",
        words="--lr_scheduler_type cosine_with_min_lr",
        says=["train.lr_scheduler_type cosine_with_min_lr", "min_lr", "use linear or cosine"],
    ),
    Case(
        name="a schedule that takes evaluations",
        words="--lr_scheduler_type reduce_lr_on_plateau",
        says=["train.lr_scheduler_type reduce_lr_on_plateau needs evaluations", "set train.eval_strategy"],
    ),
    Case(
        name="an unknown tracker",
        words="--report_to wanbd",
        says=["train.report_to", "'wanbd'", "did you mean 'wandb'?"],
    ),
    Case(
        name="a repository's name with two slashes",
        words="--push_to_hub --hub_model_id a/b/c",
        says=["hub", "'a/b/c' cannot be a repository", "use owner/name"],
    ),
    Case(name="a push to nowhere", words="--push_to_hub", says=["hub.push_to_hub needs hub_model_id"]),
    Case(
        name="a push without token",
        words="--push_to_hub --hub_model_id me/model",
        says=["hub", "no Hub token was found", "hf auth login", "push_to_hub: false"],
    ),
]

DATA = [
    Case(name="no such file", words="--dataset_name nope.jsonl", says=["nope.jsonl: no such file", "write owner/name"]),
    Case(
        name="no such dataset",
        words="--dataset_name me/nope",
        says=["me/nope: the Hub can't be reached", "give a local file or folder"],
    ),
    Case(
        name="a folder without data",
        words="--dataset_name ./nothing",
        arrange=lambda: Path("nothing").mkdir(),
        says=["./nothing: the folder holds no data files", "expected json, jsonl, parquet"],
    ),
    Case(
        name="a kind of file nobody reads",
        words="--dataset_name ./rows.txt",
        arrange=write("rows.txt", "x"),
        says=["./rows.txt: don't know how to read .txt", "json, jsonl, parquet, arrow or csv"],
    ),
    Case(name="an empty file", rows="", says=["rows.jsonl: the dataset has no rows in split 'train'", "name one that"]),
    Case(
        name="a broken line",
        rows=json.dumps(pairs()[0]) + '\n\n{"prompt": \n',
        says=["rows.jsonl, line 3: not valid JSON", "expected one object per line"],
    ),
    Case(name="not UTF-8", rows=b'{"prompt": "\xff\xfe"}', says=["rows.jsonl: not UTF-8", "convert the file to UTF-8"]),
    Case(
        name="columns of other names",
        rows=renamed(prompt="question", chosen="better", rejected="worse"),
        says=[
            *("rows.jsonl: found columns 'question' (text), 'better' (text), 'worse' (text)", "expected prompt"),
            "set data.columns: {prompt: question, chosen: better, rejected: worse}",
        ],
    ),
    Case(
        name="columns that say nothing",
        rows=renamed(prompt="a", chosen="b", rejected="c"),
        says=["rows.jsonl: found columns 'a' (text)", "say which is which with data.columns: {prompt: <column>, …}"],
    ),
    Case(name="no columns", rows="1\n2\n", says=["rows.jsonl: found no columns", "expected prompt + chosen"]),
    Case(
        name="a mapping to a column that isn't there",
        words="--columns '{prompt: promt}'",
        says=["rows.jsonl: data.columns maps prompt to 'promt'", "did you mean 'prompt'?"],
    ),
    Case(
        name="a mapping from a column that isn't ours",
        words="--columns '{propmt: prompt}'",
        says=["data.columns: 'propmt' is no column of ours", "did you mean 'prompt'?"],
    ),
    Case(name="an unknown format", words="--format pair", says=["data.format", "'pair'", "did you mean 'paired'?"]),
    Case(
        name="no such split", words="--dataset_train_split dev", says=["rows.jsonl: there is no split 'dev'", "'train'"]
    ),
    Case(
        name="a slice for a split",
        words="--dataset_train_split 'train[:5]'",
        says=["rows.jsonl: split 'train[:5]'", "name one split, and set data.max_rows"],
    ),
    Case(
        name="a configuration of a file",
        words="--dataset_config 2024",
        says=["rows.jsonl: a file has no configurations", "leave out dataset_config '2024'"],
    ),
    Case(
        name="all responses alike",
        rows=each(chosen=" Yes.", rejected=" Yes."),
        says=["rows.jsonl: none of 8 rows can be used", "row 0: identical chosen and rejected", "mend the rows"],
    ),
    Case(
        name="all responses empty",
        rows=each(chosen="", rejected=" "),
        says=["rows.jsonl: none of 8 rows can be used", "row 0: empty chosen response", "data.columns"],
    ),
    Case(
        name="no response at all",
        rows=each(rejected=None),
        says=["rows.jsonl: none of 8 rows can be used", "row 0: no rejected", "data.columns"],
    ),
    Case(
        name="text beside messages",
        rows=[{"chosen": row["chosen"], "rejected": [{"role": "assistant", "content": "x"}]} for row in pairs()],
        says=["rows.jsonl: none of 8 rows", "row 0: one of chosen and rejected is text and the other messages"],
    ),
    Case(
        name="lists of text",
        rows=[row | {"rejected": [row["rejected"]]} for row in pairs()],
        says=["rows.jsonl: found columns", "'rejected' (list of text)", "expected prompt + chosen + rejected"],
    ),
    Case(name="numbers", rows=each(rejected=3), says=["rows.jsonl: found columns", "'rejected' (number)", "expected"]),
    Case(
        name="too many rows dropped",
        rows=[row | {"rejected": row["chosen"]} if i else row for i, row in enumerate(pairs(4))],
        says=["rows.jsonl: 75% of 4 rows can't be used (3 × identical", "data.max_dropped_share 0.76"],
    ),
    Case(
        name="a context too short for every row",
        rows=each(prompt="x" * CONTEXT),
        says=["rows.jsonl: no row can be trained on (8 × the prompt leaves fewer than 16", "data.max_length (128)"],
    ),
    Case(
        name="a row that may not be cut",
        words="--truncation raise",
        rows=[*pairs(3), pairs()[3] | {"prompt": "x" * CONTEXT}],
        says=["rows.jsonl, row 3", "exceed data.max_length 128", "set data.truncation to truncate_response_end"],
    ),
    Case(
        name="max_length beyond the context",
        words="--max_length 4096",
        says=["data.max_length 4096 exceeds the model's context of 128 tokens", "lower it"],
    ),
    Case(
        name="a budget below the longest row",
        words="--token_budget 20",
        says=["train.token_budget 20 is smaller than the longest row (40 positions", "set it to at least 40"],
    ),
    Case(
        name="a weight that leaves no row",
        file=recipe("dataset_name: rows.jsonl", "datasets: [{dataset_name: rows.jsonl, weight: 0.001}]"),
        says=["rows.jsonl: weight 0.001 of 8 rows leaves none", "raise the weight"],
    ),
    Case(
        name="no such eval set",
        file=recipe("eval_share: 0", "eval_dataset_name: nope.jsonl"),
        says=["nope.jsonl: no such file", "write owner/name"],
    ),
    Case(
        name="no such split of the eval set",
        file=recipe("eval_share: 0", "eval_dataset_name: rows.jsonl, eval_split: test"),
        says=["rows.jsonl: there is no split 'test'", "it has 'train'"],
    ),
    Case(
        name="an eval set without usable rows",
        file=recipe("eval_share: 0", "eval_dataset_name: long.jsonl"),
        arrange=lambda: write_rows(Path("long.jsonl"), each(prompt="x" * CONTEXT)),
        says=["long.jsonl: no row can be evaluated on", "data.max_length (128)"],
    ),
    Case(
        name="a template that refuses",
        words="--chat_template no.jinja",
        rows=chats(pairs()),
        arrange=write("no.jinja", "{{ raise_exception('no users') }}"),
        says=["rows.jsonl, row 0: the chat template refuses", "no users", "model.chat_template"],
    ),
]

MODELS = [
    Case(
        name="no such folder",
        words="--model_name_or_path ./nope",
        says=["model.model_name_or_path: there is no folder './nope'"],
    ),
    Case(
        name="no such model on the Hub",
        words="--model_name_or_path me/nope",
        says=[
            "model.model_name_or_path: can't load the configuration of 'me/nope'",
            "check the name, or give a folder",
        ],
    ),
    Case(
        name="a folder without model",
        words="--model_name_or_path ./nothing",
        arrange=lambda: Path("nothing").mkdir(),
        says=["model.model_name_or_path: the folder './nothing' holds no model (no config.json)", "name one that does"],
    ),
    Case(
        name="a broken configuration",
        arrange=write("model/config.json", "{"),
        says=["model.model_name_or_path", "config.json' is not a valid JSON file", "check the name"],
    ),
    Case(
        name="an encoder",
        words="--model_name_or_path ./bert",
        arrange=an_encoder,
        says=["model.model_name_or_path: './bert' is a bert model, not a causal language model", "name one that is"],
    ),
    Case(
        name="an encoder and decoder",
        words="--model_name_or_path ./t5",
        arrange=lambda: T5Config().save_pretrained("t5"),
        says=["model.model_name_or_path: './t5' is a t5 model, not a causal language model", "name one that is"],
    ),
    Case(
        name="an encoder for a reference",
        words="--reference.model ./bert",
        arrange=an_encoder,
        says=["reference.model: './bert' is a bert model", "name one that is"],
    ),
    Case(name="no such reference", words="--reference.model ./nope", says=["reference.model: there is no folder"]),
    Case(
        name="no weights",
        arrange=remove("model/model.safetensors"),
        says=["model.model_name_or_path", "'./model' holds no weights", "copy or download it again"],
    ),
    Case(
        name="weights cut off",
        arrange=cut_in_half("model/model.safetensors"),
        says=["model/model.safetensors is damaged", "copy or download the model again"],
    ),
    Case(
        name="a shard missing",
        arrange=write("model/model.safetensors.index.json", '{"weight_map": {"a": "model-2-of-2.safetensors"}}'),
        says=["model/model-2-of-2.safetensors is missing", "copy or download the model again"],
    ),
    Case(
        name="a layer missing",
        arrange=change_weights(lambda w: [w.pop(name) for name in list(w) if "layers.1" in name]),
        says=["'./model' lacks 9 weights (model.layers.1.", "random numbers", "copy or download the model again"],
        model_loaded=True,
    ),
    Case(
        name="a weight of another shape",
        arrange=change_weights(lambda w: w.update({"model.norm.weight": torch.ones(16)})),
        says=["'./model' holds model.norm.weight of shape [16]", "config.json says [32]", "copy or download"],
        model_loaded=True,
    ),
    Case(
        name="weights that are no numbers",
        arrange=change_weights(lambda w: w["model.norm.weight"].fill_(torch.nan)),
        says=["log-probs that are not finite before any training", "check its weights, model.dtype"],
        model_loaded=True,
    ),
    Case(
        name="attention that has no backward here",
        words="--attn_implementation flex_attention",
        says=["model.attn_implementation flex_attention can't be trained on a CPU", "use auto or sdpa"],
    ),
    Case(
        name="no tokenizer",
        words="--tokenizer_name_or_path ./nope",
        says=["model.tokenizer_name_or_path: there is no folder './nope'"],
    ),
    Case(
        name="a broken tokenizer",
        arrange=write("model/tokenizer.json", "{"),
        says=["can't load a tokenizer from './model'", "set model.tokenizer_name_or_path"],
    ),
    Case(
        name="a tokenizer without end token",
        words="--tokenizer_name_or_path ./tokenizer",
        arrange=a_tokenizer_without_end,
        says=["the tokenizer of './tokenizer' has no end token", "set model.eos_token"],
    ),
    Case(
        name="an end token that is no token",
        words="--eos_token '</s>'",
        says=["model.eos_token '</s>' is not a token of './model'", "such as '<end>'"],
    ),
    Case(
        name="a tokenizer of another model",
        words="--tokenizer_name_or_path ./tokenizer",
        arrange=a_larger_tokenizer,
        says=["the tokenizer gives token 307 and './model' knows 260", "set model.tokenizer_name_or_path"],
    ),
    Case(
        name="no template",
        words="--chat_template nope.jinja",
        says=["model.chat_template: there is no file 'nope.jinja'"],
    ),
    Case(
        name="a template that is no text",
        words="--chat_template bytes.jinja",
        arrange=write("bytes.jinja", b"\xff\xfe\x81"),
        says=["model.chat_template: can't read 'bytes.jinja'", "give a Jinja template as text"],
    ),
    Case(
        name="modules that are not there",
        words="--target_modules '[query]'",
        says=["lora.target_modules: no module of the model is called 'query'", "q_proj, up_proj, v_proj"],
    ),
    Case(
        name="one module of two that is not there",
        words="--target_modules '[q_proj, query]'",
        says=["lora.target_modules: no module of the model is called 'query'", "q_proj, up_proj, v_proj"],
    ),
    Case(
        name="a pattern that matches nothing",
        words="--target_modules q_proj",
        says=["lora.target_modules: no module's full name matches the pattern 'q_proj'", "all-linear or a list of"],
    ),
    Case(
        name="a module that can't be adapted",
        words="--target_modules '[mlp]'",
        says=["lora.target_modules ['mlp'] does not fit the model", "name some of its linear layers"],
    ),
    Case(
        name="a module to save that is not there",
        words="--modules_to_save '[head]'",
        says=["lora.modules_to_save: no module of the model is called 'head'", "lm_head"],
    ),
    Case(
        name="no such adapter",
        words="--adapter_name_or_path ./nope",
        says=["lora.adapter_name_or_path: there is no folder './nope'"],
    ),
    Case(
        name="a folder without adapter",
        words="--adapter_name_or_path ./model",
        says=["lora.adapter_name_or_path: can't load the adapter './model'", "check the name"],
    ),
]

OUTPUT = [
    Case(
        name="a folder with a run",
        trained=True,
        says=["run already holds a run", "--output_dir", "--resume_from_checkpoint last", "--overwrite_output_dir"],
    ),
    Case(
        name="a folder with a checkpoint",
        words="--output_dir old",
        arrange=lambda: (Path("old/checkpoint-3").mkdir(parents=True), write("old/checkpoint-3/manifest.json")()),
        says=["old already holds a run (checkpoint-3)", "--output_dir"],
    ),
    Case(name="a file", words="--output_dir rows.jsonl", says=["train.output_dir 'rows.jsonl' is a file", "name a"]),
    Case(
        name="a folder in a file",
        words="--output_dir rows.jsonl/run",
        says=["can't write to train.output_dir 'rows.jsonl/run' (Not a directory)", "choose another --output_dir"],
    ),
    Case(
        name="a folder nobody may make",
        words="--output_dir /proc/run",
        says=["can't write to train.output_dir '/proc/run'", "choose another --output_dir"],
    ),
]


def as_if_by(engine: str, processes: int) -> None:
    """The newest checkpoint, written by another engine."""
    folder = Path("run/checkpoint-4")
    stored = json.loads((folder / saving.STATE).read_text()) | {"engine": engine, "processes": processes}
    (folder / saving.STATE).write_text(json.dumps(stored))
    saving.write_manifest(folder)


RESUME = [
    Case(
        name="last of none",
        words="--resume_from_checkpoint last",
        says=["train.resume_from_checkpoint last: run holds no complete checkpoint", "leave the key out"],
    ),
    Case(
        name="no such checkpoint",
        words="--resume_from_checkpoint run/checkpoint-7",
        trained=True,
        says=["train.resume_from_checkpoint: there is no folder 'run/checkpoint-7'", "use last"],
    ),
    Case(
        name="another recipe",
        words="--resume_from_checkpoint last --learning_rate 5e-5 --beta 0.3",
        trained=True,
        says=["run/checkpoint-4", "train.learning_rate was 1e-06, is 5e-05", "objective.0.beta", "new output_dir"],
    ),
    *[
        Case(
            name=f"another recipe: {words}",
            words=f"--resume_from_checkpoint last {words}",
            trained=True,
            says=["run/checkpoint-4 belongs to another recipe", *says, "start a new output_dir"],
        )
        for words, says in [
            ("--modifiers wpo", ["modifiers was None", "'wpo'"]),
            ("--regularizers wise_ft", ["regularizers was None", "'wise_ft'"]),
            ("--objective robust", ["objective.0.name was 'dpo', is 'robust'"]),
            ("--reference.source live --modifiers tr_dpo", ["reference.source was 'cached', is 'live'", "'tr_dpo'"]),
        ]
    ],
    Case(
        name="other rows under the same name",
        words="--resume_from_checkpoint last",
        trained=True,
        rows=pairs(12),
        says=["run/checkpoint-4 was trained on other rows than data.dataset_name holds now", "restore the data"],
    ),
    Case(
        name="a flipped bit",
        words="--resume_from_checkpoint run/checkpoint-4",
        trained=True,
        arrange=flip_a_bit("run/checkpoint-4/model.safetensors"),
        says=[
            "run/checkpoint-4 is damaged: model.safetensors has changed",
            "--resume_from_checkpoint run/checkpoint-2",
        ],
    ),
    Case(
        name="a file missing",
        words="--resume_from_checkpoint run/checkpoint-4",
        trained=True,
        arrange=remove("run/checkpoint-4/optimizer.pt"),
        says=["run/checkpoint-4 is damaged: optimizer.pt is missing", "--resume_from_checkpoint run/checkpoint-2"],
    ),
    Case(
        name="no manifest",
        words="--resume_from_checkpoint run/checkpoint-4",
        trained=True,
        arrange=remove("run/checkpoint-4/manifest.json"),
        says=["run/checkpoint-4 is not a complete checkpoint", "--resume_from_checkpoint run/checkpoint-2"],
    ),
    Case(
        name="a manifest of something else",
        words="--resume_from_checkpoint run/checkpoint-4",
        trained=True,
        arrange=write("run/checkpoint-4/manifest.json", "[1]"),
        says=["run/checkpoint-4 is damaged: manifest.json", "--resume_from_checkpoint run/checkpoint-2"],
    ),
    Case(
        name="no other checkpoint",
        words="--resume_from_checkpoint last",
        trained=True,
        arrange=lambda: (shutil.rmtree("run/checkpoint-2"), write("run/checkpoint-4/manifest.json", "{")()),
        says=["holds no complete checkpoint (checkpoint-4 was passed over", "manifest.json", "another output_dir"],
    ),
    Case(
        name="a change without a checkpoint",
        words="--allow_recipe_change",
        says=["train.allow_recipe_change has no effect without train.resume_from_checkpoint", "leave it out"],
    ),
    Case(
        name="another engine",
        words="--resume_from_checkpoint last",
        trained=True,
        arrange=lambda: as_if_by("zero3", 2),
        says=["checkpoint-4 was written by zero3", "launched with single", "launch with zero3", "align.export"],
    ),
    Case(
        name="auto beside a finished run that left no checkpoint",
        words="--resume_from_checkpoint auto",
        trained=True,
        arrange=lambda: [shutil.rmtree(f"run/checkpoint-{step}") for step in (2, 4)],
        says=["run already holds a run", "--overwrite_output_dir"],
    ),
]

PARTS = [
    Case(
        name="a token weight without a likelihood term",
        words="--token_weights goldfish",
        says=["token_weights: goldfish weighs likelihood terms, and this objective has none"],
    ),
    Case(
        name="an adaptive one without a likelihood term",
        words="--objective bco --token_weights '[{name: talr}]'",
        says=["token_weights: talr weighs likelihood terms, and this objective has none"],
    ),
    Case(
        name="a likelihood term of weight nothing",
        words="--objective tpo --objective.alpha 0 --token_weights goldfish",
        says=["token_weights: goldfish weighs likelihood terms, and this objective has none"],
    ),
    Case(
        name="a token weight on a leg without one",
        words="--objective irpo --token_weights '[{name: goldfish, legs: [rejected]}]'",
        says=["token_weights: goldfish can't act on 'rejected'", "only chosen has a likelihood term"],
    ),
    Case(
        name="a token weight twice",
        words="--objective irpo --token_weights '[talr, talr]'",
        says=["token_weights: talr is listed twice"],
    ),
    Case(
        name="a leg twice",
        words="--objective irpo --token_weights '[{name: talr, legs: [chosen, chosen]}]'",
        says=["token_weights: talr lists a leg twice"],
    ),
    Case(
        name="a misspelt token weight",
        words="--objective irpo --token_weights goldfsh",
        says=["token_weights.name: unknown", "'goldfsh'", "did you mean 'goldfish'?"],
    ),
    Case(
        name="a misspelt relabeler",
        words="--relabel '[{name: reward_augmentd}]'",
        says=["relabel.0.name: unknown", "'reward_augmentd'", "did you mean 'reward_augmented'?"],
    ),
    Case(
        name="a misspelt key of a token weight",
        words="--objective irpo --token_weights '[{name: talr, min_wieght: 0.1}]'",
        says=["token_weights.0.min_wieght", "did you mean 'min_weight'?"],
    ),
    Case(name="a number for a relabeler", words="--relabel 3", says=["relabel must be a mapping with a name", "got 3"]),
    Case(name="no relabeler", words="--relabel '[]'", says=["relabel is empty; leave it out"]),
    Case(name="no token weight", words="--token_weights '[]'", says=["token_weights is empty; leave it out"]),
    *[
        Case(
            name=f"{name} {keys} is idle",
            words=f"--objective {objective} --token_weights '[{{name: {name}, {keys}}}]'",
            says=[f"token_weights.0.{key} has no effect: {reason}", "remove it"],
        )
        for objective, name, keys, key, reason in [
            ("irpo", "goldfish", "strategy: static, h: 4", "h", "strategy static has none"),
            ("irpo", "goldfish", "strategy: hash, start: 1", "start", "strategy hash has none"),
            ("irpo", "goldfish", "start: 1", "start", "strategy hash has none"),
        ]
    ],
    *[
        Case(
            name=f"{key} without prompt_encoder",
            file=recipe("name: dpo", f"name: bco, {key}: 2"),
            says=[f"objective.{key} has no effect: there is no prompt_encoder", "remove it"],
        )
        for key in ("min_density_ratio", "max_density_ratio", "prompt_sample_size")
    ],
    Case(
        name="two prompt encoders",
        words="--objective '[{name: bco, prompt_encoder: policy}, {name: bco, prompt_encoder: ./bert}]'",
        says=["objective: all objectives must take one prompt encoder, got 'policy', './bert'"],
    ),
    Case(
        name="flow with a live reference",
        words="--objective irpo --token_weights flow --reference.source live",
        says=["token_weights: flow takes reference {model: initial, source: cached}", "leave it out"],
    ),
    Case(
        name="flow with another reference",
        words="--objective sft --token_weights flow --reference.model ./model",
        says=["token_weights: flow takes reference {model: initial, source: cached}", "leave it out"],
    ),
    *[
        Case(
            name=f"relabelling for {objective}",
            words=f"--objective {objective} --relabel reward_augmented",
            says=[f"relabel: reward_augmented makes rows of chosen and rejected, and the objective takes {leg}"],
        )
        for objective, leg in [("sft", "gold"), ("tpo", "gold"), ("bco", "completion"), ("kto", "completion")]
    ],
    *[
        Case(name=f"{words} of {name}", words=f"{begin} {words}", says=[where, f"must be {expected}", f"got {got}"])
        for begin, name, where, values in [
            (
                "--objective irpo --token_weights '[goldfish]' --token_weights.0.name goldfish",
                "goldfish",
                "token_weights.0.",
                [
                    ("--k 1", ">= 2", "1"),
                    ("--k 2.5", "a whole number", "2.5"),
                    ("--h 0", ">= 1", "0"),
                    ("--strategy hashed", "'hash' or 'static'", "'hashed'"),
                    ("--token_weights.0.start 4", "in [0, k), k = 4", "4"),
                    ("--legs 5", "a list", "5"),
                ],
            ),
            (
                "--objective irpo --token_weights '[{name: talr}]'",
                "talr",
                "token_weights.0.",
                [
                    ("--min_weight 0", "in (0, 1]", "0.0"),
                    ("--min_weight 1.5", "in (0, 1]", "1.5"),
                    ("--min_tau 0", "> 0 and finite", "0.0"),
                    ("--min_tau nan", "a finite number", "'nan'"),
                ],
            ),
            (
                "--relabel '[{name: reward_augmented}]'",
                "reward_augmented",
                "relabel.0.",
                [
                    ("--form prompt", "'system' or 'text'", "'prompt'"),
                    ("--highest 0", "above lowest (1) and finite", "0.0"),
                    ("--decimals 9", "in [0, 6]", "9"),
                ],
            ),
            (
                "--objective bco",
                "bco",
                "objective.",
                [
                    ("--beta 0", "> 0 and finite", "0.0"),
                    ("--prompt_encoder policy --min_density_ratio -1", ">= 0 and finite", "-1.0"),
                    ("--prompt_encoder policy --max_density_ratio 0.1", "at least min_density_ratio (0.5)", "0.1"),
                    ("--prompt_encoder policy --prompt_sample_size 0", ">= 1", "0"),
                ],
            ),
            ("--objective kto", "kto", "objective.", [("--desirable_weight 0", "> 0 and finite", "0.0")]),
            (
                "--objective tpo",
                "tpo",
                "objective.",
                [
                    ("--alpha -1", ">= 0 and finite", "-1.0"),
                    ("--label_smoothing 0.5", "in [0, 0.5)", "0.5"),
                    ("--link log", "'sigmoid', 'hinge' or 'ipo'", "'log'"),
                ],
            ),
            ("--objective tpo_l", "tpo_l", "objective.", [("--gamma -1", ">= 0 and finite", "-1.0")]),
            (
                "--objective rpo",
                "rpo",
                "objective.",
                [
                    ("--eta 0", "> 0 and finite", "0.0"),
                    ("--objective.form mean", "'cumulative' or 'average'", "'mean'"),
                ],
            ),
            (
                "--objective irpo",
                "irpo",
                "objective.",
                [("--alpha 0", "> 0 and finite", "0.0"), ("--objective.form row", "'token' or 'sequence'", "'row'")],
            ),
        ]
        for words, expected, got in values
    ],
    Case(
        name="a prompt encoder without name",
        file=recipe("name: dpo", "name: bco, prompt_encoder: ' '"),
        says=["objective.prompt_encoder must be null, 'policy' or an encoder", "got ' '"],
    ),
    Case(
        name="smoothing of a hinge",
        words="--objective tpo --link hinge --label_smoothing 0.1",
        says=["objective", "label_smoothing has no meaning with link hinge", "use link sigmoid, or leave it out"],
    ),
]

NOT_ABOUT_PAIRS = "it is not about log-probs of pairs"
PER_TOKEN = "its log-probs are per token, so length is accounted for"
ONE_BY_ONE = "each reward enters by itself, not the difference alone, so log Z(x) would not cancel"
COUPLED = "its rows are coupled by the step"
NO_BETA = "it has no β to scale, or sets β itself"
SENSELESS = {
    "r_dpo": {
        **dict.fromkeys(["ipo", "simpo", "dpo_norm", "orpo", "tpo_l", "alpha_po"], PER_TOKEN),
        **dict.fromkeys(["nca", "bco_pair", "sppo", "apo_zero", "apo_down", "dpop", "cal_dpo", "tdpo"], ONE_BY_ONE),
        **dict.fromkeys(["aot", "aot_unpaired", "beta_dpo"], COUPLED),
        **dict.fromkeys(["kto", "bco", "sft", "dco", "ntl_was", "bradley_terry", "nash_md"], NOT_ABOUT_PAIRS),
    },
    "ld_dpo": {
        "tdpo": "it compares whole distributions token by token",
        **dict.fromkeys(["kto", "sft", "reward_regression"], NOT_ABOUT_PAIRS),
    },
    "wpo": {
        **dict.fromkeys(["aot", "beta_dpo"], f"{COUPLED}, so a row has no loss of its own to weigh"),
        **dict.fromkeys(["bco", "sft", "dco", "scaled_bt"], NOT_ABOUT_PAIRS),
    },
    "mm_dpo": {
        "aot_unpaired": COUPLED,
        **dict.fromkeys(["beta_dpo", "orpo"], NO_BETA),
        **dict.fromkeys(["apo_zero_unpaired", "sft", "margin_bt"], NOT_ABOUT_PAIRS),
    },
    "f_divergence": {
        **dict.fromkeys(["cpo", "simpo", "orpo", "tpo"], "it has no reference to diverge from"),
        **dict.fromkeys(["nca", "dpop", "tdpo"], ONE_BY_ONE),
        **dict.fromkeys(["aot", "beta_dpo"], COUPLED),
        **dict.fromkeys(["kto", "ntl_mse"], NOT_ABOUT_PAIRS),
    },
    "tr_dpo": dict.fromkeys(["simpo", "cpo", "orpo", "tpo", "sft", "dco", "bradley_terry"], "it has no reference"),
}
"""Modifiers, the objectives that they make no sense for, and why."""

MODIFIERS = [
    *[
        Case(
            name=f"{modifier} of {objective}",
            words=f"--objective {objective} --modifiers {modifier}",
            says=[f"modifiers: {modifier} has nothing to act on: it makes no sense for {objective}: {reason}"],
        )
        for modifier, objectives in SENSELESS.items()
        for objective, reason in objectives.items()
    ],
    Case(
        name="a modifier of neither of two objectives",
        words="--objective '[{name: sft, leg: chosen}, {name: aot}]' --modifiers f_divergence",
        says=[f"f_divergence has nothing to act on: it makes no sense for sft: {NOT_ABOUT_PAIRS}", f"aot: {COUPLED}"],
    ),
    Case(
        name="the second of two modifiers",
        words="--objective simpo --modifiers '[wpo, r_dpo]'",
        says=[f"modifiers: r_dpo has nothing to act on: it makes no sense for simpo: {PER_TOKEN}"],
    ),
    Case(
        name="a modifier of a program per token",
        words="--objective '{name: symbolic, program: rejected -> chosen}' --modifiers r_dpo",
        says=[f"r_dpo has nothing to act on: it makes no sense for symbolic: {PER_TOKEN}"],
    ),
    *[
        Case(
            name=f"{name} twice",
            words=f"--modifiers '[{name}, wpo, {name}]'",
            says=[f"modifiers: {name} is listed twice"],
        )
        for name in ("r_dpo", "f_divergence")
    ],
    Case(
        name="two answers to length",
        words="--modifiers '[ld_dpo, {name: r_dpo, length_alpha: 0.1}]'",
        says=["modifiers: r_dpo and ld_dpo both take the effect of length away", "keep one"],
    ),
    Case(
        name="a misspelt modifier",
        words="--modifiers wop",
        says=["modifiers.name: unknown modifier 'wop'; did you mean 'wpo'?", "known: f_divergence, ld_dpo"],
    ),
    Case(
        name="a misspelt modifier in a list",
        file=recipe(more="modifiers: [wpo, {name: r_dop}]"),
        says=["modifiers.1.name: unknown modifier 'r_dop'; did you mean 'r_dpo'?"],
    ),
    Case(
        name="a misspelt key of a modifier",
        words="--modifiers '{name: wpo, clmap: true}'",
        says=["modifiers.clmap; did you mean 'clamp'?"],
    ),
    Case(
        name="TRL's key of a modifier",
        file=recipe(more="modifiers: [{name: tr_dpo, ref_model_sync_steps: 64}]"),
        says=["modifiers.0.ref_model_sync_steps", "did you mean 'sync_steps'?"],
    ),
    Case(
        name="a misspelt section of modifiers", words="--modifier wpo", says=["--modifier", "did you mean 'modifiers'?"]
    ),
    Case(
        name="a listed modifier without its number",
        words="--modifiers '[wpo]' --modifiers.clamp false",
        says=["--modifiers.clamp: the recipe lists several modifiers; write --modifiers.0.clamp"],
    ),
    Case(
        name="a number beyond the modifiers",
        words="--modifiers '[wpo, mm_dpo]' --modifiers.2.scaling 1",
        says=["--modifiers.2.scaling: the recipe has 2 listed modifiers, numbered from 0"],
    ),
    *[
        Case(name=f"no {kind}", words=f"--{kind} '[]'", says=[f"{kind} is empty; leave it out, or write null"])
        for kind in ("modifiers", "regularizers")
    ],
    *[
        Case(name=f"a number for {kind}", words=f"--{kind} 3", says=[f"{kind} must be a mapping with a name", "got 3"])
        for kind in ("modifiers", "regularizers")
    ],
    Case(
        name="a name for a key",
        file=recipe(more="modifiers: {wpo: {clamp: true}}"),
        says=["modifiers must be a mapping with a name", "got {'wpo': {'clamp': True}}"],
    ),
    *[
        Case(
            name=f"an α of divergence {divergence}",
            words=f"--modifiers '{{name: f_divergence, divergence: {divergence}, divergence_alpha: 0.3}}'",
            says=[f"modifiers.divergence_alpha has no effect: divergence {divergence} has none; remove it"],
        )
        for divergence in ("js", "forward_kl")
    ],
]

TDPO_CACHED = [
    "objective: tdpo compares whole distributions of policy and reference, and reference.source cached keeps one",
    "set reference.source to live, or with a lora section to adapter_off",
]
REFERENCES = [
    Case(name="tdpo with a cache", words="--objective tdpo", says=TDPO_CACHED),
    Case(name="tdpo with a cache and an adapter", words="--objective tdpo --lora.r 4", says=TDPO_CACHED),
    Case(name="tdpo among others", words="--objective '[{name: dpo}, {name: tdpo}]'", says=TDPO_CACHED),
    Case(
        name="tdpo with the adapter off and none there",
        words="--objective tdpo --reference.source adapter_off",
        says=["reference.source adapter_off needs a lora section"],
    ),
    Case(
        name="tr_dpo with a cache",
        words="--modifiers tr_dpo",
        says=["modifiers: tr_dpo moves the reference, which a cache can't; set reference.source to live"],
    ),
    *[
        Case(
            name=f"tr_dpo with an adapter and a reference {source}",
            words=f"--modifiers tr_dpo --lora.r 4 --reference.source {source}",
            says=["modifiers: tr_dpo moves all weights of the reference; leave the lora section out"],
        )
        for source in ("cached", "live", "adapter_off")
    ],
    Case(
        name="tr_dpo with flow",
        words="--objective irpo --modifiers tr_dpo --reference.source live --token_weights flow",
        says=["modifiers: tr_dpo moves the reference that token_weights take from the start; keep one"],
    ),
    *[
        Case(
            name=f"a reference that {objective} needs none of",
            words=f"--objective {objective} --reference.source live",
            says=[f"reference has no effect: {objective} needs no reference model; remove the section"],
        )
        for objective in ("simpo", "orpo", "bradley_terry")
    ],
]

REGULARIZERS = [
    Case(
        name="a misspelt regularizer",
        words="--regularizers l2_int",
        says=["regularizers.name: unknown regularizer 'l2_int'; did you mean 'l2_init'?", "known: l2_init, wise_ft"],
    ),
    Case(
        name="a misspelt key of a regularizer",
        words="--regularizers '[{name: wise_ft, tuned_shre: 0.5}]'",
        says=["regularizers.0.tuned_shre; did you mean 'tuned_share'?"],
    ),
    Case(
        name="a misspelt section of regularizers",
        file=recipe(more="regularisers: l2_init"),
        says=["unknown section 'regularisers'; did you mean 'regularizers'?"],
    ),
    *[
        Case(
            name=f"{name} twice",
            words=f"--regularizers '[{name}, {name}]'",
            says=[f"regularizers: {name} is listed twice; keep one"],
        )
        for name in ("l2_init", "wise_ft")
    ],
    *[
        Case(
            name=f"l2_init of an adapter, {words}",
            words=f"--regularizers {words} --lora.r 4",
            says=["regularizers: l2_init is of all weights, and with a lora section they don't move; leave one out"],
        )
        for words in ("l2_init", "'[wise_ft, l2_init]'")
    ],
    *[
        Case(
            name=f"wise_ft with {words}",
            words=f"--regularizers wise_ft {words}",
            says=[
                "regularizers: wise_ft needs an adapter that starts as nothing and is a sum of weights",
                "leave lora.adapter_name_or_path, lora.modules_to_save and lora.use_dora out",
            ],
        )
        for words in ("--lora.use_dora true", "--modules_to_save '[lm_head]'", "--adapter_name_or_path ./adapter")
    ],
    Case(
        name="a misspelt reward transform",
        words="--reward_transforms zscore",
        says=["reward_transforms.name: unknown reward transform 'zscore'; did you mean 'z_score'?"],
    ),
    Case(
        name="a misspelt sample weight",
        words="--objective irpo --token_weights lin_uper",
        says=["token_weights.name: unknown token weight 'lin_uper'; did you mean 'lin_upper'?"],
    ),
    Case(
        name="a sample weight without a likelihood term",
        words="--token_weights lin_upper",
        says=["token_weights: lin_upper weighs likelihood terms, and this objective has none"],
    ),
    Case(
        name="a sample weight twice",
        words="--objective irpo --token_weights '[lin_upper, dft, lin_upper]'",
        says=["token_weights: lin_upper is listed twice"],
    ),
]

REWARD_MODELS = [
    *[
        Case(
            name=f"{first} beside {second}",
            words=f"--objective '[{{name: {first}}}, {{name: {second}}}]'",
            says=[f"objective: {head} trains a scalar head and {other} a language model; take one of them"],
        )
        for first, second, head, other in [
            ("bradley_terry", "dpo", "bradley_terry", "dpo"),
            ("kto", "reward_regression", "reward_regression", "kto"),
            ("simpo", "scaled_bt", "scaled_bt", "simpo"),
        ]
    ],
    Case(
        name="a token weight of a reward model",
        words="--objective bradley_terry --token_weights dft",
        says=["token_weights: dft weighs likelihood terms, and this objective has none"],
    ),
    Case(
        name="an architecture without scalar heads",
        words="--objective bradley_terry --model_name_or_path ./mamba",
        arrange=a_mamba,
        says=["'./mamba' is a mamba model, for which transformers has no scalar head; name another model"],
    ),
    Case(
        name="a module to save that a reward model has not",
        words="--objective bradley_terry --lora.modules_to_save '[lm_head]'",
        says=["lora.modules_to_save: no module of the model is called 'lm_head'", "score"],
    ),
]

OUT_OF_RANGE = {
    "objective": {
        "robust": [("beta", "0", "> 0 and finite"), ("label_smoothing", "0.5", "in [0, 0.5)")],
        "dpo_norm": [("beta", "-1", "> 0 and finite")],
        "dpop": [("beta", "0", "> 0 and finite"), ("penalty", "-1", ">= 0 and finite")],
        "ipo": [("beta", "0", "> 0 and finite"), ("reduction", "max", "'mean' or 'sum'")],
        "exo": [
            ("label_smoothing", "0", "in (0, 0.5), 0.001 in TRL; at 0 the loss is infinite"),
            ("label_smoothing", "0.5", "in (0, 0.5)"),
        ],
        "discopop": [("tau", "2", "in (0, 1], 0.05 in the paper"), ("tau", "0", "in (0, 1]")],
        "bco_pair": [("shift", "balanced", "'mean' or 'none'")],
        **{name: [("beta", "0", "> 0 and finite")] for name in ("cal_dpo", "hinge", "nca", "sppo")},
        **{name: [("beta", "-0.1", "> 0 and finite")] for name in ("apo_zero", "apo_down", "aot", "aot_unpaired")},
        "beta_dpo": [
            ("modulation", "-1", ">= 0 and finite, 0.6 in the paper"),
            ("filtered", "1", "in [0, 1), 0.2 in the paper"),
            ("momentum", "1", "in [0, 1), 0.9 in the paper"),
            ("seed", "-1", "in [0, 2³¹)"),
        ],
        "cpo": [
            ("cpo_alpha", "-1", ">= 0 and finite, 1 in the paper"),
            ("label_smoothing", "0.5", "in [0, 0.5)"),
            ("link", "squared", "'sigmoid', 'hinge' or 'ipo'"),
        ],
        "simpo": [("gamma", "-0.5", ">= 0 and finite"), ("label_smoothing", "1", "in [0, 0.5)")],
        "alpha_po": [("alpha", "11", "in [-10, 10], 0.25 in the paper"), ("gamma", "-1", ">= 0 and finite")],
        "orpo": [("beta", "0", "> 0 and finite"), ("nll", "row", "'token' or 'sequence'")],
        "tdpo": [("alpha", "-1", ">= 0 and finite, 0.5 in the paper"), ("variant", "tdpo3", "'tdpo1' or 'tdpo2'")],
        "apo_zero_unpaired": [(f"{kind}_weight", "0", "> 0 and finite") for kind in ("desirable", "undesirable")],
        "bco": [("shift", "median", "'mean' or 'balanced'")],
        "rpo_reward_aware": [
            ("reward_scale", "0", "> 0 and finite"),
            ("distance", "kl", "'bwd_kl', 'fwd_kl' or 'sq'"),
        ],
        "xpo": [("beta", "0", "> 0 and finite"), ("alpha", "0", "> 0 and finite (without it, this is dpo)")],
        "nash_md": [("beta", "-1", "> 0 and finite")],
        "sft": [("leg", "rejected", "'gold' or 'chosen'"), ("per", "batch", "'token', 'sequence' or 'row'")],
        "dco": [
            ("attempts", "0", "in [1, 2²⁰], the pass@N budget"),
            ("attempts", "1.5", "a whole number"),
            ("leg", "rejected", "'gold' or 'chosen'"),
        ],
        **{name: [("leg", "completion", "'gold' or 'chosen'")] for name in ("ntl_mse", "ntl_was")},
        "symbolic, program: chosen": [
            ("link", "log", "'logistic', 'squared' or 'hinge'"),
            ("beta", "0", "> 0 and finite"),
            ("reduction", "max", "'mean' or 'sum'"),
        ],
        "bradley_terry": [
            ("center_rewards_coefficient", "-1", ">= 0 and finite, 0.01 in TRL's documentation"),
            ("attribute", "' '", "the name of an output"),
        ],
        **{name: [("attribute", "''", "the name of an output")] for name in ("margin_bt", "scaled_bt")},
        "reward_regression": [
            *[
                ("attributes", names, "different names of columns with ratings")
                for names in ("[]", "[a, a]", "[chosen]", "[preference]")
            ],
            ("attributes", "helpfulness", "a list"),
        ],
    },
    "modifiers": {
        "r_dpo": [("length_alpha", "0", "finite and not 0, 0.005 to 0.05 at first")],
        "ld_dpo": [
            ("ld_alpha", "1", "in [0, 1) (1 changes nothing), 0.5 in the paper"),
            ("applies_to", "reference", "'both' or 'policy'"),
        ],
        "wpo": [("clamp", "1.5", "true or false")],
        "mm_dpo": [("scaling", "0", "> 0 and finite, 0.5 in the paper"), ("sharpness", "-1", "> 0 and finite")],
        "f_divergence": [
            ("divergence", "reverse_kl", "'forward_kl', 'js' or 'alpha' (reverse_kl is dpo itself)"),
            ("divergence", "js_divergence", "'forward_kl', 'js' or 'alpha'"),
            ("divergence_alpha", "1", "in [0, 1), 0.5 in TRL; 1 would be dpo itself"),
        ],
        "tr_dpo": [("sync_alpha", "0", "in (0, 1], 0.6 in TRL"), ("sync_steps", "0", ">= 1")],
    },
    "token_weights": {
        **{
            name: [
                ("temperature", "0", "> 0 and finite, 0.4 or 1 in the paper"),
                ("warmup_steps", "-1", ">= 0, 1000 in the paper's pretraining"),
            ]
            for name in ("lin_upper", "quadratic", "extremes")
        },
        **{name: [("legs", "gold", "a list")] for name in ("dft", "flow")},
    },
    "regularizers": {
        "l2_init": [("coef", "0", "> 0 and finite, 0.01 in the authors' code"), ("norm", "l3", "'l2' or 'l1'")],
        "wise_ft": [("tuned_share", "1", "in (0, 1), 0.5 in the paper"), ("tuned_share", "0", "in (0, 1)")],
    },
    "reward_transforms": {
        "log_sigmoid_centered": [("quantile", "1.5", "in [0, 1]")],
        "clip": [("lowest", "null", "a finite number, unless highest is one")],
        "clip, lowest: 1": [("highest", "0", "above lowest (1.0)")],
        "length_penalty": [("alpha", "0", "> 0 and finite")],
        "unlikeliness": [("beta_rank", "0", "in (0, 1], 0.25 in the authors' code"), ("beta_rank", "1.5", "in (0, 1]")],
        "r3": [("questions", "shut", "'open', 'closed' or 'mixed'"), ("most_words", "0", ">= 1")],
    },
}
"""By section and entry: keys, a value that each may not have, and what it must be instead."""

RANGES = [
    *[
        Case(
            name=f"{key} {value} of {name}",
            file=recipe(
                "{name: dpo}" if kind == "objective" else "",
                f"{{name: {name}, {key}: {value}}}" if kind == "objective" else "",
                more="" if kind == "objective" else f"{kind}: [{{name: {name}, {key}: {value}}}]",
            ),
            says=[f"{kind}{'' if kind == 'objective' else '.0'}.{key} must be {expected}", "got "],
        )
        for kind, entries in OUT_OF_RANGE.items()
        for name, keys in entries.items()
        for key, value, expected in keys
    ],
    *[
        Case(
            name=f"{key} of {name} is idle",
            file=recipe("name: dpo", f"name: {name}, {key}: {value}"),
            says=[f"objective.{key} has no effect: {reason}; remove it"],
        )
        for name, key, value, reason in [
            ("tdpo, variant: tdpo1", "alpha", 1, "variant tdpo1 has none"),
            ("beta_dpo, filtered: 0", "seed", 1, "with filtered 0 every row is selected"),
            ("beta_dpo, filtered: 0, modulation: 0", "momentum", 0.5, "with filtered 0 and modulation 0 this is dpo"),
        ]
    ],
    *[
        Case(
            name=f"label smoothing of a link {link} of cpo",
            words=f"--objective '{{name: cpo, link: {link}, label_smoothing: 0.1}}'",
            says=[f"objective.label_smoothing has no meaning with link {link}; use link sigmoid, or leave it out"],
        )
        for link in ("hinge", "ipo")
    ],
    *[
        Case(name=f"a program that is {what}", words=f"--objective '{{name: symbolic, {keys}}}'", says=says)
        for what, keys, says in [
            ("not there", "beta: 1", ["objective.program is required", "--program VALUE"]),
            (
                "about nobody",
                "program: rejected -> chsen",
                ["objective: 'rejected -> chsen' is no formula: 'chsen' is no variable", "write e.g. 'rejected -> "],
            ),
            ("cut off", "program: rejected ->", ["'rejected ->' is no formula: it ends too early", "write e.g. "]),
            (
                "about the reference alone",
                "program: ref_chosen",
                ["objective.program must speak of chosen or rejected"],
            ),
            (
                "compared with the reference twice",
                "program: ref_chosen -> chosen, reference: true",
                ["objective.reference subtracts what this program already names", "leave one out"],
            ),
        ]
    ],
]

OTHERS = "or use an objective that works with this data:"


def scored(*scores: float, number: int = 8) -> list[dict[str, Any]]:
    """Rows with one response for each score."""
    return [
        {"prompt": f"Say {i}.", "responses": [{"text": f" It is {j}, {i}.", "score": s} for j, s in enumerate(scores)]}
        for i in range(number)
    ]


def rated(**ratings: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"Say {i}.", "completion": f" {i}!", **ratings} for i in range(8)]


def labelled(*labels: bool) -> list[dict[str, Any]]:
    return [{"prompt": f"Say {i}.", "completion": f" {i}!", "label": label} for i, label in enumerate(labels)]


NEED_BOTH = (
    "rows.jsonl, row 0: the objective needs scores of chosen and rejected and the rows have prompt, chosen, reject"
)
ADD_BOTH = "add score_chosen and score_rejected columns, or a margin (data.columns maps names)"
NO_RATING = "and no row has a score of it (scores there: "

SHAPES = [
    *[
        Case(
            name=f"no scores for {objective}",
            words=f"--objective {objective}",
            says=[NEED_BOTH, ADD_BOTH, OTHERS, "dpo, ipo, simpo"],
        )
        for objective in ("rpo_reward_aware", "margin_bt", "scaled_bt")
    ],
    Case(
        name="no scores for a reward transform",
        words="--reward_transforms z_score",
        says=["rows.jsonl: reward_transforms change the scores of several responses", "use lists of scored", "leave"],
    ),
    Case(name="no scores for a modifier", words="--modifiers mm_dpo", says=[NEED_BOTH, ADD_BOTH]),
    *[
        Case(
            name=f"no score of the {lacking} response",
            words="--objective rpo_reward_aware",
            rows=each(**{f"score_{there}": 2.0}),
            says=[f"row 0: the objective needs scores of {lacking}", f"add score_{lacking}", OTHERS, "dpo, ipo"],
        )
        for there, lacking in [("chosen", "rejected"), ("rejected", "chosen")]
    ],
    Case(
        name="one row without scores",
        words="--objective scaled_bt",
        rows=[row | ({} if i == 5 else {"score_chosen": 2, "score_rejected": 1}) for i, row in enumerate(pairs())],
        says=["rows.jsonl, row 5: the objective needs scores of chosen and rejected and this row has", ADD_BOTH],
    ),
    Case(
        name="a margin that is no number",
        words="--objective margin_bt",
        rows=each(margin="much"),
        says=["rows.jsonl: none of 8 rows can be used", "row 0: margin is not a finite number", "mend the rows"],
    ),
    Case(
        name="neither pairs nor scores",
        words="--objective margin_bt",
        rows=labelled(True, False),
        says=[
            "row 0: the objective needs chosen and rejected responses and scores of chosen and rejected",
            *("add chosen, rejected, score_chosen and score_rejected columns", OTHERS, "kto, bco"),
        ],
    ),
    *[
        Case(
            name=f"no rating of {attribute}, {what}",
            words=f"--objective '{{name: reward_regression, attributes: [{names}]}}'",
            rows=rows,
            says=[
                f"rows.jsonl: the objective learns the attribute {attribute!r}, {NO_RATING}{there})",
                f"add a column {attribute}, map one with data.columns, or change the objective's attributes",
            ],
        )
        for what, names, attribute, there, rows in [
            ("of pairs", "score", "score", "none", pairs()),
            ("of completions", "helpfulness", "helpfulness", "none", rated()),
            ("but of another", "helpfulness, wit", "wit", "helpfulness", rated(helpfulness=3)),
            ("but empty ones", "wit", "wit", "none", rated(wit=None)),
            ("of labels", "score", "score", "none", labelled(True, False)),
        ]
    ],
    Case(
        name="a rating that is no number",
        words="--objective '{name: reward_regression, attributes: [wit]}'",
        rows=rated(wit="some"),
        says=["rows.jsonl: none of 8 rows can be used", "row 0: wit is not a finite number", "mend the rows"],
    ),
    Case(
        name="a rating mapped to no column",
        words="--objective '{name: reward_regression, attributes: [wit]}' --columns '{wit: humour}'",
        rows=rated(humor=3),
        says=["rows.jsonl: data.columns maps wit to 'humour', which is not there", "did you mean 'humor'?"],
    ),
    Case(
        name="a rating mapped from another attribute",
        words="--objective '{name: reward_regression, attributes: [wit]}' --columns '{wits: humor}'",
        rows=rated(humor=3),
        says=["data.columns: 'wits' is no column of ours; did you mean 'wit'?"],
    ),
    Case(
        name="nobody who wrote the chosen responses",
        words="--objective xpo",
        says=[
            "rows.jsonl, row 0: the objective needs chosen_by, who wrote the chosen response, and the rows have prompt",
            *("add a chosen_by column with policy or reference (data.columns maps names)", OTHERS, "dpo, ipo"),
        ],
    ),
    Case(
        name="one row of which nobody knows who wrote it",
        words="--objective xpo",
        rows=[row | {"chosen_by": None if i == 5 else "policy"} for i, row in enumerate(pairs())],
        says=["rows.jsonl, row 5: the objective needs chosen_by", "this row has", "add a chosen_by column", OTHERS],
    ),
    Case(
        name="a writer that is neither",
        words="--objective xpo",
        rows=each(chosen_by="gpt"),
        says=["rows.jsonl: none of 8 rows can be used", "row 0: chosen_by is not policy or reference", "mend the rows"],
    ),
    Case(
        name="a writer mapped from another column",
        words="--objective xpo --columns '{chosen_buy: by}'",
        rows=each(by="policy"),
        says=["data.columns: 'chosen_buy' is no column of ours; did you mean 'chosen_by'?"],
    ),
    Case(
        name="no preference of samples",
        words="--objective nash_md",
        rows=rated(),
        says=[
            "rows.jsonl, row 0: the objective needs preference, the probability that the completion is preferred",
            *("add a preference column with a number in [0, 1]", OTHERS, "sft"),
        ],
    ),
    Case(
        name="a preference of pairs",
        words="--objective nash_md",
        rows=each(preference=0.5),
        says=["row 0: the objective needs preference", "give a completion response that is the row's own", OTHERS],
    ),
    Case(
        name="a preference in percent",
        words="--objective nash_md",
        rows=rated(preference=70),
        says=["rows.jsonl: none of 8 rows can be used", "row 0: preference is not a number in [0, 1]", "mend the rows"],
    ),
    Case(
        name="a preference from scores",
        words="--objective nash_md",
        rows=scored(0.9, 0.1),
        says=["row 0: the objective needs preference", "responses with scores; add a preference column", OTHERS],
    ),
    Case(
        name="no log-probs for unlikeliness",
        words="--reward_transforms unlikeliness",
        rows=scored(1, 1, 0),
        says=["rows.jsonl, row 0: unlikeliness ranks responses by their log-probs", "give each its mean", "leave unl"],
    ),
    Case(
        name="a relabeler of pairs whose writer matters",
        words="--objective xpo --relabel '{name: reward_augmented, form: text}'",
        rows=each(chosen_by="policy", score_chosen=2, score_rejected=1),
        says=["relabel rewrites chosen and rejected, and the objective needs chosen_by", "leave relabel out"],
    ),
    *[
        Case(
            name=f"no gold for {objective}",
            words=f"--objective {objective}",
            says=["row 0: the objective needs a gold response", "add a gold or reference column", OTHERS, "dpo, ipo"],
        )
        for objective in ("dco", "ntl_mse", "ntl_was", "tpo_l")
    ],
    *[
        Case(
            name=f"no pairs for {objective}",
            words=f"--objective {objective} {more}",
            rows=labelled(True, False, True, False),
            says=[
                "row 0: the objective needs chosen and rejected responses",
                "add chosen and rejected columns",
                OTHERS,
            ],
        )
        for objective, more in [("simpo", ""), ("tdpo", "--reference.source live"), ("aot", ""), ("bradley_terry", "")]
    ],
    Case(
        name="thumbs up only for apo_zero_unpaired",
        words="--objective apo_zero_unpaired",
        rows=labelled(*[True] * 8),
        says=["rows.jsonl: all 8 training rows have label true", "add rows with label false"],
    ),
    Case(
        name="a tokenizer without digits",
        words="--objective '[{name: sft, leg: chosen}, {name: ntl_was, leg: chosen}]'",
        rows=[{"prompt": "Say it.", "chosen": f" {'a' * (i + 1)}.", "rejected": " No."} for i in range(8)],
        arrange=without_digits,
        says=["the tokenizer has 1 number tokens", "use a tokenizer that splits numbers into digits, or another objec"],
        model_loaded=True,
    ),
    Case(
        name="no gold for tpo",
        words="--objective tpo",
        says=[
            "rows.jsonl, row 0: the objective needs a gold response and the rows have prompt, chosen, rejected",
            *(
                "add a gold or reference column (data.columns maps names)",
                OTHERS,
                "dpo, ipo, simpo, orpo, rpo, kto, bco",
            ),
        ],
    ),
    Case(
        name="no label for bco",
        words="--objective bco",
        rows=[{"prompt": f"Say {i}.", "completion": f" {i}!"} for i in range(8)],
        says=[
            "rows.jsonl, row 0: the objective needs a label and the rows have prompt, completion",
            *("add a label column with true and false (data.columns maps names)", OTHERS, "sft"),
        ],
    ),
    Case(
        name="no pairs for dpo",
        rows=labelled(True, False, True, False),
        says=[
            "rows.jsonl, row 0: the objective needs chosen and rejected responses",
            *("the rows have prompt, completion, label", "add chosen and rejected columns", OTHERS, "kto, bco"),
        ],
    ),
    Case(
        name="nothing that tpo needs",
        words="--objective tpo",
        rows=labelled(True, False),
        says=["needs chosen, rejected and gold responses", "add chosen, rejected and gold (or reference) columns"],
    ),
    Case(
        name="two responses for a triple",
        words="--objective tpo",
        rows=scored(0.1, 0.9),
        says=["rows.jsonl: no row can be trained on (8 × fewer than three responses with scores", "change data.rule"],
    ),
    Case(
        name="thumbs up only",
        words="--objective kto",
        rows=labelled(*[True] * 8),
        says=["rows.jsonl: all 8 training rows have label true", "add rows with label false", "sft with data.format"],
    ),
    Case(
        name="thumbs down only",
        words="--objective bco",
        rows=labelled(*[False] * 8),
        says=["rows.jsonl: all 8 training rows have label false", "add rows with label true"],
    ),
    Case(
        name="no other prompt for kto",
        words="--objective kto",
        rows=[row | {"prompt": "Say."} for row in labelled(True, False, True, False)],
        says=["all 4 rows have the same prompt", "completions of another one", "add rows with other prompts"],
    ),
    Case(
        name="scores all equal",
        rows=scored(0.5, 0.5, 0.5),
        says=["rows.jsonl: all scores are 0.5", "give scores that differ, or use an objective that takes one", "sft"],
    ),
    Case(
        name="scores that nothing tells apart",
        words="--data.margin 0.3",
        rows=scored(0.5, 0.6),
        says=["rows.jsonl: no row can be trained on (8 × scores differ by less than data.margin", "change data.rule"],
    ),
    Case(
        name="a threshold that none reaches",
        words="--rule threshold --threshold 3",
        rows=scored(0.5, 0.6),
        says=["rows.jsonl: no row can be trained on (8 × no response scores at least data.threshold"],
    ),
    Case(
        name="labels by a threshold that none reaches",
        words="--objective kto --rule threshold --threshold 3",
        rows=scored(0.5, 0.6),
        says=["all 16 training rows have label false", "change data.threshold"],
    ),
    Case(
        name="rule threshold without threshold",
        words="--rule threshold",
        says=["data.rule threshold needs data.threshold", "the least score of a good response"],
    ),
    Case(
        name="a threshold with another rule",
        words="--data.threshold 0.5",
        says=["data.threshold has no effect: data.rule is not threshold", "remove it"],
    ),
    Case(
        name="rule margin without margin",
        words="--rule margin",
        says=["data.rule margin needs data.margin", "> 0"],
    ),
    Case(name="a margin below nothing", words="--data.margin -1", says=["data.margin must be >= 0", "got -1.0"]),
    Case(
        name="an unknown rule",
        words="--rule best_vs_best",
        says=["data.rule must be one of best_vs_worst, best_vs_random, threshold, margin", "'best_vs_best'"],
    ),
    Case(
        name="a rule for pairs",
        words="--rule best_vs_random",
        says=["data.margin and data.max_length_ratio say how scored", "leave them out"],
    ),
    Case(
        name="a rule for one response",
        words="--objective sft --rule best_vs_random",
        rows=scored(0.5, 0.6),
        says=["data.rule best_vs_random has no effect", "the best of the scored responses (gold)", "leave out"],
    ),
    Case(
        name="a margin of labels by threshold",
        words="--objective bco --rule threshold --threshold 0.55 --data.margin 0.1",
        rows=scored(0.5, 0.6),
        says=["data.margin has no effect", "every response gets a label", "leave it out"],
    ),
    Case(name="streaming without end", words="--streaming", says=["data.streaming needs data.max_rows"]),
    Case(
        name="relabelling without scores",
        words="--relabel '[{name: reward_augmented, form: text}]'",
        says=[
            "rows.jsonl, row 0: reward_augmented needs a score of the chosen response",
            "add columns score_chosen and score_rejected, use lists of scored responses, or leave relabel out",
        ],
    ),
    Case(
        name="scores outside the scale",
        words="--relabel '[{name: reward_augmented, form: text}]'",
        rows=each(score_chosen=11, score_rejected=3),
        says=["rows.jsonl, row 0: the score 11 is outside the scale from 1 to 10", "set relabel's lowest and highest"],
    ),
    Case(
        name="a system message in plain text",
        words="--relabel reward_augmented",
        rows=each(score_chosen=9, score_rejected=3),
        says=["rows.jsonl, row 0: plain text has no system message", "set data.as_chat, or relabel's form to text"],
    ),
    Case(
        name="scores that print alike",
        words="--relabel '[{name: reward_augmented, form: text, decimals: 0}]'",
        rows=each(score_chosen=9.3, score_rejected=9.1),
        says=["rows.jsonl: no row can be trained on (8 × chosen and rejected have the same score"],
    ),
]

TABLE = {
    "recipe": RECIPES,
    "objective": OBJECTIVES,
    "trl": TRL,
    "value": VALUES,
    "contradiction": CONTRADICTIONS,
    "name": NAMES,
    "data": DATA,
    "model": MODELS,
    "output": OUTPUT,
    "resume": RESUME,
    "parts": PARTS,
    "modifier": MODIFIERS,
    "reference": REFERENCES,
    "regularizer": REGULARIZERS,
    "reward model": REWARD_MODELS,
    "range": RANGES,
    "shapes": SHAPES,
}


# ---- running them ----


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, rows, a cache and a finished run."""
    folder = tmp_path_factory.mktemp("template")
    tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl", pairs())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ALIGN_CACHE", str(folder / "cache"))
        assert main(command("--save_strategy epoch")) == 0
    assert {path.name for path in (folder / "run").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    return folder


@pytest.fixture
def folder(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a copy of the template's model and rows, with the template's cache."""
    shutil.copytree(template / "model", tmp_path / "model")
    shutil.copy(template / "rows.jsonl", tmp_path / "rows.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGN_CACHE", str(template / "cache"))
    monkeypatch.setattr("evals.hub.get_token", lambda: None)
    return tmp_path


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that were loaded."""
    seen: list[Any] = []
    original = models.load_weights

    def load(*args: Any, **kwargs: Any) -> Any:
        seen.append(None)  # counts as loaded even where loading fails
        seen[-1] = original(*args, **kwargs)
        return seen[-1]

    monkeypatch.setattr(models, "load_weights", load)
    return seen


def command(words: str = "", file: str | None = None) -> list[str]:
    given = shlex.split(words)
    if file is not None:
        Path("recipe.yaml").write_text(file)
        return given if "--config" in given else ["--config", "recipe.yaml", *given]
    same = {"--objective.name": {"--objective.name", "--objective"}}
    base = [word for key, value in BASE.items() if not same.get(key, {key}) & set(given) for word in (key, value)]
    return [*base, *given]


def sentence(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that says what is wrong."""
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0].removeprefix("error: ")


def assert_says(told: str, parts: list[str]) -> None:
    at = 0
    for part in parts:
        found = told.find(part, at)
        assert found >= 0, f"{part!r} is not in {told[at:]!r}"
        at = found + len(part)


@pytest.mark.parametrize("case", [pytest.param(c, id=f"{kind}: {c.name}") for kind, cs in TABLE.items() for c in cs])
def test_one_sentence(
    case: Case, folder: Path, template: Path, loaded: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    if case.trained:
        shutil.copytree(template / "run", "run")
    if isinstance(case.rows, list):
        write_rows(Path("rows.jsonl"), case.rows)
    elif case.rows is not None:
        write("rows.jsonl", case.rows)()
    case.arrange()
    assert main(command(case.words, case.file)) == 2
    assert_says(sentence(capsys), case.says)
    assert bool(loaded) == case.model_loaded


def test_the_table_is_long_enough() -> None:
    names = [(kind, case.name) for kind, cases in TABLE.items() for case in cases]
    assert len(names) == len(set(names)) >= 40


def test_the_exit_status_reaches_the_shell(folder: Path) -> None:
    words = [sys.executable, str(REPOSITORY / "align" / "train.py"), *command("--lerning_rate 1e-6")]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr == "error: unknown key --lerning_rate; did you mean 'learning_rate'?\n"


ODD = (
    *("", "null", "true", "nan", "-inf", "1e400", "-1", "0", "9" * 30, "1.5", "x", "[]", "[[1]]", "{}", "{a: [1]}"),
    *("${x}", "???", "2024-01-01", "'", "a: b: c", "!!python/object:x y", "\x00", "# c", "1:30", ">", "*", "@"),
)
KEYS = [
    *(f"{section}.{field.name}" for section, cls in SECTIONS.items() for field in dataclasses.fields(cls)),
    *("objective", "objective.name", "objective.beta", "objective.weight", "objective.0.beta", "objective.x.y"),
    *("lora", "data", "data.columns.prompt", "data.datasets.0.weight", "train.", ".", "", "train..seed"),
]


def refusal(words: list[str]) -> str:
    try:
        read_recipe(None, words)
    except RecipeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("key", KEYS)
def test_no_value_of_a_key_ends_in_a_traceback(key: str) -> None:
    base = [f"{name}={value}" for name, value in BASE.items() if not name.endswith(key.rpartition(".")[2] or "?")]
    assert not any("\n" in refusal([*base, f"--{key}={value}"]) for value in ODD)


NAMED_KEYS = [(kind, name) for kind, registry in NAMED.items() for name in registry.names()]


@pytest.mark.parametrize(("kind", "name"), NAMED_KEYS, ids=lambda each: each)
def test_no_value_of_an_entry_s_key_ends_in_a_traceback(kind: str, name: str) -> None:
    """Nor in a sentence that does not name the key, or the section where it is about several keys."""
    base = [f"{key}={value}" for key, value in BASE.items() if kind != "objective" or "objective" not in key]
    for key in defaults(NAMED[kind][name]):
        for value in ODD:
            told = refusal([*base, f"--{kind}={{name: {name}}}", f"--{kind}.{key}={value}"])
            assert "\n" not in told
            assert not told or kind in told, (key, value)


class Loads(Exception):  # noqa: N818  # no fault: the run went on
    """Raised in the place of loading a model."""


@pytest.mark.parametrize(
    ("file", "words", "note"),
    [
        (
            recipe("rows_per_step: 4", "num_train_epochs: 3"),
            "--max_steps 2",
            "train.num_train_epochs = 3 has no effect: train.max_steps decides",
        ),
        (
            recipe("save_strategy: 'no'", "save_steps: 3"),
            "--save_strategy epoch",
            "train.save_steps = 3 has no effect: train.save_strategy is not steps",
        ),
        (
            recipe("eval_share: 0", "eval_share: 0.2"),
            "--eval_dataset_name rows.jsonl",
            "data.eval_share = 0.2 has no effect: data.eval_dataset_name gives the eval set",
        ),
        (
            recipe("rows_per_step: 4", "warmup_steps: 2"),
            "--lr_scheduler_type constant",
            "train.warmup_steps = 2 has no effect: this train.lr_scheduler_type does not warm up",
        ),
        (
            recipe("name: dpo", "name: dpo, beta: 0.3"),
            "--objective sft --objective.leg chosen",
            "objective.beta = 0.3: sft has no such key",
        ),
        (
            recipe(more="reference: {model: initial}"),
            "--objective sft --objective.leg chosen",
            "reference has no effect: sft needs no reference model",
        ),
    ],
    ids=["max_steps", "save_strategy", "eval_dataset_name", "lr_scheduler_type", "objective", "reference"],
)
def test_a_key_that_the_command_line_makes_idle_is_told_and_the_run_goes_on(
    file: str, words: str, note: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*args: Any, **kwargs: Any) -> Any:
        raise Loads

    monkeypatch.setattr(models, "load_weights", load)
    with pytest.raises(Loads):
        main(command(words, file))
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert notes[0].startswith(f"note: {note}")


def test_text_on_the_command_line_stays_text() -> None:
    """``--eos_token [END]`` was read as a list and ``--output_dir 7`` as a number."""
    read = read_recipe(None, command("--eos_token [END] --model_revision 1e5 --output_dir 7 --dataset_config null"))
    assert read.model.eos_token == "[END]"
    assert read.model.model_revision == "1e5"
    assert read.train.output_dir == "7"
    assert read.data.dataset_config is None


def test_a_tracker_that_is_not_installed(
    folder: Path, loaded: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("align.assemble.get_available_reporting_integrations", list)
    assert main(command("--report_to wandb")) == 2
    assert_says(sentence(capsys), ["train.report_to: wandb is not installed", "leave it out"])
    assert not loaded


def test_a_package_that_an_optimizer_lacks(
    folder: Path, loaded: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacking(*args: Any) -> Any:
        raise ImportError("You need to install `bitsandbytes`.")

    monkeypatch.setattr("align.assemble.Trainer.get_optimizer_cls_and_kwargs", lacking)
    assert main(command("--optim adamw_8bit")) == 2
    assert_says(sentence(capsys), ["train.optim adamw_8bit", "install `bitsandbytes`", "adamw_torch"])
    assert not loaded


# ---- disks ----


def test_no_space_for_what_the_run_will_write(
    folder: Path, loaded: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert main(command("--save_strategy epoch")) == 2
    assert_says(sentence(capsys), ["run has 1000 bytes left", "need about", "choose another output_dir"])
    assert not loaded


def test_no_room_for_the_cache(
    folder: Path, loaded: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ALIGN_CACHE", "rows.jsonl/cache")
    assert main(command()) == 2
    assert_says(sentence(capsys), ["could not write rows.jsonl/cache", "Not a directory", "set ALIGN_CACHE"])
    assert not loaded


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
        RuntimeError("basic_ios::clear: iostream error"),
    ],
    ids=["system", "safetensors", "torch", "torch at the end"],
)
def test_a_disk_that_fills_up_while_a_checkpoint_is_written(
    error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Former checkpoints stay, half a one does not, and the run can go on from them."""
    words = "--save_strategy steps --save_steps 1"
    save = torch.save

    def fill_up(what: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-3" in str(path):
            Path(path).write_bytes(b"half")
            raise error
        save(what, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fill_up)
        assert main(command(words)) == 2
    assert_says(sentence(capsys), ["no space left in run", "free some", "--resume_from_checkpoint last"])
    assert [path.name for path in saving.checkpoints(Path("run"))] == ["checkpoint-1", "checkpoint-2"]
    assert not Path("run", saving.PARTIAL).exists()
    assert not Path("run/checkpoint-3").exists()
    assert main(command(f"{words} --resume_from_checkpoint last")) == 0


def test_a_disk_that_fills_up_at_the_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(ObjectiveTrainer, "save_model", full)
    assert main(command()) == 2
    assert_says(sentence(capsys), ["no space left in run", "free some", "start again with --overwrite_output_dir"])


def test_overwriting_leaves_what_no_run_wrote(folder: Path, template: Path) -> None:
    """A former version deleted the whole folder."""
    shutil.copytree(template / "run", "run")
    Path("run/thesis.txt").write_text("mine")
    assert main(command("--overwrite_output_dir --max_steps 1", recipe())) == 0
    assert Path("run/thesis.txt").read_text() == "mine"
    assert saving.checkpoints(Path("run")) == []


# ---- losses that are no numbers ----

MARK = "\u00e9"
"""A letter of one row only, whose tokens can be poisoned."""


def poison(embedding: torch.Tensor) -> None:
    tokens = AutoTokenizer.from_pretrained("model")(MARK)["input_ids"]
    embedding[tokens] = torch.nan


def mark_row(row: int) -> None:
    rows = pairs()
    rows[row]["prompt"] += MARK
    write_rows(Path("rows.jsonl"), rows)


def test_a_loss_that_is_no_number_names_the_row_and_updates_nothing(
    folder: Path, loaded: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mark_row(5)
    before: list[torch.Tensor] = []
    step = ObjectiveTrainer.training_step

    def poisoned_after_the_first(self: ObjectiveTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 1:
            poison(loaded[0].get_input_embeddings().weight.data)
        before[:] = [parameter.detach().clone() for parameter in loaded[0].parameters()]
        return step(self, *args, **kwargs)

    monkeypatch.setattr(ObjectiveTrainer, "training_step", poisoned_after_the_first)
    assert main(command("--learning_rate 1e-3")) == 2
    told = sentence(capsys)
    assert_says(told, ["the loss is nan at step", "in rows.jsonl, row 5; nothing was updated", "check these rows"])
    assert "row 4" not in told
    for stored, parameter in zip(before, loaded[0].parameters(), strict=True):
        torch.testing.assert_close(stored, parameter.data, rtol=0, atol=0, equal_nan=True)


def test_weights_that_fail_for_one_row_are_found_in_the_first_step(
    folder: Path, loaded: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    mark_row(5)
    change_weights(lambda weights: poison(weights["model.embed_tokens.weight"]))()
    assert main(command("--objective sft --objective.leg chosen --rows_per_step 8 --max_grad_norm 0")) == 2
    assert_says(sentence(capsys), ["the loss is nan", "rows.jsonl, row 5", "nothing was updated"])
    stored = load_file("model/model.safetensors")["lm_head.weight"]
    assert torch.equal(stored, loaded[0].lm_head.weight.data)


def test_a_reference_that_is_no_number_names_the_row(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark_row(5)
    change_weights(lambda weights: poison(weights["model.embed_tokens.weight"]))()
    assert main(command()) == 2
    assert_says(sentence(capsys), ["the reference's log-probs", "'chosen'", "not finite in rows.jsonl, row 5", "leave"])
