"""What goes with what: engine, adapter, precision, reference and objective.

One list of rules, asked at the start of every run and by the table in ``docs/support.md``. What contradicts itself on
any engine is refused when the recipe is read (``align.contradictions``); what is here depends on how it is launched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from align.errors import RecipeError
from align.recipe import Recipe
from objectives import Penalty

ENGINES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A combination that can't work."""

    when: Callable[[Recipe, str], bool]
    """Of a recipe and an engine."""
    why: str
    """The reason, and what to do."""


RULES = (
    Rule(
        when=lambda recipe, engine: engine not in ENGINES,
        why="of FSDP only its second version is supported; set fsdp_version: 2, as launch/accelerate/fsdp2.yaml does",
    ),
    Rule(
        when=lambda recipe, engine: (
            engine.startswith("zero") and any(isinstance(entry.built, Penalty) for entry in recipe.regularizers)
        ),
        why="regularizers add to the gradient of a step, which DeepSpeed has used up by then; launch with fsdp2.yaml "
        "or ddp.yaml, or leave them out",
    ),
    Rule(
        when=lambda recipe, engine: recipe.model.quantized and engine in ("zero3", "fsdp2"),
        why="quantized weights can't be divided among processes; launch with zero2.yaml or ddp.yaml",
    ),
    Rule(
        when=lambda recipe, engine: engine in ("zero1", "zero2", "zero3") and "8bit" in recipe.train.optim,
        why="DeepSpeed divides the optimizer's state itself and can't divide blocks of 8 bits; use train.optim "
        "adamw_torch_fused, or launch with ddp.yaml",
    ),
    Rule(
        when=lambda recipe, engine: engine == "fsdp2" and "8bit" in recipe.train.optim,
        why="FSDP2 keeps optimizer state in parts of parameters and can't divide blocks of 8 bits; use train.optim "
        "adamw_torch_fused, or launch with ddp.yaml",
    ),
)


def reason(recipe: Recipe, engine: str) -> str | None:
    """Why the recipe can't run on the engine; None where it can."""
    return next((rule.why for rule in RULES if rule.when(recipe, engine)), None)


def refuse(recipe: Recipe, engine: str) -> None:
    """Raises ``RecipeError`` where the recipe can't run on the engine it was launched with."""
    why = reason(recipe, engine)
    if why is not None:
        raise RecipeError(f"launched with {engine}: {why}")
