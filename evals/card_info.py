"""``card.json``: what a model card needs and no other file of a run directory says, so that it can be written again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from data.files import write_atomically

VERSION = 1
"""Of the file format; raised when a reader of the old one would misunderstand the new one."""
NAME = "card.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class CardInfo:
    """What a card needs and a run directory does not say by itself.

    Raises:
        ValueError: if ``license`` is not an id such as ``apache-2.0``.
    """

    base_model: str
    """Hub id or local path of the model that was trained."""
    datasets: Sequence[str]
    """Hub ids or local paths; only the ids go into the metadata."""
    objective: str
    """Registry name; ``dpo + sft`` for several."""
    formula: str
    """As the docstrings of all parts have it: objectives, modifiers, weights, regularizers and changes of the data."""
    citation: str
    """Where the formulas are from."""
    adapter: bool
    """Whether a PEFT adapter was trained, rather than the whole model."""
    command: str
    """The command line that trained it."""
    usage: str = ""
    """How the model is meant to be asked, where prompts alone are not enough."""
    license: str | None = None
    """Of the trained model, if known; nothing is guessed."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Library to version."""
    resumes: Sequence[str] = ()
    """One sentence for each time the run was resumed."""
    model_name: str = ""
    """Of the trained model; default is the run directory's name."""
    language: Sequence[str] = ()
    """ISO 639 codes of the training data, if known."""
    tags: Sequence[str] = ()
    """Of the metadata, besides those that every run has."""
    repo_id: str = ""
    """Where it will be on the Hub, for the quick start."""
    outputs: Sequence[str] = ()
    """Names of a scalar head's outputs, all of them in order; empty for a language model."""
    reference: str | None = None
    """The model that log-ratios are taken against: ``initial``, ``base``, a Hub id or a path; None without one."""
    reference_source: str = ""
    """``cached``, ``adapter_off`` or ``live``."""
    reference_fingerprint: str | None = None
    """Content hash of the reference's weights, where it was taken."""
    reference_moves: bool = False
    """Whether the reference followed the policy during training."""

    def __post_init__(self) -> None:
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.\-]*", self.license):
            raise ValueError(f"license {self.license!r} is not an id such as 'apache-2.0' or 'other'")

    def write(self, run_dir: Path) -> Path:
        """Writes ``card.json`` into a run directory; returns its path."""
        path = run_dir / NAME
        body = {"version": VERSION, **asdict(self)}
        write_atomically(path, json.dumps(body, indent=1, ensure_ascii=False) + "\n")
        return path

    @classmethod
    def read(cls, run_dir: Path) -> CardInfo:
        """What a finished run left.

        Raises:
            ValueError: in one sentence, if the file is missing, can't be read, or has another version or field.
        """
        path = run_dir / NAME
        if not run_dir.is_dir():
            raise ValueError(f"{run_dir} is not a run directory")
        if not path.is_file():
            raise ValueError(f"{run_dir} has no {NAME}, which a run writes when it is finished; let it finish first")
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(body, dict) or body.pop("version", None) != VERSION:
            raise ValueError(f"{path} is not of version {VERSION}, which this code reads")
        known = {f.name: f for f in fields(cls)}
        unknown = sorted(set(body) - set(known))
        lacking = sorted(name for name in ("base_model", "datasets", "objective", "formula") if name not in body)
        if unknown or lacking:
            raise ValueError(f"{path} lacks {lacking}" if lacking else f"{path} has unknown fields {unknown}")
        values: dict[str, Any] = {"citation": "", "adapter": False, "command": "", **body}
        return cls(**values)
