"""Runs several recipes one after the other in the same processes, because starting an engine takes longer than a run.

    accelerate launch --config_file … -m tests.equivalence.in_turn CASES.json

``CASES.json`` holds a list of {"name", "words", "cache", "logits_per_chunk", "crashed"}; what became of each is written
beside it, into ``NAME.rank.json``. ``crashed``, {"run", "copy", "step"}: first a run directory is copied as a crash
after that step would have left it. Where ``cache`` has ``{rank}``, each process has its own.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from align.engines import is_reader
from tests.equivalence.test_resume import after_a_crash
from tests.support import plain_runs


def run(case: dict[str, Any]) -> dict[str, Any]:
    """One recipe; its exit status, or what it raised."""
    from align import logps
    from align.train import main

    os.environ["ALIGN_CACHE"] = case["cache"].replace("{rank}", os.environ.get("RANK", "0"))
    unset_hf_deepspeed_config()  # of the case before
    standard = logps.LOGITS_PER_CHUNK
    logps.LOGITS_PER_CHUNK = case.get("logits_per_chunk") or standard
    try:
        return {"status": main(case["words"])}
    except Exception:
        return {"status": -1, "raised": traceback.format_exc()}
    finally:
        logps.LOGITS_PER_CHUNK = standard


def refuse_to_read(*_: Any, **__: Any) -> Any:
    """What the weights are is told to these processes: engines that divide them have one that reads for all."""
    raise AssertionError("this process read whole weights")


def crash(run: str, copy: str, step: int) -> None:
    """On the first process; the others wait."""
    if os.environ.get("RANK", "0") == "0":
        shutil.copytree(run, copy)
        after_a_crash(Path(copy), step)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    plain_runs(patch)
    if not is_reader():
        patch.setattr("align.model.load_weights", refuse_to_read)
    path = Path(sys.argv[1])
    for each in json.loads(path.read_text()):
        if each.get("crashed"):
            crash(**each["crashed"])
        found = run(each) | {"processes": int(os.environ.get("WORLD_SIZE", "1"))}
        (path.parent / f"{each['name']}.{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))
        if found["status"] == -1:  # the other processes may wait for this one
            sys.exit(found["raised"])
