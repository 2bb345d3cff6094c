"""Answers to prompts on disk: JSON lines, one for each prompt, with what they were chosen from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from align.samples import Group
from align.selection import Choice
from data.files import replacing


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a strategy answers to a prompt."""

    prompt_id: str
    row: int
    prompt: Any
    picks: tuple[dict[str, Any], ...]
    """Best first: ``answer``, ``text``, ``count`` and ``mean_reward``; nothing where there was nothing to choose."""
    samples: int
    """It was chosen from."""
    fallback_used: bool


def answered(group: Group, choice: Choice, kept: Sequence[int], *, texts: bool = False) -> Answer:
    """A choice as an answer.

    Args:
        group: the prompt and all its samples.
        choice: among the samples that were kept.
        kept: their indices.
        texts: whether every response was its own answer, so that there is none besides the text.
    """
    first = group.samples[0]
    return Answer(
        prompt_id=group.prompt_id,
        row=first.row,
        prompt=first.prompt if isinstance(first.prompt, str) else [dict(each) for each in first.prompt],
        picks=tuple(
            {
                "answer": None if texts else pick.answer,
                "text": group.samples[kept[pick.index]].text,
                "sample": kept[pick.index],
                "count": pick.count,
                "mean_reward": pick.mean_reward,
            }
            for pick in choice.picks
        ),
        samples=len(group.samples),
        fallback_used=choice.fallback_used,
    )


def write(path: Path, answers: Iterable[Answer], strategy: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Writes the answers, and says how many there are.

    Args:
        path: replaced if it is there.
        answers: one for each prompt.
        strategy: its name and settings; every line has them.
        say: told how many prompts have an answer.
    """
    counts: Counter[str] = Counter()
    with replacing(path) as file:
        for each in answers:
            counts["prompts"] += 1
            counts["none"] += not each.picks
            counts["fallback"] += each.fallback_used
            line = {**asdict(each), "strategy": dict(strategy)}
            file.write((json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode())
    say(f"{path}: {counts['prompts'] - counts['none']} of {counts['prompts']} prompts answered")
    if counts["none"]:
        say(f"  {counts['none']} have no answer that could be chosen")
    if counts["fallback"]:
        say(f"  {counts['fallback']} where no answer was frequent enough: the most frequent one was taken")
