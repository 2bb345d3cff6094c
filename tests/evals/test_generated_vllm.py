"""win_rate and pass_at_k from a real vLLM: one engine draws for both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from align import samples as stored
from data.worlds import POLICY, answer_of, gold_score, problem_of
from evals.results import Results
from tests.evals.evaluated import PROMPTS, answers, write_prompts
from tests.support import REPOSITORY, VLLM_ENVIRONMENT


@pytest.mark.all
def test_answers_of_vllm_are_judged_and_verified(tmp_path: Path):
    pytest.importorskip("vllm", reason="vLLM is not installed: make setup installs it")
    prompts = {"dataset_name": str(write_prompts(tmp_path / "prompts.jsonl"))}
    recipe = {
        "model": {"model_name_or_path": str(POLICY), "name": "policy"},
        "reference": {"model": "none"},
        "serving": {"engine": "vllm", "max_model_len": 256},
        "evals": [
            {
                "name": "pass_at_k",
                "prompts": prompts,
                "verifier": "world_answer",
                "sampling": {"n": 4, "max_tokens": 40},
                "strategies": ["best_of_n"],
                "scorers": "gold",
            },
            {
                "name": "win_rate",
                "prompts": prompts,
                "baseline": {"column": "output"},
                "judge": "gold",
                "sampling": {"max_tokens": 40},
            },
        ],
        "out": {"output_dir": str(tmp_path / "out"), "seed": 2},
    }
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(recipe))
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "evals", "run", "--config", str(tmp_path / "eval.yaml")],
        env={**os.environ, **VLLM_ENVIRONMENT, "PYTHONPATH": path, "ALIGN_CACHE": str(tmp_path / "cache")},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = {each.metric: each for each in Results.read(tmp_path / "out" / "results.json").results}
    drawn = [group for path in (tmp_path / "out" / "samples").glob("*.jsonl") for group in stored.read(path)]
    assert {sample.origin.engine.split()[0] for group in drawn for sample in group.samples} == {"vllm"}
    assert {sample.origin.sampling["seed"] for group in drawn for sample in group.samples} == {2}
    lines = answers(tmp_path / "out", "policy")
    tried = [each for each in lines if each.split == "all, pass_at_k"]
    right = [each.scores["right"] for each in tried]
    asked = [problem_of(each.prompt[0]["content"]) for each in tried]
    assert len(tried) == 4 * PROMPTS
    assert [float(answer_of(each.text) == p.answer) for each, p in zip(tried, asked, strict=True)] == right
    assert found["pass_at_k/any@1"].value == pytest.approx(sum(right) / len(right))
    assert found["pass_at_k/best_of_n@4"].value == pytest.approx(found["pass_at_k/any@4"].value)
    outputs = [json.loads(line)["output"] for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    mine = [each for each in lines if each.split == "all, win_rate"]
    pairs = [
        [gold_score(problem_of(each.prompt[0]["content"]), text) for text in (each.text, output)]
        for each, output in zip(mine, outputs, strict=True)
    ]
    assert found["win_rate/raw"].value == pytest.approx(sum((a > b) + 0.5 * (a == b) for a, b in pairs) / PROMPTS)
    assert found["win_rate/raw"].extra["engine"].startswith("vllm")
