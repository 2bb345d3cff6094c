"""Batches for the objectives' tests: built from what an objective declares, and taken apart again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace

import torch
from jaxtyping import config
from torch import Tensor
from torch.testing import assert_close

from objectives import COLUMNS, OBJECTIVES, Column, Leg, LegBatch, Mixture, Needs, Objective, Stateful, with_own_step
from tests.objectives.transcriptions import Ragged

FP64_ROUNDING = {"rtol": 1e-11, "atol": 1e-12}  # the same float64 arithmetic in another order
FP32_ROUNDING = {"rtol": 1e-5, "atol": 1e-6}  # the same float32 arithmetic in another order
TRANSCRIPTION = {"rtol": 1e-11, "atol": 1e-13}  # float64 on both sides; sums in another order
SIX_PLACES = {"abs": 5.1e-7}  # numbers written with six places
BY_HAND = {"rel": 1e-9}  # ten digits are written down

PER_TOKEN = ("logps", "mask", "tokens", "ref_logps", "weight", "share", "ref_share")
"""The fields of a leg that are ``(row, token)``, besides its extras."""

PER_ROW = ("labels", "density_ratio")
"""What a batch knows of each row, besides its legs and scores."""

EXTRA_RANGES = {
    "log_sum_p2": (-2.0, 0.0),
    "ref_kl": (0.0, 3.0),
    "number_value": (0.0, 9.0),
    "number_mean": (0.0, 9.0),
    "number_distance": (0.0, 9.0),
}
"""What the numbers per token can be."""


def build(name: str, **config: object) -> Objective:
    """The objective of that name; one without an argument-free constructor offers ``example()``."""
    cls = OBJECTIVES[name]
    return cls.example(**config) if hasattr(cls, "example") else cls(**config)


def make_leg(
    *,
    generator: torch.Generator,
    rows: int,
    width: int,
    dtype: torch.dtype = torch.float64,
    scale: float = 1.0,
    reference: bool = False,
    weighted: bool = False,
    extras: tuple[str, ...] = (),
    values: tuple[str, ...] = (),
) -> Leg:
    """One leg of random log-probs, ragged lengths from 1 to ``width``, and random junk behind each response.

    Args:
        scale: mean surprise of a token, nats.
        weighted: with token weights, about a third of them zero.
        extras: numbers per token to make up, each in its range.
        values: outputs of a scalar head.
    """

    def surprises() -> Tensor:
        return -scale * torch.empty(rows, width, dtype=dtype).exponential_(generator=generator)

    lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
    # Every draw is made whatever the options, so that batches that differ in one option share the rest.
    logps, ref_logps = surprises(), surprises()
    weight = torch.rand(rows, width, generator=generator, dtype=dtype) * 2
    weight = torch.where(torch.rand(rows, width, generator=generator) < 1 / 3, 0.0, weight)
    leg = Leg(
        logps=logps,
        mask=torch.arange(width).expand(rows, width) < lengths,
        tokens=torch.randint(0, 100, (rows, width), generator=generator),
        ref_logps=ref_logps if reference else None,
        weight=weight if weighted else None,
    )
    uniform = {name: torch.rand(rows, width, generator=generator, dtype=dtype) for name in EXTRA_RANGES}
    number = torch.rand(rows, width, generator=generator) < 0.5
    number[:, 0] = True  # every response begins with a number token
    made = {name: low + (high - low) * uniform[name] for name, (low, high) in EXTRA_RANGES.items()}
    made["number_value"] = torch.where(number, made["number_value"].round(), math.nan)
    heads = {name: torch.randn(rows, generator=generator, dtype=dtype) * 2 for name in values}
    return replace(leg, extras={name: made[name] for name in extras}, values=heads)


def make_column(column: Column, *, generator: torch.Generator, rows: int, dtype: torch.dtype) -> Tensor:
    """Numbers that the column can hold; of two rows or more the first two have its first two words."""
    if column.words:
        numbers = torch.tensor(list(column.words.values()), dtype=dtype)
        drawn = torch.randint(0, len(numbers), (rows,), generator=generator)
        drawn[:2] = torch.arange(2)[:rows] if rows > 1 else drawn[:2]
        return numbers[drawn]
    return column.lowest + (column.highest - column.lowest) * torch.rand(rows, generator=generator, dtype=dtype)


def make_batch(
    objective: Objective,
    *,
    seed: int,
    rows: int = 4,
    dtype: torch.dtype = torch.float64,
    scale: float = 1.0,
    weighted: bool = False,
    at_reference: bool = False,
    later: bool = False,
) -> LegBatch:
    """Random legs for exactly what ``objective`` declares; legs differ in width, as they do in training.

    Two rows or more hold both labels. Density ratios are spread evenly, on a logarithmic scale, over [0.05, 20].

    Args:
        weighted: with token weights, on legs with a likelihood term.
        at_reference: the policy's log-probs are the reference's.
        later: not the state at the beginning, but one after a step.
    """
    known = {"legs", "reference", "labels", "density_ratio", "likelihood", "scores", "columns", "extras", "values"}
    assert {field.name for field in fields(Needs)} == known, "teach make_batch what is new in Needs"
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
            weighted=weighted and name in needs.likelihood,
            extras=needs.extras,
            values=needs.values,
        )
        if at_reference and leg.ref_logps is not None:
            extras = {**leg.extras}
            if "ref_kl" in extras:
                extras["ref_kl"] = torch.zeros_like(leg.logps)
            leg = replace(leg, logps=leg.ref_logps.clone(), extras=extras)
        legs[name] = leg
    labels = torch.rand(rows, generator=generator) < 0.5
    if rows > 1:
        first, second = torch.randperm(rows, generator=generator)[:2]
        labels[first], labels[second] = True, False
    spread = torch.rand(rows, generator=generator, dtype=dtype)
    batch = LegBatch(
        legs=legs,
        labels=labels if needs.labels else None,
        density_ratio=0.05 * 400**spread if needs.density_ratio is not None else None,
        scores={
            **{name: torch.randn(rows, generator=generator, dtype=dtype) * 2 for name in needs.scores},
            **{name: make_column(COLUMNS[name], generator=generator, rows=rows, dtype=dtype) for name in needs.columns},
        },
        state=objective.init_state() if isinstance(objective, Stateful) else {},
    )
    batch = after_a_step(objective, batch) if later else batch
    return with_own_step(objective, batch)


def after_a_step(objective: Objective, batch: LegBatch) -> LegBatch:
    """The batch with the state after a step in which the policy found all responses twice as easy as the reference.

    So running means of log-ratios, and what is clamped at zero, are above zero.
    """
    if not isinstance(objective, Stateful):
        return batch
    ahead = map_legs(batch, lambda leg: leg if leg.ref_logps is None else replace(leg, logps=leg.ref_logps / 2))
    return replace(batch, state=objective.update(batch.state, objective.observe(ahead)))


def map_legs(batch: LegBatch, change: Callable[[Leg], Leg]) -> LegBatch:
    return replace(batch, legs={name: change(batch[name]) for name in batch})


def map_tensors(leg: Leg, change: Callable[[str, Tensor], Tensor]) -> Leg:
    """The leg with every tensor it has replaced by ``change(field name, tensor)``."""
    present = {key: getattr(leg, key) for key in PER_TOKEN if getattr(leg, key) is not None}
    extras = {key: change(key, value) for key, value in leg.extras.items()}
    return replace(leg, **{key: change(key, value) for key, value in present.items()}, extras=extras)


def map_known(batch: LegBatch, change: Callable[[Tensor], Tensor]) -> LegBatch:
    """The batch with what it knows of each row, as far as it does, replaced."""
    present = {key: getattr(batch, key) for key in PER_ROW if getattr(batch, key) is not None}
    scores = {key: change(values) for key, values in batch.scores.items()}
    values = {
        name: replace(batch[name], values={key: change(each) for key, each in batch[name].values.items()})
        for name in batch
    }
    changed = {key: change(values) for key, values in present.items()}
    return replace(batch, **changed, scores=scores, legs=values)


def tensors_of(batch: LegBatch) -> dict[str, Tensor]:
    """Every tensor of the batch, by where it is."""
    found: dict[str, Tensor] = {}
    for name in batch:
        leg = batch[name]
        present = {key: getattr(leg, key) for key in PER_TOKEN if getattr(leg, key) is not None}
        found |= {f"{name}/{key}": values for key, values in {**present, **leg.extras, **leg.values}.items()}
    found |= {key: getattr(batch, key) for key in (*PER_ROW, "place") if getattr(batch, key) is not None}
    for kind in ("scores", "state", "step"):
        found |= {f"{kind}/{key}": values for key, values in (getattr(batch, kind) or {}).items()}
    return found


def rows_of(batch: LegBatch, index: slice | Tensor) -> LegBatch:
    """Only those rows, in that order; a step they are part of stays whole."""
    legs = map_legs(batch, lambda leg: map_tensors(leg, lambda _, values: values[index]))
    part = map_known(legs, lambda values: values[index])
    return part if part.place is None else replace(part, place=part.place[index])


def in_float64(batch: LegBatch) -> LegBatch:
    def double(values: Tensor) -> Tensor:
        return values.double() if values.is_floating_point() else values

    doubled = map_known(map_legs(batch, lambda leg: map_tensors(leg, lambda _, values: double(values))), double)
    step = None if batch.step is None else {key: double(values) for key, values in batch.step.items()}
    return replace(doubled, step=step)


def with_junk(batch: LegBatch, junk: float) -> LegBatch:
    """The batch with ``junk`` in every floating-point place that no mask covers, and other tokens there."""

    def spoil(leg: Leg) -> Leg:
        def spoiled(_: str, values: Tensor) -> Tensor:
            if values.is_floating_point():
                return torch.where(leg.mask, values, junk)
            return values if values.dtype == torch.bool else torch.where(leg.mask, values, values + 12345)

        return map_tensors(leg, spoiled)

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


def inputs_of(batch: LegBatch) -> dict[str, Tensor]:
    """What an objective may differentiate through: log-probs by leg, numbers per token and head values by leg/name."""
    found: dict[str, Tensor] = {name: batch[name].logps for name in batch}
    for name in batch:
        for key, values in batch[name].extras.items():
            if key not in ("number_value", "log_sum_p2"):
                found[f"{name}/{key}"] = values
        found |= {f"{name}/{key}": values for key, values in batch[name].values.items()}
    return found


def with_inputs(batch: LegBatch, inputs: Mapping[str, Tensor]) -> LegBatch:
    """The batch with those of its inputs replaced."""

    def own(name: str, present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: inputs.get(f"{name}/{key}", values) for key, values in present.items()}

    legs = {
        name: replace(
            batch[name],
            logps=inputs.get(name, batch[name].logps),
            extras=own(name, batch[name].extras),
            values=own(name, batch[name].values),
        )
        for name in batch
    }
    return replace(batch, legs=legs)


def loss_and_grad(
    objective: Objective | Mixture, batch: LegBatch, counts: Mapping[str, float] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, detached, and its gradient with respect to everything in ``inputs_of``: by leg, and leg/name.

    Args:
        counts: of the whole step; by default of this batch.
    """
    inputs = {name: values.detach().clone().requires_grad_() for name, values in inputs_of(batch).items()}
    loss = objective(with_inputs(batch, inputs)).loss(counts if counts is not None else batch.counts())
    slopes = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, materialize_grads=True)
    return loss.detach(), dict(zip(inputs, slopes, strict=True))


@contextmanager
def without_shape_checks() -> Iterator[None]:
    """For hundreds of evaluations of the same thing, most of whose time the checks of shapes would be."""
    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", False)


def make_rows(logps: list[list[float]], ref_logps: list[list[float]] | None = None) -> Leg:
    """A leg from rows of any lengths, float64, NaN behind each; tokens are zeros."""
    width = max(map(len, logps))
    padded = torch.tensor([row + [float("nan")] * (width - len(row)) for row in logps], dtype=torch.float64)
    lengths = torch.tensor([[len(row)] for row in logps])
    return Leg(
        logps=padded,
        mask=torch.arange(width) < lengths,
        tokens=torch.zeros_like(padded, dtype=torch.int64),
        ref_logps=None if ref_logps is None else make_rows(ref_logps).logps,
    )


def ragged(values: Tensor, leg: Leg) -> Ragged:
    """The numbers of each response as a list, without padding: what transcriptions take."""
    return [row[kept].tolist() for row, kept in zip(values, leg.mask, strict=True)]


def four(batch: LegBatch) -> list[Ragged]:
    """Log-probs of chosen and rejected responses, then the reference's: what transcriptions of pairs take."""
    legs = [batch[name] for name in ("chosen", "rejected")]
    return [*(ragged(leg.logps, leg) for leg in legs), *(ragged(leg.ref_logps, leg) for leg in legs)]


def two(batch: LegBatch) -> list[Ragged]:
    """The same without a reference."""
    return [ragged(batch[name].logps, batch[name]) for name in ("chosen", "rejected")]


def one_row() -> LegBatch:
    """One row of 2 and 1 tokens: log-ratios 1 (0.5 in each token) and −1, log-probs −3 and −3."""
    chosen, rejected = make_rows([[-1.0, -2.0]], [[-1.5, -2.5]]), make_rows([[-3.0]], [[-2.0]])
    return LegBatch(legs={"chosen": chosen, "rejected": rejected})


def apart(chosen: list[float], rejected: list[float] | None = None) -> LegBatch:
    """Rows of one token each with these log-ratios; of rejected responses 0 unless given."""
    down = rejected if rejected is not None else [0.0 for _ in chosen]
    ratios = {"chosen": chosen, "rejected": down}
    legs = {name: make_rows([[r - 1.0] for r in each], [[-1.0] for _ in each]) for name, each in ratios.items()}
    return LegBatch(legs=legs)


def row_losses(objective: Objective, batch: LegBatch) -> list[float]:
    """The preference term, row by row."""
    return objective(batch).terms["preference"].values.tolist()


def assert_transcribed(
    objective: Objective, batch: LegBatch, expected_loss: float, expected_grad: Mapping[str, Ragged]
) -> None:
    """Loss and gradient are a transcription's; what it does not differentiate by gets no gradient.

    Args:
        objective: what is checked.
        batch: its input.
        expected_loss: the transcription's.
        expected_grad: by every response token, of log-probs under the leg's name, of other numbers under leg/name.
    """
    loss, grad = loss_and_grad(objective, batch)
    assert set(expected_grad) <= set(grad)
    assert math.isclose(loss.item(), expected_loss, rel_tol=1e-11, abs_tol=1e-13)
    for name, slopes in grad.items():
        leg = batch[name.partition("/")[0]]
        zeros = [[0.0] * int(length) for length in leg.length()]
        flat = torch.tensor([slope for row in expected_grad.get(name, zeros) for slope in row], dtype=torch.float64)
        assert_close(slopes[leg.mask], flat, **TRANSCRIPTION)


def means(objective: Objective | Mixture, batch: LegBatch) -> dict[str, float]:
    """The value of every metric."""
    return {name: metric.total.item() / metric.count for name, metric in objective(batch).metrics.items()}


TV1 = {
    "chosen": make_rows([[-0.5, -1.0, -1.5], [-2.0, -0.25]], [[-0.75, -1.25, -1.0], [-1.5, -0.5]]),
    "rejected": make_rows([[-1.25, -0.75], [-0.5, -1.0, -2.0, -0.5]], [[-1.0, -0.5], [-0.75, -1.5, -1.75, -1.0]]),
    "gold": make_rows([[-0.25, -0.75, -0.5], [-1.0, -1.5]]),
}
"""Two rows whose losses are known to six digits: log-ratios 0 and −0.25 of chosen, −0.5 and 1 of rejected."""


def tv1(*legs: str) -> LegBatch:
    return LegBatch(legs={name: TV1[name] for name in legs})


def tv1_labelled(**known: Mapping[str, Tensor] | Tensor) -> LegBatch:
    """Its four responses one by one: two desirable ones, then two undesirable ones."""
    logps = [row for name in ("chosen", "rejected") for row in ragged(TV1[name].logps, TV1[name])]
    ref_logps = [row for name in ("chosen", "rejected") for row in ragged(TV1[name].ref_logps, TV1[name])]
    labels = torch.tensor([True, True, False, False])
    return LegBatch(legs={"completion": make_rows(logps, ref_logps)}, labels=labels, **known)
