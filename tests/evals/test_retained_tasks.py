"""Retention through lm-eval: a real model before and after training on local tasks, and how its files are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.errors import RecipeError, RunError
from data.worlds import POLICY
from evals import lm_eval_runs
from evals.evaluations.retention import Retention
from evals.lm_eval_runs import read_results
from evals.results import Results
from evals.run import run
from evals.run_settings import read_job
from evals.scores import read_scores
from tests.equivalence.runs import write_rows
from tests.equivalence.worlds import save_model
from tests.evals.evaluated import save_start
from tests.support import VLLM_ENVIRONMENT

STAMP = "2026-01-01T00-00-00.000000"


# ---- how its files are read ----


def written(folder: Path, **changes: Any) -> Path:
    """Files as lm-eval 0.4.13 writes them, of one task with two filters and a document that stands there twice."""
    where = folder / "model"
    where.mkdir(parents=True)
    body = {
        "results": {
            "quiz": {"alias": "quiz", "exact_match,strict": 0.5, "exact_match_stderr,strict": 0.1, "f1,none": 1}
        },
        "configs": {"quiz": {}, "all_quizzes": {}},
        "versions": {"quiz": 3},
        "n-shot": {"quiz": 2},
        "higher_is_better": {"quiz": {"exact_match": True}},
        "n-samples": {"quiz": {"original": 3, "effective": 3}},
        "task_hashes": {"quiz": "abc"},
        "chat_template_sha": None,
        **changes,
    }
    (where / f"results_{STAMP}.json").write_text(json.dumps(body))
    lines = [
        {"doc_hash": key, "filter": name, "exact_match": value}
        for key, value in (("a", 1.0), ("b", 0.0), ("a", 1.0))
        for name in ("strict", "flexible")
    ]
    write_rows(where / f"samples_quiz_{STAMP}.jsonl", lines)
    return folder


def test_samples_are_read_document_by_document(tmp_path: Path):
    quiz = read_results(written(tmp_path), {}, "0.4.13").tasks["quiz"]
    assert quiz.by_document == {"a": 1.0, "b": 0.0, "a-2": 1.0}
    assert (quiz.metric, quiz.aggregated, quiz.version, quiz.num_fewshot) == ("exact_match,strict", 0.5, 3, 2)


@pytest.mark.parametrize(
    ("changes", "metrics", "says"),
    [
        ({}, {"quiz": "bleu"}, "task quiz has no metric 'bleu'; it has exact_match,strict, f1,none"),
        ({}, {"quiz": "f1"}, "single documents have no score 'f1'"),
        ({"results": {"quiz": {"word_perplexity,none": 9.0}}}, {}, "none of the usual metrics"),
        ({"higher_is_better": {"quiz": {"exact_match": False}}}, {}, "better where it is lower"),
        ({"n-samples": {"other": {}}}, {}, "left no samples of other"),
    ],
)
def test_what_can_t_be_read(tmp_path: Path, changes: dict[str, Any], metrics: dict[str, str], says: str):
    with pytest.raises(RunError, match=says):
        read_results(written(tmp_path, **changes), metrics, "0.4.13")


def test_failures_are_one_sentence():
    def reason(log: str) -> str:
        return lm_eval_runs._reason(log, {"tasks": ["gsm8k"]})

    assert "it knows no task gsm9k; see" in reason("Traceback\nValueError: Tasks not found: gsm9k\n")
    offline = reason("ConnectionError: Couldn't reach 'openai/gsm8k' on the Hub (OfflineModeIsEnabled)")
    assert offline.startswith("the data 'openai/gsm8k' is not in the cache")
    assert reason("one\ntwo\nKeyError: 'x'\n") == "its log ends with: one | two | KeyError: 'x'"


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"tasks": []}, "tasks must be"),
        ({"tasks": ["a"], "target_tasks": ["b"]}, "target_tasks must be among tasks"),
        ({"tasks": ["a"], "target_tasks": ["a"]}, "target_tasks must be fewer"),
        ({"tasks": ["a", "b"], "target_tasks": ["a"], "target_metric": "x"}, "no effect beside target_tasks"),
        ({"tasks": ["a"], "target_before": 0.5}, "no effect without target_metric"),
        ({"tasks": ["a"], "lm_eval_args": {"limit": 3}}, "lm_eval_args.limit is set by"),
    ],
)
def test_settings_that_make_no_sense(keys: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        Retention(**{key: tuple(value) if isinstance(value, list) else value for key, value in keys.items()})


def test_a_missing_lm_eval_is_told_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> str:
        raise lm_eval_runs.importlib.metadata.PackageNotFoundError(name)

    save_model(tmp_path / "model")
    monkeypatch.setattr(lm_eval_runs.importlib.metadata, "version", missing)
    with pytest.raises(RecipeError, match="lm-eval is not installed; pip install"):
        read_job(str(settings(tmp_path, tmp_path / "model", reference={"model": str(tmp_path / "model")})), [])


def test_a_missing_vllm_is_told_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("lm_eval")
    save_model(tmp_path / "model")
    monkeypatch.setattr("align.vllm_sampler.installed", lambda: None)
    keys = {"name": "retention", "tasks": ["a"], "backend": "vllm"}
    about = settings(tmp_path, tmp_path / "model", reference={"model": str(tmp_path / "model")}, evals=[keys])
    with pytest.raises(RecipeError, match=r"vLLM is not installed; install it .*, or set backend to hf"):
        read_job(str(about), [])


def test_adapters_in_vllm_on_cpus_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Policy or reference, there or yet to be trained; on a GPU they go on."""
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("align.vllm_sampler.installed", lambda: "0.30.0")
    save_model(tmp_path / "model")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), LoraConfig(r=4)).save_pretrained(
        tmp_path / "adapter"
    )
    keys: dict[str, Any] = {"evals": [{"name": "retention", "tasks": ["a"], "backend": "vllm"}]}
    plain = {"reference": {"model": str(tmp_path / "model")}}
    read_job(str(settings(tmp_path, tmp_path / "model", **keys, **plain)), [])
    for model, more in (
        ("adapter", {"base": tmp_path / "model"}),
        ("model", {"reference": {"model": str(tmp_path / "adapter")}}),
        ("not_yet", {"base": tmp_path / "model", **plain}),
    ):
        path = settings(tmp_path, tmp_path / model, **keys, **more)
        with pytest.raises(RecipeError, match=r"vLLM on CPUs can't score choices under adapters; set backend to hf"):
            read_job(str(path), [])
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            read_job(str(path), [])


def test_an_adapter_goes_to_either_backend(tmp_path: Path):
    """The keys by which lm-eval takes it."""
    pytest.importorskip("lm_eval")
    save_model(tmp_path / "model")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), LoraConfig(r=4))
    model.save_pretrained(tmp_path / "adapter")
    job = read_job(str(settings(tmp_path, tmp_path / "adapter", base=tmp_path / "model")), [])
    hf, vllm = (
        Retention(tasks=("a",), backend=backend).settings(job, None, "policy")["model_args"]
        for backend in ("hf", "vllm")
    )
    assert (hf["pretrained"], hf["peft"]) == (str(tmp_path / "model"), str(tmp_path / "adapter"))
    assert (vllm["lora_local_path"], vllm["max_lora_rank"]) == (str(tmp_path / "adapter"), 8)
    assert "peft" not in Retention(tasks=("a",)).settings(job, None, "reference")["model_args"]


# ---- a real model ----


def settings(folder: Path, model: Path, *, base: Path | None = None, **more: Any) -> Path:
    about = {
        "model": {"model_name_or_path": str(model), **({} if base is None else {"base_model_name_or_path": str(base)})},
        "serving": {"engine": "transformers"},
        "out": {"output_dir": str(folder / "out")},
        "evals": [{"name": "retention", "tasks": ["local_choice", "local_words"]}],
        **more,
    }
    path = folder / "evals.yaml"
    path.write_text(json.dumps(about))
    return path


def local_tasks(folder: Path) -> list[dict[str, Any]]:
    """A multiple-choice task and one of generated words, and the rows of the first."""
    folder.mkdir()
    names, wishes = ("Lily", "Tom", "Ben", "Mia", "Sue"), ("play", "sing", "run", "eat", "see")
    rows = [
        {"question": f"Once upon a time, {name} wanted to", "choices": [wish, f"{wish[::-1]} the"], "label": 0}
        for name in names
        for wish in wishes
    ]
    write_rows(folder / "choice.jsonl", rows)
    write_rows(
        folder / "words.jsonl", [{"question": f"{n}, {m} and a", "answer": " little"} for n in names for m in names]
    )
    shared = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}"}
    (folder / "choice.yaml").write_text(
        json.dumps(
            {
                **shared,
                "task": "local_choice",
                "dataset_kwargs": {"data_files": {"test": str(folder / "choice.jsonl")}},
                "output_type": "multiple_choice",
                "doc_to_choice": "{{choices}}",
                "doc_to_target": "{{label}}",
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
                "metadata": {"version": 1.0},
            }
        )
    )
    (folder / "words.yaml").write_text(
        json.dumps(
            {
                **shared,
                "task": "local_words",
                "dataset_kwargs": {"data_files": {"test": str(folder / "words.jsonl")}},
                "output_type": "generate_until",
                "doc_to_target": "{{answer}}",
                "generation_kwargs": {"until": [".", ","], "max_gen_toks": 4, "do_sample": False},
                "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
                "metadata": {"version": 2},
            }
        )
    )
    return rows


@pytest.mark.all
def test_a_model_before_and_after(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An adapter that unlearns stories, against choices that are scored here by its own forward."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    source = shared / "models" / "stories260k"
    tokenizer = AutoTokenizer.from_pretrained(source)
    model: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(source), LoraConfig(r=8, lora_alpha=64, target_modules="all-linear")
    )
    rows = local_tasks(tmp_path / "tasks")
    ids = torch.tensor([tokenizer("the eht yalp gnis nur tae ees the " * 3)["input_ids"]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "adapter")

    def right(model: Any) -> list[bool]:
        def score(row: dict[str, Any], choice: str) -> float:
            given = len(tokenizer(row["question"])["input_ids"])
            whole = torch.tensor([tokenizer(f"{row['question']} {choice}")["input_ids"]])
            with torch.no_grad():
                logps = model(whole).logits[0, :-1].double().log_softmax(-1)
            return float(logps.gather(-1, whole[0, 1:, None])[given - 1 :].sum())

        return [score(row, row["choices"][0]) > score(row, row["choices"][1]) for row in rows]

    before = right(AutoModelForCausalLM.from_pretrained(source).eval())
    after = right(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), tmp_path / "adapter").eval())
    assert sum(after) < sum(before), "else there is nothing to see"
    evaluation = {
        "name": "retention",
        "tasks": ["local_choice", "local_words"],
        "include_path": str(tmp_path / "tasks"),
        "metrics": {"local_words": "exact_match"},
    }
    config = settings(tmp_path, tmp_path / "adapter", base=source, evals=[evaluation])
    run(read_job(str(config), []), say=print)
    results = {(each.metric, each.dataset): each for each in Results.read(tmp_path / "out" / "results.json").results}
    score = results["retention/score", "lm-eval/local_choice"]
    change = results["retention/score_change", "lm-eval/local_choice"]
    assert score.value == pytest.approx(np.mean(after))
    assert change.value == pytest.approx(np.mean(after) - np.mean(before))
    assert change.low is not None
    assert change.extra["better"] == sum(a and not b for a, b in zip(after, before, strict=True))
    assert change.extra["worse"] == sum(b and not a for a, b in zip(after, before, strict=True))
    assert (score.extra["version"], score.extra["num_fewshot"], score.n) == (1.0, 0, 25)
    whole = results["retention/general_change", "lm-eval"]
    words = results["retention/score_change", "lm-eval/local_words"]
    assert whole.value == pytest.approx((change.value + words.value) / 2)
    assert whole.extra["lm_eval"].startswith("0.4.")
    assert set(whole.extra["tasks"]) == {"local_choice", "local_words"}
    assert {len(each.by_prompt) for each in read_scores(tmp_path / "out").values()} == {25}

    unknown = settings(tmp_path, tmp_path / "adapter", base=source, evals=[{"name": "retention", "tasks": ["gsm9k"]}])
    with pytest.raises(RunError, match="lm-eval failed: it knows no task gsm9k"):
        run(read_job(str(unknown), []), say=print)


@pytest.mark.all
def test_vllm_scores_documents_as_transformers_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The shipped policy against itself with noise, on choices and on generated words, document by document."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("vllm", reason="vLLM is not installed: make setup installs it")
    for name, value in {**VLLM_ENVIRONMENT, "HF_DATASETS_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    local_tasks(tmp_path / "tasks")
    save_start(tmp_path / "noisy", noise=0.2)
    evaluation = {
        "name": "retention",
        "tasks": ["local_choice", "local_words"],
        "include_path": str(tmp_path / "tasks"),
        "metrics": {"local_words": "exact_match"},
    }
    by_backend = {}
    for backend, model_args in (("hf", {}), ("vllm", {"max_model_len": 128})):
        out = tmp_path / backend
        about = {
            "evals": [{**evaluation, "backend": backend, "model_args": model_args}],
            "out": {"output_dir": str(out)},
        }
        run(
            read_job(str(settings(tmp_path, tmp_path / "noisy", reference={"model": str(POLICY)}, **about)), []),
            say=print,
        )
        by_backend[backend] = read_scores(out), Results.read(out / "results.json").results
    (hf, results), (vllm, by_vllm) = by_backend.values()
    assert {key: each.by_prompt for key, each in hf.items()} == {key: each.by_prompt for key, each in vllm.items()}
    assert [(each.metric, each.value, each.low) for each in results] == [(r.metric, r.value, r.low) for r in by_vllm]
    changes = {each.value for each in results if each.metric == "retention/score_change"}
    assert changes != {0.0}, "noise does something"
    assert {each.extra["backend"] for each in by_vllm} == {"vllm"}
