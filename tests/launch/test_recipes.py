"""Every shipped recipe: explains itself, reads back to itself, and trains on real and on embedded data in seconds."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.recipe import read_recipe
from align.train import main
from data.worlds import POLICY, Made, candidates, gold, labels, pairs, problems, scored, triples
from evals.evaluation import EVALS
from evals.run_settings import read_job
from launch.bench.sampled_rows import sampled, write_sampled
from launch.recipes import FOLDER, training_recipes
from objectives import MODIFIERS, OBJECTIVES, REGULARIZERS, RELABELERS, TOKEN_WEIGHTS
from tests.equivalence.runs import write_rows
from tests.support import plain_runs

RECIPES = training_recipes()
OBVIOUS = {"name", "output_dir", "learning_rate", "num_train_epochs", "lr_scheduler_type", "logging_steps"}
OBVIOUS |= {"push_to_hub", "beta"}
EXPLAINED_ABOVE = {"max_density_ratio", "highest"}
"""The second of two keys whose comment stands beside the first."""
QUICK = ["--max_steps=2", "--rows_per_step=8", "--save_strategy=no", "--logging_steps=1"]
OWN_FORMAT = ["--format=auto", "--columns={}"]
SCALE = ["--relabel.0.lowest=0", "--relabel.0.highest=1", "--dataset_train_split=train"]
COMPLETE = ("report.html", "README.md", "results.json", "recipe.yaml", "metrics.jsonl", "model.safetensors")

every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


@pytest.mark.slow
@every_recipe
def test_reads_back_to_itself(path: Path, tmp_path: Path):
    recipe = read_recipe(path)
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    again = read_recipe(tmp_path / "resolved.yaml")
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml()


@every_recipe
def test_first_line_is_its_launch_command(path: Path):
    assert path.read_text().splitlines()[0] == f"# accelerate launch align/train.py --config launch/recipes/{path.name}"


@every_recipe
def test_every_key_is_commented_or_obvious(path: Path):
    commented: dict[str, bool] = {}
    for line in path.read_text().splitlines():
        if found := re.match(r" +(?:- )?(\w+):", line):
            commented[found[1]] = commented.get(found[1], False) or "#" in line
    bare = {key for key, explained in commented.items() if not explained}
    in_mixtures = {"leg", "weight"} if path.stem in ("mixture", "mpo") else set()
    assert bare - OBVIOUS - EXPLAINED_ABOVE - in_mixtures == set()


@every_recipe
def test_goes_to_a_folder_of_its_own_name(path: Path):
    """Two recipes never write to one place."""
    assert yaml.safe_load(path.read_text())["train"]["output_dir"] == f"runs/{path.stem}"


# ---- two steps of each ----


def trained(
    path: Path,
    tmp_path: Path,
    model: Path,
    rows: Path,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    complete: Sequence[str] = COMPLETE,
) -> Path:
    """Runs two steps of a recipe; what it leaves must be complete, and it must not complain."""
    run = tmp_path / "run"
    given = [f"--model_name_or_path={model}", f"--dataset_name={rows}", f"--output_dir={run}", *QUICK, *words]
    status = main([f"--config={path}", *given])
    out, err = capsys.readouterr()
    assert status == 0, err
    assert "warn" not in err.lower()
    assert "warning" not in out
    assert [name for name in complete if not (run / name).is_file()] == []
    checks = {check["check"]: check for check in json.loads((run / "checks.json").read_text())}
    assert all(check["passed"] for check in checks.values())
    recipe = read_recipe(run / "recipe.yaml")
    step0 = recipe.mixture.step0
    if step0 is not None:
        assert f"should be {step0:.6f}" in checks["loss before training is the known constant"]["detail"]
    if recipe.needs_reference:
        assert "policy equals reference before training" in checks
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert all(math.isfinite(value) for line in lines for value in line.values() if isinstance(value, float))
    return run


@pytest.mark.slow
@every_recipe
def test_trains_on_real_scored_responses(
    path: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    plain_runs(monkeypatch)
    words = ["--max_rows=24", "--max_length=160", "--max_dropped_share=0.9", *own_words(path)]
    recipe = read_recipe(path)
    # Plain text has no system message, and these scores are probabilities.
    words += [*SCALE, "--relabel.0.form=text"] if recipe.relabel else []
    data, model = shared / "data" / "alpaca_eval_scored.jsonl.gz", shared / "models" / "stories260k"
    if columns := recipe.mixture.needs.columns:
        data = write_sampled(data, tmp_path / "sampled.jsonl", columns, 24)
    trained(
        path,
        tmp_path,
        model,
        data,
        words,
        capsys,
        [name for name in COMPLETE if name not in ("report.html", "README.md")],
    )


def own_words(path: Path) -> list[str]:
    """What has to be said differently for a dataset that is not the recipe's own."""
    recipe = read_recipe(path)
    words = OWN_FORMAT if recipe.data.columns else []
    words = [*words, "--dataset_config=null"] if recipe.data.dataset_config else words
    rated = any(entry.name == "reward_regression" for entry in recipe.objectives)
    return [*words, "--attributes=[score]"] if rated else words


def rows_for(path: Path) -> Callable[..., Any]:
    """Embedded rows of the kind that a recipe learns from."""
    needs = read_recipe(path).mixture.needs
    if needs.columns:
        return lambda asked, responses: Made(rows=sampled(scored(asked, responses).rows, needs.columns))
    if needs.labels:
        return labels
    if path.stem == "tpo_l":
        return triples  # tpo takes scored lists
    if needs.scores or ("gold" in needs.legs and "chosen" in needs.legs):
        return scored
    return pairs if "chosen" in needs.legs else lambda asked, responses: gold(asked)


@pytest.mark.slow
@every_recipe
def test_trains_on_the_embedded_world(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    made = rows_for(path)
    asked = problems("train", 64 if made is not labels else 16)
    rows = write_rows(tmp_path / "rows.jsonl", made(asked, candidates(asked, 6)).rows)
    recipe = read_recipe(path)
    words = [*own_words(path), *(SCALE if recipe.relabel else [])]
    run = trained(path, tmp_path, POLICY, rows, words, capsys)
    results = json.loads((run / "results.json").read_text())["results"]
    goals = {"held out, goal=chosen", "held out, goal=rejected"} if recipe.relabel else set()
    assert {result["split"] for result in results} - {"held out"} == goals
    metrics = {result["metric"] for result in results}
    legs = set(recipe.mixture.needs.legs)
    pairwise = {"chosen", "rejected"} <= legs
    assert ("ranking/accuracy" in metrics) == (pairwise and not recipe.trains_reward_model)
    assert ("reward_model/accuracy" in metrics) == (pairwise and recipe.trains_reward_model)
    moves = recipe.needs_reference and (pairwise or recipe.mixture.needs.labels)
    assert any(metric.startswith(("labels/", "displacement/")) for metric in metrics) == moves


# ---- evaluation ----

EVALUATION = FOLDER / "eval.yaml"


def evaluations(path: Path, *, all_of_them: bool = False) -> str:
    """The recipe's text; with what waits behind comment marks, if asked."""
    text = path.read_text()
    return re.sub(r"(?m)^  # (- name|  )", r"  \1", text) if all_of_them else text


@pytest.mark.parametrize("all_of_them", [False, True], ids=["as it is", "uncommented"])
def test_the_recipe_for_evaluation_can_be_read(tmp_path: Path, all_of_them: bool):
    (tmp_path / "eval.yaml").write_text(evaluations(EVALUATION, all_of_them=all_of_them))
    words = ["--reference.model=some/reference"] if all_of_them else []
    job = read_job(str(tmp_path / "eval.yaml"), words)
    names = [entry.name for entry in job.evals]
    assert len(set(names)) == len(names)
    assert {"ranking", "ches", "generations"} <= set(names)
    assert (set(names) == set(EVALS.names()) - {"reward_model"}) == all_of_them


def test_the_recipe_for_evaluation_explains_every_key():
    text = evaluations(EVALUATION, all_of_them=True)
    assert text.splitlines()[0] == "# python -m evals run --config launch/recipes/eval.yaml"
    commented: dict[str, bool] = {}
    for line in text.splitlines():
        if found := re.match(r" +(?:- )?(\w+):", line):
            commented[found[1]] = commented.get(found[1], False) or "#" in line
    assert {key for key, explained in commented.items() if not explained} <= {"split", "temperature"}


@pytest.mark.slow
def test_every_objective_has_a_recipe():
    """One recipe for each objective, modifier, token weight, regularizer and relabeler."""
    used: set[str] = set()
    for path in RECIPES:
        recipe = read_recipe(path)
        kinds = (recipe.objectives, recipe.modifiers, recipe.token_weights, recipe.regularizers, recipe.relabel)
        used |= {entry.name for kind in kinds for entry in kind}
    for registry in (OBJECTIVES, MODIFIERS, TOKEN_WEIGHTS, REGULARIZERS, RELABELERS):
        assert set(registry.names()) <= used, registry.kind
