"""Token weights: which tokens likelihood terms learn from, and how much.

Weights multiply into ``Leg.weight``, which ``nll()`` reads and margins do not; their order does not matter. There are
two kinds. A **mask** (goldfish) looks at token ids only, may be zero, and is made with the batch, so that the counts a
loss is divided by are known before the forward. An **adaptive** weight (TALR, FLOW) looks at log-probs, is positive,
carries no gradient and changes no count.

Evaluation uses no weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from objectives.batch import Leg
from objectives.checks import require
from objectives.output import Mean
from objectives.registry import TOKEN_WEIGHTS
from objectives.sample_weights import SampleWeight

TABLE_SIZE = 1_000_003
TABLE_SEED = 2_971_215_073


@runtime_checkable
class MaskWeight(Protocol):
    """Keeps or drops tokens by their ids."""

    @property
    def legs(self) -> tuple[str, ...]: ...
    def keep(self, tokens: np.ndarray, start: int) -> np.ndarray: ...


@runtime_checkable
class AdaptiveWeight(Protocol):
    """Weighs tokens by their log-probs, relative to a temperature τ: the median of some rows' losses.

    ``losses`` gives the numbers that τ is the median of, one per row. ``over`` says of which rows: ``step``, those of
    one optimizer step, again in each; ``dataset``, all training rows, once, under the reference; ``token``, of none: τ
    is 1.
    """

    over: ClassVar[str]

    @property
    def legs(self) -> tuple[str, ...]: ...
    def losses(self, leg: Leg) -> Float[Tensor, " row"]: ...
    def tau(self, losses: Float[Tensor, " row"]) -> Float[Tensor, ""]: ...
    def __call__(self, leg: Leg, tau: Float[Tensor, ""]) -> Float[Tensor, "row token"]: ...
    def metrics(self, leg: Leg, tau: Float[Tensor, ""]) -> Mapping[str, Mean]: ...


TokenWeight = MaskWeight | AdaptiveWeight | SampleWeight


@TOKEN_WEIGHTS.register("goldfish")
@dataclass(frozen=True, slots=True, kw_only=True)
class Goldfish:
    """Goldfish loss: a fixed subset of tokens is never learned, so that no passage can be recited from memory.

        weight_t = 0 if table[(x_{t−h+1} · … · x_t) mod 1000003] < 1/k else 1      strategy hash
        weight_t = 0 if t − 1 − start is a multiple of k else 1    strategy static

    The likelihood term is then averaged over the tokens that are kept. With ``hash`` a passage loses the same tokens
    wherever it stands, because the window of h tokens (which ends with the token itself and spans the prompt) decides;
    tokens with fewer than h before them are kept. With ``static`` a passage at another offset loses other tokens. t
    counts the tokens of prompt and response, from 0.

    Known properties of the published hash, kept so that masks equal the authors': the product does not depend on the
    order of the window, wraps around in 64 bits, and is 0 for a window that holds token id 0, which is therefore
    dropped for every k ≤ 4. The table is drawn on the CPU, whatever computes, so that masks are equal on all machines.
    Another tokenizer means other masks.

    References:
        Hans et al. 2024, arXiv:2406.10209; hash and table as in the authors' code (``hash-table``).
    """

    k: int = 4
    """One token in k is dropped, on average; ≥ 2."""
    h: int = 13
    """Length of the window in tokens, ≥ 1; the paper's experiments use 13, its code 4."""
    strategy: str = "hash"
    """``hash`` or ``static``."""
    start: int = 0
    """Offset of the tokens that ``static`` drops, in [0, k)."""
    legs: tuple[str, ...] = ()
    """Legs it acts on; empty means every leg with a likelihood term."""

    def __post_init__(self) -> None:
        require("k", self.k, self.k >= 2, ">= 2")
        require("h", self.h, self.h >= 1, ">= 1")
        require("strategy", self.strategy, self.strategy in ("hash", "static"), "'hash' or 'static'")
        require("start", self.start, 0 <= self.start < self.k, f"in [0, k), k = {self.k}")

    def idle(self) -> dict[str, str]:
        """Keys that have no effect beside the others, with the reason."""
        key = "start" if self.strategy == "hash" else "h"
        return {key: f"strategy {self.strategy} has none"}

    def keep(self, tokens: np.ndarray, start: int) -> np.ndarray:
        """Which response tokens of one sequence are learned.

        Args:
            tokens: ids of prompt and response, integers.
            start: where the response begins.
        Returns:
            Booleans, one per response token.
        """
        response = np.arange(start, len(tokens))
        if self.strategy == "static":
            return ((response - 1 - self.start) % self.k != 0) | (response == 0)
        kept = np.ones(len(response), dtype=bool)
        first = max(start, self.h)
        if first < len(tokens):
            windows = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.int64), self.h)
            with np.errstate(over="ignore"):
                keys = windows[first - self.h + 1 :].prod(axis=-1) % TABLE_SIZE
            kept[first - start :] = goldfish_table()[keys] >= np.float32(1 / self.k)
        return kept


@lru_cache(maxsize=1)
def goldfish_table() -> np.ndarray:
    """The authors' table of 1,000,003 uniform numbers, float32."""
    generator = torch.Generator(device="cpu").manual_seed(TABLE_SEED)
    return torch.rand(TABLE_SIZE, generator=generator, device="cpu").numpy()


@TOKEN_WEIGHTS.register("talr")
@dataclass(frozen=True, slots=True, kw_only=True)
class TALR:
    """Token-Adaptive Loss Reweighting: tokens the model finds improbable are learned more gently.

        weight_t = max(π_θ(y_t)^{1/τ}, w_min),    τ = median over rows of the row's mean −log π_θ(y_t)

    detached; the likelihood term is still divided by the number of tokens, so it is at most the plain one and the
    effective learning rate falls. τ is the median (of an even number of rows the mean of the middle two) of this step's
    rows where a step is one microbatch on one device, else of the step's before; the very first such step is
    unweighted. An easy token weighs about 1, one with a loss of τ weighs 1/e.

    UNVERIFIED: the paper's w_min (0.01 is an independent implementation's). That implementation's lower limit of 1e-6
    on probabilities is not needed: w_min is the limit here.

    References:
        Lin et al. 2025, arXiv:2509.20758.
    """

    over: ClassVar[str] = "step"

    min_weight: float = 0.01
    """w_min, in (0, 1]: keeps hard tokens learnable."""
    min_tau: float = 1e-6
    """Lower limit of τ, nats, > 0: on data that is known by heart every weight would fall to w_min."""
    legs: tuple[str, ...] = ()
    """Legs it acts on; empty means every leg with a likelihood term."""

    def __post_init__(self) -> None:
        require("min_weight", self.min_weight, 0 < self.min_weight <= 1, "in (0, 1]")
        require("min_tau", self.min_tau, 0 < self.min_tau < math.inf, "> 0 and finite")

    def losses(self, leg: Leg) -> Float[Tensor, " row"]:
        """Mean loss of each row under the policy, nats; rows without tokens are left out."""
        return _row_losses(leg.logps.detach(), leg)

    def tau(self, losses: Float[Tensor, " row"]) -> Float[Tensor, ""]:
        """The median of the rows' losses, nats; infinite for no rows."""
        return median(losses).clamp(min=self.min_tau)

    def __call__(self, leg: Leg, tau: Float[Tensor, ""]) -> Float[Tensor, "row token"]:
        # In float32 a tiny limit would be zero, and so would weights, which changes the counts, or τ, which makes NaN.
        tiny = torch.finfo(leg.logps.dtype).tiny
        weights = torch.exp(leg.logps.detach() / tau.to(leg.logps).clamp(min=tiny))
        weights = weights.clamp(min=max(self.min_weight, tiny))
        return torch.where(leg.mask, weights, 1.0)

    def metrics(self, leg: Leg, tau: Float[Tensor, ""]) -> dict[str, Mean]:
        """τ, the weights, how many are at the floor, and how probable the tokens are."""
        weights, counted = self(leg, tau)[leg.mask], leg.mask.sum().item()
        found = {
            "talr/weight": Mean.of(weights),
            "talr/at_floor": Mean.of((weights <= self.min_weight).to(weights)),
            "talr/easy_tokens": Mean.of((leg.logps[leg.mask] > math.log(0.2)).to(weights)),
        }
        if counted and bool(tau.isfinite()):
            found["talr/tau"] = Mean(total=tau.to(weights) * counted, count=float(counted))
        return found


@TOKEN_WEIGHTS.register("flow")
@dataclass(frozen=True, slots=True, kw_only=True)
class FLOW:
    """FLOW: samples that the initial model already finds probable weigh more, so that less of it is forgotten.

        weight_t = exp(−f/τ),    f = the row's mean −log π_ref(y_t),    τ = median of f over the training rows

    The same for all tokens of a row and for the whole run; the likelihood term is still divided by the number of
    tokens. f and τ come from the cached log-probs of the reference, which is the initial policy.

    References:
        Sanyal et al. 2025, arXiv:2502.02797, and the authors' code.
    """

    over: ClassVar[str] = "dataset"

    legs: tuple[str, ...] = ()
    """Legs it acts on; empty means every leg with a likelihood term."""

    def losses(self, leg: Leg) -> Float[Tensor, " row"]:
        """Mean loss of each row under the reference, nats; rows without tokens are left out."""
        if leg.ref_logps is None:
            raise ValueError("flow weighs rows by the reference's log-probs, and there are none")
        return _row_losses(leg.ref_logps.detach(), leg)

    def tau(self, losses: Float[Tensor, " row"]) -> Float[Tensor, ""]:
        """The median of the rows' losses, nats."""
        return median(losses).clamp(min=1e-6)

    def __call__(self, leg: Leg, tau: Float[Tensor, ""]) -> Float[Tensor, "row token"]:
        length = leg.length()
        mean = -leg.ref_sum_logps() / length.clamp(min=1)
        # exp underflows for rows hundreds of times harder than the median; a weight of zero would change the counts.
        weights = torch.exp(-mean / tau.to(mean)).clamp(min=torch.finfo(mean.dtype).tiny)
        return torch.where(leg.mask, weights[:, None], 1.0)

    def metrics(self, leg: Leg, tau: Float[Tensor, ""]) -> dict[str, Mean]:
        """The mean weight over rows."""
        return {"flow/weight": Mean.of(self(leg, tau)[:, 0])} if leg.logps.shape[1] else {}


@TOKEN_WEIGHTS.register("dft")
@dataclass(frozen=True, slots=True, kw_only=True)
class DFT:
    """Dynamic Fine-Tuning: each token is weighed by its own probability.

        weight_t = π_θ(y_t|x, y_<t)

    detached; the likelihood term is still divided by the number of tokens. It is TALR with τ = 1 and no lower limit.
    The gradient of a token's term is that of π_θ itself: what the policy finds all but impossible is not learned, so
    there is no cold start for unseen answers.

    References:
        Wu et al. 2025, arXiv:2508.05629, Eq. 9; TRL's SFTTrainer with ``loss_type: dft``.
    """

    over: ClassVar[str] = "token"

    legs: tuple[str, ...] = ()
    """Legs it acts on; empty means every leg with a likelihood term."""

    def losses(self, leg: Leg) -> Float[Tensor, " row"]:
        """None: no temperature is estimated."""
        return leg.logps.new_zeros(0)

    def tau(self, losses: Float[Tensor, " row"]) -> Float[Tensor, ""]:
        """1."""
        return losses.new_ones(())

    def __call__(self, leg: Leg, tau: Float[Tensor, ""]) -> Float[Tensor, "row token"]:
        # A probability that underflows would change the counts.
        weights = torch.exp(leg.logps.detach()).clamp(min=torch.finfo(leg.logps.dtype).tiny)
        return torch.where(leg.mask, weights, 1.0)

    def metrics(self, leg: Leg, tau: Float[Tensor, ""]) -> dict[str, Mean]:
        """The mean weight over tokens."""
        return {"dft/weight": Mean.of(self(leg, tau)[leg.mask])}


def median(values: Float[Tensor, " row"]) -> Float[Tensor, ""]:
    """The mean of the middle two for an even number of values, where ``torch.median`` takes the lower; ∞ for none."""
    if not len(values):
        return values.new_tensor(math.inf)
    ordered = values.sort().values
    return (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2


def _row_losses(logps: Float[Tensor, "row token"], leg: Leg) -> Float[Tensor, " nonempty"]:
    lengths = leg.mask.sum(dim=-1)
    sums = -torch.where(leg.mask, logps, 0.0).sum(dim=-1)
    return sums[lengths > 0] / lengths[lengths > 0]
