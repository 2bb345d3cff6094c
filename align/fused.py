"""What surrounds a layer's matrix products, in fewer passes over memory, with gradients written out.

    norms      RMSNorm of float32: one tensor is kept for the backward pass where autograd keeps two
    rotations  rotary embeddings in float32: no copies of half a head, and no zeros to add gradients into
    adapters   LoRA on a frozen linear layer, in any type: one product adds the adapter's output to the layer's

Each takes the place of a module's own ``forward`` where it gives the same values and gradients: norms and rotations are
tried on a few numbers first, so that those which compute something else (Gemma's weights beginning at zero, interleaved
rotations) stay what they are. Adapters are known by
their type, and by what is set on them at each call.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from align.engines import launched, shards_weights

_ROTATION = "apply_rotary_pos_emb"
"""What attention calls in transformers, and in code of the Hub written after it."""


class _Switch:
    on = True


def fuse(model: nn.Module) -> dict[str, int]:
    """Replaces forwards of the model's modules.

    Returns:
        How many ``norms``, ``rotations`` and ``adapters``.
    """
    done: dict[str, int] = {"norms": 0, "rotations": 0, "adapters": 0}
    peft = sys.modules.get("peft.tuners.lora.layer")
    # Gathering a divided layer's weights is done by calls of its parts, which a fused adapter does not make.
    adapted = peft.Linear if peft is not None and not shards_weights(launched()) else None
    for module in model.modules():
        if "forward" in vars(module):
            continue
        if type(module) is adapted:
            kind, forward = "adapters", _adapted
        elif _is_rms_norm(module):
            kind, forward = "norms", _normed
        elif (rotating := _rotating(type(module))) is not None:
            kind, forward = "rotations", rotating
        else:
            continue
        module.forward = MethodType(forward, module)  # type: ignore[method-assign]
        done[kind] += 1
    return done


def unfuse(model: nn.Module) -> int:
    """Gives modules their own forwards back; how many."""
    ours = {_adapted, _normed, *filter(None, map(_rotating, {type(module) for module in model.modules()}))}
    fused = [each for each in model.modules() if getattr(vars(each).get("forward"), "__func__", None) in ours]
    for module in fused:
        del module.forward
    return len(fused)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Within it, fused modules compute as they would by themselves."""
    before, _Switch.on = _Switch.on, False
    try:
        yield
    finally:
        _Switch.on = before


def _ours(*tensors: Tensor) -> bool:
    """Whether norms and rotations of these are fused: in lower precision modules round in places of their own."""
    return _Switch.on and all(each.dtype == torch.float32 for each in tensors)


# Norms


class _RMSNorm(torch.autograd.Function):
    """y = w · x / √(mean x² + ε)."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        size = states.shape[-1]
        inverse = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
        inverse = inverse.square_().div_(size).add_(epsilon).rsqrt_()
        ctx.save_for_backward(states, weight, inverse)
        return (states * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        states, weight, inverse = ctx.saved_tensors
        (slope,) = slopes
        size = states.shape[-1]
        unit = states * inverse
        product = slope * unit
        of_weight = product.reshape(-1, size).sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, of_weight, None
        along = (product @ weight).unsqueeze(-1).div_(size)
        of_states = torch.mul(slope, weight, out=product).addcmul_(unit, along, value=-1).mul_(inverse)
        return of_states, of_weight, None


def _normed(self: Any, states: Tensor, *arguments: Any, **options: Any) -> Tensor:
    if arguments or options or not _ours(states, self.weight):
        return type(self).forward(self, states, *arguments, **options)
    return _RMSNorm.apply(states, self.weight, _epsilon(self))  # type: ignore[no-any-return]


def _epsilon(module: nn.Module) -> float | None:
    """Of what may be an RMSNorm: a module with one weight, a vector, and nothing else."""
    weights, others = module._parameters, (module._modules, module._buffers)
    weight = weights.get("weight")
    if len(weights) != 1 or weight is None or weight.dim() != 1 or any(others):
        return None
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found if isinstance(found, float) else None


_NORMS: dict[tuple[type[nn.Module], str], bool] = {}
"""Whether modules of a class, with what it says of itself, are RMSNorms."""


def _is_rms_norm(module: nn.Module) -> bool:
    epsilon, kind = _epsilon(module), (type(module), module.extra_repr())
    if epsilon is None:
        return False
    if kind not in _NORMS:

        def own(states: Tensor, weight: Tensor) -> Tensor:
            return torch.func.functional_call(module, {"weight": weight}, (states,))  # type: ignore[no-any-return]

        _NORMS[kind] = _equal(own, lambda states, weight: _RMSNorm.apply(states, weight, epsilon), (3, 8), (8,))
    return _NORMS[kind]


# Rotations


class _Rotations(torch.autograd.Function):
    """(a, b) becomes (a · cos − b · sin, b · cos + a · sin), a and b being the halves of a head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        first, second = sin.chunk(2, -1)
        return _turned(query, cos, first, second, 1.0), _turned(key, cos, first, second, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, -1)
        of_query, of_key = (_turned(slope, cos, second, first, -1.0) for slope in slopes)
        return of_query, of_key, None, None


def _turned(states: Tensor, cos: Tensor, sin: Tensor, other: Tensor, sign: float) -> Tensor:
    """``states · cos``, from whose first half the second is taken, times ``sin``, and the other way round added."""
    turned = torch.empty_like(states)
    (first, second), (into_first, into_second) = states.chunk(2, -1), turned.chunk(2, -1)
    torch.mul(states, cos, out=turned)
    into_first.addcmul_(second, sin, value=-sign)
    into_second.addcmul_(first, other, value=sign)
    return turned


def _rotate(
    own: Callable[..., Any], query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *arguments: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    # Rotations of a part of each head are narrower than heads.
    whole = cos.dim() == 3 and query.shape[-1] == key.shape[-1] == cos.shape[-1] == sin.shape[-1]
    fixed = not (cos.requires_grad or sin.requires_grad)
    if arguments or options or not whole or not fixed or not _ours(query, key, cos, sin):
        return own(query, key, cos, sin, *arguments, **options)  # type: ignore[no-any-return]
    return _Rotations.apply(query, key, cos.unsqueeze(1), sin.unsqueeze(1))  # type: ignore[no-any-return]


@functools.cache
def _rotating(kind: type[nn.Module]) -> FunctionType | None:
    """The class's forward with our rotation in place of its own; None where it has none, or another."""
    forward = kind.forward
    if not isinstance(forward, FunctionType) or _ROTATION not in forward.__code__.co_names:
        return None
    own = forward.__globals__.get(_ROTATION)
    if own is None:
        return None

    def tried(function: Callable[..., Any], query: Tensor, key: Tensor, angles: Tensor) -> Tensor:
        angles = angles.detach()
        return torch.stack(function(query, key, angles.cos(), angles.sin()))

    def ours(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return _Rotations.apply(query, key, cos.unsqueeze(1), sin.unsqueeze(1))  # type: ignore[no-any-return]

    shapes = (2, 3, 5, 8), (2, 3, 5, 8), (2, 5, 8)
    if not _equal(functools.partial(tried, own), functools.partial(tried, ours), *shapes):
        return None
    names = {**forward.__globals__, _ROTATION: functools.partial(_rotate, own)}
    changed = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    changed.__kwdefaults__ = forward.__kwdefaults__
    return changed


# Adapters


class _Adapted(torch.autograd.Function):
    """y = x·Wᵀ + b + s · d·Aᵀ·Bᵀ, where d is x or x after dropout; W and b are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        dropped: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
    ) -> Tensor:
        flat = states.reshape(-1, states.shape[-1])
        seen = flat if dropped is None else dropped.reshape(flat.shape)
        low = seen @ down.t()
        ctx.save_for_backward(seen, low, weight, down, up)
        ctx.scale, ctx.same = scale, dropped is None
        found = nn.functional.linear(flat, weight, bias).addmm_(low, up.t(), alpha=scale)
        return found.view(*states.shape[:-1], found.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        seen, low, weight, down, up = ctx.saved_tensors
        shape = (*slopes[0].shape[:-1], seen.shape[-1])
        slope = slopes[0].reshape(-1, slopes[0].shape[-1])
        of_low = (slope @ up).mul_(ctx.scale)
        of_down, of_up = of_low.t() @ seen, (slope.t() @ low).mul_(ctx.scale)
        of_states = of_dropped = None
        if ctx.needs_input_grad[0]:
            of_states = slope @ weight
            if ctx.same:
                of_states.addmm_(of_low, down)
            of_states = of_states.view(shape)
        if not ctx.same and ctx.needs_input_grad[1]:
            of_dropped = (of_low @ down).view(shape)
        return of_states, of_dropped, None, None, of_down, of_up, None


def _adapted(self: Any, states: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """peft's ``lora.Linear.forward``, for one adapter on a linear layer."""
    base, active = self.base_layer, self.active_adapters
    own = (
        not _Switch.on
        or arguments
        or options
        or self.disable_adapters
        or self.merged
        or len(active) != 1
        or active[0] not in self.lora_A
        or active[0] in self.lora_variant  # DoRA and others
        or type(base) is not nn.Linear
        or base._forward_hooks
        or base._forward_pre_hooks
        or any(each.requires_grad for each in base.parameters())
        or self.lora_B[active[0]].bias is not None
    )
    if not own:
        (name,) = active
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        device = states.device.type
        computed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
        if torch.is_autocast_enabled(device):
            states, down, up = states.to(computed), down.to(computed), up.to(computed)
        if {states.dtype, down.dtype, up.dtype, base.weight.dtype} == {computed}:
            dropout = self.lora_dropout[name]
            dropped = None if isinstance(dropout, nn.Identity) or not dropout.training else dropout(states)
            scale = self.scaling[name]
            return _Adapted.apply(states, dropped, base.weight, base.bias, down, up, scale)  # type: ignore[no-any-return]
    return type(self).forward(self, states, *arguments, **options)  # type: ignore[no-any-return]


def _equal(own: Callable[..., Tensor], ours: Callable[..., Tensor], *shapes: tuple[int, ...]) -> bool:
    """Whether both give the same values and gradients for tensors of these shapes."""
    with torch.device("cpu"), torch.enable_grad():
        numbers = [torch.linspace(-2.0, 3.0, torch.Size(shape).numel()).reshape(shape).sin() for shape in shapes]
        results = []
        for function in (own, ours):
            given = [each.clone().requires_grad_() for each in numbers]
            try:
                found = function(*given)
                found.mul(torch.arange(1.0, found.numel() + 1).reshape(found.shape)).sum().backward()
            except (TypeError, ValueError, RuntimeError, AttributeError):
                return False  # it takes something else
            results.append([found, *(each.grad for each in given if each.grad is not None)])
    return len(results[0]) == len(results[1]) and all(
        torch.allclose(one, other, rtol=1e-5, atol=1e-5) for one, other in zip(*results, strict=True)
    )
