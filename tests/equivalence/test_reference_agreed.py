"""What is in the reference cache is agreed on, whatever each of several processes sees of it on its own disk."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from align import reference
from align.errors import RunError
from align.logps_store import LogpsStore, StoredLogps
from align.reference import ReferenceKey, find_cached_anywhere
from align.train import main
from data.store import Ragged, TokenTable
from tests.equivalence.test_engines import IN_TURN, LAUNCH
from tests.equivalence.test_resume import command, same_lines
from tests.support import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("plain_runs")]


def parts(cache: Path) -> list[Path]:
    """Of either leg of either split."""
    found = sorted((cache / "reference").rglob("part-*.safetensors"))
    assert len(found) == 4
    return found


def without(*numbers: int) -> Callable[[Path], None]:
    def delete(cache: Path) -> None:
        for number, part in enumerate(parts(cache)):
            if number in numbers:
                part.unlink()

    return delete


def damaged(cache: Path) -> None:
    part = parts(cache)[0]
    os.truncate(part, part.stat().st_size - 3)


WHOLE, NONE = without(), without(0, 1, 2, 3)
DISKS = {
    "first-has-none": (NONE, WHOLE),
    "second-has-none": (WHOLE, NONE),
    "damaged-for-first": (damaged, WHOLE),
    "damaged-for-second": (WHOLE, damaged),
    "half-each": (without(0, 1), without(2, 3)),
    "goes-on": (WHOLE, NONE),
    "neither-has-all": (without(0, 1), without(1)),
}
"""What was done to the cache of either process. ``goes-on`` resumes a run whose policy has moved on."""


def test_every_process_knows_what_any_has(folder: Path):
    """Processes that found different rows waited for each other: one computed the reference, the other trained."""
    assert main(command(folder, "alone")) == 0
    cases = [{"name": "one-cache", "words": command(folder, "one-cache"), "cache": str(folder / "cache")}]
    for name, disks in DISKS.items():
        for rank, change in enumerate(disks):
            shutil.copytree(folder / "cache", folder / f"{name}-{rank}")
            change(folder / f"{name}-{rank}")
        words = command(folder, name, "--ddp_timeout=60")
        cases.append({"name": name, "words": words, "cache": f"{folder / name}-{{rank}}"})
        if name == "goes-on":
            words.append("--resume_from_checkpoint=last")
            cases[-1]["crashed"] = {"run": str(folder / "one-cache"), "copy": str(folder / name), "step": 5}
    said = run_in_turn(folder, cases)
    for name in DISKS:
        same_lines(folder / name, folder / "one-cache")
    passes = re.findall(r"reference: (\d+) of \1 rows", said)
    assert len(passes) == 1, passes  # over the split of which both lacked a part


def in_threads(world: int, work: Callable[[int, Callable[[object], list]], object]) -> int:
    """Runs ``work(rank, gather)`` as so many ranks; how often they gathered."""
    barrier, sent, calls = threading.Barrier(world, timeout=30), [None] * world, [0]

    def one(rank: int) -> object:
        def gather(value: object) -> list:
            sent[rank] = value
            calls[0] += rank == 0
            barrier.wait()
            gathered = list(sent)
            barrier.wait()
            return gathered

        return work(rank, gather)

    with ThreadPoolExecutor(world) as pool:
        list(pool.map(one, range(world)))
    return calls[0]


def test_what_some_lack_is_sent_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And one question is enough where all read one cache."""
    responses = [[4], [5, 6], [7, 8, 9], [10]]
    table = TokenTable(
        Ragged.of([[1], [2], [3], [3]]), {"chosen": Ragged.of(responses), "rejected": Ragged.of([[11]] * 4)}
    )
    keys = [ReferenceKey(weights=name, precision="", path="") for name in ("first", "second", "third")]
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path))
    monkeypatch.setattr(reference, "ROWS_PER_MESSAGE", 1)
    whole = StoredLogps.of(table, "chosen")
    for key, rows in zip(keys, ([0, 1], [1, 2], [1]), strict=True):
        values = [np.arange(len(responses[row]), dtype=np.float32) + row for row in rows]
        lengths = np.array([len(each) for each in values])
        LogpsStore(key.folder).write(whole.keys[rows], lengths, np.concatenate(values))

    def look(rank: int, gather: Callable[[object], list]) -> None:
        (found,) = find_cached_anywhere(keys[rank], [table], rank, gather)
        assert found["chosen"].done.tolist() == [True, True, True, False]
        assert found["chosen"].ragged().values.tolist() == [0, 1, 2, 2, 3, 4, 0]
        assert not found["rejected"].done.any()

    assert in_threads(3, look) == 1 + 2
    assert in_threads(3, lambda rank, gather: find_cached_anywhere(keys[0], [table], rank, gather)) == 1


def test_a_cache_that_one_process_may_not_read_stops_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path))
    key = ReferenceKey(weights="", precision="", path="")
    with pytest.raises(RunError, match="can't read part-1"):
        find_cached_anywhere(key, [], 0, lambda own: [own, RunError("can't read part-1")])


def run_in_turn(folder: Path, cases: list[dict]) -> str:
    """On two processes; what the first one said."""
    (folder / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run(
        [*LAUNCH, "--config_file=launch/accelerate/cpu_ddp.yaml", "-m", IN_TURN, str(folder / "cases.json")],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    for case in cases:
        for rank in range(2):
            found = json.loads((folder / f"{case['name']}.{rank}.json").read_text())
            assert found == {"status": 0, "processes": 2}, case["name"]
    return done.stdout
