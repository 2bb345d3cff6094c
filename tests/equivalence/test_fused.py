"""Fused norms, rotations and adapters against the modules they stand for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    GemmaConfig,
    GlmConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    StableLmConfig,
)

from align import fused
from align.checks import choose_path
from align.forward import bind, causal_lm
from align.model import keep_input_dtype
from align.tracing import trace
from data.pack import pack
from tests.align.tiny import CONFIGS, VOCABULARY, float64_throughout, model_of, random_table

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
MORE = {
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "olmo2": lambda: Olmo2Config(**SHAPE),
    "gemma": lambda: GemmaConfig(**SHAPE, head_dim=8),
    "phi3": lambda: Phi3Config(**SHAPE),
    "phi": lambda: PhiConfig(**SHAPE),
    "stablelm": lambda: StableLmConfig(**SHAPE),
    "glm-interleaved": lambda: GlmConfig(**SHAPE, head_dim=8),
    "gpt-neox": lambda: GPTNeoXConfig(**{k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}),
}


def outputs(model: Any, ids: Tensor) -> list[Tensor]:
    """Logits, and the gradients of a weighted sum of them."""
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    logits.mul(torch.linspace(-1, 1, VOCABULARY, dtype=logits.dtype)).sum().backward()
    return [logits.detach(), *(each.grad.clone() for each in model.parameters() if each.grad is not None)]


def ids(rows: int = 3, length: int = 11) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def count(model: nn.Module) -> dict[str, int]:
    """What is fused in a model that was bound."""
    fused.unfuse(model)
    return fused.fuse(model)


@pytest.mark.parametrize(
    ("name", "norms", "rotations"),
    [
        ("llama", 9, 4),
        ("qwen3", 17, 4),  # of queries and keys too
        ("mistral-window", 9, 4),
        ("mixtral-experts", 9, 4),
        ("granite-scaled-head", 9, 4),
        ("gemma2-window-softcaps", 0, 4),  # its norms multiply by one plus their weight
        ("cohere-scaled-head", 0, 0),  # it has no RMSNorm, and turns neighbours instead of halves
        ("gpt2", 0, 0),
        ("qwen2", 5, 2),
        ("olmo2", 9, 2),
        ("gemma", 0, 2),
        ("glm-interleaved", 5, 0),
        ("gpt-neox", 0, 2),
    ],
)
def test_what_is_fused(name: str, norms: int, rotations: int):
    """By what a module computes, not by what it is called."""
    model = model_of({**CONFIGS, **MORE}[name]())
    assert count(model) == {"norms": norms, "rotations": rotations, "adapters": 0}


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_more_families_are_what_they_were(name: str):
    """In float64; CONFIGS' own are in test_forward, with shared prompts."""
    with float64_throughout():
        model = model_of(MORE[name]())
        found = outputs(model, ids())
        with fused.plain():
            wanted = outputs(model, ids())
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_norm_by_hand():
    """x = (3, 4), w = (2, 1), ε = 0.5: mean x² + ε = 13, y = (6, 4)/√13.

    For slope (1, 0): dw = (3, 0)/√13; the slope of x is w·(1, 0)/√13 − x · (3·2)/(2·13·√13) = (2 − 9/13, −12/13)/√13.
    """
    states, weight = torch.tensor([[3.0, 4.0]], requires_grad=True), torch.tensor([2.0, 1.0], requires_grad=True)
    found = fused._RMSNorm.apply(states, weight, 0.5)
    found[0, 0].backward()
    root = 13**0.5
    torch.testing.assert_close(found, torch.tensor([[6.0, 4.0]]) / root)
    torch.testing.assert_close(weight.grad, torch.tensor([3.0, 0.0]) / root)
    torch.testing.assert_close(states.grad, torch.tensor([[2 - 9 / 13, -12 / 13]]) / root)


def test_finite_differences():
    torch.manual_seed(0)

    def some(*shape: int, grad: bool = True) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).requires_grad_(grad)

    assert torch.autograd.gradcheck(fused._RMSNorm.apply, (some(2, 3, 4), some(4), 1e-3))
    angles = some(2, 1, 3, 4, grad=False)  # the halves need not be alike
    states = some(2, 3, 3, 4), some(2, 1, 3, 4)
    assert torch.autograd.gradcheck(fused._Rotations.apply, (*states, angles.cos(), (2 * angles).sin()))
    frozen = some(5, 4, grad=False), some(5, grad=False)
    for dropped in (None, some(2, 3, 4)):
        given = (some(2, 3, 4), dropped, *frozen, some(2, 4), some(5, 2), 0.7)
        assert torch.autograd.gradcheck(fused._Adapted.apply, given)
    once = some(2, 4)
    (slope,) = torch.autograd.grad(fused._RMSNorm.apply(once, some(4), 1e-3).square().sum(), once, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_fewer_activations_are_kept():
    """A norm keeps its input and a number per position, and not what it makes of its input besides."""
    model = model_of(CONFIGS["llama"](), torch.float32)

    def kept() -> int:
        storages: dict[int, int] = {}
        held: list[Tensor] = []

        def hold(value: Tensor) -> Tensor:
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            held.append(value)
            return value

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda value: value):
            model(input_ids=ids(3, 100), use_cache=False)
        return sum(storages.values())

    ours = kept()
    with fused.plain():
        theirs = kept()
    assert theirs - ours >= 9 * (3 * 100 * 32 * 4)


def adapted(config: PretrainedConfig, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A model whose adapter does something."""
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    model: Any = get_peft_model(causal_lm(model_of(config, dtype)), LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.float32 if dtype == torch.bfloat16 else dtype)
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    bind(model)
    return model


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True, "lora_alpha": 3}, {"lora_dropout": 0.5}, {"target_modules": ["q_proj", "down_proj"]}],
    ids=["all", "rslora", "dropout", "some"],
)
def test_adapters_are_what_they_were(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """Biases of the frozen layers included; dropout draws the same numbers."""
    with float64_throughout():
        model = adapted(LlamaConfig(**SHAPE, attention_bias=True), **settings).train()
        assert count(model)["adapters"] == (4 if "target_modules" in settings else 14)
        results = []
        for plainly in (False, True):
            torch.manual_seed(3)
            if plainly:
                monkeypatch.setattr(fused._Switch, "on", False)
            results.append(outputs(model, ids()))
    assert len(results[0]) == len(results[1]) > 4
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_adapters_under_autocast_are_nearer_to_float32():
    """Frozen weights in bfloat16, adapters in float32: one rounding where peft's own has three."""
    model = adapted(LlamaConfig(**SHAPE), torch.bfloat16)
    keep_input_dtype(model)
    whole = copy.deepcopy(model).float()
    whole_ = outputs(whole, ids())
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs(model, ids())
        with fused.plain():
            theirs = outputs(model, ids())
    assert found[0].dtype == theirs[0].dtype
    assert [each.dtype for each in found] == [each.dtype for each in theirs]

    def distance(results: list[Tensor]) -> float:
        pairs = zip(results, whole_, strict=True)
        return sum(float((one.float() - other).norm() / other.norm()) for one, other in pairs) / len(results)

    assert distance(found) < 0.1
    assert distance(found) <= 1.05 * distance(theirs)


def never(*_: Any) -> None:
    raise AssertionError("fused")


@pytest.mark.parametrize("case", ["dora", "bias", "off", "merged", "two", "hooked", "base is trained", "none of these"])
def test_other_adapters_are_left_alone(case: str, monkeypatch: pytest.MonkeyPatch):
    settings = {"dora": {"use_dora": True}, "bias": {"lora_bias": True}}.get(case, {})
    model = adapted(LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True), torch.float32, **settings)
    layers = [each for each in model.modules() if type(each).__name__ == "Linear" and hasattr(each, "lora_A")]
    if case == "none of these":
        monkeypatch.setattr(fused._Adapted, "apply", never)
        with pytest.raises(AssertionError, match="fused"):  # the others would prove nothing if it were never called
            outputs(model, ids())
        return
    if case == "two":
        model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
        model.base_model.set_adapter(["default", "other"])
    elif case == "merged":
        model.merge_adapter()
    elif case == "hooked":
        for layer in layers:
            layer.base_layer.register_forward_hook(lambda *found: found[2] * 1.5)
    elif case == "base is trained":
        for layer in layers:
            layer.base_layer.weight.requires_grad_()
    with model.disable_adapter() if case == "off" else torch.enable_grad():
        with fused.plain():
            wanted = model(input_ids=ids(), use_cache=False).logits
        monkeypatch.setattr(fused._Adapted, "apply", never)
        found = model(input_ids=ids(), use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_adapters_of_divided_models_are_left_alone(engine: str, monkeypatch: pytest.MonkeyPatch):
    """Their weights are gathered when the layers that hold them are called."""
    monkeypatch.setattr(fused, "launched", lambda: engine)
    model = adapted(LlamaConfig(**SHAPE), torch.float32)
    assert count(model) == {"norms": 5, "rotations": 2, "adapters": 0}


def test_lower_precision_has_its_own_norms_and_rotations(monkeypatch: pytest.MonkeyPatch):
    model = model_of(LlamaConfig(**SHAPE), torch.bfloat16)
    monkeypatch.setattr(fused._RMSNorm, "apply", never)
    monkeypatch.setattr(fused._Rotations, "apply", never)
    assert model(input_ids=ids(), use_cache=False).logits.dtype == torch.bfloat16


def test_activations_are_computed_again_alike():
    model = adapted(LlamaConfig(**SHAPE), torch.float32, lora_dropout=0.3).train()
    torch.manual_seed(5)
    wanted = outputs(model, ids())
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(5)
    found = outputs(model, ids())
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_copy_computes_with_weights_of_its_own():
    model = adapted(LlamaConfig(**SHAPE), torch.float32)
    before = outputs(model, ids())[0]
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
        moved = other(input_ids=ids(), use_cache=False).logits
        with fused.plain():
            wanted = other(input_ids=ids(), use_cache=False).logits
    torch.testing.assert_close(moved, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(moved, before, atol=1e-2)
    assert torch.equal(outputs(model, ids())[0], before)


def test_binding_again_and_unfusing():
    model = adapted(LlamaConfig(**SHAPE), torch.float32)
    assert fused.fuse(model) == {"norms": 0, "rotations": 0, "adapters": 0}
    assert fused.unfuse(model) == 5 + 2 + 14
    assert fused.unfuse(model) == 0


def test_start_up_finds_a_fused_module_that_is_wrong(monkeypatch: pytest.MonkeyPatch):
    """Responses go on sharing their prompt, with the modules' own forwards."""
    model = model_of(LlamaConfig(**SHAPE), torch.float32)
    right = fused._turned
    monkeypatch.setattr(fused, "_turned", lambda *given: right(*given[:4], -given[4]))
    share, check = choose_path(model, random_table(), torch.float32, CPU)
    assert share
    assert check.passed
    assert fused.unfuse(model) == 0


def test_arithmetic_is_counted_alike():
    """What adapters do is told before launch; fused, it is the same number of operations, in fewer bytes."""

    def make(config: Any) -> Any:
        model = causal_lm(model_of_shape(config))
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        bind(model)
        return model

    def own(config: Any) -> Any:
        model = make(config)
        assert fused.unfuse(model) == 5 + 2 + 14
        return model

    batch = pack(random_table(), [0, 1, 2], share=True, kind="bucket", counts={})
    options: dict[str, Any] = {"dtype": torch.float32, "checkpointing": False}
    ours, theirs = (trace(LlamaConfig(**SHAPE), batch, make=each, **options) for each in (make, own))
    assert ours.forward_flops == theirs.forward_flops
    assert ours.total_flops == theirs.total_flops
    assert ours.moved < 0.8 * theirs.moved
    assert ours.calls < theirs.calls
    assert ours.activations < theirs.activations


def model_of_shape(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config)


def test_what_is_not_to_blame_stays_fused(monkeypatch: pytest.MonkeyPatch):
    """A kernel of attention that fails is not the norms' fault; where none will do, the model computes by itself."""
    from align import paths
    from align.masks import MAKERS
    from align.sections import ModelSection

    def broken(*_: Any) -> None:
        raise RuntimeError("no such mask")

    model: Any = model_of(LlamaConfig(**SHAPE), torch.float32)
    monkeypatch.setitem(MAKERS, "sdpa", broken)
    share, _ = choose_path(model, random_table(), torch.float32, CPU)
    assert not share
    assert fused.unfuse(model) == 7
    bind(model)
    section = ModelSection(model_name_or_path="model", attn_implementation="sdpa")
    share, check = paths.choose_path(section, model, random_table(), torch.float32, CPU)
    assert not share
    assert "own forward" in check.detail
    assert fused.unfuse(model) == 0
