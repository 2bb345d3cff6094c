"""Samples to be scored, as a sampler would write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.samples import Group, Origin, Sample, append, prompt_id
from objectives.rows import Text

ORIGIN = Origin(engine="test 1", model="m", fingerprint="f", template="t", sampling={"n": 4, "temperature": 1.0})


def group(
    prompt: str | Text,
    texts: Sequence[str],
    columns: Mapping[str, Any] | None = None,
    finish_reasons: Sequence[str] | None = None,
) -> Group:
    """All samples of one prompt; ``texts`` in order."""
    reasons = finish_reasons or ["stop"] * len(texts)
    return Group(
        samples=tuple(
            Sample(
                prompt_id=prompt_id(prompt),
                index=i,
                row=0,
                prompt=prompt,
                text=text,
                token_ids=(),
                logprob=None,
                finish_reason=reason,
                seed=i,
                origin=ORIGIN,
                columns=columns or {},
            )
            for i, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        )
    )


def chat(question: str, texts: Sequence[str], columns: Mapping[str, Any] | None = None, **more: Any) -> Group:
    """The same for a prompt of one message."""
    return group(({"role": "user", "content": question},), texts, columns, **more)


def write_samples(path: Path, groups: Sequence[Group]) -> Path:
    """A file of samples."""
    for each in groups:
        append(path, each.samples)
    return path
