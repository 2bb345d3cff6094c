"""Averages a tuned model with the one it was tuned from (wise-ft), to sweep the share without training again.

    python -m align.average --initial BASE --tuned runs/sft --tuned_share 0.5 --output_dir runs/sft-half

θ = α·θ_tuned + (1 − α)·θ₀, tensor by tensor in float32; tokenizer and configuration are the tuned model's.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from objectives.regularizers import WiseFT


def average(initial: str, tuned: str, tuned_share: float, output_dir: Path) -> None:
    """Writes the averaged model.

    Raises:
        ValueError: the share is not in (0, 1), or the models differ in their parameters.
    """
    rule = WiseFT(tuned_share=tuned_share)
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(f"output_dir {str(output_dir)!r} is not empty; name a new folder")
    model = AutoModelForCausalLM.from_pretrained(tuned)
    start = dict(AutoModelForCausalLM.from_pretrained(initial).named_parameters())
    with torch.no_grad():
        for name, value in model.named_parameters():  # tied weights once
            if name not in start or start[name].shape != value.shape:
                raise ValueError(f"{tuned!r} has a parameter {name} that {initial!r} has not, or not in that shape")
            value.copy_(rule.averaged(value, start[name]))
    model.save_pretrained(output_dir)
    AutoTokenizer.from_pretrained(tuned).save_pretrained(output_dir)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m align.average", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--initial", required=True, help="model before tuning: folder or Hub id")
    parser.add_argument("--tuned", required=True, help="model after tuning: folder or Hub id")
    parser.add_argument("--tuned_share", type=float, default=0.5, help="the tuned model's share, in (0, 1)")
    parser.add_argument("--output_dir", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        average(options.initial, options.tuned, options.tuned_share, options.output_dir)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"averaged model in {options.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
