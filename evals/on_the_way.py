"""A fixed set of prompts, sampled at every evaluation of a training run from the weights as they are then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from align import model as models
from align.build import Run
from align.engines import launched, shards_weights
from align.forward import causal_lm
from align.prompts import read_prompts
from evals import sampled
from evals.evaluations.generations import Generations, measured_of, sample_during
from evals.generations_file import write_generations
from evals.held_out import HeldOut
from evals.results import as_metrics
from evals.run_settings import at_the_end

CONTEXT = 2048
"""Most tokens of prompt and answer where a model names no context."""


class SamplesOnTheWay(TrainerCallback):
    """Samples on the first process after every evaluation; the others wait for it where they next meet.

    Args:
        run: ready to start.
        entry: which prompts, how many of them, and how they are sampled.
        held_out: keeps the results.
        output_dir: of the run.
    """

    def __init__(self, run: Run, entry: Generations, held_out: HeldOut, output_dir: Path) -> None:
        job = at_the_end(run.recipe, output_dir)
        prompts = sampled.prompts_of(entry.prompts, job, "generations")
        self.run, self.held_out, self.output_dir = run, held_out, output_dir
        self.how = sampled.seeded(entry.sampling, job)
        self.prompts = read_prompts(prompts).found[: entry.during]
        self.dataset = prompts.dataset_name
        self.split = f"{sampled.split_name(prompts, entry.split_name)}, first {len(self.prompts)}"
        config = causal_lm(run.trainer.unwrapped).config
        self.length = models.context_length(config) or CONTEXT

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draws, measures, files and logs."""
        trainer = self.run.trainer
        trainer.note("sampling")
        with trainer.scoring():
            groups, _ = sample_during(trainer.unwrapped, self.run.tokenizer, self.prompts, self.how, length=self.length)
        if not groups:
            return
        step = state.global_step
        measured = measured_of(groups)
        where: dict[str, Any] = {"dataset": self.dataset, "split": self.split, "step": step}
        extra = {"sampling": self.how.described(), "template": groups[0].samples[0].origin.template}
        found = measured.results(**where, extra=extra)
        shown = {**where, "split": f"{self.split}, generations"}
        name = self.run.recipe.train.run_name or self.output_dir.resolve().name
        write_generations(self.output_dir, sampled.generations(groups, lambda sample: {}, **shown, model=name))
        own = (self.dataset, self.split, step)
        kept = [each for each in self.held_out.results if (each.dataset, each.split, each.step) != own]
        self.held_out.results = [*kept, *(replace(each) for each in found)]
        self.held_out.keep(self.held_out.results)
        trainer.log({f"eval_{key.removeprefix('eval/')}": value for key, value in as_metrics(found).items()})


def add_to(run: Run, held_out: HeldOut | None, output_dir: Path, say: Callable[[str], None]) -> None:
    """Lets a run sample on its way, where its recipe asks for it; called on the first process.

    Args:
        run: ready to start.
        held_out: the run's evaluation; without one there is nothing to sample at.
        output_dir: of the run.
        say: told where it can't be.
    """
    for entry in run.recipe.evals:
        if not isinstance(entry.built, Generations) or not entry.built.during or held_out is None:
            continue
        if shards_weights(launched()):
            say(f"note: generations are sampled at the end only: under {launched()} no process has whole weights")
            continue
        run.trainer.add_callback(SamplesOnTheWay(run, entry.built, held_out, output_dir))
