"""Losses from logic: a propositional program compiled by weighted model counting."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from objectives.batch import LegBatch
from objectives.checks import require
from objectives.metrics import preference_metrics
from objectives.needs import Needs, PairForm
from objectives.numerics import log1mexp
from objectives.output import Mean, Output, Term
from objectives.programs import Program, World
from objectives.registry import OBJECTIVES

CERTAIN = -1e-6
"""In 1 − π log-probs are held below this: the opposite of a certain prediction has no probability to speak of."""


@OBJECTIVES.register("symbolic")
@dataclass(frozen=True, kw_only=True)
class Symbolic:
    """A loss compiled from a program over the model's predictions.

        loss = −log σ(β·ρ)    link logistic        loss = (ρ − 1/(2β))²    squared        loss = max(0, β − ρ)    hinge
        ρ = log WMC[(P or A) and C] − log WMC[(not P or A) and C]    (− the same under π_ref, with ``reference``)

    with P the ``program``, C the ``condition``, A the ``addition``, and WMC the sum over satisfying worlds of the
    product of literal probabilities, where ``chosen`` is true with probability π_θ(chosen|x); averaged over rows. See
    ``objectives.programs`` for the language, and ``python -m objectives explain dpo`` for the programs of known losses:
    with DPO's program and ``reduction: sum`` this is ``dpo``.

    Under sums of many log-probs 1 − π is 1 in floating point, and programs that differ in such factors become one (ORPO
    becomes CPO); ``reduction: mean`` takes the geometric mean of a response's token probabilities instead. In 1 − π a
    log-prob counts as at most −1e-6, so that a certain prediction leaves a loss that is finite. UNVERIFIED in the
    paper: the forms of links squared and hinge.

    References:
        Richardson et al. 2024, arXiv:2412.17696.
    """

    program: str
    """P: what should hold, e.g. ``rejected -> chosen``; over chosen, rejected, ref_chosen, ref_rejected."""
    condition: str = "true"
    """C: where it is looked at."""
    addition: str = "false"
    """A: worlds that count for both sides, where C holds."""
    link: str = "logistic"
    """``logistic``, ``squared`` or ``hinge``."""
    beta: float = 1.0
    """β > 0."""
    reduction: str = "mean"
    """``mean`` or ``sum``: how a response's token log-probs become one."""
    reference: bool = False
    """Subtract ρ of the reference, for programs that do not name it."""

    def __post_init__(self) -> None:
        require("beta", self.beta, 0 < self.beta < math.inf, "> 0 and finite")
        require("link", self.link, self.link in ("logistic", "squared", "hinge"), "'logistic', 'squared' or 'hinge'")
        require("reduction", self.reduction, self.reduction in ("mean", "sum"), "'mean' or 'sum'")
        if self.reference and self._names_reference:
            raise ValueError("reference subtracts what this program already names (ref_…); leave one out")
        if not {"chosen", "rejected"} & set(self.compiled.variables):
            raise ValueError("program must speak of chosen or rejected: nothing of it depends on the policy")

    @classmethod
    def example(cls, **keys: object) -> Symbolic:
        """CPO's preference, for tests and lists."""
        defaults = {
            "program": "rejected -> chosen",
            "condition": "chosen or rejected",
            "addition": "chosen and rejected",
        }
        return cls(**{**defaults, **keys})  # type: ignore[arg-type]

    @cached_property
    def compiled(self) -> Program:
        """The program with its worlds."""
        return Program(self.program, self.condition, self.addition)

    @property
    def _names_reference(self) -> bool:
        return any(name.startswith("ref_") for name in self.compiled.variables)

    @property
    def needs(self) -> Needs:
        return Needs(legs=("chosen", "rejected"), reference=self.reference or self._names_reference)

    @property
    def pair_form(self) -> PairForm:
        return PairForm(difference=False, per_token=self.reduction == "mean", own_beta=True)

    @property
    def step0(self) -> float | None:
        if not self.reference:
            return None
        return {"logistic": math.log(2), "squared": 1 / (4 * self.beta**2), "hinge": self.beta}[self.link]

    def __call__(self, batch: LegBatch) -> Output:
        rho = self._rho({name: self._log_prob(batch, name) for name in self.compiled.variables})
        if self.reference:
            own = {name: self._log_prob(batch, f"ref_{name}") for name in self.compiled.variables}
            rho = rho - self._rho(own)
        if self.link == "squared":
            losses = (rho - 1 / (2 * self.beta)) ** 2
        elif self.link == "hinge":
            losses = relu(self.beta - rho)
        else:
            losses = -logsigmoid(self.beta * rho)
        rewards = [self.beta * self._log_prob(batch, leg) for leg in ("chosen", "rejected")]
        per_token = self.reduction == "mean"
        metrics = preference_metrics(batch, rewards[0], rewards[1], self.beta, per_token=per_token)
        return Output(
            terms={"preference": Term(values=losses, per="row")}, metrics={**metrics, "program/rho": Mean.of(rho)}
        )

    def _log_prob(self, batch: LegBatch, variable: str) -> Float[Tensor, " row"]:
        leg = batch[variable.removeprefix("ref_")]
        total = leg.ref_sum_logps() if variable.startswith("ref_") else leg.sum_logps()
        return total / leg.length().clamp(min=1) if self.reduction == "mean" else total

    def _rho(self, log_probs: dict[str, Float[Tensor, " row"]]) -> Float[Tensor, " row"]:
        each = [log_probs[name] for name in self.compiled.variables]
        literals = [(log1mexp(values.clamp(max=CERTAIN)), values) for values in each]  # false, true

        def log_count(worlds: tuple[World, ...]) -> Float[Tensor, " row"]:
            masses = [
                torch.stack([pair[value] for pair, value in zip(literals, world, strict=True)]).sum(dim=0)
                for world in worlds
            ]
            return torch.stack(masses).logsumexp(dim=0)

        return log_count(self.compiled.up) - log_count(self.compiled.down)
