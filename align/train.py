"""Trains a policy from a recipe and leaves a complete run directory.

    accelerate launch align/train.py --config launch/recipes/dpo.yaml --output_dir runs/mine
    python align/train.py --help        every key, its default and what it means
    python align/train.py --config … --plan     memory, speed and time it will take on this machine; then stops

Cheap things come first: a wrong key, file, row or checkpoint stops the run before the model is loaded.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from align import settings
from align.console import hide, idle_libraries, many_imports, quiet_libraries, tell
from align.errors import RecipeError, RunError
from align.keys import Schema
from align.lifetime import SAVED, Preempted, alone, is_ours
from align.recipe import Recipe, read_recipe
from data.errors import DataError

Measure = Callable[[Any, Any, int], list[Any]]
"""Maps a policy, its tokenizer and the number of steps taken to results."""


MALLOC_OPTIONS = ((-4, 0), (-1, 2**31 - 1), (-2, 2**26))
"""Of glibc's ``malloc.h``: M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD; no block is mapped by itself."""


def main(arguments: Sequence[str] | None = None, measure: Measure | None = None) -> int:
    """Runs one recipe.

    Returns:
        The exit status: 0; 2 after one sentence on what is wrong; 75 where SIGTERM asked the run to stop and a
        checkpoint was written; 74 where a process waited for another one in vain; 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or "--help" in words or "-h" in words:
        print(usage())
        return 0
    try:
        only_plan = "--plan" in words
        known = schema()
        config, keys = settings.split_config([word for word in words if word != "--plan"], known.example)
        recipe = read_recipe(config, keys, known)
        run(recipe, command=shlex.join(["align/train.py", *words]), measure=measure, only_plan=only_plan)
    except (RecipeError, DataError, RunError) as error:
        first = os.environ.get("RANK", "0") == "0" or "LOCAL_RANK" not in os.environ
        # Usually all processes say the same, but not always.
        who = "" if first else f"[process {os.environ['RANK']}] "
        tell(f"{who}error: {error}")
        return 2
    except Preempted as stopped:
        tell(str(stopped))
        return SAVED
    except KeyboardInterrupt:
        print("stopped; go on from the last checkpoint with --resume_from_checkpoint last", file=sys.stderr, flush=True)
        return 130
    return 0


def usage() -> str:
    """Every key of every section, with default and meaning."""
    about = "objective: name, weight, and the objective's own keys; `python -m objectives` lists them."
    return f"{settings.usage(__doc__, schema())}\n\n{about}"


def schema() -> Schema:
    """Keys of recipes for training, with the evaluations that can end a run."""
    from evals.run_settings import TRAINING

    return TRAINING


def keep_freed_memory() -> None:
    """Lets this process keep what it frees, where glibc would give large blocks back and get them again, empty.

    The kernel clears every page that it hands out: in training on CPUs that was a sixth of the time. Peaks stay as they
    are, since what was freed is used first.
    """
    import ctypes

    from align.engines import on_gpu

    if on_gpu() or not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library
        change = ctypes.CDLL("libc.so.6").mallopt
        for option, value in MALLOC_OPTIONS:
            change(option, value)


def run(recipe: Recipe, command: str = "", measure: Measure | None = None, *, only_plan: bool = False) -> Path:
    """Trains as the recipe says.

    Args:
        recipe: from ``read_recipe``.
        command: the command line, for the model card.
        measure: called on the first process before the first step and after the last one, for results that need
            samples of the policy.
        only_plan: stop after the forecast.
    Returns:
        The run directory.
    Raises:
        RecipeError, DataError, RunError: one sentence on what is wrong and what to do.
        Preempted: the run was asked to stop by SIGTERM, and has left a checkpoint.
    """
    with contextlib.ExitStack() as held:
        return _run(recipe, command, measure, only_plan, held)


def _run(recipe: Recipe, command: str, measure: Measure | None, only_plan: bool, held: contextlib.ExitStack) -> Path:
    first = os.environ.get("RANK", "0") == "0"
    say: Callable[[str], None] = (lambda line: print(line, flush=True)) if first else lambda line: None
    for line in recipe.idle:
        say(f"note: {line}")

    # Imported here, so that a misspelt key is answered at once.
    with many_imports() if "align.build" not in sys.modules else contextlib.nullcontext():
        quiet_libraries()
        keep_freed_memory()
        from align import engines

        if is_ours():
            hide(idle_libraries(recipe, engines.launched()))
        from align import assemble, density, resume, saving, support
        from align import model as models
        from align.build import build
        from align.forecast import ForecastError, look_ahead, most_memory
        from data.preparation import prepare
        from data.store import cache_dir
        from evals import doctor, on_the_way, run_directory, run_settings
        from evals.held_out import HeldOut

    # What can be refused without reading a weight is refused now.
    assemble.check_names(recipe)
    output_dir, overwrite = Path(recipe.train.output_dir), recipe.train.overwrite_output_dir
    support.refuse(recipe, engines.launched())
    found = resume.agree(recipe, engines.launched(), assemble.world_size())
    checkpoint, again = found.checkpoint, found.again
    for line in found.told:
        say(f"resume: {line}")
    if first:
        saving.refuse_output_dir(output_dir, overwrite=overwrite or again, resume=checkpoint is not None)
    run_directory.check_hub(recipe)
    run_settings.check_recipe(recipe)
    config = models.load_config(recipe.model)
    tokenizer = models.load_tokenizer(recipe.model)
    models.check_before_loading(recipe, config)
    encoder = recipe.mixture.needs.density_ratio
    if encoder not in (None, "policy"):
        density.check_encoder(encoder)
    spec = assemble.data_spec(recipe, models.max_length(recipe.data.max_length, config))
    with saving.explained(cache_dir(), "set ALIGN_CACHE to a folder that can be written to"):
        prepared = doctor.filtered(recipe, prepare(spec, tokenizer), spec, config, tokenizer, say)
    assemble.tell_data(prepared.report, say)
    models.check_vocabulary(recipe.model, config, *prepared.tables())
    ahead = None
    if first:
        try:
            ahead = look_ahead(recipe, config, prepared.train.table)
        except ForecastError as error:
            if only_plan:
                raise RunError(f"--plan: memory and speed of this model can't be told beforehand ({error})") from None
            say(f"forecast: not possible for this model ({error})")
        for line in ahead.lines() if ahead else []:
            say(line)
        if ahead is not None and recipe.train.async_save:
            ahead.refuse_copies()
    if only_plan:
        return output_dir
    if checkpoint is not None:
        saving.refuse_other_rows(checkpoint, prepared.train.table.fingerprint())
    if first:
        held.enter_context(saving.alone_in(output_dir))
        saving.claim_output_dir(output_dir, overwrite=overwrite or again)
        for line in saving.set_aside(output_dir, checkpoint) if checkpoint is not None else ():
            say(f"resume: {line}")
        saving.require_space(output_dir, assemble.bytes_needed(recipe), "the weights with their checkpoints")
        if recipe.data.check:
            run_directory.check_data(spec, tokenizer, output_dir, command, say)

    # From here on it costs something.
    held_out = HeldOut(prepared.eval, *run_directory.eval_name(recipe)) if prepared.eval else None
    ready = build(recipe, config, tokenizer, prepared, held_out, say, ahead.fit if ahead else None)
    trainer = ready.trainer
    held.enter_context(ready.trackers)
    if first:
        saving.require_space(output_dir, ready.bytes_to_save(), "the weights with their checkpoints")
        saving.require_memory(ready.bytes_to_copy())
    with saving.explained(output_dir), watched(trainer, recipe.train.ddp_timeout), trainer.stop_signal.listening():
        if first:
            run_directory.begin(ready, output_dir, checkpoint, held_out, say)
            on_the_way.add_to(ready, held_out, output_dir, say)
        measured = list(measure(trainer.model, tokenizer, 0)) if first and measure is not None else []
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if trainer.state.global_step < trainer.state.max_steps:
            raise Preempted(
                f"stopped by SIGTERM; checkpoint-{trainer.state.global_step} is complete: go on with "
                "--resume_from_checkpoint last (or auto, which also starts)"
            )
        anchor = trainer.anchor
        averaged = anchor is not None and bool(anchor.averages)
        if anchor is not None:
            anchor.average(trainer.unwrapped)
        trainer.save_model()
        # The first process alone knows what a run evaluated before it was resumed.
        if held_out is not None and trainer.gather(averaged or held_out.last_step != trainer.state.global_step)[0]:
            trainer.evaluate()
        results: list[Any] = []
        if first:
            (output_dir / saving.STARTED).unlink(missing_ok=True)
            if measure is not None:
                measured += measure(trainer.unwrapped, tokenizer, trainer.state.global_step)
            results = [*(held_out.results if held_out else []), *measured]
            if ahead is not None and ready.speed.steps:
                lines, found = ahead.verdict(ready.speed.steps, most_memory(), ready.startup.reference_seconds)
                (output_dir / "forecast.json").write_text(json.dumps(found, indent=1))
                for line in lines:
                    say(line)
        trainer.accelerator.wait_for_everyone()  # the others need not stay for reports and uploads
    with saving.explained(output_dir):
        if first:
            run_directory.finish(ready, output_dir, results, command, say)
    return output_dir


@contextlib.contextmanager
def watched(trainer: Any, limit: float) -> Iterator[None]:
    """Ends the process when it has waited for another one for too long."""
    from align.lifetime import watchdog

    trainer.watchdog = watchdog(limit)
    if trainer.watchdog is None:
        yield
        return
    trainer.watchdog.start()
    try:
        yield
    finally:
        trainer.watchdog.stop()


if __name__ == "__main__":
    alone(main)
