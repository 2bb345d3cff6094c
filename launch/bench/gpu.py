"""One accelerator near its limit: an 8B Llama shape with random weights and rows as long as real ones.

    bash launch/bench/gpu.sh [folder]        or: python -m launch.bench.gpu --output gpu.json [--tiny]

Measures, in this order, and writes after each, so that a run that is cut off leaves what it has: a large matrix
product; attention by FlexAttention, by segments and with dense masks on one packed line; then DPO and TPO with LoRA,
and DPO in full (an optimizer without moments, so that it fits one card), whose start-up checks compare fast and plain
path. MFU counts useful arithmetic only (forward three times in full, twice with LoRA; nothing twice, no padding),
against the measured product and against the data sheet's 989 TFLOP/s of an H100 or H200.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
RUNS = (("dpo", True), ("tpo", True), ("dpo", False))


def table_of(legs: tuple[str, ...], rows: int, longest: int, vocabulary: int) -> Any:
    """Rows of random tokens with lengths like those of preference data: long tails, about a quarter prompt."""
    from data.store import Ragged, TokenTable

    rng = np.random.default_rng(0)

    def drawn(share: float) -> Ragged:
        lengths = np.clip(rng.lognormal(np.log(share * longest), 0.6, rows).astype(int), 4, int(longest * 0.45))
        return Ragged.of([rng.integers(3, vocabulary, n).tolist() for n in lengths])

    return TokenTable(drawn(0.1), {leg: drawn(0.15) for leg in legs})


def product(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    from align.forecast import measured

    return measured(device, dtype, seconds=1.0).flops


def attention(config: dict[str, int], device: torch.device, dtype: torch.dtype, longest: int) -> dict[str, float]:
    """Seconds of a forward and backward pass of two layers on one packed line, by implementation."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from align.forward import bind
    from data.pack import pack

    table = table_of(("chosen", "rejected"), 16, longest, config["vocab_size"])
    batch = pack(table, range(8), share=True, kind="pack", counts={}, multiple=128).to(device)
    found = {}
    ways = ["align_segments", "sdpa"] + (["flex_attention"] if device.type == "cuda" else [])
    for way in ways:
        torch.manual_seed(0)
        with device:
            model: Any = LlamaForCausalLM(LlamaConfig(**{**config, "num_hidden_layers": 2}, attn_implementation=way))  # type: ignore[arg-type]
        model = model.to(dtype)
        bind(model)
        taken = []
        try:
            for _ in range(6):
                before = time.perf_counter()
                model(packed=batch)["logps"].sum().backward()
                _wait(device)
                taken.append(time.perf_counter() - before)
            found[way] = statistics.median(taken[3:])
        except Exception as error:  # a kernel that does not work here is a result
            found[way] = float("nan")
            print(f"{way}: {type(error).__name__}: {error}"[:300], flush=True)
        del model
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


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

    before, models.load_weights = models.load_weights, made  # type: ignore[assignment]
    fingerprint, models.weights_fingerprint = models.weights_fingerprint, lambda *a, **k: "random"  # type: ignore[assignment]
    try:
        yield
    finally:
        models.load_weights, models.weights_fingerprint = before, fingerprint


def trained(objective: str, lora: bool, config: Any, folder: Path, longest: int, batch: int) -> dict[str, Any]:
    """A few optimizer steps through the real trainer."""
    steps = 6
    from align import assemble
    from align.build import build
    from align.forecast import forecast, most_memory
    from align.model import attention as attention_of
    from align.model import load_tokenizer
    from align.recipe import read_recipe
    from data.preparation import Prepared, Split

    words = [
        f"--model_name_or_path={folder / 'model'}", "--dataset_name=made", f"--output_dir={folder / 'run'}",
        f"--objective={objective}", "--eval_share=0", f"--max_steps={steps}", f"--rows_per_step={batch}",
        "--logging_steps=1", "--save_strategy=no", "--learning_rate=1e-5", "--overwrite_output_dir",
        *(["--lora={r: 16, lora_alpha: 32, target_modules: all-linear}"] if lora else ["--optim=adafactor"]),
    ]  # fmt: skip
    recipe = read_recipe(None, words)
    legs = recipe.mixture.needs.legs
    table = table_of(legs, steps * batch, longest, config.vocab_size)
    split = Split(table=table, where=[("made", i) for i in range(len(table))], prompts=np.arange(len(table)))
    prepared = Prepared(train=split, eval=None, report={"rows": {"read": len(table), "train": len(table), "eval": 0}})
    plan = assemble.train_plan(recipe, table, share=True, way=attention_of(recipe.model, config))
    ahead = forecast(recipe, config, plan, table, steps)
    clock = Clock()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with random_weights(config):
        run = build(recipe, config, load_tokenizer(recipe.model), prepared, None, print)
        run.trainer.add_callback(callback(clock)())
        run.trainer.train()
    lines, found = ahead.verdict(run.speed.steps[2:], most_memory())
    print("\n".join([*ahead.lines(), *lines]), flush=True)
    flops = found["mfu"] * ahead.rates.flops
    checks = {check.check: check.detail for check in run.startup.checks}
    return {
        "rows_per_second": batch / found["step"], "useful_tokens_per_second": found["useful_tokens_per_second"],
        "mfu_of_measured": found["mfu"], "mfu_of_sheet": flops / SHEET, "peak_bytes": found["peak"],
        "forecast_bytes": ahead.peak, "forecast_step": ahead.step, "step": found["step"], "checks": checks,
    }  # fmt: skip


def main() -> int:
    """Measures what fits the time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, as on machines without a GPU")
    parser.add_argument("--seconds", type=float, default=570, help="nothing new is begun after this long")
    options = parser.parse_args()
    started = time.perf_counter()
    from transformers import LlamaConfig

    on_gpu = torch.cuda.is_available()
    tiny = options.tiny or not on_gpu
    device, dtype = torch.device("cuda" if on_gpu else "cpu"), torch.bfloat16 if on_gpu else torch.float32
    shape, longest, batch = (SMALL, 200, 4) if tiny else (BIG, 2048, 32)
    config = LlamaConfig(**shape, bos_token_id=0, eos_token_id=1, pad_token_id=1)  # type: ignore[arg-type]
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "torch": torch.__version__, "shape": "tiny" if tiny else "8B",
        "device": torch.cuda.get_device_name() if on_gpu else "cpu", "dtype": str(dtype),
    }  # fmt: skip

    def keep() -> None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(found), flush=True)

    found["product_flops"] = product(device, dtype)
    found["attention_seconds"] = attention(shape, device, dtype, longest)
    keep()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_model(folder / "model", "tiny", iter(["a tokenizer that nobody uses"]))
        for objective, lora in RUNS:
            if time.perf_counter() - started > options.seconds * 0.8:
                break
            name = f"{objective}, {'LoRA' if lora else 'full'}"
            try:
                found[name] = trained(objective, lora, config, folder, longest, batch)
            except (RuntimeError, ValueError, AssertionError) as error:  # too large, or a kernel that does not work
                found[name] = f"{type(error).__name__}: {str(error)[:500]}"
            keep()
    return 0


if __name__ == "__main__":
    sys.exit(main())
