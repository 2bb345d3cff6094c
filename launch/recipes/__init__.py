"""Recipes: what to train, sample, score, or evaluate, and how. Those that train have an objective."""

from __future__ import annotations

from pathlib import Path

import yaml

FOLDER = Path(__file__).parent


def training_recipes() -> list[Path]:
    """Recipes for ``align/train.py``, by name."""
    return [path for path in sorted(FOLDER.glob("*.yaml")) if "objective" in yaml.safe_load(path.read_text("utf-8"))]
