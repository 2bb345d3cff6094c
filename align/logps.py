"""Log-probabilities of response tokens from hidden states, without ever holding the full logits.

    logp_i = z_i[target_i] − log Σ_v exp z_i[v],    z_i = f(W h_i + b)

Only the positions that predict a response token come here. They go through the head in chunks whose logits are
recomputed in the backward pass, so memory is one chunk of logits, whatever the batch. ``f`` is what some models do
beyond a matrix product: scale (Cohere, Granite) and soft-cap (Gemma-2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

LOGITS_PER_CHUNK = 2**24
"""Elements of one chunk's logits: 64 MiB in float32."""


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


def logps_of_logits(
    logits: Float[Tensor, "response vocab"], targets: Int[Tensor, " response"]
) -> Float[Tensor, " response"]:
    """log softmax(logits)[target] in float32 or better."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(dim=-1)


def chunked_logps(
    hidden: Float[Tensor, "response hidden"],
    weight: Float[Tensor, "vocab hidden"],
    bias: Float[Tensor, " vocab"] | None,
    targets: Int[Tensor, " response"],
    transform: HeadTransform,
    chunk: int | None = None,
) -> Float[Tensor, " response"]:
    """Log-probability of each target, nats, float32 (float64 for float64 inputs).

    Args:
        hidden: states after the final norm, one per response token.
        weight: the head's effective weight; used functionally, so that sharded engines gather it once.
        bias: the head's bias.
        targets: token ids to score.
        transform: what follows the matrix product.
        chunk: positions per chunk; by default as many as keep a chunk's logits at ``LOGITS_PER_CHUNK`` elements.
    """
    size = chunk or max(1, LOGITS_PER_CHUNK // weight.shape[0])

    def score(states: Tensor, matrix: Tensor, shift: Tensor | None, ids: Tensor) -> Tensor:
        return logps_of_logits(transform(functional.linear(states, matrix, shift)), ids)

    parts = []
    for start in range(0, len(targets), size):
        states, ids = hidden[start : start + size], targets[start : start + size]
        if torch.is_grad_enabled():
            parts.append(checkpoint(score, states, weight, bias, ids, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(score(states, weight, bias, ids))
    return torch.cat(parts)


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
