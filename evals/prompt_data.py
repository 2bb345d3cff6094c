"""What the browser of prompts in a report holds: every prompt once, with its pairs and the answers of all models.

    {"runs": ["dpo"], "models": ["dpo", "sft"], "sets": ["acme/pairs, test"], "total": 1, "prompts": [
      {"key": "5f0c…", "set": 0, "prompt": [["", "…"]],
       "pairs": [{"row": "acme/pairs, row 17", "chosen": "…", "rejected": "…",
                  "at": [{"run": 0, "step": 300, "numbers": {"policy_chosen": -31.2, …}}]}],
       "answers": [{"model": 0, "step": 300, "sample": 0, "text": "…", "end": "stop", "tokens": 57, "scores": {}}]}]}

It stands in the page as JSON in a ``<script type="application/json">``, where nothing is run, with every character that
could end that element written as an escape.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from evals.curves import well_formed
from evals.generations_file import Generation, read_generations
from evals.pair_rows import PairRow, read_pairs
from evals.redact import public, redact, shown_name

MOST_BYTES = 60_000_000
"""Of text that a page holds; of larger files prompts are drawn."""
Key = tuple[str, str, str]
"""Dataset, split, prompt."""
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptData:
    """The browser's data, and what of the files it is."""

    json: str
    """Ready to stand inside a script element."""
    prompts: int
    """Shown."""
    total: int
    """In the files."""
    with_answers: int
    """Of those in the files, prompts that a model answered; they are shown before others."""
    models: Sequence[str]


def prompt_data(runs: Sequence[tuple[str, Path]], most_bytes: int = MOST_BYTES) -> PromptData | None:
    """Reads ``pairs.jsonl`` and ``generations.jsonl`` of runs; None where there is neither.

    Files are read twice: once for the size of every prompt, once for the texts of those that fit. Where not all fit,
    prompts with answers come first, and prompts are drawn by a hash of their names.

    Args:
        runs: name as it is shown, and folder.
        most_bytes: of text.

    Raises:
        ValueError: in one sentence, if a line can't be read.
    """
    sizes: dict[Key, int] = {}
    answered: set[Key] = set()
    for _, entry in _entries(runs):
        key = _key(entry)
        sizes[key] = sizes.get(key, 0) + _size(entry)
        if isinstance(entry, Generation):
            answered.add(key)
    if not sizes:
        return None
    shown, room = set[Key](), most_bytes
    for key in sorted(sizes, key=lambda each: (each not in answered, _hash(each))):
        if sizes[key] <= room:
            shown.add(key)
            room -= sizes[key]
    made = _Made([name for name, _ in runs])
    for run, entry in _entries(runs):
        if _key(entry) in shown:
            made.add(run, entry)
    body = made.body()
    body["total"] = len(sizes)
    return PromptData(
        json=escaped(body),
        prompts=len(shown),
        total=len(sizes),
        with_answers=len(answered),
        models=body["models"],
    )


def escaped(body: Any) -> str:
    """JSON that no character of can end the script element it stands in, and that is well-formed UTF-8."""
    text = json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return well_formed(text.translate(_ESCAPES))


class _Made:
    """The prompts as they come together."""

    def __init__(self, runs: Sequence[str]) -> None:
        self._runs = list(runs)
        self._models: dict[str, int] = {}
        self._sets: dict[str, int] = {}
        self._prompts: dict[Key, dict[str, Any]] = {}
        self._pairs: dict[tuple[Key, str, str, str], dict[str, Any]] = {}
        self._names: dict[str, int] = {}
        self._shown_names: dict[str, str] = {}
        self._answers: dict[tuple[Key, str, int, int], dict[str, Any]] = {}

    def add(self, run: int, entry: PairRow | Generation) -> None:
        key = _key(entry)
        prompt = self._prompts.get(key)
        if prompt is None:
            of = f"{shown_name(entry.dataset)}, {public(entry.split)}"
            # A link names a prompt; of one that stands in several sets the later ones are numbered.
            again = self._names[entry.prompt_id] = self._names.get(entry.prompt_id, 0) + 1
            prompt = self._prompts[key] = {
                "key": entry.prompt_id if again == 1 else f"{entry.prompt_id}-{again}",
                "set": self._sets.setdefault(of, len(self._sets)),
                "prompt": _turns(entry.prompt),
                "pairs": [],
                "answers": [],
            }
        if isinstance(entry, Generation):
            self._answer(run, key, prompt, entry)
            return
        same = key, entry.row, entry.chosen, entry.rejected
        pair = self._pairs.get(same)
        if pair is None:
            texts = {"chosen": redact(entry.chosen), "rejected": redact(entry.rejected)}
            pair = self._pairs[same] = {"row": public(entry.row), **texts, "at": []}
            prompt["pairs"].append(pair)
        pair["at"].append({"run": run, "step": entry.step, "numbers": dict(entry.numbers)})

    def _answer(self, run: int, key: Key, prompt: dict[str, Any], entry: Generation) -> None:
        same = key, entry.model, entry.step, entry.sample
        text, scores = redact(entry.text), dict(entry.scores)
        earlier = self._answers.get(same)
        if earlier is not None and earlier["text"] == text:
            # Runs that are compared may have judged one baseline's answers: shown once, with what each run found.
            for metric, value in scores.items():
                if earlier["scores"].setdefault(metric, value) != value:
                    earlier["scores"][f"{metric} ({self._runs[run]})"] = value
            return
        name = self._shown(entry.model) if earlier is None else f"{self._shown(entry.model)} ({self._runs[run]})"
        made = {
            "model": self._models.setdefault(name, len(self._models)),
            "step": entry.step,
            "sample": entry.sample,
            "text": text,
            "end": entry.finish_reason,
            "tokens": entry.tokens,
            "scores": scores,
        }
        self._answers.setdefault(same, made)
        prompt["answers"].append(made)

    def _shown(self, model: str) -> str:
        """Different models whose paths end alike are numbered."""
        if model not in self._shown_names:
            name, again = shown_name(model), 1
            taken = set(self._shown_names.values())
            while (shown := name if again == 1 else f"{name} ({again})") in taken:
                again += 1
            self._shown_names[model] = shown
        return self._shown_names[model]

    def body(self) -> dict[str, Any]:
        return {
            "runs": self._runs,
            "models": list(self._models),
            "sets": list(self._sets),
            "prompts": list(self._prompts.values()),
        }


def _entries(runs: Sequence[tuple[str, Path]]) -> Iterator[tuple[int, PairRow | Generation]]:
    # Answers first: they are few, and what people look for.
    for number, (_, folder) in enumerate(runs):
        yield from ((number, each) for each in read_generations(folder))
    for number, (_, folder) in enumerate(runs):
        yield from ((number, each) for each in read_pairs(folder))


def _key(entry: PairRow | Generation) -> Key:
    return entry.dataset, entry.split, entry.prompt_id


def _size(entry: PairRow | Generation) -> int:
    """About what it takes in the page, in bytes of UTF-8."""
    texts = [entry.text] if isinstance(entry, Generation) else [entry.chosen, entry.rejected]
    prompt = entry.prompt if isinstance(entry.prompt, str) else json.dumps(entry.prompt, ensure_ascii=False)
    return 400 + sum(len(text.encode("utf-8", "replace")) for text in (*texts, prompt))


def _turns(prompt: Any) -> list[list[str]]:
    """Role and text of each turn; a prompt that is text has one turn without a role."""
    if isinstance(prompt, str):
        return [["", redact(prompt)]]
    turns: list[list[str]] = []
    for turn in prompt:
        content = turn.get("content")
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        turns.append([str(turn.get("role", "")), redact(text)])
    return turns


def _hash(key: Key) -> bytes:
    return blake2b("\n".join(key).encode("utf-8", "replace"), digest_size=8).digest()
