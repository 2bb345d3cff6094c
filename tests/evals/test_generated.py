"""win_rate, pass_at_k and generations end to end: a real policy, judges by endpoint, the world's gold score."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from align import samples as stored
from align.errors import RecipeError, RunError
from align.prompts import PromptSection, read_prompts
from align.sampling import Sampling
from data.worlds import POLICY, candidates, gold_score, problem_of, problems
from evals import controlled, sampled
from evals.compare import compare, read_run
from evals.evaluations.generations import measured_of, sample_during
from evals.length_control import length_controlled
from evals.report import write_report
from evals.run_settings import read_job
from evals.scores import read_scores
from evals.win_rate import win_rate_of_scores
from objectives.stats import beats
from tests.align.judge_server import JudgeServer, shown
from tests.evals.evaluated import PROMPTS, SAMPLING, World, answers
from tests.support import common_folder, once


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> World:
    folder = common_folder(tmp_path_factory.getbasetemp(), worker_id) / "evaluated"
    return World(once(folder, lambda part: None if (part / "prompts.jsonl").exists() else _made(part, folder)))


def _made(part: Path, folder: Path) -> None:
    """Drawn in the folder's final place, whose name samples carry, by way of a link."""
    folder.symlink_to(part, target_is_directory=True)
    try:
        World(folder).make()
    finally:
        folder.unlink()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))


def longer(body: dict[str, Any]) -> str:
    """A judge with a taste for length."""
    first, second = map(len, shown(body))
    return f"Verdict: [[{'A=B' if first == second else 'A>>B' if first > second else 'B>A'}]]"


def judge(server: JudgeServer, **keys: Any) -> dict[str, Any]:
    return {"name": "judge", "model": "tester/judge-1", "base_url": server.base_url, "retries": 0, **keys}


def win_rate(judge: Any, **keys: Any) -> dict[str, Any]:
    return {"name": "win_rate", "baseline": "reference", "judge": judge, **keys}


# ---- win_rate ----


@pytest.mark.slow
def test_gold_against_the_reference(world: World, tmp_path: Path):
    """Recomputed from the answers themselves."""
    found, _ = world.evaluate(tmp_path, win_rate("gold"))
    ours, theirs = answers(tmp_path, "policy"), answers(tmp_path, "start")

    def gold(lines: list[Any]) -> np.ndarray:
        return np.array([gold_score(problem_of(each.prompt[0]["content"]), each.text) for each in lines])

    assert [each.prompt_id for each in ours] == [each.prompt_id for each in theirs]
    wanted = beats(gold(ours), gold(theirs))
    raw = found["win_rate/raw", "all"]
    assert raw.value == pytest.approx(wanted.mean())
    assert raw.value == win_rate_of_scores(gold(ours), gold(theirs)).estimates["win_rate/raw"].value
    assert raw.clusters == PROMPTS
    assert [each.scores["win_rate/raw"] for each in ours] == wanted.tolist()
    assert [each.scores["win_rate/raw"] for each in theirs] == (1 - wanted).tolist()
    assert [each.scores["gold"] for each in ours] == pytest.approx(gold(ours))
    kept = read_scores(tmp_path)["win_rate/raw", str(world.prompts), "all", 0]
    assert kept.by_prompt == {each.prompt_id: score for each, score in zip(ours, wanted.tolist(), strict=True)}
    extra = raw.extra
    assert extra["judge"] == "gold"
    assert extra["baseline"].startswith("start (")
    assert extra["sampling"] == {
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "max_tokens": 40,
        "stop": [],
    }
    assert (extra["seed"], extra["samples"], extra["dropped"]) == (5, 1, {})
    assert extra["template"]


@pytest.mark.slow
def test_a_reward_model_judges(world: World, tmp_path: Path):
    """A head of random weights, against its own forward on template, answer and end token, answer by answer."""
    torch.manual_seed(3)
    judging = AutoModelForSequenceClassification.from_pretrained(POLICY, num_labels=1, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    for each in (judging, tokenizer):
        each.save_pretrained(tmp_path / "judge")
    found, _ = world.evaluate(tmp_path / "out", win_rate({"name": "reward_model", "model": str(tmp_path / "judge")}))

    def score(line: Any) -> float:
        messages = [*line.prompt, {"role": "assistant", "content": line.text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        text = text[: text.rindex(tokenizer.eos_token)] + tokenizer.eos_token
        with torch.no_grad():
            return float(judging(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, 0])

    ours, theirs = (answers(tmp_path / "out", name) for name in ("policy", "start"))
    by_hand = np.array([[score(line) for line in lines] for lines in (ours, theirs)])
    assert [each.scores["judge"] for each in ours] == pytest.approx(by_hand[0], rel=1e-5, abs=1e-5)
    wanted = beats(*by_hand)
    assert found["win_rate/raw", "all"].value == pytest.approx(wanted.mean())
    assert [each.scores["win_rate/raw"] for each in ours] == wanted.tolist()
    assert 0 < wanted.mean() < 1
    assert found["win_rate/raw", "all"].extra["judge"] == "judge", "named by its folder"


@pytest.mark.slow
def test_a_soft_win_by_scores(world: World, tmp_path: Path):
    """σ(d/τ), by hand."""
    found, _ = world.evaluate(tmp_path, win_rate("gold", tau=0.2))
    ours, theirs = ([each.scores["gold"] for each in answers(tmp_path, name)] for name in ("policy", "start"))
    wanted = [1 / (1 + np.exp(-(a - b) / 0.2)) for a, b in zip(ours, theirs, strict=True)]
    assert found["win_rate/raw", "all"].value == pytest.approx(np.mean(wanted))


@pytest.mark.slow
def test_length_control_is_that_of_the_formula(world: World, tmp_path: Path):
    """On the verdicts that generations.jsonl keeps."""
    with JudgeServer(longer) as server:
        found, said = world.evaluate(tmp_path, win_rate(judge(server), kinds=["raw", "length_controlled", "wildbench"]))
    ours, theirs = answers(tmp_path, "policy"), answers(tmp_path, "start")
    p = [1 + each.scores["win_rate/raw"] for each in ours]
    lengths = [[len(each.text.strip()) for each in lines] for lines in (ours, theirs)]
    wanted = length_controlled(p, *lengths, [each.prompt_id for each in ours])
    got = found["win_rate/length_controlled", "all"]
    assert (got.value, got.low) == (wanted.estimate.value, wanted.estimate.low)
    assert found["win_rate/raw", "all"].value == wanted.raw.estimates["win_rate/raw"].value
    assert got.extra["length_controlled"]["weights"] == list(wanted.weights)
    assert (wanted.warning is None) == (not any("length control changes" in line for line in said))
    assert "wildbench/reward" in {metric for metric, _ in found}


@pytest.mark.slow
def test_a_judge_is_asked_in_both_orders_and_never_about_equal_answers(world: World, tmp_path: Path):
    """The reference is the model itself: all answers are the same, nothing is asked, and the ties are told."""
    with JudgeServer(longer) as server:
        keys = win_rate(judge(server), baseline={"model": str(POLICY), "name": "itself"})
        found, said = world.evaluate(tmp_path / "same", keys)
        assert server.bodies == []
        assert found["win_rate/raw", "all"].value == 0.5
        assert found["win_rate/raw", "all"].extra["identical"] == PROMPTS
        assert any("verdicts are ties (6 of them because the answers are the same)" in line for line in said)
        world.evaluate(tmp_path / "other", win_rate(judge(server)))
        asked = [tuple(shown(body)) for body in server.bodies]
    assert len(asked) == len(set(asked)) > 0
    assert {(b, a) for a, b in asked} == set(asked)


@pytest.mark.slow
def test_one_order_costs_half_and_is_the_same_for_every_model(world: World, tmp_path: Path):
    with JudgeServer(longer) as server:
        found, _ = world.evaluate(tmp_path, win_rate(judge(server), orders="random"))
        asked = [frozenset(shown(body)) for body in server.bodies]
    assert len(asked) == len(set(asked))
    texts = [{mine.text.strip(), theirs.text.strip()} for mine, theirs in
             zip(answers(tmp_path, "policy"), answers(tmp_path, "start"), strict=True)]  # fmt: skip
    assert sorted(map(sorted, asked)) == sorted(sorted(each) for each in texts if len(each) == 2)
    # The verdicts are those of a judge that sees no order.
    longest = [beats(*(np.array(len(each.text.strip())) for each in pair)) for pair in
               zip(answers(tmp_path, "policy"), answers(tmp_path, "start"), strict=True)]  # fmt: skip
    shares = [each.scores["win_rate/raw"] for each in answers(tmp_path, "policy")]
    assert [np.sign(share - 0.5) for share in shares] == [np.sign(float(each) - 0.5) for each in longest]
    assert found["win_rate/raw", "all"].extra["orders"] == "random"


@pytest.mark.slow
def test_a_judge_that_rates(world: World, tmp_path: Path):
    """Ratings are compared, and are WB-Score's, (mean − 5)·2; here an answer of ten characters or more is an 8."""

    def rating(text: str) -> int:
        return 8 if len(text) >= 10 else 2

    with JudgeServer(lambda body: f"Rating: [[{rating(shown(body)[0])}]]") as server:
        keys = win_rate(judge(server, mode="pointwise"), kinds=["raw", "wildbench"])
        found, _ = world.evaluate(tmp_path, keys)
    ours, theirs = ([rating(each.text.strip()) for each in answers(tmp_path, name)] for name in ("policy", "start"))
    assert found["wildbench/score", "all"].value == pytest.approx((np.mean(ours) - 5) * 2)
    assert found["win_rate/raw", "all"].value == beats(np.array(ours), np.array(theirs)).mean()
    assert [each.scores["judge-1"] for each in answers(tmp_path, "policy")] == ours


@pytest.mark.slow
def test_a_judge_with_a_side_is_found_out(world: World, tmp_path: Path):
    with JudgeServer(lambda body: "Verdict: [[A>B]]") as server:
        found, said = world.evaluate(tmp_path, win_rate(judge(server), kinds=["raw", "arena"]))
    assert found["win_rate/raw", "all"].value == 0.5
    assert found["judge/first_position", "all"].value == 1
    assert found["judge/consistency", "all"].value == 0
    assert found["arena/score", "all"].value == 0.5
    assert any("verdicts are ties" in line for line in said)
    assert any(
        "prefers the answer shown first: 100 %" in line for line in found["win_rate/raw", "all"].extra["warnings"]
    )


def test_a_judge_that_talks_nonsense_gives_no_number(world: World, tmp_path: Path):
    with (
        JudgeServer(lambda body: "Hello! How can I help?") as server,
        pytest.raises(RunError, match=r"judge-1 has no verdict on 100 % of 6 pairs against start .*max_unjudged 0.2"),
    ):
        world.evaluate(tmp_path, win_rate(judge(server)))
    assert not (tmp_path / "results.json").exists()


@pytest.mark.slow
def test_a_judge_that_can_t_be_believed_costs_its_own_numbers_alone(world: World, tmp_path: Path):
    with JudgeServer(lambda body: "?") as server:
        found, said = world.evaluate(tmp_path, win_rate([judge(server), "gold"]))
    assert {split for _, split in found} == {"all by gold"}
    assert any("the judge judge-1 has no verdict on 100 %" in line for line in said)


@pytest.mark.slow
def test_several_baselines_and_judges(world: World, tmp_path: Path):
    """Splits tell them apart; judges are compared; strengths come from all games."""
    both = [
        {"column": "output"},
        {"column": "responses_of", "answer_of": "two"},
        {"column": "responses_of", "name": "best"},
    ]
    with JudgeServer(longer) as server:
        keys = win_rate(["gold", judge(server)], baseline=both, kinds=["raw", "arena"], baselines_meet=True)
        found, _ = world.evaluate(tmp_path, keys, drawn=False, reference={"model": "none"})
    splits = {split for metric, split in found if metric == "win_rate/raw"}
    assert splits == {f"all vs {name} by {who}" for name in ("output", "two", "best") for who in ("gold", "judge-1")}
    assert found["judge/agreement", "all vs two by gold and judge-1"].value <= 1
    strengths = found["bradley_terry/win_rate", "all by gold"]
    assert strengths.extra["anchor"] == "output"
    assert set(strengths.extra["elo"]) == {"policy", "output", "two", "best"}
    assert found["win_rate/raw", "all vs two by gold"].value == found["win_rate/raw", "all vs best by gold"].value
    mine = answers(tmp_path, "policy")[0].scores
    assert {"win_rate/raw vs two by gold", "win_rate/raw vs output by judge-1", "gold"} <= set(mine)


def many(path: Path, prompts: int, models: int) -> dict[str, Any]:
    """A win rate against answers of several models, which the prompts carry along."""
    asked = problems("held_out", prompts, seed=2)
    rows = [
        {
            "prompt": [{"role": "user", "content": problem.question}],
            "responses_of": [{"model": f"m{i}", "text": text, "score": 0.5} for i, text in enumerate(texts)],
        }
        for problem, texts in zip(asked, candidates(asked, models), strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    listed = [{"column": "responses_of", "answer_of": f"m{i}"} for i in range(models)]
    return win_rate("gold", baseline=listed, prompts={"dataset_name": str(path)}, tau=0.3)


@pytest.mark.slow
def test_style_and_difficulty_are_held_fixed_where_they_are_asked_for(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Joint over ten models, its difficulties frozen in a file, which the next evaluation reads; style at once."""
    monkeypatch.setattr(controlled, "DRAWS", 60)  # of the bootstrap, whose width nothing here depends on
    keys = many(tmp_path / "many.jsonl", prompts=52, models=10)
    where: dict[str, Any] = {"drawn": False, "reference": {"model": "none"}}
    out = tmp_path / "joint"
    found, said = world.evaluate(out, {**keys, "style_control": True, "difficulty": "joint"}, **where)
    assert not [line for line in said if "left out" in line]
    joint = found["win_rate/length_controlled_joint", "all vs m0"]
    assert joint.low is not None
    assert joint.low < joint.value < joint.high
    assert (joint.clusters, len(joint.extra["joint"]["models"])) == (52, 10)
    assert [split for metric, split in found if metric == joint.metric] == ["all vs m0"]
    styled = [found["win_rate/style_controlled", f"all vs m{i}"] for i in range(10)]
    assert all(each.low is not None and each.low <= each.value <= each.high for each in styled)
    assert styled[0].extra["style_features"] == ["length", "headers", "lists", "bold"]
    report = write_report(out).read_text()
    for name in ("style-controlled", "joint fit", "were length and markdown alike"):
        assert name in report, name

    file = out / "difficulty-all-vs-m0.json"
    assert len(json.loads(file.read_text())["psi"]) == 52
    shutil.copytree(out / "samples", tmp_path / "again" / "samples")
    again = {**keys, "baseline": keys["baseline"][:2], "difficulty": str(file), "style_control": ["length"]}
    later, said = world.evaluate(tmp_path / "again", again, **where)
    frozen = later["win_rate/length_controlled_difficulty", "all vs m0"]
    assert frozen.low < frozen.value < frozen.high
    assert frozen.value == pytest.approx(joint.value, abs=0.1), "two estimators of one thing"
    assert later["win_rate/style_controlled", "all vs m0"].extra["style_features"] == ["length"]
    (left,) = (line for line in said if "length_controlled_difficulty is left out" in line)
    assert "are of games against m0 (" in left
    assert "judged by gold, and these are against m1 (" in left

    few = many(tmp_path / "few.jsonl", prompts=12, models=2)
    less, said = world.evaluate(tmp_path / "less", {**few, "style_control": True}, **where)
    assert "win_rate/style_controlled" not in {metric for metric, _ in less}
    assert any("win_rate/style_controlled is left out: 12 prompts have a verdict" in line for line in said)


@pytest.mark.slow
def test_stored_samples_as_baseline(world: World, tmp_path: Path):
    """Missing prompts are dropped and counted, other sampling is told; none in common is refused."""
    (drawn,) = (world.folder / "drawn" / "samples").glob("baseline-*.jsonl")
    groups = list(stored.read(drawn))
    origin = groups[0].samples[0].origin
    other = replace(origin, sampling={**origin.sampling, "temperature": 1.3}, template="another")
    for group in groups[:4]:
        stored.append(tmp_path / "some.jsonl", [replace(sample, origin=other) for sample in group.samples])
    keys = win_rate("gold", baseline=str(tmp_path / "some.jsonl"))
    found, said = world.evaluate(tmp_path / "run", keys, reference={"model": "none"})
    raw = found["win_rate/raw", "all"]
    assert (raw.clusters, raw.extra["dropped"]) == (4, {"the baseline has no answer to the prompt": 2})
    assert any("sampled otherwise (temperature 1.3 and not 0.7)" in line for line in said)
    assert any("another chat template" in line for line in said)
    for group in groups:
        odd = [replace(sample, prompt_id="0" * 31 + "1") for sample in group.samples]
        stored.append(tmp_path / "none.jsonl", odd)
        break
    with pytest.raises(RunError, match="baseline none has no answer to any of 6 prompts"):
        world.evaluate(tmp_path / "again", win_rate("gold", baseline=str(tmp_path / "none.jsonl")))


def test_cut_off_answers_are_counted_and_can_be_left_out(world: World, tmp_path: Path):
    keys = {"baseline": {"column": "output"}, "sampling": {"max_tokens": 3, "temperature": 0}, "kinds": ["raw"]}
    found, _ = world.evaluate(tmp_path, win_rate("gold", **keys), drawn=False)
    assert found["win_rate/raw", "all"].extra["truncated"] == PROMPTS
    with pytest.raises(RunError, match="none of 6 verdicts can be used"):
        world.evaluate(tmp_path, win_rate("gold", truncated="exclude", **keys), drawn=False)


@pytest.mark.slow
def test_runs_are_compared_only_under_equal_conditions(world: World, tmp_path: Path):
    """Another judge, another baseline: refused by ``python -m evals compare``; the same ones: compared by prompt."""
    with JudgeServer(longer) as server:
        world.evaluate(tmp_path / "a", win_rate("gold"))
        world.evaluate(tmp_path / "b", win_rate("gold"))
        world.evaluate(tmp_path / "c", win_rate(judge(server)))
        world.evaluate(tmp_path / "d", win_rate("gold", baseline={"column": "output"}))
    runs = {name: read_run(tmp_path / name) for name in "abcd"}

    def refused(name: str) -> str | None:
        (pair,) = compare([runs["a"], runs[name]], metrics=["win_rate/raw"]).pairs
        return pair.refused

    assert refused("b") is None
    assert "different judge: judge gold and judge-1" in str(refused("c"))
    assert "different baseline" in str(refused("d"))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"judge": "gould"}, "evals.0: judge.name: unknown scorer 'gould'; did you mean 'gold'"),
        ({"judge": []}, "judge is empty"),
        (
            {"judge": {"name": "judge", "model": "m", "base_url": "http://x", "opponents": 2}},
            "judge.opponents has no eff",
        ),
        ({"baseline": []}, "baseline is empty"),
        ({"baseline": {"column": "a", "model": "b"}}, "one of model, samples and column, got model and column"),
        ({"baseline": {"model": "b", "answer_of": "x"}}, "answer_of has no effect without column"),
        ({"baseline": "gone.jsonl"}, "there is no file of samples 'gone.jsonl'"),
        ({"baseline": "./gone"}, "there is no model './gone'"),
        ({"baseline": 7}, "baseline"),
        ({"kinds": ["wildbench"]}, "kinds: wildbench takes verdicts or ratings of a language model"),
        ({"kinds": ["elo"]}, "kinds must be"),
        ({"orders": "random"}, "orders has no effect on judges that score"),
        ({"margin": 100}, "margin has no effect without kind wildbench"),
        ({"baselines_meet": True}, "baselines_meet has no effect"),
        ({"tau": 0}, "tau must be > 0"),
        ({"max_unjudged": 1}, "max_unjudged must be in"),
        ({"style_control": []}, "style_control is empty; list some of length, headers, lists and bold"),
        ({"style_control": ["colour"]}, "style_control must be"),
        ({"difficulty": "joint"}, "difficulty: joint takes 10 models or more that play the first baseline, and 1"),
        ({"difficulty": "psi.json", "kinds": ["raw"]}, "difficulty has no effect without kind length_controlled"),
        ({"difficulty": "gone.json"}, "difficulty: gone.json can't be read (No such file or directory)"),
        ({"prompts": None}, "win_rate needs prompts"),
    ],
)
def test_settings_that_can_t_work_are_refused_before_anything_is_drawn(
    world: World, tmp_path: Path, keys: dict[str, Any], says: str
):
    with pytest.raises(RecipeError) as error:
        world.evaluate(tmp_path, {**win_rate("gold"), **keys}, drawn=False)
    assert says in str(error.value)
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize("evaluation", ["generations", "win_rate", "pass_at_k"])
@pytest.mark.parametrize(("written", "drawn_with"), [({}, 7), ({"seed": 0}, 0), ({"seed": 5}, 5), ({"seed": None}, 7)])
def test_a_seed_that_is_written_is_the_seed(tmp_path: Path, evaluation: str, written: dict[str, Any], drawn_with: int):
    """Also 0, which once was taken for no seed at all; without one it is that of the whole evaluation."""
    needed = {"win_rate": {"baseline": "reference", "judge": "gold"}, "pass_at_k": {"verifier": "world_answer"}}
    entry = {"name": evaluation, "sampling": written, **needed.get(evaluation, {})}
    recipe = {
        "model": {"model_name_or_path": str(POLICY)},
        "reference": {"model": str(POLICY)},
        "evals": [{**entry, "prompts": {"dataset_name": "prompts.jsonl"}}],
        "out": {"output_dir": str(tmp_path), "seed": 7},
    }
    (tmp_path / "eval.yaml").write_text(json.dumps(recipe))
    job = read_job(str(tmp_path / "eval.yaml"), [])
    (built,) = (each.built for each in job.evals)
    assert sampled.seeded(built.sampling, job).seed == drawn_with


@pytest.mark.slow
def test_a_baseline_that_is_not_there(world: World, tmp_path: Path):
    with pytest.raises(RecipeError, match="compares with a reference, and there is none"):
        world.evaluate(tmp_path, win_rate("gold"), drawn=False, reference={"model": "none"})
    serving = {"engine": "server", "base_url": "http://127.0.0.1:9/v1"}
    with pytest.raises(RecipeError, match="'reference' can't be sampled with serving"):
        world.evaluate(tmp_path, win_rate("gold"), drawn=False, serving=serving)
    keys = win_rate("gold", baseline={"column": "responses_of", "answer_of": "too"})
    with pytest.raises(RunError, match="holds no answer by 'too'; did you mean 'two'"):
        world.evaluate(tmp_path, keys, drawn=False)
    with pytest.raises(RunError, match="keep names the column 'outpt', which is not there"):
        world.evaluate(tmp_path, win_rate("gold", baseline={"column": "outpt"}), drawn=False)


# ---- pass_at_k ----


def passing(**keys: Any) -> dict[str, Any]:
    return {"name": "pass_at_k", "verifier": "world_answer", "sampling": {"n": 4, "max_tokens": 40}, **keys}


@pytest.mark.slow
def test_pass_at_k_and_strategies(world: World, tmp_path: Path):
    """Any@1 and any@n are recomputed from the answers; a verifier as reward makes best_of_n reach any@k."""
    keys = passing(strategies=["majority", "best_of_n"], scorers="gold")
    found, _ = world.evaluate(tmp_path, keys, drawn=False)
    lines = answers(tmp_path, "policy")
    right = np.array([each.scores["right"] for each in lines]).reshape(PROMPTS, 4)
    wanted = [gold_score(problem_of(each.prompt[0]["content"]), each.text) for each in lines]
    assert [each.scores["gold"] for each in lines] == pytest.approx(wanted)
    assert found["pass_at_k/any@1", "all"].value == pytest.approx(right.mean())
    assert found["pass_at_k/any@4", "all"].value == pytest.approx(right.any(axis=1).mean())
    for k in (1, 2, 4):
        assert found[f"pass_at_k/best_of_n@{k}", "all"].value == pytest.approx(found[f"pass_at_k/any@{k}", "all"].value)
        # Of 200 random subsets a prompt, where the other is exact.
        assert found[f"pass_at_k/majority@{k}", "all"].value <= found[f"pass_at_k/any@{k}", "all"].value + 0.05
    extra = found["pass_at_k/majority@4", "all"].extra
    assert extra["verifier"] == {"name": "world_answer"}
    assert extra["strategy"]["name"] == "majority"
    kept = read_scores(tmp_path)
    assert {key[0] for key in kept} == {f"pass_at_k/{name}@4" for name in ("any", "majority", "best_of_n")}


@pytest.mark.slow
def test_prompts_without_a_right_answer_are_left_out_and_counted(world: World, tmp_path: Path):
    rows = [json.loads(line) for line in world.prompts.read_text().splitlines()]
    rows[0]["answer"] = None
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    prompts = {"dataset_name": str(tmp_path / "rows.jsonl"), "keep": ["answer"]}
    keys = passing(verifier={"name": "math", "column": "answer"}, prompts=prompts, sampling={"n": 2, "max_tokens": 24})
    found, said = world.evaluate(tmp_path / "run", keys, drawn=False)
    result = found["pass_at_k/any@2", "all"]
    assert (result.clusters, result.extra["dropped"]) == (2, {"no right answer in the column answer": 1})
    assert any("1 of 3 prompts are left out" in line for line in said)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"strategies": ["best_of_n"]}, "strategies: best_of_n chooses by rewards; add scorers"),
        ({"strategies": ["majority"], "scorers": "gold"}, "scorers has no effect: no strategy reads rewards"),
        ({"strategies": ["majority", "majority"]}, "lists majority 2 times"),
        ({"strategies": ["majorty"]}, "unknown selection 'majorty'; did you mean 'majority'"),
        ({"ks": [1, 8]}, "ks goes to 8, and sampling.n is 4"),
        ({"ks": [2, 1]}, "ks must be increasing"),
        ({"ks": []}, "ks must be increasing"),
        ({"subsets": 10}, "subsets must be >= 200"),
        ({"verifier": ["gold", "math"]}, "verifier: 2 are listed; name one"),
        (
            {"verifier": {"name": "python", "function": "a:b"}, "strategies": ["majority"]},
            "python finds none in responses",
        ),
        ({"prompts": None}, "pass_at_k needs prompts"),
    ],
)
def test_impossible_curves_are_refused_before_anything_is_drawn(
    world: World, tmp_path: Path, keys: dict[str, Any], says: str
):
    with pytest.raises(RecipeError) as error:
        world.evaluate(tmp_path, passing(**keys), drawn=False)
    assert says in str(error.value)
    assert not (tmp_path / "samples").exists()


# ---- generations ----


def test_generations_beside_the_reference(world: World, tmp_path: Path):
    found, _ = world.evaluate(tmp_path, {"name": "generations", "reference": True})
    ours, theirs = answers(tmp_path, "policy"), answers(tmp_path, "start")
    assert len(ours) == len(theirs) == PROMPTS
    assert {each.split for each in ours} == {"all, generations"}
    assert found["generations/tokens", "all"].value == pytest.approx(np.mean([each.tokens for each in ours]))
    same = np.mean([a.text == b.text for a, b in zip(ours, theirs, strict=True)])
    assert found["generations/same_as_reference", "all"].value == same
    assert found["generations/tokens", "all"].extra["reference"].startswith("start (")


@pytest.mark.slow
def test_all_three_leave_each_other_s_answers_alone(world: World, tmp_path: Path):
    world.evaluate(tmp_path, win_rate("gold"), {"name": "generations"})
    assert {each.split for each in answers(tmp_path, "policy")} == {"all, win_rate", "all, generations"}


@pytest.mark.slow
def test_sampling_during_training_is_that_of_the_command(world: World, tmp_path: Path):
    """The same answers from a live model in training mode; its mode and all random states are as before."""
    model = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32).train()
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    prompts = read_prompts(PromptSection(dataset_name=str(world.prompts))).found
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    groups, too_long = sample_during(model, tokenizer, prompts, Sampling(**SAMPLING), length=256)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    (drawn,) = (world.folder / "drawn" / "samples").glob("policy-*.jsonl")
    wanted = list(stored.read(drawn))
    assert [[s.text for s in g.samples] for g in groups] == [[s.text for s in g.samples] for g in wanted]
    assert too_long == 0
    assert measured_of(groups).estimates == measured_of(wanted).estimates
    _, all_too_long = sample_during(model, tokenizer, prompts, Sampling(**SAMPLING), length=2)
    assert all_too_long == PROMPTS


@pytest.mark.slow
def test_a_real_model_against_published_answers(shared: Path, tmp_path: Path):
    """stories260k against the best of AlpacaEval's scored answers, by length: it is cut off, counted and judged."""
    world = World(tmp_path)
    prompts = {"dataset_name": str(shared / "data" / "alpaca_eval_scored.jsonl.gz"), "max_rows": 8}
    with JudgeServer(longer) as server:
        keys = win_rate(
            judge(server), baseline={"column": "responses"}, prompts=prompts, sampling={"max_tokens": 12}, kinds=["raw"]
        )
        model = {"model_name_or_path": str(shared / "models" / "stories260k"), "name": "stories"}
        found, _ = world.evaluate(tmp_path / "run", keys, drawn=False, model=model, reference={"model": "none"})
    raw = found["win_rate/raw", "all"]
    assert raw.extra["truncated"] == 8
    assert raw.value < 0.2
    assert found["judge/prefers_longer", "all"].value == 0.875  # much better as A, better as B
