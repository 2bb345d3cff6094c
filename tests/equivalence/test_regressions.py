"""Faults that were once here, each with what a user saw."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from align.losses import nothing_of
from align.train import main
from tests.equivalence.test_resume import command, lines
from tests.equivalence.worlds import save_pairs, write_rows
from tests.support import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("plain_runs")]


def test_live_reference_in_bfloat16_is_the_policy(folder: Path):
    """It was loaded with weights rounded to bfloat16: off by 0.2 nats a token, and the run refused to start."""
    assert main(command(folder, "live", "--dtype=bfloat16", "--reference.source=live")) == 0
    assert lines(folder / "live")[0]["eval/loss"] == pytest.approx(0.693147, abs=1e-3)
    named = ["--dtype=bfloat16", f"--reference.model={folder / 'model'}"]
    assert main(command(folder, "named", *named)) == 0
    assert lines(folder / "named")[0]["eval/loss"] == pytest.approx(0.693147, abs=1e-3)


def test_home_folders_are_one_folder(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Half of a run went to ~/run and half to a folder called ~."""
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    words = command(folder, "x", "--output_dir=~/run")
    assert main([word.replace(f"={folder}/model", "=~/model") for word in words if not word.endswith("/x")]) == 0
    assert not (folder / "~").exists()
    assert {"model.safetensors", "metrics.jsonl", "checkpoint-5"} <= {path.name for path in (folder / "run").iterdir()}


def test_resuming_a_finished_run_adds_nothing(folder: Path):
    """It evaluated the last step a second time."""
    assert main(command(folder, "run")) == 0
    before = lines(folder / "run")
    assert main(command(folder, "run", "--resume_from_checkpoint=last")) == 0
    assert lines(folder / "run") == before


def test_before_the_first_update_every_pair_is_a_tie(folder: Path):
    """The reference is computed in other bins than the policy: rounding was counted as wins and losses."""
    assert main(command(folder, "run", token_budget=150, warmup_steps=3)) == 0
    assert lines(folder / "run")[0]["eval/rewards/accuracies"] == 0.5


@pytest.mark.whole_runs
def test_several_datasets_keep_their_names(folder: Path):
    """The report named none of them, and results were filed under the last one."""
    save_pairs(folder / "more.jsonl", number=20, seed=3)
    names = [f"dataset_name: {folder / 'pairs.jsonl'}, weight: 0.5", f"dataset_name: {folder / 'more.jsonl'}"]
    both = "--datasets=[" + ", ".join(f"{{{name}}}" for name in names) + "]"
    words = [word for word in command(folder, "run", both) if not word.startswith("--dataset_name")]
    assert main(words) == 0
    results = json.loads((folder / "run" / "results.json").read_text())
    assert results["results"][0]["dataset"] == "pairs.jsonl + more.jsonl"
    assert "more.jsonl" in (folder / "run" / "report.html").read_text()


def test_an_eval_dataset_gives_results_its_name(folder: Path):
    """The numbers were filed under the training set."""
    save_pairs(folder / "held.jsonl", number=12, seed=9)
    assert main(command(folder, "run", f"--eval_dataset_name={folder / 'held.jsonl'}", eval_share=None)) == 0
    result = json.loads((folder / "run" / "results.json").read_text())["results"][0]
    assert result["dataset"].endswith("held.jsonl")
    assert result["n"] == 12


def test_a_run_can_be_run_again_from_its_own_recipe(folder: Path):
    """It told itself to resume from a checkpoint, or to delete itself."""
    assert main(command(folder, "run", "--overwrite_output_dir")) == 0
    assert main(["--config", str(folder / "run" / "recipe.yaml"), f"--output_dir={folder / 'again'}"]) == 0
    assert lines(folder / "again") == lines(folder / "run")
    assert main(["--config", str(folder / "run" / "recipe.yaml")]) == 2  # its folder holds a run


def test_another_token_budget_may_resume(folder: Path):
    """Out of memory one is told to lower it, and resuming then refused the lower one."""
    assert main(command(folder, "run")) == 0
    straight = lines(folder / "run")
    import shutil

    shutil.rmtree(folder / "run" / "checkpoint-10")
    assert main(command(folder, "run", "--resume_from_checkpoint=last", token_budget=200)) == 0
    assert lines(folder / "run")[-1]["eval/loss"] == pytest.approx(straight[-1]["eval/loss"], rel=1e-4)
    assert [line["loss"] for line in lines(folder / "run") if "loss" in line] == pytest.approx(
        [line["loss"] for line in straight if "loss" in line], rel=1e-4
    )


@pytest.mark.slow
def test_ranks_stop_together_with_one_message_from_the_rank_that_failed(folder: Path):
    """A NaN on one rank was reported by another as a gradient norm; it must be told as a loss, with its step."""
    script = folder / "poisoned.py"
    script.write_text(
        "import sys, torch\n"
        "import align.trainer as t\n"
        "original = t.ObjectiveTrainer.compute_output\n"
        "def compute_output(self, model, batch, **more):\n"
        "    output, legs, nothing = original(self, model, batch, **more)\n"
        "    hit = any(self.row_name(row).endswith('row 17') for row in batch.rows.tolist())\n"
        "    if torch.is_grad_enabled() and self.state.global_step == 2 and hit:\n"
        "        nothing = nothing * float('nan')\n"
        "    return output, legs, nothing\n"
        "t.ObjectiveTrainer.compute_output = compute_output\n"
        "from align.train import main\n"
        "sys.exit(main())\n"
    )
    words = command(folder, "run", eval_share=0, rows_per_step=48, num_train_epochs=9)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(script), *words],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, done.stderr[-3000:]
    assert "the loss is nan at step 3" in said[0]
    assert not list((folder / "run").glob("checkpoint-5"))


def test_fewer_rows_than_held_out_prompts_still_train(folder: Path):
    write_rows(folder / "two.jsonl", [{"prompt": f"{i}", "chosen": " a b.", "rejected": " c!"} for i in range(2)])
    words = [w for w in command(folder, "run") if not w.startswith("--dataset_name")]
    assert main([*words, f"--dataset_name={folder / 'two.jsonl'}"]) == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
@pytest.mark.parametrize("where", ["masks", "everywhere"])
def test_where_flex_attention_fails_dense_masks_are_tried_before_prompts_are_repeated(
    folder: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    """A GPU without a compiler would have lost the shared prompts too."""
    from align import masks, model

    def broken(*arguments, **options):
        raise RuntimeError("no compiler")

    monkeypatch.setitem(masks.MAKERS, "flex_attention", broken)
    if where == "everywhere":
        from transformers.integrations import flex_attention

        monkeypatch.setattr(flex_attention, "compile_friendly_flex_attention", broken)
    monkeypatch.setattr(model, "attention", lambda section, config: "flex_attention")
    assert main(command(folder, "run")) == 0
    checks = json.loads((folder / "run" / "checks.json").read_text())
    assert checks[0]["check"] == "shared prompts equal separate sequences"
    assert "no compiler" in checks[0]["detail"]


def test_filler_batches_go_back_through_every_output():
    """Engines that divide weights waited for each other for ever: an output no loss asked for was left out."""
    logps, divergence = torch.full((3,), -1.0, requires_grad=True), torch.full((3,), math.nan, requires_grad=True)
    nothing = nothing_of({"logps": logps, "ref_kl": divergence, "told": torch.ones(2), "head": object()})
    assert nothing.item() == 0.0
    slopes = torch.autograd.grad(nothing, (logps, divergence))  # fails where one of them is left out
    assert [slope.tolist() for slope in slopes] == [[0.0] * 3] * 2
    assert nothing_of({"told": torch.ones(2)}).item() == 0.0
    assert math.isnan(nothing_of({"logps": divergence}).item()), "stops the run"
