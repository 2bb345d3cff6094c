"""Samples on disk: JSON lines, one per response, all responses to a prompt one after the other.

    {"prompt_id": "5f…", "sample": 0, "row": 17, "prompt": …, "text": …, "token_ids": […], "logprob": -31.2,
     "finish_reason": "stop", "seed": 1234, "origin": {"engine": "vllm 0.30.0", "model": …, …}, "columns": {…}}

A file is only ever appended to, all samples of a prompt in one write: after a kill its last line may be torn, and
nothing else. Lines know where they come from, so that files may be joined.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any

import xxhash

from align.errors import RunError
from data.files import replacing
from data.rowstore import prompt_key
from objectives.rows import Text

FINISHED = ("stop", "length")
"""How a response ends: with an end token or stop string, or at the limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a sample was drawn from, and how: two samples of equal origin are draws of one distribution."""

    engine: str
    """Name and version, e.g. ``vllm 0.30.0``."""
    model: str
    """Path, Hub id, or name that a server gives it."""
    fingerprint: str
    """Of the weights, adapter included; see ``align.fingerprints``. Of a server, what it says of itself."""
    template: str
    """Hash of the chat template."""
    sampling: Mapping[str, Any]
    """``align.sampling.Sampling`` without what no sample depends on."""

    @property
    def distribution(self) -> tuple[str, str, str]:
        """What has to be equal for samples to be comparable, whichever engine drew them."""
        drawn = {key: value for key, value in self.sampling.items() if key not in ("n", "seed")}
        return self.fingerprint, self.template, json.dumps(drawn, sort_keys=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One response to one prompt."""

    prompt_id: str
    """Hash of the prompt; see ``prompt_id``."""
    index: int
    """Which of the prompt's samples it is, from 0."""
    row: int
    """Where the prompt first stands in its dataset."""
    prompt: Text
    """As it stands in the dataset; the template is applied when it is asked."""
    text: str
    """The response without its end token. Plain text keeps its leading space."""
    token_ids: tuple[int, ...]
    """Of the response, its end token included; empty where a server does not tell."""
    logprob: float | None
    """log π(response | prompt) in nats, summed over ``token_ids``, at temperature 1 whatever the sampling was."""
    finish_reason: str
    """One of ``FINISHED``."""
    seed: int
    origin: Origin
    columns: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Columns of the dataset that were kept, e.g. the right answer."""

    @property
    def mean_logp(self) -> float | None:
        """``logprob`` of a token, on average; None where it is not known."""
        return None if self.logprob is None or not self.token_ids else self.logprob / len(self.token_ids)

    @property
    def text_key(self) -> str:
        """Hash of the text, by which scores are matched with samples."""
        return xxhash.xxh3_64_hexdigest(self.text.encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All samples of one prompt, by index."""

    samples: tuple[Sample, ...]

    @property
    def prompt_id(self) -> str:
        """Of the prompt."""
        return self.samples[0].prompt_id

    @property
    def prompt(self) -> Text:
        """The prompt."""
        return self.samples[0].prompt

    @property
    def columns(self) -> Mapping[str, Any]:
        """Columns of the prompt's row."""
        return self.samples[0].columns


def prompt_id(prompt: Text) -> str:
    """32 hexadecimal digits: equal prompts have equal ids, in whatever dataset they are."""
    return xxhash.xxh3_128_hexdigest(prompt_key(prompt).encode())


def append(path: Path, samples: Sequence[Sample]) -> None:
    """Writes all samples of one or more prompts, or nothing, at the end of a file."""
    text = "".join(_line(sample) for sample in samples)
    with path.open("ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def _line(sample: Sample) -> str:
    values = {
        "prompt_id": sample.prompt_id,
        "sample": sample.index,
        "row": sample.row,
        "prompt": sample.prompt if isinstance(sample.prompt, str) else [dict(each) for each in sample.prompt],
        "text": sample.text,
        "token_ids": list(sample.token_ids),
        "logprob": sample.logprob,
        "finish_reason": sample.finish_reason,
        "seed": sample.seed,
        "origin": asdict(sample.origin),
    }
    if sample.columns:
        values["columns"] = dict(sample.columns)
    return json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"


def read(path: Path) -> Iterator[Group]:
    """Groups of a file, one at a time.

    Raises:
        RunError: there is no such file, a line is no sample, or the samples of a prompt are not 0, 1, 2, … in a row;
            names the line.
    """
    seen: set[str] = set()
    for key, members in groupby(_samples(path), key=lambda pair: pair[1].prompt_id):
        numbered = list(members)
        first, samples = numbered[0][0], tuple(sample for _, sample in numbered)
        if key in seen:
            raise RunError(
                f"{path}, line {first}: prompt {key} occurs again, after others; join files of different prompts only"
            )
        seen.add(key)
        if [sample.index for sample in samples] != list(range(len(samples))):
            raise RunError(
                f"{path}, line {first}: the samples of prompt {key} are not numbered 0 to {len(samples) - 1}; "
                "a line is missing or twice there"
            )
        yield Group(samples=samples)


def _samples(path: Path) -> Iterator[tuple[int, Sample]]:
    if not path.is_file():
        raise RunError(f"there is no file of samples {str(path)!r}; python -m align.sample makes one")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            yield number, parse(line, f"{path}, line {number}")


def parse(line: str, where: str) -> Sample:
    """The sample of a line.

    Raises:
        RunError: it is none.
    """
    try:
        values = json.loads(line)
        prompt = values["prompt"]
        sample = Sample(
            prompt_id=values["prompt_id"],
            index=int(values["sample"]),
            row=int(values["row"]),
            prompt=prompt if isinstance(prompt, str) else tuple(prompt),
            text=values["text"],
            token_ids=tuple(values["token_ids"]),
            logprob=values["logprob"],
            finish_reason=values["finish_reason"],
            seed=int(values["seed"]),
            origin=Origin(**values["origin"]),
            columns=values.get("columns", {}),
        )
    except (ValueError, KeyError, TypeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise RunError(f"{where}: not a sample ({what}); expected a line that python -m align.sample wrote") from None
    if not isinstance(sample.text, str) or not (sample.logprob is None or math.isfinite(sample.logprob)):
        raise RunError(f"{where}: text must be text and logprob a finite number or null")
    return sample


def repair(path: Path, n: int) -> set[str]:
    """Cuts off what a killed process left unfinished at the end, and says which prompts are complete.

    Args:
        path: a file of samples, which may not be there yet.
        n: samples that a complete prompt has.
    Returns:
        Ids of the prompts that have ``n`` samples.
    Raises:
        RunError: lines before the last prompt are damaged; nothing is changed then.
    """
    if not path.is_file():
        return set()
    done: set[str] = set()
    keep = start = 0
    current: list[int] = []
    name = ""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.endswith(b"\n"):
                break
            sample = parse(raw.decode("utf-8", errors="replace"), f"{path}, line {number}")
            start += len(raw)
            if sample.prompt_id != name:
                if current:
                    raise _incomplete(path, name, len(current), n)
                name = sample.prompt_id
                if name in done:
                    raise RunError(f"{path}, line {number}: prompt {name} occurs again; give another output")
            current.append(sample.index)
            if current != list(range(len(current))):
                raise RunError(f"{path}, line {number}: sample {sample.index} of prompt {name} is out of order")
            if len(current) == n:
                done.add(name)
                keep, current = start, []
                name = ""
    if keep != path.stat().st_size:
        with path.open("rb+") as file:
            file.truncate(keep)
    return done


def _incomplete(path: Path, name: str, found: int, n: int) -> RunError:
    return RunError(
        f"{path}: prompt {name} has {found} samples, not {n}; give the n they were made with, or a new output"
    )


def sort(path: Path, order: Sequence[str]) -> None:
    """Sorts a file by prompts, so that it is the same wherever its making was interrupted.

    Args:
        path: a file of samples, which may not be there.
        order: ids of prompts; those that are not among them come last.
    """
    if not path.is_file():
        return
    places: dict[str, tuple[int, int]] = {}
    with path.open("rb") as file:
        position = 0
        for line in file:
            name = json.loads(line)["prompt_id"]
            first, _ = places.get(name, (position, 0))
            position += len(line)
            places[name] = (first, position)
        known = set(order)
        wanted = [*(name for name in order if name in places), *(name for name in places if name not in known)]
        if wanted == list(places):
            return
        with replacing(path) as target:
            for name in wanted:
                first, end = places[name]
                file.seek(first)
                target.write(file.read(end - first))


def total(groups: Iterable[Group]) -> int:
    """Samples in groups."""
    return sum(len(group.samples) for group in groups)
