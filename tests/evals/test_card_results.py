"""What a card says of results: a table for each kind, conditions once, limits only where they hold."""

from __future__ import annotations

import pytest

from evals.card import write_card
from evals.card_limits import limits
from evals.card_results import final, groups
from evals.results import Result, Results
from evals.run_files import read_run
from tests.evals.example_run import make_run
from tests.evals.test_card import info, written

SAMPLING = {"temperature": 0.7, "max_tokens": 512, "seed": 1}


def result(metric: str, value: float = 0.6, **changes) -> Result:
    fields = {
        "dataset": "acme/asked",
        "split": "test",
        "n": 60,
        "clusters": 60,
        "stderr": 0.06,
        "step": 300,
        "low": value - 0.13,
        "high": value + 0.13,
        "interval": "clustered-t",
    }
    return Result(metric=metric, value=value, **{**fields, **changes})


def judged(judge: str, **extra) -> dict:
    return {"judge": {"model": judge}, "baseline": "acme/base", "sampling": SAMPLING, "n_dropped": 3, **extra}


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def with_results(run, *more: Result):
    known = Results.read(run / "results.json")
    Results(run=known.run, results=[*known.results, *more]).write(run / "results.json")
    return run


def said(run, **changes) -> list[str]:
    files = read_run(run)
    assert files.results is not None
    return limits(files, info(**changes), final(files.results.results))


def test_results_come_by_kind_with_conditions_once():
    found = groups(
        [
            result("win_rate/raw", extra=judged("a/judge")),
            result("pass_at_k/coverage@8", extra={"sampling": SAMPLING}),
            result("win_rate/length_controlled", extra=judged("a/judge", warning="few wins")),
            result("odd/thing", 3.5, extra={"bins": [{"low": 0.0}], "nothing": None}),
        ]
    )
    assert [(group.name, len(group.rows)) for group in found] == [("win_rate", 2), ("pass_at_k", 1), ("odd", 1)]
    assert found[0].conditions == [
        ("judge", "model a/judge"),
        ("baseline", "acme/base"),
        ("sampling", "temperature 0.7, max_tokens 512, seed 1"),
        ("left out", "3"),
    ]
    assert [note for _, note in found[0].rows] == ["", "warning few wins"]
    assert found[2].title == "odd"
    assert found[2].conditions == []


def test_two_judges_are_two_results_and_the_latest_step_wins():
    of_a, of_b = (result("win_rate/raw", value, extra=judged(j)) for j, value in (("a", 0.6), ("b", 0.4)))
    early = result("win_rate/raw", 0.5, step=0, extra=judged("a"))
    assert final([early, of_a, of_b]) == [of_a, of_b]
    (group,) = groups([of_a, of_b])
    assert ("judge", "model a") not in group.conditions
    assert [note for _, note in group.rows] == ["judge model a", "judge model b"]


@pytest.mark.slow
def test_a_card_shows_every_metric_known_or_not(run):
    more = [result("win_rate/raw", extra=judged("a/judge")), result("odd/thing", 3.5), result("retention/general", 0.5)]
    _, front, body = written(with_results(run, *more))
    assert "### Win rate against a baseline" in body
    assert "* judge: model a/judge" in body
    assert "| win_rate/raw | Judge prefers the model's answer to the baseline's | acme/asked, test | 60.0 %" in body
    assert "| odd/thing |  | acme/asked, test | 3.5" in body
    listed = {metric["type"]: metric for each in front["model-index"][0]["results"] for metric in each["metrics"]}
    assert listed["win_rate/raw"]["args"]["judge"] == "model a/judge"
    assert {"odd/thing", "retention/general"} <= listed.keys()
    notes = (run / ".eval_results" / "acme-asked.yaml").read_text()
    assert "judge model a/judge" in " ".join(notes.split())


def test_limits_of_a_judged_run(run):
    more = [
        result("win_rate/raw", extra=judged("a/judge")),
        result("judge/consistency", 0.83, extra=judged("a/judge")),
        result("pass_at_k/coverage@8", n=20, clusters=20),
        result("retention/general", 0.5),
        result("ranking/gap", 0.12, dataset="acme/helpful-pairs", split="held out"),
        result("ranking/idealised", 0.73, dataset="acme/helpful-pairs", split="held out"),
    ]
    lines = said(with_results(run, *more), license=None, language=("en",), resumes=["from step 3", "from step 9"])
    text = "\n".join(lines)
    # 0.26 wide from 60 prompts; ±0.02 takes 60 · (0.13 / 0.02)² = 2535.
    assert "win_rate/raw comes from 60 prompts: its 95 % interval is 26 points wide" in text
    assert "would take about 2\u202f540 prompts" in text
    assert "20 prompts of split test carry an interval" in text
    assert "Ranking accuracy is 12 points [−1.0, 25.0] below what the optimum" in text
    assert "(73.0 %)" in text
    assert "verdicts of a judge (model a/judge), not of people" in text
    assert "changed its mind with the order of the answers on 17.0 % of prompts" in text
    assert "resumed 2 times" in text
    assert "The licence of the model is not stated" in text
    assert "312 rows (2.8 %) had their chosen cut to fit." in text
    assert "Up to 3 evaluation rows could not be scored" in text
    for untrue in ("No judge", "(retention)", "language of the data", "Its own responses were not looked at"):
        assert untrue not in text


def test_limits_of_a_run_that_measured_little(run):
    text = "\n".join(said(run))
    assert "No judge and no person" in text
    assert "(retention)" in text
    assert "(memorisation)" in text
    assert "Its own responses were not looked at" in text
    assert "has no upper bound to be compared with" in text
    assert "One run with one seed (0)" in text
    assert "The language of the data is not stated" in text
    for untrue in ("licence of the model", "verdicts of a judge", "points wide", "resumed", "carry an interval"):
        assert untrue not in text


def test_limits_without_results(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.7}\n')
    files = read_run(tmp_path)
    text = "\n".join(limits(files, info(), []))
    assert "Nothing was evaluated" in text
    assert "retention" not in text


@pytest.mark.slow
def test_trackers_are_linked_and_nothing_else_is(run):
    (run / "trackers.json").write_text(
        '{"wandb": {"link": "https://wandb.ai/a/b/runs/c", "shown": "W&B: run c"},'
        ' "tensorboard": {"shown": "TB: [x](y)"},'
        ' "evil": {"link": "javascript:alert(1)", "shown": "<b>"}}'
    )
    body = write_card(run, info=info()).read_text()
    assert (
        'alt="Visualize in Weights & Biases" width="150" height="24"/>](https://wandb.ai/a/b/runs/c) W&amp;B: run c'
        in body
    )
    assert "* TB: \\[x\\](y)" in body
    assert "javascript" not in body
    assert "* &lt;b&gt;" in body
