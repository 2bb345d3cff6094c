"""What an evaluation loads: policy and reference, one after the other, and the pairs they are measured on."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from align import assemble
from align import model as models
from align.errors import RunError
from align.fingerprints import joined, weights_on_disk
from align.forward import bind
from align.sections import LoraSection, ModelSection
from align.value_head import is_reward_model, output_names
from data.preparation import DataSpec, Split, prepare
from data.shapes import Rule, attributes_in
from data.sources import Source
from data.tokens import TokenPolicy
from evals.run_settings import TRAINING, Job, PairSection

PAIR = ("chosen", "rejected")


@contextlib.contextmanager
def loaded(section: ModelSection, adapter: str | None, config: Any) -> Iterator[nn.Module]:
    """A frozen model that scores batches, on this machine's accelerator where there is one; let go at the end.

    Args:
        section: where from.
        adapter: folder of a LoRA adapter on it.
        config: as ``align.model.load_config`` gave it.
    """
    values = tuple(output_names(config)) if is_reward_model(config) else ()
    model: Any = models.load_weights(section, config, models.compute_dtype(section), values=values)
    if adapter is not None:
        model = models.add_adapter(model, LoraSection(adapter_name_or_path=adapter))
    bind(model)
    model.requires_grad_(False)
    if not section.quantized:
        model.to("cuda" if torch.cuda.is_available() else "cpu")
    try:
        yield model.eval()
    finally:
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def fingerprint(section: ModelSection, adapter: str | None) -> str:
    """Content hash of the weights, adapter included."""
    base = weights_on_disk(section.model_name_or_path, section.model_revision)
    return joined(base, None if adapter is None else weights_on_disk(adapter))


def pairs_of(job: Job, tokenizer: Any, config: Any, columns: tuple[str, ...]) -> tuple[Split, str, str, dict[str, Any]]:
    """The pairs to measure, what their dataset and split are called, and the report of their preparation.

    Raises:
        DataError: a dataset can't be used.
        RunError: the run has no held-out pairs.
    """
    if job.data is not None:
        return pairs_of_data(job.data, tokenizer, models.max_length(job.data.max_length, config), columns)
    assert job.run_dir is not None
    return _held_out(job.run_dir, tokenizer, config, columns)


def pairs_of_data(
    data: PairSection, tokenizer: Any, length: int, columns: tuple[str, ...]
) -> tuple[Split, str, str, dict[str, Any]]:
    """The pairs of a dataset; see ``pairs_of``.

    Args:
        data: where they come from.
        tokenizer: of the model.
        length: most tokens of prompt and response.
        columns: numbers that every row must have.
    """
    single = Path(data.dataset_name).is_file()
    split = data.split or ("train" if single else "test")
    source = Source(
        dataset_name=data.dataset_name,
        split=split,
        config=data.dataset_config,
        columns=data.columns,
        format=data.format,
        as_chat=data.as_chat,
        attributes=tuple(attributes_in(columns)),
    )
    spec = DataSpec(
        train=(source,),
        eval=None,
        eval_share=0.0,
        legs=PAIR,
        labels=False,
        scores=columns,
        rule=Rule(name=data.rule, threshold=data.threshold, margin=data.margin),
        policy=TokenPolicy(max_length=length, truncation=data.truncation),
        max_dropped_share=data.max_dropped_share,
        seed=0,
        max_rows=data.max_rows,
    )
    prepared = prepare(spec, tokenizer)
    return prepared.train, data.dataset_name, data.split or ("all" if single else split), dict(prepared.report)


def _held_out(
    run_dir: Path, tokenizer: Any, config: Any, columns: tuple[str, ...]
) -> tuple[Split, str, str, dict[str, Any]]:
    from align.recipe import read_recipe
    from evals.run_directory import eval_name

    recipe = read_recipe(run_dir / "recipe.yaml", (), TRAINING)
    spec = assemble.data_spec(recipe, models.max_length(recipe.data.max_length, config))
    own = prepare(spec, tokenizer)
    if own.eval is None:
        raise RunError(
            f"{run_dir} held out no rows (data.eval_share 0), so there are no pairs to measure; give --config with a "
            "data section"
        )
    dataset, name = eval_name(recipe)
    if set(PAIR) <= set(spec.legs) and not columns:
        return own.eval, dataset, name, dict(own.report)
    # An objective of other legs: the same rows as pairs, of which those with held-out prompts count.
    read = tuple(attributes_in(columns))
    as_pairs = prepare(
        replace(
            spec,
            train=tuple(replace(source, attributes=read) for source in spec.train),
            eval=None if spec.eval is None else replace(spec.eval, attributes=read),
            legs=PAIR,
            labels=False,
            scores=columns,
        ),
        tokenizer,
    )
    assert own.eval.texts is not None
    assert as_pairs.eval is not None
    assert as_pairs.eval.texts is not None
    held = {each.tobytes() for each in own.eval.texts}
    kept = np.array([row for row, text in enumerate(as_pairs.eval.texts) if text.tobytes() in held])
    if not len(kept):
        raise RunError(f"{run_dir}: none of the held-out rows has a chosen and a rejected response")
    return as_pairs.eval.take(kept), dataset, name, dict(as_pairs.report)
