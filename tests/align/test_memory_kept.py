"""Freed memory stays with the process, so that the kernel need not clear it again and again."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from align.train import keep_freed_memory
if {keep}:
    keep_freed_memory()
for _ in range(3):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(12):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_blocks_are_not_mapped_anew():
    """64 MiB are 16,384 pages of 4 KiB, which a block that is mapped anew costs each of twelve times."""
    given_back, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS.format(keep=keep)], capture_output=True, check=True).stdout)
        for keep in (False, True)
    )
    assert given_back > 12 * 16_000
    assert kept < given_back / 6
