"""Trained weights in vLLM: what it says of a sequence is what we say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from align.train import main
from tests.equivalence.test_resume import command
from tests.equivalence.worlds import save_model, save_pairs
from tests.support import VLLM_ENVIRONMENT

SCRIPT = """
import json, sys

if __name__ == "__main__":  # vLLM starts processes that import this file
    from vllm import LLM, SamplingParams

    model, ids = sys.argv[1], json.loads(sys.argv[2])
    llm = LLM(model=model, dtype="float32", enforce_eager=True, max_model_len=64, disable_log_stats=True)
    output = llm.generate({"prompt_token_ids": ids}, SamplingParams(max_tokens=1, prompt_logprobs=0))[0]
    scores = [entry[token].logprob for token, entry in zip(ids[1:], output.prompt_logprobs[1:])]
    print("SCORES", json.dumps(scores))
"""


@pytest.mark.slow
def test_trained_weights_score_alike_in_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("vllm", reason="vLLM is not installed: make setup installs it")
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    # vLLM wants heads of a multiple of 32.
    save_model(tmp_path / "model", hidden_size=64, intermediate_size=96)
    save_pairs(tmp_path / "pairs.jsonl")
    assert main(command(tmp_path, "run", save_strategy="no", save_steps=None)) == 0
    ids = [0, 40, 50, 60, 70, 45, 90]
    (tmp_path / "score.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "score.py"), str(tmp_path / "run"), json.dumps(ids)],
        env={**os.environ, **VLLM_ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},  # one process starts sooner
        capture_output=True,
        text=True,
        timeout=500,
    )
    scored = [line for line in done.stdout.splitlines() if line.startswith("SCORES")]
    assert scored, done.stdout[-2000:] + done.stderr[-2000:]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    with torch.no_grad():
        logps = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, :-1], -1)
    wanted = logps.gather(-1, torch.tensor(ids)[1:, None])[:, 0].numpy()
    # float32, other kernels
    np.testing.assert_allclose(json.loads(scored[0].removeprefix("SCORES ")), wanted, rtol=1e-3, atol=1e-3)
