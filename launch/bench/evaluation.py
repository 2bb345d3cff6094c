"""Ranking accuracy and CHES: our one pass with shared prompts against two plain passes over the same pairs.

    python -m launch.bench.evaluation [--shape 16m] [--case hh] [--rows 96] [--rounds 5]
    make bench_evaluation

Plain, as papers' own code does it: one pass for log-probs (chosen and rejected stacked and padded, full logits,
log_softmax, gather) and one for hidden states (the same batches, ``output_hidden_states``, a mask, a sum). Both sides
read the same tokens, alternate A B A B in one process, and end with the same numbers, which is checked. The pairs of
the plain side are sorted by length too, and its batch size is the fastest of those tried.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from align import model as models
from align.console import quiet_libraries
from align.scoring import RowScorer
from align.sections import ModelSection
from data.store import TokenTable
from evals import loading
from evals.ches import ches, ln_ches, of_batch
from evals.run_settings import PairSection
from launch.bench.workloads import CASES, SHAPES, make_model, rows_of, write_rows

BATCHES = (2, 4, 8)
LEGS = ("chosen", "rejected")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="16m", choices=[*SHAPES, "stories260k"])
    parser.add_argument("--case", default="hh", choices=[case for case in CASES if case not in ("tpo", "unpaired")])
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(measure(options, Path(temporary)), indent=1))
    return 0


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of both sides in every round, their ratio, and how far their numbers differ."""
    rows = rows_of(options.case)
    make_model(folder / "model", options.shape, (text for row in rows for text in row.values()))
    write_rows(folder / "pairs.jsonl", rows, folder / "model", options.rows)
    section = ModelSection(model_name_or_path=str(folder / "model"))
    config, tokenizer = models.load_config(section), models.load_tokenizer(section)
    data = PairSection(dataset_name=str(folder / "pairs.jsonl"))
    table = loading.pairs_of_data(data, tokenizer, models.max_length(None, config), ())[0].table
    dtype = models.compute_dtype(section)
    with loading.loaded(section, None, config) as model:
        scorer = RowScorer(section, model, table, dtype)
        plain_model: Any = models.load_weights(section, config, dtype)
        plain_model = plain_model.to(scorer.device).eval()
        batch = min(BATCHES, key=lambda size: _seconds(lambda: plain(plain_model, table, size)))
        ours, theirs = scorer(of_batch), plain(plain_model, table, batch)  # both warm
        differences = {name: float(np.abs(ours[name] - theirs[name]).max()) for name in theirs}
        seconds: dict[str, list[float]] = {"ours": [], "plain": []}
        for _ in range(options.rounds):
            seconds["ours"].append(_seconds(lambda: scorer(of_batch)))
            seconds["plain"].append(_seconds(lambda: plain(plain_model, table, batch)))
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["plain"], strict=True)]
    return {
        "shape": options.shape,
        "case": options.case,
        "pairs": len(table),
        "tokens": int(table.prompts.lengths().sum() + sum(leg.lengths().sum() for leg in table.legs.values())),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "plain_batch": batch,
        "seconds": {side: [round(each, 2) for each in found] for side, found in seconds.items()},
        "speedup": [round(each, 2) for each in ratios],
        "median_speedup": round(statistics.median(ratios), 2),
        "largest_difference": differences,
    }


def _seconds(what: Callable[[], object]) -> float:
    began = time.perf_counter()
    what()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


@torch.inference_mode()
def plain(model: Any, table: TokenTable, size: int) -> dict[str, np.ndarray]:
    """Both quantities in two passes of the model's own forward.

    Args:
        model: of transformers.
        table: pairs.
        size: pairs of a batch.
    """
    found: dict[str, np.ndarray] = {f"sum/{leg}": np.zeros(len(table)) for leg in LEGS}
    lengths = np.max([table.prompts.lengths() + table.legs[leg].lengths() for leg in LEGS], axis=0)
    order = np.argsort(lengths, kind="stable")
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    for rows in batches:
        ids, mask, labels = _padded(table, rows, model.device)
        logits = model(input_ids=ids, attention_mask=mask).logits
        logps = functional.log_softmax(logits[:, :-1].float(), dim=-1).gather(-1, ids[:, 1:, None])[..., 0]
        sums = torch.where(labels[:, 1:], logps, 0.0).sum(dim=1).double().cpu().numpy()
        for number, leg in enumerate(LEGS):
            found[f"sum/{leg}"][rows] = sums[number * len(rows) : (number + 1) * len(rows)]
    states: dict[str, list[Any]] = {leg: [None] * len(table) for leg in LEGS}
    for rows in batches:
        ids, mask, labels = _padded(table, rows, model.device)
        hidden = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        sums = torch.where(labels[:, 1:, None], hidden[:, :-1].float(), 0.0).sum(dim=1).double().cpu().numpy()
        for number, leg in enumerate(LEGS):
            for place, row in enumerate(rows):
                states[leg][row] = sums[number * len(rows) + place]
    chosen, rejected = (np.stack(states[leg]) for leg in LEGS)
    n_chosen, n_rejected = (table.legs[leg].lengths() for leg in LEGS)
    return {**found, "ches": ches(chosen, rejected), "ln_ches": ln_ches(chosen, n_chosen, rejected, n_rejected)}


def _padded(table: TokenTable, rows: np.ndarray, device: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, attention mask and which tokens are of a response; chosen first, then rejected."""
    lines = [(table.prompts[row], table.legs[leg][row]) for leg in LEGS for row in rows]
    width = max(len(prompt) + len(response) for prompt, response in lines)
    ids = np.zeros((len(lines), width), dtype=np.int64)
    mask, labels = np.zeros_like(ids), np.zeros(ids.shape, dtype=bool)
    for line, (prompt, response) in enumerate(lines):
        end = len(prompt) + len(response)
        ids[line, :end] = np.concatenate([prompt, response])
        mask[line, :end], labels[line, len(prompt) : end] = 1, True
    return tuple(torch.from_numpy(each).to(device) for each in (ids, mask, labels))  # type: ignore[return-value]


if __name__ == "__main__":
    sys.exit(main())
