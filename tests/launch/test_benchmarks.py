"""Benchmarks run, on shapes so small that their numbers say nothing."""

from __future__ import annotations

import json
import os
import subprocess
import venv
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from launch.bench import vs_trl
from launch.bench.workloads import CASES, COLUMNS, rows_of
from tests.support import REPOSITORY

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


NEEDED = ("torch", "transformers", "accelerate", "peft", "jaxtyping", "omegaconf", "pydantic", "xxhash")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would take the large shape")
def test_the_gpu_script_runs_on_a_cpu(tmp_path: Path):
    """And with nothing installed but what it says it needs, and what that needs."""
    python = interpreter_with(NEEDED, tmp_path / "venv")
    environment = {**os.environ, "PYTHON": str(python), "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        ["bash", "launch/bench/gpu.sh", str(tmp_path)], cwd=REPOSITORY, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["shape"] == "tiny"
    assert found["product_flops"] > 1e9
    assert all(seconds > 0 for seconds in found["attention_seconds"].values())
    for name in ("plain", "sdpa", "align_segments"):  # in float32 here
        apart = found["distance_from_float32"][name]
        assert apart["mean"] <= apart["largest"] < 1e-4
        assert apart["gradient"] < 1e-4
    for name in ("dpo, LoRA", "tpo, LoRA", "dpo, full"):
        assert found[name]["rows_per_second"] > 0
        assert 0 < found[name]["mfu_of_measured"] < 1
        assert 0 < found[name]["mfu_of_sheet"] < found[name]["mfu_of_measured"] / 10
        assert "shared prompts equal separate sequences" in found[name]["checks"]


def interpreter_with(packages: Iterable[str], folder: Path) -> Path:
    """A Python that has these packages, with what they require, and no others."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in brought_by(packages):
        distribution = metadata.distribution(name)
        for top in {path.parts[0] for path in distribution.files or ()} - {"..", "__pycache__"}:
            (site / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())
    return folder / "bin" / "python"


def brought_by(packages: Iterable[str]) -> set[str]:
    """These packages and all they require."""
    names, left = set[str](), list(packages)
    while left:
        name = canonicalize_name(left.pop())
        if name in names:
            continue
        try:
            required = metadata.requires(name) or ()
        except metadata.PackageNotFoundError:  # not needed on this platform's build
            continue
        names.add(name)
        requirements = [Requirement(line) for line in required]
        left += [each.name for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""})]
    return names
