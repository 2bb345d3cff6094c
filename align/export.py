"""Makes a model folder of a checkpoint or a run, which ``from_pretrained`` and vLLM read.

    python -m align.export runs/dpo/checkpoint-500 my-model [--merge]

Checkpoints of every engine are read: whole weights, adapters, and the shards of FSDP2. An adapter stays an adapter,
with the name of its base; ``--merge`` adds it to the base's weights.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from align.errors import RecipeError, RunError
from align.recipe import Recipe, read_recipe
from align.saving import AFTERWARDS, RECIPE, explained, verify

SHARDS = "pytorch_model_fsdp_0"
"""Folder in a checkpoint of FSDP2."""
MODEL_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json"),
)
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template.*", "vocab.*", "merges.txt"),
)


def export(source: Path, target: Path, *, merge: bool = False) -> None:
    """Writes the model of a checkpoint or run directory.

    Args:
        source: checkpoint or run directory.
        target: a new folder.
        merge: add an adapter to its base.
    Raises:
        RunError: there is no model in ``source``, ``target`` is there already, or there is no adapter to merge.
    """
    if not source.is_dir():
        raise RunError(f"there is no folder {str(source)!r}; name a run directory or one of its checkpoints")
    if target.exists():
        raise RunError(f"{str(target)!r} is there already; name a new folder")
    if source.name.startswith("checkpoint-"):
        verify(source)
    adapter = (source / "adapter_config.json").is_file()
    sharded = (source / SHARDS).is_dir()
    if not (sharded or list(source.glob("*.safetensors"))):
        raise RunError(f"{source} holds no weights; name a run directory or one of its checkpoints")
    target.parent.mkdir(parents=True, exist_ok=True)
    with explained(target.parent, "export again"), tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        made = Path(temporary) / "model"
        made.mkdir()
        if sharded:
            _from_shards(source, made, _recipe(source))
        elif merge and adapter:
            _merged(source, made, _recipe(source))
        else:
            _copy(source, made, MODEL_FILES)
        if merge and not adapter and not (made / "adapter_config.json").is_file():
            raise RunError(f"{source} holds whole weights, no adapter; leave --merge out")
        if merge and (made / "adapter_config.json").is_file():
            whole = Path(temporary) / "merged"
            whole.mkdir()
            _merged(made, whole, _recipe(source))
            made = whole
        _tokenizer(source, made)
        made.chmod(0o755)
        made.rename(target)


def _copy(source: Path, target: Path, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        for path in source.glob(pattern):
            shutil.copy2(path, target / path.name)


def _recipe(source: Path) -> Recipe:
    for folder in (source, source.parent):
        if (folder / RECIPE).is_file():
            return read_recipe(folder / RECIPE, without=AFTERWARDS)
    raise RunError(f"{source} has no {RECIPE}, which names its model; copy it there from the run directory")


def _tokenizer(source: Path, target: Path) -> None:
    for folder in (source, source.parent):
        if (folder / "tokenizer_config.json").is_file():
            _copy(folder, target, TOKENIZER_FILES)
            return
    from align.model import load_tokenizer

    load_tokenizer(_recipe(source).model).save_pretrained(target)


def _merged(source: Path, target: Path, recipe: Recipe) -> None:
    from peft import PeftModel

    from align import model as models

    # Merged weights are whole, also where the adapter was trained beside quantized ones.
    section = replace(recipe.model, load_in_4bit=False, load_in_8bit=False)
    values = recipe.mixture.needs.values
    base = models.load_weights(section, models.load_config(section), torch.float32, values=values)
    PeftModel.from_pretrained(base, str(source)).merge_and_unload().save_pretrained(target)  # type: ignore[operator]


def _from_shards(source: Path, target: Path, recipe: Recipe) -> None:
    """Puts FSDP2's parts together on one process, into a model of the recipe."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    from align import model as models

    section, lora = recipe.model, recipe.lora
    config, dtype = models.load_config(section), models.compute_dtype(section)
    model: Any = models.policy(section, lora, config, dtype, recipe.mixture.needs.values)
    state: dict[str, Any] = {"model": model.state_dict() if lora is None else get_peft_model_state_dict(model)}
    with warnings.catch_warnings(action="ignore"):  # that there is one process is meant
        load(state, checkpoint_id=source / SHARDS, no_dist=True)
    if lora is None:
        model.load_state_dict(state["model"])
    else:
        set_peft_model_state_dict(model, state["model"])
    model.save_pretrained(target)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exports; returns the exit status: 0, or 2 after one sentence on what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="run directory or checkpoint")
    parser.add_argument("target", type=Path, help="new folder")
    parser.add_argument("--merge", action="store_true", help="add the adapter to its base's weights")
    options = parser.parse_args(arguments)
    try:
        export(options.source, options.target, merge=options.merge)
    except (RunError, RecipeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
