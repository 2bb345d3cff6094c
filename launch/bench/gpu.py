"""One accelerator near its limit: an 8B Llama shape with random weights and rows as long as real ones.

    bash launch/bench/gpu.sh [folder]        or: python -m launch.bench.gpu --output gpu.json [--tiny]

Measures, each part in a process of its own, and writes after each, so that a run that is cut off leaves what it has: a
large matrix product; attention alone by FlexAttention, by segments, with dense masks and by PyTorch's varlen kernel;
how far fast and plain paths are from float32 in values and gradients; then DPO and TPO with LoRA, and DPO in full (an
optimizer without moments, so that one card holds it), with the memory plan any run makes. MFU counts useful arithmetic
only (forward three times in full, twice with LoRA; nothing twice, no padding), against the measured product and against
the data sheet's 989 TFLOP/s of an H100 or H200.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from launch.bench.gpu_parts import equality, has_real_rows, kernels, product, table_of
from launch.bench.sides import Clock, callback
from launch.bench.workloads import make_model

SHEET = 989e12
"""FLOP/s of bfloat16 products without sparsity, as the data sheet says."""
BIG = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
SMALL = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 512,
}  # fmt: skip
RUNS = {"dpo, LoRA": ("dpo", True), "tpo, LoRA": ("tpo", True), "dpo, full": ("dpo", False)}
PARTS = ("product_flops", "attention_seconds", "distance_from_float32", *RUNS)
STEPS, WARM_UP = 6, 2


@contextmanager
def random_weights(config: Any) -> Iterator[None]:
    """Models are made on the device, instead of being read."""
    from transformers import AutoModelForCausalLM

    from align import model as models

    def made(section: Any, _: Any, dtype: torch.dtype, *arguments: Any, **options: Any) -> Any:
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            return AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=models.attention(section, config)
            )

    before, models.load_weights = models.load_weights, made
    fingerprint, models.weights_fingerprint = models.weights_fingerprint, lambda *a, **k: "random"
    try:
        yield
    finally:
        models.load_weights, models.weights_fingerprint = before, fingerprint


def trained(objective: str, lora: bool, config: Any, folder: Path, longest: int, batch: int) -> dict[str, Any]:
    """A few optimizer steps through the real trainer."""
    from align.build import build
    from align.forecast import look_ahead, most_memory
    from align.model import load_tokenizer
    from align.recipe import read_recipe
    from data.preparation import Prepared, Split

    make_model(folder / "model", "tiny", iter(["a tokenizer that nobody uses"]))
    words = [
        f"--model_name_or_path={folder / 'model'}", "--dataset_name=made", f"--output_dir={folder / 'run'}",
        f"--objective={objective}", "--eval_share=0", f"--max_steps={STEPS}", f"--rows_per_step={batch}",
        "--logging_steps=1", "--save_strategy=no", "--learning_rate=1e-5",
        *(["--lora={r: 16, lora_alpha: 32, target_modules: all-linear}"] if lora else ["--optim=adafactor"]),
    ]  # fmt: skip
    recipe = read_recipe(None, words)
    table = table_of(recipe.mixture.needs.legs, STEPS * batch, longest, config.vocab_size)
    split = Split(table=table, where=[("made", i) for i in range(len(table))], prompts=np.arange(len(table)))
    prepared = Prepared(train=split, eval=None, report={"rows": {"read": len(table), "train": len(table), "eval": 0}})
    ahead, clock = look_ahead(recipe, config, table), Clock()
    print("\n".join(ahead.lines()), flush=True)
    with random_weights(config):
        run = build(recipe, config, load_tokenizer(recipe.model), prepared, None, print, ahead.fit)
        assert sum(each.numel() for each in run.trainer.wrapped.parameters()) > config.vocab_size * config.hidden_size
        run.trainer.add_callback(callback(clock)())
        run.trainer.train()
    taken = [after - before for before, after in itertools.pairwise(clock.ends[WARM_UP - 1 :])]  # packing included
    lines, found = ahead.verdict(taken, most_memory())
    print("\n".join(lines), flush=True)
    return {
        "rows_per_second": batch / found["step"], "useful_tokens_per_second": found["useful_tokens_per_second"],
        "mfu_of_measured": found["mfu"], "mfu_of_sheet": found["mfu"] * ahead.rates.flops / SHEET,
        "padding": ahead.padding, "token_budget": ahead.token_budget, "checkpointing": ahead.checkpointing,
        "peak_bytes": found["peak"], "forecast_bytes": ahead.peak, "forecast_step": ahead.step, "step": found["step"],
        "seconds": taken, "checks": {check.check: check.detail for check in run.startup.checks},
    }  # fmt: skip


def part(name: str, tiny: bool, folder: Path) -> Any:
    """Measures one part in this process."""
    from transformers import LlamaConfig

    on_gpu = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if on_gpu else "cpu"), torch.bfloat16 if on_gpu else torch.float32
    shape, longest, batch = (SMALL, 200, 4) if tiny else (BIG, 2048, 32)
    if name == "product_flops":
        return product(device, dtype)
    if name == "attention_seconds":
        return kernels(shape, device, dtype, longest)
    if name == "distance_from_float32":
        return equality(shape, device, dtype, longest)
    config = LlamaConfig(**shape, bos_token_id=0, eos_token_id=1, pad_token_id=1)  # type: ignore[arg-type]
    objective, lora = RUNS[name]
    return trained(objective, lora, config, folder, longest, batch)


def measured_apart(name: str, tiny: bool, seconds: float) -> Any:
    """One part in a process and a cache of its own, so that none finds what another left; or what went wrong."""
    with tempfile.TemporaryDirectory() as temporary:
        words = [sys.executable, "-m", "launch.bench.gpu", "--part", name, "--output", temporary]
        child = subprocess.Popen(
            [*words, *(["--tiny"] if tiny else [])], env={**os.environ, "ALIGN_CACHE": f"{temporary}/cache"}
        )
        try:
            status = child.wait(timeout=max(seconds, 1))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            return f"not finished after {seconds:.0f} s"
        path = Path(temporary) / "part.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else f"ended with status {status}"


def main() -> int:
    """Measures what fits the time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, as on machines without a GPU")
    parser.add_argument("--seconds", type=float, default=570, help="time for all of it")
    parser.add_argument("--part", choices=PARTS, help="measure this in the present process, into the folder --output")
    options = parser.parse_args()
    tiny = options.tiny or not torch.cuda.is_available()
    if options.part:
        try:
            found = part(options.part, tiny, options.output)
        except (RuntimeError, ValueError, AssertionError) as error:  # too large, or a kernel that does not work
            found = f"{type(error).__name__}: {str(error)[:500]}"
        (options.output / "part.json").write_text(json.dumps(found), encoding="utf-8")
        return 0
    started = time.monotonic()
    about: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "torch": torch.__version__, "shape": "tiny" if tiny else "8B",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "lengths": "of real rows" if has_real_rows() else "made up, with a long tail",
    }  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for name in PARTS:
        about[name] = measured_apart(name, tiny, options.seconds - (time.monotonic() - started))
        options.output.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(about[name]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
