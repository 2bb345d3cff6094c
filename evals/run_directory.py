"""What a run leaves beside the model: recipe, data report, checks, results, report and card."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from align import checks
from align.build import Run
from align.errors import RecipeError, RunError
from align.forward import causal_lm
from align.recipe import Recipe
from align.saving import STARTED
from align.value_head import output_names
from data.chat import template_fingerprint
from evals import hub
from evals.card import CardInfo, write_card
from evals.held_out import HeldOut
from evals.redact import shown_name
from evals.report import write_report
from evals.results import Result, Results
from objectives.registry import formula, source

Say = Callable[[str], None]
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "datasets", "align-preferences")
RESUMES = "resumes.json"


def check_hub(recipe: Recipe) -> None:
    """Refuses a push that would fail, before anything is trained.

    Raises:
        RecipeError: the repository's name is malformed, or there is no token.
    """
    if not recipe.hub.push_to_hub:
        return
    assert recipe.hub.hub_model_id is not None
    try:
        hub.check_access(recipe.hub.hub_model_id)
    except ValueError as error:
        raise RecipeError(f"hub: {error}") from None


def dataset_names(recipe: Recipe) -> str:
    """The training datasets' names; one by itself as it was written, several by what cards show of each."""
    if recipe.data.datasets is not None:
        return " + ".join(shown_name(entry.dataset_name) for entry in recipe.data.datasets)
    return str(recipe.data.dataset_name)


def eval_name(recipe: Recipe) -> tuple[str, str]:
    """What held-out rows are called: the dataset they come from, and the split."""
    if recipe.data.eval_dataset_name is not None:
        return recipe.data.eval_dataset_name, recipe.data.eval_split or "test"
    return dataset_names(recipe), "held out"


def begin(run: Run, output_dir: Path, checkpoint: Path | None, held_out: HeldOut | None, say: Say) -> None:
    """Writes what is known before the first step, and takes back what a former process logged after its checkpoint."""
    (output_dir / STARTED).write_text("")
    (output_dir / "recipe.yaml").write_text(run.recipe.to_yaml())
    _write(output_dir / "data_report.json", run.prepared.report)
    example = checks.rendered(run.prepared.train.table, 0, run.tokenizer, run.prepared.train.name(0))
    (output_dir / "example.txt").write_text(example)
    say(example if len(example) < 3000 else f"{example[:1500]}\n[…]\n{example[-1500:]}")
    if held_out is not None:
        held_out.keep = lambda results: Results(run=_facts(run), results=results).write(output_dir / "results.json")
    step = 0 if checkpoint is None else int(checkpoint.name.split("-")[-1])
    if checkpoint is None:
        run.metrics.path.unlink(missing_ok=True)
        return
    lines = run.metrics.cut_after(step)
    run.alarm.replay(lines)
    if held_out is not None and (output_dir / "results.json").is_file():
        earlier = Results.read(output_dir / "results.json").results
        held_out.results = [result for result in earlier if result.step <= step]
    if held_out is not None:
        held_out.last_step = int(max((line["step"] for line in lines if "eval/loss" in line), default=-1))
    resumes = _read(output_dir / RESUMES, [])
    _write(output_dir / RESUMES, [*resumes, f"resumed from step {step}"])
    say(f"resuming from {checkpoint.name}")


def finish(run: Run, output_dir: Path, results: Sequence[Result], command: str, say: Say) -> None:
    """Writes results, report and card, and pushes if the recipe says so.

    Raises:
        RunError: the push failed; everything is on disk by then.
    """
    (output_dir / "training_args.bin").unlink(missing_ok=True)  # a pickle of settings that recipe.yaml holds
    Results(run=_facts(run), results=results).write(output_dir / "results.json")
    _write(output_dir / "checks.json", [asdict(check) for check in run.startup.checks])
    write_report(output_dir)
    recipe = run.recipe
    names = [entry.name for entry in recipe.objectives]
    sections = (
        *(recipe.objectives, recipe.modifiers, recipe.token_weights),
        *(recipe.regularizers, recipe.relabel, recipe.reward_transforms),
    )
    parts = [entry.built for section in sections for entry in section]
    data = recipe.data
    write_card(
        output_dir,
        info=CardInfo(
            base_model=recipe.model.model_name_or_path,
            datasets=[entry.dataset_name for entry in data.datasets] if data.datasets else [str(data.dataset_name)],
            objective=" + ".join([*names, *(entry.name for entry in recipe.modifiers)]),
            formula="\n".join(formula(type(built)) for built in parts),
            citation=" ".join(source(type(built)) for built in parts),
            usage="\n\n".join(entry.built.usage() for entry in recipe.relabel),
            adapter=recipe.lora is not None,
            command=command,
            versions=_versions(),
            resumes=_read(output_dir / RESUMES, []),
            repo_id=recipe.hub.hub_model_id or "",
            outputs=output_names(causal_lm(run.trainer.unwrapped).config) if recipe.trains_reward_model else (),
        ),
    )
    say(f"done: {output_dir}/report.html, {output_dir}/README.md")
    if recipe.hub.push_to_hub:
        assert recipe.hub.hub_model_id is not None
        try:
            say(f"pushed: {hub.push(output_dir, recipe.hub.hub_model_id, private=recipe.hub.hub_private_repo)}")
        except (ValueError, RuntimeError) as error:
            raise RunError(f"the run is complete in {output_dir}, but could not be pushed: {error}") from None


def _facts(run: Run) -> dict[str, Any]:
    recipe = run.recipe
    return {
        "model": recipe.model.model_name_or_path,
        "fingerprint": run.fingerprint,
        "objective": " + ".join(entry.name for entry in recipe.objectives),
        "dataset": dataset_names(recipe),
        "dataset_hash": run.prepared.report["dataset_hash"],
        "reference": recipe.reference.model if recipe.needs_reference else None,
        "template": template_fingerprint(run.tokenizer),
        "seed": recipe.train.seed,
        "steps": run.trainer.state.global_step,
        "processes": run.trainer.args.world_size,
        "device": str(run.trainer.args.device),
        "commit": _commit(),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _commit() -> str | None:
    """The commit of this code, where it runs from a checkout."""
    here = Path(__file__).parent
    try:
        shown = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return shown.stdout.strip() or None


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False))


def _read(path: Path, absent: Any) -> Any:
    return json.loads(path.read_text()) if path.is_file() else absent
