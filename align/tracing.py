"""What one forward and backward pass computes, moves and keeps, found without computing it.

The run's own forward is executed on tensors that have shapes and no contents, so that whatever the architecture does
is counted as it will be done: arithmetic of matrix products and attention, bytes that all other operations read and
write, and the most memory that is in use at any moment. Models are traced with one layer and with two, and the rest
follows, layers being alike.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from align.forward import causal_lm
from align.head import HeadTransform
from data.pack import PackedBatch

FEW = (1, 2)
"""Layers that are traced; what a layer adds is known from both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """Of one microbatch."""

    forward_flops: float
    """Floating-point operations of matrix products and attention in the forward pass; multiply and add are two."""
    total_flops: float
    """With the backward pass, and what it computes again."""
    moved: float
    """Bytes that operations other than matrix products and attention read and write, both passes."""
    calls: float
    """Operations started, both passes."""
    forward: float
    """Most bytes in use at once in the forward pass beside weights and gradients, as the following, without logits."""
    forward_head: float
    """While logits of a chunk are there, but without them."""
    backward: float
    backward_head: float
    logits: float
    """Bytes of all that is as wide as the vocabulary, for one chunk."""
    head: float
    """Operations of a position's logits, where all positions but those of one chunk take them again going back."""
    parameters: float
    trained: float
    parameter_bytes: float
    trained_bytes: float

    @property
    def activations(self) -> float:
        """Most bytes in use at once beside weights and gradients."""
        head = max(self.forward_head, self.backward_head) + self.logits
        return max(self.forward, self.backward, head)

    def __add__(self, other: Traced) -> Traced:
        return Traced(**{name: getattr(self, name) + getattr(other, name) for name in Traced.__slots__})

    def __mul__(self, factor: float) -> Traced:
        return Traced(**{name: getattr(self, name) * factor for name in Traced.__slots__})


MOMENTS = ("forward", "forward_head", "backward", "backward_head")
"""Each has a peak of its own, because which one is highest depends on the number of rows and layers."""


class _Watch(TorchDispatchMode):
    """Counts every operation, and follows every tensor that one makes until it is let go.

    Args:
        known: storages that are there already.
        weights: storages of parameters whose copies in another type are not counted.
        vocabulary: width of the logits that are there a chunk at a time; None where they are not.
    """

    def __init__(self, known: set[int], weights: set[int], vocabulary: int | None) -> None:
        super().__init__()
        self.known, self.weights, self.vocabulary = known, weights, vocabulary
        self.now, self.logits, self.most_logits = 0, 0, 0
        self.moved, self.flops, self.calls = 0, 0, 0
        self.phase = "forward"
        self.peaks: dict[str, float] = dict.fromkeys(MOMENTS, 0.0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.calls += 1
        # Experts' products have a shape rule for bfloat16 alone; here they are asked for in any type.
        if func._overloadpacket is torch.ops.aten._grouped_mm:
            out = _grouped_out(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        made = [value for value in tree_leaves(out) if isinstance(value, Tensor)]
        if func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self.weights:
            self._leave_out(made[0])
        fresh = [value for value in made if self._take(value)]
        formula = ON_CPUS.get(func._overloadpacket) or flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        elif fresh:
            read = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            self.moved += sum(value.nbytes for value in (*read, *made))
        elif func._schema.is_mutable:
            self.moved += 2 * sum(value.nbytes for value in made)
        return out

    def _leave_out(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        self.known.add(storage._cdata)
        weakref.finalize(storage, self.known.discard, storage._cdata)

    def _take(self, value: Tensor) -> bool:
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return False
        self.known.add(key)
        wide = size if value.dim() == 2 and value.shape[1] == self.vocabulary else 0
        self.now, self.logits = self.now + size, self.logits + wide
        self.most_logits = max(self.most_logits, self.logits)
        moment = self.phase + ("_head" if self.logits else "")
        self.peaks[moment] = max(self.peaks[moment], self.now - self.logits)
        weakref.finalize(storage, self._free, key, size, wide)
        return True

    def _free(self, key: int, size: int, wide: int) -> None:
        self.known.discard(key)
        self.now, self.logits = self.now - size, self.logits - wide


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Scores and their product with the values: (line, head, query, size) and the same with keys."""
    lines, heads, queries, size = query.shape
    return 2 * lines * heads * queries * key.shape[2] * (size + value.shape[3])


def _attention_backward(slope: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Scores again, and two products for each of the forward's."""
    return _attention(query, key, value) * 5 // 2


def _grouped_out(left: Tensor, right: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """Products by group: (T, K) and (G, K, N) give (T, N); (K, T) and (T, N) give (G, K, N)."""
    if left.dim() == 2 and right.dim() == 2:
        assert offs is not None
        return left.new_empty(len(offs), left.shape[0], right.shape[1])
    if right.dim() == 2:
        return left.new_empty(left.shape[1], right.shape[1])
    return left.new_empty(*left.shape[:-1], right.shape[2])


def _grouped(left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    """Every row of one operand meets one group of the other."""
    rows, columns = left.shape[-2:]
    return 2 * rows * columns * right.shape[-1] * (left.shape[0] if left.dim() == 3 == right.dim() else 1)


ON_CPUS = {
    torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm],
    torch.ops.aten._grouped_mm: _grouped,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""What torch's registry leaves out."""


def _onto_cpu(model: nn.Module) -> None:
    """Moves a model without contents to where its operations choose the kernels they will have; ties are kept."""
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, value in held.items():
                if value is None:
                    continue
                if id(value) not in moved:
                    fresh = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
                    parameter = isinstance(value, nn.Parameter)
                    moved[id(value)] = nn.Parameter(fresh, requires_grad=value.requires_grad) if parameter else fresh
                held[name] = moved[id(value)]  # type: ignore[assignment]


def _bytes(model: nn.Module) -> float:
    return float(sum(each.nbytes for each in model.parameters()))


def by_layers(config: Any, traced: Callable[[Any], Traced]) -> Traced:
    """What ``traced`` gives for a model, from two with few layers: each further layer adds the same."""
    layers = int(config.get_text_config().num_hidden_layers)
    low, high = (traced(_with_layers(config, number)) for number in FEW)
    return low + (high + low * -1.0) * (layers - 1)


def fewer_layers(config: Any) -> Any:
    """The same model with as many of its first layers as show every kind of layer it has, at least two."""
    text = config.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or [])
    shown = [len(set(kinds[: number + 1])) for number in range(len(kinds))]
    enough = shown.index(len(set(kinds))) + 1 if kinds else 1
    return _with_layers(config, min(max(2, enough), int(text.num_hidden_layers)))


def _with_layers(config: Any, number: int) -> Any:
    changed = copy.deepcopy(config)
    text = changed.get_text_config()
    text.num_hidden_layers = number
    # Where the kinds of layers are worked out from their number they can't be set, and needn't be.
    kinds = getattr(text, "layer_types", None)
    if kinds and len(kinds) != number:
        text.layer_types = (list(kinds) * number)[:number]
    return changed


def trace(
    config: Any,
    batch: PackedBatch,
    *,
    make: Any,
    dtype: torch.dtype,
    checkpointing: bool,
    held: Callable[[nn.Module], float] = _bytes,
    copies: bool = True,
) -> Traced:
    """Counts one microbatch.

    Args:
        config: of the model.
        batch: on the CPU.
        make: builds the bound model from a configuration, on a device where nothing is allocated.
        dtype: of the computation; below float32 it runs under autocast.
        checkpointing: whether activations are computed again.
        held: bytes of a model's weights as the run has them, where they are not as ``make`` makes them.
        copies: whether autocast's copies of the weights take memory; not where an engine has weights in that type.
    """
    with torch.device("meta"):
        model: nn.Module = make(config)
    weights = held(model)
    low = dtype in (torch.bfloat16, torch.float16)
    with _unlogged("torch._subclasses.fake_tensor"), FakeTensorMode(allow_non_fake_inputs=True):
        _onto_cpu(model)
        model.train()
        if checkpointing:
            enable: Any = model.activation_checkpointing_enable
            enable(activation_checkpointing_kwargs={"use_reentrant": False})
        sizes = [(each.numel(), each.nbytes, each.requires_grad) for each in model.parameters()]
        for each in model.parameters():  # gradients are there already, as in most microbatches
            each.grad = torch.zeros_like(each) if each.requires_grad else None
        grads = [each.grad for each in model.parameters() if each.grad is not None]
        own = {each.untyped_storage()._cdata for each in model.parameters()}
        known = own | {each.untyped_storage()._cdata for each in (*model.buffers(), *grads)}
        # Where responses don't share their prompt, all logits are there at once.
        vocabulary = int(config.get_text_config().vocab_size) if batch.shared else None
        with _Watch(known, set() if copies else own, vocabulary) as watch:
            with torch.autocast("cpu", dtype) if low else contextlib.nullcontext():
                found = model(packed=batch)
            forward, watch.phase = watch.flops, "backward"
            (found["values"] if "values" in found else found["logps"]).sum().backward()
    again = "logps" in found and vocabulary is not None and _head_is_trained(model)
    return Traced(
        forward_flops=float(forward),
        total_flops=float(watch.flops),
        moved=float(watch.moved),
        calls=float(watch.calls),
        **watch.peaks,
        logits=float(watch.most_logits),
        head=2.0 * vocabulary * config.get_text_config().hidden_size if again and vocabulary else 0.0,
        parameters=float(sum(number for number, _, _ in sizes)),
        trained=float(sum(number for number, _, grad in sizes if grad)),
        parameter_bytes=weights,
        trained_bytes=float(sum(size for _, size, grad in sizes if grad)),
    )


def _head_is_trained(model: nn.Module) -> bool:
    """And its logits not capped: then none are kept."""
    inner = causal_lm(model)
    capped = HeadTransform.of(inner.config.get_text_config()).softcap is not None
    return not capped and any(each.requires_grad for each in inner.get_output_embeddings().parameters())


@contextlib.contextmanager
def _unlogged(name: str) -> Iterator[None]:
    """What fails is raised as well, and the caller says it."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def without_random_numbers() -> Iterator[None]:
    """Building a model draws weights; the run's own must not depend on whether it was planned."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
