"""What an objective is, and how it says what it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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
