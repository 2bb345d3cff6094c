"""Token weights once more, from papers and published code: Python integers and floats, one sequence at a time.

Like ``transcriptions``, written without reading what they check.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Ragged = list[list[float]]
"""One list of token numbers per sequence."""

TABLE_SIZE = 1_000_003


def goldfish_static(tokens: Sequence[int], *, k: int, start: int = 0) -> list[bool]:
    """Hans et al. 2024 (arXiv:2406.10209), static mask: which tokens of the whole sequence stay in the loss.

    Targets are the tokens after the first, numbered from 0; those at start, start + k, start + 2k, … are dropped.
    The first token is nobody's target, and ``True`` here.
    """
    keep = [True for _ in tokens]
    target = start
    while target + 1 < len(tokens):
        keep[target + 1] = False
        target += k
    return keep


def goldfish_keys(tokens: Sequence[int], *, h: int, wrap: bool = False) -> dict[int, int]:
    """Table index per position of the whole sequence: product of the h ids up to it and including it, modulo 1000003.

    Positions whose window would reach the first token, which is nobody's target, have no key: p < h. With ``wrap``
    the product is reduced to a signed 64-bit integer before the modulo, as int64 tensors do; the remainder is
    non-negative nevertheless. Reduction modulo 2^64 commutes with multiplication: where it happens does not matter.
    """
    keys: dict[int, int] = {}
    for p in range(h, len(tokens)):
        product = 1
        for q in range(p - h + 1, p + 1):
            product *= tokens[q]
        if wrap:
            product = (product + 2**63) % 2**64 - 2**63
        keys[p] = product % TABLE_SIZE
    return keys


def goldfish_hash(tokens: Sequence[int], *, k: int, h: int, table: Sequence[float]) -> list[bool]:
    """The hashed mask with exact products: dropped where table[key] < 1/k. Prompt tokens are part of the window."""
    keys = goldfish_keys(tokens, h=h)
    return [p not in keys or table[keys[p]] >= 1.0 / k for p in range(len(tokens))]


def goldfish_hash_int64(tokens: Sequence[int], *, k: int, h: int, table: Sequence[float]) -> list[bool]:
    """The hashed mask as the authors' code computes it, with ``.prod()`` of int64: products wrap around at 64 bits.

    Differs from exact products as soon as one reaches 2^63, which 13 ids of a common vocabulary do.
    """
    keys = goldfish_keys(tokens, h=h, wrap=True)
    return [p not in keys or table[keys[p]] >= 1.0 / k for p in range(len(tokens))]


def median(values: Sequence[float]) -> float:
    """The middle value, and for an even number of values the mean of both middle ones."""
    ordered = sorted(values)
    half = len(ordered) // 2
    if len(ordered) % 2 == 1:
        return ordered[half]
    return (ordered[half - 1] + ordered[half]) / 2.0


def talr_temperature(logps: Ragged) -> float:
    """τ of arXiv:2509.20758: median over sequences of the mean negative log-prob per token."""
    return median([-math.fsum(row) / len(row) for row in logps])


def talr(logps: Ragged, *, temperature: float, floor: float) -> Ragged:
    """Weights of arXiv:2509.20758: max(p^(1/τ), floor) per token, constants of the gradient."""
    return [[max(math.exp(log_p / temperature), floor) for log_p in row] for row in logps]


def weighted_nll(logps: Ragged, weights: Ragged) -> tuple[float, Ragged]:
    """−Σ w log p / N over all sequences together, N the number of tokens whatever their weight; gradient for log p."""
    number = sum(len(row) for row in logps)
    loss = 0.0
    grad: Ragged = []
    for row, row_weights in zip(logps, weights, strict=True):
        for log_p, w in zip(row, row_weights, strict=True):
            loss -= w * log_p / number
        grad.append([-w / number for w in row_weights])
    return loss, grad


def flow_temperature(initial_logps: Ragged) -> float:
    """τ of arXiv:2502.02797: median over the data set of the initial model's mean negative log-prob per token."""
    return median([-math.fsum(row) / len(row) for row in initial_logps])


def flow(initial_logps: Ragged, *, temperature: float) -> list[float]:
    """One weight per sequence, the same for all its tokens: exp(−f/τ), f its mean loss under the initial model.

    The loss divides by the number of tokens, not by the sum of weights.
    """
    return [math.exp(math.fsum(row) / len(row) / temperature) for row in initial_logps]


def dft(logps: Ragged) -> Ragged:
    """Weights of arXiv:2508.05629, Eq. 9: each token's own probability, a constant of the gradient."""
    return [[math.exp(log_p) for log_p in row] for row in logps]


def sample_shares(losses: Sequence[float], *, strategy: str, temperature: float) -> list[float]:
    """Sow et al. 2025, "Dynamic loss-based sample reweighting": each sample's share of the loss; they sum to 1."""
    low, high = min(losses), max(losses)
    middle, half = (high + low) / 2, max((high - low) / 2, 5e-7)
    scores = []
    for loss in losses:
        h = (loss - middle) / half
        if strategy == "lin_upper":
            f = h + 1 if h < 0 else 1.0
        elif strategy == "quadratic":
            f = 1 - h * h
        else:
            f = h if h > 0 else -h
        scores.append(math.exp(f / temperature))
    return [score / math.fsum(scores) for score in scores]


def weighted_rows(logps: Ragged, shares: Sequence[float]) -> tuple[float, Ragged]:
    """Σ share · mean loss over sequences; gradient for log p, shares being constants."""
    loss = math.fsum(-share * math.fsum(row) / len(row) for share, row in zip(shares, logps, strict=True))
    return loss, [[-share / len(row) for _ in row] for share, row in zip(shares, logps, strict=True)]
