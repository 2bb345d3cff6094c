"""Settings of ``python -m align.sample``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from align import settings
from align.errors import RecipeError
from align.keys import Schema
from align.prompt_settings import PromptSection
from align.samplers import ServingSection
from align.sampling import Sampling
from align.sections import ModelSection
from align.typed import Entry
from objectives import RELABELERS
from objectives.checks import require


@dataclass(frozen=True, kw_only=True)
class SampledModel:
    """What is sampled from."""

    model_name_or_path: str
    """Hub id or folder of a causal language model."""
    model_revision: str = "main"
    """Branch, tag or commit on the Hub."""
    adapter_name_or_path: str | None = None
    """Folder of a LoRA adapter on it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of weights and computation. auto: the checkpoint's on GPUs, float32 elsewhere."""
    attn_implementation: Literal["auto", "sdpa", "eager"] = "auto"
    """With engine transformers."""
    tokenizer_name_or_path: str | None = None
    """Where the tokenizer is, if not with the model."""
    eos_token: str | None = None
    """Token that ends a response, if not the tokenizer's own."""
    chat_template: str | None = None
    """File with a Jinja chat template that replaces the tokenizer's."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may be run."""
    mixture_with: str | None = None
    """With engine transformers: folder or Hub id of a second model of the same vocabulary. What is sampled is then the
    geometric mixture of both, ∝ π^(1−c)·π_second^c at every token: the opponent of Nash-MD, arXiv:2312.00886."""
    mixture_coef: float = 0.5
    """c, in (0, 1]."""

    def __post_init__(self) -> None:
        require("mixture_coef", self.mixture_coef, 0 < self.mixture_coef <= 1, "in (0, 1]")
        if self.mixture_with is None and self.mixture_coef != 0.5:
            raise ValueError("mixture_coef has no effect without mixture_with; remove it")

    @property
    def section(self) -> ModelSection:
        """As a recipe for training would have it."""
        others = ("adapter_name_or_path", "mixture_with", "mixture_coef")
        own = {key: value for key, value in dataclasses.asdict(self).items() if key not in others}
        return ModelSection(**own)


@dataclass(frozen=True, kw_only=True)
class OutputSection:
    """Where samples go."""

    output: str
    """File of JSON lines. One that holds a part of the same samples is gone on with."""
    overwrite: bool = False
    """Delete what the file holds."""
    shard: str | None = None
    """i/k: only every k-th prompt, from the i-th (0 to k − 1): several machines can share the work."""

    def __post_init__(self) -> None:
        if self.shard is not None:
            i, _, k = self.shard.partition("/")
            fine = i.isdigit() and k.isdigit() and int(i) < int(k)
            require("shard", self.shard, fine, "i/k with i from 0 to k − 1, e.g. 0/4")


SCHEMA = Schema(
    sections={
        "model": SampledModel,
        "data": PromptSection,
        "sampling": Sampling,
        "serving": ServingSection,
        "out": OutputSection,
    },
    named={"relabel": RELABELERS},
    elsewhere={
        "max_new_tokens": "sampling.max_tokens",
        "num_samples": "sampling.n",
        "num_return_sequences": "sampling.n",
        "best_of": "sampling.n, and a strategy of python -m align.answer",
        "output_dir": "out.output, a file",
        "model": "model.model_name_or_path",
        "lora": "model.adapter_name_or_path",
    },
    required=("model", "data", "out"),
    example="launch/recipes/sample.yaml",
    command="python -m align.sample",
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be drawn."""

    model: SampledModel
    data: PromptSection
    sampling: Sampling
    serving: ServingSection
    out: OutputSection
    goal: Any = None
    """A relabeler that asks for what it trained for: ``RewardAugmented``."""


def read_job(config: str | None, words: Sequence[str]) -> Job:
    """The settings of a command line.

    Raises:
        RecipeError: one sentence on what is wrong.
    """
    found = settings.read_settings(config, words, SCHEMA)
    return Job(goal=goal_of(found.pop("relabel")), **found)


def goal_of(relabel: Sequence[Entry]) -> Any:
    """The relabeler whose goal prompts are to ask for, if there is one.

    Raises:
        RecipeError: a relabeler asks for nothing.
    """
    goals = [entry.built for entry in relabel]
    if any(not hasattr(goal, "condition") for goal in goals) or len(goals) > 1:
        raise RecipeError("relabel: only reward_augmented asks for something in its prompts; leave the others out")
    return goals[0] if goals else None
