"""Benchmarks run, on shapes so small that their numbers say nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.bench import gpu, vs_trl
from launch.bench.workloads import CASES, COLUMNS, rows_of

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", CASES)
def test_rows_have_what_their_case_takes(case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Made-up ones, where there are no real ones."""
    monkeypatch.setenv("ALIGN_SHARED", str(tmp_path))
    rows = rows_of(case)
    assert len(rows) >= 500
    assert all(tuple(row) == COLUMNS[case] for row in rows)


@pytest.mark.all
@pytest.mark.parametrize("more", [{}, {"lora": True}, {"case": "tpo"}, {"case": "unpaired"}, {"whole": True}], ids=str)
def test_ours_and_trl_compute_the_same_losses(more: dict[str, Any]):
    """Which the benchmark itself asserts."""
    pytest.importorskip("trl")
    result = vs_trl.compare(vs_trl.Setup(**{"shape": "tiny", "rounds": 1, "steps": 3, "batch": 4, **more}))
    assert result["losses_apart"] < vs_trl.TOLERANCE * max(result["losses"])
    assert result["useful_tokens_per_row"] > 1
    assert result["sides"]["ours"]["padding"] == 0
    assert result["sides"]["trl"]["padding"] > 0
    assert set(result["sides"]) == set(vs_trl.SIDES)
    assert "useful tokens/s" in vs_trl.told(result)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would take the large shape")
def test_the_gpu_script_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["gpu", "--output", str(tmp_path / "gpu.json")])
    assert gpu.main() == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["shape"] == "tiny"
    for name in ("dpo, LoRA", "tpo, LoRA", "dpo, full"):
        assert found[name]["rows_per_second"] > 0
        assert 0 < found[name]["mfu_of_measured"] < 1
