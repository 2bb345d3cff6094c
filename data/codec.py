"""A tokenizer as rows need it: text to ids, by the shortest way, in this process or in a worker."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Codec:
    """Encodes texts as ``tokenizer(texts)`` does.

    Half of what that call takes goes into masks and offsets that nobody here reads, so a tokenizer of the library
    ``tokenizers`` is asked itself, unless its class does something of its own. Pickled, that one comes along; the whole
    tokenizer, whose import takes a second, comes as bytes and is made where a chat template is rendered.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.eos: Any = tokenizer.eos_token_id
        self.bos: Any = tokenizer.bos_token_id
        self._tokenizer: PreTrainedTokenizerBase | None = tokenizer
        self._raw = b""
        self._backend: Any = tokenizer.backend_tokenizer if _is_plain(tokenizer) else None  # type: ignore[attr-defined]
        self._split_special = bool(getattr(tokenizer, "split_special_tokens", False))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that this was made of."""
        if self._tokenizer is None:
            self._tokenizer = pickle.loads(self._raw)
        assert self._tokenizer is not None
        return self._tokenizer

    def encode(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        """Token ids of every text, with the special tokens that the tokenizer adds where these are wanted."""
        if not texts:
            return []
        if self._backend is None:
            # Not verbose: what is longer than the context is cut or dropped later, so a warning of it would mislead.
            return self.tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]  # type: ignore[return-value]
        # Whoever used it last may have left how to cut and pad, as its own calls do.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = self._split_special
        return [each.ids for each in self._backend.encode_batch_fast(texts, add_special_tokens=special)]

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""
        return str(self.tokenizer.decode(ids))

    def __getstate__(self) -> dict[str, Any]:
        raw = self._raw or pickle.dumps(self._tokenizer, protocol=5)
        return {**self.__dict__, "_tokenizer": None, "_raw": raw}


def _is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a call of the tokenizer does no more than ask the library's."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    kind = type(tokenizer)
    return (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind.__call__ is PreTrainedTokenizerBase.__call__
        and kind._encode_plus is PreTrainedTokenizerFast._encode_plus
    )
