"""Adapters that are named by their Hub id, on a server on this machine that speaks as much of the Hub as is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from align import hub_adapters
from align.errors import RecipeError, RunError
from align.hub_adapters import adapter_config, adapter_folder
from align.reward_scorer import RewardModel
from evals.results import Result, Results
from evals.run import run
from evals.run_settings import Job, read_job
from tests.align.sampled import group
from tests.align.test_sample import save_adapter
from tests.equivalence.worlds import save_model, save_pairs
from tests.evals.hub_server import HubServer, commit_of
from tests.support import REPOSITORY

NAME = "alice/adapter"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        constants = "huggingface_hub.constants"
        monkeypatch.setattr(f"{constants}.ENDPOINT", server.endpoint)
        address = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(f"{constants}.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(f"{constants}.HF_HUB_DISABLE_PROGRESS_BARS", True)
        online(monkeypatch, True)
        yield server
    forget()


def online(monkeypatch: pytest.MonkeyPatch, is_so: bool) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", not is_so)
    forget()


def forget() -> None:
    """As a new process, which has asked for nothing yet."""
    hub_adapters._on_hub.cache_clear()
    hub_adapters._fetched.cache_clear()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """On a tiny model, with its tokenizer."""
    base = save_model(tmp_path / "base")
    save_adapter(tmp_path / "adapter", base)
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def upload(hub: HubServer, folder: Path, name: str = NAME, **replaced: bytes) -> None:
    hub.private[name] = False
    hub.files[name] = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    hub.files[name]["modeling_evil.py"] = b"raise SystemExit"


def changed(folder: Path, **keys: Any) -> bytes:
    """The configuration with other values."""
    return json.dumps(json.loads((folder / "adapter_config.json").read_text()) | keys).encode()


def job(folder: Path, name: str, *evals: dict[str, Any], **model: Any) -> Job:
    recipe = {
        "model": {"model_name_or_path": name, **model},
        "data": {"dataset_name": str(folder / "pairs.jsonl")},
        "evals": list(evals) or [{"name": "ranking"}],
        "out": {"output_dir": str(folder / "out" / name.replace("/", "-"))},
    }
    (folder / "eval.yaml").write_text(yaml.safe_dump(recipe))
    return read_job(str(folder / "eval.yaml"), [])


def values(job: Job) -> dict[str, Result]:
    run(job, say=lambda line: None, report=False)
    return {each.metric: each for each in Results.read(Path(job.out.output_dir) / "results.json").results}


@pytest.mark.slow
def test_one_on_the_hub_is_measured_as_one_in_a_folder(
    hub: HubServer, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    save_pairs(tmp_path / "pairs.jsonl")
    (adapter / "recipe.yaml").write_text("lora: {r: 8}")
    (adapter / "results.json").write_text('{"run": {"steps": 12}}')
    upload(hub, adapter)
    here, there = values(job(tmp_path, str(adapter))), values(job(tmp_path, NAME))
    assert here.keys() == there.keys()
    assert {name: each.value for name, each in here.items()} == {name: each.value for name, each in there.items()}
    assert there["displacement/chosen"].value != 0, "against its own base"
    assert {each.step for each in there.values()} == {12}, "as its run says"
    extra = there["ranking/accuracy"].extra
    assert (extra["model"], extra["fingerprint"]) == (NAME, here["ranking/accuracy"].extra["fingerprint"])


@pytest.mark.slow
def test_what_it_is_and_what_it_stands_on(hub: HubServer, adapter: Path, tmp_path: Path):
    upload(hub, adapter)
    found = job(tmp_path, NAME)
    assert found.adapter is not None
    fetched = Path(found.adapter)
    assert fetched.name == commit_of(hub.files[NAME])
    assert (fetched / "adapter_model.safetensors").read_bytes() == (adapter / "adapter_model.safetensors").read_bytes()
    assert not (fetched / "modeling_evil.py").exists(), "code is not even fetched"
    assert (found.base.model_name_or_path, found.base.model_revision) == (str(tmp_path / "base"), "main")
    assert found.base.tokenizer_name_or_path == str(fetched)
    assert (found.name, found.compared_with) == (NAME, "base")
    asked = list(hub.requests)
    assert found.base
    assert found.adapter == str(fetched)
    assert hub.requests == asked, "once for all"


@pytest.mark.slow
def test_its_base_s_revision_is_what_it_was_trained_on(hub: HubServer, adapter: Path, tmp_path: Path):
    (adapter / "adapter_config.json").write_bytes(changed(adapter, base_model_name_or_path="acme/base", revision="v2"))
    upload(hub, adapter)
    hub.revisions[NAME, "v7"] = dict(hub.files[NAME])
    for revision in ("main", "v7"):
        base = job(tmp_path, NAME, model_revision=revision).base
        assert (base.model_name_or_path, base.model_revision) == ("acme/base", "v2")
    own = job(tmp_path, NAME, base_model_name_or_path=str(tmp_path / "base")).base
    assert (own.model_name_or_path, own.model_revision) == (str(tmp_path / "base"), "main")
    assert job(tmp_path, str(adapter)).base.model_revision == "v2"
    assert job(tmp_path, str(adapter), model_revision="v3").base.model_revision == "v3"


@pytest.mark.slow
def test_revisions_are_told_apart(hub: HubServer, adapter: Path, tmp_path: Path):
    upload(hub, adapter)
    hub.revisions[NAME, "old"] = {**hub.files[NAME], "adapter_config.json": changed(adapter, r=4)}
    new, old = adapter_folder(NAME), adapter_folder(NAME, "old")
    assert new is not None
    assert old is not None
    assert [json.loads((each / "adapter_config.json").read_text())["r"] for each in (new, old)] == [8, 4]
    assert adapter_folder(NAME, "none") is None
    assert adapter_folder(NAME, commit_of(hub.revisions[NAME, "old"])) == old


@pytest.mark.slow
def test_without_a_network_the_cache_is_read(
    hub: HubServer, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    upload(hub, adapter)
    online(monkeypatch, False)
    assert adapter_folder(NAME) is None, "nobody knows"
    online(monkeypatch, True)
    known = adapter_folder(NAME)
    assert known is not None
    online(monkeypatch, False)
    hub.requests.clear()
    assert adapter_folder(NAME) == known
    assert hub.requests == []
    # Pushed anew, it is fetched anew by who can ask.
    hub.files[NAME]["adapter_config.json"] = changed(adapter, r=4)
    forget()
    assert adapter_folder(NAME) == known
    online(monkeypatch, True)
    assert adapter_folder(NAME) == known.parent / commit_of(hub.files[NAME])


@pytest.mark.slow
def test_what_is_no_adapter(hub: HubServer, adapter: Path, tmp_path: Path):
    upload(hub, tmp_path / "base", "alice/model")
    for name in ("alice/model", "alice/none", "runs/none", str(tmp_path / "none"), "./none", "a/b/c", "no such name"):
        assert adapter_config(name) is None
        assert adapter_folder(name) is None
    asked = [request for request in hub.requests if "resolve" in request]
    assert {request.split("/resolve")[0] for request in asked} == {
        f"HEAD /{name}" for name in ("alice/model", "alice/none", "runs/none")
    }
    assert job(tmp_path, "alice/model").adapter is None
    assert job(tmp_path, "alice/model", model_revision="v1").base.model_revision == "v1"
    assert adapter_folder(str(adapter)) == adapter


@pytest.mark.slow
def test_faults_are_told_in_a_sentence(hub: HubServer, adapter: Path, tmp_path: Path):
    upload(hub, adapter)
    weights = hub.files[NAME].pop("adapter_model.safetensors")
    with pytest.raises(
        RunError, match=r"^alice/adapter: there is no adapter_model.safetensors beside its adapter_config"
    ):
        job(tmp_path, NAME).base  # noqa: B018
    hub.files[NAME] |= {
        "adapter_model.safetensors": weights,
        "adapter_config.json": changed(adapter, base_model_name_or_path="/home/alice/base"),
    }
    forget()
    with pytest.raises(
        RecipeError, match=r"adapter 'alice/adapter' was trained on '/home/alice/base', which is not there"
    ):
        job(tmp_path, NAME).base  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "compared"), [("acme/sft-adapter", "acme/sft-adapter"), ("sft", None), ("/home/alice/sft", None)]
)
def test_an_adapter_that_went_on_from_another(
    before: str, compared: str | None, hub: HubServer, adapter: Path, tmp_path: Path
):
    """Of a run that was pushed, whose recipe says it; a folder of another machine says nothing here."""
    upload(hub, adapter)
    hub.files[NAME]["recipe.yaml"] = yaml.safe_dump({"lora": {"adapter_name_or_path": before}}).encode()
    needing_one = {"name": "win_rate", "baseline": "reference", "judge": "gold"}
    if compared is None:
        with pytest.raises(RecipeError, match=r"compares with a reference, and there is none; set reference\.model"):
            job(tmp_path, NAME, needing_one)
    else:
        assert job(tmp_path, NAME, needing_one).compared_with == compared


@pytest.mark.slow
def test_a_reward_model_s_adapter_scores(hub: HubServer, tmp_path: Path):
    model = AutoModelForSequenceClassification.from_pretrained(save_model(tmp_path / "base"), num_labels=1)
    own = tmp_path / "reward"
    get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")).save_pretrained(own)
    AutoTokenizer.from_pretrained(tmp_path / "base").save_pretrained(own)
    upload(hub, own)
    asked = [group("The cat", [" sat on the mat.", " ran", " was there and it ran to see what was there"])]
    here, there = ([each.score for each in RewardModel(model=name)(asked)] for name in (str(own), NAME))
    assert here == there
    assert len(set(there)) == 3


@pytest.mark.slow
def test_the_command(hub: HubServer, adapter: Path, tmp_path: Path):
    save_pairs(tmp_path / "pairs.jsonl")
    upload(hub, adapter)
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_CACHE": str(tmp_path / "another"),
        "PYTHONPATH": path,
    }
    words = [
        f"--model_name_or_path={NAME}",
        f"--data.dataset_name={tmp_path / 'pairs.jsonl'}",
        "--evals=[ranking, ches]",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "evals", "run", *words, f"--output_dir={tmp_path / 'out'}"],
        env={**os.environ, **own, "HF_HUB_DISABLE_XET": "1", "ALIGN_CACHE": str(tmp_path / "cache")},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = {each.metric: each for each in Results.read(tmp_path / "out" / "results.json").results}
    assert found["displacement/chosen"].value != 0
    assert found["ranking/accuracy"].extra["model"] == NAME
