"""What the doctor asks models: numbers against loops, planted noise, and the same rows in a run and in ``--write``."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from align.reward_scorer import RewardModel
from align.sections import ModelSection
from align.train import main as train
from data.__main__ import main as check
from data.filters import Ches, LabelNoise
from data.findings import Diagnosis
from data.store import Ragged, TokenTable
from data.tables import Split
from data.worlds import POLICY, candidates, problems, scored
from evals import row_scores
from evals.ches import keep_mask
from evals.doctor_findings import SURE, cross_fitted, of_policy, of_reward_model
from evals.row_scores import Policy, columns, kept
from tests.align.sampled import group
from tests.equivalence.runs import prepare_recipe, recipe_for, write_rows
from tests.equivalence.worlds import save_model, save_pairs
from tests.support import REPOSITORY

OTHER_ORDER = {"rtol": 2e-4, "atol": 2e-4}  # float32 sums in another order, of log-probs up to some hundred nats


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model")
    save_pairs(tmp_path / "pairs.jsonl", number=40)


def prepared(tmp_path: Path, *words: str) -> tuple[Any, Policy]:
    recipe = recipe_for(tmp_path, "model", Path("pairs.jsonl"), *words)
    config, tokenizer, found = prepare_recipe(recipe)
    return found, Policy(section=recipe.model, adapter=None, config=config, tokenizer=tokenizer)


def quiet(_: str) -> None:
    """Nothing is said."""


def run(*words: str) -> dict[str, Any]:
    given = (
        *("--model_name_or_path=model", "--dataset_name=pairs.jsonl", "--output_dir=run", "--objective=dpo"),
        *("--max_steps=1", "--rows_per_step=8", "--save_strategy=no"),
    )
    assert train([*given, *words]) == 0
    return json.loads(Path("run/data_report.json").read_text())


def left_in(report: dict[str, Any]) -> dict[int, str]:
    return {each["index"]: each["reason"] for each in report["dropped_rows"]}


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    given = ("--model_name_or_path=model", "--dataset_name=pairs.jsonl", "--output_dir=run", "--save_strategy=no")
    assert train([*given, *words]) == 2
    return capsys.readouterr().err


# Numbers


@pytest.mark.slow
def test_numbers_of_the_policy_are_those_of_a_loop(tmp_path):
    """Each response by itself through transformers: its log-probs, and the states before its tokens."""
    found, policy = prepared(tmp_path)
    split = found.train
    own = columns(split, policy, None, quiet)
    model = AutoModelForCausalLM.from_pretrained("model").eval()
    expected: dict[str, list[float]] = {name: [] for name in own}
    for row in range(len(split.table)):
        logps, states = {}, {}
        for leg in ("chosen", "rejected"):
            prompt, response = split.table.prompts[row].tolist(), split.table.legs[leg][row].tolist()
            with torch.no_grad():
                out = model(torch.tensor([prompt + response]), output_hidden_states=True)
            start = len(prompt) - 1
            by_token = torch.log_softmax(out.logits[0, start:-1].double(), dim=-1)
            logps[leg] = sum(float(by_token[i, token]) for i, token in enumerate(response))
            states[leg] = [vector.double() for vector in out.hidden_states[-1][0, start:-1]]
        good, bad = (len(states[leg]) for leg in ("chosen", "rejected"))
        plus, minus = (sum(states[leg][1:], states[leg][0]) for leg in ("chosen", "rejected"))
        expected["difficulty"].append(logps["rejected"] - logps["chosen"])
        expected["reference_margin"].append(logps["rejected"] / bad - logps["chosen"] / good)
        expected["ches"].append(float(plus @ minus - plus @ plus))
        expected["ln_ches"].append(float(plus / good @ minus / bad - plus / good @ plus / good))
    assert min(len(split.table), len(own)) > 1
    for name, values in expected.items():
        tolerance = {"rtol": 1e-4, "atol": 1e-2} if name == "ches" else OTHER_ORDER  # sums of up to 50 states, squared
        np.testing.assert_allclose(own[name], values, err_msg=name, **tolerance)


def save_judge(folder: Path, seed: int = 1) -> Path:
    """A reward model of random weights with the tokenizer of ``model``."""
    torch.manual_seed(seed)
    base = AutoModelForSequenceClassification.from_pretrained("model", num_labels=1)
    with torch.no_grad():
        base.score.weight.mul_(30.0)
    base.save_pretrained(folder)
    AutoTokenizer.from_pretrained("model").save_pretrained(folder)
    return folder


def test_numbers_of_a_reward_model_are_those_of_the_scorer(tmp_path):
    """``align.scores`` tokenises the texts by itself."""
    save_judge(tmp_path / "judge")
    found, policy = prepared(tmp_path)
    own = columns(found.train, policy, "judge", quiet)["reward_margin"]
    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    scorer = RewardModel(model="judge", ending="token")
    scores = scorer([group(row["prompt"], [row["chosen"], row["rejected"]]) for row in rows])
    chosen, rejected = (np.array([each.score for each in scores[i::2]], dtype=float) for i in (0, 1))
    np.testing.assert_allclose(own, rejected - chosen, **OTHER_ORDER)
    assert np.std(own) > 0.1


# Kept by content


@pytest.mark.slow
def test_what_is_kept_is_found_again_and_only_for_the_same(tmp_path, monkeypatch):
    """Weights, type, adapter, configuration and rows: each by itself leads to another pass; nothing else does."""
    found, policy = prepared(tmp_path)
    passes: list[str] = []
    own = row_scores._pass

    def counted(section: Any, model: Any, table: Any, dtype: Any, who: str, *more: Any) -> Any:
        passes.append(who)
        return own(section, model, table, dtype, who, *more)

    monkeypatch.setattr(row_scores, "_pass", counted)

    def asked(split: Any = found.train, who: Policy = policy, judge: str | None = None) -> int:
        columns(split, who, judge, quiet)
        return len(passes)

    assert [asked(), asked()] == [1, 1]
    assert asked(who=replace(policy, tokenizer=None)) == 1
    save_model(tmp_path / "other", seed=1)
    assert asked(who=replace(policy, section=ModelSection(model_name_or_path="other"))) == 2
    assert asked(who=replace(policy, section=replace(policy.section, dtype="bfloat16"))) == 3
    assert asked(found.train.take(np.arange(39))) == 4
    config = policy.config.__class__.from_dict({**policy.config.to_dict(), "rms_norm_eps": 1e-3})
    assert asked(who=replace(policy, config=config)) == 5
    save_judge(tmp_path / "judge")
    assert [asked(judge="judge"), asked(judge="judge")] == [6, 6]
    save_judge(tmp_path / "judge", seed=2)
    assert asked(judge="judge") == 7, "by what it is, not by its name"
    assert [asked(), len(list((tmp_path / "cache" / "row_scores").glob("*.npz")))] == [7, 7]


def test_a_damaged_file_is_made_anew(tmp_path):
    values = {"a": np.arange(3.0)}
    assert kept("key", lambda: values)["a"].tolist() == [0, 1, 2]
    path = tmp_path / "cache" / "row_scores" / "key.npz"
    path.write_bytes(path.read_bytes()[:20])
    assert kept("key", lambda: {"a": np.ones(2)})["a"].tolist() == [1, 1]


# Filters


def test_which_rows_leave():
    """Of 10 numbers 0.3 are 3; NaN stays and does not count; of equal ones the last leaves."""
    scores = np.array([0.5, -1, 2, 2, np.nan, 0.1, 0, 3, -2, 1, 2])
    every = np.ones(11, dtype=bool)
    assert np.flatnonzero(Ches(share=0.3).leaving(scores, every)).tolist() == [3, 7, 10]
    assert (~keep_mask(scores, 0.7) & np.isfinite(scores)).tolist() == Ches(share=0.3).leaving(scores, every).tolist()
    some = every.copy()
    some[7] = False
    assert np.flatnonzero(Ches(share=0.3).leaving(scores, some)).tolist() == [2, 3, 10], "0.3 · 9 is 2.7"
    assert np.flatnonzero(LabelNoise(share=1).leaving(scores, every)).tolist() == [0, 2, 3, 5, 7, 9, 10], "above 0"
    assert np.flatnonzero(LabelNoise(share=1, margin=1).leaving(scores, every)).tolist() == [2, 3, 7, 10]
    assert np.flatnonzero(LabelNoise(share=0.1, margin=1).leaving(scores, every)).tolist() == [7]
    assert not Ches().leaving(np.full(3, np.nan), np.ones(3, dtype=bool)).any()


@pytest.mark.slow
@pytest.mark.parametrize("share", ["0", "0.2"])
def test_a_run_and_a_cleaned_dataset_lack_the_same_rows(tmp_path, share):
    """Whatever is held out stays in both; the manifest has the number, the report the reason."""
    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    write_rows(tmp_path / "pairs.jsonl", [*rows, rows[0], rows[7]])
    words = [f"--eval_share={share}", "--filter=[{name: ches, share: 0.2}, label_noise, exact_duplicates]"]
    report = run(*words)
    recipe = [*words, "--model_name_or_path=model", "--dataset_name=pairs.jsonl"]
    assert check(["check", *recipe, "--no_near", "--write=clean", "--drop=exact_duplicates"]) == 0
    manifest = json.loads(Path("clean/manifest.json").read_text())
    (file,) = manifest["files"]
    found = {int(each["row"].rpartition(" ")[2]): each["why"] for each in file["left"]}
    assert found == left_in(report)
    train_rows = report["rows"]["train"] + sum("exact" not in why for why in found.values())
    assert sum("ches" in why for why in found.values()) == round(0.2 * train_rows)
    assert all(np.isfinite(each["score"]) for each in file["left"] if "exact" not in each["why"])
    assert [each["name"] for each in manifest["filters"]] == [
        *("exact_duplicates", "exact_duplicates", "ches", "label_noise")
    ]
    kept_rows = [json.loads(line) for line in Path("clean/train.jsonl").read_text().splitlines()]
    assert kept_rows == [row for i, row in enumerate([*rows, rows[0], rows[7]]) if i not in found]
    assert report["rows"] == {
        "read": 42,
        "kept": 42 - len(found),
        "train": train_rows - len(found) + 2,
        "eval": report["rows"]["eval"],
    }
    assert report["dropped_share"] == pytest.approx(len(found) / 42)
    assert (report["rows"]["eval"] > 0) == (share != "0")


@pytest.mark.slow
def test_a_resumed_run_scores_by_the_weights_it_began_with(tmp_path):
    """Without its cache it computes the numbers again; from the trained policy they would be others."""
    words = ("--eval_share=0", "--filter={name: ches, share: 0.3}", "--learning_rate=0.03")
    first = left_in(run(*words, "--save_strategy=steps", "--save_steps=2", "--max_steps=2"))
    (tmp_path / "cache" / "row_scores").rename(tmp_path / "gone")
    on = ("--max_steps=4", "--resume_from_checkpoint=last", "--allow_recipe_change")
    again = left_in(run(*words, "--save_strategy=steps", "--save_steps=2", *on))
    assert again == first
    assert len(first) == 12
    moved = recipe_for(tmp_path, "run", Path("pairs.jsonl"))
    config, tokenizer, found = prepare_recipe(moved)
    now = columns(
        found.train, Policy(section=moved.model, adapter=None, config=config, tokenizer=tokenizer), None, quiet
    )
    leaves = Ches(share=0.3).leaving(now["ln_ches"], np.ones(40, dtype=bool))
    assert set(np.flatnonzero(leaves).tolist()) != set(first)


@pytest.mark.slow
def test_what_a_filter_has_no_numbers_for_is_refused(tmp_path, capsys):
    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    labelled = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2} for i, row in enumerate(rows)]
    write_rows(tmp_path / "labels.jsonl", labelled)
    told = refused(capsys, "--objective=kto", "--dataset_name=labels.jsonl", "--filter=ches")
    assert "filter ches compares chosen with rejected, and the objective's rows have completion" in told
    told = refused(capsys, "--objective=bradley_terry", "--filter=ches")
    assert "asks the initial policy, and the objective trains a reward model" in told
    assert "reward_model" not in told
    assert "or name a reward model" in refused(capsys, "--objective=bradley_terry", "--filter=label_noise")
    told = refused(capsys, "--objective=dpo", "--filter=ches", "--max_rows=1", "--eval_share=0")
    assert "filter (ches) leaves none of 1 training rows" in told
    told = refused(capsys, "--objective=dpo", "--filter={name: ches, share: 0.6}")
    assert "of 40 rows can't be used" in told, "data.max_dropped_share counts them"
    assert "share must be in (0, 1)" in refused(capsys, "--objective=dpo", "--filter={name: ches, share: 1}")
    assert not Path("run").exists()


def test_reward_models_that_read_other_tokens_are_refused(tmp_path, capsys):
    judge = save_judge(tmp_path / "judge")
    words = ("--objective=dpo", "--filter={name: label_noise, reward_model: judge}")
    AutoTokenizer.from_pretrained(POLICY).save_pretrained(judge)
    assert "reward model 'judge' has another tokenizer" in refused(capsys, *words)
    AutoModelForSequenceClassification.from_pretrained("model", num_labels=2).save_pretrained(judge)
    assert "has the outputs LABEL_0, LABEL_1; name one with a single output" in refused(capsys, *words)
    assert "has no scalar head" in refused(capsys, "--objective=dpo", f"{words[1][:-6]}model}}")


def test_options_of_the_check_that_have_no_effect_are_refused(tmp_path, capsys):
    assert check(["check", "--dataset_name=pairs.jsonl", "--with_model"]) == 2
    assert "need --model_name_or_path" in capsys.readouterr().err
    words = ("check", "--dataset_name=pairs.jsonl", "--model_name_or_path=model", "--no_near", "--write=clean")
    assert check([*words, "--drop=ches"]) == 2
    assert "--drop ches needs the model's numbers; add --with_model" in capsys.readouterr().err
    write_rows(tmp_path / "gold.jsonl", [{"prompt": f"p{i}", "completion": f" c{i}"} for i in range(4)])
    assert check(["check", "--dataset_name=gold.jsonl", *words[2:4], "--with_model"]) == 2
    assert "models are asked about pairs, and the rows have gold" in capsys.readouterr().err


@pytest.mark.slow
def test_a_part_of_a_row_can_not_leave_a_cleaned_dataset(tmp_path, capsys):
    """Three responses make three pairs, of which one is the most alike."""
    rows = [
        {"prompt": f"{i}:", "responses": [{"text": f" {'so ' * j}{i}", "score": j} for j in range(3)]} for i in range(4)
    ]
    write_rows(tmp_path / "lists.jsonl", rows)
    words = ("--dataset_name=lists.jsonl", "--rule=margin", "--margin=0.5", "--eval_share=0")
    report = run(*words, "--filter=ches")
    assert report["rows"]["train"] == 11
    (row,) = report["dropped_rows"]
    given = ("check", *words, "--model_name_or_path=model", "--no_near", "--with_model", "--write=clean", "--drop=ches")
    assert check(list(given)) == 2
    told = capsys.readouterr().err
    assert f"lists.jsonl, row {row['index']} gives 3 training rows, of which 1 leave" in told
    assert not Path("clean").exists()


# Findings


def simulated(noise: float, scale: float, seed: int = 0, number: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Margins of a reward model whose differences are ``scale`` times too large, and which labels were flipped."""
    rng = np.random.default_rng(seed)
    gap = rng.normal(0, 3, number)
    right = np.where(rng.random(number) < 1 / (1 + np.exp(-gap)), gap, -gap)  # labels follow σ(gap)
    flipped = rng.random(number) < noise
    return np.where(flipped, -right, right) * scale, flipped


def split_of(number: int) -> Split:
    """Rows of one token each, two to a prompt."""
    tokens = Ragged.of([[3]] * number)
    return Split(
        table=TokenTable(tokens, {"chosen": tokens, "rejected": tokens}),
        where=[("a", i) for i in range(number)],
        prompts=np.arange(number) // 2,
    )


def test_expected_disagreement_is_what_a_calibrated_model_has():
    """Without noise it is what is seen, though the model is twice too sure; with a tenth flipped there is far more."""
    for noise in (0.0, 0.1):
        margin, flipped = simulated(noise, 2.0)
        (found,) = of_reward_model(split_of(len(margin)), {"reward_margin": -margin}, "rm")
        tau = cross_fitted(margin, np.arange(len(margin)) // 2)
        assert found.value == pytest.approx((margin < 0).mean())
        assert found.low < found.value < found.high
        sure = np.abs(margin) / tau > np.log(SURE / (1 - SURE))
        assert found.rows == (sure & (margin < 0)).sum()
        expected = (1 / (1 + np.exp(np.abs(margin) / tau)))[sure].sum()
        if noise == 0:
            assert np.median(tau) == pytest.approx(2.0, rel=0.1)
            assert abs(found.rows - expected) < 3 * np.sqrt(expected)
        else:
            assert found.rows > expected + 3 * np.sqrt(expected)
            assert flipped[[int(each.rpartition(" ")[2]) for each in found.examples]].all()


def test_temperatures_do_not_see_their_own_pair():
    margin, _ = simulated(0.05, 1.5, number=60)
    prompts = np.arange(60) // 3
    tau = cross_fitted(margin, prompts)
    for fold in range(5):
        others = margin[prompts % 5 != fold]
        best = minimize_scalar(lambda t, d=others: np.logaddexp(0, -d / t).mean(), bounds=(0.05, 50), method="bounded")
        np.testing.assert_allclose(tau[prompts % 5 == fold], best.x, rtol=1e-3)  # type: ignore[attr-defined]
    assert len(set(tau.tolist())) == 5


def test_a_reward_model_that_knows_nothing_is_told_apart_from_noise():
    margin, _ = simulated(0.0, 1.0)
    (found,) = of_reward_model(split_of(len(margin)), {"reward_margin": margin}, "rm")
    assert (found.verdict, found.rows, found.key) == ("remark", 0, "another reward model")
    assert "no better than chance" in found.text


def test_findings_by_hand():
    """Of four pairs c = −2, 0 (a tie), 6, 3: wrong are 2.5. Margins of 0.6 and 0.5 are above and at the limit."""
    c, margin = np.array([-2.0, 0.0, 6.0, 3.0]), np.array([-0.1, 0.0, 0.6, 0.5])
    columns_ = {"difficulty": c, "ln_ches": np.array([-1.0, -3.0, -2.0, np.nan]), "reference_margin": margin}
    hard, alike, noise = of_policy(split_of(4), columns_, 0.5)
    assert (hard.value, hard.rows, hard.n) == (0.625, 2, 4)
    assert hard.examples[0] == "a, row 2"
    assert "once its loss is below 0.049" in hard.text, "log(1 + e^(−0.5·6))"
    assert (alike.rows, alike.n, alike.examples) == (1, 3, ("a, row 0",))
    assert "1 pairs have no finite number" in alike.text
    assert (noise.rows, noise.value, noise.examples, noise.verdict) == (1, 0.25, ("a, row 2",), "warning")


@pytest.mark.slow
def test_the_check_writes_what_models_found(tmp_path, capsys):
    save_judge(tmp_path / "judge")
    words = ("check", "--dataset_name=pairs.jsonl", "--model_name_or_path=model", "--no_near", "--output=doctor.json")
    assert check([*words, "--with_model", "--reward_model=judge"]) == 0
    found = Diagnosis.read(tmp_path / "doctor.json")
    own = {each.check: each for each in found.findings}
    assert {"difficulty", "ches", "label_noise", "label_noise_reward_model"} <= own.keys()
    assert own["ches"].n == 40, "a dataset alone is scored whole"
    for name in ("difficulty", "reference_margin", "ches", "ln_ches", "reward_margin"):
        assert sum(found.distributions[name]["counts"]) == 40
    assert "filter: {name: ches, share: 0.05}" in capsys.readouterr().out


# A reward model that is right


@pytest.mark.all
def test_a_reward_model_finds_labels_that_were_turned_round(tmp_path):
    """Trained on other problems of the same world; one label in eight is turned round."""
    asked = problems("train", 200)
    rows = scored(asked, candidates(asked, 6)).rows
    write_rows(tmp_path / "scored.jsonl", rows[:100])
    given = ("--rows_per_step=16", "--save_strategy=no", "--learning_rate=1e-3", "--eval_share=0")
    own = (f"--model_name_or_path={POLICY}", "--dataset_name=scored.jsonl", "--output_dir=judge", "--max_steps=80")
    assert train([*own, *given, "--objective=bradley_terry"]) == 0
    pairs = []
    for row in rows[100:]:
        best, worst = (choose(row["responses"], key=lambda each: each["score"])["text"] for choose in (max, min))
        if best != worst:
            pairs.append({"prompt": row["prompt"], "chosen": best, "rejected": worst})
    turned = set(range(0, len(pairs), 8))
    for i in turned:
        pairs[i] |= {"chosen": pairs[i]["rejected"], "rejected": pairs[i]["chosen"]}
    write_rows(tmp_path / "pairs.jsonl", pairs)
    words = (f"--model_name_or_path={POLICY}", "--eval_share=0")
    report = run(*words, "--filter={name: label_noise, reward_model: judge, share: 0.125}")
    gone = set(left_in(report))
    assert len(gone) <= len(turned)
    assert len(gone & turned) >= 0.6 * len(turned), "by chance it would be an eighth of them"
    status = check(
        shlex.split(f"check --dataset_name=pairs.jsonl {words[0]} --reward_model=judge --output=doctor.json")
    )
    assert status in (0, 1)
    (found,) = [each for each in Diagnosis.read(tmp_path / "doctor.json").findings if each.check.endswith("model")]
    assert found.value >= 0.9 * len(turned) / len(pairs)


@pytest.mark.all
def test_two_processes_train_on_the_rows_of_one(tmp_path):
    """Both score before there is a process group: whichever comes second reads what the first one found."""
    reports = []
    for number, config in ((1, "single"), (2, "cpu_ddp")):
        given = (
            *("--model_name_or_path=model", "--dataset_name=pairs.jsonl", f"--output_dir=run{number}", "--max_steps=2"),
            *("--objective=dpo", "--rows_per_step=8", "--save_strategy=no", "--filter=[{name: ches, share: 0.3}]"),
        )
        start = ("-m", "accelerate.commands.launch", f"--config_file={REPOSITORY}/launch/accelerate/{config}.yaml")
        done = subprocess.run(
            [sys.executable, *start, f"--num_processes={number}", str(REPOSITORY / "align" / "train.py"), *given],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "ALIGN_CACHE": str(tmp_path / f"cache{number}")},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"on each of {number} processes" in done.stdout
        report = json.loads((tmp_path / f"run{number}" / "data_report.json").read_text())
        metrics = [json.loads(line) for line in (tmp_path / f"run{number}" / "metrics.jsonl").read_text().splitlines()]
        reports.append((report, [line["loss"] for line in metrics if "loss" in line]))
        assert len(list((tmp_path / f"cache{number}" / "row_scores").glob("*.npz"))) == 1
    (one, losses_of_one), (two, losses_of_two) = reports
    assert one == two
    np.testing.assert_allclose(losses_of_one, losses_of_two, rtol=2e-4)
