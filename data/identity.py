"""What a preparation depends on, without reading a row: files by size and time, Hub datasets by commit.

The identity may differ where the rows are the same (a file was touched, this package changed): then rows are read, and
their content decides. It must never be the same where rows could differ; where that can't be known it is None.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import objectives
from data.filters import NearDuplicates
from data.overlap import split_of
from data.reading import version_of, version_of_files
from data.store import digest

if TYPE_CHECKING:
    from data.gathering import DataSpec
    from data.sources import Source


OF_ROWS = ("columns", "rows", "relabel", "reward_transforms")
"""Modules of ``objectives`` that rows depend on."""


class _Unknown(Exception):  # noqa: N818  # never leaves this module
    """Something of which it can't be known cheaply whether it changed."""


def identity_of(spec: DataSpec) -> str | None:
    """A hash of all that decides which rows there are: the sources as they are now, the spec, this code.

    Returns:
        None where rows must be read to know: a function of the user's, a dataset that is not in files.
    """
    try:
        return digest(
            _code(),
            [_plain(_without(spec, "train", "eval", "max_dropped_share", "policy")), _plain(spec.policy)],
            [
                [_plain(each), _version(each, spec)]
                for each in (*spec.train, *([] if spec.eval is None else [spec.eval]))
            ],
            [len(spec.train), [_encoder(name) for name in _encoders(spec)]],
            [[_read_by(each) for each in spec.filters]],
        )
    except (_Unknown, OSError):  # what can't be read is told by reading it
        return None


@cache
def _code() -> list[Any]:
    """This package's code, and the versions of what reads and tokenises."""
    own, formulas = Path(__file__).parent, Path(objectives.__path__[0])
    files = [*sorted(own.glob("*.py")), *(formulas / f"{name}.py" for name in OF_ROWS)]
    versions = {name: importlib.metadata.version(name) for name in ("datasets", "tokenizers", "transformers", "jinja2")}
    return [[[path.name, digest(path.read_bytes())] for path in files if path.is_file()], versions]


def _without(spec: Any, *names: str) -> dict[str, Any]:
    return {each.name: getattr(spec, each.name) for each in dataclasses.fields(spec) if each.name not in names}


def _plain(value: Any) -> Any:
    """A value as JSON has it; dataclasses of this project with their names, whose code ``_code`` covers."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return [[_plain(key), _plain(item)] for key, item in value.items()]
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    kind = type(value)
    if dataclasses.is_dataclass(value) and kind.__module__.partition(".")[0] in ("data", "objectives"):
        return [f"{kind.__module__}.{kind.__qualname__}", _plain(_without(value))]
    raise _Unknown(kind.__name__)


def _version(source: Source, spec: DataSpec) -> str:
    found = version_of(source.dataset_name, split=source.split, config=source.config, streaming=source.streaming)
    if found is None:
        raise _Unknown(source.dataset_name)
    return found


def _read_by(each: Any) -> list[Any]:
    """What a filter's outcome depends on besides rows and keys: files it reads, the library of MinHash."""
    against = getattr(each, "against", ())
    versions = [version_of(name, split=split_of(name), config=None, streaming=False) for name in against]
    if None in versions:
        raise _Unknown(str(against))
    try:
        return [versions, importlib.metadata.version("rensa") if isinstance(each, NearDuplicates) else ""]
    except importlib.metadata.PackageNotFoundError:  # reading the rows says so
        raise _Unknown("rensa") from None


def _encoders(spec: DataSpec) -> list[str]:
    return [each.encoder for each in spec.reward_transforms if hasattr(each, "encoder")]  # type: ignore[attr-defined]


def _encoder(name: str) -> str:
    """Files of a local encoder, commit of one on the Hub."""
    path = Path(name)
    if path.is_dir():
        found = version_of_files(path)
    else:
        from transformers import AutoConfig

        try:
            found = getattr(AutoConfig.from_pretrained(name), "_commit_hash", None)
        except (OSError, ValueError):  # reading the rows says what is wrong
            found = None
    if found is None:
        raise _Unknown(name)
    return found
