"""Word n-grams of texts as 64-bit numbers, for many texts at once: what near duplicates and overlaps are counted in."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import xxhash

_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_BASE, _SALT = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
MOST_KNOWN = 2**18
"""Words whose numbers a process remembers."""
_known: dict[str, int] = {}


def words(text: str) -> list[str]:
    """Words in lower case without punctuation; where a script has no spaces, each character is one."""
    return _WORD.findall(text.lower())


def mixed(values: np.ndarray) -> np.ndarray:
    """Numbers spread over all 64 bits (the finaliser of splitmix64, Steele et al. 2014), (n,) to (n,)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def grams(texts: Sequence[str], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all word n-grams of each text, in order, repeated ones repeated.

        gram(w₁…wₙ) = mix(Σ hash(wₖ)·Bⁿ⁻ᵏ)    modulo 2⁶⁴

    A text of fewer than n words is one gram, which no longer text has; so is a text without words, as it stands.

    Args:
        texts: any.
        n: words of a gram, ≥ 1.
    Returns:
        Hashes end to end, uint64, and where those of each text end, int64, (text,).
    """
    found = [words(text) for text in texts]
    lengths = np.array([len(each) for each in found], dtype=np.int64)
    flat = np.array([_number(word) for each in found for word in each], dtype=np.uint64)
    counts = np.maximum(lengths - n + 1, 1)
    ends = counts.cumsum()
    made = np.empty(int(counts.sum()), dtype=np.uint64)
    starts = lengths.cumsum() - lengths
    with np.errstate(over="ignore"):
        long = np.flatnonzero(lengths >= n)
        if len(long):
            offset = np.repeat(starts[long] - (ends[long] - counts[long]), counts[long])
            into = np.concatenate([np.arange(ends[i] - counts[i], ends[i]) for i in long.tolist()])
            made[into] = _polynomial(flat, into + offset, n)
        for i in np.flatnonzero(lengths < n).tolist():
            length = int(lengths[i])
            raw = np.array([xxhash.xxh3_64_intdigest(str(texts[i]).encode("utf-8", "surrogatepass"))], dtype=np.uint64)
            whole = _polynomial(flat, starts[i : i + 1], length) if length else raw
            made[ends[i] - 1 : ends[i]] = whole + _SALT * np.uint64(n - length)
        return mixed(made), ends


def _polynomial(codes: np.ndarray, first: np.ndarray, n: int) -> np.ndarray:
    """Of the n numbers from each place on, (place,)."""
    total = np.zeros(len(first), dtype=np.uint64)
    for k in range(n):
        total = total * _BASE + codes[first + k]
    return total


def _number(word: str) -> int:
    found = _known.get(word)
    if found is None:
        if len(_known) >= MOST_KNOWN:
            _known.clear()
        found = _known[word] = xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass"))
    return found
