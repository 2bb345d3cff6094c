"""The sections of a recipe. A field is a key; what stands under it is its documentation and its ``--help``.

Keys have the ecosystem's own names where they exist: TrainingArguments', peft's, TRL's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from objectives.checks import require


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """What is trained."""

    model_name_or_path: str
    """Hub id or folder of a causal language model."""
    model_revision: str = "main"
    """Branch, tag or commit on the Hub."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of computation. auto: bfloat16 on GPUs that have it, float32 elsewhere. Trained weights stay float32."""
    attn_implementation: Literal["auto", "sdpa", "eager", "flex_attention", "align_segments"] = "auto"
    """auto: flex_attention on GPUs, align_segments (SDPA by segments) on CPUs, eager where attention is soft-capped."""
    tokenizer_name_or_path: str | None = None
    """Where the tokenizer is, if not with the model."""
    eos_token: str | None = None
    """Token that ends a response, if not the tokenizer's own."""
    chat_template: str | None = None
    """File with a Jinja chat template that replaces the tokenizer's."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may be run."""
    load_in_4bit: bool = False
    """QLoRA: frozen linear layers in 4 bits (bitsandbytes), arXiv:2305.14314. Takes a lora section."""
    load_in_8bit: bool = False
    """Frozen linear layers in 8 bits (bitsandbytes), arXiv:2208.07339. Takes a lora section."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """Values that 4 bits stand for."""
    use_bnb_nested_quant: bool = False
    """Quantize the scales of 4-bit blocks as well: 0.4 bits a weight less."""

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit exclude each other; set one of the two")

    @property
    def quantized(self) -> bool:
        """Whether frozen weights are kept in fewer bits."""
        return self.load_in_4bit or self.load_in_8bit


@dataclass(frozen=True, kw_only=True)
class LoraSection:
    """Low-rank adapters; leave the section out to train all weights."""

    r: int = 16
    """Rank, ≥ 1."""
    lora_alpha: float = 32
    """Scale: updates are multiplied by lora_alpha / r (by lora_alpha / √r with use_rslora)."""
    lora_dropout: float = 0.0
    """In [0, 1). Takes train.allow_dropout, because dropout makes policy and reference differ at step 0."""
    target_modules: str | list[str] = "all-linear"
    """Names of linear layers, or all-linear."""
    modules_to_save: list[str] | None = None
    """Modules trained in full beside the adapters, e.g. [lm_head]."""
    use_rslora: bool = False
    """Rank-stabilised scale, arXiv:2312.03732."""
    use_dora: bool = False
    """Weight-decomposed adapters, arXiv:2402.09353."""
    adapter_name_or_path: str | None = None
    """A trained adapter to go on from; the keys above then come from it and may not be written."""

    def __post_init__(self) -> None:
        require("r", self.r, self.r >= 1, ">= 1")
        require("lora_alpha", self.lora_alpha, self.lora_alpha > 0, "> 0")
        require("lora_dropout", self.lora_dropout, 0 <= self.lora_dropout < 1, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class DatasetSection:
    """One dataset of several."""

    dataset_name: str
    """Hub id, or a local file or folder (json, jsonl, parquet, arrow, csv, also .gz)."""
    dataset_config: str | None = None
    """Name of the dataset's configuration on the Hub."""
    dataset_train_split: str = "train"
    """Which split to read."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our column names to theirs, e.g. {prompt: question, chosen: better, rejected: worse}."""
    format: str = "auto"
    """How rows are written; auto recognises it."""
    weight: float = 1.0
    """How often each row occurs in an epoch: 1 once, 0.5 a random half of the rows, 2 twice."""

    def __post_init__(self) -> None:
        require("weight", self.weight, self.weight > 0, "> 0")


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """What it is trained on."""

    dataset_name: str | None = None
    """Hub id, or a local file or folder (json, jsonl, parquet, arrow, csv, also .gz)."""
    dataset_config: str | None = None
    """Name of the dataset's configuration on the Hub."""
    dataset_train_split: str = "train"
    """Which split to train on."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our column names to theirs, e.g. {prompt: question, chosen: better, rejected: worse}."""
    format: str = "auto"
    """How rows are written; auto recognises it."""
    datasets: list[DatasetSection] | None = None
    """Several datasets with weights, instead of dataset_name and the keys that go with it."""
    eval_dataset_name: str | None = None
    """Dataset to evaluate on; without it a share of the prompts is held out."""
    eval_dataset_config: str | None = None
    """Name of the eval dataset's configuration on the Hub."""
    eval_split: str | None = None
    """Split of eval_dataset_name. Default: test; for a single file, all of it."""
    eval_share: float = 0.05
    """Share of the prompts held out when no eval dataset is given, in [0, 0.5]; 0 means no evaluation."""
    as_chat: bool = False
    """Turn plain strings and HH transcripts into messages, rendered with the chat template."""
    max_length: int | None = None
    """Most tokens of prompt + response. Default: 2048 or the model's context, whichever is smaller."""
    truncation: Literal["truncate_response_end", "truncate_prompt_start", "drop", "raise"] = "truncate_response_end"
    """What happens to longer rows."""
    max_dropped_share: float = 0.5
    """The run stops if more than this share of the rows can't be used, in [0, 1]."""
    max_rows: int | None = None
    """Read only this many rows of each dataset."""
    check: bool = False
    """Look for duplicates, contradictions, length bias and so on before training, and write doctor.json into the run
    directory; python -m data check does so without a run."""
    streaming: bool = False
    """Read the dataset as a stream, once, onto this disk, up to max_rows rows: for those too large to download."""
    rule: Literal["best_vs_worst", "best_vs_random", "threshold", "margin"] = "best_vs_worst"
    """How lists of scored responses become pairs, triples and labels. best_vs_worst, best_vs_random: one pair a prompt.
    threshold: a response that scores at least data.threshold against one that does not; as labels, all responses.
    margin: every pair whose scores differ by at least data.margin."""
    threshold: float | None = None
    """Least score of a good response, with rule threshold."""
    margin: float = 0.0
    """Least difference between the scores of chosen and rejected; pairs closer than that are left out and counted."""
    max_length_ratio: float | None = None
    """Of a pair that the rule makes, the longer response has at most this many times the characters of the shorter one;
    a prompt without such a pair is left out and counted. Against a model that learns that longer is better."""

    def __post_init__(self) -> None:
        require("eval_share", self.eval_share, 0 <= self.eval_share <= 0.5, "in [0, 0.5]")
        require("max_dropped_share", self.max_dropped_share, 0 <= self.max_dropped_share <= 1, "in [0, 1]")
        if self.max_length is not None:
            require("max_length", self.max_length, self.max_length >= 2, ">= 2")
        if self.max_rows is not None:
            require("max_rows", self.max_rows, self.max_rows >= 1, ">= 1")
        require("margin", self.margin, self.margin >= 0, ">= 0")
        ratio = self.max_length_ratio
        require("max_length_ratio", ratio, ratio is None or ratio >= 1, ">= 1")
        if self.rule == "threshold" and self.threshold is None:
            raise ValueError("rule threshold needs data.threshold, the least score of a good response")
        if self.rule == "margin" and not self.margin:
            raise ValueError("rule margin needs data.margin, the least difference of scores, > 0")
        if self.streaming and self.max_rows is None:
            raise ValueError("streaming needs data.max_rows, how many rows to keep")
        if self.datasets == []:
            raise ValueError("datasets is empty; name at least one")
        if (not self.dataset_name) == (self.datasets is None):
            raise ValueError("give dataset_name or datasets, one of the two")


@dataclass(frozen=True, kw_only=True)
class ReferenceSection:
    """The frozen model that log-ratios are taken against."""

    model: str = "initial"
    """initial: the policy as it starts. base: the model without its adapter. Else a Hub id or folder."""
    source: Literal["cached", "adapter_off", "live"] = "cached"
    """cached: computed once and stored. adapter_off: the policy without its adapter. live: a second model."""


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    """How it is trained."""

    output_dir: str
    """Run directory. It must not hold another run, unless that one is resumed or overwritten."""
    overwrite_output_dir: bool = False
    """Delete what a former run left in output_dir."""
    resume_from_checkpoint: str | None = None
    """A checkpoint folder; last for the newest complete one in output_dir; auto for the same, or a start from the
    beginning where there is none."""
    allow_recipe_change: bool = False
    """Go on from a checkpoint of another recipe: what differs is told, and holds from there on."""
    learning_rate: float = 1e-6
    """Peak learning rate, > 0."""
    rows_per_step: int = 64
    """Rows (pairs, triples) of one optimizer step, over all devices: the global batch."""
    token_budget: int | Literal["auto"] = "auto"
    """Most positions of one microbatch on one device; auto chooses by device, longest row and memory. How many
    microbatches a step takes follows from it, and nothing else."""
    num_train_epochs: float = 1.0
    """Passes over the data."""
    max_steps: int = -1
    """Stop after this many optimizer steps instead; −1 means num_train_epochs decides."""
    lr_scheduler_type: str = "linear"
    """Any name transformers knows: linear, cosine, constant, constant_with_warmup, …"""
    warmup_steps: float = 0
    """Steps over which the learning rate rises from 0; below 1 it is a share of all steps."""
    optim: str = "adamw_torch_fused"
    """Any name transformers knows."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, ≥ 0."""
    adam_beta1: float = 0.9
    """Decay of the first moment, in [0, 1)."""
    adam_beta2: float = 0.999
    """Decay of the second moment, in [0, 1)."""
    adam_epsilon: float = 1e-8
    """AdamW's ε, > 0."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 turns clipping off."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass: less memory, about a third more time. auto: where they do not fit, or
    would leave so few positions to a microbatch that recomputing is forecast to be faster."""
    allow_dropout: bool = False
    """Keep the model's and adapter's dropout on while training."""
    seed: int = 42
    """Seed of everything random: order of rows, held-out prompts, adapter weights."""
    logging_steps: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_strategy: Literal["no", "steps", "epoch"] = "epoch"
    """When held-out prompts are evaluated, besides at the start and at the end."""
    eval_steps: int | None = None
    """Steps between evaluations, with eval_strategy steps."""
    save_strategy: Literal["no", "steps", "epoch"] = "steps"
    """When checkpoints are written."""
    save_steps: float = 500
    """Steps between checkpoints, with save_strategy steps; below 1 a share of all steps."""
    save_total_limit: int | None = 2
    """Keep this many checkpoints."""
    async_save: bool = False
    """Copy each checkpoint to host memory and write it while training goes on. Off by default: it takes a checkpoint's
    size of host memory, and a run that is killed goes on from the newest checkpoint whose writing was over."""
    ddp_timeout: int = 1800
    """Seconds without progress after which processes that wait for another one say which, and end the run."""
    dataloader_num_workers: int = 0
    """Processes that prepare batches beside the training process."""
    report_to: list[str] = field(default_factory=list)
    """Trackers: wandb, tensorboard, trackio, or another one that transformers knows; none by default."""
    run_name: str | None = None
    """Name of the run in trackers."""
    project: str | None = None
    """Project that wandb and trackio file the run under. Default: WANDB_PROJECT, or align."""

    def __post_init__(self) -> None:
        above_zero = ("learning_rate", "num_train_epochs", "adam_epsilon")
        for key in above_zero:
            require(key, getattr(self, key), getattr(self, key) > 0, "> 0")
        require("num_train_epochs", self.num_train_epochs, self.num_train_epochs <= 10_000, "at most 10000")
        at_least_zero = ("warmup_steps", "weight_decay", "max_grad_norm", "dataloader_num_workers")
        for key in at_least_zero:
            require(key, getattr(self, key), getattr(self, key) >= 0, ">= 0")
        share = 0 < self.save_steps < 1
        require(
            "save_steps",
            self.save_steps,
            share or self.save_steps in range(1, 2**31),
            "a whole number >= 1, or a share below 1",
        )
        at_least_one = ("rows_per_step", "token_budget", "logging_steps", "ddp_timeout")
        for key in at_least_one:
            require(key, getattr(self, key), getattr(self, key) == "auto" or getattr(self, key) >= 1, ">= 1")
        for key in ("adam_beta1", "adam_beta2"):
            require(key, getattr(self, key), 0 <= getattr(self, key) < 1, "in [0, 1)")
        require("seed", self.seed, 0 <= self.seed < 2**32, "in [0, 2³²)")
        require("max_steps", self.max_steps, self.max_steps == -1 or self.max_steps >= 1, "-1 or >= 1")
        if self.eval_steps is not None:
            require("eval_steps", self.eval_steps, self.eval_steps >= 1, ">= 1")
        if self.save_total_limit is not None:
            require("save_total_limit", self.save_total_limit, self.save_total_limit >= 1, ">= 1")


@dataclass(frozen=True, kw_only=True)
class HubSection:
    """Where the result goes besides output_dir."""

    push_to_hub: bool = False
    """Upload model, card, report and results at the end."""
    hub_model_id: str | None = None
    """Repository, user/name."""
    hub_private_repo: bool = False
    """Create it private."""
    push_samples: bool = False
    """Also upload generations.jsonl and pairs.jsonl, which hold prompts and responses: whether these may be published
    is for the licences of the datasets to say."""
    license: str | None = None
    """Of the trained model, for its card: an id such as apache-2.0, or other."""
    language: list[str] = field(default_factory=list)
    """Of the training data, for the card: ISO 639 codes, e.g. [en, de]."""
    tags: list[str] = field(default_factory=list)
    """Further tags of the card."""

    def __post_init__(self) -> None:
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.\-]*", self.license):
            raise ValueError(f"license must be an id such as apache-2.0 or other, got {self.license!r}")
        for code in self.language:
            if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z]{2,4})?", code):
                raise ValueError(f"language must hold ISO 639 codes such as en, got {code!r}")
        for tag in self.tags:
            if not re.fullmatch(r"[\w.:\-+/]{1,100}", tag):
                raise ValueError(f"tags must be single words of letters, digits and -_.:+/, got {tag!r}")
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("push_to_hub needs hub_model_id, the repository to push to (user/name)")


SECTIONS: dict[str, Any] = {
    "model": ModelSection,
    "lora": LoraSection,
    "data": DataSection,
    "reference": ReferenceSection,
    "train": TrainSection,
    "hub": HubSection,
}
"""Every section but ``objective``, whose keys depend on its name."""
