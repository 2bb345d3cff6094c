"""Sentence encoders: frozen models that turn a text into one vector, the mean of its last hidden states."""

from __future__ import annotations

from typing import Any

import numpy as np

from data.errors import DataError
from data.store import digest


def check_encoder(name: str, *, key: str, way_out: str = "") -> None:
    """Refuses an encoder that is not there; reads its configuration only.

    Args:
        name: Hub id or folder.
        key: of the recipe, for messages.
        way_out: what else could be written there.
    Raises:
        DataError: it can't be loaded.
    """
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _not_loaded(name, error, key, way_out) from None


def load_encoder(name: str, *, key: str, way_out: str = "") -> tuple[Any, Any]:
    """An encoder in float32 and its tokenizer.

    Args:
        name: Hub id or folder.
        key: of the recipe, for messages.
        way_out: what else could be written there.
    Raises:
        DataError: it can't be loaded.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        model = AutoModel.from_pretrained(name, dtype=torch.float32).eval().requires_grad_(False)
        return model, AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _not_loaded(name, error, key, way_out) from None


def _not_loaded(name: str, error: Exception, key: str, way_out: str) -> DataError:
    why = " ".join(str(error).split()).rstrip(".")
    return DataError(f"{key} {name!r} can't be loaded ({why}); give {way_out}an encoder's Hub id or folder")


def encoder_embeddings(texts: list[str], model: Any, tokenizer: Any, batch: int = 32) -> np.ndarray:
    """Mean of the last hidden states over each text's tokens, (text, hidden); long texts are cut to the context."""
    import torch

    parts: list[np.ndarray] = []
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512))
    for start in range(0, len(texts), batch):
        inputs = tokenizer(
            texts[start : start + batch],
            padding=True,
            padding_side="right",  # on the left it would move absolute positions
            truncation=True,
            max_length=limit,
            return_tensors="pt",
        ).to(model.device)
        with torch.no_grad():
            hidden = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        mask = inputs["attention_mask"][..., None].to(hidden)
        parts.append(((hidden * mask).sum(1) / mask.sum(1).clamp(min=1)).cpu().numpy())
    return np.concatenate(parts) if parts else np.zeros((0, model.config.hidden_size), dtype=np.float32)


class Encoder:
    """A sentence encoder that remembers the texts of ``prefetch``, so that they are embedded in full batches.

    Args:
        name: Hub id or folder.
        key: of the recipe, for messages.
    Raises:
        DataError: it can't be loaded.
    """

    def __init__(self, name: str, *, key: str) -> None:
        self.model, self.tokenizer = load_encoder(name, key=key)
        weights = sorted(self.model.state_dict().items())
        self.fingerprint = digest(
            self.model.config.to_json_string(), *(part for each, w in weights for part in (each, w.numpy().tobytes()))
        )
        """Content hash of the weights."""
        self._known: dict[str, np.ndarray] = {}

    def prefetch(self, texts: list[str]) -> None:
        """Embeds these texts, each once and shortest first, and forgets those of the call before."""
        import torch

        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        distinct = sorted(set(texts), key=len)
        self._known = dict(zip(distinct, encoder_embeddings(distinct, self.model, self.tokenizer), strict=True))

    def __call__(self, texts: list[str]) -> np.ndarray:
        """Vectors of texts that were prefetched, (text, hidden)."""
        return np.stack([self._known[text] for text in texts])
