"""Several copies of a model on one machine, each in a process of its own with its own part of the prompts.

vLLM runs copies in one process only behind a server; for models that are no mixtures of experts, copies that know
nothing of each other do the same.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from align import samples as stored
from align.errors import RunError

if TYPE_CHECKING:
    from align.sample_settings import Job


def in_parallel(job: Job, output: Path, say: Callable[[str], None]) -> None:
    """Draws with ``serving.data_parallel_size`` processes, each into a file of its own, and joins what they wrote.

    Args:
        job: the settings; the part of each process is a shard of them.
        output: gets every sample. Files of a run that was interrupted are gone on with.
        say: told what the processes say at the end.
    Raises:
        RunError: a process failed; the others' samples are kept.
    """
    copies = job.serving.data_parallel_size
    if job.out.shard is not None:
        raise RunError("serving.data_parallel_size and out.shard both divide the prompts; give one of them")
    parts = [output.with_name(f".{output.name}.part-{i}-of-{copies}.jsonl") for i in range(copies)]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        running = []
        for i, part in enumerate(parts):
            config = Path(temporary) / f"{i}.yaml"
            config.write_text(yaml.safe_dump(_part(job, part, i), allow_unicode=True))
            command = [sys.executable, "-m", "align.sample", "--config", str(config)]
            log = (Path(temporary) / f"{i}.log").open("w+")
            running.append((subprocess.Popen(command, env=_devices(job, i), stdout=log, stderr=log), log))
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            statuses = [process.wait() for process, _ in running]
        except BaseException:
            for process, _ in running:
                process.send_signal(signal.SIGINT)
            for process, _ in running:
                process.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
        for i, (status, (_, log)) in enumerate(zip(statuses, running, strict=True)):
            log.seek(0)
            said = log.read().strip().splitlines()
            log.close()
            if status:
                why = next((line for line in reversed(said) if line.startswith("error: ")), (said or ["nothing"])[-1])
                raise RunError(
                    f"process {i} of {copies} ended with status {status}: {why.removeprefix('error: ')} (what was "
                    "drawn is kept: start again to go on)"
                )
    for part in parts:
        _join(part, output, job.sampling.n)
        for leftover in (part, _report_of(part), part.with_name(f".{part.name}.lock")):
            leftover.unlink(missing_ok=True)
    seconds = time.perf_counter() - began
    tokens = sum(len(each.token_ids) for group in stored.read(output) for each in group.samples)
    say(f"{tokens} tokens with {copies} copies in {seconds:.0f} s, their start included")


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt  # which ends the copies too


def _part(job: Job, output: Path, number: int) -> dict[str, Any]:
    copies = job.serving.data_parallel_size
    serving = dataclasses.replace(job.serving, data_parallel_size=1, engine="vllm")
    out = dataclasses.replace(job.out, output=str(output), shard=f"{number}/{copies}", overwrite=False)
    sections = {"model": job.model, "data": job.data, "sampling": job.sampling, "serving": serving, "out": out}
    values: dict[str, Any] = {name: dataclasses.asdict(section) for name, section in sections.items()}
    if job.goal is not None:
        values["relabel"] = {"name": "reward_augmented", **dataclasses.asdict(job.goal)}
    return values


def _devices(job: Job, number: int) -> dict[str, str]:
    """The environment of a process: its own devices, as many as share a model's layers."""
    if not torch.cuda.is_available():
        return dict(os.environ)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    each, copies = job.serving.tensor_parallel_size, job.serving.data_parallel_size
    if len(devices) < each * copies:
        raise RunError(
            f"serving.data_parallel_size {copies} with tensor_parallel_size {each} needs {each * copies} devices, and "
            f"there are {len(devices)}; lower one of them"
        )
    return {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(devices[number * each : (number + 1) * each])}


def _join(part: Path, output: Path, n: int) -> None:
    there = stored.repair(output, n)
    for group in stored.read(part) if part.is_file() else ():
        if group.prompt_id not in there:
            stored.append(output, group.samples)


def _report_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.report.json")
