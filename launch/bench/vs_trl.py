"""Steps per second against TRL: same model, same rows, same global batch, same optimizer, taking turns in one run.

    make bench        or: .venv/bin/python -m launch.bench.vs_trl [--shape 16m] [--rounds 3] [--dataset pairs.jsonl]

Three sides, each in a process of its own, in the order A B C A B C: ours at its defaults, TRL's DPOTrainer at its
defaults (the reference model in every step, activations checkpointed), and TRL with a precomputed reference and without
checkpointing. Timed are optimizer steps after the first two; start-up and reference passes are not in them. Losses of
all sides must agree, or nothing is printed. Quote medians: machines are noisy.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from align.train import quiet_libraries

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4, "heads": 4, "vocab_size": 512},
    "16m": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "heads": 6, "vocab_size": 8192},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "heads": 9, "vocab_size": 49152},
}
SIDES = ("ours", "trl", "trl-best")
WARM_UP = 2


def make_model(folder: Path, shape: str) -> None:
    """A Llama with random weights and a byte-level tokenizer whose vocabulary is padded to the shape's."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    size = dict(SHAPES[shape])
    heads = size.pop("heads")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        **size, num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=1024,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def make_rows(path: Path, number: int) -> None:
    """Pairs with long prompts (200 to 500 bytes) and short responses (20 to 160), as dialogues have them."""
    rng = random.Random(0)
    words = [
        "what",
        "do",
        "you",
        "think",
        "of",
        "the",
        "weather",
        "in",
        "winter",
        "and",
        "would",
        "it",
        "rain",
        "there",
    ]

    def text(low: int, high: int) -> str:
        length, written, parts = rng.randint(low, high), 0, []
        while written < length:
            parts.append(rng.choice(words) + " ")
            written += len(parts[-1])
        return "".join(parts)[:length]

    rows = (
        {"prompt": f"{i}: {text(200, 500)}?", "chosen": f" {text(20, 160)}.", "rejected": f" {text(20, 160)}!"}
        for i in range(number)
    )
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def run_ours(model: Path, rows: Path, steps: int, batch: int, output: Path) -> dict[str, Any]:
    """Our trainer at its defaults."""
    from transformers import TrainerCallback

    from align.assemble import data_spec
    from align.build import build
    from align.model import load_config, load_tokenizer, max_length
    from align.recipe import read_recipe
    from data.preparation import prepare

    keys = {
        "model_name_or_path": model, "dataset_name": rows, "output_dir": output, "objective": "dpo", "eval_share": 0,
        "max_steps": steps, "rows_per_step": batch, "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-5,
        "max_length": 1024,
    }  # fmt: skip
    recipe = read_recipe(None, [f"--{key}={value}" for key, value in keys.items()])
    output.mkdir(parents=True)
    config, tokenizer = load_config(recipe.model), load_tokenizer(recipe.model)
    prepared = prepare(data_spec(recipe, max_length(recipe.data.max_length, config)), tokenizer)
    run = build(recipe, config, tokenizer, prepared, None, lambda line: None)
    clock = _clock(TrainerCallback)
    run.trainer.add_callback(clock)
    order = [int(row) for step in run.trainer.batches.plan.epoch(0) for bins in step for part in bins for row in part]
    (output / "order.json").write_text(json.dumps(order))
    run.trainer.train()
    return {"times": clock.times, "losses": [h["loss"] for h in run.trainer.state.log_history if "loss" in h]}


def run_trl(model: Path, rows: Path, steps: int, batch: int, output: Path, *, best: bool) -> dict[str, Any]:
    """TRL's trainer on the same rows, in the order ours took them."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, *arguments: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    pairs = [json.loads(line) for line in rows.read_text().splitlines()]
    order = json.loads((output.parent / "ours" / "order.json").read_text())[: steps * batch]
    args = DPOConfig(
        output_dir=str(output), per_device_train_batch_size=batch, learning_rate=1e-5, max_steps=steps, logging_steps=1,
        save_strategy="no", report_to="none", bf16=False, max_length=1024, disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(), precompute_ref_log_probs=best, precompute_ref_batch_size=batch,
        **({"activation_checkpointing": False} if best else {}),
    )  # fmt: skip
    clock = _clock(TrainerCallback)
    trainer = InOrder(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), args=args, callbacks=[clock],
        train_dataset=Dataset.from_list([pairs[row] for row in order]),
        processing_class=AutoTokenizer.from_pretrained(model),
    )  # fmt: skip
    trainer.train()
    return {"times": clock.times, "losses": [h["loss"] for h in trainer.state.log_history if "loss" in h]}


def _clock(base: type) -> Any:
    class Clock(base):  # type: ignore[misc]
        """Notes when each optimizer step ends."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_end(self, *arguments: Any, **kwargs: Any) -> None:
            self.times.append(time.perf_counter())

    return Clock()


def side(options: argparse.Namespace) -> None:
    """One side of one round, in this process; prints a JSON line."""
    warnings.simplefilter("ignore")
    output = options.folder / options.side
    arguments = (options.folder / "model", options.folder / "pairs.jsonl", options.steps, options.batch, output)
    result = run_ours(*arguments) if options.side == "ours" else run_trl(*arguments, best=options.side == "trl-best")
    times = result.pop("times")[WARM_UP - 1 :]
    result["seconds"] = [after - before for before, after in itertools.pairwise(times)]
    result["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("RESULT " + json.dumps(result), flush=True)


def measure(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """One side in a fresh process with a fresh cache."""
    subprocess.run(["rm", "-rf", str(options.folder / name), str(options.folder / "cache")], check=True)
    words = ["--side", name, "--folder", options.folder, "--steps", options.steps, "--batch", options.batch]
    done = subprocess.run(
        [sys.executable, "-m", "launch.bench.vs_trl", *map(str, words)],
        env={**os.environ, "ALIGN_CACHE": str(options.folder / "cache"), "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True, text=True,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{name} failed:\n{done.stdout[-1500:]}{done.stderr[-3000:]}")
    return json.loads(lines[0].removeprefix("RESULT "))


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="16m")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--steps", type=int, default=6, help=f"optimizer steps a side takes; the first {WARM_UP} warm up"
    )
    parser.add_argument("--batch", type=int, default=8, help="pairs per optimizer step")
    parser.add_argument("--dataset", type=Path, help="prompt/chosen/rejected strings as jsonl; default: made pairs")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        side(options)
        return
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        make_model(options.folder / "model", options.shape)
        if options.dataset:
            (options.folder / "pairs.jsonl").write_text(options.dataset.read_text())
        else:
            make_rows(options.folder / "pairs.jsonl", options.steps * options.batch)
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in SIDES}
        for _ in range(options.rounds):
            for name in SIDES:
                results[name].append(measure(options, name))
    losses = {name: runs[0]["losses"] for name, runs in results.items()}
    for name in SIDES[1:]:
        worst = max(abs(a - b) for a, b in zip(losses["ours"], losses[name], strict=True))
        if worst > 1e-3:
            raise SystemExit(f"{name} computes other losses (up to {worst:.2g} apart): {losses}")
    rates = {name: [options.batch / s for run in runs for s in run["seconds"]] for name, runs in results.items()}
    ours = statistics.median(rates["ours"])
    print(f"{options.shape}, {options.batch} pairs a step, {options.rounds} rounds, pairs/s: median [min, max]")
    for name, values in rates.items():
        peak = statistics.median(run["peak_mib"] for run in results[name])
        rate = statistics.median(values)
        ratio = "" if name == "ours" else f"   ours is {ours / rate:.2f}x"
        print(f"  {name:<9}{rate:8.2f} [{min(values):.2f}, {max(values):.2f}]   peak {peak:,.0f} MiB{ratio}")


if __name__ == "__main__":
    main()
