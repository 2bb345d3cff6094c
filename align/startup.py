"""Between wrapping the model and the first step: the reference pass, then the checks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from align import checks
from align.density import DensityRatio
from align.engines import launched, prepare_frozen, shards_weights
from align.errors import RunError
from align.logps_store import StoredLogps
from align.model import load_config, load_divided
from align.recipe import Recipe
from align.reference import (
    ReferenceKey,
    Scorer,
    adapter_off,
    fill_cache,
    find_cached_anywhere,
    plan_for_scoring,
    verify_cached,
)
from align.saving import explained
from data.loader import PlannedBatches
from data.pack import PackedBatch
from data.store import Ragged, cache_dir

if TYPE_CHECKING:
    from align.losses import LiveReference
    from align.trainer import ObjectiveTrainer

Say = Callable[[str], None]


class Startup:
    """Called once by the trainer when the model is wrapped and, on resume, restored.

    Args:
        recipe: the run's.
        key: of the reference cache; None where it is not used.
        frozen: loads the separate reference model that the recipe names; None where the policy is its own reference.
        density: sets the rows' density ratio; None where no objective reads it.
        starts_as_reference: whether policy and reference are the same function before the first step.
        dtype: of the computation.
        row_names: name a row of the training and of the evaluation data, for messages.
        reference: content hash of the reference's weights; None where there is no reference.
        say: prints on the first rank.
    """

    def __init__(
        self,
        *,
        recipe: Recipe,
        key: ReferenceKey | None,
        frozen: Callable[[], torch.nn.Module] | None,
        density: DensityRatio | None = None,
        starts_as_reference: bool,
        dtype: torch.dtype,
        row_names: Sequence[Callable[[int], str]],
        reference: str | None = None,
        say: Say,
    ) -> None:
        self.recipe, self.key, self.frozen, self.density = recipe, key, frozen, density
        self.starts_as_reference, self.dtype, self.say = starts_as_reference, dtype, say
        self.row_names, self.reference = row_names, reference
        self.checks: list[checks.Check] = []
        self.reference_seconds: float | None = None
        """Of the pass over all training rows, where none was cached."""

    def __call__(self, trainer: ObjectiveTrainer) -> None:
        """Fills the reference cache and checks what can be checked.

        Raises:
            RunError: a check failed.
        """
        if self.key is not None:
            with checks.undisturbed(trainer.wrapped):
                self._reference(trainer)
        if self.density is not None:
            with checks.undisturbed(trainer.wrapped):
                self.density(trainer, self.say)
        batch = checks.first_batch(trainer.batches)
        self.checks.append(checks.check_prompt_is_not_trained(batch, trainer.batches.table))
        if not trainer.resumed:
            if trainer.batches.share and shards_weights(launched()):
                with checks.undisturbed(trainer.wrapped):
                    self.checks.append(checks.check_path(trainer, self.dtype))
            if self.starts_as_reference:
                with checks.undisturbed(trainer.wrapped):
                    self.checks += checks.check_step0(trainer, batch, self.dtype)
            self.checks.append(checks.check_longest(trainer))
        for check in self.checks:
            self.say(f"{'✓' if check.passed else '–'} {check.check}: {check.detail}")

    def _reference(self, trainer: ObjectiveTrainer) -> None:
        assert self.key is not None
        splits = [split for split in (trainer.batches, trainer.eval_batches) if split is not None]
        trainer.note("reading the reference cache")
        tables, rank = [split.table for split in splits], trainer.args.process_index
        stored = find_cached_anywhere(self.key, tables, rank, trainer.gather)
        lacking = sum(int((~leg.done).sum()) for legs in stored for leg in legs.values())
        found = sum(int(leg.done.sum()) for legs in stored for leg in legs.values())
        # A policy that has moved on is not what the cache was computed from, unless its adapter can be switched off.
        at_hand = not trainer.resumed or self.frozen is not None or self._is_base()
        if lacking and not at_hand:
            raise RunError(
                "the reference log-probs of this run are no longer in the cache (ALIGN_CACHE), and the policy has "
                "moved on from the model they came from; restore the cache, or start again"
            )
        if at_hand and (lacking or found):
            scorer = self._scorer(trainer)
            for legs, split in zip(stored, splits, strict=True):
                verify_cached(self.key.folder, legs, split, scorer, checks.TOLERANCES[self.dtype])
            for legs, split in zip(stored, splits, strict=True):
                started = time.perf_counter()
                self._fill(legs, split, scorer, trainer)
                if split is trainer.batches and not found:
                    self.reference_seconds = time.perf_counter() - started
        for legs, name in zip(stored, self.row_names, strict=True):
            _refuse_not_finite(legs, name)
        for legs, split in zip(stored, splits, strict=True):
            split.known = replace(split.known, references={name: leg.ragged() for name, leg in legs.items()})
        references = trainer.batches.known.references
        assert references is not None
        losses = trainer.losses
        losses.weight_state |= losses.weighting.fit({name: _mean_losses(leg) for name, leg in references.items()})

    def _fill(
        self, legs: dict[str, StoredLogps], split: PlannedBatches, scorer: Scorer, trainer: ObjectiveTrainer
    ) -> None:
        started, told = time.perf_counter(), [0.0]

        def progress(done: int, total: int) -> None:
            now = time.perf_counter()
            if now - told[0] > 5 or done == total:
                told[0] = now
                self.say(f"reference: {done} of {total} rows, {done / (now - started):.1f} rows/s")

        assert self.key is not None
        scoring = PlannedBatches(split.table, plan_for_scoring(split.plan), rank=split.rank, share=split.share)
        with explained(cache_dir(), "start again; what was computed is kept"):
            fill_cache(self.key, legs, scoring, scorer, trainer.gather, progress)

    def _is_base(self) -> bool:
        """Whether the reference is the policy without its adapter."""
        lora = self.recipe.lora
        return lora is not None and (self.recipe.reference.model == "base" or lora.adapter_name_or_path is None)

    def _scorer(self, trainer: ObjectiveTrainer) -> Scorer:
        if self.frozen is not None:
            live = frozen_scorer(self.frozen(), trainer)
        # An adapter that started as nothing can still be switched off in the middle of training.
        elif self._is_base() and (trainer.resumed or self.recipe.reference.model == "base"):
            live = adapter_off_scorer(trainer)
        else:
            live = trainer.score
        return lambda batch: live(batch, False)["logps"]


def _mean_losses(logps: Ragged) -> Tensor:
    """Mean loss of every response, nats."""
    sums = np.add.reduceat(np.asarray(logps.values, dtype=np.float64), logps.offsets[:-1])
    return torch.from_numpy(-sums / logps.lengths())


def _refuse_not_finite(legs: Mapping[str, StoredLogps], name: Callable[[int], str]) -> None:
    """A reference that gives no number for a row would give no number for the loss."""
    for leg, stored in legs.items():
        bad = np.flatnonzero(~np.isfinite(stored.values))
        if len(bad):
            row = int(np.searchsorted(stored.offsets, bad[0], side="right")) - 1
            raise RunError(
                f"the reference's log-probs of the {leg!r} response are not finite in {name(row)}; leave that row out, "
                "or check the weights and model.dtype"
            )


def frozen_scorer(model: torch.nn.Module, trainer: ObjectiveTrainer) -> LiveReference:
    """Scores under a second model that training does not touch."""
    model = prepare_frozen(trainer.accelerator, model)

    device, low = trainer.args.device.type, trainer.args.bf16  # DeepSpeed leaves autocast to itself

    def score(batch: PackedBatch, keep_head: bool) -> Mapping[str, Any]:
        trainer.note("scoring the reference")
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=low):
            return model(packed=batch.to(trainer.args.device), keep_head=keep_head)

    return score


def adapter_off_scorer(trainer: ObjectiveTrainer) -> LiveReference:
    """Scores under the policy without its adapter, in the middle of training."""

    def score(batch: PackedBatch, keep_head: bool) -> Mapping[str, Any]:
        with adapter_off(trainer.unwrapped):
            return trainer.score(batch, keep_head)

    return score


def load_frozen(recipe: Recipe, dtype: torch.dtype, tokenizer_size: int) -> torch.nn.Module:
    """The reference model that the recipe names, ready to score batches.

    Raises:
        RunError: it can't be loaded, or has another vocabulary than the policy.
    """
    from align.forward import bind

    initial = recipe.reference.model == "initial"
    name = None if initial else recipe.reference.model
    config = load_config(recipe.model, name)
    # Weights as the policy has them: rounded to bfloat16 they would be another model than the one named.
    weights = torch.float32 if recipe.lora is None else dtype
    model: torch.nn.Module = load_divided(recipe.model, config, weights, name)
    if model.get_input_embeddings().num_embeddings < tokenizer_size:  # type: ignore[operator]
        raise RunError(
            f"reference.model {name!r} has a smaller vocabulary than the policy's tokenizer ({tokenizer_size} tokens)"
        )
    if initial and recipe.lora is not None and recipe.lora.adapter_name_or_path is not None:
        from align.model import add_adapter

        model = add_adapter(model, recipe.lora)
    bind(model)
    return model
