"""The card from a run's files alone, and the push that is repeated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load, parse_eval_result_entries

from evals.__main__ import main
from evals.card import write_card
from evals.card_info import CardInfo
from tests.evals.example_run import make_run
from tests.evals.hub_server import HubServer
from tests.evals.test_card import info

# As in test_hub.py.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw:DeprecationWarning")

INFO = {
    "reference": "initial",
    "reference_source": "cached",
    "reference_fingerprint": "9f2c1d7e",
    "resumes": ("resumed from step 100",),
    "language": ("en",),
    "tags": ("bread",),
}


@pytest.fixture
def hub(monkeypatch):
    for name, value in {
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    with HubServer() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server


@pytest.fixture
def run(tmp_path) -> Path:
    """As training leaves it, with the recipe's wish to be pushed."""
    run = make_run(tmp_path / "run")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (run / name).write_bytes(f"content of {name}".encode())
    with (run / "recipe.yaml").open("a") as file:
        file.write("hub: {push_to_hub: true, hub_model_id: alice/tiny, hub_private_repo: true, push_samples: false}\n")
    info(**INFO, repo_id="alice/tiny").write(run)
    write_card(run)
    return run


@pytest.mark.slow
def test_the_card_is_the_same_from_files_alone(tmp_path, run, capsys):
    assert CardInfo.read(run) == replace(
        info(**{key: list(value) if isinstance(value, tuple) else value for key, value in INFO.items()}),
        repo_id="alice/tiny",
        datasets=["acme/helpful-pairs"],
        outputs=[],
    )
    before = {path: path.read_bytes() for path in (run / "README.md", *(run / ".eval_results").iterdir())}
    pictures = sorted(path.name for path in (run / "card").iterdir())
    assert pictures == ["displacement.png", "loss.png", "ranking.png", "rewards.png"]
    for path in before:
        path.unlink()
    (run / "card" / "stale.png").write_bytes(b"")
    assert main(["card", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'README.md'}\n"
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(path.name for path in (run / "card").iterdir()) == pictures
    assert all((run / "card" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


@pytest.mark.slow
def test_the_hub_s_library_reads_everything_back(hub, run):
    card = ModelCard.load(run / "README.md")
    card.validate()  # asks the server
    assert metadata_load(run / "README.md")["language"] == ["en"]
    assert "bread" in card.data.tags
    stored = {r["metric"]: r for r in json.loads((run / "results.json").read_text())["results"]}
    for result in card.data.eval_results:
        assert result.metric_value == stored[result.metric_type]["value"]
        assert result.metric_args["high"] == stored[result.metric_type]["high"]
    (path,) = (run / ".eval_results").iterdir()
    entries = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert {e.task_id: e.value for e in entries}["ranking_accuracy"] == stored["ranking/accuracy"]["value"]
    assert {(e.source_url, e.source_name) for e in entries} == {("https://huggingface.co/alice/tiny", "Model card")}
    broken = ModelCard("---\npipeline_tag: alignment\n---\n")
    with pytest.raises(ValueError, match="pipeline_tag"):
        broken.validate()


@pytest.mark.slow
def test_what_the_card_says_of_reference_and_resumes(run):
    body = (run / "README.md").read_text()
    assert "| reference | the model as it was before training |" in body
    assert "| hash of its weights | 9f2c1d7e |" in body
    assert "* resumed from step 100" in body
    assert "The run was interrupted and resumed once." in body
    assert "![Loss over steps: training ends at" in body
    assert "](card/loss.png)" in body


@pytest.mark.slow
def test_a_push_that_was_refused_is_repeated(hub, run, capsys, monkeypatch):
    (run / "README.md").unlink()
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    hub.fail_commits = True
    assert main(["card", "push", str(run)]) == 2
    said = capsys.readouterr().err.rpartition("error: ")[2]  # before it, progress
    assert "storage quota exceeded" in said
    assert "can be pushed again" in said
    assert said.count("\n") == 1
    assert {path: path.read_bytes() for path in before} == before
    monkeypatch.setattr("evals.hub.get_token", lambda: None)
    assert main(["card", "push", str(run)]) == 2
    assert "no Hub token was found" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.fail_commits = False
    assert main(["card", "push", str(run)]) == 0
    assert capsys.readouterr().out == f"{hub.endpoint}/alice/tiny\n"
    assert hub.private == {"alice/tiny": True}
    sent = hub.files["alice/tiny"]
    model = {"model.safetensors", "config.json", "tokenizer.json"}
    files = {"README.md", "recipe.yaml", "results.json", "metrics.jsonl", ".eval_results/acme-helpful-pairs.yaml"}
    assert set(sent) == {
        *model,
        *files,
        *(f"card/{name}.png" for name in ("loss", "ranking", "displacement", "rewards")),
    }
    # A second time nothing has changed, pictures included.
    assert main(["card", "push", str(run)]) == 0
    assert len(hub.commits) == 1


@pytest.mark.slow
def test_elsewhere_the_card_says_where(hub, run):
    assert main(["card", "push", str(run), "--repo_id", "alice/other", "--no-private"]) == 0
    assert hub.private == {"alice/other": False}
    assert 'model_id = "alice/other"' in hub.files["alice/other"]["README.md"].decode()


@pytest.mark.slow
def test_runs_that_have_no_card_to_write(tmp_path, run, capsys):
    def said(*words: str) -> str:
        assert main(["card", *words]) == 2
        text = capsys.readouterr().err
        assert text.startswith("error: ")
        assert text.count("\n") == 1
        return text

    assert "is not a run directory" in said(str(tmp_path / "nowhere"))
    assert "card takes one run directory" in said(str(run), str(run))
    (run / "card.json").write_text('{"version": 7}')
    assert "is not of version 1" in said(str(run))
    fields = {"version": 1, "base_model": "a", "datasets": [], "objective": "o", "formula": "f", "x": 1}
    (run / "card.json").write_text(json.dumps(fields))
    assert "unknown fields ['x']" in said(str(run))
    (run / "card.json").write_text("{")
    assert "is not JSON" in said(str(run))
    (run / "card.json").unlink()
    assert "let it finish first" in said(str(run))
    (run / "recipe.yaml").write_text("train: {seed: 1}\n")
    assert "give one with --repo_id" in said("push", str(run))


@pytest.mark.slow
def test_a_run_of_an_earlier_version_goes_up_with_the_card_it_has(hub, run):
    (run / "card.json").unlink()
    (run / "README.md").write_text("---\ntags: [dpo]\n---\n\n# as it was\n")
    assert main(["card", "push", str(run)]) == 0
    assert b"# as it was" in hub.files["alice/tiny"]["README.md"]
