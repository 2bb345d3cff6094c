"""From a packed batch to per-token log-probs, inside one forward of the (wrapped) model.

``bind`` gives a model a second way to be called, ``model(packed=batch)``. Everything from embeddings to log-probs then
happens inside that one call, which is what data-parallel and sharding engines wrap. Called in any other way the model
is what it was, but for the last bits of its numbers (``align.fused``), so generation and saving do not notice.

Two paths, one result:
  shared    prompts once, the backbone with our masks, only response positions through the chunked head;
  separate  every response with its own prompt through the model's own forward and full logits: for models whose
            layers carry state along the line (Mamba, linear attention) or whose head we don't know.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from align.engines import launched, shards_weights
from align.fused import fuse
from align.head import HeadTransform
from align.logps import PLAIN, Head, HeadExtras, chunked_scores, head_parameters
from align.masks import masks_for
from data.pack import PADDING, PROMPT, PackedBatch


def bind(model: nn.Module) -> None:
    """Lets ``model(packed=batch)`` return log-probs (see ``score``) and, with ``embed=True``, embeddings of prompts.

    Norms, rotations and adapters are fused (``align.fused``), which holds for any call.
    """
    bound = model.forward
    # Of whichever model it is called on, so that copies compute with weights of their own.
    original: Any = getattr(bound, "__func__", lambda _, *arguments, **options: bound(*arguments, **options))

    def forward(
        self: nn.Module, *arguments: Any, packed: PackedBatch | None = None, embed: bool = False, **options: Any
    ) -> Any:
        if packed is None:
            return original(self, *arguments, **options)
        return embed_prompts(self, packed) if embed else score(self, packed, **options)

    model.forward = MethodType(forward, model)  # type: ignore[method-assign]
    outputs = getattr(causal_lm(model), "get_output_embeddings", lambda: None)()
    if outputs is not None:
        _bind_head(outputs)
    fuse(model)


def _bind_head(outputs: nn.Module) -> None:
    """Lets the head score targets in a call of its own: what shards weights has them whole inside a module's call."""

    def forward(self: Any, states: Tensor, *arguments: Any, scoring: Any = None, **options: Any) -> Any:
        if scoring is not None:
            return scoring(self, states)
        return type(self).forward(self, states, *arguments, **options)  # of a copy too, as peft makes them

    outputs.forward = MethodType(forward, outputs)  # type: ignore[method-assign]


def causal_lm(model: nn.Module) -> Any:
    """The transformers model inside a peft wrapper, or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def score(
    model: nn.Module,
    batch: PackedBatch,
    extras: HeadExtras = PLAIN,
    *,
    keep_head: bool = False,
    keep_states: bool = False,
) -> dict[str, Any]:
    """Log-probs of the batch's response tokens.

    Args:
        model: bound.
        batch: what to score.
        extras: numbers per response token besides log-probs.
        keep_head: also return ``head``, for a policy that is compared with this model's whole distributions.
        keep_states: also return ``states``, what the head turns into logits, one per entry of ``batch.target``.
    Returns:
        ``logps``: one per entry of ``batch.target``, nats, float32; each extra likewise. For mixture-of-experts models
        also ``router``: the load-balancing loss summed over the batch's sequences (a prompt with one response each).
        For reward models instead ``values``: outputs at the last token of every response, leg by leg, row by row,
        (leg · row, output).
    """
    inner = causal_lm(model)
    config = inner.config.get_text_config()
    options = {"output_router_logits": True} if router_weight(config) else {}
    value_head = getattr(inner, "score", None)
    if value_head is not None:
        states, outputs = _states(model, inner, batch, options)
        found: dict[str, Any] = {"values": value_head(states[last_positions(batch)]).float()}
    else:
        if batch.shared:
            states, outputs = _states(model, inner, batch, options)

            def scoring(module: nn.Module, states: Tensor) -> dict[str, Any]:
                weight, bias = head_parameters(module)
                head = Head(states=states, weight=weight, bias=bias, transform=HeadTransform.of(config))
                return _scored(head, batch, extras, keep_head)

            predicting = states[batch.source]
            found = inner.get_output_embeddings()(predicting, scoring=scoring)
            if keep_states:
                found["states"] = predicting
        else:
            if keep_states:
                options = {**options, "output_hidden_states": True}
            # The original forward, not the bound one: this call does not pass ``packed``.
            outputs = model.forward(**_plain_inputs(batch), **options)
            found = _scored(Head(states=outputs.logits.flatten(0, 1)[batch.source]), batch, extras, keep_head)
            if keep_states:
                found["states"] = outputs.hidden_states[-1].flatten(0, 1)[batch.source]
    if "output_router_logits" in options:
        found["router"] = _router_loss(outputs.router_logits, batch, config)
    return found


def _scored(head: Head, batch: PackedBatch, extras: HeadExtras, keep_head: bool) -> dict[str, Any]:
    found: dict[str, Any] = chunked_scores(head, batch.target, extras)
    if keep_head:
        found["head"] = head.kept() if shards_weights(launched()) else head
    return found


def _states(model: nn.Module, inner: Any, batch: PackedBatch, options: dict[str, Any]) -> tuple[Tensor, Any]:
    """States after the final norm, (position, hidden), and what the model returned besides."""
    if not batch.shared and getattr(inner, "score", None) is not None:
        outputs = _decoder(inner)(**_plain_inputs(batch), **options)
        return outputs.last_hidden_state.flatten(0, 1), outputs
    if not batch.shared:
        outputs = model.forward(**_plain_inputs(batch), output_hidden_states=True, **options)
        return outputs.hidden_states[-1].flatten(0, 1), outputs
    outputs = _decoder(inner)(
        input_ids=batch.input_ids,
        attention_mask=masks_for(inner.config.get_text_config(), batch),
        position_ids=batch.position_ids,
        use_cache=False,
        **options,
    )
    return outputs.last_hidden_state.flatten(0, 1), outputs


def _plain_inputs(batch: PackedBatch) -> dict[str, Any]:
    """For a model's own forward: a sequence per line."""
    return {"input_ids": batch.input_ids, "attention_mask": (batch.row_ids != PADDING).long(), "use_cache": False}


def last_positions(batch: PackedBatch) -> Tensor:
    """Flat position of the last token of every response, leg by leg, row by row.

    A dummy batch has no response; any position of it does.
    """
    lasts = [place.last for place in batch.legs.values()]
    return torch.cat(lasts) if len(batch.rows) else batch.source[:1]


def embed_prompts(model: nn.Module, batch: PackedBatch) -> dict[str, Tensor]:
    """Embeddings of the batch's prompts.

    Returns:
        ``prompts``: mean of the last hidden states over each row's prompt, (row, hidden), float32.
    """
    hidden, _ = _states(model, causal_lm(model), batch, {})
    flat, rows = hidden.float(), batch.row_ids.flatten()
    of_prompt = batch.leg_ids.flatten() == PROMPT
    means = [flat[(rows == row) & of_prompt].mean(0) for row in batch.rows.tolist()]
    return {"prompts": torch.stack(means) if means else flat.new_zeros((0, flat.shape[-1])) + 0.0 * flat.sum()}


def _decoder(inner: Any) -> Any:
    decoder = inner.base_model if getattr(inner, "score", None) is not None else inner.get_decoder()
    if decoder is inner:
        raise ValueError(f"{type(inner).__name__} has no decoder apart from its head")
    return decoder


def router_weight(config: Any) -> float:
    """The model's coefficient of its router loss; 0 for models without routers."""
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return float(getattr(config, "router_aux_loss_coef", None) or 0.0) if experts else 0.0


def _router_loss(router_logits: tuple[Tensor, ...], batch: PackedBatch, config: Any) -> Float[Tensor, ""]:
    """Load-balancing loss of every sequence, summed over sequences.

        loss(sequence) = E · Σ_e f_e · P_e

    f_e is how often expert e is among a token's top k (summed over the k choices), P_e its mean routing probability,
    both over all layers and all tokens of one prompt with one response. It is taken per sequence, as the model itself
    gives it when it sees that sequence alone, because a loss over a microbatch would depend on how a step is split.

    References:
        Fedus et al. 2021, arXiv:2101.03961, Eq. 4–6, with the top-k count of transformers' Mixtral.
    """
    experts = int(getattr(config, "num_local_experts", None) or config.num_experts)
    logits = torch.stack([layer.reshape(-1, experts) for layer in router_logits])  # (layer, token, expert)
    probabilities = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    top = torch.topk(probabilities, int(config.num_experts_per_tok), dim=-1).indices
    chosen = torch.zeros_like(probabilities).scatter(-1, top, 1.0).sum(0)  # (token, expert), choices over layers
    routed = probabilities.sum(0)
    row, leg = batch.row_ids.flatten(), batch.leg_ids.flatten()
    total = logits.new_zeros((), dtype=probabilities.dtype)
    for number in batch.rows.tolist():
        for name in range(1, len(batch.legs) + 1):
            member = (row == number) & ((leg == name) | (leg == 0))
            if not batch.shared:  # each sequence is a line with its own copy of the prompt
                lines = (batch.row_ids == number).any(1) & (batch.leg_ids == name).any(1)
                member = (lines[:, None] & (batch.row_ids == number)).flatten()
            tokens = member.sum() * len(router_logits)
            # Multiplied, not selected: a shape that depends on the data would make a GPU wait for the host.
            at = member[:, None]
            total = total + experts * ((at * chosen).sum(0) / tokens * (at * routed).sum(0) / tokens).sum()
    return total


def dense(flat: Float[Tensor, " response"], batch: PackedBatch, leg: str) -> Float[Tensor, "row token"]:
    """One leg's ``(row, token)`` matrix of the flat log-probs; zero outside its mask."""
    place = batch.legs[leg]
    if not len(batch.rows):
        return flat.new_zeros(place.slot.shape)
    return torch.where(place.mask, flat[place.slot], 0.0)
