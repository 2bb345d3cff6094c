"""What models wrote at evaluations, as tables for trackers: ``generations.jsonl``, read while it grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.tracker_adapters import SampleTable
from evals.generations_file import NAME, Generation, read_generations
from evals.redact import public, redact, shown_name

MOST_ROWS = 64
"""Of a table: a look at what a model writes. The run directory has all."""
MOST_TEXT = 4000
"""Characters of a prompt or a response that are shown."""
COLUMNS = ("step", "model", "prompt", "response", "tokens", "finish_reason")


class NewSamples:
    """Called again and again, gives each evaluation's answers once.

    Args:
        run_dir: where the file is or will be.
        told_before: answers of this step and earlier ones are left out: a resumed run told them.
    """

    def __init__(self, run_dir: Path, told_before: int = -1) -> None:
        self.path, self.told_before = run_dir / NAME, told_before
        self._told: set[tuple[str, str, int, str]] = set()
        self._seen = (0, 0)

    def __call__(self) -> list[SampleTable]:
        """Tables of what is new, one for each model on each split.

        Raises:
            ValueError: in one sentence, if a line can't be read.
        """
        if not self.path.is_file():
            return []
        status = self.path.stat()
        seen = (status.st_mtime_ns, status.st_size)
        if seen == self._seen:
            return []
        found: dict[tuple[str, str, int, str], list[Generation]] = {}
        for generation in read_generations(self.path.parent):
            if generation.step > self.told_before and generation.of not in self._told:
                kept = found.setdefault(generation.of, [])
                if len(kept) < MOST_ROWS:
                    kept.append(generation)
        self._seen = seen
        self._told |= found.keys()
        return [_table(generations) for generations in found.values()]


def _table(generations: Sequence[Generation]) -> SampleTable:
    first = generations[0]
    scores = list(dict.fromkeys(name for generation in generations for name in generation.scores))
    return SampleTable(
        name=f"samples/{public(first.split)}",
        step=first.step,
        columns=(*COLUMNS, *scores),
        rows=[
            (
                each.step,
                shown_name(each.model),
                _cut(_text(each.prompt)),
                _cut(each.text),
                each.tokens,
                each.finish_reason,
                *(each.scores.get(name) for name in scores),
            )
            for each in generations
        ],
    )


def _text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """A prompt as text; of messages, each with who speaks."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.get('role', '?')}: {message.get('content', '')}" for message in prompt)


def _cut(text: str) -> str:
    text = redact(text)
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}…"
