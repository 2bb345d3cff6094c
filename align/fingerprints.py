"""Fingerprints of weights as they lie on disk: which samples, scores and checkpoints belong together."""

from __future__ import annotations

from pathlib import Path

import xxhash

from align.errors import RunError

WEIGHTS = ("*.safetensors", "*.bin")
TEXTS = ("*config.json", "tokenizer*", "*.model", "chat_template*", "vocab*", "merges.txt")
"""What a model's answers and scores depend on besides its weights."""
CHUNK = 2**24


def weights_on_disk(name: str, revision: str = "main") -> str:
    """What a model's weights are, without loading them.

    Args:
        name: a folder with weights or with an adapter's, or a Hub id.
        revision: of the Hub id.
    Returns:
        Of a folder, a hash of the contents of its weight files, whatever their place on disk. Of a Hub id, the commit.
    Raises:
        RunError: a folder holds no weights, or the Hub does not tell.
    """
    folder = Path(name)
    if folder.is_dir():
        files = sorted(path for pattern in WEIGHTS for path in folder.glob(pattern) if path.name != "training_args.bin")
        if not files:
            raise RunError(f"{name}: the folder holds no weights (no *.safetensors); name one that does")
        return "files:" + _hash(files)
    return f"hub:{name}@{commit_of(name, revision)}"


def with_texts(weights: str, name: str) -> str:
    """Hash of weights and of what lies beside them: configuration, tokenizer, template.

    Args:
        weights: as ``weights_on_disk`` tells them; of a Hub id, the commit is of all of it.
        name: folder or Hub id.
    """
    state = xxhash.xxh3_64(weights.encode())
    for path in sorted({path for pattern in TEXTS for path in Path(name).glob(pattern)}):
        state.update(path.name.encode() + path.read_bytes())
    return state.hexdigest()


def joined(base: str, adapter: str | None) -> str:
    """Of a base and, where there is one, the adapter on it."""
    return base if adapter is None else f"{base}+{adapter}"


def mixed(first: str, second: str, share: float) -> str:
    """Of a geometric mixture of two models."""
    return f"{first}~{share:g}*{second}"


def _hash(files: list[Path]) -> str:
    digest = xxhash.xxh3_128()
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def commit_of(name: str, revision: str = "main") -> str:
    """The commit that a revision of a Hub id is.

    Raises:
        RunError: the Hub does not tell.
    """
    from huggingface_hub import hf_hub_download

    try:
        # In the cache it lies in a folder named after the commit.
        return Path(hf_hub_download(name, "config.json", revision=revision)).parent.name
    except Exception as error:  # offline, unknown, private, no config: all mean that there is no such model to sample
        why = " ".join(str(error).split())[:200]
        raise RunError(f"{name}: no such folder, and the Hub does not give it ({why}); check the name") from None
