"""The card: metadata the Hub can read, a body nothing from data can break."""

import html
import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from markdown_it import MarkdownIt

from evals.card import CardInfo, code_block, escape_markdown, write_card
from tests.evals.example_run import make_run

TOKEN = "hf_" + "aB3dE6gH9j" * 3
EVIL = (
    'a | b\n\n# heading <script>x</script> [l](http://e.example) ![i](http://e.example/i) `c` **b** "quoted" --- | 9 |'
)


def info(**changes):
    fields = {
        "base_model": "acme/stories-260k",
        "datasets": ("acme/helpful-pairs",),
        "objective": "dpo",
        "formula": "loss = −log σ(m)",
        "citation": "Rafailov et al. 2023, arXiv:2305.18290, Eq. 7.",
        "adapter": False,
        "command": "accelerate launch align/train.py --config launch/recipes/dpo.yaml",
        "license": "apache-2.0",
        "versions": {"torch": "2.13.0"},
    }
    return CardInfo(**{**fields, **changes})


def written(run, **changes):
    text = write_card(run, info=info(**changes)).read_text()
    _, front, body = text.split("---\n", 2)
    return text, yaml.safe_load(front), body


def rendered(body):
    return MarkdownIt("gfm-like", {"linkify": False, "html": True}).render(body)


@pytest.mark.slow
def test_metadata_of_a_full_model(tmp_path):
    text, front, _ = written(make_run(tmp_path / "my-run"), language=("en",))
    index = front.pop("model-index")
    assert front == {
        "model_name": "my-run",
        "base_model": "acme/stories-260k",
        "base_model_relation": "finetune",
        "datasets": ["acme/helpful-pairs"],
        "language": ["en"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["generated_from_trainer", "preference-alignment", "align-preferences", "dpo"],
    }
    stored = {r["metric"]: r for r in json.loads((tmp_path / "my-run/results.json").read_text())["results"]}
    metrics = {m["type"]: m for m in index[0]["results"][0]["metrics"]}
    assert metrics["ranking/accuracy"]["value"] == stored["ranking/accuracy"]["value"]
    assert metrics["ranking/accuracy"]["args"]["low"] == stored["ranking/accuracy"]["low"]
    # The Hub's own library reads it back.
    card = ModelCard(text)
    assert card.data.model_name == "my-run"
    assert {result.metric_type for result in card.data.eval_results} == set(metrics)
    assert card.data.eval_results[0].dataset_split == "held out"


@pytest.mark.slow
def test_metadata_of_an_adapter_on_a_local_base(tmp_path):
    text, front, body = written(
        make_run(tmp_path / "run"),
        adapter=True,
        base_model="/home/me/models/tiny",
        datasets=("/home/me/pairs.jsonl", "acme/more"),
        license=None,
    )
    assert front["library_name"] == "peft"
    assert front["datasets"] == ["acme/more"]
    assert not {"base_model", "base_model_relation", "license", "licence"} & set(front)
    assert "/home/me" not in text
    assert "tiny with a LoRA adapter trained" in body
    assert "AutoPeftModelForCausalLM" in body
    assert written(make_run(tmp_path / "run"), adapter=True)[1]["base_model_relation"] == "adapter"


@pytest.mark.slow
def test_eval_results_files(tmp_path):
    run = make_run(tmp_path / "run")
    (run / ".eval_results").mkdir()
    (run / ".eval_results" / "stale.yaml").write_text("[]")
    written(run)
    files = list((run / ".eval_results").iterdir())
    assert [path.name for path in files] == ["acme-helpful-pairs.yaml"]
    entries = parse_eval_result_entries(yaml.safe_load(files[0].read_text()))
    first = entries[0]
    assert (first.dataset_id, first.task_id) == ("acme/helpful-pairs", "ranking_accuracy")
    assert "n 400 in 200 prompts" in first.notes
    # A dataset that is only on this machine has no place there.
    local = make_run(tmp_path / "local", name="/data/me/pairs.jsonl")
    written(local)
    assert not (local / ".eval_results").exists()


@pytest.mark.slow
def test_body(tmp_path):
    _, _, body = written(make_run(tmp_path / "run"), resumes=["at step 120, on 2 processes instead of 1"])
    for expected in (
        "loss = −log σ(m)",
        "arXiv:2305.18290",
        "| dropped: chosen equals rejected | 217 |",
        "| train.learning_rate | 5e-07 |",
        "| loss at step 0 | passed |",
        "The run was resumed 1 time:",
        "* at step 120, on 2 processes instead of 1",
        "Likelihood displacement",
        "accelerate launch align/train.py --config launch/recipes/dpo.yaml",
        "| torch | 2.13.0 |",
        'model_id = "."',
    ):
        assert expected in body, expected
    assert "None" not in body


@pytest.mark.slow
def test_quick_start_is_python(tmp_path):
    run = make_run(tmp_path / "run")
    for adapter in (True, False):
        for chat in (True, False):
            (run / "chat_template.jinja").write_text("x") if chat else (run / "chat_template.jinja").unlink(
                missing_ok=True
            )
            _, _, body = written(run, adapter=adapter, repo_id="me/m")
            code = re.search(r"```python\n(.*?)```", body, re.DOTALL)
            assert code is not None
            compile(code[1], "quick start", "exec")
            assert 'model_id = "me/m"' in code[1]
            assert ("apply_chat_template" in code[1]) == chat


@pytest.mark.slow
def test_nothing_from_data_breaks_the_card(tmp_path):
    run = make_run(tmp_path / "run", name=EVIL, model=EVIL)
    report = {"rows": {"read": 2, "kept": 1}, "dropped": {EVIL: 1}, "truncated": {EVIL: 1}, "dataset_hash": EVIL}
    (run / "data_report.json").write_text(json.dumps(report))
    (run / "checks.json").write_text(json.dumps([{"check": EVIL, "passed": False, "detail": EVIL}]))
    (run / "recipe.yaml").write_text(yaml.safe_dump({EVIL: {EVIL: EVIL}}))
    fields = {"base_model": EVIL, "datasets": (EVIL,), "citation": EVIL, "versions": {EVIL: EVIL}, "resumes": [EVIL]}
    code = {"formula": f"```\n{EVIL}", "command": f"train ````\n{EVIL}"}
    text, front, body = written(run, **fields, **code, objective="dpo", model_name=EVIL)
    assert {"base_model", "datasets"} & set(front) == set()
    assert ModelCard(text).data.eval_results
    page = rendered(body)
    outside_code = re.sub(r"<pre>.*?</pre>", "", page, flags=re.DOTALL)
    assert "<script" not in page
    own = re.findall(r'<img src="card/\w+\.png" alt="[^"<>]*"\s*/?>', outside_code)
    assert len(own) == len(re.findall(r"<(?:img|a)\b", outside_code)) == 4, "pictures of our own, and no other"
    assert page.count("<h1>") == 1
    assert re.findall(r"<h2>(.*?)</h2>", page) == [
        "Quick start",
        "Training data",
        "Procedure",
        "Evaluation",
        "Curves",
        "Start-up checks",
        "Limitations",
        "Versions",
    ]
    # Every table row has as many cells as its header.
    for table in re.findall(r"<table>(.*?)</table>", page, re.DOTALL):
        rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
        assert len({len(re.findall(r"<t[hd]\b", row)) for row in rows}) == 1
        for source in ("a | b # heading", "**b**"):
            assert source in table or "heading" not in table


@pytest.mark.parametrize(
    "text",
    [
        EVIL,
        "1. a",
        "- a",
        "+ a",
        "===",
        "---",
        "# a",
        "> a",
        "* a",
        "_a_",
        "~~a~~",
        "a_b_c",
        "$x$",
        "a\\",
        "&amp;",
        "www.a.b",
        "http://a.b",
        "me@a.b",
    ],
)
def test_escaped_text_comes_out_as_it_was(text):
    page = MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(f"{escape_markdown(text)}\n")
    found = re.fullmatch(r"<p>(.*)</p>\n", page, re.DOTALL)
    assert found is not None, page
    assert "<" not in found[1]
    assert html.unescape(found[1]) == " ".join(text.split())


def test_recipe_keys_stay_readable():
    assert escape_markdown("model.model_name_or_path 0.5 -3") == "model.model_name_or_path 0.5 -3"


def test_fences_outgrow_what_they_hold():
    assert code_block("````") == "`````\n````\n`````"


@pytest.mark.slow
def test_no_credentials_and_no_paths(tmp_path):
    run = make_run(tmp_path / "run", name="/home/me/pairs.jsonl", model="/home/me/tiny")
    (run / "recipe.yaml").write_text(f"hub: {{hub_token: {TOKEN}}}\ntrain: {{output_dir: /home/me/runs/dpo}}\n")
    text, _, body = written(
        run, command=f"HF_TOKEN={TOKEN} train --output_dir /home/me/runs/dpo", resumes=[f"with {TOKEN}"]
    )
    assert TOKEN not in text
    assert "/home/me" not in text
    assert "HF_TOKEN=*** train --output_dir dpo" in body
    assert "| hub.hub_token | \\*\\*\\* |" in body


def test_a_license_is_an_id_or_nothing():
    with pytest.raises(ValueError, match="is not an id such as"):
        info(license="Apache License, Version 2.0")


def test_metrics_alone_are_enough(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.7}\n')
    _, front, body = written(tmp_path)
    assert "model-index" not in front
    assert "No evaluation was run." in body
    assert "No data report was kept" in body
