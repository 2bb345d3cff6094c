"""Rows: prompts with their responses, before tokens exist."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

Message = Mapping[str, Any]
"""One chat message: ``role``, ``content`` and whatever the chat template reads."""

Text = str | tuple[Message, ...]
"""Plain text, or messages still to be rendered with a chat template."""


def _no_scores() -> Mapping[str, float]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One of several responses to a prompt, with its score."""

    text: Text
    score: float
    rewards: Mapping[str, float] = field(default_factory=_no_scores)
    """Several rewards by name (helpful, harmless), where the data has them; ``score`` is their sum unless the data says
    otherwise."""
    mean_logp: float | None = None
    """Mean log-prob of a token under the policy that drew it, nats, where the data says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One prompt and the responses to it.

    Rows are frozen: relabelers return new ones (``dataclasses.replace``) and never edit what they were given.
    """

    prompt: Text
    """Everything the responses share. Plain text goes up to and including its last marker."""
    responses: Mapping[str, Text]
    """Response by leg name: ``chosen``, ``rejected``, ``gold``, ``completion``. Plain text keeps its leading space."""
    scores: Mapping[str, float] = field(default_factory=_no_scores)
    """Score by leg name, where the data has scores; attributes and columns by name, where an objective reads them."""
    label: bool | None = None
    """Whether the ``completion`` is desirable (thumbs up); None where the data has no labels."""
    candidates: tuple[Candidate, ...] = ()
    """Scored responses that a rule has not yet turned into legs; empty afterwards."""
    group: str = ""
    """What evaluation reports apart: rows of one group are also measured on their own."""
    source: str = ""
    """Where the row came from, as the user wrote it."""
    index: int = 0
    """The row's number in its source, from 0: what error messages and reports name."""

    @property
    def where(self) -> str:
        """``source, row index``, for messages."""
        return f"{self.source}, row {self.index}"
