"""Reward models, through the same trainer and path as everything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from align.forward import bind
from align.train import main
from data.pack import pack
from data.store import Ragged, TokenTable
from data.worlds import POLICY, candidates, problems, scored
from tests.equivalence.runs import write_rows
from tests.equivalence.worlds import save_model, save_pairs

pytestmark = pytest.mark.usefixtures("plain_runs")

FP32_REORDERED = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums in another order, through four layers


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    asked = problems("train", 48)
    return write_rows(tmp_path_factory.mktemp("rows") / "scored.jsonl", scored(asked, candidates(asked, 6)).rows)


def train(rows: Path, run: Path, *words: str) -> list[dict[str, Any]]:
    """Runs a recipe; its logged lines."""
    given = [
        *(f"--model_name_or_path={POLICY}", f"--dataset_name={rows}", f"--output_dir={run}", "--logging_steps=1"),
        *("--max_steps=4", "--rows_per_step=8", "--save_strategy=no", "--learning_rate=1e-3", "--token_budget=256"),
    ]
    keys = {word.split("=")[0] for word in words}
    assert main([*(word for word in given if word.split("=")[0] not in keys), *words]) == 0
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_reward_model_learns_what_transformers_computes(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Pairs become ranked, and the saved model scores as the trained one did: plain text plus the end token."""
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    lines = train(rows, tmp_path / "run", "--objective.name=bradley_terry", "--max_steps=30", "--eval_share=0")
    first, last = ([line["rewards/accuracies"] for line in lines if "loss" in line][part] for part in (0, -1))
    assert last > max(first, 0.8)

    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert (saved.config.id2label, saved.config.num_labels) == ({0: "reward"}, 1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    table = _table(["3 and 4 is", "What is 12 - 5?", "9"], tokenizer)
    assert tokenizer.pad_token_id == saved.config.pad_token_id != tokenizer.eos_token_id
    texts = [table.prompts[i].tolist() + table.legs[leg][i].tolist() for leg in table.legs for i in range(len(table))]
    width = max(map(len, texts))
    ids = torch.tensor([text + [tokenizer.pad_token_id] * (width - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
    bind(saved)
    with torch.no_grad():
        expected = saved(input_ids=ids, attention_mask=mask).logits
        for share, kind in ((True, "bucket"), (True, "pack"), (False, "bucket")):
            batch = pack(table, range(len(table)), share=share, kind=kind, counts={})
            assert_close(saved(packed=batch)["values"], expected, **FP32_REORDERED)


def _table(prompts: list[str], tokenizer: Any) -> TokenTable:
    """Each prompt with two responses of different lengths, the end token on each."""

    def ids(texts: list[str]) -> Ragged:
        return Ragged.of([[*tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts])

    ends = tokenizer.eos_token
    first, second = ([f" {word * (i + 1)}{ends}" for i in range(len(prompts))] for word in ("12", "7 and 8 "))
    return TokenTable(ids(prompts), {"chosen": ids(first), "rejected": ids(second)})


@pytest.mark.slow
def test_an_adapter_trains_its_head_in_full(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    lines = train(rows, tmp_path / "run", "--objective.name=bradley_terry", "--lora.r=4", "--max_steps=20")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    from peft import AutoPeftModelForSequenceClassification

    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "run", num_labels=1)
    assert not torch.equal(
        loaded.base_model.model.score.modules_to_save["default"].weight,
        loaded.base_model.model.score.original_module.weight,
    )


@pytest.mark.slow
def test_regression_first_then_scaled_preferences(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """HelpSteer2's recipe: the second run goes on from the first one's head, and says so."""
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    lines = train(rows, tmp_path / "first", "--objective.name=reward_regression", "--max_steps=20")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] / 2
    train(
        *(rows, tmp_path / "second", f"--model_name_or_path={tmp_path / 'first'}"),
        *("--objective.name=scaled_bt", "--attribute=score"),
    )
    head = AutoModelForSequenceClassification.from_pretrained(tmp_path / "second")
    assert head.config.id2label == {0: "score"}


@pytest.mark.slow
def test_the_end_token_does_not_pad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where it did, transformers would read the reward one token too early."""
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    rows = save_pairs(tmp_path / "pairs.jsonl", number=16)
    model = save_model(tmp_path / "model")  # whose pad token is its end token
    train(rows, tmp_path / "run", f"--model_name_or_path={model}", "--objective.name=bradley_terry")
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert saved.config.pad_token_id is None
    with pytest.raises(ValueError, match="no padding token is defined"):
        saved(input_ids=torch.ones(2, 4, dtype=torch.long))


@pytest.mark.slow
def test_ratings_that_are_missing_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    rated = [
        {"prompt": f"Say {i}.", "completion": f" {i}", "helpfulness": i % 5, "brevity": None if i % 2 else 1.0}
        for i in range(24)
    ]
    unrated = {"prompt": "Say no.", "completion": " no", "helpfulness": None, "brevity": None}
    rows = write_rows(tmp_path / "rows.jsonl", [*rated, unrated])
    train(
        *(rows, tmp_path / "run", "--eval_share=0"),
        "--objective={name: reward_regression, attributes: [helpfulness, brevity]}",
    )
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert report["dropped"] == {"no score of any attribute": 1}
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["id2label"] == {"0": "helpfulness", "1": "brevity"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--objective=[{name: bradley_terry}, {name: dpo}]"], "bradley_terry trains a scalar head and dpo a language"),
        (["--objective={name: reward_regression, attributes: [wit]}"], "no row has a score of it"),
        (["--objective.name=bradley_terry", "--modifiers=wpo"], "wpo has nothing to act on"),
        (["--objective.name=bradley_terry", "--token_weights=talr"], "talr weighs likelihood terms"),
        (["--objective.name=bradley_terry", "--reference.source=live"], "needs no reference model"),
    ],
)
def test_what_makes_no_sense_is_refused(
    words: list[str],
    sentence: str,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    given = [f"--model_name_or_path={POLICY}", f"--dataset_name={rows}", f"--output_dir={tmp_path / 'run'}"]
    assert main([*given, *words]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_a_reward_model_is_no_policy(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    train(rows, tmp_path / "rm", "--objective.name=bradley_terry", "--max_steps=1")
    given = [f"--model_name_or_path={tmp_path / 'rm'}", f"--dataset_name={rows}", f"--output_dir={tmp_path / 'run'}"]
    assert main([*given, "--objective.name=dpo"]) == 2
    assert "is a reward model, and the objective trains a language model" in capsys.readouterr().err
    assert main([*given, "--objective.name=bradley_terry", "--attribute=wit"]) == 2
    assert "is a reward model with outputs reward, and the objective trains 'wit'" in capsys.readouterr().err
