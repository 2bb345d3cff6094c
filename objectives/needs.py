"""What an objective is, and how it says what it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from objectives.batch import LegBatch
from objectives.output import Output


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What data and trainer must supply. What is not declared is not there."""

    legs: tuple[str, ...]
    """Names of the responses, e.g. ``("chosen", "rejected")``."""
    reference: bool = False
    """Whether the frozen reference's log-probs are read."""
    labels: bool = False
    """Whether each row's label (desirable or not) is read."""
    density_ratio: str | None = None
    """Encoder of prompts, where the rows' density ratio is read: ``policy``, a Hub id or a folder; None where not."""
    likelihood: tuple[str, ...] = ()
    """Legs whose likelihood is a term of the loss: those that token weights act on."""
    scores: tuple[str, ...] = ()
    """Scores that every row has: of a leg (``chosen``) or an attribute of the completion (``helpfulness``)."""
    columns: tuple[str, ...] = ()
    """What the data says of every row beside its responses, from ``objectives.columns.COLUMNS``."""
    extras: tuple[str, ...] = ()
    """Numbers per token beyond log-probs, from ``EXTRAS``."""
    values: tuple[str, ...] = ()
    """Outputs of a scalar head, by name: the model is then a reward model, and there are no log-probs."""

    @property
    def numbers(self) -> tuple[str, ...]:
        """Scores and columns: what ``LegBatch.score`` has."""
        return (*self.scores, *self.columns)


EXTRAS = {
    "log_sum_p2": "log Σ_v π_θ(v)², without gradient",
    "ref_kl": "Σ_v π_ref(v)·[log π_ref(v) − log π_θ(v)], with gradient; the reference is then no cached one",
    "number_value": "value of the target where it is a number token, else NaN",
    "number_mean": "expected value under π_θ over number tokens alone, with gradient",
    "number_distance": "expected |value − target's value| under π_θ over number tokens alone, with gradient",
}
"""What the head can supply per response token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairForm:
    """What kind of function of a pair's log-probs a loss is: this decides which modifiers make sense for it."""

    difference: bool
    """Rewards enter through their difference alone, so that what both responses share cancels (log Z(x))."""
    per_token: bool = False
    """Log-probs are taken per token, so that length is accounted for."""
    coupled: bool = False
    """A row's loss depends on the other rows of its step."""
    own_beta: bool = False
    """It sets β itself."""


def form_of(objective: object) -> PairForm | None:
    """The form of a pairwise objective; None for those that are not about pairs."""
    return getattr(objective, "pair_form", None)


@runtime_checkable  # what Mixture holds is checked in tests, as shapes are
class Objective(Protocol):
    """A frozen dataclass whose fields are its recipe keys and whose call is its formula.

    ``step0`` is the loss where policy equals reference, whatever the data, or None where no such constant exists.
    One whose fields have no argument-free default offers ``example()``; one in which a key has no effect beside
    certain others says so in ``idle() -> {key: why}``.
    """

    @property
    def needs(self) -> Needs: ...
    @property
    def step0(self) -> float | None: ...
    def __call__(self, batch: LegBatch) -> Output: ...


@runtime_checkable
class Stateful(Protocol):
    """An objective that remembers something between optimizer steps (a running mean, a threshold).

    The formula sees the state after the step before. ``observe`` maps a microbatch to sums, which the trainer adds over
    microbatches and ranks; ``update`` maps state and sums to the next state. All three are pure.
    """

    def init_state(self) -> Mapping[str, Tensor]: ...
    def observe(self, batch: LegBatch) -> Mapping[str, Tensor]: ...
    def update(self, state: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> Mapping[str, Tensor]: ...


@runtime_checkable
class Coupled(Protocol):
    """An objective whose rows depend on each other (a sort, a filter).

    ``step_pass`` maps a microbatch, without gradient, to numbers per row. They are gathered over the whole step, all
    microbatches and ranks, before any of its losses is computed, and come back as ``batch.step`` with ``batch.place``.
    """

    def step_pass(self, batch: LegBatch) -> Mapping[str, Tensor]: ...


def with_own_step(objective: object, batch: LegBatch) -> LegBatch:
    """The batch as a step of its own, for an objective that is coupled; others get it as it is."""
    if not isinstance(objective, Coupled):
        return batch
    with torch.no_grad():
        step = objective.step_pass(batch)
    if not step:  # a mixture of which no part is coupled
        return batch
    return replace(batch, step=step, place=torch.arange(batch.rows, device=next(iter(step.values())).device))
