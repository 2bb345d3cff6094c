"""Rescoring: reward transforms over the scored responses of loaded rows, before a rule makes pairs of them."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from data.encoders import Encoder, check_encoder
from data.errors import DataError
from data.sources import LoadedRows
from data.store import cache_dir, digest, write_folder
from objectives.registry import REWARD_TRANSFORMS
from objectives.reward_transforms import RewardTransform, answers_of, with_scores
from objectives.rows import Row

KEY = "reward_transforms: encoder"
"""What messages about an encoder name."""
ROWS_AT_A_TIME = 256
"""Rows whose texts are embedded together."""


def name_of(transform: RewardTransform) -> str:
    """As recipes write it."""
    return REWARD_TRANSFORMS.name_of(transform)


def check_transforms(transforms: Sequence[RewardTransform]) -> None:
    """Refuses, before any row is read, what can't work whatever the rows are.

    Raises:
        DataError: an encoder can't be loaded, or a transform has no effect because the next one replaces all scores.
    """
    for before, transform in pairwise(transforms):
        if transform.replaces:
            raise DataError(
                f"reward_transforms: {name_of(before)} has no effect before {name_of(transform)}, which takes the "
                "place of all scores; put it after, or leave it out"
            )
    for name in _encoder_names(transforms):
        check_encoder(name, key=KEY)


def rescored(loaded: Sequence[LoadedRows], transforms: Sequence[RewardTransform]) -> list[LoadedRows]:
    """The rows with other scores of their candidates, best first; rows without candidates as they are.

    Raises:
        DataError: no row has candidates, a row lacks what a transform reads, or a transform changes no score.
    """
    names = ", ".join(dict.fromkeys(each.source for each in loaded))
    rows = [row for each in loaded for row in each.rows if row.candidates]
    if not rows:
        raise DataError(
            f"{names}: reward_transforms change the scores of several responses to a prompt, and the rows have none; "
            "use lists of scored responses (responses: [{text, score}, …]), or leave reward_transforms out"
        )
    scores = iter(_stored_scores(rows, transforms, names))
    return [
        replace(each, rows=[with_scores(row, next(scores)) if row.candidates else row for row in each.rows])
        for each in loaded
    ]


def told(
    before: Sequence[LoadedRows], after: Sequence[LoadedRows], transforms: Sequence[RewardTransform]
) -> dict[str, Any]:
    """For the report: which transforms ran on how many lists, and how many of these have another best response now."""
    if not transforms:
        return {}
    pairs = [
        (old.candidates[0].text, new.candidates[0].text)
        for one, other in zip(before, after, strict=True)
        for old, new in zip(one.rows, other.rows, strict=True)
        if old.candidates
    ]
    changed = sum(old != new for old, new in pairs)
    return {"reward_transforms": {"names": list(map(name_of, transforms)), "rows": len(pairs), "best_changed": changed}}


def _encoder_names(transforms: Sequence[RewardTransform]) -> list[str]:
    return list(dict.fromkeys(getattr(each, "encoder", "") for each in transforms if hasattr(each, "encoder")))


def _stored_scores(rows: Sequence[Row], transforms: Sequence[RewardTransform], names: str) -> list[list[float]]:
    """Scores of every row's candidates; those an encoder went into are computed by one process and kept.

    Every rank prepares the rows, and all must make the same pairs, which a vector's last digit could decide.
    """
    encoders = {name: Encoder(name, key=KEY) for name in _encoder_names(transforms)}
    if not encoders:
        return _scores(rows, transforms, {}, names)
    key = digest(
        [[name_of(each), asdict(each)] for each in transforms],  # type: ignore[call-overload]
        [encoder.fingerprint for encoder in encoders.values()],
        *(
            [
                row.prompt,
                row.responses.get("gold"),
                [[c.text, c.score, dict(c.rewards), c.mean_logp] for c in row.candidates],
            ]
            for row in rows
        ),
    )
    folder = cache_dir() / "scores" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "scores.json").is_file():
            found = _scores(rows, transforms, encoders, names)

            def fill(path: Path) -> None:
                (path / "scores.json").write_text(json.dumps(found))

            write_folder(folder, fill)
    return json.loads((folder / "scores.json").read_text())


def _scores(
    rows: Sequence[Row], transforms: Sequence[RewardTransform], encoders: Mapping[str, Encoder], names: str
) -> list[list[float]]:
    found: list[list[float]] = []
    changed = [False] * len(transforms)
    seen = [(math.inf, -math.inf)] * len(transforms)
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        block = rows[start : start + ROWS_AT_A_TIME]
        for name, encoder in encoders.items():
            encoder.prefetch(_texts(block, [each for each in transforms if getattr(each, "encoder", None) == name]))
        for row in block:
            with _named(row):
                answers = answers_of(row, encoders)
                for number, transform in enumerate(transforms):
                    after = transform(answers)
                    changed[number] |= not np.array_equal(after.scores, answers.scores)
                    low, high = seen[number]
                    seen[number] = min(low, answers.scores.min()), max(high, answers.scores.max())
                    answers = after
                if not np.isfinite(answers.scores).all():
                    raise ValueError("reward_transforms give a score that is not finite; mend the scores")
            found.append(answers.total().tolist())
    for transform, has_effect, (low, high) in zip(transforms, changed, seen, strict=True):
        if not has_effect:
            raise DataError(
                f"{names}: reward_transforms: {name_of(transform)} changes no score (those it gets lie between {low:g} "
                f"and {high:g}); change its keys, or leave it out"
            )
    return found


def _texts(rows: Sequence[Row], transforms: Sequence[Any]) -> list[str]:
    texts: list[str] = []
    for row in rows:
        with _named(row):
            texts += [text for transform in transforms for text in transform.reads(answers_of(row))]
    return texts


@contextlib.contextmanager
def _named(row: Row) -> Iterator[None]:
    """Puts a row's place before what is wrong with it."""
    try:
        yield
    except ValueError as error:
        raise DataError(f"{row.where}: {error}") from None
