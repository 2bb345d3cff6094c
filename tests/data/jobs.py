"""What workers run in ``test_at_scale``: importable by name, and without anything that they don't import themselves."""

from __future__ import annotations

import os

from data.errors import DataError


def half(shared: int, job: int) -> tuple[int, int]:
    """Refuses thirteen."""
    if job == 13:
        raise DataError("thirteen")
    return shared, job // 2


def ended(shared: int, job: int) -> None:
    """Ends the process as one does that is out of memory."""
    os._exit(3)
