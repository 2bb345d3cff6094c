"""Judges in a real vLLM server that is started for them, and stopped."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import yaml
from transformers import AutoTokenizer

from align.errors import RunError
from align.judges import Judge
from data.chat import FALLBACK_TEMPLATE
from data.worlds import POLICY
from evals.results import Results
from tests.align.sampled import chat
from tests.equivalence.worlds import save_model
from tests.evals.evaluated import PROMPTS, write_prompts
from tests.support import REPOSITORY

pytestmark = pytest.mark.slow
pytest.importorskip("vllm", reason="vLLM is not installed: make setup installs it")

CHOICE = {"structured_outputs": {"choice": ["[[A>B]]", "[[B>A]]"]}}
"""A model that knows nothing gives verdicts all the same."""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = save_model(tmp_path / "judge", hidden_size=64, intermediate_size=96, max_position_embeddings=8192)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = FALLBACK_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def serving(folder: Path) -> list[int]:
    """Processes that have to do with a model."""
    found = psutil.process_iter(["pid", "cmdline"])
    return [each.info["pid"] for each in found if any(str(folder) in word for word in each.info["cmdline"] or ())]


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_a_judge_in_a_server_of_its_own(model: Path):
    groups = [chat("2 + 2?", ["4", "5", "4"]), chat("3 + 3?", ["6", "seven"])]
    with closing(Judge(model=str(model), engine="vllm", max_tokens=12, extra_body=CHOICE)) as judge:
        found = judge(groups)
        assert serving(model)
        # Of this process's children, which other tests may have left some of.
        (tether,) = [each for each in psutil.Process().children() if "tethered" in " ".join(_words(each))]
        engines = [tether, *tether.children(recursive=True)]
        assert len(engines) >= 3, "what ends it, the server and its engine"
    assert all(each.score is not None for each in found)
    assert found[0].score == found[2].score  # the same text, against the same others
    assert serving(model) == []
    _, alive = psutil.wait_procs(engines, timeout=1)
    assert alive == []
    with closing(Judge(model=str(model), engine="vllm", max_tokens=12, extra_body=CHOICE)) as again:
        assert again(groups) == found
        assert serving(model) == [], "all of it is known"


@pytest.mark.all
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        # Its engine fails, in a process of its own, and the server after it.
        ({"num_gpu_blocks_override": 1}, r"ended with status 1 \(\w+Error: .*Engine core initialization failed"),
        ({"nonsense": 1}, r"ended with status 2.*unrecognized arguments: --nonsense=1"),
    ],
    ids=str,
)
def test_what_vllm_says_of_its_arguments_is_told(model: Path, arguments: dict[str, int], says: str):
    judge = Judge(model=str(model), engine="vllm", engine_args=arguments)
    with closing(judge), pytest.raises(RunError) as error:
        judge([chat("2 + 2?", ["4", "5"])])
    assert re.search(says, str(error.value), re.DOTALL), str(error.value)
    assert serving(model) == []


@pytest.mark.all
def test_win_rates_by_a_judge_after_the_policy_has_left(model: Path, tmp_path: Path):
    """Policy and judge are both vLLM's, one after the other: of a GPU each may take nearly all."""
    recipe = {
        "model": {"model_name_or_path": str(POLICY), "name": "policy"},
        "reference": {"model": "none"},
        "serving": {"engine": "vllm", "max_model_len": 256},
        "evals": [
            {
                "name": "win_rate",
                "prompts": {"dataset_name": str(write_prompts(tmp_path / "prompts.jsonl"))},
                "baseline": {"column": "output"},
                "judge": {
                    "name": "judge",
                    "model": str(model),
                    "engine": "vllm",
                    "max_tokens": 12,
                    "extra_body": CHOICE,
                },
                "sampling": {"max_tokens": 40},
            }
        ],
        "out": {"output_dir": str(tmp_path / "out")},
    }
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(recipe))
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "evals", "run", "--config", str(tmp_path / "eval.yaml")],
        env={**os.environ, "PYTHONPATH": path},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = {each.metric: each for each in Results.read(tmp_path / "out" / "results.json").results}
    assert found["win_rate/raw"].extra["judge"] == "judge"
    assert found["judge/consistency"].n <= PROMPTS
    told = json.dumps(found["win_rate/raw"].extra["judge_settings"])
    assert "127.0.0.1" not in told
    assert serving(model) == []
