"""Several objectives in one loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from objectives.batch import LegBatch
from objectives.needs import Needs, Objective, Stateful
from objectives.output import Mean, Output, Term


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """A weighted sum of objectives; one objective is a mixture of one.

        loss = Σ_k weight_k · loss_k

    Weights are used as they are, not normalised. Each part sees only what it declared. Where two parts
    name a term or metric alike, the first keeps the name and the other gets its own in front.
    """

    parts: Mapping[str, Objective]
    """Objective by name; names are unique (``dpo``, ``sft``, ``sft.2``)."""
    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        assert self.parts.keys() == self.weights.keys()

    @property
    def needs(self) -> Needs:
        """The union of what the parts need, legs in order of first mention."""
        each = [part.needs for part in self.parts.values()]
        legs = dict.fromkeys(leg for needs in each for leg in needs.legs)
        encoders = dict.fromkeys(needs.density_ratio for needs in each if needs.density_ratio is not None)
        if len(encoders) > 1:
            raise ValueError(f"all objectives must take one prompt encoder, got {', '.join(map(repr, encoders))}")
        return Needs(
            legs=tuple(legs),
            reference=any(needs.reference for needs in each),
            labels=any(needs.labels for needs in each),
            density_ratio=next(iter(encoders), None),
            likelihood=tuple(leg for leg in legs if any(leg in needs.likelihood for needs in each)),
        )

    @property
    def step0(self) -> float | None:
        """Known only where every part's is."""
        total = 0.0
        for name, part in self.parts.items():
            if part.step0 is None:
                return None
            total += self.weights[name] * part.step0
        return total

    def view(self, name: str, batch: LegBatch) -> LegBatch:
        """The batch as part ``name`` may see it: its legs, its state, and of all else only what it declared."""
        needs = self.parts[name].needs
        prefix = f"{name}/"
        return LegBatch(
            legs={leg: batch[leg] if needs.reference else replace(batch[leg], ref_logps=None) for leg in needs.legs},
            labels=batch.labels if needs.labels else None,
            density_ratio=batch.density_ratio if needs.density_ratio is not None else None,
            state={key.removeprefix(prefix): value for key, value in batch.state.items() if key.startswith(prefix)},
        )

    def __call__(self, batch: LegBatch) -> Output:
        outputs = {name: part(self.view(name, batch)) for name, part in self.parts.items()}
        terms: dict[str, Term] = {}
        metrics: dict[str, Mean] = {}
        for name, output in outputs.items():
            for key, term in output.terms.items():
                weighted = replace(term, coef=term.coef * self.weights[name])
                terms[f"{name}/{key}" if key in terms else key] = weighted
            for key, metric in output.metrics.items():
                metrics[f"{name}/{key}" if key in metrics else key] = metric
        return Output(terms=terms, metrics=metrics)

    def init_state(self) -> dict[str, Tensor]:
        """The states of all stateful parts, keyed ``<part>/<name>``."""
        return {
            f"{name}/{key}": value
            for name, part in self.parts.items()
            if isinstance(part, Stateful)
            for key, value in part.init_state().items()
        }

    def observe(self, batch: LegBatch) -> dict[str, Tensor]:
        """What stateful parts want summed over the step."""
        return {
            f"{name}/{key}": value
            for name, part in self.parts.items()
            if isinstance(part, Stateful)
            for key, value in part.observe(self.view(name, batch)).items()
        }

    def update(self, state: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The next state of all stateful parts."""
        updated: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            if isinstance(part, Stateful):
                mine = {key.removeprefix(f"{name}/"): state[key] for key in state if key.startswith(f"{name}/")}
                seen = {key.removeprefix(f"{name}/"): observed[key] for key in observed if key.startswith(f"{name}/")}
                updated |= {f"{name}/{key}": value for key, value in part.update(mine, seen).items()}
        return updated


def mixture(objectives: list[tuple[str, Objective, float]]) -> Mixture:
    """A mixture of ``(name, objective, weight)``; a name that occurs again gets a number."""
    parts: dict[str, Objective] = {}
    weights: dict[str, float] = {}
    for name, objective, weight in objectives:
        same = sum(key == name or key.startswith(f"{name}.") for key in parts)
        unique = name if not same else f"{name}.{same + 1}"
        parts[unique], weights[unique] = objective, weight
    return Mixture(parts=parts, weights=weights)
