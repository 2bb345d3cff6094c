"""Scores on disk: JSON lines, one for each sample, in the order of the samples.

    {"prompt_id": "5f…", "sample": 0, "text_key": "0c…", "answer": "12", "scores": {"math": 1.0, "judge": null},
     "score": null, "reasons": {"judge": "the judge gave no verdict"}, "counts": {"judge": {…}}, "settings": "9a…"}

A file is only ever appended to, all samples of a prompt in one write. ``settings`` is a hash of the scorers: lines of
different ones do not go into one file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from align.errors import RunError
from align.samples import Group, Sample
from align.saving import explained

REMEDY = "give another output, or remove the file"


def _nothing() -> Mapping[str, str]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleScore:
    """All that is known of what one sample is worth."""

    prompt_id: str
    sample: int
    """Which of the prompt's samples it is."""
    text_key: str
    """``Sample.text_key``: of the text that was scored."""
    answer: str | None
    """The extracted answer, of the first scorer that finds answers; None where it found none."""
    scores: Mapping[str, float | None]
    """By the scorer's name, each in its own unit; None where it could not score."""
    score: float | None
    """All of them combined; None where one that counts is missing."""
    reasons: Mapping[str, str] = field(default_factory=_nothing)
    """By the scorer's name, why there is no score."""
    counts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By the scorer's name, what else happened; adds up over samples."""
    settings: str
    """Hash of the scorers, their weights and the reward transforms."""


def append(path: Path, scores: Iterable[SampleScore]) -> None:
    """Writes all samples of one or more prompts, or nothing, at the end of a file.

    Raises:
        RunError: it can't be written.
    """
    text = "".join(map(_line, scores))
    with explained(path.parent, "run the same command again: it goes on from there"), path.open("ab") as file:
        file.write(text.encode("utf-8", "surrogatepass"))
        file.flush()
        os.fsync(file.fileno())


def _line(each: SampleScore) -> str:
    values = {
        "prompt_id": each.prompt_id,
        "sample": each.sample,
        "text_key": each.text_key,
        "answer": each.answer,
        "scores": dict(each.scores),
        "score": each.score,
        "settings": each.settings,
    }
    if each.reasons:
        values["reasons"] = dict(each.reasons)
    if each.counts:
        values["counts"] = {name: dict(numbers) for name, numbers in each.counts.items()}
    return json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"


def parse(line: str | bytes, where: str) -> SampleScore:
    """The scores of a line.

    Raises:
        RunError: it holds none.
    """
    try:
        found = SampleScore(**json.loads(line))
        numbers = [number for number in (found.score, *found.scores.values()) if number is not None]
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError("a score is not finite")
        if not all(isinstance(each, str) for each in (found.prompt_id, found.text_key, found.settings)):
            raise ValueError("prompt_id, text_key and settings must be text")
    except (ValueError, TypeError, AttributeError) as error:
        why = " ".join(str(error).split()).replace("SampleScore.__init__() ", "")
        raise RunError(
            f"{where}: no scores of a sample ({why}); expected a line that python -m align.scores wrote"
        ) from None
    return found


def read_scores(path: Path, groups: Iterable[Group]) -> Iterator[tuple[Group, tuple[SampleScore, ...]]]:
    """Groups with their scores, one group at a time.

    Args:
        path: a file of scores.
        groups: the samples that were scored, all of them and in their order.
    Raises:
        RunError: there is no such file, a line holds no scores, or they are not these samples' (one is missing, one too
            many, another text, other scorers than in the lines before); names the line.
    """
    if not path.is_file():
        raise RunError(f"there is no file of scores {str(path)!r}; python -m align.scores makes one")
    settings: str | None = None
    with path.open("rb") as file:
        number = 0
        for group in groups:
            found: list[SampleScore] = []
            for sample in group.samples:
                number += 1
                line = file.readline()
                if not line:
                    raise RunError(
                        f"{path} ends before line {number}, where sample {sample.index} of prompt {sample.prompt_id} "
                        "should be; score these samples to the end, or give the samples that were scored"
                    )
                found.append(parse(line, f"{path}, line {number}"))
                _require_same(found[-1], sample, f"{path}, line {number}", "give the samples that were scored")
                settings = settings or found[-1].settings
                if found[-1].settings != settings:
                    raise RunError(
                        f"{path}, line {number}: made with other scorers, weights or reward_transforms than the lines "
                        "before; score the samples again"
                    )
            yield group, tuple(found)
        if file.readline():
            raise RunError(
                f"{path}, line {number + 1}: there are only {number} samples; give the samples that were scored"
            )


def _require_same(score: SampleScore, sample: Sample, where: str, way_out: str) -> None:
    if (score.prompt_id, score.sample) != (sample.prompt_id, sample.index):
        raise RunError(
            f"{where}: scores of sample {score.sample} of prompt {score.prompt_id} stand where those of sample "
            f"{sample.index} of prompt {sample.prompt_id} should; {way_out}"
        )
    if score.text_key != sample.text_key:
        raise RunError(
            f"{where}: sample {score.sample} of prompt {score.prompt_id} had another text when it was scored; {way_out}"
        )


def mend(path: Path, groups: Iterable[Group], settings: str) -> int:
    """Cuts off what a killed process left unfinished at the end.

    Args:
        path: a file of scores, which may not be there yet.
        groups: the samples that are to be scored, from the first on.
        settings: hash of the scorers they are to be scored by.
    Returns:
        How many groups are done.
    Raises:
        RunError: the file holds scores of other samples or by other scorers; nothing is changed then.
    """
    if not path.is_file():
        return 0
    done = keep = number = 0
    with path.open("rb") as file:
        for group in groups:
            lines = [line for _ in group.samples if (line := file.readline()).endswith(b"\n")]
            for line, sample in zip(lines, group.samples, strict=False):
                number += 1
                where = f"{path}, line {number}"
                found = parse(line, where)
                _require_same(found, sample, where, REMEDY)
                if found.settings != settings:
                    raise RunError(f"{where}: made with other scorers, weights or reward_transforms; {REMEDY}")
            if len(lines) < len(group.samples):
                break
            done, keep = done + 1, file.tell()
        else:
            if file.readline().endswith(b"\n"):
                raise RunError(f"{path}, line {number + 1}: there are only {number} samples; {REMEDY}")
    if keep != path.stat().st_size:
        with path.open("rb+") as file:
            file.truncate(keep)
    return done
