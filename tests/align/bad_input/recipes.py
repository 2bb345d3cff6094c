"""Faults in recipes and on command lines: sections, keys, values, names, and what contradicts itself."""

from __future__ import annotations

from tests.align.bad_input.case import Case, recipe

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
