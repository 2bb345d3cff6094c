"""Rounds: a policy improves on its own samples; killed anywhere they go on; weights are those that are meant."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from align import samples as stored
from align.errors import RecipeError, RunError
from align.round_results import Evaluation
from align.round_settings import read_rounds, training_tree
from align.rounds import Runner, _stands_still
from data.worlds import POLICY, problems
from tests.align.test_sample import save_adapter, write
from tests.equivalence.worlds import save_model
from tests.support import REPOSITORY

RECIPE = str(REPOSITORY / "launch" / "recipes" / "dpo.yaml")
OVERRIDES = ["--learning_rate=2e-4", "--beta=0.3", "--rows_per_step=16", "--eval_share=0", "--rule=best_vs_random"]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with prompts to train on and to be judged by."""
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    for name, split, number in (("train", "train", 40), ("test", "held_out", 20)):
        asked = problems(split, number, seed=3)
        write(tmp_path / f"{name}.jsonl", [{"prompt": [{"role": "user", "content": p.question}]} for p in asked])
    return tmp_path


def words(folder: Path, *more: str, overrides: list[str] | None = None, name: str = "out") -> list[str]:
    listed = json.dumps([*OVERRIDES, *(overrides or [])])
    return [
        f"--model_name_or_path={POLICY}",
        f"--data.dataset_name={folder / 'train.jsonl'}",
        f"--held_out.dataset_name={folder / 'test.jsonl'}",
        "--held_out.n=2",
        "--engine=transformers",
        "--max_tokens=48",
        "--sampling.n=4",
        "--scorers=gold",
        f"--run.recipe={RECIPE}",
        f"--run.overrides={listed}",
        f"--run.output_dir={folder / name}",
        "--run.rounds=2",
        *more,
    ]


def rounds(folder: Path, *more: str, **keys: Any) -> tuple[list[Evaluation], list[str]]:
    said: list[str] = []
    return Runner(read_rounds(None, words(folder, *more, **keys)), say=said.append).run(), said


def numbers(measured: list[Evaluation]) -> list[dict[str, Any]]:
    return [each.as_json() for each in measured]


@pytest.fixture(params=["here", pytest.param("processes", marks=pytest.mark.all)])
def stages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages in this process, which takes a tenth of the time, or in processes of their own."""

    def run(runner: Runner, folder: Path, number: int, name: str, words: list[str]) -> None:
        runner.say(f"round {number}: {name}")
        module = importlib.import_module(words[1] if words[0] == "-m" else "align.train")
        assert module.main(words[words.index("--config") :]) == 0

    if request.param == "here":
        monkeypatch.setattr(Runner, "_command", run)


@pytest.mark.slow
def test_two_rounds(world: Path, stages: None):
    measured, said = rounds(world)
    assert [each.round for each in measured] == [0, 1, 2]
    assert {each.prompts for each in measured} == {20}
    for number in (1, 2):
        folder = world / "out" / f"round-{number}"
        assert (folder / "train" / "model.safetensors").is_file()
        resolved = yaml.safe_load((folder / "train" / "recipe.yaml").read_text())
        assert resolved["reference"]["model"] == "initial"
        before = POLICY if number == 1 else world / "out" / "round-1" / "train"
        assert resolved["model"]["model_name_or_path"] == str(before)
        origins = {group.samples[0].origin.model for group in stored.read(folder / "samples.jsonl")}
        assert origins == {str(before)}
    assert json.loads((world / "out" / "rounds.json").read_text())["best"]["round"] in (0, 1, 2)
    assert any(line.startswith("round 2: score ") for line in said)

    again, said = rounds(world)
    assert numbers(again) == numbers(measured)
    assert not [line for line in said if ": samples" in line or ": train" in line], "nothing is done twice"


@pytest.mark.all
def test_gone_on_with_from_anywhere(world: Path):
    """What an undisturbed run measures, one that loses its state after a stage measures too."""
    measured, _ = rounds(world)
    done = list(json.loads((world / "out" / "state.json").read_text())["done"])
    for keep in (3, len(done) - 1):  # as if killed after so many stages, with what came later there
        shutil.copytree(world / "out", world / "killed", dirs_exist_ok=True)
        state = json.loads((world / "killed" / "state.json").read_text())
        state["done"] = {key: state["done"][key] for key in done[:keep]}
        (world / "killed" / "state.json").write_text(json.dumps(state).replace("/out/", "/killed/"))
        assert numbers(rounds(world, name="killed")[0]) == numbers(measured)
        shutil.rmtree(world / "killed")


@pytest.mark.all
def test_killed_in_the_middle_of_stages(world: Path):
    """SIGKILL to everything at moments of its own choosing, until it comes through."""
    command = [sys.executable, "-m", "align.rounds", *words(world, "--run.rounds=1")]
    kills = 0
    for seconds in (6, 9, 12, 15, 18, 600):
        process = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True, stdout=subprocess.PIPE)
        try:
            process.communicate(timeout=seconds)
            assert process.returncode == 0
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
    assert kills >= 2
    undisturbed, _ = rounds(world, "--run.rounds=1", name="straight")
    found = json.loads((world / "out" / "rounds.json").read_text())["rounds"]
    assert [each["per_prompt"] for each in found] == [dict(each.per_prompt) for each in undisturbed]


@pytest.mark.slow
def test_what_ends_rounds_ends_their_stage(world: Path):
    """SIGTERM reaches the process of the stage: nothing goes on alone."""
    command = [sys.executable, "-m", "align.rounds", *words(world)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (world / "out" / "round-0" / "held_out.log").exists():
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "what is finished is kept" in said
    left = subprocess.run(["pgrep", "-f", str(world / "out")], capture_output=True, text=True)
    assert left.stdout == ""


@pytest.mark.all
def test_adapters_go_from_round_to_round(world: Path):
    given = ["--lora.r=8", "--learning_rate=2e-3"]
    measured, _ = rounds(world, overrides=given)
    assert len(measured) == 3
    recipes = [yaml.safe_load((world / "out" / f"round-{n}" / "train" / "recipe.yaml").read_text()) for n in (1, 2)]
    assert recipes[0]["lora"]["r"] == 8
    first = str(world / "out" / "round-1" / "train")
    assert recipes[1]["lora"] == {"adapter_name_or_path": first}
    assert {recipe["model"]["model_name_or_path"] for recipe in recipes} == {str(POLICY)}
    drawn = next(stored.read(world / "out" / "round-2" / "samples.jsonl")).samples[0].origin
    assert drawn.model == first
    assert "+files:" in drawn.fingerprint


def test_a_policy_that_was_changed_is_noticed(world: Path):
    shutil.copytree(POLICY, world / "policy")
    runner = Runner(read_rounds(None, words(world, f"--model_name_or_path={world / 'policy'}")))
    runner.root.mkdir()
    runner._begin()
    runner._checked(0)
    runner._checked(0)
    save_model(world / "policy")
    with pytest.raises(RunError, match="holds other weights than round 0 ended with"):
        runner._checked(0)


@pytest.mark.slow
def test_a_stage_that_fails_says_why(world: Path):
    write(world / "train.jsonl", [{"prompt": "x " * 4000}])
    with pytest.raises(RunError, match=r"round 1, samples: no prompt leaves room .* what is finished is kept"):
        rounds(world)
    assert json.loads((world / "out" / "state.json").read_text())["done"].keys() == {"0/evaluate"}


@pytest.mark.all
@pytest.mark.parametrize(("name", "opponent"), [("xpo", "reference"), ("nash_md", "mixture")])
def test_rounds_against_an_opponent(world: Path, name: str, opponent: str):
    recipe = f"--run.recipe={REPOSITORY / 'launch' / 'recipes' / f'{name}.yaml'}"
    given = words(world, recipe, f"--run.opponent={opponent}", "--run.reference=initial", "--run.rounds=2")
    overrides = json.dumps(["--learning_rate=1e-4", "--rows_per_step=16", "--eval_share=0"])
    given = [f"--run.overrides={overrides}" if word.startswith("--run.overrides") else word for word in given]
    measured = Runner(read_rounds(None, given), say=lambda line: None).run()
    assert len(measured) == 3
    rows = [json.loads(line) for line in (world / "out" / "round-2" / "train.jsonl").read_text().splitlines()]
    if name == "xpo":
        assert {row["chosen_by"] for row in rows} == {"policy", "reference"}
    else:
        assert len({row["preference"] for row in rows}) > 5
    origin = next(stored.read(world / "out" / "round-2" / "opponent.jsonl")).samples[0].origin
    assert ("~0.5*files:" in origin.fingerprint) == (opponent == "mixture")
    before = str(world / "out" / "round-1" / "train")
    assert origin.model == (before if opponent == "mixture" else str(POLICY))


def test_other_settings_are_not_mixed_in(world: Path):
    Runner(read_rounds(None, words(world)))
    runner = Runner(read_rounds(None, words(world)))
    runner.root.mkdir()
    runner._begin()
    other = Runner(read_rounds(None, words(world, "--sampling.temperature=0.7", "--run.rounds=5")))
    with pytest.raises(RunError, match=r"holds rounds of other settings \(sampling.temperature\)"):
        other._begin()
    free = ["--run.rounds=5", "--run.patience=2", "--serving.timeout=9", "--serving.max_model_len=200"]
    more = Runner(read_rounds(None, words(world, *free, overrides=["--token_budget=512"])))
    more._begin()  # more rounds of the same, on another machine


def trees(folder: Path, *more: str, overrides: list[str] | None = None) -> list[dict[str, Any]]:
    """Training recipes of the first two rounds."""
    settings = read_rounds(None, words(folder, *more, overrides=overrides))
    adapter = "prev" if settings.trains_adapter else None
    model = "base" if settings.trains_adapter else "prev"
    return [
        training_tree(settings, 1, folder / "round-1", "base", None, "base"),
        training_tree(settings, 2, folder / "round-2", model, adapter, "base"),
    ]


def test_the_reference_of_every_round(world: Path):
    for reference, wanted in (("previous", ["initial", "initial"]), ("initial", ["initial", "base"])):
        made = trees(world, f"--run.reference={reference}")
        assert [tree["reference"]["model"] for tree in made] == wanted
    adapters = trees(world, "--run.reference=initial", overrides=["--lora.r=4"])
    assert [tree["reference"]["model"] for tree in adapters] == ["initial", "base"]
    assert adapters[1]["model"]["model_name_or_path"] == "base"


def test_a_policy_is_trained_as_it_is_sampled(world: Path):
    """With the same template, end token and tokenizer; the revision is the first policy's."""
    (world / "own.jinja").write_text("{{ messages[0]['content'] }}")
    given = [f"--chat_template={world / 'own.jinja'}", "--model_revision=v2", "--eos_token=<|end|>"]
    settings = read_rounds(None, words(world, *given))
    one = training_tree(settings, 1, world / "round-1", str(POLICY), None, str(POLICY))["model"]
    two = training_tree(settings, 2, world / "round-2", "prev", None, str(POLICY))["model"]
    assert {one["chat_template"], two["chat_template"]} == {str(world / "own.jinja")}
    assert {one["eos_token"], two["eos_token"]} == {"<|end|>"}
    assert (one["model_revision"], two["model_revision"]) == ("v2", "main")
    assert settings.sample_tree(str(POLICY), None, held_out=False)["model"]["model_revision"] == "v2"
    assert settings.sample_tree("prev", None, held_out=False)["model"]["model_revision"] == "main"


def test_rounds_are_judged_by_scores_as_they_are(world: Path):
    """z_score makes every prompt's mean 0."""
    settings = read_rounds(None, words(world, "--reward_transforms=z_score"))
    assert "reward_transforms" in settings.scores_tree(transformed=True)
    assert "reward_transforms" not in settings.scores_tree(transformed=False)


def test_prompts_that_are_trained_on_judge_nothing(world: Path):
    same = Runner(read_rounds(None, words(world, f"--held_out.dataset_name={world / 'train.jsonl'}")))
    same.root.mkdir()
    with pytest.raises(RecipeError, match="every prompt of held_out is also trained on"):
        same._begin()
    with (world / "test.jsonl").open("a") as file:
        file.write((world / "train.jsonl").read_text().splitlines(keepends=True)[0])
    said: list[str] = []
    Runner(read_rounds(None, words(world)), say=said.append)._begin()
    assert said == ["warning: 1 of 21 held-out prompts are also trained on"]


def test_offline_data_is_mixed_in(world: Path):
    one, two = trees(world, "--run.mix_dataset=pairs.jsonl", "--run.mix_weight=0.5")
    assert one["data"]["datasets"] == [
        {"dataset_name": str(world / "round-1" / "train.jsonl")},
        {"dataset_name": "pairs.jsonl", "weight": 0.5},
    ]
    assert two["train"]["seed"] == one["train"]["seed"] + 1
    assert "dataset_name" not in one["data"]


def test_prompts_and_seeds_of_every_round(world: Path):
    settings = read_rounds(None, words(world, "--run.fresh_prompts=true", "--sampling.seed=10"))
    drawn = [settings.sampling_words(number) for number in (1, 2)]
    assert drawn == [["--sampling.seed=12", "--out.shard=0/2"], ["--sampling.seed=14", "--out.shard=1/2"]]
    assert settings.held_out_words() == ["--sampling.n=2", "--sampling.seed=10"]


def evaluation(score: float) -> Evaluation:
    return Evaluation(
        round=0, score=score, low=0, high=1, prompts=1, samples=1, unscored=0, per_prompt={}, means={}, pass_at={}
    )


@pytest.mark.parametrize(
    ("scores", "stops"),
    [
        ([0.5], False),
        ([0.5, 0.6], False),
        ([0.5, 0.6, 0.55], False),
        ([0.5, 0.6, 0.55, 0.59], True),
        ([0.5, 0.6, 0.55, 0.61], False),
        ([0.5, 0.4, 0.3], True),
        ([0.5, 0.6, 0.605, 0.609], True),
    ],
)
def test_patience(scores: list[float], stops: bool):
    """Two rounds without a gain of 0.01 over the best before."""
    assert _stands_still([evaluation(score) for score in scores], 2, 0.01 if stops else 0.0) is stops


@pytest.mark.parametrize(
    ("more", "overrides", "says"),
    [
        (["--run.rounds=0"], [], r"run\.rounds must be >= 1"),
        (["--run.recipe=nowhere.yaml"], [], "there is no recipe 'nowhere.yaml'"),
        ([f"--run.recipe={REPOSITORY / 'launch/recipes/sample.yaml'}"], [], "has no objective"),
        ([], ["--lerning_rate=1"], r"run\.recipe .*dpo\.yaml: unknown key --lerning_rate"),
        ([], ["--output_dir=x"], r"run\.overrides: output_dir is set by the rounds"),
        ([], ["--data.dataset_name=x"], r"run\.overrides: data\.dataset_name is set by the rounds"),
        (["--run.mix_weight=2"], [], "mix_weight has no effect without mix_dataset"),
        (["--run.least_gain=2"], [], "least_gain has no effect without patience"),
        (["--run.reference=first"], [], r"run\.reference must be one of previous, initial"),
        (["--run.accelerate_config=no.yaml"], [], r"run\.accelerate_config: there is no file"),
        (["--run.reference=initial"], ["--objective=simpo"], "simpo needs no reference model"),
        (["--run.opponent=reference"], [], r"run\.opponent has no effect: dpo reads nothing of an opponent"),
        (["--serving.engine=server", "--base_url=http://x"], [], "serves one policy, and every round samples another"),
        (["--run.mixture_coef=0.3"], [], "mixture_coef has no effect without opponent mixture"),
        (["--rows.margin=1"], [], "margin has no effect with kind scored"),
        (["--learning_rate=1"], [], r"here it is run\.overrides"),
    ],
    ids=str,
)
def test_settings_that_can_t_be_meant(world: Path, more: list[str], overrides: list[str], says: str):
    with pytest.raises(RecipeError, match=says):
        read_rounds(None, words(world, *more, overrides=overrides))


def test_an_adapter_to_start_from_takes_a_recipe_with_adapters(world: Path):
    save_adapter(world / "adapter")
    start = f"--adapter_name_or_path={world / 'adapter'}"
    with pytest.raises(RecipeError, match=r"run\.recipe trains all weights; merge it first"):
        read_rounds(None, words(world, start))
    with pytest.raises(RecipeError, match=r"run\.reference initial can't be an adapter"):
        read_rounds(None, words(world, start, "--run.reference=initial", overrides=["--lora.r=4"]))
    assert read_rounds(None, words(world, start, overrides=["--lora.r=4"])).trains_adapter
