"""From what a model gives for a microbatch to the terms of its loss, and what objectives remember between steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from align.forward import dense
from align.logps import HeadExtras
from data.pack import PackedBatch
from objectives import Leg, LegBatch, Mean, Mixture, Output, Term, Weighting

NO_WEIGHTS = Weighting(parts={}, likelihood=())
LiveReference = Callable[[PackedBatch, bool], Mapping[str, Any]]
"""Maps a batch to what ``align.forward.score`` gives under the reference; True asks for its head too."""


class Losses:
    """The terms of microbatches, and the state of what is minimised.

    Args:
        mixture: what to minimise.
        weighting: of the tokens in likelihood terms, while training.
        outputs: which outputs of a scalar head the objective's values are.
        numbers: value of each number token, NaN elsewhere, on the model's device, for objectives that read them.
        router_coef: of the load-balancing loss that mixture-of-experts models return.
    """

    def __init__(
        self,
        mixture: Mixture,
        weighting: Weighting = NO_WEIGHTS,
        *,
        outputs: Sequence[int] = (),
        numbers: Tensor | None = None,
        router_coef: float = 0.0,
    ) -> None:
        self.mixture, self.weighting, self.outputs, self.router_coef = mixture, weighting, tuple(outputs), router_coef
        self.extras = HeadExtras(names=mixture.needs.extras, numbers=numbers)
        self.state: dict[str, Tensor] = mixture.init_state()
        self.weight_state: dict[str, Tensor] = weighting.init_state()
        self.live_reference: LiveReference | None = None
        """What gives reference log-probs in every step; None where they are cached or not needed."""
        self.observed: dict[str, Tensor] = {}
        """What objectives have seen in the step so far; to be summed over processes."""
        self._row_losses: dict[str, list[Tensor]] = {}

    def legs(self, batch: PackedBatch, scores: Mapping[str, Tensor], reference: Mapping[str, Any] | None) -> LegBatch:
        """Dense legs of a batch from what the model gave; cached reference log-probs come with the batch."""
        needs, legs = self.mixture.needs, {}
        heads = _by_leg(scores["values"][:, self.outputs], batch, needs.values) if "values" in scores else {}
        for name, place in batch.legs.items():
            # A reward model has no log-probs: what reads them gets no number.
            nothing = torch.full(place.mask.shape, torch.nan, device=place.mask.device)
            legs[name] = Leg(
                logps=dense(scores["logps"], batch, name) if "logps" in scores else nothing,
                mask=place.mask,
                tokens=place.tokens,
                ref_logps=place.ref_logps if reference is None else dense(reference["logps"], batch, name),
                weight=place.weight,
                extras={extra: dense(scores[extra], batch, name) for extra in needs.extras},
                values=heads.get(name, {}),
            )
        return LegBatch(
            legs=legs,
            labels=batch.labels,
            density_ratio=batch.density_ratio,
            scores=batch.scores,
            state=self.state,
            step=batch.step,
            place=batch.place,
        )

    def scored(self, model: nn.Module, batch: PackedBatch) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
        """What the model gives for a batch, and what a live reference does; None where it is cached or not needed."""
        whole = "ref_kl" in self.mixture.needs.extras
        reference = None if self.live_reference is None else self.live_reference(batch, whole)
        extras = self.extras if reference is None or not whole else replace(self.extras, reference=reference["head"])
        return model(packed=batch, extras=extras), reference

    def output(
        self, model: nn.Module, batch: PackedBatch, *, weigh: bool, whole_step: bool
    ) -> tuple[Output, LegBatch, Tensor]:
        """Terms and metrics of one microbatch, its legs, and ``nothing_of`` the model's outputs.

        Args:
            model: the wrapped one.
            batch: one microbatch.
            weigh: apply adaptive token weights, as training does and evaluation does not.
            whole_step: the batch is all of its step.
        """
        scores, reference = self.scored(model, batch)
        legs = self.legs(batch, scores, reference)
        if legs.step is None and self.couples:
            legs = self.as_own_step(legs, weigh=weigh)
        logged: dict[str, Mean] = {}
        if weigh:
            legs, logged = self.weighting.apply(legs, self.weight_state, whole_step=whole_step)
        output = self.mixture(legs)
        output = Output(terms=output.terms, metrics={**output.metrics, **logged})
        if "router" in scores:
            coef = self.router_coef / len(batch.legs)
            router = Term(values=scores["router"], per="row", coef=coef)
            output = Output(terms={**output.terms, "router": router}, metrics=output.metrics)
        return output, legs, nothing_of(scores)

    # ---- what couples the rows of a step ----

    @property
    def couples(self) -> bool:
        """Whether a loss depends on the other rows of its step, so that a pass over the step goes before it."""
        return self.mixture.coupled or self.weighting.coupled

    def step_pass(self, legs: LegBatch, *, weigh: bool) -> dict[str, Tensor]:
        """What has to be known of every row of the step."""
        with torch.no_grad():
            found = self.mixture.step_pass(legs)
            return found | self.weighting.step_pass(legs) if weigh else found

    def as_own_step(self, legs: LegBatch, *, weigh: bool) -> LegBatch:
        """A batch that is a step of its own, as in the checks before the first."""
        step = self.step_pass(legs, weigh=weigh)
        return replace(legs, step=step, place=torch.arange(legs.rows, device=legs[next(iter(legs))].mask.device))

    # ---- what is remembered between steps ----

    def observe(self, legs: LegBatch) -> None:
        """Takes down what objectives and weights want to know of a microbatch."""
        for name, value in self.mixture.observe(legs).items():
            value = value.detach()
            self.observed[name] = self.observed[name] + value if name in self.observed else value
        for name, values in self.weighting.observe(legs).items():
            self._row_losses.setdefault(name, []).append(values)

    def finish_step(self, sums: Mapping[str, Tensor], over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Moves the state by what was seen.

        Args:
            sums: ``observed``, summed over processes.
            over_ranks: joins rows of all processes.
        """
        if sums:
            self.state = self.mixture.update(self.state, sums)
        if self.weighting.parts:
            losses = {name: over_ranks(torch.cat(values)) for name, values in self._row_losses.items()}
            self.weight_state = self.weighting.update(self.weight_state, losses)
        self.observed, self._row_losses = {}, {}

    def to(self, device: torch.device) -> None:
        """Moves the state there."""
        self.state = {name: value.to(device) for name, value in self.state.items()}
        self.weight_state = {name: value.to(device) for name, value in self.weight_state.items()}

    def state_dict(self) -> dict[str, Any]:
        """The state, for JSON."""
        return {"objective_state": _to_json(self.state), "weight_state": _to_json(self.weight_state)}

    def load_state_dict(self, stored: Mapping[str, Any]) -> None:
        """Reads it back. Of a changed recipe's objectives some may be new, and begin here."""
        self.state |= _known(_from_json(stored["objective_state"]), self.state)
        self.weight_state |= _known(_from_json(stored["weight_state"]), self.weight_state)


def nothing_of(scores: Mapping[str, Any]) -> Tensor:
    """Zero, as a function of every output of the model that has a gradient.

    A filler batch, whose loss asks for none of them, goes through the backward pass as others do: engines that divide
    weights gather them again for each output, all processes in one order. A log-prob or value that is no number makes
    it NaN, so that the run is stopped; other outputs may have none at tokens that no loss reads.
    """
    outputs = {name: each for name, each in scores.items() if isinstance(each, Tensor) and each.requires_grad}
    main = [0.0 * each.sum() for name, each in outputs.items() if name in ("logps", "values")]
    parts = [*main, *(each.flatten()[:0].sum() for name, each in outputs.items() if name not in ("logps", "values"))]
    return torch.stack(parts).sum() if parts else torch.zeros(())


def _by_leg(values: Tensor, batch: PackedBatch, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Outputs of a scalar head by leg and name, (row,) each."""
    if not len(batch.rows):
        return {leg: {name: values.new_zeros(0) for name in names} for leg in batch.legs}
    by_leg = values.reshape(len(batch.legs), len(batch.rows), -1)
    return {leg: {name: by_leg[i, :, k] for k, name in enumerate(names)} for i, leg in enumerate(batch.legs)}


def _known(stored: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in stored.items() if name in own}


def _to_json(state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        name: {
            "values": [repr(number) for number in value.flatten().tolist()],  # JSON has no infinity
            "shape": list(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."),
        }
        for name, value in state.items()
    }


def _from_json(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        name: torch.tensor([float(number) for number in entry["values"]], dtype=getattr(torch, entry["dtype"])).reshape(
            entry["shape"]
        )
        for name, entry in state.items()
    }
