"""Whose answers the model's are compared with: another model's, stored samples, or a column of the dataset."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from align.errors import RecipeError, RunError
from align.judge_prompts import conversation
from align.prompt_settings import PromptSection
from align.sample_settings import SampledModel
from align.samples import Group, Origin, Sample, read
from align.sampling import Sampling
from align.typed import section
from evals.sampled import plain_name
from objectives.registry import did_you_mean

if TYPE_CHECKING:
    from evals.context import Context
    from evals.run_settings import Job

REFERENCE = "reference"
COLUMN = "a column of the dataset"


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """Where a baseline's answers come from; one of model, samples and column."""

    model: str | None = None
    """Hub id or folder of a model, folder of an adapter, or ``reference``; asked as the policy is."""
    samples: str | None = None
    """File that python -m align.sample wrote."""
    column: str | None = None
    """Column of the dataset with an answer: text, messages, or a list of scored responses."""
    answer_of: str | None = None
    """In a list of responses: whose, by their field ``model``; null takes the one of the highest score."""
    name: str | None = None
    """What results call it. Default: what it is called where it comes from."""

    def __post_init__(self) -> None:
        given = [key for key in ("model", "samples", "column") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"a baseline is one of model, samples and column, got {' and '.join(given) or 'none'}")
        if self.answer_of is not None and self.column is None:
            raise ValueError("answer_of has no effect without column; remove it")


@dataclass(frozen=True, slots=True, kw_only=True)
class Opponent:
    """A baseline with its answers."""

    name: str
    fingerprint: str
    """Of its weights, or of its answers where these are all there is."""
    answers: Mapping[str, Sequence[Sample]]
    """By the prompt's id."""
    warnings: Sequence[str] = ()

    @property
    def described(self) -> str:
        """As results carry it: baselines of equal names and weights are the same."""
        return f"{self.name} ({self.fingerprint})"

    @property
    def groups(self) -> list[Group]:
        """Its answers, by prompt."""
        return [Group(samples=tuple(each)) for each in self.answers.values()]


def baselines_of(values: Any) -> tuple[Baseline, ...]:
    """Baselines as recipes write them: ``reference``, a model, a file of samples, a mapping, or a list of these.

    Raises:
        ValueError: one sentence that begins with the key.
    """
    listed = values if isinstance(values, list) else [values]
    if not listed:
        raise ValueError("baseline is empty; name a model, reference, a file of samples, or {column: …}")
    found: list[Baseline] = []
    for number, value in enumerate(listed):
        path = f"baseline.{number}" if isinstance(values, list) else "baseline"
        if isinstance(value, str):
            value = {"samples" if value.endswith(".jsonl") else "model": value}
        if not isinstance(value, Mapping):
            raise ValueError(f"{path} must be a name or a mapping, e.g. {{column: output}}, got {value!r}")
        try:
            found.append(section(Baseline, value, path))
        except RecipeError as error:
            raise ValueError(str(error)) from None
    return tuple(found)


def check(baseline: Baseline, job: Job) -> None:
    """Refuses what can't be there, before anything is loaded.

    Raises:
        RecipeError: one sentence on what is wrong.
    """
    if baseline.samples is not None and not Path(baseline.samples).is_file():
        raise RecipeError(
            f"baseline: there is no file of samples {baseline.samples!r}; python -m align.sample makes one"
        )
    if baseline.model is None:
        return
    if job.serving.chosen == "server":
        raise RecipeError(
            f"baseline {baseline.model!r} can't be sampled with serving.engine server, which serves one model; sample "
            "it beforehand and give baseline: {samples: FILE}"
        )
    looks_local = baseline.model.startswith((".", "/")) or baseline.model.count("/") > 1
    if baseline.model != REFERENCE and looks_local and not Path(baseline.model).is_dir():
        raise RecipeError(f"baseline: there is no model {baseline.model!r}; name a folder or a Hub id")


def keeping(prompts: PromptSection, baselines: Sequence[Baseline]) -> PromptSection:
    """The prompts with the columns that baselines stand in."""
    columns = [each.column for each in baselines if each.column is not None]
    return dataclasses.replace(prompts, keep=list(dict.fromkeys([*prompts.keep, *columns])))


def answers_of(
    baseline: Baseline, context: Context, groups: Sequence[Group], prompts: PromptSection, sampling: Sampling
) -> Opponent:
    """A baseline's answers to the prompts that the model answered.

    Args:
        baseline: where from.
        context: samples models.
        groups: the model's own answers, with the columns that are needed.
        prompts: where the prompts come from.
        sampling: how the model answered.
    Raises:
        RunError: it has no answer to any of these prompts.
    """
    if baseline.column is not None:
        return _of_column(baseline, groups)
    if baseline.samples is not None:
        path = Path(baseline.samples)
        name, drawn = path.name.removesuffix(".jsonl"), list(read(path))
    else:
        model, name = _model(str(baseline.model), context)
        drawn = context.samples(prompts, sampling, "baseline", model)
    asked = {group.prompt_id for group in groups}
    answers = {group.prompt_id: group.samples for group in drawn if group.prompt_id in asked}
    if not answers:
        raise RunError(
            f"the baseline {name} has no answer to any of {len(asked)} prompts; sample it on the same prompts"
        )
    here = groups[0].samples[0].origin
    there = next(iter(answers.values()))[0].origin
    name = plain_name(baseline.name or name)
    return Opponent(name=name, fingerprint=there.fingerprint, answers=answers, warnings=_differences(name, here, there))


def _differences(name: str, here: Origin, there: Origin) -> list[str]:
    """What else than the model differs between two sets of answers."""
    found: list[str] = []
    if here.template != there.template:
        found.append(
            f"{name} was asked with another chat template ({there.template} and not {here.template}), which may be "
            "part of the difference"
        )
    keys = [key for key in {**here.sampling, **there.sampling} if key not in ("n", "seed")]
    other = [key for key in keys if here.sampling.get(key) != there.sampling.get(key)]
    if other:
        told = ", ".join(f"{key} {there.sampling.get(key)} and not {here.sampling.get(key)}" for key in other)
        found.append(f"{name} was sampled otherwise ({told}), which may be part of the difference")
    return found


def _model(name: str, context: Context) -> tuple[SampledModel, str]:
    from evals.context import as_sampled
    from evals.run_settings import EvaluatedModel

    wanted = context.job.compared_with if name == REFERENCE else name
    assert wanted is not None, "an evaluation without a reference was refused"
    own = context.job.model
    if wanted == "base":
        base = context.base.model_name_or_path
        return as_sampled(context.base, None), Path(base).name if Path(base).is_dir() else base
    # The reference is what the policy was trained from: it reads the same template and ends with the same token.
    kin = name == REFERENCE
    model = EvaluatedModel(
        model_name_or_path=wanted,
        dtype=own.dtype,
        attn_implementation=own.attn_implementation,
        trust_remote_code=own.trust_remote_code,
        eos_token=own.eos_token if kin else None,
        chat_template=own.chat_template if kin else None,
    )
    job = dataclasses.replace(context.job, model=model)
    return as_sampled(job.base, job.adapter), job.name


def _of_column(baseline: Baseline, groups: Sequence[Group]) -> Opponent:
    assert baseline.column is not None
    answers: dict[str, Sequence[Sample]] = {}
    for group in groups:
        text = _text(group.columns.get(baseline.column), baseline)
        if text is None:
            continue
        first = group.samples[0]
        answers[group.prompt_id] = (
            dataclasses.replace(
                first,
                index=0,
                text=text,
                token_ids=(),
                logprob=None,
                finish_reason="stop",
                origin=Origin(engine=COLUMN, model=baseline.column, fingerprint="", template="", sampling={}),
            ),
        )
    if not answers:
        of = f" by {baseline.answer_of!r}{_near(baseline, groups)}" if baseline.answer_of else ""
        raise RunError(
            f"the baseline's column {baseline.column!r} holds no answer{of} in any of {len(groups)} rows; name another"
        )
    texts = "\0".join(f"{prompt} {samples[0].text}" for prompt, samples in sorted(answers.items()))
    name = plain_name(baseline.name or baseline.answer_of or baseline.column)
    return Opponent(name=name, fingerprint=xxhash.xxh3_64_hexdigest(texts.encode()), answers=answers)


def _near(baseline: Baseline, groups: Sequence[Group]) -> str:
    cell = groups[0].columns.get(baseline.column or "")
    names = [str(each.get("model")) for each in cell if isinstance(each, Mapping)] if isinstance(cell, list) else []
    return did_you_mean(str(baseline.answer_of), names)


def _text(cell: Any, baseline: Baseline) -> str | None:
    """The answer in a cell; None where there is none."""
    if isinstance(cell, list | tuple):
        listed = [each for each in cell if isinstance(each, Mapping)]
        responses = [each for each in listed if isinstance(each.get("text"), str)]
        if baseline.answer_of is not None:
            responses = [each for each in responses if each.get("model") == baseline.answer_of]
        if responses:
            return str(max(responses, key=lambda each: float(each.get("score") or 0.0))["text"])
        messages = [each for each in listed if "content" in each]
        return conversation(tuple(messages[-1:])) if messages and baseline.answer_of is None else None
    return cell if isinstance(cell, str) and baseline.answer_of is None else None
