"""Log-probabilities of targets under a linear output head, with the backward pass written out.

For logits z = f(W h + b), p = softmax z and an upstream slope g of logp = z[target] − log Σ exp z:

    ∂/∂z = g · (onehot(target) − p),    ∂/∂h = Wᵀ f′(·) ∂/∂z,    ∂/∂W = Σ f′(·) ∂/∂z hᵀ

One buffer holds the logits of a chunk of positions and is used again for the next, in both passes, so that no other
array is as wide as the vocabulary. Where the head is frozen, (onehot − p) W is taken in the forward pass, from logits
that are there anyhow: the backward pass has nothing left to do, and a product in three is saved. Where it is trained,
logits are computed again, but for the last chunk, whose p is still in the buffer when the backward pass begins with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTransform:
    """What a model does to its logits after the matrix product."""

    scale: float = 1.0
    softcap: float | None = None

    @staticmethod
    def of(config: object) -> HeadTransform:
        """Reads a transformers config: ``logit_scale``, ``logits_scaling``, ``final_logit_softcapping``."""
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        return HeadTransform(scale=scale, softcap=getattr(config, "final_logit_softcapping", None))

    def __call__(self, logits: Float[Tensor, "response vocab"]) -> Float[Tensor, "response vocab"]:
        """Scales, then caps."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def apply_(self, logits: Tensor) -> Tensor:
        """The same in place."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunks:
    """How the head is gone through."""

    size: int
    """Positions at a time."""
    transform: HeadTransform
    squares: bool
    """Whether log Σ p² is wanted as well."""


class _Logits:
    """Logits of one chunk of positions or another, in float32 or better, written over one another.

    The first chunk is the one that may be short, so that the last, which the buffer holds longest, never is.
    """

    def __init__(self, states: Tensor, weight: Tensor, bias: Tensor | None, chunks: Chunks, dtype: torch.dtype) -> None:
        self.weight, self.bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        self.states, self.chunks, self.dtype = states, chunks, dtype
        self.precise = torch.promote_types(dtype, torch.float32)
        ends = list(range(len(states), 0, -chunks.size))[::-1]
        self.slices = [slice(max(end - chunks.size, 0), end) for end in ends]
        self._buffer: Tensor | None = None

    def inputs(self, some: slice) -> Tensor:
        """States of a chunk, in the type of the product."""
        return self.states[some].to(self.dtype)

    def __call__(self, some: slice) -> Tensor:
        """Logits of a chunk, until those of another are asked for."""
        states = self.inputs(some)
        if self._buffer is None:
            rows = min(self.chunks.size, len(self.states))
            self._buffer = states.new_empty(rows, len(self.weight))
        logits = torch.mm(states, self.weight.t(), out=self._buffer[: len(states)])
        if self.bias is not None:
            logits.add_(self.bias)
        return self.chunks.transform.apply_(logits).to(self.precise)


class TargetScores(torch.autograd.Function):
    """``apply(states, weight, bias, targets, chunks)`` gives log-probs of the targets, and log Σ p² (without gradient).

    Shapes: (response, hidden), (vocab, hidden), (vocab,) or None, (response,); both results (response,), nats, float32
    or better. Log Σ p² is None where it is not wanted. Under autocast products are taken in its type.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Float[Tensor, "response hidden"],
        weight: Float[Tensor, "vocab hidden"],
        bias: Float[Tensor, " vocab"] | None,
        targets: Int[Tensor, " response"],
        chunks: Chunks,
    ) -> tuple[Tensor, Tensor | None]:
        """Scores, chunk by chunk."""
        kind = states.device.type
        lowered = torch.is_autocast_enabled(kind) and states.dtype != torch.float64
        dtype = torch.get_autocast_dtype(kind) if lowered else states.dtype
        frozen = not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
        capped = chunks.transform.softcap is not None
        ahead = ctx.needs_input_grad[0] and frozen and not capped
        precise = torch.promote_types(dtype, torch.float32)
        scores, totals = (torch.empty(len(targets), dtype=precise, device=states.device) for _ in range(2))
        squares = torch.empty_like(scores) if chunks.squares else None
        slopes = torch.empty_like(states) if ahead else None
        last: tuple[Tensor, Tensor] | None = None
        with torch.autocast(kind, enabled=False):
            logits = _Logits(states, weight, bias, chunks, dtype)
            for some in logits.slices:
                each, ids = logits(some), targets[some, None]
                highest = each.amax(dim=-1)
                own = each.gather(-1, ids)[:, 0] - highest
                odds = each.sub_(highest[:, None]).exp_()
                total = odds.sum(dim=-1)
                last = odds, total
                scores[some] = own - total.log()
                totals[some] = highest + total.log()
                if squares is not None:
                    squares[some] = 2 * (torch.linalg.vector_norm(odds, dim=-1).log() - total.log())
                if slopes is not None:
                    short = _less_one(odds.div_(total[:, None]), ids)
                    slopes[some] = (short.to(dtype) @ logits.weight).mul_(-chunks.transform.scale).to(states.dtype)
        ctx.chunks, ctx.dtype = chunks, dtype
        if slopes is not None:
            ctx.save_for_backward(slopes)
        else:
            ctx.save_for_backward(states, weight, bias, targets, totals)
            # For one backward pass, which writes over it; another computes it again.
            ctx.last = None if capped else last
        if squares is not None:
            ctx.mark_non_differentiable(squares)
        return scores, squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Slopes of states, weight and bias."""
        slope = upstream[0]
        if len(ctx.saved_tensors) == 1:
            (slopes,) = ctx.saved_tensors
            return (slopes * slope[:, None].to(slopes.dtype), None, None, None, None)
        states, weight, bias, targets, totals = ctx.saved_tensors
        transform: HeadTransform = ctx.chunks.transform
        of_states = torch.empty_like(states)
        of_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] and not len(states) else None
        of_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        share = None if ctx.last is None else ctx.last[0].div_(ctx.last[1][:, None])
        ctx.last = None
        with torch.autocast(states.device.type, enabled=False):
            logits = _Logits(states, weight, bias, ctx.chunks, ctx.dtype)
            for some in reversed(logits.slices):
                steep = None
                if share is None:
                    each = logits(some)
                    if transform.softcap is not None:
                        steep = 1 - (each / transform.softcap).square_()
                    share = each.sub_(totals[some, None]).exp_()
                own = _less_one(share, targets[some, None]).mul_(-transform.scale * slope[some, None])
                share = None
                if steep is not None:
                    own.mul_(steep)
                low = own.to(ctx.dtype)
                of_states[some] = (low @ logits.weight).to(states.dtype)
                if of_weight is not None and of_weight.dtype == ctx.dtype:
                    torch.addmm(of_weight, low.t(), logits.inputs(some), out=of_weight)
                elif of_weight is not None:
                    of_weight.add_(low.t() @ logits.inputs(some))
                elif ctx.needs_input_grad[1]:
                    of_weight = (low.t() @ logits.inputs(some)).to(weight.dtype)
                if of_bias is not None:
                    of_bias.add_(own.sum(dim=0))
                del own, low
        return of_states, of_weight, of_bias, None, None


def target_scores(
    states: Float[Tensor, "response hidden"],
    weight: Float[Tensor, "vocab hidden"],
    bias: Float[Tensor, " vocab"] | None,
    targets: Int[Tensor, " response"],
    chunks: Chunks,
) -> tuple[Float[Tensor, " response"], Float[Tensor, " response"] | None]:
    """Log-probs of the targets (nats), and log Σ p² where ``chunks`` wants it; see ``TargetScores``."""
    return TargetScores.apply(states, weight, bias, targets, chunks)  # type: ignore[return-value]


def _less_one(shares: Tensor, ids: Tensor) -> Tensor:
    """p − onehot, in place."""
    return shares.scatter_add_(-1, ids, torch.full_like(ids, -1, dtype=shares.dtype))
