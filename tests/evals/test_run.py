"""``python -m evals run``: on checkpoints, adapters, runs and reward models, and what it says to bad input."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.train import main as train
from evals import run_directory
from evals.__main__ import main
from evals.generations_file import read_generations
from evals.pair_rows import read_pairs
from evals.results import Result, Results
from evals.scores import read_scores
from tests.equivalence.test_resume import command, lines
from tests.equivalence.worlds import save_model, write_rows
from tests.support import without_forecast

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _evaluations_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs measure themselves in this process, to save the start of another; those of ``whole_runs`` in their own."""
    if request.node.get_closest_marker("whole_runs") is not None:
        return

    def here(_: Any, output_dir: Path, say: Callable[[str], None]) -> str | None:
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
            status = main(["run", str(output_dir)])
        told = said.getvalue().splitlines()
        for line in told:
            say(f"evals: {line}")
        return None if status == 0 else told[-1].removeprefix("error: ")

    without_forecast(monkeypatch)
    monkeypatch.setattr(run_directory, "_evaluated", here)


def evaluate(folder: Path, *words: str, output: str = "out") -> Path:
    """Evaluates the tiny model on the tiny pairs; the output folder."""
    given = [
        *("run", f"--model_name_or_path={folder / 'model'}", f"--data.dataset_name={folder / 'pairs.jsonl'}"),
        *("--evals=[ranking, ches]", f"--output_dir={folder / output}"),
    ]
    keys = {word.split("=")[0] for word in words}
    assert main([*(word for word in given if word.split("=")[0] not in keys), *words]) == 0
    return folder / output


def values(run: Path, *, split: str | None = None) -> dict[tuple[str, int], Result]:
    results = Results.read(run / "results.json").results
    return {(each.metric, each.step): each for each in results if split is None or each.split == split}


def test_a_model_compared_with_another(folder: Path):
    save_model(folder / "other", seed=3)
    out = evaluate(
        folder, f"--reference.model={folder / 'other'}", "--evals=[ranking, {name: ches, edit_similarity: true}]"
    )
    found = values(out)
    assert {result.split for result in found.values()} == {"all"}
    assert {result.dataset for result in found.values()} == {str(folder / "pairs.jsonl")}
    assert all(result.n == 48 and result.extra["n_dropped"] == 0 for result in found.values())
    pairs = list(read_pairs(out))
    assert len(pairs) == 48
    numbers = [pair.numbers for pair in pairs]
    right = [each["policy_chosen"] > each["policy_rejected"] for each in numbers]
    assert found["ranking/accuracy", 0].value == pytest.approx(sum(right) / 48)
    moved = [each["policy_chosen"] - each["ref_chosen"] for each in numbers]
    assert found["displacement/chosen", 0].value == pytest.approx(sum(moved) / 48)
    assert all(each["difficulty"] == each["ref_rejected"] - each["ref_chosen"] for each in numbers)
    assert found["ches/ches", 0].value == pytest.approx(sum(each["ches"] for each in numbers) / 48)
    assert pairs[5].prompt.removeprefix("<s>").startswith("5 ")
    assert pairs[5].chosen.endswith(".</s>")
    scores = read_scores(out)
    per_prompt = scores["ranking/accuracy", str(folder / "pairs.jsonl"), "all", 0].by_prompt
    assert per_prompt == {pair.prompt_id: float(ok) for pair, ok in zip(pairs, right, strict=True)}
    described = json.loads((out / "results.json").read_text())["run"]
    assert described["evaluations"][1] == {"name": "ches", "edit_similarity": True}
    assert {"fingerprint", "template", "seed", "commit", "versions", "reference"} <= described.keys()


def test_a_second_evaluation_joins_the_first(folder: Path):
    out = evaluate(folder, "--evals=ranking")
    first = values(out)
    evaluate(folder, "--evals=ches", "--step=7")
    both = values(out)
    assert {key: both[key].value for key in first} == {key: first[key].value for key in first}
    assert {key[1] for key in both if key[0].startswith("ches/")} == {7}
    evaluate(folder, "--evals=ranking", "--max_rows=30")
    assert values(out)["ranking/accuracy", 0].n == 30, "the same metric on the same split is replaced"


@pytest.mark.whole_runs
def test_a_run_measures_itself_at_its_end(folder: Path):
    """On its held-out rows, with the numbers that evaluation on the way had."""
    evals = "--evals=[{name: ranking, betas: [0.1, 0.5]}, ches]"
    assert train(command(folder, "run", evals, save_strategy="no", save_steps=None)) == 0
    end = values(folder / "run", split="held out")
    logged = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(logged) if "eval/ranking/accuracy" in line)
    assert end["ranking/accuracy", 10].value == pytest.approx(last["eval/ranking/accuracy"])
    assert end["displacement/chosen", 10].value == pytest.approx(last["eval/displacement/chosen"], abs=1e-4)
    assert end["ranking/idealised", 10].extra["betas"] == [0.1, 0.5]
    assert -1 <= end["ches/ln_ches_spearman", 10].value <= 1
    assert len(list(read_pairs(folder / "run"))) == end["ranking/accuracy", 10].n
    assert "ches/ln_ches" in (folder / "run" / "README.md").read_text()
    # Again by hand, with something else than the recipe asks for.
    assert main(["run", str(folder / "run"), "--evals=ranking"]) == 0
    assert values(folder / "run", split="held out")["ranking/idealised", 10].extra["betas"] == [
        0.01,
        0.1,
        1.0,
        5.0,
        10.0,
    ]


@pytest.mark.parametrize("objective", ["kto", "sft"])
def test_objectives_of_other_legs_are_ranked_on_their_held_out_pairs(folder: Path, objective: str):
    keys: dict[str, Any] = {"save_strategy": "no", "save_steps": None, "beta": None if objective == "sft" else 0.5}
    words = command(folder, "run", "--evals=ranking", **keys)
    words[0] = "--objective={name: sft, leg: chosen}" if objective == "sft" else f"--objective.name={objective}"
    assert train(words) == 0
    found = values(folder / "run", split="held out")
    step = max(step for metric, step in found if metric == "ranking/accuracy")
    assert found["ranking/accuracy", step].n == found["ranking/accuracy", step].clusters == 10  # 0.2 of 48 prompts
    trained_on = {json.loads(line)["prompt"] for line in (folder / "pairs.jsonl").read_text().splitlines()}
    assert {pair.prompt.removeprefix("<s>") for pair in read_pairs(folder / "run")} < trained_on


def test_an_adapter_is_compared_with_its_base(folder: Path):
    assert (
        train(command(folder, "run", "--lora.r=4", "--evals=[ranking, ches]", save_strategy="no", save_steps=None)) == 0
    )
    ended = values(folder / "run", split="held out")
    out = evaluate(folder, f"--model_name_or_path={folder / 'run'}")
    found = values(out)
    step = max(step for _, step in ended)
    assert found["displacement/chosen", step].value != 0, "the step is the run's own"
    merged = evaluate(
        folder, f"--model_name_or_path={folder / 'run'}", f"--reference.model={folder / 'model'}", output="b"
    )
    for key, result in values(merged).items():
        assert result.value == pytest.approx(found[key].value, rel=1e-4, abs=1e-5), key


def test_reward_models(folder: Path, capsys: pytest.CaptureFixture):
    words = command(folder, "run", "--evals=reward_model", save_strategy="no", save_steps=None, beta=None)
    words[0] = "--objective.name=bradley_terry"
    assert train(words) == 0
    found = values(folder / "run", split="held out")
    logged = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(logged) if "eval/reward_model/accuracy" in line)
    assert found["reward_model/accuracy", 10].value == pytest.approx(last["eval/reward_model/accuracy"])
    assert main(["run", str(folder / "run"), "--evals=ranking"]) == 2
    assert "ranking" in capsys.readouterr().err
    assert main(["run", str(folder / "run"), "--evals=ches"]) == 2
    assert "ches measures language models" in capsys.readouterr().err


def test_raters_shares_come_from_a_column(folder: Path, capsys: pytest.CaptureFixture):
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    shares = [0.5 if i % 4 == 0 else 0.75 for i in range(len(rows))]
    rated = write_rows(folder / "rated.jsonl", [row | {"rater_share": s} for row, s in zip(rows, shares, strict=True)])
    words = [f"--reference.model={folder / 'model'}", "--evals={name: ranking, alpha: data}"]
    found = values(evaluate(folder, f"--data.dataset_name={rated}", *words))
    assert found["ranking/idealised", 0].n == 36, "pairs that raters tie are left out"
    assert found["ranking/accuracy", 0].n == 48
    words += [f"--model_name_or_path={folder / 'model'}", f"--output_dir={folder / 'x'}"]
    assert main(["run", *words, f"--data.dataset_name={folder / 'pairs.jsonl'}"]) == 2
    assert "rater_share" in capsys.readouterr().err


def test_groups_have_an_ideal_of_their_own_and_one_line_each(folder: Path):
    """Each group's numbers are those of its rows alone; groups don't multiply tables, drawings and sentences."""
    save_model(folder / "other", seed=3)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    groups = ["easy" if i % 3 else "hard" for i in range(len(rows))]
    grouped = write_rows(folder / "grouped.jsonl", [r | {"group": g} for r, g in zip(rows, groups, strict=True)])
    alone = write_rows(folder / "alone.jsonl", [r for r, g in zip(rows, groups, strict=True) if g == "hard"])
    words = [f"--reference.model={folder / 'other'}", "--evals={name: ranking, betas: [0.1, 1.0], alpha: 0.9}"]
    out = evaluate(folder, f"--data.dataset_name={grouped}", *words)
    of_all, of_hard, of_easy = (values(out, split=split) for split in ("all", "all, hard", "all, easy"))
    by_themselves = values(evaluate(folder, f"--data.dataset_name={alone}", *words, output="b"), split="all")
    ideal = [f"ranking/{name}{per}" for name in ("idealised", "gap") for per in ("", "_per_token")]
    assert {(name, 0) for name in ideal} <= of_all.keys() == of_hard.keys() == of_easy.keys()
    for key, result in of_hard.items():
        assert (result.value, result.n) == (pytest.approx(by_themselves[key].value, rel=1e-4, abs=1e-6), 16), key
        assert result.low == (None if result.low is None else pytest.approx(by_themselves[key].low, rel=1e-3, abs=1e-6))
        assert result.extra["part_of"] == [str(grouped), "all"]
        assert result.extra["template"] == of_all[key].extra["template"]
    assert of_hard["ranking/gap", 0].extra["simulated_alpha"] == 0.9
    assert of_hard["ranking/gap", 0].extra["betas"] == [0.1, 1.0]
    page = (out / "report.html").read_text()
    assert page.count("<code>ranking/gap</code>") == 1, "parts have a table of their own"
    assert page.count('aria-label="Ranking accuracy of the policy') == 2, "and no drawings"
    line = next(line for line in page.splitlines() if '<th scope="row">hard</th>' in line)
    assert "16" in line
    assert page.count("0.9 is assumed for every pair") == 3, "in two drawings, and of the parts"


def test_the_card_has_a_line_for_each_group_and_limits_of_all_rows(folder: Path):
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    groups = ["easy" if i % 3 else "hard" for i in range(len(rows))]
    write_rows(folder / "pairs.jsonl", [r | {"group": g} for r, g in zip(rows, groups, strict=True)])
    assert (
        train(command(folder, "run", "--evals=ranking", "--eval_share=0.5", save_strategy="no", save_steps=None)) == 0
    )
    card, found = (folder / "run" / "README.md").read_text(), values(folder / "run", split="held out")
    step = max(step for _, step in found)
    assert card.count("| ranking/gap |") == 1 + 1, "a row over all pairs, and the head of the table of parts"
    (line,) = [line for line in card.splitlines() if line.startswith("| hard |")]
    gap = values(folder / "run", split="held out, hard")["ranking/gap", step]
    assert f"{100 * gap.value:.1f}".replace("-", "−").removesuffix(".0") in line
    if found["ranking/gap", step].value > 0:
        assert f"{100 * found['ranking/gap', step].value:.3g} points" in card, "the limit is that of all rows"
    assert "95 % intervals. Shares of raters are not known; 0.75 is assumed for every pair.\n\n| part | n |" in card
    assert "2 of 2 parts of the rows have fewer than 30 prompts" in card
    assert "of split held out, hard" not in card


def test_a_group_that_raters_tie_has_no_ideal(folder: Path):
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    tied = [row | {"group": "ab"[i % 2], "rater_share": (0.5, 0.75)[i % 2]} for i, row in enumerate(rows)]
    rated = write_rows(folder / "rated.jsonl", tied)
    words = [f"--reference.model={folder / 'model'}", "--evals={name: ranking, alpha: data}"]
    out = evaluate(folder, f"--data.dataset_name={rated}", *words)
    assert "ranking/accuracy" in {metric for metric, _ in values(out, split="all, a")}
    assert "ranking/idealised" not in {metric for metric, _ in values(out, split="all, a")}
    of_b = values(out, split="all, b")["ranking/idealised", 0]
    assert (of_b.n, of_b.extra["n_dropped"]) == (24, 0)
    assert "simulated_alpha" not in of_b.extra
    assert values(out, split="all")["ranking/idealised", 0].extra["n_dropped"] == 24
    assert "could not be scored" not in (out / "report.html").read_text(), "a tie of raters is no fault of a row"


def test_what_fails_costs_no_other_result(folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    from evals.evaluations.pairs import Ches

    def broken(self: Ches, context: object) -> None:
        raise ValueError("the disk is on fire")

    monkeypatch.setattr(Ches, "__call__", broken)
    words = [f"--model_name_or_path={folder / 'model'}", f"--data.dataset_name={folder / 'pairs.jsonl'}"]
    assert main(["run", *words, "--evals=[ches, ranking]", f"--output_dir={folder / 'out'}"]) == 2
    assert "1 of 2 evaluations could not be measured: ches: the disk is on fire" in capsys.readouterr().err
    assert values(folder / "out")["ranking/accuracy", 0].n == 48


BAD: dict[str, tuple[list[str], str]] = {
    "unknown evaluation": (["--evals=rankin"], "unknown evaluation 'rankin'; did you mean 'ranking'?"),
    "unknown key": (["--evals={name: ranking, beta: 1}"], "unknown key evals.beta; did you mean 'betas'?"),
    "out of range": (["--evals={name: ranking, betas: [0]}"], "betas must be numbers > 0"),
    "twice": (["--evals=[ches, ches]"], "evals lists ches 2 times"),
    "no folder": (["--model_name_or_path=./nowhere"], "there is no folder"),
    "no data": (["--data.dataset_name=./none.jsonl"], "none.jsonl"),
    "no such split": (["--data.split=tset"], "tset"),
    "not a reward model": (["--evals=reward_model"], "reward_model measures reward models"),
    "threshold alone": (["--threshold=0.5"], "rule threshold and the key threshold go together"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_answered_in_a_sentence(folder: Path, name: str, capsys: pytest.CaptureFixture):
    words, message = BAD[name]
    given = [
        *("run", f"--model_name_or_path={folder / 'model'}", f"--data.dataset_name={folder / 'pairs.jsonl'}"),
        *("--evals=ranking", f"--output_dir={folder / 'out'}"),
    ]
    keys = {word.split("=")[0] for word in words}
    assert main([*(word for word in given if word.split("=")[0] not in keys), *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (folder / "out" / "results.json").exists()


BEFORE_TRAINING: dict[str, tuple[list[str], str]] = {
    "no held-out rows": (["--evals=ranking", "--eval_share=0"], "needs held-out rows"),
    "reward model": (["--evals=reward_model"], "which this recipe does not train"),
    "serving alone": (["--serving.engine=transformers"], "serving has no effect without evals"),
    "unknown": (["--evals=rank"], "unknown evaluation 'rank'"),
}


@pytest.mark.parametrize("name", BEFORE_TRAINING)
def test_what_could_not_be_measured_is_refused_before_training(folder: Path, name: str, capsys: pytest.CaptureFixture):
    words, message = BEFORE_TRAINING[name]
    keys = {"eval_share": None} if any("eval_share" in word for word in words) else {}
    assert train(command(folder, "run", *words, **keys)) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "run").exists()


def test_a_folder_that_is_no_run(folder: Path, capsys: pytest.CaptureFixture):
    assert main(["run", str(folder / "model")]) == 2
    assert "is no run's folder" in capsys.readouterr().err


def test_damaged_results_are_not_overwritten(folder: Path, capsys: pytest.CaptureFixture):
    (folder / "out").mkdir()
    (folder / "out" / "results.json").write_text("{")
    words = [f"--model_name_or_path={folder / 'model'}", f"--data.dataset_name={folder / 'pairs.jsonl'}"]
    assert main(["run", *words, "--evals=ranking", f"--output_dir={folder / 'out'}"]) == 2
    assert "is not JSON" in capsys.readouterr().err
    assert (folder / "out" / "results.json").read_text() == "{"


def test_samples_on_the_way_change_nothing_but_what_is_told(folder: Path):
    keys: dict[str, Any] = {"save_strategy": "no", "save_steps": None, "eval_strategy": "steps", "eval_steps": 5}
    prompts = f"{{dataset_name: {folder / 'pairs.jsonl'}, max_rows: 6}}"
    evals = f"--evals={{name: generations, during: 3, prompts: {prompts}, sampling: {{max_tokens: 8}}}}"
    assert train(command(folder, "plain", **keys)) == 0
    assert train(command(folder, "sampled", evals, "--serving.engine=transformers", **keys)) == 0
    plain, sampled = lines(folder / "plain"), lines(folder / "sampled")
    told = {line["step"] for line in sampled if "eval/generations/tokens" in line}
    assert told == {0, 5, 10}
    others = [{key: v for key, v in line.items() if "generations/" not in key} for line in sampled]
    assert [line for line in others if line.keys() - {"step", "epoch"}] == plain
    answers = list(read_generations(folder / "sampled"))
    assert [each.step for each in answers if "first 3" in each.split] == [0] * 3 + [5] * 3 + [10] * 3
    end = {each.prompt_id: each.text for each in answers if each.step == 10 and "first 3" not in each.split}
    assert len(end) == 6
    for each in answers:
        if each.step == 10:
            assert each.text == end[each.prompt_id], "the saved weights answer as the live ones did"


def test_two_sets_of_prompts_on_the_way_have_keys_of_their_own(folder: Path, capsys: pytest.CaptureFixture):
    """Both used to log eval/generations/tokens, so that a line had the numbers of the second set alone."""
    keys: dict[str, Any] = {"save_strategy": "no", "save_steps": None, "eval_strategy": "steps", "eval_steps": 5}
    (folder / "more.jsonl").write_text((folder / "pairs.jsonl").read_text())

    def both(first: str = "", second: str = "", file: str = "more.jsonl") -> list[str]:
        def of(name: str, tokens: int, more: str) -> str:
            prompts = f"{{dataset_name: {folder / name}, max_rows: 4}}"
            return f"{{name: generations, during: 3, prompts: {prompts}, sampling: {{max_tokens: {tokens}}}{more}}}"

        evals = f"--evals=[{of('pairs.jsonl', 8, first)}, {of(file, 2, second)}]"
        return [evals, "--serving.engine=transformers"]

    def logged(run: str, metric: str) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for line in lines(folder / run):
            for key in (key for key in line if key.startswith(f"eval/generations/{metric}")):
                found.setdefault(key.removeprefix(f"eval/generations/{metric}"), []).append(line[key])
        return found

    named = both(", split_name: long", ", split_name: brief", file="pairs.jsonl")
    assert train(command(folder, "named", *named, **keys)) == 0
    tokens = logged("named", "tokens")
    means = {" (long, first 3)", " (brief, first 3)"}
    assert tokens.keys() - means == {f"_{end}{name}" for end in ("low", "high") for name in means} & tokens.keys()
    assert [len(tokens[name]) for name in means] == [3, 3], "before, on the way and at the end"
    assert all(8 >= a > 2 >= b for a, b in zip(*(tokens[f" ({n}, first 3)"] for n in ("long", "brief")), strict=True))
    assert train(command(folder, "files", *both(), **keys)) == 0
    assert {" (pairs.jsonl, all, first 3)", " (more.jsonl, all, first 3)"} <= logged("files", "tokens").keys()
    (folder / "other").mkdir()
    (folder / "other" / "pairs.jsonl").write_text((folder / "pairs.jsonl").read_text())
    assert train(command(folder, "alike", *both(file="other/pairs.jsonl"), **keys)) == 2
    assert "give one of them a split_name" in capsys.readouterr().err
    assert not (folder / "alike").exists(), "refused before anything is trained"


def test_during_is_for_training(folder: Path, capsys: pytest.CaptureFixture):
    words = [f"--model_name_or_path={folder / 'model'}", f"--data.dataset_name={folder / 'pairs.jsonl'}"]
    assert main(["run", *words, "--evals={name: generations, during: 2}", f"--output_dir={folder / 'out'}"]) == 2
    assert "during has no effect outside a recipe for training" in capsys.readouterr().err


def test_an_adapter_that_was_trained_on_is_compared_with_itself_as_it_was(folder: Path):
    words = [*command(folder, "first", "--lora.r=4", save_strategy="no", save_steps=None)]
    assert train(words) == 0
    more = command(folder, "second", "--evals=ranking", save_strategy="no", save_steps=None)
    assert train([*more, f"--adapter_name_or_path={folder / 'first'}"]) == 0
    found = values(folder / "second", split="held out")
    logged = lines(folder / "second")
    last = next(line for line in reversed(logged) if "eval/displacement/chosen" in line)
    assert found["displacement/chosen", 10].value == pytest.approx(last["eval/displacement/chosen"], abs=1e-4)
    assert found["ranking/reference", 10].value == pytest.approx(last["eval/ranking/reference"])


def test_results_of_another_model_are_not_mixed_with_these(folder: Path, capsys: pytest.CaptureFixture):
    save_model(folder / "other", seed=3)
    out = evaluate(folder)
    before = (out / "results.json").read_text()
    words = [f"--model_name_or_path={folder / 'other'}", f"--data.dataset_name={folder / 'pairs.jsonl'}"]
    assert main(["run", *words, "--evals=ranking", f"--output_dir={out}"]) == 2
    assert "holds results of another model (model) at step 0" in capsys.readouterr().err
    assert (out / "results.json").read_text() == before
    assert main(["run", *words, "--evals=ranking", f"--output_dir={out}", "--step=5"]) == 0
    assert {each.extra["model"] for each in Results.read(out / "results.json").results} == {"model", "other"}


def test_only_evaluations_can_be_given_after_a_run(folder: Path, capsys: pytest.CaptureFixture):
    assert train(command(folder, "run", save_strategy="no", save_steps=None)) == 0
    assert main(["run", str(folder / "run"), "--evals=ranking", "--max_length=100"]) == 2
    assert "has no effect on a run that is trained" in capsys.readouterr().err
    (folder / "evals.yaml").write_text(f"evals: ranking\ndata: {{dataset_name: {folder / 'pairs.jsonl'}}}\n")
    assert main(["run", str(folder / "run"), "--config", str(folder / "evals.yaml")]) == 0
    assert values(folder / "run", split="all")["ranking/accuracy", 10].n == 48
    (folder / "evals.yaml").write_text("evals: ranking\nout: {output_dir: elsewhere}\n")
    assert main(["run", str(folder / "run"), "--config", str(folder / "evals.yaml")]) == 2
    assert "unknown section 'out'" in capsys.readouterr().err
