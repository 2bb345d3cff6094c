"""Pushing, against a server on this machine that speaks as much of the Hub as is needed."""

import json
from pathlib import Path

import pytest
import yaml

from evals.hub import check_access, files_to_push, push
from evals.scores import Scores, read_scores, write_scores
from tests.evals.example_run import make_run
from tests.evals.hub_server import HubServer

# huggingface_hub 2.4 sends LFS objects with httpx2's deprecated data=; remove when it sends them with content=
# (huggingface_hub/lfs.py, _upload_single_part).
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw:DeprecationWarning")

TOKEN = "hf_" + "aB3dE6gH9j" * 3
MODEL = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
OTHERS = (
    "checkpoint-10/model.safetensors",
    "checkpoint-10/optimizer.pt",
    "optimizer.pt",
    "optimizer.safetensors",
    "scheduler.pt",
    "rng_state.pth",
    "training_args.bin",
    "pytorch_model.bin",
    "reference_logps.safetensors",
    "cache/rows.arrow",
    "trainer_state.json",
    "data_report.json",
    ".env",
    ".cache/huggingface/token",
    "last/config.json",
)


@pytest.fixture
def hub(monkeypatch):
    # The Hub's own chunk store needs its servers; large files go the older way, as LFS objects.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # the tests are; this server is local
    with HubServer() as server:
        yield server


@pytest.fixture
def run(tmp_path):
    run = make_run(tmp_path / "run")
    for name in (*MODEL, *OTHERS):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(f"content of {name}".encode())
    (run / "README.md").write_text(f"---\ntags: [dpo]\n---\n\n# run\n\n{TOKEN}\n")
    (run / "report.html").write_text("<!doctype html>")
    (run / ".eval_results").mkdir()
    (run / ".eval_results" / "acme-pairs.yaml").write_text("[]\n")
    (run / ".eval_results" / "notes.txt").write_text("not this")
    with (run / "recipe.yaml").open("a") as file:
        file.write(f"hub:\n  hub_token: {TOKEN}\n")
    return run


EXPECTED = {
    *MODEL,
    "README.md",
    "report.html",
    "recipe.yaml",
    "results.json",
    "metrics.jsonl",
    ".eval_results/acme-pairs.yaml",
}


@pytest.mark.slow
def test_what_goes_up_and_what_does_not(hub, run):
    address = push(run, "alice/tiny-dpo", token=hub.token, endpoint=hub.endpoint)
    assert address == f"{hub.endpoint}/alice/tiny-dpo"
    sent = hub.files["alice/tiny-dpo"]
    assert set(sent) == EXPECTED
    assert sent["model.safetensors"] == b"content of model.safetensors"
    assert len(hub.large) == 2  # weights and tokenizer.json
    assert len(hub.commits) == 1
    assert hub.private == {"alice/tiny-dpo": False}
    assert not any(TOKEN.encode() in content for content in sent.values())
    assert yaml.safe_load(sent["recipe.yaml"])["hub"] == {"hub_token": "***"}
    assert yaml.safe_load(sent["recipe.yaml"])["objective"]["beta"] == 0.1
    assert json.loads(sent["results.json"]) == json.loads((run / "results.json").read_text())
    assert sent["metrics.jsonl"] == (run / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_an_adapter(hub, run):
    (run / "model.safetensors").unlink()
    (run / "adapter_model.safetensors").write_bytes(b"a")
    (run / "adapter_config.json").write_bytes(b"{}")
    push(run, "alice/tiny-lora", token=hub.token, endpoint=hub.endpoint)
    assert {"adapter_model.safetensors", "adapter_config.json"} <= set(hub.files["alice/tiny-lora"])


def test_shards_go_up_with_their_index(run):
    for name in (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ):
        (run / name).write_bytes(b"x")
        assert name in files_to_push(run)


@pytest.mark.slow
def test_pushing_again_sends_what_has_changed(hub, run):
    for _ in range(2):
        push(run, "tiny-dpo", token=hub.token, endpoint=hub.endpoint)  # owner taken from the token
    assert set(hub.files) == {"alice/tiny-dpo"}
    assert len(hub.commits) == 1, "nothing had changed"
    uploads = [request for request in hub.requests if request.startswith("PUT")]
    assert len(uploads) == len(hub.verified) == 2
    hub.requests.clear()
    (run / "model.safetensors").write_bytes(b"better weights")
    push(run, "tiny-dpo", token=hub.token, endpoint=hub.endpoint)
    assert len(hub.commits) == 2
    assert len([request for request in hub.requests if request.startswith("PUT")]) == 1
    assert hub.files["alice/tiny-dpo"]["model.safetensors"] == b"better weights"
    assert hub.files["alice/tiny-dpo"]["tokenizer.json"] == b"content of tokenizer.json"


@pytest.mark.slow
def test_a_connection_that_dies_in_the_middle(hub, run, monkeypatch):
    """The files that arrived are not sent again, and in the end all are there."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between attempts
    hub.uploads_until_it_dies = 1
    with pytest.raises(RuntimeError, match=r"pushing to 'alice/m' failed .* can be pushed again"):
        push(run, "alice/m", token=hub.token, endpoint=hub.endpoint)
    assert len(hub.large) == 1
    assert hub.files["alice/m"] == {}
    hub.uploads_until_it_dies = None
    hub.requests.clear()
    push(run, "alice/m", token=hub.token, endpoint=hub.endpoint)
    assert len([request for request in hub.requests if request.startswith("PUT")]) == 1
    assert set(hub.files["alice/m"]) == EXPECTED


@pytest.mark.slow
def test_samples_go_where_they_are_asked_for(hub, run):
    for name in ("generations.jsonl", "pairs.jsonl"):
        (run / name).write_text(f'{{"text": "an answer with {TOKEN}"}}\n')
    push(run, "alice/m", token=hub.token, endpoint=hub.endpoint)
    assert set(hub.files["alice/m"]) == EXPECTED
    push(run, "alice/m", samples=True, token=hub.token, endpoint=hub.endpoint)
    sent = hub.files["alice/m"]
    assert set(sent) == {*EXPECTED, "generations.jsonl", "pairs.jsonl"}
    assert json.loads(sent["generations.jsonl"]) == {"text": "an answer with ***"}


@pytest.mark.slow
def test_pictures_scores_and_the_doctor_s_findings_go_up(hub, run):
    (run / "card").mkdir()
    (run / "card" / "loss.png").write_bytes(b"\x89PNG")
    (run / "card" / "draft.svg").write_text("<svg/>")
    (run / "scores.jsonl").write_text('{"metric": "ranking/accuracy"}\n')
    (run / "doctor.json").write_text(json.dumps({"dataset": "/home/me/pairs.jsonl", "rows": 3}))
    push(run, "alice/m", token=hub.token, endpoint=hub.endpoint)
    sent = hub.files["alice/m"]
    assert set(sent) == {*EXPECTED, "card/loss.png", "scores.jsonl", "doctor.json"}
    assert sent["card/loss.png"] == b"\x89PNG"
    assert json.loads(sent["doctor.json"]) == {"dataset": "pairs.jsonl", "rows": 3}


@pytest.mark.slow
def test_private_is_private(hub, run):
    push(run, "alice/secret", private=True, token=hub.token, endpoint=hub.endpoint)
    assert hub.private == {"alice/secret": True}
    push(run, "alice/secret", private=True, token=hub.token, endpoint=hub.endpoint)
    hub.private["alice/open"], hub.files["alice/open"] = False, {}
    with pytest.raises(ValueError, match="exists and is public"):
        push(run, "alice/open", private=True, token=hub.token, endpoint=hub.endpoint)
    assert hub.files["alice/open"] == {}


@pytest.mark.slow
def test_failures_say_that_the_run_is_safe(hub, run):
    hub.fail_commits = True
    with pytest.raises(RuntimeError, match=r"pushing to 'alice/m' failed .* can be pushed again") as caught:
        push(run, "alice/m", token=hub.token, endpoint=hub.endpoint)
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="failed"):
        push(run, "alice/m", token="hf_wrong", endpoint=hub.endpoint)
    with pytest.raises(RuntimeError, match="failed"):
        push(run, "alice/m", token=hub.token, endpoint="http://127.0.0.1:9")


@pytest.mark.slow
def test_a_card_that_the_hub_refuses(hub, run):
    (run / "README.md").write_text("---\npipeline_tag: alignment\nlicense: [mit]\n---\n\n# run\n")
    with pytest.raises(RuntimeError, match=r'failed \(Invalid .*: "license" is not valid; "pipeline_tag" is') as caught:
        push(run, "alice/m", token=hub.token, endpoint=hub.endpoint)
    assert "\n" not in str(caught.value)
    assert hub.files["alice/m"] == {}


@pytest.mark.slow
def test_a_run_without_weights_is_not_pushed(hub, run):
    (run / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no model or adapter weights"):
        push(run, "alice/m", token=hub.token, endpoint=hub.endpoint)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["", "a/b/c", "a b", "-a/b", "a--b", "a/b.git", "datasets/a/b"])
def test_names_are_checked_before_training(name):
    with pytest.raises(ValueError, match="cannot be a repository on the Hub") as caught:
        check_access(name, token=TOKEN)
    assert "\n" not in str(caught.value)


def test_a_token_is_there_before_training(monkeypatch):
    monkeypatch.setattr("evals.hub.get_token", lambda: None)
    with pytest.raises(ValueError, match="no Hub token was found") as caught:
        check_access("alice/m")
    assert "\n" not in str(caught.value)
    check_access("alice/m", token=TOKEN)
    monkeypatch.setattr("evals.hub.get_token", lambda: TOKEN)
    check_access("alice/m")


@pytest.mark.slow
def test_the_hub_can_be_asked(hub):
    check_access("alice/m", token=hub.token, endpoint=hub.endpoint, ask_hub=True)
    with pytest.raises(ValueError, match="did not accept the token"):
        check_access("alice/m", token="hf_wrong", endpoint=hub.endpoint, ask_hub=True)
    with pytest.raises(ValueError, match="check the network"):
        check_access("alice/m", token=hub.token, endpoint="http://127.0.0.1:9", ask_hub=True)


def test_lines_of_evaluations_go_up_without_paths(tmp_path: Path):
    scores = Scores(metric="m", dataset="/home/alice/secret/pairs.jsonl", split="test", step=1, by_prompt={"a": 0.5})
    write_scores(tmp_path, [scores])
    (tmp_path / "model.safetensors").write_bytes(b"")
    sent = files_to_push(tmp_path)["scores.jsonl"]
    assert isinstance(sent, bytes)
    assert b"alice" not in sent
    (tmp_path / "scores.jsonl").write_bytes(sent)
    assert next(iter(read_scores(tmp_path).values())).by_prompt == {"a": 0.5}
