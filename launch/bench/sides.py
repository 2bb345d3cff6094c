"""One side of a comparison with TRL, in this process: prepares, trains, and prints one line of JSON at the end.

    python -m launch.bench.sides plan|ours|trl|trl-best --folder F --case hh --steps 6 --batch 8 [--lora] [--micro 4]

``F`` holds ``model`` and ``rows.jsonl``. ``plan`` leaves our order of rows there and trains nothing; TRL takes them in
that order. With LoRA ours leaves the adapter that it begins with, and TRL begins with the same one.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LEARNING_RATE = 1e-5
LORA = {"r": 16, "lora_alpha": 32}
ADAPTER = "adapter.pt"
OBJECTIVES = {"tpo": "tpo", "unpaired": "apo_zero_unpaired"}
"""By case; else dpo. TRL's defaults of beta are given to both."""
STARTED = time.time()


@dataclass
class Clock:
    """When steps ended, and what they computed."""

    ends: list[float] = field(default_factory=list)
    positions: int = 0
    """Positions that went through the policy, padding included."""
    filled: int = 0
    """Those that hold a token."""


def callback(clock: Clock, begins: Callable[[Any], None] | None = None) -> Any:
    """Notes when each optimizer step ends; a class, which transformers makes an instance of.

    Args:
        clock: where they are noted.
        begins: called with the model before the first step.
    """
    from transformers import TrainerCallback

    class Ends(TrainerCallback):
        def on_train_begin(self, *arguments: Any, model: Any, **options: Any) -> None:
            if begins is not None:
                begins(model)

        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            clock.ends.append(time.time())

    return Ends


def words_of(options: argparse.Namespace) -> list[str]:
    """Our command line, at defaults but for what both sides share."""
    keys = {
        "model_name_or_path": options.folder / "model", "dataset_name": options.folder / "rows.jsonl",
        "output_dir": options.folder / "ours", "objective": OBJECTIVES.get(options.case, "dpo"), "eval_share": 0,
        "max_steps": options.steps, "rows_per_step": options.batch, "logging_steps": 1, "save_strategy": "no",
        "learning_rate": LEARNING_RATE, "model.dtype": "float32",
        **({"lora": {**LORA, "target_modules": "all-linear"}} if options.lora else {}),
    }  # fmt: skip
    if options.case == "tpo":
        keys["columns"] = {"gold": "reference"}
    return [f"--{key}={json.dumps(value) if isinstance(value, dict) else value}" for key, value in keys.items()]


def plan(options: argparse.Namespace, clock: Clock) -> list[float]:
    """Leaves the order in which our trainer takes rows."""
    from align.assemble import data_spec, train_plan
    from align.model import attention, load_config, load_tokenizer, max_length
    from align.recipe import read_recipe
    from data.preparation import prepare

    recipe = read_recipe(None, words_of(options))
    config, tokenizer = load_config(recipe.model), load_tokenizer(recipe.model)
    prepared = prepare(data_spec(recipe, max_length(recipe.data.max_length, config)), tokenizer)
    if prepared.report["dropped"]:  # rows are told to TRL by their numbers
        raise SystemExit(f"rows were dropped: {prepared.report['dropped']}")
    steps = train_plan(recipe, prepared.train.table, share=True, way=attention(recipe.model, config)).epoch(0)
    order = [int(row) for step in steps for bins in step for part in bins for row in part]
    (options.folder / "order.json").write_text(json.dumps(order))
    return []


def ours(options: argparse.Namespace, clock: Clock) -> list[float]:
    """What the command line does, from reading the recipe to report and model card; returns the losses."""
    import torch
    from peft import get_peft_model_state_dict
    from transformers import trainer

    from align.train import main as train

    def keep_adapter(model: Any) -> None:
        if options.lora:
            torch.save(get_peft_model_state_dict(model), options.folder / ADAPTER)

    trainer.DEFAULT_CALLBACKS.append(callback(clock, keep_adapter))
    if train(words_of(options)) != 0:
        raise SystemExit("training failed")
    output = options.folder / "ours"
    told = json.loads((output / "forecast.json").read_text())["forecast"]
    clock.filled = round(told["useful_per_step"] * options.steps)
    clock.positions = round(clock.filled / (1 - told["padding"]))
    entries = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


def trl(options: argparse.Namespace, clock: Clock) -> list[float]:
    """TRL's trainer on the same rows, in the same order."""
    import os

    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    from datasets import Dataset
    from peft import LoraConfig, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM, AutoTokenizer

    best = options.side == "trl-best"
    if options.case == "tpo":
        from trl.experimental.tpo import TPOConfig as Config
        from trl.experimental.tpo import TPOTrainer as Trainer

        more: dict[str, Any] = {}
    elif options.case == "unpaired":
        from trl import KTOConfig as Config
        from trl import KTOTrainer as Trainer

        more = {
            "loss_type": "apo_zero_unpaired",
            "precompute_ref_log_probs": best,
            "precompute_ref_batch_size": options.micro,
        }
    else:
        from trl import DPOConfig as Config
        from trl import DPOTrainer as Trainer

        more = {"precompute_ref_log_probs": best, "precompute_ref_batch_size": options.micro}

    class InOrder(Trainer):  # type: ignore[misc, valid-type]
        def _get_train_sampler(self, *arguments: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

        def training_step(self, model: Any, inputs: Any, *arguments: Any, **settings: Any) -> Any:
            for key, mask in inputs.items():
                if key.endswith("attention_mask"):
                    clock.positions += mask.numel()
                    clock.filled += int(mask.sum())
            return super().training_step(model, inputs, *arguments, **settings)

    def begin(model: Any) -> None:
        if options.lora and (options.folder / ADAPTER).exists():
            set_peft_model_state_dict(model, torch.load(options.folder / ADAPTER))

    adapter = LoraConfig(**LORA, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = [json.loads(line) for line in (options.folder / "rows.jsonl").read_text().splitlines()]
    order = json.loads((options.folder / "order.json").read_text())[: options.steps * options.batch]
    args = Config(
        output_dir=str(options.folder / "trl"), per_device_train_batch_size=options.micro,
        gradient_accumulation_steps=options.batch // options.micro, learning_rate=LEARNING_RATE,
        max_steps=options.steps, logging_steps=1, save_strategy="no", report_to="none", bf16=False, max_length=None,
        disable_tqdm=True, use_cpu=not torch.cuda.is_available(), lr_scheduler_type="linear", **more,
        **({"activation_checkpointing": False} if best else {}),
    )  # fmt: skip
    trainer = InOrder(
        model=AutoModelForCausalLM.from_pretrained(options.folder / "model", dtype=torch.float32),
        args=args, train_dataset=Dataset.from_list([rows[row] for row in order]),
        processing_class=AutoTokenizer.from_pretrained(options.folder / "model"), callbacks=[callback(clock, begin)()],
        **({"peft_config": adapter} if options.lora else {}),
    )  # fmt: skip
    trainer.train()
    if options.whole:
        trainer.save_model()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> int:
    """Runs the side and prints what it did."""
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=("plan", "ours", "trl", "trl-best"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--case", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--micro", type=int, default=0, help="TRL's rows per microbatch; 0 for all of a step")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--whole", action="store_true")
    options = parser.parse_args()
    options.micro = options.micro or options.batch
    warnings.simplefilter("ignore")
    clock = Clock()
    losses = {"plan": plan, "ours": ours}.get(options.side, trl)(options, clock)
    result = {
        "started": STARTED, "ends": clock.ends, "losses": losses, "positions": clock.positions, "filled": clock.filled,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }  # fmt: skip
    sys.stdout.flush()
    print("RESULT " + json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    if "ours" in sys.argv[1:2]:  # as the command line does
        from align.lifetime import alone

        alone(main)
    main()
