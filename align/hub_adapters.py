"""Adapters on the Hub: recognised by their configuration alone, fetched into the Hub's cache, and from there on read as
any adapter in a folder."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from align.errors import RunError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = (CONFIG, WEIGHTS, "*token*.json", "tokenizer.model", "vocab.*", "merges.txt", "chat_template*", "recipe.yaml",
         "results.json")  # fmt: skip
"""What an adapter is, how it is asked and where it comes from; nothing that is run when it is read."""


def adapter_config(name: str, revision: str = "main") -> Path | None:
    """The configuration of what may be an adapter.

    Args:
        name: folder or Hub id.
        revision: of the Hub id.
    Returns:
        Its ``adapter_config.json``: of a Hub id, the revision's newest one where the Hub can be asked, else the one in
        the cache. None where there is none, which of an unknown name means nothing.
    """
    folder = Path(name)
    if folder.is_dir() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        return folder / CONFIG if (folder / CONFIG).is_file() else None
    return _on_hub(name, revision)


def adapter_folder(name: str, revision: str = "main") -> Path | None:
    """The folder of an adapter, fetched where it is on the Hub; None where there is none.

    Args:
        name: folder or Hub id.
        revision: of the Hub id.
    Raises:
        RunError: it is on the Hub and can't be fetched.
    """
    config = adapter_config(name, revision)
    if config is None or Path(name).is_dir():
        return config and config.parent
    return _fetched(name, config.parent.name)


@lru_cache(maxsize=64)
def _on_hub(name: str, revision: str) -> Path | None:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, CONFIG, revision=revision))
    except Exception:  # no such file, repository or revision, no access, no network: whoever loads the model says which
        return None


@lru_cache(maxsize=64)
def _fetched(name: str, commit: str) -> Path:
    """Of the commit whose configuration was read, whatever is pushed meanwhile."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=commit, allow_patterns=list(FILES)))
    except Exception as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise RunError(
            f"{name}: the adapter can't be fetched from the Hub ({why}); try again, or copy it into a folder"
        ) from None
    if not (folder / WEIGHTS).is_file():
        raise RunError(
            f"{name}: there is no {WEIGHTS} beside its {CONFIG}, on the Hub or, offline, in the cache; fetch it, or "
            "have the adapter saved as safetensors"
        )
    return folder
