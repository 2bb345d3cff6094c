"""What a run leaves beside the model: recipe, data report, checks, results, report and card."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from align import checks
from align.build import Run
from align.errors import RecipeError, RunError
from align.forward import causal_lm
from align.recipe import Recipe
from align.saving import STARTED
from align.typed import Entry
from align.value_head import output_names
from data.chat import template_fingerprint
from data.doctor import examine
from data.doctor_text import printable
from data.gathering import DataSpec
from evals import generations_file, hub, pair_rows, scores
from evals.card import write_card
from evals.card_info import CardInfo
from evals.held_out import HeldOut
from evals.live_samples import NewSamples
from evals.redact import public, scrub, shown_name
from evals.report import write_report
from evals.results import Result, Results, as_metrics
from objectives.registry import formula, source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Say = Callable[[str], None]
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "datasets", "align-preferences")
RESUMES = "resumes.json"
OF_EVALUATIONS = (scores.NAME, pair_rows.NAME, generations_file.NAME)
"""What a new run in the folder of an old one starts without."""
DOCTOR = "doctor.json"
"""What ``data.findings.Diagnosis.read`` reads, where the recipe has ``data.check``."""


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


def check_data(spec: DataSpec, tokenizer: PreTrainedTokenizerBase, output_dir: Path, command: str, say: Say) -> None:
    """Writes what the data doctor finds, and says what is wrong; a run goes on whatever it is."""
    found = examine(spec, tokenizer, command=command)
    found.write(output_dir / DOCTOR)
    for each in found.findings:
        if each.verdict in ("warning", "fault"):
            say(f"data: {each.verdict}: {printable(each.text)} ({each.check}; {each.key})")


def begin(run: Run, output_dir: Path, checkpoint: Path | None, held_out: HeldOut | None, say: Say) -> None:
    """Writes what is known before the first step, and takes back what a former process logged after its checkpoint."""
    (output_dir / STARTED).write_text("")
    (output_dir / "recipe.yaml").write_text(run.recipe.to_yaml())
    _write(output_dir / "data_report.json", run.prepared.report)
    example = checks.rendered(run.prepared.train.table, 0, run.tokenizer, run.prepared.train.name(0))
    (output_dir / "example.txt").write_text(example)
    say(example if len(example) < 3000 else f"{example[:1500]}\n[…]\n{example[-1500:]}")
    if held_out is not None:
        held_out.keep = lambda results: _keep(run, output_dir, results, held_out)
    step = 0 if checkpoint is None else int(checkpoint.name.split("-")[-1])
    section = run.recipe.train
    run.trackers.begin(
        output_dir,
        scrub(run.recipe.resolved()),
        project=section.project,
        name=section.run_name,
        resumed=None if checkpoint is None else step,
    )
    run.trackers.samples = NewSamples(output_dir, told_before=-1 if checkpoint is None else step)
    if checkpoint is None:
        for name in (run.metrics.path.name, *OF_EVALUATIONS):
            (output_dir / name).unlink(missing_ok=True)
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


def _keep(run: Run, output_dir: Path, results: Sequence[Result], held_out: HeldOut) -> None:
    """After an evaluation on the way: all results, and every prompt's scores at the latest one."""
    Results(run=_facts(run), results=results).write(output_dir / "results.json")
    (output_dir / scores.NAME).unlink(missing_ok=True)
    if held_out.scores:
        scores.write_scores(output_dir, held_out.scores)


def finish(run: Run, output_dir: Path, results: Sequence[Result], command: str, say: Say) -> None:
    """Writes results, report and card, and pushes if the recipe says so.

    Raises:
        RunError: the push failed; everything is on disk by then.
    """
    (output_dir / "training_args.bin").unlink(missing_ok=True)  # a pickle of settings that recipe.yaml holds
    Results(run=_facts(run), results=results).write(output_dir / "results.json")
    _write(output_dir / "checks.json", [asdict(check) for check in run.startup.checks])
    _card_info(run, output_dir, command).write(output_dir)
    failed = _evaluated(run, output_dir, say) if run.recipe.evals else None
    _tell_trackers(run, Results.read(output_dir / "results.json").results)
    write_report(output_dir)
    write_card(output_dir)
    say(f"done: {output_dir}/report.html, {output_dir}/README.md")
    section = run.recipe.hub
    if section.push_to_hub:
        assert section.hub_model_id is not None
        try:
            address = hub.push(
                output_dir, section.hub_model_id, private=section.hub_private_repo, samples=section.push_samples
            )
        except (ValueError, RuntimeError) as error:
            raise RunError(
                f"the run is complete in {output_dir}, but could not be pushed: {error} "
                f"Push it again with `python -m evals card push {output_dir}`"
            ) from None
        say(f"pushed: {address}")
    if failed is not None:
        raise RunError(
            f"the run is complete in {output_dir}, but not all of it could be measured ({failed}); try again with "
            f"python -m evals run {output_dir}"
        )


OF_LAUNCHERS = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_")
"""Beginnings of variables by which launchers tell processes that they belong together."""


def _evaluated(run: Run, output_dir: Path, say: Say) -> str | None:
    """Makes the recipe's evaluations, in a process of their own; what went wrong, or None.

    Engines that sample want a device and a process group to themselves.
    """
    if torch.cuda.is_available():
        run.trainer.optimizer = None
        run.trainer.accelerator.free_memory()
        run.trainer.unwrapped.to("cpu")
        torch.cuda.empty_cache()
    command = [sys.executable, "-m", "evals", "run", str(output_dir)]
    alone = {key: value for key, value in os.environ.items() if not key.startswith(OF_LAUNCHERS)}
    alone["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent.parent), *_given("PYTHONPATH")])
    last = ""
    with subprocess.Popen(
        command, env=alone, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last = line.strip() or last
            say(f"evals: {line.rstrip()}")
    return None if process.returncode == 0 else last.removeprefix("error: ")


def _given(name: str) -> list[str]:
    return [os.environ[name]] if os.environ.get(name) else []


def _tell_trackers(run: Run, results: Sequence[Result]) -> None:
    """The results that no line of metrics has, each at its step; of several splits, the later ones say which."""
    logged = {(line["step"], key) for line in _lines(run.metrics.path) for key in line}
    steps: dict[int, dict[str, float]] = {}
    for result in results:
        known = f"eval/{result.metric}", f"eval/{result.metric} ({public(result.split)})"
        if any((result.step, key) in logged for key in known):
            continue
        values, named = steps.setdefault(result.step, {}), as_metrics([result])
        again = not values.keys().isdisjoint(named)
        values |= {f"{key} ({public(result.split)})" if again else key: value for key, value in named.items()}
    for step, values in steps.items():
        run.trackers.results(values, step)
    run.trackers.results({}, run.trainer.state.global_step)  # samples of the last evaluation


def _card_info(run: Run, output_dir: Path, command: str) -> CardInfo:
    """What the card says besides the other files."""
    recipe, data = run.recipe, run.recipe.data
    parts = {
        "objective": recipe.objectives,
        "modifier": recipe.modifiers,
        "token weight": recipe.token_weights,
        "regularizer": recipe.regularizers,
        "relabeler": recipe.relabel,
        "reward transform": recipe.reward_transforms,
    }
    listed = [(kind, entry) for kind, entries in parts.items() for entry in entries]
    names = [entry.name for entry in (*recipe.objectives, *recipe.modifiers)]
    reads = recipe.needs_reference
    return CardInfo(
        base_model=recipe.model.model_name_or_path,
        datasets=[entry.dataset_name for entry in data.datasets] if data.datasets else [str(data.dataset_name)],
        objective=" + ".join(names),
        formula="\n\n".join(_formula(kind, entry, len(recipe.objectives)) for kind, entry in listed),
        citation=" ".join(dict.fromkeys(filter(None, (source(type(entry.built)) for _, entry in listed)))),
        usage="\n\n".join(entry.built.usage() for entry in recipe.relabel),
        adapter=recipe.lora is not None,
        command=command,
        license=recipe.hub.license,
        language=recipe.hub.language,
        tags=recipe.hub.tags,
        versions=code_versions(),
        resumes=_read(output_dir / RESUMES, []),
        repo_id=recipe.hub.hub_model_id or "",
        outputs=output_names(causal_lm(run.trainer.unwrapped).config) if recipe.trains_reward_model else (),
        reference=recipe.reference.model if reads else None,
        reference_source=recipe.reference.source if reads else "",
        reference_fingerprint=run.startup.reference,
        reference_moves=recipe.synced is not None,
    )


def _formula(kind: str, entry: Entry, objectives: int) -> str:
    """A part's name and formula; of several objectives also the weight in their sum."""
    weight = f", weight {entry.weight:g}" if kind == "objective" and objectives > 1 else ""
    lines = formula(type(entry.built)).splitlines()
    return "\n".join([f"{entry.name} ({kind}{weight})", *(f"    {line}" for line in lines)])


def _facts(run: Run) -> dict[str, Any]:
    recipe = run.recipe
    return {
        "model": recipe.model.model_name_or_path,
        "fingerprint": run.fingerprint,
        "objective": " + ".join(entry.name for entry in recipe.objectives),
        "dataset": dataset_names(recipe),
        "dataset_hash": run.prepared.report["dataset_hash"],
        "reference": recipe.reference.model if recipe.needs_reference else None,
        "reference_fingerprint": run.startup.reference,
        "template": template_fingerprint(run.tokenizer),
        "seed": recipe.train.seed,
        "steps": run.trainer.state.global_step,
        "processes": run.trainer.args.world_size,
        "device": str(run.trainer.args.device),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "versions": code_versions(),
    }


def code_versions() -> dict[str, str]:
    """Of Python and of the libraries that numbers may depend on."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def commit() -> str | None:
    """The commit of this code, where it runs from a checkout."""
    here = Path(__file__).parent
    try:
        shown = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return shown.stdout.strip() or None


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False))


def _read(path: Path, absent: Any) -> Any:
    return json.loads(path.read_text()) if path.is_file() else absent
