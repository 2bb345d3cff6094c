"""β-DPO: one β per step, from how far apart the step's pairs are, and a filter for outliers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from objectives.batch import Leg, LegBatch
from objectives.checks import require
from objectives.needs import Needs, PairForm
from objectives.output import Mean, Output
from objectives.pairs import PAIR_AND_REFERENCE, pair_of, preference
from objectives.registry import OBJECTIVES

LEAST_BETA = 1e-3


@OBJECTIVES.register("beta_dpo")
@dataclass(frozen=True, slots=True, kw_only=True)
class BetaDPO:
    """β-DPO: DPO with a β that grows with the step's mean margin, on the pairs whose margins are not outliers.

        loss = −log σ(β_s·d_i) for the selected rows,    d = logratio(chosen) − logratio(rejected)
        β_s = max(0.001, β·[1 + a·(mean of selected d − μ)])
        rows are selected with probability ∝ exp(−½·((d_i − μ)/σ)²), without replacement

    averaged over the selected rows of the step, (1−ρ)·M of its M rows (rounded down, at least one). μ and σ are running
    means of the steps' mean and standard deviation of d, including this step: μ ← γ·μ + (1−γ)·mean(d), from 0 and
    without bias correction. β_s, μ, σ and the selection carry no gradient. At π_θ = π_ref every row costs log 2.

    d of the whole step comes from a pass without gradient before its losses, so β_s and the selection are one for all
    microbatches and processes. The authors' code draws on each device for itself, from the same gathered weights, and
    fails where all weights underflow; here the draw adds Gumbel noise to log-weights, noise that depends on seed, step
    and the row's tokens alone.

    References:
        Wu et al. 2024, arXiv:2407.08639 (id UNVERIFIED), Eq. 7–9; constants as in the authors' code.
    """

    beta: float = 0.1
    """β before modulation, > 0."""
    modulation: float = 0.6
    """a: relative change of β per nat of mean margin, ≥ 0; 0 keeps β fixed."""
    filtered: float = 0.2
    """ρ: share of a step's rows that are left out, in [0, 1)."""
    momentum: float = 0.9
    """γ of the running statistics, in [0, 1)."""
    seed: int = 0
    """Of the selection."""

    needs: ClassVar[Needs] = PAIR_AND_REFERENCE
    pair_form: ClassVar[PairForm] = PairForm(difference=True, coupled=True, own_beta=True)
    step0: ClassVar[float] = math.log(2)

    def __post_init__(self) -> None:
        require("beta", self.beta, 0 < self.beta < math.inf, "> 0 and finite")
        require("modulation", self.modulation, 0 <= self.modulation < math.inf, ">= 0 and finite, 0.6 in the paper")
        require("filtered", self.filtered, 0 <= self.filtered < 1, "in [0, 1), 0.2 in the paper")
        require("momentum", self.momentum, 0 <= self.momentum < 1, "in [0, 1), 0.9 in the paper")
        require("seed", self.seed, 0 <= self.seed < 2**31, "in [0, 2³¹)")

    def idle(self) -> dict[str, str]:
        """Keys that have no effect beside the others, with the reason."""
        found = {"seed": "with filtered 0 every row is selected"} if not self.filtered else {}
        if not self.filtered and not self.modulation:
            found["momentum"] = "with filtered 0 and modulation 0 this is dpo"
        return found

    def step_pass(self, batch: LegBatch) -> dict[str, Tensor]:
        """Differences of log-ratios, nats, and a number that identifies each row by its tokens."""
        return {"difference": pair_of(batch, self.beta).difference.detach(), "identity": _row_identity(batch)}

    def __call__(self, batch: LegBatch) -> Output:
        step, place = batch.whole_step()
        differences = step["difference"]
        statistics = self.update(batch.state, _moments(differences))
        chosen = self.select(differences, statistics, step["identity"])
        beta = self.beta_of(differences[chosen], statistics["mean"])
        pair = pair_of(batch, beta)
        kept = chosen[place]
        # Averaged over the selected: the trainer divides by all rows of the step.
        losses = torch.where(kept, -logsigmoid(pair.margin), 0.0) * (len(differences) / int(chosen.sum()))
        output = preference(batch, pair, losses)
        constant = losses.new_tensor(beta)
        further = {
            "beta/step": Mean(total=constant * batch.rows, count=float(batch.rows)),
            "beta/selected": Mean.of(kept.to(losses)),
        }
        return Output(terms=output.terms, metrics={**output.metrics, **further})

    def beta_of(self, selected: Float[Tensor, " selected"], mean: Float[Tensor, ""]) -> float:
        """The step's β, from the margins of its selected rows and the running mean, nats."""
        return max(LEAST_BETA, self.beta * (1 + self.modulation * float(selected.double().mean() - mean)))

    def select(
        self,
        differences: Float[Tensor, " step"],
        statistics: Mapping[str, Tensor],
        identity: Int[Tensor, " step"],
    ) -> Bool[Tensor, " step"]:
        """Which rows of the step are learned from."""
        # 10 · (1 − 0.8) is 2, whatever floating point makes of it.
        number = max(1, int(len(differences) * (1 - self.filtered) + 1e-9))
        # At π_θ = π_ref all margins are 0, and so is σ: then all rows are equally good.
        spread = statistics["spread"].clamp(min=1e-12)
        log_weight = -0.5 * ((differences.double() - statistics["mean"]) / spread) ** 2
        # Drawing by log-weight + Gumbel noise is drawing without replacement ∝ weight (Efraimidis and Spirakis 2006).
        uniform = _uniform(_told_apart(identity, differences), self.seed, int(statistics["steps"]))
        order = (log_weight - torch.log(-torch.log(uniform))).argsort(descending=True, stable=True)
        return torch.zeros_like(differences, dtype=torch.bool).index_fill_(0, order[:number], True)

    def init_state(self) -> dict[str, Tensor]:
        """Both running statistics start at 0."""
        return {name: torch.zeros((), dtype=torch.float64) for name in ("mean", "spread", "steps")}

    def observe(self, batch: LegBatch) -> dict[str, Tensor]:
        """Sum, sum of squares and number of this microbatch's margins."""
        return _moments(pair_of(batch, self.beta).difference.detach())

    def update(self, state: Mapping[str, Tensor], observed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Running mean and (unbiased) standard deviation, with this step's."""
        total, squares, count = (observed[name].to(state["mean"]) for name in ("total", "squares", "count"))
        mean = total / count.clamp(min=1)
        variance = (squares - total * mean).clamp(min=0) / (count - 1).clamp(min=1)
        return {
            "mean": self.momentum * state["mean"] + (1 - self.momentum) * mean,
            "spread": self.momentum * state["spread"] + (1 - self.momentum) * variance.sqrt(),
            "steps": state["steps"] + 1,
        }


def _moments(differences: Float[Tensor, " row"]) -> dict[str, Tensor]:
    values = differences.double()
    return {"total": values.sum(), "squares": (values**2).sum(), "count": values.new_tensor(float(len(values)))}


def _row_identity(batch: LegBatch) -> Int[Tensor, " row"]:
    return _identity(batch["chosen"]) * 31 + _identity(batch["rejected"])


def _identity(leg: Leg) -> Int[Tensor, " row"]:
    """A 64-bit polynomial hash of each response's tokens."""
    powers = torch.full_like(leg.tokens, 6364136223846793005).cumprod(dim=-1)  # wraps around, as hashes do
    return torch.where(leg.mask, (leg.tokens + 1) * powers, 0).sum(dim=-1)


def _told_apart(identity: Int[Tensor, " step"], differences: Float[Tensor, " step"]) -> Int[Tensor, " step"]:
    """Gives each of several rows of the same tokens a number of its own, whatever their order."""
    by_difference = differences.argsort(stable=True)
    order = by_difference[identity[by_difference].argsort(stable=True)]
    ordered = identity[order]
    numbers = torch.arange(len(order), device=order.device)
    first = torch.cat([numbers.new_zeros(1), (ordered[1:] != ordered[:-1]).long() * numbers[1:]]).cummax(dim=0).values
    return torch.empty_like(identity).index_put_((order,), ordered + (numbers - first) * 2862933555777941757)


def _uniform(identity: Int[Tensor, " step"], seed: int, step: int) -> Float[Tensor, " step"]:
    """Numbers in (0, 1) that depend on identity, seed and step alone (the mixing of SplitMix64)."""
    salt = (seed * 1_000_003 + step + 1) * 7046029254386353131 % 2**64
    x = identity + (salt - 2**64 if salt >= 2**63 else salt)
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    bits = (x >> 12) & ((1 << 52) - 1)
    return (bits.double() + 0.5) / 2.0**52
