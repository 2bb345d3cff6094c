"""Plain helpers that several test packages import. Nothing here is a fixture."""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]

SHARED = Path(os.environ.get("ALIGN_SHARED") or REPOSITORY.parent / "shared")
"""Models and data sets too large for the repository. Tests ask for the fixture ``shared``, which skips without it."""

VECTORS = REPOSITORY / "tests" / "vectors"
