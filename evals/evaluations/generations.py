"""A fixed set of prompts, sampled: how long, repetitive, diverse and refusing answers are; also during training."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from align.errors import RecipeError
from align.prompt_settings import PromptSection
from align.samples import Group, Origin, Sample
from align.sampling import Request, Sampling, decoded, draw, encoded, spread, without_end
from evals import opponents, sampled
from evals.evaluation import EVALS, EvalNeeds, Found
from evals.generation_measures import measure
from evals.opponents import Baseline
from evals.redact import shown_name
from objectives.checks import require

if TYPE_CHECKING:
    from align.prompts import Prompt
    from evals.context import Context
    from evals.measured import Measured
    from evals.run_settings import Job


@EVALS.register("generations")
@dataclass(frozen=True, kw_only=True)
class Generations:
    """Length, repetition, diversity and refusals of answers to a fixed set of prompts.

    References:
        Welleck et al. 2019, arXiv:1908.04319; Li et al. 2016, arXiv:1510.03055.
    """

    prompts: PromptSection | None = None
    """Where prompts come from: dataset_name, split, columns, max_rows and the other keys of align.sample's data
    section. Default: those of the pairs."""
    split_name: str | None = None
    """What results call the prompts. Default: the split."""
    sampling: sampled.EvalSampling = field(default_factory=sampled.EvalSampling)
    """How answers are drawn: n, temperature, top_p, top_k, min_p, max_tokens, stop, seed (else out.seed)."""
    during: int = 8
    """In a training run, this many of the prompts, the first, are also sampled at every evaluation on the way; 0: none.
    With plain transformers on the first process, so few short answers cost least."""
    reference: bool = False
    """Sample the reference too: its answers stand beside the model's, and it is counted how many are the same."""

    def __post_init__(self) -> None:
        require("during", self.during, self.during >= 0, ">= 0")

    @property
    def needs(self) -> EvalNeeds:
        """A reference where it is asked for."""
        return EvalNeeds(samples=True, reference=self.reference)

    def check(self, job: Job) -> None:
        """That there are prompts, and a reference that can be sampled."""
        sampled.prompts_of(self.prompts, job, "generations")
        if job.run_dir is None and self.during != type(self).during:
            raise RecipeError("evals: generations: during has no effect outside a recipe for training; remove it")
        if self.reference:
            opponents.check(Baseline(model=opponents.REFERENCE), job)

    def __call__(self, context: Context) -> Found:
        """See ``evals.generation_measures``."""
        prompts = sampled.prompts_of(self.prompts, context.job, "generations")
        how = sampled.seeded(self.sampling, context.job)
        groups = context.samples(prompts, how, "policy")
        other = None
        if self.reference:
            baseline = Baseline(model=opponents.REFERENCE)
            other = opponents.answers_of(baseline, context, groups, prompts, how)
        split = sampled.split_name(prompts, self.split_name)
        where: dict[str, Any] = {"dataset": prompts.dataset_name, "split": split, "step": context.step}
        extra = sampled.conditions(context, how, groups)
        if other is not None:
            extra["reference"] = other.described
        shown = {**where, "split": f"{split}, generations"}
        name = context.job.name
        lines = sampled.generations(groups, _no_scores, **shown, model=name)
        if other is not None:
            theirs = f"{other.name} (reference)" if other.name == name else other.name
            lines += sampled.generations(other.groups, _no_scores, **shown, model=theirs)
        measured = measured_of(groups, None if other is None else other.answers)
        return Found(
            results=measured.results(**where, extra=extra),
            scores=measured.scores(**where),
            generations=lines,
            warnings=[*(other.warnings if other else ()), *_doubts(groups, measured)],
        )


def measured_of(groups: Sequence[Group], reference: Mapping[str, Sequence[Sample]] | None = None) -> Measured:
    """What is measured of sampled answers.

    Args:
        groups: the answers.
        reference: the reference's, by prompt; sample i is compared with sample i.
    """
    samples = [sample for group in groups for sample in group.samples]
    tokens = [len(sample.token_ids) for sample in samples]
    theirs: list[str | None] | None = None
    if reference is not None:
        theirs = []
        for sample in samples:
            answers = reference.get(sample.prompt_id, ())
            theirs.append(answers[sample.index].text if sample.index < len(answers) else None)
    return measure(
        [sample.text for sample in samples],
        [sample.prompt_id for sample in samples],
        tokens=tokens if all(tokens) else None,  # a server need not tell them
        at_limit=[sample.finish_reason == "length" for sample in samples],
        reference=theirs,
    )


def _doubts(groups: Sequence[Group], measured: Measured) -> list[str]:
    told = []
    if "generations/tokens" not in measured.estimates:
        told.append("the engine does not tell how many tokens answers have: generations/tokens is left out")
    if len(groups) == 1:
        told.append("there is one prompt only, so nothing has an interval; sample more prompts")
    return told


def _no_scores(_: Sample) -> dict[str, float]:
    return {}


# ---- during training ----


def names_on_the_way(job: Job) -> dict[int, str]:
    """What logs call the prompts of each evaluation that also samples during training, by its place in the list.

    Their split, or dataset and split where two splits are called alike.

    Raises:
        RecipeError: two have the same name.
    """
    asked: dict[int, tuple[str, str]] = {}
    for number, entry in enumerate(job.evals):
        built = entry.built
        if isinstance(built, Generations) and built.during:
            prompts = sampled.prompts_of(built.prompts, job, "generations")
            asked[number] = shown_name(prompts.dataset_name), sampled.split_name(prompts, built.split_name)
    splits = [split for _, split in asked.values()]
    short = len(set(splits)) == len(splits)
    names = {number: split if short else f"{dataset}, {split}" for number, (dataset, split) in asked.items()}
    first: dict[str, int] = {}
    for number, name in names.items():
        if name in first:
            raise RecipeError(
                f"evals.{first[name]} and evals.{number} (generations) would log numbers of both as {name!r} during "
                "training; give one of them a split_name, or during: 0"
            )
        first[name] = number
    return names


def sample_during(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], how: Sampling, *, length: int, batch: int = 64
) -> tuple[list[Group], int]:
    """Answers of a model that is being trained. Its mode and every random state are as before afterwards.

    The same weights give the same answers as ``align.sample`` with the same settings does: seeds belong to prompts.

    Args:
        model: a causal language model of transformers.
        tokenizer: of the model.
        prompts: as ``align.prompts.read_prompts`` finds them.
        how: number, temperature, length and seed.
        length: most tokens of prompt and answer.
        batch: sequences computed together.
    Returns:
        The answers in the order of the prompts, and how many prompts leave no room for one.
    """
    from data.chat import template_fingerprint

    asked: dict[int, tuple[Prompt, list[int], bool]] = {}
    for number, prompt in enumerate(prompts):
        rendered, ids = encoded(prompt.text, tokenizer)
        if len(ids) < length:
            asked[number] = prompt, ids, rendered.chat
    requests = [
        Request(
            number=number,
            prompt=tuple(ids),
            n=how.n,
            max_tokens=min(how.max_tokens, length - len(ids)),
            seed=spread(how.seed, int(prompt.id[:8], 16)),
        )
        for number, (prompt, ids, _) in asked.items()
    ]
    ends = {int(tokenizer.eos_token_id)}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    origin = Origin(
        engine="transformers, in training",
        model=str(getattr(model.config, "name_or_path", "") or ""),
        fingerprint="",  # of weights that change
        template=template_fingerprint(tokenizer),
        sampling=how.described(),
    )
    groups: dict[int, Group] = {}
    with _same_randomness():
        for number, drawn in draw(model, requests, how, ends=ends, pad=pad, tokenizer=tokenizer, batch=batch):
            prompt, ids, chat = asked[number]
            seed = spread(how.seed, int(prompt.id[:8], 16))
            groups[number] = Group(
                samples=tuple(
                    Sample(
                        prompt_id=prompt.id,
                        index=i,
                        row=prompt.row,
                        prompt=prompt.text,
                        text=decoded(tokenizer, without_end(each, ends), [] if chat else ids, how.stop),
                        token_ids=each.token_ids,
                        logprob=each.logprob,
                        finish_reason=each.finish_reason,
                        seed=seed + i,
                        origin=origin,
                        columns=prompt.columns,
                    )
                    for i, each in enumerate(drawn)
                )
            )
    return [groups[number] for number in sorted(groups)], len(prompts) - len(asked)


@contextmanager
def _same_randomness() -> Iterator[None]:
    """Python's, numpy's and torch's random states are afterwards what they were before."""
    python, numbers = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
