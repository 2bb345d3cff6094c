"""Log-probabilities of response tokens from hidden states, without ever holding the full logits.

    logp_i = z_i[target_i] − log Σ_v exp z_i[v],    z_i = f(W h_i + b)

and, where an objective declares them, other functions of the same logits (log Σ p², KL to the reference, expectations
over number tokens).

Only the positions that predict a response token come here. They go through the head in chunks, so memory is one chunk
of logits, whatever the batch: log-probs and log Σ p² with a backward pass of their own (``align.head``), anything else
by recomputing the chunk's logits. ``f`` is what some models do beyond a matrix product: scale (Cohere, Granite) and
soft-cap (Gemma-2).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from align.head import Chunks, HeadTransform, target_scores

LOGITS_PER_CHUNK = 2**25
"""Elements of one chunk's logits: 128 MiB in float32."""
MORE_ON_GPUS = 4
"""Times as many there: every chunk reads the whole head, and that must be little beside what is computed with it."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """What turns the states of a batch's response positions into logits, one chunk after the other."""

    states: Float[Tensor, "response hidden"]
    """After the final norm; or the logits themselves, where ``weight`` is None."""
    weight: Float[Tensor, "vocab hidden"] | None = None
    """The head's effective weight; used functionally, so that sharded engines gather it once."""
    bias: Float[Tensor, " vocab"] | None = None
    transform: HeadTransform = field(default_factory=HeadTransform)

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return (self.states.shape[1] if self.weight is None else self.weight.shape[0]) or 1

    def kept(self) -> Head:
        """The same with a copy of the weights, for engines that have them whole only while the head is called."""
        if self.weight is None:
            return self
        return replace(self, weight=self.weight.clone(), bias=None if self.bias is None else self.bias.clone())

    def logits(self, states: Float[Tensor, "response hidden"]) -> Float[Tensor, "response vocab"]:
        """Of some of the states, in float32 or better."""
        if self.weight is None:
            return _at_least_float32(states)
        return _at_least_float32(self.transform(functional.linear(states, self.weight, self.bias)))


@dataclass(frozen=True, kw_only=True)
class HeadExtras:
    """What else than log-probs is wanted of every response token; see ``objectives.needs.EXTRAS``."""

    names: tuple[str, ...] = ()
    numbers: Float[Tensor, " vocab"] | None = None
    """Value of each number token, NaN for all others; where a name begins with ``number``."""
    reference: Head | None = None
    """The reference's head for the same response tokens; where ``ref_kl`` is wanted."""


PLAIN = HeadExtras()


def scores_of_logits(
    logits: Float[Tensor, "response vocab"],
    targets: Int[Tensor, " response"],
    extras: HeadExtras = PLAIN,
    ref_logits: Float[Tensor, "response vocab"] | None = None,
) -> tuple[Float[Tensor, " response"], ...]:
    """log softmax(logits)[target], then the extras in order, in float32 or better."""
    logits = _at_least_float32(logits)
    total = logits.logsumexp(dim=-1)
    scores = [logits.gather(-1, targets[:, None])[:, 0] - total]
    for name in extras.names:
        if name == "log_sum_p2":
            scores.append((2 * (logits.detach() - total.detach()[:, None])).logsumexp(dim=-1))
        elif name == "ref_kl":
            assert ref_logits is not None
            logps = torch.log_softmax(ref_logits, dim=-1)  # without gradient
            scores.append((logps.exp() * (logps - logits)).sum(dim=-1) + total)
        else:
            assert extras.numbers is not None
            scores.append(_number_score(name, logits, targets, extras.numbers))
    return tuple(scores)


def _number_score(name: str, logits: Tensor, targets: Tensor, numbers: Tensor) -> Tensor:
    values = numbers.to(logits)
    own = values[targets]
    if name == "number_value":
        return own
    ids = values.isfinite().nonzero()[:, 0]
    shares = torch.softmax(logits[:, ids], dim=-1)
    if name == "number_mean":
        return (shares * values[ids]).sum(dim=-1)
    assert name == "number_distance", name
    return (shares * (values[ids] - own.nan_to_num()[:, None]).abs()).sum(dim=-1)


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def chunked_scores(
    head: Head, targets: Int[Tensor, " response"], extras: HeadExtras = PLAIN, chunk: int | None = None
) -> dict[str, Float[Tensor, " response"]]:
    """``logps`` (nats) and the extras of each target, float32 (float64 for float64 inputs).

    Args:
        head: the policy's.
        targets: token ids to score.
        extras: what else is wanted.
        chunk: positions per chunk; by default as many as keep a chunk's logits at ``LOGITS_PER_CHUNK`` elements.
    """
    size = chunk or positions_per_chunk(head.vocabulary, head.states.device)
    if head.weight is not None and set(extras.names) <= {"log_sum_p2"}:
        chunks = Chunks(size=size, transform=head.transform, squares=bool(extras.names))
        logps, squares = target_scores(head.states, head.weight, head.bias, targets, chunks)
        return {"logps": logps} | ({} if squares is None else {"log_sum_p2": squares})
    reference = extras.reference

    def score(states: Tensor, weight: Tensor | None, bias: Tensor | None, ids: Tensor, start: int) -> Any:
        ref_logits = None
        if reference is not None:
            with torch.no_grad():
                ref_logits = reference.logits(reference.states[start : start + len(ids)])
        logits = Head(states=states, weight=weight, bias=bias, transform=head.transform).logits(states)
        return scores_of_logits(logits, ids, extras, ref_logits)

    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, len(targets), size):
        states, ids = head.states[start : start + size], targets[start : start + size]
        inputs = (states, head.weight, head.bias, ids, start)
        if torch.is_grad_enabled():
            parts.append(checkpoint(score, *inputs, use_reentrant=False, preserve_rng_state=False))  # type: ignore[arg-type]
        else:
            parts.append(score(*inputs))
    names = ("logps", *extras.names)
    return {name: torch.cat([part[i] for part in parts]) for i, name in enumerate(names)}


def positions_per_chunk(vocabulary: int, device: torch.device) -> int:
    """Positions whose logits are there at a time."""
    most = LOGITS_PER_CHUNK * (MORE_ON_GPUS if device.type == "cuda" else 1)
    return max(1, most // vocabulary)


def head_parameters(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Effective weight and bias of an output head: plain, trained in full by peft, or with LoRA on it.

    Raises:
        ValueError: the head is something else; the model then takes the plain path.
    """
    modules_to_save = getattr(head, "modules_to_save", None)
    if modules_to_save is not None:  # peft trains a full copy of the head
        if getattr(head, "disable_adapters", False):
            return head_parameters(head.original_module)  # type: ignore[arg-type]
        return head_parameters(modules_to_save[head.active_adapters[0]])  # type: ignore[index]
    base = getattr(head, "base_layer", None)
    if base is not None and hasattr(head, "get_delta_weight"):
        weight, bias = head_parameters(base)  # type: ignore[arg-type]
        if getattr(head, "disable_adapters", False) or getattr(head, "merged", False):
            return weight, bias
        if any(getattr(head, "use_dora", {}).values()):
            raise ValueError("DoRA on the output head is not a sum of weights")
        for adapter in head.active_adapters:  # type: ignore[union-attr]
            if adapter in head.lora_A:  # type: ignore[operator]
                weight = weight + head.get_delta_weight(adapter).to(weight.dtype)  # type: ignore[operator]
        return weight, bias
    if isinstance(head, nn.Linear):
        return head.weight, head.bias
    raise ValueError(f"the output head is a {type(head).__name__}, not a linear layer")
