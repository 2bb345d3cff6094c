"""Number tokens: which tokens of a vocabulary are numbers, and of what value."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPACES = "▁Ġ "
"""How tokenizers write the blank before a word."""


def number_values(tokenizer: PreTrainedTokenizerBase, size: int) -> np.ndarray:
    """By token id, the value of a number token, else NaN.

    A number token is one whose text, without the blank before it, consists of the digits 0 to 9.

    Args:
        tokenizer: the policy's.
        size: logits of the model, at least the tokenizer's number of tokens; those beyond are no numbers.
    """
    values = np.full(size, np.nan)
    special = set(tokenizer.all_special_ids)
    for token, number in tokenizer.get_vocab().items():
        digits = token.lstrip(_SPACES)
        if number < size and number not in special and re.fullmatch(r"[0-9]{1,15}", digits):
            values[number] = float(int(digits))
    return values
