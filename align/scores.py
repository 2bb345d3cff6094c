"""Scores of samples: every scorer on every sample, one score of them, a file that survives being killed.

samples.jsonl ─► scorers ─► reward transforms ─► weighted sum ─► scores.jsonl

python -m align.scores --config launch/recipes/scores.yaml --samples samples.jsonl --output scores.jsonl
python -m align.scores --samples samples.jsonl --output scores.jsonl --scorers math --column answer
python -m align.scores --help       every key, its default and what it means
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import xxhash

from align import judges, reward_scorer, settings, verifiers, world_scorers  # noqa: F401  # registers scorers
from align.combining import Combiner, combine
from align.console import quiet_libraries
from align.errors import RunError
from align.keys import Schema
from align.samples import Group, read
from align.saving import explained
from align.score_lines import SampleScore, append, mend, read_scores
from align.scorers import SCORERS, Scored, Scorer
from data.rescoring import check_transforms, name_of
from objectives import REWARD_TRANSFORMS
from objectives.reward_transforms import RewardTransform

__all__ = [
    "SCORERS",
    "Report",
    "SampleScore",
    "Scored",
    "Scorer",
    "Scoring",
    "combine",
    "read_scores",
    "score_file",
]

BLOCK = 256
"""Samples scored together, about: a kill loses no more of a model's work, and a batch has lengths to choose from."""
EVERY = 10.0
"""Seconds between two lines about progress, at least."""


@runtime_checkable
class Entry(Protocol):
    """A scorer of a recipe; ``align.typed.Entry`` is one."""

    @property
    def name(self) -> str: ...
    @property
    def built(self) -> Any: ...
    @property
    def weight(self) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OfScorer:
    """What one scorer made of all samples."""

    scored: int
    mean: float
    """NaN where none could be scored."""
    lowest: float
    highest: float
    unscored: Mapping[str, int]
    """Samples without a score, by reason."""
    particulars: Mapping[str, str]
    """By reason, what was said of the first such sample."""
    counts: Mapping[str, float]
    """What else happened, summed over samples."""
    rates: Mapping[str, float]
    """Shares that the scorer makes of its counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a file of scores holds."""

    prompts: int
    samples: int
    combined: int
    """Samples that have a combined score."""
    answered: int
    """Samples with an extracted answer."""
    settings: str
    scorers: Mapping[str, OfScorer] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """For people: a line for each scorer, and one for each reason why samples have no score."""
        found = [f"{self.samples} samples of {self.prompts} prompts; {self.combined} have a score"]
        for name, each in self.scorers.items():
            told = f"{name}: {each.scored} scored"
            if each.scored:
                told += f", mean {each.mean:.4g}, from {each.lowest:.4g} to {each.highest:.4g}"
            more = [f"{what} {number:g}" for what, number in each.counts.items()]
            more += [f"{what} {share:.1%}" for what, share in each.rates.items()]
            found.append("; ".join([told, *more]))
            for reason, number in each.unscored.items():
                first = f" (first: {each.particulars[reason]})" if each.particulars.get(reason) else ""
                found.append(f"{name}: {number} could not be scored: {reason}{first}")
        return found


class Scoring:
    """Scorers, weights and transforms, ready to score groups. A context manager: frees what scorers hold at its end.

    Args:
        scorers: at least one. Two of a name are told apart by a number: ``reward_model``, ``reward_model_2``.
        transforms: reward transforms, in the order in which they run.
    Raises:
        RunError: a scorer can't work, whatever the samples are.
        DataError: a transform can't.
    """

    def __init__(self, scorers: Sequence[Entry], transforms: Sequence[RewardTransform] = ()) -> None:
        if not scorers:
            raise RunError(f"scorers is empty; name at least one of {', '.join(SCORERS.names())}")
        self.scorers: dict[str, Scorer] = {}
        weights: dict[str, float] = {}
        kinds: Counter[str] = Counter()
        for entry in scorers:
            kinds[entry.name] += 1
            name = entry.name if kinds[entry.name] == 1 else f"{entry.name}_{kinds[entry.name]}"
            if not math.isfinite(entry.weight):
                raise RunError(f"scorers: the weight of {name} must be a finite number, got {entry.weight!r}")
            self.scorers[name], weights[name] = entry.built, entry.weight
        if not any(weights.values()):
            raise RunError("scorers: every weight is 0, so there is no score; give one of them a weight")
        check_transforms(transforms)
        self.settings = _settings(scorers, transforms)
        self._combiner = Combiner(weights, transforms)
        self._answering = next((name for name, each in self.scorers.items() if getattr(each, "answers", False)), None)

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, *_: object) -> None:
        for scorer in self.scorers.values():
            getattr(scorer, "close", lambda: None)()

    def __call__(self, groups: Sequence[Group]) -> list[tuple[SampleScore, ...]]:
        """The scores of every group's samples.

        Raises:
            RunError: a scorer can't go on, or gives a number that is not finite; names the sample.
        """
        samples = [sample for group in groups for sample in group.samples]
        found: dict[str, list[Scored]] = {}
        for name, scorer in self.scorers.items():
            found[name] = scorer(groups)
            assert len(found[name]) == len(samples), f"{name} must give one score for each sample"
            for sample, each in zip(samples, found[name], strict=True):
                if each.score is not None and not math.isfinite(each.score):
                    raise RunError(
                        f"{name} gives {each.score} to sample {sample.index} of prompt {sample.prompt_id}, row "
                        f"{sample.row}; mend the scorer, or leave the sample out"
                    )
        by_group = list(_by_group(groups, found))
        combined = self._combiner(groups, [{name: [one.score for one in column] for name, column in each.items()}
                                           for each in by_group])  # fmt: skip
        return [
            tuple(self._line(group, i, each, total[i]) for i in range(len(group.samples)))
            for group, each, total in zip(groups, by_group, combined, strict=True)
        ]

    def _line(self, group: Group, i: int, found: Mapping[str, Sequence[Scored]], score: float | None) -> SampleScore:
        own = {name: column[i] for name, column in found.items()}
        return SampleScore(
            prompt_id=group.prompt_id,
            sample=group.samples[i].index,
            text_key=group.samples[i].text_key,
            answer=None if self._answering is None else own[self._answering].answer,
            scores={name: each.score for name, each in own.items()},
            score=score,
            reasons={name: each.reason for name, each in own.items() if each.score is None},
            counts={name: each.counts for name, each in own.items() if each.counts},
            settings=self.settings,
        )


def score_file(
    samples: Path,
    output: Path,
    scorers: Sequence[Entry],
    transforms: Sequence[RewardTransform],
    say: Callable[[str], None],
) -> Report:
    """Scores every sample of a file; goes on where a run before was killed.

    Args:
        samples: as ``align.samples`` writes them.
        output: JSON lines, see ``align.score_lines``.
        scorers: at least one.
        transforms: reward transforms, in the order in which they run.
        say: takes a line about progress, and the lines of the report.
    Returns:
        What the whole file holds, whichever run made it.
    Raises:
        RunError: the samples can't be read, a scorer can't work or go on, or the output holds scores of other samples
            or by other scorers. What was scored before is kept.
    """
    prompts, number = _counted(samples)  # all of it is read once, before a model is loaded
    if output.exists() and output.samefile(samples):
        raise RunError(f"{output} holds the samples; give another output")
    with Scoring(scorers, transforms) as scoring:
        with explained(output.parent, "run the same command again, or give another output"):
            output.parent.mkdir(parents=True, exist_ok=True)
            output.touch()
        with _alone(output):
            done = mend(output, read(samples), scoring.settings)
            if done:
                say(f"{done} of {prompts} prompts are scored already")
            last = time.monotonic()
            for block in _blocks(islice(read(samples), done, None)):
                append(output, (each for group in scoring(block) for each in group))
                done += len(block)
                if time.monotonic() - last >= EVERY and done < prompts:
                    last = time.monotonic()
                    say(f"{done} of {prompts} prompts scored")
        report = _reported(output, samples, prompts, number, scoring)
    for line in report.lines():
        say(line)
    return report


def _counted(samples: Path) -> tuple[int, int]:
    prompts = number = 0
    for group in read(samples):
        prompts, number = prompts + 1, number + len(group.samples)
    if not prompts:
        raise RunError(f"{samples} holds no samples; python -m align.sample makes some")
    return prompts, number


@contextlib.contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Keeps a second process from writing the same lines."""
    with output.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"another process is writing {output}; wait for it, or give another output") from None
        yield


def _blocks(groups: Iterable[Group]) -> Iterator[list[Group]]:
    block: list[Group] = []
    size = 0
    for group in groups:
        block.append(group)
        size += len(group.samples)
        if size >= BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


def _by_group(groups: Sequence[Group], found: Mapping[str, Sequence[Scored]]) -> Iterator[dict[str, Sequence[Scored]]]:
    start = 0
    for group in groups:
        end = start + len(group.samples)
        yield {name: column[start:end] for name, column in found.items()}
        start = end


def _settings(scorers: Sequence[Entry], transforms: Sequence[RewardTransform]) -> str:
    """Hash of everything that scores depend on besides the samples."""
    parts: list[Any] = []
    for entry in scorers:
        free = getattr(entry.built, "free", ())
        keys = {key: value for key, value in asdict(entry.built).items() if key not in free}
        parts.append([entry.name, entry.weight, keys, getattr(entry.built, "fingerprint", str)()])
    parts += [[name_of(each), asdict(each)] for each in transforms]  # type: ignore[call-overload]
    return xxhash.xxh3_64_hexdigest(json.dumps(parts, sort_keys=True, default=str).encode())


def _reported(output: Path, samples: Path, prompts: int, number: int, scoring: Scoring) -> Report:
    values: dict[str, list[float]] = {name: [] for name in scoring.scorers}
    unscored: dict[str, Counter[str]] = {name: Counter() for name in scoring.scorers}
    particulars: dict[str, dict[str, str]] = {name: {} for name in scoring.scorers}
    counts: dict[str, Counter[str]] = {name: Counter() for name in scoring.scorers}
    combined = answered = 0
    for _, scores in read_scores(output, read(samples)):
        for each in scores:
            combined, answered = combined + (each.score is not None), answered + (each.answer is not None)
            for name, score in each.scores.items():
                values[name] += [] if score is None else [score]
                counts[name].update(each.counts.get(name, {}))  # type: ignore[arg-type]: numbers, not only whole ones
            for name, reason in each.reasons.items():
                kind, _, more = reason.partition(": ")
                unscored[name][kind] += 1
                particulars[name].setdefault(kind, more)
    return Report(
        prompts=prompts,
        samples=number,
        combined=combined,
        answered=answered,
        settings=scoring.settings,
        scorers={
            name: OfScorer(
                scored=len(found),
                mean=math.fsum(found) / len(found) if found else math.nan,
                lowest=min(found, default=math.nan),
                highest=max(found, default=math.nan),
                unscored=dict(unscored[name].most_common()),
                particulars=particulars[name],
                counts=dict(counts[name]),
                rates=_rates(scoring.scorers[name], counts[name]),
            )
            for name, found in values.items()
        },
    )


def _rates(scorer: Any, counts: Mapping[str, float]) -> Mapping[str, float]:
    return scorer.rates(counts) if hasattr(scorer, "rates") else {}


@dataclass(frozen=True, kw_only=True)
class FilesSection:
    """What is scored."""

    samples: str
    """File that python -m align.sample wrote."""
    output: str
    """File of scores, JSON lines. One that holds a part of the same scores is gone on with."""


SCHEMA = Schema(
    sections={"files": FilesSection},
    named={"scorers": SCORERS, "reward_transforms": REWARD_TRANSFORMS},
    required=("scorers", "files"),
    example="launch/recipes/scores.yaml",
    command="python -m align.scores",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Scores; see ``align.settings.command``."""

    def do(config: str | None, words: list[str]) -> None:
        found = settings.read_settings(config, words, SCHEMA)
        quiet_libraries()
        files: FilesSection = found["files"]
        transforms = [entry.built for entry in found["reward_transforms"]]
        score_file(Path(files.samples), Path(files.output), found["scorers"], transforms, settings.say)

    return settings.command(arguments, __doc__, SCHEMA, do)


if __name__ == "__main__":
    sys.exit(main())
