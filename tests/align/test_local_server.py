"""Servers that are started for a judge: ready or told why not, shared, and gone in the end, whatever happens."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from align import local_server
from align.errors import RecipeError, RunError
from align.judges import Judge
from align.local_server import LocalServer, Served
from align.scores import main
from align.typed import Entry, entries
from evals.sampled import NAMED, settings_of
from tests.align.sampled import chat, write_samples
from tests.align.stand_ins import StandIns
from tests.equivalence.worlds import save_model
from tests.support import REPOSITORY

ASKED = chat("Cheer.", ["x!", "x", "x!!"])
SCORES = [(0.75 + 0.25) / 2, (0.25 + 0) / 2, (0.75 + 1) / 2]


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIns:
    return StandIns(tmp_path, monkeypatch)


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(save_model(tmp_path / "judge"))


def judge(model: str, **keys: Any) -> Judge:
    return Judge(**{"model": model, "engine": "vllm", "attempts": 2, **keys})


# ---- a server that works ----


@pytest.mark.slow
def test_a_judge_has_a_server_of_its_own_for_as_long_as_it_is_asked(stand_ins: StandIns, model: str):
    with closing(judge(model, engine_args={"max_model_len": 4096})) as asked:
        assert stand_ins.started == [], "nothing is asked yet"
        assert [each.score for each in asked([ASKED])] == SCORES
        ((host, _, *words),) = stand_ins.started
        assert host == "--host=127.0.0.1"
        assert {f"--model={model}", f"--served-model-name={model}", "--max-model-len=4096"} <= set(words)
        assert len(stand_ins.alive) == 2
        asked([chat("Cheer more.", ["y!", "y"])])
        assert len(stand_ins.started) == 1
    assert stand_ins.alive == []
    assert stand_ins.logs == []


@pytest.mark.slow
def test_what_was_said_is_known_without_a_server(stand_ins: StandIns, model: str, tmp_path: Path):
    """Replies belong to the model: not to its port, its place on disk or the share of memory it may take."""
    with closing(judge(model)) as asked:
        first = asked([ASKED])
    assert len(stand_ins.started) == 1
    moved = Path(model).rename(tmp_path / "elsewhere")
    for other in (judge(str(moved)), judge(str(moved), engine_args={"gpu-memory-utilization": 0.5}, timeout=9.0)):
        with closing(other):
            assert other([ASKED]) == first
            assert other.fingerprint() == judge(str(moved)).fingerprint()
    assert len(stand_ins.started) == 1
    (moved / "chat_template.jinja").write_text("{{ messages }}")
    changed = [judge(str(moved)), judge(str(moved), engine_args={"quantization": "fp8"})]
    for number, other in enumerate(changed, 2):
        with closing(other):
            assert other([ASKED]) == first
        assert len(stand_ins.started) == number
    assert len({each.fingerprint() for each in changed}) == 2


@pytest.mark.slow
def test_judges_of_one_model_share_a_server(stand_ins: StandIns, model: str, tmp_path: Path):
    kind, strict = judge(model, rubric="Be kind."), judge(model, rubric="Be strict.")
    other = judge(str(save_model(tmp_path / "other", seed=3)))
    kind([ASKED])
    strict([ASKED])
    other([ASKED])
    ports = {words[1] for words in stand_ins.started}
    assert len(stand_ins.started) == len(ports) == 2
    kind.close()
    assert len(stand_ins.alive) == 4
    strict([chat("Again.", ["y!", "y"])])
    strict.close()
    other.close()
    assert stand_ins.alive == []


@pytest.mark.slow
def test_ports_are_kept_and_given_back(stand_ins: StandIns, model: str):
    server = LocalServer(Served(model=model), limit=60)
    port = int(server.address.rsplit(":", 1)[1])
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    server.stop()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of before may still be closing
        other.bind(("127.0.0.1", port))


@pytest.mark.slow
def test_nobody_else_is_answered_and_no_proxy_is_asked(
    stand_ins: StandIns, model: str, monkeypatch: pytest.MonkeyPatch
):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with closing(judge(model)) as asked:
        asked([ASKED])
        address = next(iter(local_server._running.values())).base_url
        monkeypatch.delenv("http_proxy")
        monkeypatch.delenv("HTTP_PROXY")
        monkeypatch.delenv("all_proxy")
        stranger = Judge(model=model, base_url=address)
        with closing(stranger), pytest.raises(RunError, match="it wants a key"):
            stranger([ASKED])


@pytest.mark.slow
def test_scores_from_the_command_line(stand_ins: StandIns, model: str, tmp_path: Path):
    samples, output = write_samples(tmp_path / "samples.jsonl", [ASKED]), tmp_path / "scores.jsonl"
    scorer = f"{{name: judge, model: {model}, engine: vllm, engine_args: {{max_num_seqs: 8}}}}"
    assert main([f"--samples={samples}", f"--output={output}", f"--scorers={scorer}"]) == 0
    found = [json.loads(line)["score"] for line in output.read_text().splitlines()]
    assert found == SCORES
    assert len(stand_ins.started) == 1
    assert stand_ins.alive == []


# ---- servers that don't ----


@pytest.mark.slow
def test_one_that_dies_at_its_start_says_why(stand_ins: StandIns, model: str):
    stand_ins.do("die")
    with closing(judge(model)) as asked, pytest.raises(RunError) as error:
        asked([ASKED])
    (log,) = stand_ins.logs
    assert str(error.value) == (
        f"judge: vLLM's server for {model!r} ended with status 3 (ValueError: no room for a single request). The end "
        f"of its log, {log}:\n" + "".join(f"    File {i}\n" for i in range(4, 9)) + "  RuntimeError: Engine core "
        "initialization failed. See root cause above."
    )
    assert stand_ins.alive == []


@pytest.mark.slow
def test_one_that_is_never_ready_is_given_up(stand_ins: StandIns, model: str):
    stand_ins.do("mute")
    began = time.monotonic()
    with (
        closing(judge(model, start_timeout=1.5)) as asked,
        pytest.raises(
            RunError, match=r"was not ready after 1.5 s; raise start_timeout if it was still loading. .* it is empty$"
        ),
    ):
        asked([ASKED])
    assert time.monotonic() - began < 30
    assert stand_ins.alive == []
    stand_ins.do("")
    with closing(judge(model)) as asked:
        assert [each.score for each in asked([ASKED])] == SCORES


@pytest.mark.slow
def test_one_that_crashes_is_told_and_what_was_judged_is_kept(stand_ins: StandIns, model: str):
    stand_ins.do("crash")
    with (
        closing(judge(model, concurrency=1)) as asked,
        pytest.raises(
            RunError,
            match=r"judge: what was judged is kept, but vLLM's server for .* ended with status 9\. The end of its",
        ),
    ):
        asked([ASKED])
    assert stand_ins.alive == []
    stand_ins.do("")
    with closing(judge(model, concurrency=1)) as asked:
        assert [each.score for each in asked([ASKED])] == SCORES
        (cache,) = (Path(os.environ["ALIGN_CACHE"]) / "judge").iterdir()
        assert len(cache.read_text().splitlines()) == 6


@pytest.mark.slow
def test_a_fault_of_ours_stops_it_too(stand_ins: StandIns, model: str, monkeypatch: pytest.MonkeyPatch):
    def fails(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("align.reply_cache.ReplyCache.put", fails)
    with pytest.raises(ZeroDivisionError), closing(judge(model)) as asked:
        asked([ASKED])
    assert stand_ins.alive == []


OWNER = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run in the background, where it is ignored
from align import local_server
from align.local_server import Served
local_server.PROGRAM = (sys.executable, "-m", "tests.align.stand_in_server")
local_server.installed = lambda: "0.30.0"
local_server.borrow(Served(model=sys.argv[1]), 60)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["end", signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=str)
def test_nothing_outlives_its_owner(how: signal.Signals | str, stand_ins: StandIns, model: str):
    """Which gives nothing back here, and while another process of its holds all that it has open."""
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, model],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=REPOSITORY,
        text=True,
    ) as owner:
        assert owner.stdin is not None
        assert owner.stdout is not None
        assert owner.stdout.readline() == "ready\n"
        assert len(stand_ins.alive) == 2
        if isinstance(how, signal.Signals):
            owner.send_signal(how)
        else:
            owner.stdin.close()
        owner.wait(30)
    deadline = time.monotonic() + 20
    while stand_ins.alive and time.monotonic() < deadline:
        time.sleep(0.05)
    assert stand_ins.alive == []


# ---- settings ----


def refusal(**keys: Any) -> str:
    with pytest.raises(RecipeError) as error:
        entries("scorers", {"name": "judge", "model": "m", **keys}, {f"scorers.{key}": "r" for key in keys}, set(), [],
                NAMED)  # fmt: skip
    return str(error.value)


def test_combinations_that_make_no_sense_are_refused():
    assert refusal(engine="vllm", base_url="http://localhost/v1") == (
        "scorers.base_url names an endpoint, and engine vllm starts a server here: remove one of them"
    )
    assert refusal() == (
        "scorers.base_url must be an address that begins with http:// or https://, got None; or set engine to vllm, "
        "which starts a server here"
    )
    assert refusal(engine="sglang").startswith("scorers.engine must be server or vllm")
    assert refusal(engine="vllm", api_key_env="KEY") == ("scorers.api_key_env has no effect: engine is vllm; remove it")
    assert refusal(base_url="http://localhost/v1", engine_args={"dtype": "auto"}) == (
        "scorers.engine_args has no effect: engine is server; remove it"
    )
    for key, instead in (
        ("port", "it is chosen"),
        ("served-model-name", "it is chosen"),
        ("model", "the key model says it"),
    ):
        assert refusal(engine="vllm", engine_args={key: "1"}) == (
            f"scorers.engine_args must not hold {key}: {instead}; remove it"
        )
    assert refusal(engine="vllm", start_timeout=0).startswith("scorers.start_timeout must be > 0")


def test_what_this_machine_lacks_is_told_before_anything_is_done(model: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(local_server, "installed", lambda: None)
    with pytest.raises(
        RunError, match=r"^judge: engine vllm needs vLLM, which is not installed; pip install 'align-pre"
    ):
        judge(model).check()
    monkeypatch.setattr(local_server, "installed", lambda: "0.9.1")
    with pytest.raises(RunError, match=r"vLLM 0.9.1 is not supported: .* or give the base_url of a server elsewhere$"):
        judge(model).fingerprint()
    monkeypatch.setattr(local_server, "installed", lambda: "0.30.0")
    judge(model).check()
    with pytest.raises(
        RunError, match=r"^judge: there is no folder './none' to serve; name a model's folder or a Hub id"
    ):
        judge("./none").check()
    (Path(model) / "adapter_config.json").write_text("{}")
    with pytest.raises(RunError, match=r"judge is an adapter, which is not served without its base; merge them"):
        judge(model).check()


def test_of_the_hub_is_served_what_replies_are_kept_for(monkeypatch: pytest.MonkeyPatch):
    commits = {"main": "a" * 40, "v1": "b" * 40}
    for module in ("fingerprints", "local_server"):
        monkeypatch.setattr(f"align.{module}.commit_of", lambda name, revision: commits[revision])
    main, old = Served(model="alice/judge"), Served(model="alice/judge", revision="v1")
    assert f"--revision={'b' * 40}" in old.words()
    assert main.identity() != old.identity()
    before = main.identity()
    commits["main"] = "c" * 40
    assert main.identity() != before


def test_arguments_as_the_command_line_has_them():
    arguments = {
        "tensor-parallel-size": 2,
        "enforce_eager": False,
        "enable_chunked_prefill": True,
        "chat_template": None,
        "middleware": ["a", "b"],
        "speculative_config": {"method": "ngram"},
        "dtype": "bfloat16",
    }
    words = Served(model=str(REPOSITORY), arguments=arguments).words()
    assert words == [
        f"--model={REPOSITORY}",
        f"--served-model-name={REPOSITORY}",
        "--uvicorn-log-level=warning",
        "--dtype=bfloat16",
        "--no-enforce-eager",
        "--enable-chunked-prefill",
        "--tensor-parallel-size=2",
        "--middleware",
        "a",
        "b",
        '--speculative-config={"method": "ngram"}',
    ]


def test_recipes_and_results_hold_what_has_an_effect():
    endpoint = Entry(name="judge", built=Judge(model="j", base_url="http://localhost/v1"))
    assert {"engine_args", "revision", "start_timeout"}.isdisjoint(endpoint.resolved())
    local = Entry(name="judge", built=judge("j", engine_args={"dtype": "auto"}))
    assert local.resolved()["engine_args"] == {"dtype": "auto"}
    assert "api_key_env" not in local.resolved()
    assert not re.search("engine|base_url", str(settings_of(local))), "what they change, the fingerprint tells"
