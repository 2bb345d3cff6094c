"""Faults in what a recipe names: data, models, output folders, checkpoints to go on from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import T5Config

from align import saving
from tests.align.bad_input.case import (
    Case,
    a_larger_tokenizer,
    a_tokenizer_without_end,
    an_encoder,
    change_config,
    change_weights,
    chats,
    cut_in_half,
    each,
    flip_a_bit,
    recipe,
    remove,
    renamed,
    write,
)
from tests.align.runs import CONTEXT, pairs, write_rows

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
        name="weights in four bits and no adapter",
        arrange=change_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        says=["'./model' holds weights in few bits (bitsandbytes)", "add a lora section"],
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
