"""Two hosts, for which two network namespaces stand: launch, train, cut the link, say so, and go on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from align.train import main
from tests.equivalence.test_lifetime import LONG
from tests.equivalence.test_resume import command, lines
from tests.support import REPOSITORY

NAMES = ("align-test-a", "align-test-b")
ADDRESSES = ("10.213.7.1", "10.213.7.2")
LINKS = ("align-va", "align-vb")
SETTINGS = {"PORT": "29541", "GPUS": "1", "LAUNCHER": str(Path(sys.executable).parent / "accelerate")}
pytestmark = [
    pytest.mark.all,
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="making network namespaces takes root"),
]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def forget() -> None:
    for name in NAMES:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two namespaces with a wire between them."""
    forget()
    try:
        for name in NAMES:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", LINKS[0], "netns", NAMES[0], "type", "veth", "peer", "name", LINKS[1], "netns", NAMES[1])
        for name, link, address in zip(NAMES, LINKS, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
    except subprocess.CalledProcessError as error:
        forget()
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    yield NAMES
    forget()


def start(folder: Path, output: str, *more: str, **keys: object) -> list[subprocess.Popen[str]]:
    """One launcher on every host, as launch/two_hosts.sh starts them."""
    started, words = [], command(folder, output, *more, **keys)
    for rank, (name, link) in enumerate(zip(NAMES, LINKS, strict=True)):
        process = subprocess.Popen(
            [*f"ip netns exec {name} launch/two_hosts.sh {rank} {ADDRESSES[0]} ddp_nodes.yaml".split(), *words],
            cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": link, **SETTINGS},
        )  # fmt: skip
        started.append(process)
    return started


def outcomes(processes: list[subprocess.Popen[str]], timeout: float) -> list[str]:
    return [process.communicate(timeout=timeout)[0] for process in processes]


def test_two_hosts(folder: Path, hosts: tuple[str, str]):
    assert main(command(folder, "one", **LONG)) == 0
    running = start(folder, "cut", "--ddp_timeout=25", **LONG)
    deadline = time.monotonic() + 180
    while not list((folder / "cut").glob("checkpoint-*/manifest.json")):
        assert all(process.poll() is None for process in running), outcomes(running, 10)
        assert time.monotonic() < deadline
        time.sleep(0.02)
    ip("-n", hosts[0], "link", "set", LINKS[0], "down")
    said = outcomes(running, 180)
    assert all(process.returncode != 0 for process in running)
    assert "no progress" in said[0] + said[1], said
    assert not (folder / "cut" / "model.safetensors").exists()
    ip("-n", hosts[0], "link", "set", LINKS[0], "up")
    again = start(folder, "cut", "--resume_from_checkpoint=auto", **LONG)
    said = outcomes(again, 300)
    assert [process.returncode for process in again] == [0, 0], said
    assert "on each of 2 processes" in said[0]
    assert "resuming from checkpoint-" in said[0]
    wanted = {line["step"]: line for line in lines(folder / "one") if "loss" in line}
    found = {line["step"]: line for line in lines(folder / "cut") if "loss" in line}
    assert found.keys() == wanted.keys()
    for step, line in wanted.items():
        for key in ("loss", "grad_norm", "rewards/margins"):
            np.testing.assert_allclose(found[step][key], line[key], rtol=2e-3, atol=1e-4, err_msg=f"{step}, {key}")
    report = json.loads((folder / "cut" / "resumes.json").read_text())
    assert len(report) == 1
