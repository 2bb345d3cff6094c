"""Log-probs of responses on disk, addressed by content: by what the reference is, and by the tokens of each response.

A response that was scored once is found again whatever dataset, split, leg or order it comes in. Parts appear whole or
not at all, so that an interrupted pass goes on; damaged ones are deleted and computed again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from jaxtyping import Float32, Int, UInt64
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from align.errors import RunError
from data.store import Ragged, TokenTable, digest

Keys = UInt64[np.ndarray, "row 2"]


def response_keys(prompts: Ragged, responses: Ragged) -> Keys:
    """A 128-bit hash of each prompt and response: of all that a log-prob depends on besides the reference."""
    found = bytearray()
    prompt_ids, response_ids = (np.asarray(each.values, dtype=np.int32) for each in (prompts, responses))
    bounds = zip(*(each.offsets.tolist() for each in (prompts, responses)), strict=True)
    start, first = next(bounds)
    for end, last in bounds:
        lengths = (end - start).to_bytes(8, "little")
        found += xxhash.xxh3_128_digest(lengths + prompt_ids[start:end].tobytes() + response_ids[first:last].tobytes())
        start, first = end, last
    return np.frombuffer(bytes(found), dtype=np.uint64).reshape(-1, 2)


@dataclass(slots=True)
class StoredLogps:
    """One leg's log-probs of one table, as far as they are known."""

    keys: Keys
    offsets: Int[np.ndarray, " edge"]
    values: Float32[np.ndarray, " token"]
    done: np.ndarray
    """Which rows are known."""

    @staticmethod
    def of(table: TokenTable, leg: str) -> StoredLogps:
        """None known yet."""
        responses = table.legs[leg]
        offsets = np.asarray(responses.offsets)
        values = np.zeros(int(offsets[-1]), dtype=np.float32)
        keys = response_keys(table.prompts, responses)
        return StoredLogps(keys, offsets, values, np.zeros(len(keys), dtype=bool))

    def put(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Takes the log-probs of some rows, one after the other."""
        self.values[spans(self.offsets[rows], self.lengths(rows))] = values
        self.done[rows] = True

    def of_rows(self, rows: np.ndarray) -> Float32[np.ndarray, " token"]:
        """The log-probs of some rows, one after the other."""
        return self.values[spans(self.offsets[rows], self.lengths(rows))]

    def lengths(self, rows: np.ndarray) -> Int[np.ndarray, " row"]:
        """Tokens of some rows."""
        return self.offsets[rows + 1] - self.offsets[rows]

    def ragged(self) -> Ragged:
        """Log-probs by row."""
        return Ragged(self.values, self.offsets)


def spans(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers start, start + 1, … of every span, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


class LogpsStore:
    """The folder of one reference."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fill(self, wanted: Iterable[StoredLogps]) -> None:
        """Reads what is there of what is wanted.

        Raises:
            RunError: a part may not be read.
        """
        parts = [(path, *found) for path in sorted(self.folder.glob("part-*.safetensors")) if (found := _index(path))]
        if not parts:
            return
        keys = np.concatenate([keys for _, keys, _ in parts])
        lengths = np.concatenate([lengths for _, _, lengths in parts])
        first = np.concatenate([[0], np.cumsum([len(keys) for _, keys, _ in parts])])
        order = np.argsort(keys[:, 0], kind="stable")
        ordered = keys[order, 0]
        places = []
        for each in wanted:
            rows = np.flatnonzero(~each.done)
            at = order[np.searchsorted(ordered, each.keys[rows, 0]).clip(max=len(ordered) - 1)]
            same = (keys[at] == each.keys[rows]).all(axis=1) & (lengths[at] == each.lengths(rows))
            places.append((each, rows[same], at[same]))
        for number, (path, _, of_part) in enumerate(parts):
            starts = np.cumsum(of_part) - of_part
            values: np.ndarray | None = None
            for each, rows, at in places:
                here = (at >= first[number]) & (at < first[number + 1])
                if not here.any():
                    continue
                try:
                    values = _read(path, "values") if values is None else values
                except (OSError, SafetensorError):  # another process has found it damaged since
                    break
                own = at[here] - first[number]
                each.put(rows[here], values[spans(starts[own], of_part[own])])

    def write(self, keys: Keys, lengths: np.ndarray, values: np.ndarray) -> None:
        """Stores the log-probs of some responses, one after the other, as one part."""
        self.folder.mkdir(parents=True, exist_ok=True)
        arrays = {"keys": keys, "lengths": lengths.astype(np.int64), "values": values.astype(np.float32)}
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".part-") as temporary:
            path = Path(temporary) / "part"
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)
            path.chmod(0o644)  # temporary files are private, and a cache may be shared
            path.rename(self.folder / f"part-{digest(keys.tobytes())}.safetensors")


def _index(path: Path) -> Sequence[np.ndarray] | None:
    """Keys and lengths of a part; None if it can't be read now, and the file deleted if it is damaged."""
    try:
        keys, lengths, values = (_read(path, name) for name in ("keys", "lengths", "values"))
        if len(values) != lengths.sum() or len(keys) != len(lengths) or not np.isfinite(values).all():
            raise ValueError("does not fit together")
    except PermissionError as error:
        raise RunError(f"can't read {path}: {error.strerror}; set ALIGN_CACHE to a folder of your own") from None
    except OSError:  # deleted by another process meanwhile, or a disk that will be back
        return None
    except (ValueError, SafetensorError):
        path.unlink(missing_ok=True)
        return None
    return keys, lengths


def _read(path: Path, name: str) -> np.ndarray:
    with path.open("rb"):  # says so if it may not be read, which the next line would not
        pass
    with safe_open(path, "np") as part:
        return part.get_tensor(name)
