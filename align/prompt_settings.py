"""Keys of prompts to sample from; apart from what reads them, so that settings are read without it."""

from __future__ import annotations

from dataclasses import dataclass, field

from objectives.checks import require


@dataclass(frozen=True, kw_only=True)
class PromptSection:
    """Where prompts come from."""

    dataset_name: str
    """Hub id, or a local file or folder (json, jsonl, parquet, arrow, csv, also .gz): anything that can be trained on,
    or rows with a prompt alone."""
    dataset_config: str | None = None
    """Name of the dataset's configuration on the Hub."""
    split: str = "train"
    """Which split to read; of a single file, all of it."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our column names to theirs, e.g. {prompt: question}."""
    format: str = "auto"
    """How rows are written; auto recognises it."""
    as_chat: bool = False
    """Turn plain strings and HH transcripts into messages, rendered with the chat template."""
    max_rows: int | None = None
    """Read only this many rows."""
    keep: list[str] = field(default_factory=list)
    """Columns that every sample carries along, e.g. [answer], for what scores it."""

    def __post_init__(self) -> None:
        if self.max_rows is not None:
            require("max_rows", self.max_rows, self.max_rows >= 1, ">= 1")
