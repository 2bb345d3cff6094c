"""Objectives on samples: a run that stops and goes on ends where one without a stop does, however rows are computed,
and does not go on with other columns.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from align.train import main
from tests.align.runs import pairs, tiny_model, write_rows

pytestmark = pytest.mark.usefixtures("plain_runs")

KEPT = "--save_strategy=steps", "--save_steps=2"
REORDERED = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums in another order, through four steps of Adam


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    tiny_model(tmp_path / "model")
    save_rows(tmp_path)
    return tmp_path


def save_rows(folder: Path, *, turned: bool = False) -> None:
    """Rows for both objectives; turned, with another writer and another preference in the first of them."""
    who, liked = ("policy", "reference"), 0.9 if turned else 0.0
    explored = [row | {"chosen_by": who[(i + (turned and i == 0)) % 2]} for i, row in enumerate(pairs(16))]
    preferred = [
        {"prompt": row["prompt"], "completion": row["chosen"], "preference": i / 16 if i else liked}
        for i, row in enumerate(pairs(16))
    ]
    write_rows(folder / "xpo.jsonl", explored)
    write_rows(folder / "nash_md.jsonl", preferred)


def words(folder: Path, run: str, name: str, *more: str) -> list[str]:
    alpha = ", alpha: 0.01" if name == "xpo" else ""
    return [
        *(f"--model_name_or_path={folder / 'model'}", f"--dataset_name={folder / name}.jsonl", "--eval_share=0"),
        *(f"--objective={{name: {name}{alpha}}}", f"--output_dir={folder / run}", "--rows_per_step=8"),
        *("--max_steps=4", "--learning_rate=1e-3", *more),
    ]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["xpo", "nash_md"])
def test_a_run_goes_on_where_it_stopped_and_only_with_the_same_columns(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(words(folder, "whole", name, *KEPT)) == 0
    assert main(words(folder, "stopped", name, *KEPT)) == 0
    last = folder / "stopped" / "checkpoint-4"
    last.rename(folder / "gone")  # as if it had been killed after the first checkpoint
    save_rows(folder, turned=True)
    capsys.readouterr()
    assert main(words(folder, "stopped", name, *KEPT, "--resume_from_checkpoint=last")) == 2
    assert "was trained on other rows than data.dataset_name holds now" in capsys.readouterr().err
    save_rows(folder)
    assert main(words(folder, "stopped", name, *KEPT, "--resume_from_checkpoint=last")) == 0
    whole, resumed = weights(folder / "whole"), weights(folder / "stopped")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["xpo", "nash_md"])
def test_columns_stay_with_their_rows_however_these_are_computed(name: str, folder: Path):
    """In microbatches of one row, and all together."""
    assert main(words(folder, "whole", name, "--token_budget=4000", "--save_strategy=no")) == 0
    assert main(words(folder, "parts", name, "--token_budget=80", "--save_strategy=no")) == 0
    whole, parts = weights(folder / "whole"), weights(folder / "parts")
    for key, values in whole.items():
        torch.testing.assert_close(parts[key], values, **REORDERED)
