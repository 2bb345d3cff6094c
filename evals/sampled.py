"""What evaluations of sampled answers share: their named keys, what their results depend on, lines for the browser."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align import judges, reward_scorer, verifiers, world_scorers  # noqa: F401  # registers scorers
from align.errors import RecipeError
from align.keys import Schema
from align.prompt_settings import PromptSection
from align.samples import Group, Sample
from align.sampling import Drawing, Sampling
from align.scorers import SCORERS
from align.selection import SELECTIONS
from align.typed import Entry, entries
from evals.generations_file import Generation
from objectives.checks import require

if TYPE_CHECKING:
    from evals.context import Context
    from evals.run_settings import Job

NAMED = Schema(
    sections={},
    named={"judge": SCORERS, "verifier": SCORERS, "scorers": SCORERS, "strategies": SELECTIONS},
    required=(),
    example="launch/recipes/eval.yaml",
    command="python -m evals run",
)
"""Keys of evaluations that hold scorers or strategies: a name, a mapping with a name, or a list of these."""
Named = str | dict[str, Any] | list[Any]
"""How recipes write them."""


def named(kind: str, values: Named) -> tuple[Entry, ...]:
    """The entries of a key of ``NAMED``.

    Args:
        kind: the key.
        values: a name, a mapping with a name, or a list of these.
    Raises:
        ValueError: one sentence that begins with the key.
    """
    written = {f"{path}.{key}": "the recipe" for path, entry in _mappings(kind, values) for key in entry}
    try:
        return entries(kind, values, written, set(), [], NAMED)
    except RecipeError as error:
        raise ValueError(str(error)) from None


def check_scorers(entries: Sequence[Entry]) -> None:
    """Refuses scorers that can't work on this machine, as far as they can tell before they are used.

    Raises:
        RunError: one sentence on what is missing.
    """
    for entry in entries:
        getattr(entry.built, "check", lambda: None)()


def _mappings(kind: str, values: Named) -> Iterator[tuple[str, Mapping[str, Any]]]:
    listed = [(f"{kind}.{i}", each) for i, each in enumerate(values)] if isinstance(values, list) else [(kind, values)]
    return ((path, each) for path, each in listed if isinstance(each, Mapping))


def prompts_of(prompts: PromptSection | None, job: Job, name: str) -> PromptSection:
    """The prompts of an evaluation: its own, or those of the pairs.

    Args:
        prompts: as the evaluation has them.
        job: whose data section is used where it has none.
        name: of the evaluation, for messages.
    Raises:
        RecipeError: there are neither.
    """
    if prompts is not None:
        return prompts
    if job.data is None:
        raise RecipeError(f"evals: {name} needs prompts; write prompts: {{dataset_name: …}}, or a data section")
    data = job.data
    return PromptSection(
        dataset_name=data.dataset_name,
        dataset_config=data.dataset_config,
        split=data.split or "test",
        columns=data.columns,
        format=data.format,
        as_chat=data.as_chat,
        max_rows=data.max_rows,
    )


@dataclass(frozen=True, kw_only=True)
class EvalSampling(Drawing):
    """How an evaluation's answers are drawn."""

    seed: int | None = None
    """The same seed gives the same answers. Default: out.seed; in a training recipe, train.seed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed is not None:
            require("seed", self.seed, 0 <= self.seed < 2**31, "in [0, 2³¹)")


def seeded(sampling: EvalSampling, job: Job) -> Sampling:
    """The settings with the seed of the whole evaluation, where they have none of their own."""
    seed = job.out.seed if sampling.seed is None else sampling.seed
    return Sampling(**{**asdict(sampling), "seed": seed})


def split_name(prompts: PromptSection, called: str | None) -> str:
    """What results call the prompts: as the evaluation says, else their split; of a single file ``all``."""
    return called or ("all" if Path(prompts.dataset_name).is_file() else prompts.split)


def conditions(context: Context, sampling: Sampling, groups: Sequence[Group]) -> dict[str, Any]:
    """What every number depends on besides the model, as ``evals.compare`` reads it.

    The seed stands apart: answers of other seeds are draws of one distribution.

    Args:
        context: of the evaluation.
        sampling: how answers were drawn.
        groups: the answers.
    """
    how = {key: value for key, value in sampling.described().items() if key not in ("n", "seed")}
    return {
        "template": context.template,
        "sampling": how,
        "samples": sampling.n,
        "seed": sampling.seed,
        "engine": groups[0].samples[0].origin.engine if groups else "",
        "truncated": cut_off(groups),
        **({"prompts_left_out": dict(context.left_out)} if context.left_out else {}),
    }


def cut_off(groups: Sequence[Group]) -> int:
    """Answers that ended at their limit of tokens."""
    return sum(sample.finish_reason == "length" for group in groups for sample in group.samples)


def settings_of(entry: Entry) -> dict[str, Any]:
    """Name and keys of a scorer, without those that no score depends on."""
    free = {*getattr(entry.built, "free", ()), "base_url"}
    return {"name": entry.name, **{key: value for key, value in entry.resolved().items() if key not in free}}


def generations(
    groups: Sequence[Group],
    scores: Callable[[Sample], Mapping[str, float]],
    *,
    dataset: str,
    split: str,
    step: int,
    model: str,
) -> list[Generation]:
    """Answers with what was found of them; scores that are not finite are left out.

    Args:
        groups: all answers of one model.
        scores: of an answer, by metric.
        dataset: where the prompts come from.
        split: what they are called, with the evaluation's name: another may have asked the same prompts otherwise.
        step: optimizer steps taken.
        model: who answered, as reports show it.
    """
    return [
        Generation(
            dataset=dataset,
            split=split,
            step=step,
            model=model,
            prompt_id=group.prompt_id,
            prompt=group.prompt if isinstance(group.prompt, str) else [dict(each) for each in group.prompt],
            sample=sample.index,
            text=sample.text,
            finish_reason=sample.finish_reason,
            tokens=len(sample.token_ids),
            scores={name: value for name, value in scores(sample).items() if math.isfinite(value)},
        )
        for group in groups
        for sample in group.samples
    ]


def is_pairwise(entry: Entry) -> bool:
    """Whether a judge is shown two answers at a time."""
    return entry.name == "judge" and entry.built.mode == "pairwise"


def plain_name(text: str) -> str:
    """A name that can stand in a split's: without commas, which set parts of splits apart."""
    return re.sub(r"\s*,\s*", " ", text).strip()


def by_reason(reasons: Sequence[str]) -> dict[str, int]:
    """How often each reason occurs, without its particulars; the most frequent first."""
    return dict(Counter(reason.partition(": ")[0] for reason in reasons if reason).most_common())
