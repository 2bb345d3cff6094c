"""Token weights put together and applied to a batch, as mixtures are of objectives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from objectives.batch import Leg, LegBatch
from objectives.output import Mean
from objectives.sample_weights import SampleWeight, row_losses
from objectives.token_weights import AdaptiveWeight, MaskWeight, TokenWeight

STEP_PREFIX = "token_weights/"
"""Before the names of sample weights in ``LegBatch.step``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighting:
    """The product of several token weights; none of them is a weighting too.

    State is τ by part and leg: of adaptive weights over steps, the median of the step before; of those over the
    dataset, a constant that ``fit`` gives. Of sample weights it is the number of steps taken.
    """

    parts: Mapping[str, TokenWeight]
    """Weight by name."""
    likelihood: tuple[str, ...]
    """Legs with a likelihood term."""

    def legs(self, name: str) -> tuple[str, ...]:
        """The legs that one part acts on."""
        return self.parts[name].legs or self.likelihood

    @property
    def needs_reference(self) -> bool:
        """Whether a part looks at the reference's log-probs."""
        return any(isinstance(part, AdaptiveWeight) and part.over == "dataset" for part in self.parts.values())

    def keep(self, leg: str, tokens: np.ndarray, start: int) -> np.ndarray | None:
        """Which response tokens of one sequence all masks keep; None where no mask acts on this leg.

        Args:
            leg: the response's name.
            tokens: ids of prompt and response.
            start: where the response begins.
        """
        masks = [
            part.keep(tokens, start)
            for name, part in self.parts.items()
            if isinstance(part, MaskWeight) and leg in self.legs(name)
        ]
        return np.logical_and.reduce(masks) if masks else None

    def masked_legs(self) -> tuple[str, ...]:
        """Legs on which some mask acts."""
        return tuple(
            leg
            for leg in self.likelihood
            if any(isinstance(part, MaskWeight) and leg in self.legs(name) for name, part in self.parts.items())
        )

    def _adaptive(self, over: str) -> list[tuple[str, AdaptiveWeight, str]]:
        return [
            (f"{name}/{leg}", part, leg)
            for name, part in self.parts.items()
            if isinstance(part, AdaptiveWeight) and part.over == over
            for leg in self.legs(name)
        ]

    def init_state(self) -> dict[str, Tensor]:
        """τ = ∞ for weights over steps: their first step is unweighted."""
        taus = {key: torch.tensor(torch.inf, dtype=torch.float64) for key, _, _ in self._adaptive("step")}
        return taus | {key: torch.zeros((), dtype=torch.float64) for key, _, _ in self._samples()}

    def _samples(self) -> list[tuple[str, SampleWeight, str]]:
        return [
            (f"{name}/{leg}", part, leg)
            for name, part in self.parts.items()
            if isinstance(part, SampleWeight)
            for leg in self.legs(name)
        ]

    @property
    def coupled(self) -> bool:
        """Whether weights depend on all rows of a step, so that ``step_pass`` has to be made."""
        return bool(self._samples())

    def step_pass(self, batch: LegBatch) -> dict[str, Float[Tensor, " row"]]:
        """Mean loss of every row, nats, for the sample weights of the step."""
        return {f"{STEP_PREFIX}{key}": row_losses(batch[leg]) for key, _, leg in self._samples()}

    def fit(self, losses: Mapping[str, Float[Tensor, " row"]]) -> dict[str, Tensor]:
        """τ of weights over the dataset.

        Args:
            losses: by leg, the reference's mean loss of every training row, nats.
        """
        return {key: part.tau(losses[leg].double()) for key, part, leg in self._adaptive("dataset")}

    def observe(self, batch: LegBatch) -> dict[str, Float[Tensor, " row"]]:
        """What τ of the next step is the median of; microbatches and ranks are concatenated, not added."""
        return {key: part.losses(batch[leg]).double() for key, part, leg in self._adaptive("step")}

    def update(self, state: Mapping[str, Tensor], observed: Mapping[str, Float[Tensor, " row"]]) -> dict[str, Tensor]:
        """The state after a step; a step without rows leaves it."""
        step = {key: part.tau(observed[key]) for key, part, _ in self._adaptive("step") if len(observed[key])}
        return {**state, **step, **{key: state[key] + 1 for key, _, _ in self._samples()}}

    def apply(
        self, batch: LegBatch, state: Mapping[str, Tensor], *, whole_step: bool = False
    ) -> tuple[LegBatch, dict[str, Mean]]:
        """The batch with adaptive weights multiplied into its legs, and what they log.

        Args:
            batch: with masks already in ``Leg.weight``.
            state: τ by part and leg.
            whole_step: the batch is all of the optimizer step, so that τ can be its own median.
        """
        weights: dict[str, Tensor] = {}
        metrics = self._mask_metrics(batch)
        for key, sample, leg in self._samples():
            if float(state[key]) >= sample.warmup_steps:
                step, place = batch.whole_step()
                rows = sample.row_weights(step[f"{STEP_PREFIX}{key}"])[place]
                weight = rows[:, None].expand_as(batch[leg].logps)
                weights[leg] = weights[leg] * weight if leg in weights else weight
                _add(metrics, {"samples/weight": Mean.of(rows), "samples/weight_squared": Mean.of(rows**2)})
        for over in ("step", "dataset", "token"):
            for key, part, leg in self._adaptive(over):
                tau = state.get(key, batch[leg].logps.new_ones(()))
                if over == "step" and whole_step and batch.rows:
                    tau = part.tau(part.losses(batch[leg]))
                weight = part(batch[leg], tau)
                weights[leg] = weights[leg] * weight if leg in weights else weight
                _add(metrics, part.metrics(batch[leg], tau))
        legs = {name: _weighted(batch[name], weights.get(name)) for name in batch}
        for name in weights:
            _add(metrics, {"likelihood/unweighted": _plain(batch[name])})
        return replace(batch, legs=legs), metrics

    def _mask_metrics(self, batch: LegBatch) -> dict[str, Mean]:
        metrics: dict[str, Mean] = {}
        for leg in self.masked_legs():
            dropped = batch[leg].mask & ~batch[leg].counted()
            nll = -batch[leg].logps.detach()
            found = {
                "goldfish/dropped": Mean.of(dropped[batch[leg].mask].to(nll)),
                "goldfish/loss_kept": Mean.of(nll[batch[leg].counted()]),
                "goldfish/loss_dropped": Mean.of(nll[dropped]),
            }
            _add(metrics, found)
        return metrics


def _add(metrics: dict[str, Mean], more: Mapping[str, Mean]) -> None:
    """Adds the metrics of a further leg to those of the legs before."""
    for name, mean in more.items():
        before = metrics.get(name, Mean(total=torch.zeros_like(mean.total), count=0.0))
        metrics[name] = Mean(total=before.total + mean.total, count=before.count + mean.count)


def _weighted(leg: Leg, weight: Float[Tensor, "row token"] | None) -> Leg:
    if weight is None:
        return leg
    weight = weight.clamp(min=torch.finfo(weight.dtype).tiny)  # a product of tiny weights may be zero: other counts
    return replace(leg, weight=weight if leg.weight is None else leg.weight * weight)


def _plain(leg: Leg) -> Mean:
    """Mean loss of the counted tokens, as it would be without adaptive weights."""
    return Mean.of(-leg.logps.detach()[leg.counted()])


def weighting(parts: list[tuple[str, TokenWeight]], likelihood: tuple[str, ...]) -> Weighting:
    """Weights by name.

    Raises:
        ValueError: no leg has a likelihood term, a leg is named that has none or is named twice, or two weights have
            one name.
    """
    named: dict[str, TokenWeight] = {}
    for name, part in parts:
        if not likelihood:
            raise ValueError(f"{name} weighs likelihood terms, and this objective has none")
        for leg in part.legs:
            if leg not in likelihood:
                raise ValueError(f"{name} can't act on {leg!r}: only {', '.join(likelihood)} has a likelihood term")
        if len(set(part.legs)) < len(part.legs):
            raise ValueError(f"{name} lists a leg twice: {', '.join(part.legs)}")
        if name in named:
            raise ValueError(f"{name} is listed twice")
        named[name] = part
    return Weighting(parts=named, likelihood=likelihood)
