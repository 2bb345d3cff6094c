"""A fixed set of prompts, sampled at every evaluation of a training run from the weights as they are then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from align import model as models
from align.build import Run
from align.engines import launched, shards_weights
from align.forward import causal_lm
from align.prompts import Prompt, read_prompts
from align.sampling import Sampling
from evals import sampled
from evals.evaluations.generations import Generations, measured_of, names_on_the_way, sample_during
from evals.generations_file import write_generations
from evals.held_out import HeldOut
from evals.redact import public
from evals.results import as_metrics
from evals.run_settings import Job, at_the_end

CONTEXT = 2048
"""Most tokens of prompt and answer where a model names no context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """The prompts of one evaluation, and how they are sampled."""

    prompts: Sequence[Prompt]
    how: Sampling
    dataset: str
    split: str
    logged: str
    """What stands behind its metrics' names in a line of the log."""


class SamplesOnTheWay(TrainerCallback):
    """Samples on the first process after every evaluation; the others wait for it where they next meet.

    Args:
        run: ready to start.
        job: whose entries of generations say which prompts, how many of them, and how they are sampled.
        held_out: keeps the results.
    """

    def __init__(self, run: Run, job: Job, held_out: HeldOut) -> None:
        self.run, self.held_out, self.output_dir = run, held_out, Path(job.out.output_dir)
        names = names_on_the_way(job)
        self.asked = [_asked(job.evals[number].built, job, name, len(names) > 1) for number, name in names.items()]
        config = causal_lm(run.trainer.unwrapped).config
        self.length = models.context_length(config) or CONTEXT

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draws, measures, files and logs."""
        line: dict[str, float] = {}
        for asked in self.asked:
            line |= self._sampled(asked, state.global_step)
        if line:
            self.run.trainer.log({f"eval_{key.removeprefix('eval/')}": value for key, value in line.items()})

    def _sampled(self, asked: _Asked, step: int) -> dict[str, float]:
        trainer = self.run.trainer
        trainer.note("sampling")
        with trainer.scoring():
            groups, _ = sample_during(
                trainer.unwrapped, self.run.tokenizer, asked.prompts, asked.how, length=self.length
            )
        if not groups:
            return {}
        measured = measured_of(groups)
        where: dict[str, Any] = {"dataset": asked.dataset, "split": asked.split, "step": step}
        extra = {"sampling": asked.how.described(), "template": groups[0].samples[0].origin.template}
        found = measured.results(**where, extra=extra)
        shown = {**where, "split": f"{asked.split}, generations"}
        name = self.run.recipe.train.run_name or self.output_dir.resolve().name
        write_generations(self.output_dir, sampled.generations(groups, lambda sample: {}, **shown, model=name))
        own = (asked.dataset, asked.split, step)
        kept = [each for each in self.held_out.results if (each.dataset, each.split, each.step) != own]
        self.held_out.results = [*kept, *found]
        self.held_out.keep(self.held_out.results)
        return {f"{key}{asked.logged}": value for key, value in as_metrics(found).items()}


def _asked(entry: Generations, job: Job, name: str, several: bool) -> _Asked:
    section = sampled.prompts_of(entry.prompts, job, "generations")
    prompts = read_prompts(section).found[: entry.during]
    first = f", first {len(prompts)}"
    return _Asked(
        prompts=prompts,
        how=sampled.seeded(entry.sampling, job),
        dataset=section.dataset_name,
        split=sampled.split_name(section, entry.split_name) + first,
        logged=f" ({public(name)}{first})" if several else "",
    )


def add_to(run: Run, held_out: HeldOut | None, output_dir: Path, say: Callable[[str], None]) -> None:
    """Lets a run sample on its way, where its recipe asks for it; called on the first process.

    Args:
        run: ready to start.
        held_out: the run's evaluation; without one there is nothing to sample at.
        output_dir: of the run.
        say: told where it can't be.
    """
    if not run.recipe.evals or held_out is None:
        return
    job = at_the_end(run.recipe, output_dir)
    if not names_on_the_way(job):
        return
    if shards_weights(launched()):
        say(f"note: generations are sampled at the end only: under {launched()} no process has whole weights")
        return
    run.trainer.add_callback(SamplesOnTheWay(run, job, held_out))
