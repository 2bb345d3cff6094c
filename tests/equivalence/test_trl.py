"""The first twenty steps against TRL's DPOTrainer: same rows, same order, same optimizer, its own code on its side."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.equivalence.runs import built, hh_pairs, recipe_for, trajectory, write_rows

STEPS, ROWS_PER_STEP = 20, 8
# Two float32 computations that sum in another order, after up to twenty updates.
FLOAT32_TRAJECTORY = {"rtol": 1e-4, "atol": 1e-6}
# β times a difference of sums of about 300 nats, which float32 knows to 3e-5; it can be as near to zero as it likes.
FLOAT32_REWARD = {"rtol": 1e-4, "atol": 1e-5}
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]}


def trl_trajectory(model, tokenizer, rows, learning_rate, output_dir, **settings):
    """Losses and gradient norms that TRL logs, step by step, on ``rows`` in order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what TRL and its dependencies warn about is not ours to mend
        from trl import DPOConfig, DPOTrainer

        class InOrder(DPOTrainer):
            def _get_train_sampler(self, *arguments):
                return torch.utils.data.SequentialSampler(self.train_dataset)

        args = DPOConfig(
            output_dir=str(output_dir),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=ROWS_PER_STEP // 4,
            learning_rate=learning_rate,
            beta=0.1,
            max_steps=STEPS,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=False,
            max_length=512,
            use_cpu=True,
            disable_tqdm=True,
            lr_scheduler_type="linear",
            warmup_steps=2,
            **settings,
        )
        trainer = InOrder(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, pytest.param(True, marks=pytest.mark.all)], ids=["full", "lora"])
def test_twenty_steps_equal_trl(shared: Path, tmp_path: Path, adapter: bool):
    model_path = shared / "models" / "stories260k"
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    pairs = hh_pairs(shared, tokenizer, STEPS * ROWS_PER_STEP, longest=300)
    learning_rate = 1e-3 if adapter else 1e-4
    keys = ["--rows_per_step", str(ROWS_PER_STEP), "--learning_rate", str(learning_rate), "--warmup_steps", "2"]
    keys += ["--token_budget", "1500"]
    if adapter:
        keys += ["--lora.r", str(LORA["r"]), "--lora_alpha", str(LORA["lora_alpha"])]
        keys += [f"--target_modules=[{','.join(LORA['target_modules'])}]"]
    recipe = recipe_for(tmp_path, model_path, write_rows(tmp_path / "pairs.jsonl", pairs), *keys)
    run = built(recipe)
    assert run.prepared.report["rows"]["train"] == len(pairs)
    assert run.trainer.batches.plan.microbatches > 1
    order = [int(row) for step in run.trainer.batches.plan.epoch(0) for bins in step for rows in bins for row in rows]

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    if adapter:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA))
        set_peft_model_state_dict(model, get_peft_model_state_dict(run.trainer.model))
    ours = trajectory(run)
    theirs = trl_trajectory(model, tokenizer, [pairs[row] for row in order], learning_rate, tmp_path / "trl")

    assert len(ours) == len(theirs) == STEPS
    for key in ("loss", "grad_norm", "learning_rate", "logps/chosen", "rewards/margins", "rewards/chosen"):
        found, wanted = (np.array([line[key] for line in lines]) for lines in (ours, theirs))
        tolerance = FLOAT32_REWARD if key.startswith("rewards") else FLOAT32_TRAJECTORY
        np.testing.assert_allclose(found, wanted, err_msg=key, **tolerance)
    assert ours[-1]["loss"] < 0.69  # something was learned, so that there is a trajectory to compare
