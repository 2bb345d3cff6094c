"""Functions that lose no digits where the plain expression would."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

LARGEST_EXPONENT = 80.0
"""exp of more than this overflows float32 (and bfloat16)."""
LARGEST_ROOT = 1e18
"""The square of more than this, times a few factors, overflows float32."""


def log1mexp(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """log(1 − eˣ) for x < 0, without cancellation at either end; no NaN in the gradient of the branch not taken.

    References:
        Mächler 2012, "Accurately computing log(1 − exp(−|a|))", Eq. 7.
    """
    small = x < -math.log(2)
    below, above = torch.where(small, x, -1.0), torch.where(small, -0.5, x)
    return torch.where(small, torch.log1p(-torch.exp(below)), torch.log(-torch.expm1(above)))


def square(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """x², constant (and without gradient) beyond ``LARGEST_ROOT`` on either side instead of infinite."""
    return x.clamp(min=-LARGEST_ROOT, max=LARGEST_ROOT) ** 2


def capped_exp(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """eˣ, constant (and without gradient) beyond ``LARGEST_EXPONENT`` instead of infinite."""
    return torch.exp(x.clamp(max=LARGEST_EXPONENT))
