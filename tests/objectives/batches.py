"""Batches for the objectives' tests: built from what an objective declares, and taken apart again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace

import torch
from torch import Tensor

from objectives import OBJECTIVES, Leg, LegBatch, Mixture, Needs, Objective, Stateful

FP64_ROUNDING = {"rtol": 1e-11, "atol": 1e-12}  # the same float64 arithmetic in another order
FP32_ROUNDING = {"rtol": 1e-5, "atol": 1e-6}  # the same float32 arithmetic in another order

PER_TOKEN = ("logps", "mask", "tokens", "ref_logps", "weight")
"""The fields of a leg, all of them ``(row, token)``."""


def build(name: str, **config: object) -> Objective:
    """The objective of that name; one without an argument-free constructor offers ``example()``."""
    cls = OBJECTIVES[name]
    return cls.example() if hasattr(cls, "example") and not config else cls(**config)


def make_leg(
    *,
    generator: torch.Generator,
    rows: int,
    width: int,
    dtype: torch.dtype = torch.float64,
    scale: float = 1.0,
    reference: bool = False,
    weighted: bool = False,
) -> Leg:
    """One leg of random log-probs, ragged lengths from 1 to ``width``, and random junk behind each response.

    Args:
        scale: mean surprise of a token, nats.
        weighted: with token weights, about a third of them zero.
    """

    def surprises() -> Tensor:
        return -scale * torch.empty(rows, width, dtype=dtype).exponential_(generator=generator)

    lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
    # Every draw is made whatever the options, so that batches that differ in one option share the rest.
    logps, ref_logps = surprises(), surprises()
    weight = torch.rand(rows, width, generator=generator, dtype=dtype) * 2
    weight = torch.where(torch.rand(rows, width, generator=generator) < 1 / 3, 0.0, weight)
    return Leg(
        logps=logps,
        mask=torch.arange(width).expand(rows, width) < lengths,
        tokens=torch.randint(0, 100, (rows, width), generator=generator),
        ref_logps=ref_logps if reference else None,
        weight=weight if weighted else None,
    )


def make_batch(
    objective: Objective,
    *,
    seed: int,
    rows: int = 4,
    dtype: torch.dtype = torch.float64,
    scale: float = 1.0,
    weighted: bool = False,
    at_reference: bool = False,
) -> LegBatch:
    """Random legs for exactly what ``objective`` declares; legs differ in width, as they do in training.

    Args:
        at_reference: the policy's log-probs are the reference's.
    """
    assert {field.name for field in fields(Needs)} == {"legs", "reference"}, "teach make_batch what is new in Needs"
    generator = torch.Generator().manual_seed(seed)
    needs = objective.needs
    legs = {}
    for number, name in enumerate(needs.legs):
        leg = make_leg(
            generator=generator,
            rows=rows,
            width=4 + 2 * number,
            dtype=dtype,
            scale=scale,
            reference=needs.reference,
            weighted=weighted,
        )
        if at_reference and leg.ref_logps is not None:
            leg = replace(leg, logps=leg.ref_logps.clone())
        legs[name] = leg
    state = objective.init_state() if isinstance(objective, Stateful) else {}
    return LegBatch(legs=legs, state=state)


def map_legs(batch: LegBatch, change: Callable[[Leg], Leg]) -> LegBatch:
    return replace(batch, legs={name: change(batch[name]) for name in batch})


def map_tensors(leg: Leg, change: Callable[[str, Tensor], Tensor]) -> Leg:
    """The leg with every tensor it has replaced by ``change(field name, tensor)``."""
    present = {key: getattr(leg, key) for key in PER_TOKEN if getattr(leg, key) is not None}
    return replace(leg, **{key: change(key, value) for key, value in present.items()})


def rows_of(batch: LegBatch, index: slice | Tensor) -> LegBatch:
    """Only those rows, in that order."""
    return map_legs(batch, lambda leg: map_tensors(leg, lambda _, values: values[index]))


def with_junk(batch: LegBatch, junk: float) -> LegBatch:
    """The batch with ``junk`` in every floating-point place that no mask covers."""

    def spoil(leg: Leg) -> Leg:
        return map_tensors(
            leg, lambda _, values: torch.where(leg.mask, values, junk) if values.is_floating_point() else values
        )

    return map_legs(batch, spoil)


def with_columns(batch: LegBatch, extra: int) -> LegBatch:
    """The batch with ``extra`` columns of padding: NaN, no mask, some token."""

    def widen(leg: Leg) -> Leg:
        def pad(_: str, values: Tensor) -> Tensor:
            filler = float("nan") if values.is_floating_point() else 0
            return torch.nn.functional.pad(values, (0, extra), value=filler)

        return map_tensors(leg, pad)

    return map_legs(batch, widen)


def with_logps(batch: LegBatch, logps: Mapping[str, Tensor]) -> LegBatch:
    return replace(batch, legs={name: replace(batch[name], logps=logps[name]) for name in batch})


def loss_and_grad(
    objective: Objective | Mixture, batch: LegBatch, counts: Mapping[str, float] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, detached, and its gradient with respect to each leg's policy log-probs.

    Args:
        counts: of the whole step; by default of this batch.
    """
    logps = {name: batch[name].logps.detach().clone().requires_grad_() for name in batch}
    loss = objective(with_logps(batch, logps)).loss(counts if counts is not None else batch.counts())
    slopes = torch.autograd.grad(loss, list(logps.values()), allow_unused=True, materialize_grads=True)
    return loss.detach(), dict(zip(logps, slopes, strict=True))
