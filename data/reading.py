"""Files, folders and Hub datasets to plain dictionaries, one per row, in order.

JSON is read with the standard library and everything else through ``datasets``. Arrow gives all values of a column one
type: strings that look like dates become timestamps, missing keys of nested objects become None, mixed types are
refused. Preference data has all three, and a fault in it should name the line.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import time
import zlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from huggingface_hub import dataset_info

from data.errors import DataError
from data.spool import spooled
from data.store import digest

KINDS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}
KNOWN_FILES = "json, jsonl, parquet, arrow or csv, also with .gz"
TICK = 20_000_000
"""Nanoseconds after which a file that is written again has another time."""
METADATA = {"manifest.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def read(
    dataset_name: str, *, split: str, config: str | None = None, streaming: bool = False, limit: int | None = None
) -> Iterator[Any]:
    """The raw rows of one split; dictionaries, unless a JSON file holds something else.

    A name is local if a path of that name exists, if it starts with ``.``, ``/`` or ``~``, or if it ends like a data
    file; only other names are looked up on the Hub. A single file is a split called train; a folder has the splits that
    ``datasets`` reads off its file names.

    Args:
        dataset_name: path or Hub id.
        split: which split.
        config: which configuration, where there are several.
        streaming: read no more than the first ``limit`` rows, and keep them in the cache: a second call reads those.
        limit: how many rows are wanted at most.
    Raises:
        DataError: nothing there, no such split, files of several kinds, a file that can't be parsed, or a stream
            without a limit or with values that can't be kept.
    """
    if not streaming:
        return islice(_rows_of(dataset_name, split, config, streaming=False), limit)
    if limit is None:
        raise DataError(
            f"{dataset_name}: data.streaming needs data.max_rows, how many rows to read from the stream; set it"
        )
    path = Path(os.path.expanduser(dataset_name))
    local = looks_local(dataset_name)
    version = _version_of_files(path) if local else _version_on_hub(dataset_name)
    where = str(path.resolve()) if local else dataset_name

    def stream() -> Generator[Any, None, None]:
        with _explained(dataset_name):
            yield from _rows_of(dataset_name, split, config, streaming=True, revision=None if local else version)

    return read_json(spooled([where, config, split], version, limit, dataset_name, stream))


def version_of(dataset_name: str, *, split: str, config: str | None, streaming: bool) -> str | None:
    """What changes when the rows of ``read`` may have changed, without reading them; None if that can't be known."""
    path = Path(os.path.expanduser(dataset_name))
    if looks_local(dataset_name):
        return None if _leads_elsewhere(path) else version_of_files(path)
    if streaming:
        commit = _version_on_hub(dataset_name)
        return None if commit is None else digest(dataset_name, commit)
    try:
        with _explained(dataset_name) as datasets:
            found = datasets.load_dataset(dataset_name, config, split=split)
        files = [Path(each["filename"]) for each in found.cache_files]  # type: ignore[union-attr,index]
        stats = [version_of_files(file) for file in files]
        return digest(found._fingerprint, stats) if files and all(stats) else None  # type: ignore[union-attr]
    except (DataError, AttributeError, OSError):  # reading says what is wrong
        return None


def _leads_elsewhere(path: Path) -> bool:
    """Whether the files of a folder are not all that is read: links to folders, or a README that names others."""
    if not path.is_dir():
        return False
    if any(each.is_symlink() and each.is_dir() for each in path.rglob("*")):
        return True
    readme = path / "README.md"
    about = readme.read_text(errors="replace").split("---") if readme.is_file() else []
    return len(about) > 1 and "data_files" in about[1] and bool(re.search(r"""://|\.\.|[\s"'\[]/""", about[1]))


def version_of_files(path: Path) -> str | None:
    """What changes when a file, or one of a folder, may have changed; None if it is not there.

    Times move in ticks of a few milliseconds: a file that was written just now could be written again without a trace.
    So this waits until it no longer is.
    """
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    try:
        stats = [file.stat() for file in files]
    except OSError:
        return None
    age = time.time_ns() - max((each.st_mtime_ns for each in stats), default=0)
    if 0 <= age < TICK:
        time.sleep(TICK / 1e9)
    found = [
        # Of what preserves sizes and times (cp -p, rsync), the change time and the inode still tell.
        [str(file.resolve()), each.st_size, each.st_mtime_ns, each.st_ctime_ns, each.st_ino]
        for file, each in zip(files, stats, strict=True)
    ]
    return digest(found) if found else None


def _version_of_files(path: Path) -> str | None:
    """What changes when files change; None if there are none."""
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    stats = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return digest(stats) if stats else None


def _version_on_hub(name: str) -> str | None:
    """The commit that the main branch points to; None if the Hub does not say."""
    try:
        return dataset_info(name, timeout=30).sha
    except Exception:  # offline, unknown, private: opening the stream says what is wrong, if no spooled copy is there
        return None


def _rows_of(
    dataset_name: str, split: str, config: str | None, *, streaming: bool, revision: str | None = None
) -> Iterator[Any]:
    if "[" in split or "+" in split:
        raise DataError(f"{dataset_name}: split {split!r} is a slice or a sum; name one split, and set data.max_rows")
    if not looks_local(dataset_name):
        return _from_hub(dataset_name, split, config, streaming=streaming, revision=revision)
    path = Path(os.path.expanduser(dataset_name))
    if not path.exists():
        raise DataError(f"{dataset_name}: no such file or folder; for a dataset on the Hub write owner/name")
    if path.is_file():
        if config is not None:
            raise DataError(f"{dataset_name}: a file has no configurations; leave out dataset_config {config!r}")
        return _from_files(dataset_name, {"train": [path]}, split, streaming=streaming)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _from_saved(dataset_name, path, split)
    return _from_files(dataset_name, _splits_of_folder(dataset_name, path, config), split, streaming=streaming)


def looks_local(dataset_name: str) -> bool:
    """Whether a name means a path; see ``read``."""
    path = Path(os.path.expanduser(dataset_name))
    return dataset_name.startswith((".", "/", "~")) or path.exists() or _kind(path) is not None


def _kind(path: Path) -> str | None:
    name = path.name.lower().removesuffix(".gz")
    return next((kind for suffix, kind in KINDS.items() if name.endswith(suffix)), None)


def _splits_of_folder(name: str, folder: Path, config: str | None) -> dict[str, list[Path]]:
    """Files by split. Every data file in the folder is in one of them."""
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and _kind(path) is not None
        and path.name not in METADATA
        and not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    ]
    if not files:
        raise DataError(f"{name}: the folder holds no data files; expected {KNOWN_FILES}")
    kinds = {str(_kind(path)): path.name for path in reversed(files)}
    if len(kinds) > 1:
        found = ", ".join(f"{kind} ({example})" for kind, example in sorted(kinds.items()))
        raise DataError(f"{name}: the folder mixes kinds of files: {found}; keep one kind, or name one file")
    with _explained(name) as datasets:
        found = datasets.load_dataset_builder(str(folder), name=config).config.data_files
    splits = {str(split): [Path(file) for file in paths] for split, paths in (found or {}).items()}
    read_files = {path.resolve() for paths in splits.values() for path in paths}
    unread = [path for path in files if path.resolve() not in read_files]
    # A README may choose files on purpose; without one, `datasets` leaves out files whose names are in no split as soon
    # as another file's name is.
    if unread and not (folder / "README.md").is_file():
        raise DataError(
            f"{name}: {unread[0].relative_to(folder)} belongs to none of the splits {', '.join(splits)}; "
            "put a split's name into every file name, or name one file"
        )
    return splits


def _pick(name: str, splits: Mapping[str, Any], split: str) -> Any:
    if split not in splits:
        raise DataError(f"{name}: there is no split {split!r}; it has {', '.join(map(repr, splits))}")
    return splits[split]


def _from_files(name: str, splits: Mapping[str, Sequence[Path]], split: str, *, streaming: bool) -> Iterator[Any]:
    files = _pick(name, splits, split)
    kind = _kind(files[0])
    if kind is None:
        raise DataError(f"{name}: don't know how to read {files[0].suffix or 'a file without a suffix'}: {KNOWN_FILES}")
    if kind == "json":
        return (row for path in files for row in read_json(path))
    options: dict[str, Any] = {"streaming": True} if streaming else {}
    header = _header(files[0]) if kind == "csv" else ()
    with _explained(name) as datasets:
        if kind == "csv":
            # All columns are text: 42 and NA are answers here, not a number and a missing value.
            options["features"] = datasets.Features(dict.fromkeys(header, datasets.Value("string")))
            options["keep_default_na"] = False
        found = datasets.load_dataset(kind, data_files={split: [str(path) for path in files]}, split=split, **options)
    return iter(found)


def _from_saved(name: str, folder: Path, split: str) -> Iterator[Any]:
    """What ``save_to_disk`` wrote."""
    with _explained(name) as datasets:
        found = datasets.load_from_disk(str(folder))
    splits: dict[str, Any] = {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}
    splits = splits or {"train": found}
    return iter(_pick(name, splits, split))


def _from_hub(name: str, split: str, config: str | None, *, streaming: bool, revision: str | None) -> Iterator[Any]:
    options: dict[str, Any] = {"streaming": True, "revision": revision} if streaming else {}
    with _explained(name) as datasets:
        return iter(datasets.load_dataset(name, config, split=split, **options))


@contextmanager
def _explained(name: str) -> Iterator[Any]:
    """Runs a part of ``datasets`` without its bars and logs; what it raises becomes one sentence."""
    import datasets  # which JSON can be read without
    from datasets.exceptions import DatasetNotFoundError

    level = datasets.utils.logging.get_verbosity()
    bars = not datasets.are_progress_bars_disabled()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield datasets
    except DataError:
        raise
    except DatasetNotFoundError as error:
        raise DataError(
            f"{name}: no such dataset on the Hub, or it takes a login (hf auth login), and no local path of that name"
        ) from error
    except ConnectionError as error:
        raise DataError(
            f"{name}: the Hub can't be reached ({_brief(error)}); check the network, or give a local file or folder"
        ) from error
    except Exception as error:  # whatever pyarrow, pandas and datasets raise on bad files has no common base
        if "corresponds to no data" in str(error):
            raise DataError(f"{name}: the dataset has no rows") from error
        raise DataError(f"{name}: can't be read: {_brief(error.__cause__ or error)}") from error
    finally:
        datasets.utils.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def read_json(path: Path) -> Iterator[Any]:
    """The rows of a JSON file: one value per line, or one list of rows.

    Raises:
        DataError: the file can't be parsed; names the line.
    """
    with _opened(path) as file:
        begun = False
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            if not begun and line.lstrip().startswith("["):
                yield from _parse(path, line + file.read(), number)
                return
            begun = True
            yield _parse(path, line.strip(), number)


def _parse(path: Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line = first_line + (error.lineno - 1 if isinstance(error, json.JSONDecodeError) else 0)
        why = error.msg if isinstance(error, json.JSONDecodeError) else _brief(error)
        raise DataError(
            f"{path}, line {line}: not valid JSON ({why}); expected one object per line, or one list of objects"
        ) from error


def _header(path: Path) -> list[str]:
    with _opened(path) as file:
        columns = next(csv.reader(file), [])
    if not columns:
        raise DataError(f"{path}: the file is empty; expected a first line with column names")
    return columns


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        opener = gzip.open if path.name.lower().endswith(".gz") else open
        with opener(path, "rt", encoding="utf-8-sig") as file:
            yield file  # type: ignore[misc]  # gzip.open and open have no common signature
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); convert the file to UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: can't be read: {_brief(error)}") from error
