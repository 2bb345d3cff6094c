"""The quickstart itself, with few problems: its table, and what it leaves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from launch.quickstart import ROWS, main


@pytest.mark.slow
def test_a_small_quickstart_ends_with_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    assert main([f"--output_dir={run}", "--problems=64", "--held_out=40"]) == 0
    out, err = capsys.readouterr()
    assert "warn" not in err.lower()
    table = out[out.index("before") :]
    results = json.loads((run / "results.json").read_text())["results"]
    last = max(result["step"] for result in results)
    assert last > 0
    for metric, split, label in ROWS:
        found = re.search(rf"^{re.escape(label)} +(.+)$", table, re.MULTILINE)
        assert found, label
        numbers = [float(number) for number in re.findall(r"-?\d+\.\d+", found[1])]
        assert len(numbers) == 6  # before and after, each with an interval
        for step, (value, low, high) in ((0, numbers[:3]), (last, numbers[3:])):
            wanted = next(r for r in results if (r["metric"], r["split"], r["step"]) == (metric, split, step))
            assert [value, low, high] == pytest.approx(
                [wanted[k] for k in ("value", "low", "high")], abs=6e-4
            )  # three decimals
            assert low <= value <= high
    assert f"{run}/report.html" in table
    for name in ("report.html", "README.md", "recipe.yaml", "model.safetensors"):
        assert (run / name).is_file(), name
    rows = [json.loads(line) for line in (tmp_path / "run-inputs" / "train.jsonl").read_text().splitlines()]
    assert 20 < len(rows) <= 64
    assert all(len({response["score"] for response in row["responses"]}) > 1 for row in rows)
