"""Recipes: YAML and command line with the same keys; the command line wins.

    python align/train.py --config dpo.yaml --learning_rate 1e-6 --objective.beta 0.2

Keys that would have no effect are errors of one sentence, as unknown keys and values out of range are (see
``align.settings``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from align.contradictions import SINGLE_DATASET, is_adam, refuse_contradictions, refuse_idle, refuse_idle_reference
from align.errors import RecipeError
from align.keys import TRAINING, Schema
from align.sections import (
    DataSection,
    HubSection,
    LoraSection,
    ModelSection,
    ReferenceSection,
    TrainSection,
)
from align.settings import merge
from align.typed import Entry, entries, section
from objectives import Mixture, Weighting, mixture, weighting
from objectives.modifiers import TRDPO

KINDS = {
    "objective": "objectives",
    "modifiers": "modifiers",
    "token_weights": "token_weights",
    "regularizers": "regularizers",
    "relabel": "relabel",
    "reward_transforms": "reward_transforms",
    "evals": "evals",
    "filter": "filters",
}
"""Named sections to the fields of ``Recipe`` that hold them."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run, described completely."""

    model: ModelSection
    data: DataSection
    train: TrainSection
    objectives: tuple[Entry, ...]
    modifiers: tuple[Entry, ...] = ()
    token_weights: tuple[Entry, ...] = ()
    regularizers: tuple[Entry, ...] = ()
    relabel: tuple[Entry, ...] = ()
    reward_transforms: tuple[Entry, ...] = ()
    filters: tuple[Entry, ...] = ()
    lora: LoraSection | None = None
    reference: ReferenceSection = field(default_factory=ReferenceSection)
    hub: HubSection = field(default_factory=HubSection)
    evals: tuple[Entry, ...] = ()
    """What is measured at the end; see ``evals.evaluation.EVALS``."""
    serving: Any = None
    """What draws samples for it; see ``align.samplers.ServingSection``."""
    idle: tuple[str, ...] = ()
    """Keys of the file that the command line made idle, with the reason: printed at the start."""

    @cached_property
    def mixture(self) -> Mixture:
        """The objectives, with their modifiers, as one."""
        return mixture(
            [(entry.name, entry.built, entry.weight) for entry in self.objectives],
            [(entry.name, entry.built) for entry in self.modifiers],
        )

    @cached_property
    def weighting(self) -> Weighting:
        """The token weights as one."""
        parts = [(entry.name, entry.built) for entry in self.token_weights]
        return weighting(parts, self.mixture.needs.likelihood)

    @property
    def synced(self) -> TRDPO | None:
        """How the reference follows the policy; None where it stands still."""
        return next((entry.built for entry in self.modifiers if isinstance(entry.built, TRDPO)), None)

    @property
    def trains_reward_model(self) -> bool:
        """Whether the model has a scalar head instead of a language model's."""
        return bool(self.mixture.needs.values)

    @property
    def needs_reference(self) -> bool:
        """Whether objectives or token weights read the reference's log-probs."""
        return self.mixture.needs.reference or self.weighting.needs_reference

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, as a mapping that reads back to this recipe."""
        sections = {
            name: dataclasses.asdict(getattr(self, name))
            for name in ("model", "lora", "data", "reference", "train", "hub", "serving")
            if getattr(self, name) is not None
        }
        # How this run was started, not what it is; run again from its own recipe it must not delete itself.
        for key in ("resume_from_checkpoint", "overwrite_output_dir", "allow_recipe_change"):
            del sections["train"][key]
        if not self.needs_reference:
            del sections["reference"]
        if sections["data"]["datasets"] is not None:
            for key in SINGLE_DATASET:
                del sections["data"][key]
        if sections["data"]["eval_dataset_name"] is not None:
            del sections["data"]["eval_share"]
        else:
            del sections["data"]["eval_split"]
        if sections["data"]["rule"] != "threshold":
            del sections["data"]["threshold"]
        if sections["train"]["max_steps"] > 0:
            del sections["train"]["num_train_epochs"]
        if sections["train"]["eval_strategy"] != "steps":
            del sections["train"]["eval_steps"]
        if sections["train"]["save_strategy"] != "steps":
            del sections["train"]["save_steps"]
        if not is_adam(sections):
            for key in ("adam_beta1", "adam_beta2", "adam_epsilon"):
                del sections["train"][key]
        held_out = self.data.eval_dataset_name is not None or self.data.eval_share > 0
        if sections["train"]["eval_strategy"] != "no" and not held_out:
            del sections["train"]["eval_strategy"]
        if not self.model.load_in_4bit:
            for key in ("bnb_4bit_quant_type", "use_bnb_nested_quant"):
                del sections["model"][key]
        if (lora := sections.get("lora")) and lora["adapter_name_or_path"]:
            sections["lora"] = {"adapter_name_or_path": lora["adapter_name_or_path"]}
        named: dict[str, Any] = {
            "objective": [
                {"name": entry.name, "weight": entry.weight, **entry.resolved()} for entry in self.objectives
            ],
            **{
                kind: [{"name": entry.name, **entry.resolved()} for entry in getattr(self, field)]
                for kind, field in KINDS.items()
                if kind != "objective"
            },
        }
        return {**sections, **{name: listed for name, listed in named.items() if listed}}

    def to_yaml(self) -> str:
        """``resolved`` as YAML."""
        return yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True)


def read_recipe(
    config: str | Path | None,
    overrides: Sequence[str] = (),
    schema: Schema = TRAINING,
    without: Sequence[str] = (),
) -> Recipe:
    """Reads a recipe file and the command line's overrides.

    Args:
        config: YAML file; None means the command line says everything.
        overrides: ``--key value``, ``--key=value`` or ``--flag`` (true), as they stand on the command line.
        schema: which keys there are; ``evals.run_settings.TRAINING`` knows evaluations too.
        without: sections that are left out unread.
    Raises:
        RecipeError: one sentence on the first fault found.
    """
    found = merge(config, overrides, schema, without)
    return _build(found.values, found.written, found.commanded, schema)


def _build(values: dict[str, Any], written: Mapping[str, str], commanded: set[str], schema: Schema) -> Recipe:
    idle: list[str] = []
    for required in schema.required:
        if required not in values:
            raise RecipeError(f"the recipe has no {required!r} section; see launch/recipes/dpo.yaml for a complete one")
    refuse_idle(values, written, commanded, idle)
    named: dict[str, tuple[Entry, ...]] = {}
    for kind in schema.named:
        if values.get(kind) is not None:
            named[kind] = entries(kind, values[kind], written, commanded, idle, schema)
    known = schema.sections
    sections = {name: section(known[name], values[name], name) for name in known if values.get(name) is not None}
    recipe = Recipe(**{KINDS[kind]: built for kind, built in named.items()}, **sections)
    where = "objective"
    try:
        mixture([(entry.name, entry.built, entry.weight) for entry in recipe.objectives])
        where = "modifiers" if recipe.modifiers else "objective"
        _ = recipe.mixture.needs
        where = "token_weights"
        _ = recipe.weighting
    except ValueError as error:  # parts that can't go together
        raise RecipeError(f"{where}: {error}") from None
    if not recipe.needs_reference:
        names = ", ".join(entry.name for entry in recipe.objectives)
        refuse_idle_reference(values, names, written, commanded, idle)
        recipe = dataclasses.replace(recipe, reference=ReferenceSection())
    recipe = dataclasses.replace(recipe, idle=tuple(idle))
    refuse_contradictions(recipe, values, written)
    return recipe
