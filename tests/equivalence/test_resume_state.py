"""What objectives, token weights and rows carry from step to step survives a stop, bit for bit; what was measured on
the policy before training is read again, never measured on the trained one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from align import density, reference
from align.losses import _from_json, _to_json
from align.saving import STATE
from align.train import main
from tests.equivalence.runs import write_rows
from tests.equivalence.test_resume import after_a_crash, command, lines, same_lines

pytestmark = pytest.mark.usefixtures("plain_runs")

BCO = ["--objective.name=bco", "--objective.beta=0.5", "--objective.prompt_encoder=policy"]
SFT = ["--objective.name=sft", "--objective.leg=gold"]
RUNS = {
    "bco": [*BCO, "--objective.max_density_ratio=3"],
    "kto": ["--objective.name=kto", "--objective.beta=0.5"],
    "talr": [*SFT, "--token_weights=[{name: talr}]"],
    "flow": [*SFT, "--token_weights=[{name: flow}]"],
    "list": [
        "--objective=[{name: kto, beta: 0.5}, {name: bco, weight: 0.5}]",
    ],
}


def save_labelled(path: Path) -> Path:
    """Labelled completions of unequal lengths; what is asked has something to do with the label."""
    rows = [
        {"prompt": f"{'please ' * (i % 5)}{i} say:", "completion": f" {'so ' * (i % 7)}{i}.", "label": i * 7 % 5 < 3}
        for i in range(48)
    ]
    return write_rows(path, rows)


def save_supervised(path: Path) -> Path:
    rows = [{"prompt": f"{i} say:", "completion": f" {'so ' * (i % 7)}{i * i}."} for i in range(48)]
    return write_rows(path, rows)


def words(folder: Path, output: str, name: str, *more: str) -> list[str]:
    """A run of ten steps of several microbatches, with a checkpoint at the fifth."""
    rows = save_labelled if name in ("bco", "kto", "list") else save_supervised
    base = command(folder, output, beta=None, token_budget=200)
    own = [word for word in base if not word.startswith(("--objective.name", "--dataset_name"))]
    return [*own, f"--dataset_name={rows(folder / 'rows.jsonl')}", *RUNS[name], *more]


def stored_state(run: Path, step: int) -> dict:
    state = json.loads((run / f"checkpoint-{step}" / STATE).read_text())
    return {**state["objective_state"], **state["weight_state"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_resumed_equals_straight(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    assert main(words(folder, "straight", name)) == 0
    shutil.copytree(folder / "straight", folder / "resumed")
    after_a_crash(folder / "resumed", step=5)

    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("computed again from a policy that has moved on")

    monkeypatch.setattr(density, "fit", never)
    monkeypatch.setattr(density, "_policy_embeddings", never)
    monkeypatch.setattr(reference, "_score_bin", never)
    assert main(words(folder, "resumed", name, "--resume_from_checkpoint=last")) == 0
    same_lines(folder / "resumed", folder / "straight")
    straight, resumed = (load_file(folder / run / "model.safetensors") for run in ("straight", "resumed"))
    for key, tensor in straight.items():
        assert torch.equal(tensor, resumed[key]), key
    last = max(int(path.name.split("-")[1]) for path in (folder / "straight").glob("checkpoint-*"))
    assert last > 5
    middle, end = (stored_state(folder / "straight", step) for step in (5, last))
    assert stored_state(folder / "resumed", last) == end
    assert end
    assert (middle == end) == (name == "flow")  # its τ is of the data, once; all others move


@pytest.mark.slow
def test_density_ratios_that_are_gone_stop_a_resumed_run(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(words(folder, "run", "bco")) == 0
    after_a_crash(folder / "run", step=5)
    shutil.rmtree(folder / "cache" / "density")
    capsys.readouterr()
    assert main(words(folder, "run", "bco", "--resume_from_checkpoint=last")) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "the density ratios of this run are no longer in the cache (ALIGN_CACHE)" in told
    assert told.endswith("restore the cache, or start again")


@pytest.mark.slow
def test_density_ratios_are_shared_by_runs_and_damaged_ones_made_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    fitted = []
    original = density.fit
    monkeypatch.setattr(density, "fit", lambda *a, **k: fitted.append(1) or original(*a, **k))
    assert main(words(folder, "one", "bco")) == 0
    assert main(words(folder, "two", "bco", "--learning_rate=0.002")) == 0
    assert len(fitted) == 1
    (path,) = (folder / "cache" / "density").glob("*.npz")
    path.write_bytes(path.read_bytes()[:100])
    assert main(words(folder, "three", "bco")) == 0
    assert len(fitted) == 2
    assert lines(folder / "three") == lines(folder / "one")
    # Another number of prompts, or another seed, is another regression.
    assert main(words(folder, "four", "bco", "--objective.prompt_sample_size=4")) == 0
    assert len(fitted) == 3
    assert "density ratio: prompts of both classes are told apart in" in capsys.readouterr().out


@pytest.mark.parametrize("value", [torch.inf, -0.0, 1 / 3, 1e-300], ids=str)
def test_state_survives_json_exactly(value: float):
    """Infinite is what τ is before the first step; JSON has no such number."""
    state = {"talr/gold": torch.tensor(value, dtype=torch.float64), "pair": torch.tensor([[value, 2.0]])}
    again = _from_json(json.loads(json.dumps(_to_json(state), allow_nan=False)))
    assert again.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(again[name], tensor)
        assert again[name].dtype == tensor.dtype
