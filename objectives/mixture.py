"""Several objectives in one loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from objectives.batch import Leg, LegBatch
from objectives.modifiers import Modifier, modified, refuse_contradictions
from objectives.needs import Coupled, Needs, Objective, Stateful
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
            scores=_union(needs.scores for needs in each),
            columns=_union(needs.columns for needs in each),
            extras=_union(needs.extras for needs in each),
            values=_union(needs.values for needs in each),
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
            legs={leg: _as_declared(batch[leg], needs) for leg in needs.legs},
            labels=batch.labels if needs.labels else None,
            density_ratio=batch.density_ratio if needs.density_ratio is not None else None,
            scores={key: batch.scores[key] for key in needs.numbers if key in batch.scores},
            state=_under(prefix, batch.state),
            step=None if batch.step is None else _under(prefix, batch.step),
            place=batch.place,
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
                changed = part.update(_under(f"{name}/", state), _under(f"{name}/", observed))
                updated |= {f"{name}/{key}": value for key, value in changed.items()}
        return updated

    @property
    def coupled(self) -> bool:
        """Whether a part couples the rows of a step, so that ``step_pass`` has to be made."""
        return any(isinstance(part, Coupled) for part in self.parts.values())

    def step_pass(self, batch: LegBatch) -> dict[str, Tensor]:
        """What coupled parts want to know of every row of the step."""
        return {
            f"{name}/{key}": value
            for name, part in self.parts.items()
            if isinstance(part, Coupled)
            for key, value in part.step_pass(self.view(name, batch)).items()
        }


def _under(prefix: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def _union(names: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for each in names for name in each))


def _as_declared(leg: Leg, needs: Needs) -> Leg:
    return replace(
        leg,
        ref_logps=leg.ref_logps if needs.reference else None,
        extras={key: leg.extras[key] for key in needs.extras if key in leg.extras},
        values={key: leg.values[key] for key in needs.values if key in leg.values},
    )


def mixture(objectives: list[tuple[str, Objective, float]], modifiers: Sequence[tuple[str, Modifier]] = ()) -> Mixture:
    """A mixture of ``(name, objective, weight)``; a name that occurs again gets a number.

    Args:
        objectives: what is added up.
        modifiers: each acts on every objective it makes sense for.
    Raises:
        ValueError: a modifier makes sense for none of them, two contradict each other, or parts don't go together.
    """
    refuse_contradictions(modifiers)
    parts: dict[str, Objective] = {}
    weights: dict[str, float] = {}
    idle: dict[str, list[str]] = {name: [] for name, _ in modifiers}
    for name, objective, weight in objectives:
        same = sum(key == name or key.startswith(f"{name}.") for key in parts)
        unique = name if not same else f"{name}.{same + 1}"
        parts[unique], refused = modified(name, objective, modifiers)
        weights[unique] = weight
        for modifier, reason in refused.items():
            idle[modifier].append(f"it makes no sense for {name}: {reason}")
    for modifier, reasons in idle.items():
        if len(reasons) == len(objectives):
            raise ValueError(f"{modifier} has nothing to act on: {'; '.join(dict.fromkeys(reasons))}")
    return Mixture(parts=parts, weights=weights)
