"""Small real runs for tests: rows that fit, a recipe, a trainer, its trajectory."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from align.build import Run, build
from align.model import load_config, load_tokenizer, max_length
from align.recipe import Recipe, read_recipe
from data.preparation import Prepared, prepare


def hh_pairs(shared: Path, tokenizer: Any, number: int, longest: int) -> list[dict[str, str]]:
    """Real preference pairs whose prompt + longer response is at most ``longest`` tokens, as explicit strings."""
    pairs: list[dict[str, str]] = []
    with gzip.open(shared / "data" / "hh_harmless.jsonl.gz", "rt") as file:
        for line in file:
            row = json.loads(line)
            cut = {leg: row[leg].rindex("\n\nAssistant:") + len("\n\nAssistant:") for leg in ("chosen", "rejected")}
            prompt = row["chosen"][: cut["chosen"]]
            answers = {leg: row[leg][cut[leg] :] for leg in cut}
            fits = all(len(tokenizer(row[leg])["input_ids"]) < longest for leg in cut)
            usable = row["rejected"].startswith(prompt) and all(answer.strip() for answer in answers.values())
            if fits and usable and answers["chosen"] != answers["rejected"]:
                pairs.append({"prompt": prompt, **answers})
            if len(pairs) == number:
                return pairs
    raise AssertionError(f"only {len(pairs)} pairs fit")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe_for(tmp_path: Path, model: Path | str, rows: Path, *keys: str, config: Path | None = None) -> Recipe:
    """A recipe from command-line keys, with a DPO objective unless they say otherwise."""
    base = {
        "--model_name_or_path": str(model),
        "--dataset_name": str(rows),
        "--output_dir": str(tmp_path / "run"),
        "--objective.name": "dpo",
        "--eval_share": "0",
        "--logging_steps": "1",
        "--save_strategy": "no",
    }
    given = [word for pair in base.items() if pair[0] not in keys for word in pair]
    return read_recipe(config, [*given, *keys])


def prepare_recipe(recipe: Recipe) -> tuple[Any, Any, Prepared]:
    """Model configuration, tokenizer and token tables."""
    from align.assemble import data_spec

    config, tokenizer = load_config(recipe.model), load_tokenizer(recipe.model)
    return config, tokenizer, prepare(data_spec(recipe, max_length(recipe.data.max_length, config)), tokenizer)


def built(recipe: Recipe) -> Run:
    """A run ready to train."""
    config, tokenizer, prepared = prepare_recipe(recipe)
    Path(recipe.train.output_dir).mkdir(parents=True, exist_ok=True)
    return build(recipe, config, tokenizer, prepared, None, lambda line: None)


def trajectory(run: Run) -> list[dict[str, float]]:
    """Trains, and returns the lines of training metrics."""
    run.trainer.train()
    return [line for line in run.trainer.state.log_history if "loss" in line]
