"""Answers to prompts, chosen from many samples: best-of-N, votes, best-of-majority, QAlign.

    python -m align.answer --config launch/recipes/answer.yaml --model_name_or_path M --dataset_name D \\
        --n 64 --strategy best_of_majority --alpha 0.05 --output answers.jsonl
    python -m align.answer --samples samples.jsonl --scores scores.jsonl --strategy majority --output answers.jsonl
    python -m align.answer --help       every key, its default and what it means

The first form samples, scores and chooses; what it sampled stays beside the output, so that another strategy costs
nothing. The second chooses from what python -m align.sample and python -m align.scores wrote.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align import sample as sampling_command
from align import samples as stored
from align import settings
from align.answers import Answer, answered, write
from align.chains import QAlign, run_chains
from align.console import quiet_libraries
from align.errors import RecipeError, RunError
from align.groups import group_samples
from align.keys import Schema
from align.prompt_settings import PromptSection
from align.sample_settings import Job, OutputSection, SampledModel, goal_of
from align.samplers import ServingSection
from align.samples import Group
from align.sampling import Sampling
from align.scores import SCORERS, SampleScore, read_scores, score_file
from align.selection import SELECTIONS, Choice
from align.typed import Entry
from objectives import RELABELERS, REWARD_TRANSFORMS
from objectives.registry import Registry

Say = Callable[[str], None]

STRATEGIES = Registry(
    "strategy", elsewhere={"bon": "best_of_n", "bom": "best_of_majority", "self_consistency": "majority"}
)
"""Every way to an answer: the selections, which look at samples, and QAlign, which draws its own."""
for _name in SELECTIONS.names():
    STRATEGIES.register(_name)(SELECTIONS[_name])
STRATEGIES.register("qalign")(QAlign)

VOTES = ("majority", "weighted_majority", "best_of_majority", "soft_best_of_n")
"""Strategies that count equal answers, so that answers have to be found in responses."""


@dataclass(frozen=True, kw_only=True)
class AnswerSection:
    """What comes out, and from what."""

    output: str
    """File of answers, JSON lines; replaced if it is there."""
    samples: str | None = None
    """Samples to choose from, instead of drawing them."""
    scores: str | None = None
    """Their scores."""

    def __post_init__(self) -> None:
        if (self.samples is None) != (self.scores is None):
            raise ValueError("samples and scores go together: give both, or neither to draw and score them")


SCHEMA = Schema(
    sections={
        "answer": AnswerSection,
        "model": SampledModel,
        "data": PromptSection,
        "sampling": Sampling,
        "serving": ServingSection,
    },
    named={
        "strategy": STRATEGIES,
        "scorers": SCORERS,
        "reward_transforms": REWARD_TRANSFORMS,
        "relabel": RELABELERS,
    },
    required=("answer", "strategy"),
    example="launch/recipes/answer.yaml",
    command="python -m align.answer",
)
FRESH = ("model", "data", "sampling", "serving", "scorers", "reward_transforms", "relabel")
"""Sections that say how samples are drawn and scored."""


def choose(
    scored: Iterable[tuple[Group, Sequence[SampleScore]]],
    strategy: Any,
    *,
    same: Callable[[Any, Any], bool] | None = None,
    texts: bool = False,
) -> Iterator[Answer]:
    """Answers of a selection, one for each prompt.

    Samples without a score are left out of strategies that read rewards.

    Args:
        scored: groups with the scores of their samples.
        strategy: one of ``align.selection.SELECTIONS``, built.
        same: whether answers that are written differently are the same one.
        texts: no answers were looked for in responses: every response is its own.
    Raises:
        RunError: a strategy that counts equal answers has none.
    """
    name = SELECTIONS.name_of(strategy)
    if texts and name in VOTES:
        raise RunError(
            f"strategy {name} counts equal answers, and no scorer finds answers in responses; add one that does (math, "
            "regex, exact), with column: null where the right answer is not known"
        )
    for number, (group, scores) in enumerate(scored):
        rewarded = name != "majority"
        known = [each.score for each in scores if each.score is not None]
        lowest = min(known, default=0.0) - 1.0  # a vote counts samples without a score too, and shows another one
        kept = [i for i, each in enumerate(scores) if each.score is not None or not rewarded]
        if not kept:
            yield answered(group, Choice(picks=(), n_survivors=0), [])
            continue
        answers = [i if texts else scores[i].answer for i in kept]
        rewards = [lowest if (score := scores[i].score) is None else score for i in kept]
        try:
            choice = strategy(group_samples(answers, rewards, same, number=number))
        except ValueError as error:
            raise RunError(f"prompt {group.prompt_id}: {error}") from None
        yield answered(group, choice, kept, texts=texts)


def run(found: dict[str, Any], say: Say = print) -> Path:
    """Answers, as the settings say.

    Args:
        found: sections of ``SCHEMA``, built.
        say: told what is done.
    Returns:
        The file of answers.
    Raises:
        RecipeError, DataError, RunError: one sentence on what is wrong and what to do.
    """
    section: AnswerSection = found["answer"]
    output = Path(section.output)
    entry = _one(found["strategy"])
    described = {"name": entry.name, **entry.resolved()}
    if section.samples is not None and section.scores is not None:
        if entry.name == "qalign":
            raise RecipeError("strategy qalign draws its own samples; leave answer.samples and answer.scores out")
        _choose(Path(section.samples), Path(section.scores), entry, found["scorers"], output, described, say)
        return output
    if not found["scorers"]:
        raise RecipeError("there is no 'scorers' section: name what finds answers or says which are good, e.g. math")
    out = OutputSection(output=str(output.with_name(f"{output.stem}.samples.jsonl")))
    job = Job(
        model=found["model"],
        data=found["data"],
        sampling=found["sampling"],
        serving=found["serving"],
        out=out,
        goal=goal_of(found["relabel"]),
    )
    transforms = [each.built for each in found["reward_transforms"]]
    if entry.name == "qalign":
        write(output, run_chains(job, entry.built, found["scorers"], transforms, say), described, say)
        return output
    samples = sampling_command.run(job, say=say)
    scores = output.with_name(f"{output.stem}.scores.jsonl")
    score_file(samples, scores, found["scorers"], transforms, say)
    _choose(samples, scores, entry, found["scorers"], output, described, say)
    return output


def _choose(
    samples: Path,
    scores: Path,
    entry: Entry,
    scorers: Sequence[Entry],
    output: Path,
    described: dict[str, Any],
    say: Say,
) -> None:
    answering = [each.built for each in scorers if getattr(each.built, "answers", False)]
    if not scorers:  # stored scores: whether answers were looked for shows in them
        texts = all(each.answer is None for _, found in read_scores(scores, stored.read(samples)) for each in found)
    else:
        texts = not answering
    same = getattr(answering[0], "equal", None) if answering else None
    try:
        answers = choose(read_scores(scores, stored.read(samples)), entry.built, same=same, texts=texts)
        write(output, answers, described, say)
    finally:
        for scorer in answering:
            getattr(scorer, "close", lambda: None)()


def _one(entries: Sequence[Entry]) -> Entry:
    if len(entries) != 1:
        raise RecipeError(f"strategy: {len(entries)} are listed; name one")
    return entries[0]


def read_answer(config: str | None, words: Sequence[str]) -> dict[str, Any]:
    """The settings of a command line; from stored samples nothing of the model is read.

    Raises:
        RecipeError: one sentence on what is wrong.
    """
    written = settings.merge(config, words, SCHEMA).values
    if (written.get("answer") or {}).get("samples") is None:
        schema = dataclasses.replace(SCHEMA, required=(*SCHEMA.required, "model", "data"))
        return settings.read_settings(config, words, schema)
    kept = [name for name in FRESH if name in written and name != "scorers"]
    if kept:
        raise RecipeError(f"section {kept[0]} has no effect on stored samples; remove it, or answer.samples")
    sections = {"answer": AnswerSection}
    return settings.read_settings(config, words, dataclasses.replace(SCHEMA, sections=sections))


def main(arguments: Sequence[str] | None = None) -> int:
    """Answers; see ``align.settings.command``."""

    def do(config: str | None, words: list[str]) -> None:
        found = read_answer(config, words)
        quiet_libraries()
        run(found, say=settings.say)

    kept = "stopped; what was sampled and scored is kept (chains of qalign are not)"
    return settings.command(arguments, __doc__, SCHEMA, do, stopped=kept)


if __name__ == "__main__":
    sys.exit(main())
