"""Evaluations whose judges have servers of their own: one at a time, and after the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from align import local_server
from align.errors import RunError
from align.local_server import LocalServer
from evals.context import Context
from evals.results import Results
from evals.run import run
from evals.run_settings import Job, read_job
from tests.align.stand_ins import StandIns
from tests.equivalence.worlds import save_model
from tests.evals.evaluated import write_prompts


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIns:
    return StandIns(tmp_path, monkeypatch)


def job(folder: Path, *evals: dict[str, Any]) -> Job:
    """Of a tiny model that transformers samples."""
    recipe = {
        "model": {"model_name_or_path": str(save_model(folder / "policy")), "name": "policy"},
        "reference": {"model": "none"},
        "serving": {"engine": "transformers", "max_model_len": 128},
        "evals": [
            {
                "prompts": {"dataset_name": str(write_prompts(folder / "prompts.jsonl", 3)), "keep": ["answer"]},
                "sampling": {"max_tokens": 4},
                **each,
            }
            for each in evals
        ],
        "out": {"output_dir": str(folder / "out")},
    }
    (folder / "eval.yaml").write_text(yaml.safe_dump(recipe))
    return read_job(str(folder / "eval.yaml"), [])


def judge(folder: Path, name: str, seed: int, **keys: Any) -> dict[str, Any]:
    path = folder / name
    return {
        "name": "judge",
        "model": str(path if path.is_dir() else save_model(path, seed=seed)),
        "engine": "vllm",
        **keys,
    }


@pytest.mark.slow
def test_judges_come_after_the_policy_and_one_after_the_other(
    stand_ins: StandIns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each may take nearly all of a device's memory."""
    happened: list[str] = []

    def noted(cls: type, name: str, what: str) -> None:
        original = getattr(cls, name)

        def does(self: Any, *arguments: Any) -> Any:
            found = original(self, *arguments)
            happened.append(f"{what} {Path(self.served.model).name}" if cls is LocalServer else what)
            return found

        monkeypatch.setattr(cls, name, does)

    noted(Context, "samples", "drawn")
    noted(Context, "free", "freed")
    noted(LocalServer, "__init__", "started")
    noted(LocalServer, "stop", "stopped")
    judges = [judge(tmp_path, "one", 1), judge(tmp_path, "two", 2), "gold"]
    run(job(tmp_path, {"name": "win_rate", "baseline": {"column": "output"}, "judge": judges}), say=lambda line: None,
        report=False)  # fmt: skip
    assert happened == ["drawn", "freed", "started one", "stopped one", "started two", "stopped two"]
    assert stand_ins.alive == []
    found = Results.read(tmp_path / "out" / "results.json").results
    by = {each.extra["judge"]: each.extra for each in found if each.metric == "win_rate/raw"}
    assert by.keys() == {"one", "two", "gold"}
    assert by["one"]["judge_template"] != by["two"]["judge_template"], "which weights judged"
    assert "127.0.0.1" not in (tmp_path / "out" / "results.json").read_text()


@pytest.mark.slow
def test_a_judge_whose_server_dies_costs_its_evaluation_alone(stand_ins: StandIns, tmp_path: Path):
    stand_ins.do("crash")
    one = judge(tmp_path, "one", 1, mode="pointwise", concurrency=1, attempts=2)
    evals = [
        {"name": "win_rate", "baseline": {"column": "output"}, "judge": {**one, "mode": "pairwise"}},
        {"name": "pass_at_k", "verifier": "world_answer", "sampling": {"max_tokens": 4, "n": 2}},
    ]
    with pytest.raises(
        RunError, match=r"1 of 2 evaluations could not be measured: win_rate: judge: what was judged is k"
    ):
        run(job(tmp_path, *evals), say=lambda line: None, report=False)
    assert stand_ins.alive == []
    assert {each.metric for each in Results.read(tmp_path / "out" / "results.json").results} >= {"pass_at_k/any@1"}


def test_what_this_machine_lacks_is_told_before_anything_is_drawn(
    stand_ins: StandIns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    one = judge(tmp_path, "one", 1)
    monkeypatch.setattr(local_server, "installed", lambda: None)
    with pytest.raises(RunError, match="engine vllm needs vLLM, which is not installed"):
        job(tmp_path, {"name": "win_rate", "baseline": {"column": "output"}, "judge": one})
    with pytest.raises(RunError, match="engine vllm needs vLLM, which is not installed"):
        job(tmp_path, {"name": "pass_at_k", "verifier": "world_answer", "strategies": ["best_of_n"], "scorers": one})
