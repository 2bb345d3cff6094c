"""The head's own backward pass against autograd over full logits, and what it does not keep."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from align.head import Chunks, HeadTransform, _Logits, target_scores

RESPONSES, HIDDEN, VOCABULARY = 7, 5, 11
TRANSFORMS = (
    HeadTransform(),
    HeadTransform(scale=0.3),
    HeadTransform(softcap=2.0),
    HeadTransform(scale=3, softcap=1.5),
)


def inputs(dtype: torch.dtype = torch.float64, *, bias: bool, frozen: bool) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(3)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    states, weight = numbers(RESPONSES, HIDDEN), 2 * numbers(VOCABULARY, HIDDEN)
    offsets = numbers(VOCABULARY) if bias else None
    targets = torch.randint(0, VOCABULARY, (RESPONSES,), generator=generator)
    states.requires_grad_()
    if not frozen:
        for each in (weight, offsets):
            if each is not None:
                each.requires_grad_()
    return states, weight, offsets, targets


def plainly(states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: HeadTransform) -> Any:
    logits = transform(functional.linear(states, weight, bias))
    logps = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    return logps.gather(-1, targets[:, None])[:, 0], (2 * logps).logsumexp(dim=-1)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize(("bias", "frozen"), list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_equals_autograd_over_full_logits(transform: HeadTransform, bias: bool, frozen: bool, size: int):
    chunks = Chunks(size=size, transform=transform, squares=True)
    given = inputs(bias=bias, frozen=frozen)
    upstream = torch.linspace(-2, 3, RESPONSES, dtype=torch.float64)
    wanted, squares = plainly(*given, transform)
    found, own_squares = target_scores(*given, chunks)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert own_squares is not None
    torch.testing.assert_close(own_squares, squares, rtol=1e-12, atol=1e-12)
    assert not own_squares.requires_grad
    trained = [each for each in given if each is not None and each.requires_grad]
    assert len(trained) == (1 if frozen else 2 + bias)
    for own, theirs in zip(*(torch.autograd.grad(each, trained, upstream) for each in (found, wanted)), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_confident_token_keeps_its_small_slope_in_bfloat16(frozen: bool):
    """1 − p is taken before rounding: in bfloat16 p would be 1, and the slope nothing but rounding."""
    states = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[8.0, 0.0], [0.0, 0.0], [0.0, 1.0]], dtype=torch.bfloat16, requires_grad=not frozen)
    chunks = Chunks(size=4, transform=HeadTransform(), squares=False)
    logps, _ = target_scores(states, weight, None, torch.tensor([0]), chunks)
    logps.sum().backward()
    short = 1 - torch.softmax(torch.tensor([8.0, 0.0, 0.0]), 0)[0]
    assert states.grad is not None
    assert float(states.grad[0, 0]) == pytest.approx(8 * float(short), rel=1e-2)


@pytest.mark.parametrize("frozen", [False, True])
def test_under_autocast_products_are_in_its_type(frozen: bool):
    given = inputs(torch.float32, bias=True, frozen=frozen)
    chunks = Chunks(size=3, transform=HeadTransform(scale=0.5), squares=False)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, _ = plainly(*given, chunks.transform)
        found, _ = target_scores(*given, chunks)
    assert found.dtype == torch.float32
    assert not torch.equal(found, plainly(*given, chunks.transform)[0])
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)
    trained = [each for each in given if each is not None and each.requires_grad]
    for own, theirs in zip(*(torch.autograd.grad(each.sum(), trained) for each in (found, wanted)), strict=True):
        assert own.dtype == torch.float32
        torch.testing.assert_close(own, theirs, rtol=3e-2, atol=3e-2)


def test_nothing_as_wide_as_the_vocabulary_is_kept():
    """But one chunk, and the slopes of a head that is trained, which its optimizer asks for."""
    wide = 4096
    states, weight = torch.randn(64, 8, requires_grad=True), torch.randn(wide, 8)
    chunks = Chunks(size=4, transform=HeadTransform(), squares=False)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each.numel()) or each, lambda each: each):
        target_scores(states, weight, None, torch.zeros(64, dtype=torch.long), chunks)
        target_scores(states, weight.requires_grad_(), None, torch.zeros(64, dtype=torch.long), chunks)
    assert set(kept) == {64 * 8, weight.numel(), 64}


@pytest.mark.parametrize(
    ("transform", "again"), [(HeadTransform(), False), (HeadTransform(softcap=3.0), True)], ids=str
)
@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_logits_of_the_last_chunk_are_not_computed_again(
    transform: HeadTransform, again: bool, size: int, monkeypatch: pytest.MonkeyPatch
):
    """For the first backward pass; a second one gives the same."""
    computed: list[int] = []
    logits = _Logits.__call__

    def counted(self: _Logits, some: slice) -> Tensor:
        computed.append(some.stop - some.start)
        return logits(self, some)

    monkeypatch.setattr(_Logits, "__call__", counted)
    given = inputs(bias=True, frozen=False)
    trained = [each for each in given if each is not None and each.requires_grad]
    found, _ = target_scores(*given, Chunks(size=size, transform=transform, squares=False))
    assert sum(computed) == RESPONSES
    assert computed[-1] == min(size, RESPONSES)  # a full one, whatever the number
    first = torch.autograd.grad(found.sum(), trained, retain_graph=True)
    left = RESPONSES if again else max(RESPONSES - size, 0)
    assert sum(computed) == RESPONSES + left
    second = torch.autograd.grad(found.sum(), trained)
    assert sum(computed) == 2 * RESPONSES + left
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_nothing_to_score():
    states, weight = torch.randn(0, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    chunks = Chunks(size=4, transform=HeadTransform(), squares=False)
    logps, _ = target_scores(states, weight, None, torch.zeros(0, dtype=torch.long), chunks)
    assert logps.shape == (0,)
    logps.sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros(5, 3))
