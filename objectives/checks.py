"""One sentence for a value out of range."""

from __future__ import annotations


def require(key: str, value: object, holds: bool, expected: str) -> None:
    """Raises ``ValueError`` naming ``key``, its value and what was expected, unless ``holds``."""
    if not holds:
        raise ValueError(f"{key} must be {expected}, got {value!r}")
