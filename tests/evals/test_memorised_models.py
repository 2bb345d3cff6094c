"""Memorisation of real models: a policy that was made to know some documents by heart, and its reference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.errors import RecipeError, RunError
from data.store import Ragged
from evals.__main__ import main as evals
from evals.documents import overlapping
from evals.generations_file import read_generations
from evals.results import Result, Results
from evals.run import run
from evals.run_settings import Job, read_job
from evals.scores import read_scores
from tests.equivalence.runs import write_rows
from tests.equivalence.worlds import save_model
from tests.support import REPOSITORY, VLLM_ENVIRONMENT

SUFFIX = 12


def texts(number: int, seed: int, length: int = 40) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("abcdefgh "), length)) for _ in range(number)]


def learn_by_heart(source: Path, into: Path, documents: list[str]) -> None:
    """Full-batch AdamW until the loss is all but gone."""
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source)
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in documents])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(250):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six documents that the policy knows by heart, six that it never saw, one of which is half a trained one."""
    folder = tmp_path_factory.mktemp("memorised")
    save_model(folder / "reference", hidden_size=64, intermediate_size=128)
    known, unknown = texts(6, 0), texts(6, 1)
    learn_by_heart(folder / "reference", folder / "policy", known)
    write_rows(folder / "known.jsonl", [{"text": text} for text in [*known, "short"]])
    stolen = unknown[0][:10] + known[2][5:35]
    write_rows(folder / "unknown.jsonl", [{"text": text} for text in [*unknown, stolen, "tiny", "brief"]])
    return folder


def settings(world: Path, out: Path, **keys: Any) -> Path:
    about = {
        "model": {"model_name_or_path": str(world / "policy")},
        "reference": {"model": str(world / "reference")},
        "serving": {"engine": "transformers"},
        "out": {"output_dir": str(out)},
        "evals": [
            {
                "name": "memorisation",
                "documents": {"dataset_name": str(world / "known.jsonl")},
                "control": {"dataset_name": str(world / "unknown.jsonl")},
                "suffix_tokens": SUFFIX,
                "overlap_tokens": 20,
                **keys,
            }
        ],
    }
    path = out.parent / f"{out.name}.yaml"
    path.write_text(json.dumps(about))  # JSON is YAML
    return path


@pytest.fixture(scope="module")
def measured(world: Path) -> Path:
    run(read_job(str(settings(world, world / "out")), []), say=lambda line: None)
    return world / "out"


def found(out: Path) -> dict[tuple[str, str], Result]:
    return {(each.metric, each.split): each for each in Results.read(out / "results.json").results}


@pytest.mark.slow
def test_what_was_learned_by_heart_is_written_and_what_was_not_is_not(world: Path, measured: Path):
    """Against greedy decoding one document at a time, token by token, without a cache."""
    tokenizer = AutoTokenizer.from_pretrained(world / "policy")
    model = AutoModelForCausalLM.from_pretrained(world / "policy").eval()

    def recited(text: str) -> tuple[bool, int]:
        ids = tokenizer(text)["input_ids"]
        given, withheld = ids[:-SUFFIX], ids[-SUFFIX:]
        written: list[int] = []
        while len(written) < SUFFIX and tokenizer.eos_token_id not in written:
            with torch.no_grad():
                written.append(int(model(torch.tensor([[*given, *written]])).logits[0, -1].argmax()))
        first = next((i for i, (a, b) in enumerate(zip(written, withheld, strict=False)) if a != b), len(written))
        return written == withheld, first

    results = found(measured)
    for split, documents in (("all", texts(6, 0)), ("all (control)", texts(6, 1))):
        by_hand = [recited(text) for text in documents]
        assert results["extraction/exact", split].value == pytest.approx(np.mean([exact for exact, _ in by_hand]))
        assert results["extraction/longest_prefix", split].value == pytest.approx(np.mean([n for _, n in by_hand]))
        assert results["extraction/exact", split].n == 6
    assert results["extraction/exact", "all"].value >= 5 / 6
    assert results["extraction/exact", "all (control)"].value == 0
    over = results["extraction/token_accuracy_over_control", "all"]
    assert over.low is not None
    assert over.low > 0.3
    lines = list(read_generations(measured))
    assert len(lines) == 12
    assert {each.scores["extraction/exact"] for each in lines if each.dataset.endswith("unknown.jsonl")} == {0.0}


@pytest.mark.all
def test_vllm_continues_documents_likewise(world: Path, measured: Path):
    """What was learned by heart leaves no near ties: every number of extraction is the same."""
    pytest.importorskip("vllm", reason="vLLM is not installed: make setup installs it")
    path = settings(world, world / "vllm")
    path.write_text(json.dumps({**json.loads(path.read_text()), "serving": {"engine": "vllm", "max_model_len": 64}}))
    done = subprocess.run(
        [sys.executable, "-m", "evals", "run", "--config", str(path)],
        env={**os.environ, **VLLM_ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    one, two = (
        {k: v for k, v in found(out).items() if k[0].startswith("extraction/")} for out in (measured, world / "vllm")
    )
    assert {each.extra["engine"].split()[0] for each in two.values()} == {"vllm"}
    assert {k: (v.value, v.low, v.high, v.n) for k, v in one.items()} == {
        k: (v.value, v.low, v.high, v.n) for k, v in two.items()
    }
    assert one["extraction/exact", "all"].value >= 5 / 6


@pytest.mark.slow
def test_losses_tell_what_was_trained_on(world: Path, measured: Path):
    """AUC by scikit-learn, of mean losses from the models' own forward."""
    tokenizer = AutoTokenizer.from_pretrained(world / "policy")
    losses: dict[str, list[float]] = {}
    lowest: list[float] = []
    for who in ("policy", "reference"):
        model = AutoModelForCausalLM.from_pretrained(world / who).eval()
        for text in [*texts(6, 0), *texts(6, 1)]:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            with torch.no_grad():
                logps = model(ids).logits[0, :-1].double().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            losses.setdefault(who, []).append(-float(logps.mean()))
            if who == "policy":
                lowest.append(float(logps.sort().values[: -(-len(logps) // 5)].mean()))
    member = [1] * 6 + [0] * 6
    policy, reference = np.array(losses["policy"]), np.array(losses["reference"])
    results = found(measured)
    for name, score in (("loss", -policy), ("reference", reference - policy), ("reference_alone", -reference)):
        assert results[f"membership/auc_{name}", "all"].value == pytest.approx(roc_auc_score(member, score))
    assert results["membership/auc_min_k", "all"].value == pytest.approx(roc_auc_score(member, lowest))
    assert results["membership/auc_loss", "all"].value == 1
    assert results["membership/tpr_at_1_loss", "all"].value == 1
    assert results["membership/auc_loss", "all"].extra["smallest_fpr"] == pytest.approx(1 / 6)


def test_what_was_left_out_is_counted(measured: Path):
    extra = found(measured)["extraction/exact", "all"].extra
    assert extra["documents"] == {"of": 7, "too_short": 1, "unusable": 0}
    assert {key: extra["control"][key] for key in ("of", "too_short", "also_trained_on")} == {
        "of": 9,
        "too_short": 2,
        "also_trained_on": 1,
    }
    assert "1 control documents are in the training documents too" in extra["warnings"][0]
    assert extra["sampling"] == {"temperature": 0.0, "max_tokens": SUFFIX}
    scores = read_scores(measured)
    assert {len(each.by_prompt) for each in scores.values()} == {6}


@pytest.mark.slow
def test_a_prefix_of_its_own_and_rows_with_prompts(world: Path):
    """Of rows, what is withheld lies within the response; the same text as prompt and response is the same document."""
    rows = [{"prompt": text[:6], "completion": text[6:]} for text in texts(6, 0)]
    write_rows(world / "rows.jsonl", [*rows, {"prompt": "a" * 30, "completion": " bc"}])
    keys = {"documents": {"dataset_name": str(world / "rows.jsonl")}, "prefix_tokens": 20, "max_documents": 4}
    run(read_job(str(settings(world, world / "rows", **keys)), []), say=lambda line: None)
    exact = found(world / "rows")["extraction/exact", "all"]
    assert (exact.n, exact.value) == (4, 1.0)
    assert exact.extra["documents"] == {"of": 7, "too_short": 1, "unusable": 0}


def job(world: Path, **keys: Any) -> Job:
    return read_job(str(settings(world, world / "bad", **keys)), [])


def test_without_a_control_nothing_is_measured(world: Path):
    with pytest.raises(RecipeError, match="memorisation needs control"):
        job(world, control=None)
    with pytest.raises(RecipeError, match="name documents that were never trained on"):
        job(world, control={"dataset_name": str(world / "known.jsonl")})
    with pytest.raises(RecipeError, match="max_length must be >= 32"):
        job(world, max_length=31, prefix_tokens=20)
    same = write_rows(world / "same.jsonl", [{"text": text} for text in texts(6, 0)])
    with pytest.raises(RunError, match=r"0 of 6 documents of .*0 are too short, 6 are in the training documents too"):
        run(job(world, control={"dataset_name": str(same)}), say=lambda line: None)


def test_the_command_says_what_is_wrong_in_one_line(world: Path, capsys: pytest.CaptureFixture[str]):
    path = settings(world, world / "long", suffix_tokens=200)
    assert evals(["run", "--config", str(path)]) == 2
    said = capsys.readouterr()
    assert "0 of 7 documents" in said.out + said.err
    assert "7 are too short; lower suffix_tokens" in said.out + said.err


def test_overlap_is_what_brute_force_finds():
    rng = np.random.default_rng(0)
    trained = [rng.integers(0, 3, rng.integers(1, 30)).tolist() for _ in range(40)]
    control = [rng.integers(0, 3, rng.integers(1, 20)) for _ in range(60)] + [np.array(trained[0])]
    for tokens in (3, 7, 9):

        def runs(ids: Any, tokens: int = tokens) -> set[tuple[int, ...]]:
            return {tuple(map(int, ids[i : i + tokens])) for i in range(len(ids) - tokens + 1)}

        seen = set().union(*(runs(ids) for ids in trained))
        whole = {tuple(ids) for ids in trained}
        wanted = [bool(runs(ids) & seen) if len(ids) >= tokens else tuple(ids.tolist()) in whole for ids in control]
        assert overlapping(control, Ragged.of(trained), tokens).tolist() == wanted
        assert 0 < sum(wanted) < len(wanted)
