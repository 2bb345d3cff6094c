"""YAML and command line with the same keys, the command line wins, and a recipe reads back to itself."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from align.errors import RecipeError
from align.recipe import read_recipe
from align.sections import SECTIONS
from launch.recipes import training_recipes
from objectives.registry import field_docs
from tests.support import REPOSITORY

RECIPES = training_recipes()
MINIMAL = ["--model_name_or_path=m", "--dataset_name=d", "--output_dir=o", "--objective=dpo"]


def test_the_command_line_wins_and_sections_may_be_left_out(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: {model_name_or_path: a}\ndata: {dataset_name: b}\nobjective: {name: dpo, beta: 0.3}\n"
        "train: {output_dir: c, learning_rate: 5e-7, rows_per_step: 8}\n"
    )
    recipe = read_recipe(path, ["--learning_rate", "1e-6", "--beta=0.2", "--train.rows_per_step", "16", "--as_chat"])
    assert recipe.train.learning_rate == 1e-6
    assert recipe.objectives[0].built.beta == 0.2
    assert recipe.train.rows_per_step == 16
    assert recipe.data.as_chat is True
    # PyYAML reads 5e-7 as text; it is converted by the field's type.
    assert read_recipe(path).train.learning_rate == 5e-7


def test_a_whole_section_or_list_of_objectives_on_the_command_line():
    listed = '--objective=[{"name":"dpo","beta":0.5},{"name":"sft","leg":"chosen","weight":0.2}]'
    recipe = read_recipe(None, [*MINIMAL[:3], listed, "--lora={r: 3}", "--objective.1.weight=0.7"])
    assert [(entry.name, entry.weight) for entry in recipe.objectives] == [("dpo", 1.0), ("sft", 0.7)]
    assert recipe.lora is not None
    assert recipe.lora.r == 3
    assert recipe.mixture.needs.legs == ("chosen", "rejected")


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--lora.r=4", "--target_modules=[q_proj]"],
        ["--lora.adapter_name_or_path=x"],
        ["--max_steps=5", "--eval_strategy=steps", "--eval_steps=2", "--save_strategy=no"],
        ["--eval_dataset_name=e", "--columns={prompt: question}"],
        ["--push_to_hub", "--hub_model_id=me/model"],
    ],
    ids=str,
)
def test_recipe_to_yaml_to_recipe_is_the_identity(tmp_path: Path, more: list[str]):
    recipe = read_recipe(None, [*MINIMAL, *more])
    path = tmp_path / "resolved.yaml"
    path.write_text(recipe.to_yaml())
    again = read_recipe(path)
    assert again.resolved() == recipe.resolved()
    assert again.train == recipe.train
    assert again.data == recipe.data
    assert again.objectives == recipe.objectives


def test_several_datasets_read_back_too(tmp_path: Path):
    datasets = "--datasets=[{dataset_name: a, weight: 0.5},{dataset_name: b, columns: {prompt: q}}]"
    recipe = read_recipe(None, ["--model_name_or_path=m", datasets, "--output_dir=o", "--objective=dpo"])
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert read_recipe(tmp_path / "r.yaml").data == recipe.data


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_open_with_their_command_and_explain_their_keys(path: Path):
    text = path.read_text()
    assert text.startswith(f"# accelerate launch align/train.py --config launch/recipes/{path.name}\n")
    recipe = read_recipe(path)
    assert recipe.objectives
    assert sum("#" in line for line in text.splitlines()) >= 10


def test_dpo_recipe_resolves_to_float32_on_cpu():
    import torch

    from align.model import compute_dtype

    recipe = read_recipe(REPOSITORY / "launch" / "recipes" / "dpo.yaml")
    if not torch.cuda.is_available():
        assert compute_dtype(recipe.model) == torch.float32


def test_every_key_is_documented_where_it_is_defined():
    for name, section in SECTIONS.items():
        docs = field_docs(section)
        for field in dataclasses.fields(section):
            assert docs.get(field.name), f"{name}.{field.name}"


def test_written_values_survive_as_they_were_meant(tmp_path: Path):
    (tmp_path / "r.yaml").write_text(read_recipe(None, [*MINIMAL, "--save_strategy=no", "--report_to=none"]).to_yaml())
    stored = yaml.safe_load((tmp_path / "r.yaml").read_text())
    assert stored["train"]["save_strategy"] == "no"  # a bare no would be read as false
    assert stored["train"]["report_to"] == []


# ---- token weights and relabelers ----

GOLDFISH, REWARD_AUGMENTED = (REPOSITORY / "launch" / "recipes" / f"{n}.yaml" for n in ("goldfish", "reward_augmented"))


@pytest.mark.parametrize(
    "words",
    [["--token_weights.0.k", "8"], ["--token_weights.0.k=8"], ["--k", "8"], ["--k=8"]],
    ids=" ".join,
)
def test_a_listed_part_is_reached_by_its_number_or_by_its_key_alone(words: list[str]):
    (weight,) = read_recipe(GOLDFISH, words).token_weights
    assert (weight.built.k, weight.built.h) == (8, 13)


def test_a_list_on_the_command_line_takes_the_place_of_the_recipe_s():
    weights = read_recipe(GOLDFISH, ["--token_weights", "[{name: talr}, {name: flow, legs: [gold]}]"]).token_weights
    assert [weight.name for weight in weights] == ["talr", "flow"]
    assert weights[1].built.legs == ("gold",)
    assert [weight.name for weight in read_recipe(GOLDFISH, ["--token_weights=talr"]).token_weights] == ["talr"]
    assert [weight.name for weight in read_recipe(GOLDFISH, ["--token_weights=[talr, flow]"]).token_weights] == [
        "talr",
        "flow",
    ]


def test_null_takes_parts_of_a_recipe_away():
    assert read_recipe(GOLDFISH, ["--token_weights=null"]).token_weights == ()
    recipe = read_recipe(REWARD_AUGMENTED, ["--relabel", "null"])
    assert recipe.relabel == ()
    assert "relabel" not in recipe.resolved()


def test_parts_may_be_added_to_a_recipe_without_any():
    irpo = REPOSITORY / "launch" / "recipes" / "irpo.yaml"
    recipe = read_recipe(irpo, ["--token_weights={name: goldfish}", "--k=8", "--relabel=[reward_augmented]"])
    assert recipe.token_weights[0].built.k == 8
    assert recipe.relabel[0].name == "reward_augmented"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--token_weights.k=8"],
            "--token_weights.k: the recipe lists several token_weights; write --token_weights.0.k",
        ),
        (["--token_weights.1.k=8"], "--token_weights.1.k: the recipe has 1 listed token_weights, numbered from 0"),
        (["--token_weights.0.kk=8"], "unknown key token_weights.0.kk"),
        (["--token_weights=[]"], "token_weights is empty"),
        (["--lowest=0"], "unknown key --lowest"),
    ],
    ids=str,
)
def test_a_part_that_is_missed_is_told(words: list[str], says: str):
    with pytest.raises(RecipeError, match="^" + re.escape(says)):
        read_recipe(GOLDFISH, words)


def test_a_key_that_the_command_line_makes_idle_in_a_part_is_told():
    recipe = read_recipe(GOLDFISH, ["--strategy=static"])
    assert recipe.token_weights[0].built.strategy == "static"
    assert recipe.idle == ("token_weights.0.h has no effect: strategy static has none",)
    bco = read_recipe(REPOSITORY / "launch" / "recipes" / "bco.yaml", ["--prompt_encoder=null"])
    assert [line.partition(":")[0] for line in bco.idle] == [
        "objective.min_density_ratio has no effect",
        "objective.max_density_ratio has no effect",
    ]
    assert bco.mixture.step0 is not None


@pytest.mark.parametrize(
    "more",
    [
        ["--objective=bco", "--prompt_encoder=policy", "--max_density_ratio=3"],
        ["--objective=bco"],
        ["--objective=tpo", "--link=ipo", "--alpha=0", "--rule=threshold", "--threshold=0.5"],
        ["--objective=irpo", "--token_weights=[{name: goldfish, strategy: static, start: 2}, talr]"],
        ["--objective=[{name: tpo, weight: 0.5}, {name: kto}]", "--token_weights=[{name: flow, legs: [gold]}]"],
        ["--relabel=[{name: reward_augmented, form: text, lowest: 0, highest: 1}]", "--rule=margin", "--margin=0.2"],
        ["--streaming", "--max_rows=7", "--format=scored"],
    ],
    ids=str,
)
def test_parts_read_back_too(tmp_path: Path, more: list[str]):
    recipe = read_recipe(None, [*(MINIMAL[:3] if "--objective" in more[0] else MINIMAL), *more])
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    assert read_recipe(tmp_path / "resolved.yaml") == recipe
