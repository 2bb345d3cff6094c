"""What is foretold of quantized weights is what they take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from align import forecast as forecasting
from align.forecast import look_ahead, skeleton
from align.forward import bind
from align.model import load_config, load_weights
from align.quantized import bytes_held, quantized_weights, weights_held
from align.recipe import read_recipe
from align.sections import ModelSection
from align.tracing import without_random_numbers
from tests.align.tiny import CONFIGS, random_table
from tests.equivalence.worlds import save_model

pytest.importorskip("bitsandbytes")
KINDS: dict[str, dict[str, Any]] = {
    "4bit": {"load_in_4bit": True},
    "4bit-nested": {"load_in_4bit": True, "use_bnb_nested_quant": True},
    "8bit": {"load_in_8bit": True},
}
SIZES: dict[str, dict[str, Any]] = {
    "even": {"hidden_size": 64, "intermediate_size": 128},
    # Blocks and blocks of blocks that are not full.
    "odd": {"hidden_size": 192, "intermediate_size": 1000, "num_attention_heads": 4, "num_key_value_heads": 2},
    "tied": {"hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": True},
}


def tensors(value: Any) -> list[torch.Tensor]:
    """All that a parameter holds: itself, its scales and its tables."""
    found = [value]
    state = getattr(value, "quant_state", None)
    while state is not None:
        found += [each for each in (state.absmax, state.code, state.offset) if each is not None]
        state = state.state2
    scales = getattr(value, "SCB", None)
    return found if scales is None else [*found, scales]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_bytes_are_those_of_the_quantized_model(tmp_path: Path, kind: str, size: str):
    save_model(tmp_path / "model", **SIZES[size])
    section = ModelSection(model_name_or_path=str(tmp_path / "model"), **KINDS[kind])
    model = load_weights(section, load_config(section), torch.float32)
    held = {tensor.data_ptr(): tensor.nbytes for weight in model.parameters() for tensor in tensors(weight)}
    plain = ModelSection(model_name_or_path=section.model_name_or_path)
    whole = load_weights(plain, load_config(plain), torch.float32).requires_grad_(False)
    bind(whole)
    told = weights_held(whole, section)
    # Tables may be one tensor for all layers: a KiB a layer.
    shared = 1088 * len(list(quantized_weights(whole)))
    assert sum(held.values()) <= told <= sum(held.values()) + shared
    each = {name: sum(t.nbytes for t in tensors(weight)) for name, weight in model.named_parameters()}
    names = {id(weight): name for name, weight in whole.named_parameters()}
    for weight in quantized_weights(whole):
        assert each[names[id(weight)]] == bytes_held(weight, section), names[id(weight)]
    quantized = {name for name, weight in model.named_parameters() if weight.dtype in (torch.uint8, torch.int8)}
    assert quantized == {names[id(weight)] for weight in quantized_weights(whole)}


def words(folder: Path, *more: str) -> list[str]:
    return [
        "--objective=dpo", f"--model_name_or_path={folder / 'model'}", "--dataset_name=rows.jsonl",
        f"--output_dir={folder / 'run'}", "--eval_share=0", "--save_strategy=no", "--lora.r=4",
        "--rows_per_step=4", *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_layers_of_the_skeleton_with_an_adapter_are_the_same(tmp_path: Path):
    """Seven layers are known from one and two; the adapter's own weights are not quantized."""
    save_model(tmp_path / "model", hidden_size=64, intermediate_size=128, num_hidden_layers=7)
    recipe = read_recipe(None, words(tmp_path, "--load_in_4bit", "--use_bnb_nested_quant", "--model.dtype=float32"))
    config = load_config(recipe.model)
    with without_random_numbers(), torch.device("meta"):
        whole = skeleton(recipe, config)
    assert len(list(quantized_weights(whole))) == 7 * 7
    wanted = weights_held(whole, recipe.model)
    ahead = look_ahead(recipe, config, random_table(("chosen", "rejected"), rows=8))
    assert ahead.memory["weights"] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.slow
def test_memory_is_less_in_fewer_bits_and_the_budget_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_model(tmp_path / "model", hidden_size=256, intermediate_size=1024, num_hidden_layers=4)
    table = random_table(("chosen", "rejected"), rows=8)
    weights, passes = {}, {}
    for kind in ("", "--load_in_8bit", "--load_in_4bit"):
        recipe = read_recipe(None, words(tmp_path, "--model.dtype=float32", *([kind] if kind else [])))
        ahead = look_ahead(recipe, load_config(recipe.model), table)
        weights[kind], passes[kind] = ahead.memory["weights"], ahead.memory["gradients and activations"]
    with without_random_numbers(), torch.device("meta"):
        number = sum(each.numel() for each in quantized_weights(skeleton(recipe, load_config(recipe.model))))
    # Four bytes become one; or half a one and a scale of four for 64.
    assert weights[""] - weights["--load_in_8bit"] == pytest.approx(3 * number, rel=0.01)
    assert weights[""] - weights["--load_in_4bit"] == pytest.approx((3.5 - 4 / 64) * number, rel=0.01)
    # A layer's weights are there in full while it computes.
    assert passes["--load_in_4bit"] - passes[""] == pytest.approx(
        4 * 256 * 1024 * forecasting.KEPT_BY_ALLOCATOR, rel=1e-6
    )
    recipe = read_recipe(None, words(tmp_path, "--load_in_4bit", "--gradient_checkpointing=false"))
    roomy = look_ahead(recipe, load_config(recipe.model), table)
    scarce = roomy.peak - 0.4 * roomy.memory["gradients and activations"]
    monkeypatch.setattr(forecasting, "_available", lambda device: scarce)
    assert look_ahead(recipe, load_config(recipe.model), table).most is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_says_which_layers_are_quantized(tmp_path: Path, name: str):
    """As transformers decides when it loads the model."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = CONFIGS[name]()
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    bits = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=BitsAndBytesConfig(load_in_8bit=True), dtype=torch.float32
    )
    wanted = {key for key, weight in bits.named_parameters() if weight.dtype == torch.int8}
    bind(model.requires_grad_(False))
    names = {id(weight): key for key, weight in model.named_parameters()}
    assert {names[id(weight)] for weight in quantized_weights(model)} == wanted
