"""Tiny models of many architectures, random token tables, and float64 that stays float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from align.forward import bind
from data.store import TokenTable
from data.tokens import TokenRow

VOCABULARY = 96
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_HEADS = {**_SHAPE, "head_dim": 8}
_EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.02}

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_HEADS),
    "llama-tied": lambda: LlamaConfig(**_HEADS, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_HEADS),
    "mistral-window": lambda: MistralConfig(**_HEADS, sliding_window=6),
    "gemma2-window-softcaps": lambda: Gemma2Config(
        **_HEADS, sliding_window=6, attn_implementation="eager", query_pre_attn_scalar=8, attn_logit_softcapping=5.0
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    ),
    "cohere-scaled-head": lambda: CohereConfig(**_SHAPE, logit_scale=0.25),
    "granite-scaled-head": lambda: GraniteConfig(**_SHAPE, logits_scaling=3.0),
    "mixtral-experts": lambda: MixtralConfig(**_HEADS, num_local_experts=4, sliding_window=None, **_EXPERTS),
    "qwen3-experts": lambda: Qwen3MoeConfig(**_HEADS, moe_intermediate_size=16, num_experts=4, **_EXPERTS),
}
"""Architectures whose layers let responses share their prompt."""


def mamba() -> PretrainedConfig:
    """State-space layers: nothing can be shared."""
    return MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4, eos_token_id=2)


def model_of(config: PretrainedConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.nn.Module:
    """Random weights, large enough that attention and soft-caps matter; bound, in eval mode."""
    torch.manual_seed(seed)
    config._experts_implementation = "eager"  # the grouped kernel has no float64
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "conv" not in name:
                parameter.mul_(4.0)
    bind(model)
    return model


def random_table(legs: tuple[str, ...] = ("chosen", "rejected"), rows: int = 3, seed: int = 0) -> TokenTable:
    """Rows of unequal lengths; responses as short as one token."""
    rng = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(int(t) for t in rng.integers(3, VOCABULARY, rng.integers(low, high)))

    return TokenTable.of(
        [
            TokenRow(prompt=tokens(2, 20), legs={leg: tokens(1, 13) for leg in legs}, source="random", index=i)
            for i in range(rows)
        ],
        legs,
    )


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Models ask for float32 by name inside norms and softmax; here they get float64, so that 1e-9 can be asked for."""
    saved = torch.float32, torch.float, torch.Tensor.float
    torch.float32 = torch.float = torch.float64  # type: ignore[misc]
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = saved  # type: ignore[misc, method-assign]
