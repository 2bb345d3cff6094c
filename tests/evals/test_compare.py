"""Comparing runs: who is better, what can't be said, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evals.__main__ import main
from evals.compare import ALLOWABLE, Compared, compare, read_run
from evals.compare_text import rendered, short_names
from evals.measured import Measured, means_by_prompt
from evals.ranking import mean_of, share_of
from evals.results import Result, Results
from evals.scores import write_scores
from evals.significance import holm, paired
from tests.support import REPOSITORY

PROMPTS = [f"p{i}" for i in range(200)]


def wins(seed: int, share: float, n: int = 200) -> np.ndarray:
    """Scores of prompts that are hard or easy for every run alike."""
    hard = np.random.default_rng(0).random(n)
    noise = np.random.default_rng(seed).normal(0, 0.12, n)
    return np.clip(np.round(2 * (share + (0.5 - hard) + noise)) / 2, 0, 1)


def make(
    folder: Path,
    columns: dict[str, np.ndarray],
    *,
    stored: bool = True,
    extra: dict[str, Any] | None = None,
    facts: dict[str, Any] | None = None,
    split: str = "test",
    step: int = 10,
    prompts: list[str] = PROMPTS,
) -> Path:
    """A run directory with results, and scores of prompts."""
    measured = Measured(
        estimates={
            name: share_of(v, prompts[: len(v)]) if v.min() >= 0 <= 1 - v.max() else mean_of(v, prompts[: len(v)])
            for name, v in columns.items()
        },
        by_prompt={name: means_by_prompt(v, prompts[: len(v)]) for name, v in columns.items()},
    )
    results = measured.results(dataset="acme/asked", split=split, step=step, extra=extra)
    Results(run={"template": "t-1", **(facts or {})}, results=results).write(folder / "results.json")
    if stored:
        write_scores(folder, measured.scores(dataset="acme/asked", split=split, step=step))
    return folder


def compared(*folders: Path, **keys: Any) -> list[Compared]:
    return list(compare([read_run(folder) for folder in folders], **keys).pairs)


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [
        make(tmp_path / name, {"win_rate/raw": wins(i, share), "reward_model/nll": 1 - wins(i, share)})
        for i, (name, share) in enumerate({"a": 0.62, "b": 0.5, "c": 0.49}.items(), start=1)
    ]


def test_runs_with_scores_are_paired_and_corrected_together(runs: list[Path]):
    found = compared(*runs)
    assert len(found) == 6
    p_values = []
    for each in found:
        first, second = (int("abc".index(Path(name).name)) for name in (each.first, each.second))
        share = (0.62, 0.5, 0.49)
        one, two = wins(first + 1, share[first]), wins(second + 1, share[second])
        order = np.argsort(PROMPTS)
        if each.metric == "reward_model/nll":
            one, two = 1 - one, 1 - two
        test = paired(one[order], two[order])
        assert each.p_value == test.p_value
        assert (each.difference, each.low, each.high) == pytest.approx(
            (test.difference.value, test.difference.low, test.difference.high)
        )
        p_values.append(test.p_value)
    assert [each.p_corrected for each in found] == pytest.approx(holm(p_values))
    by_pair = {(Path(e.first).name, Path(e.second).name, e.metric): e for e in found}
    assert Path(by_pair["a", "b", "win_rate/raw"].better or "").name == "a"
    assert Path(by_pair["a", "b", "reward_model/nll"].better or "").name == "a", "a lower loss is better"
    tie = by_pair["b", "c", "win_rate/raw"]
    assert tie.better is None
    assert tie.needed is not None
    assert tie.needed > 200


def test_without_scores_less_is_claimed(tmp_path: Path, runs: list[Path]):
    bare = make(tmp_path / "bare", {"win_rate/raw": wins(1, 0.62)}, stored=False)
    (pair,) = compared(bare, runs[1], metrics=["win_rate/raw"])
    (sharper, *_) = compared(runs[0], runs[1])
    assert pair.test == "unpaired"
    assert pair.difference == pytest.approx(sharper.difference)
    assert pair.p_value is not None
    assert sharper.p_value is not None
    assert pair.p_value > sharper.p_value
    assert "for want of scores.jsonl" in pair.notes[-1]


@pytest.mark.parametrize(
    ("here", "there", "says", "allowed"),
    [
        ({"facts": {"template": "t-2"}}, {}, "different template: template t-2 and t-1", "template"),
        ({"extra": {"template": "t-9"}}, {}, "different template: template t-9 and t-1", "template"),
        ({"extra": {"temperature": 0.7}}, {"extra": {"temperature": 1.0}}, "temperature 0.7 and 1.0", "sampling"),
        ({"extra": {"sampling": {"top_p": 1}}}, {}, "different sampling", "sampling"),
        ({"extra": {"judge": "j-2"}}, {"extra": {"judge": "j-1"}}, "different judge: judge j-2 and j-1", "judge"),
        ({"extra": {"baseline": "gpt"}}, {}, "different baseline: baseline gpt and none", "baseline"),
        (
            {"split": "held out", "facts": {"dataset_hash": "x"}},
            {"split": "held out", "facts": {"dataset_hash": "y"}},
            "different data: dataset_hash x and y",
            "data",
        ),
    ],
)
def test_what_was_measured_differently_is_refused(
    tmp_path: Path, here: dict[str, Any], there: dict[str, Any], says: str, allowed: str
):
    one = make(tmp_path / "one", {"win_rate/raw": wins(1, 0.62)}, **here)
    two = make(tmp_path / "two", {"win_rate/raw": wins(2, 0.5)}, **there)
    (pair,) = compared(one, two)
    assert pair.refused is not None
    assert says in pair.refused
    assert f"--allow {allowed}" in pair.refused
    assert (pair.p_value, pair.better, pair.difference) == (None, None, None)
    (pair,) = compared(one, two, allow=[allowed])
    assert pair.refused is None
    assert says in pair.notes[0]


def test_training_data_may_differ_where_the_test_set_does_not(tmp_path: Path):
    one, two = (
        make(tmp_path / name, {"win_rate/raw": wins(i, 0.5)}, facts={"dataset_hash": name, "seed": i})
        for i, name in enumerate("xy")
    )
    assert compared(one, two)[0].refused is None


def test_other_prompts(tmp_path: Path):
    column = {"win_rate/raw": wins(1, 0.6)}
    one = make(tmp_path / "one", column)
    few = make(tmp_path / "few", {"win_rate/raw": wins(2, 0.5)[:150]})
    (pair,) = compared(one, few)
    assert (pair.prompts, pair.notes) == (150, ("on the 150 prompts that both have, of 200 and 150",))
    strangers = make(tmp_path / "strangers", column, prompts=[f"q{i}" for i in range(200)])
    assert compared(one, strangers)[0].refused == "they have 0 prompts in common; evaluate both on the same"
    bare = make(tmp_path / "bare", {"win_rate/raw": wins(2, 0.5)[:150]}, stored=False)
    (pair,) = compared(one, bare)
    assert pair.refused is not None
    assert "different n: 200 and 150 prompts" in pair.refused
    (pair,) = compared(one, bare, allow=["n"])
    assert pair.test == "unpaired"


def test_certainty_without_a_spread_is_none(tmp_path: Path):
    """Means that don't vary over prompts: without scores no test, and two prompts that agree prove nothing."""
    ones, zeros = np.ones(2), np.zeros(2)
    one = make(tmp_path / "one", {"win_rate/raw": ones}, stored=False)
    two = make(tmp_path / "two", {"win_rate/raw": zeros}, stored=False)
    (pair,) = compared(one, two)
    assert pair.p_value is not None
    assert pair.p_value > 0.05, "Wilson's interval of 2 of 2 is wide"
    single = make(tmp_path / "single", {"win_rate/raw": ones[:1]}, stored=False)
    other = make(tmp_path / "other", {"win_rate/raw": np.array([0.5])}, stored=False)
    assert compared(single, other)[0].refused == "the spread of one of them is unknown; evaluate on more prompts"
    constant = [
        make(tmp_path / f"constant{i}", {"reward_model/nll": np.full(3, 2.0 + i)}, stored=False) for i in range(2)
    ]
    assert compared(*constant)[0].refused is not None
    same = make(tmp_path / "same", {"win_rate/raw": wins(1, 0.5)})
    copy = make(tmp_path / "copy", {"win_rate/raw": wins(1, 0.5)})
    (pair,) = compared(same, copy)
    assert (pair.p_value, pair.better, pair.needed) == (1.0, None, None)
    assert "All prompts differ alike" in rendered(compare([read_run(same), read_run(copy)]))


def test_parts_of_a_split_and_neutral_metrics_wait_to_be_named(tmp_path: Path):
    def run(name: str, seed: int) -> Path:
        folder = make(tmp_path / name, {"win_rate/raw": wins(seed, 0.5), "my/number": wins(seed, 0.5)})
        results = Results.read(folder / "results.json")
        part = [Result(**{**_fields(each), "split": "test, easy"}) for each in results.results]
        Results(run=results.run, results=[*results.results, *part]).write(folder / "results.json")
        return folder

    one, two = run("one", 1), run("two", 2)
    found = compare([read_run(one), read_run(two)])
    assert [each.split for each in found.pairs] == ["test"]
    assert found.left_out == ["my/number"]
    assert [each.split for each in compared(one, two, splits=["test, easy"])] == ["test, easy"]
    assert [each.metric for each in compared(one, two, metrics=["my/number"])] == ["my/number"]


def _fields(result: Result) -> dict[str, Any]:
    return {name: getattr(result, name) for name in Result.__dataclass_fields__}


def test_the_last_step_counts_unless_one_is_named(tmp_path: Path):
    folder = make(tmp_path / "a", {"win_rate/raw": wins(1, 0.6)})
    results = Results.read(folder / "results.json")
    early = [Result(**{**_fields(each), "step": 0, "value": 0.25}) for each in results.results]
    Results(run=results.run, results=[*results.results, *early]).write(folder / "results.json")
    key = "win_rate/raw", "acme/asked", "test"
    assert read_run(folder).results[key].step == 10
    assert key in read_run(folder).scores
    at_start = read_run(folder / "results.json", step=0)
    assert (at_start.results[key].value, at_start.scores) == (0.25, {})
    with pytest.raises(ValueError, match="has no results at step 7"):
        read_run(folder, step=7)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"metrics": ["win_rate/rw"]}, "unknown metric 'win_rate/rw'; did you mean 'win_rate/raw'"),
        ({"splits": ["tset"]}, "unknown split 'tset'; did you mean 'test'"),
        ({"allow": ["templates"]}, "unknown --allow 'templates'; did you mean 'template'"),
        ({"correction": "bonferroni"}, "unknown correction 'bonferroni'"),
        ({"baseline": "nobody"}, "unknown run 'nobody'"),
        ({"level": 1.0}, "level must be"),
    ],
)
def test_unknown_names(runs: list[Path], keys: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        compared(*runs, **keys)


def test_runs_that_share_nothing(tmp_path: Path, runs: list[Path]):
    other = make(tmp_path / "other", {"win_rate/raw": wins(1, 0.5)}, split="other")
    with pytest.raises(ValueError, match="no two runs measured the same"):
        compared(runs[0], other)
    with pytest.raises(ValueError, match="two runs or more"):
        compared(runs[0])
    with pytest.raises(ValueError, match="each once"):
        compared(runs[0], runs[0])
    neutral = [make(tmp_path / f"n{i}", {"my/number": wins(i, 0.5)}) for i in range(2)]
    with pytest.raises(ValueError, match="name metrics with --metric"):
        compared(*neutral)


def test_a_baseline_halves_the_family(runs: list[Path]):
    found = compared(*runs, baseline=str(runs[1]), metrics=["win_rate/raw"])
    assert [(Path(e.first).name, Path(e.second).name) for e in found] == [("a", "b"), ("b", "c")]


# ---- the command ----


def test_the_command_says_who_is_better_and_what_can_t_be_said(
    tmp_path: Path, runs: list[Path], capsys: pytest.CaptureFixture[str]
):
    odd = make(tmp_path / "odd", {"win_rate/raw": wins(9, 0.5)}, facts={"template": "t-2"})
    assert main(["compare", *map(str, [*runs, odd]), "--metric", "win_rate/raw"]) == 0
    said = capsys.readouterr().out
    assert "acme/asked, test" in said
    assert "Better, beyond chance:\n  a is better than b on win_rate/raw: +" in said
    assert "Can't be said:\n  b and c on win_rate/raw: " in said
    assert "To show one this size needs about " in said
    assert "Not compared:\n  a and odd on win_rate/raw: different template: template t-1 and t-2" in said
    assert "p-values of all 3 tests are corrected together (Holm)" in said
    assert "nan" not in said.lower()


def test_a_claim_is_told_from_the_side_of_the_better_run(runs: list[Path]):
    """The better run comes second, and a loss is better lower."""
    worse, better = read_run(runs[1]), read_run(runs[0])
    said = rendered(compare([worse, better]))
    assert "a is better than b on win_rate/raw: +" in said
    assert "a is better than b on reward_model/nll: −" in said


def test_the_command_writes_json_and_errors_of_one_sentence(
    tmp_path: Path, runs: list[Path], capsys: pytest.CaptureFixture[str]
):
    assert main(["compare", *map(str, runs), "--json", "--correction", "bh", "--baseline", str(runs[0])]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {each["metric"] for each in found} == {"win_rate/raw", "reward_model/nll"}
    assert all(each["p_corrected"] >= each["p_value"] for each in found)
    assert main(["compare", str(tmp_path / "none"), str(runs[0])]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: cannot read")
    assert error.count("\n") == 1


def test_short_names_tell_runs_apart():
    assert short_names(["runs/a", "runs/b"]) == {"runs/a": "a", "runs/b": "b"}
    assert short_names(["x/run", "y/run"]) == {"x/run": "x/run", "y/run": "y/run"}
    assert short_names(["x/results.json", "y/results.json"]) == {"x/results.json": "x", "y/results.json": "y"}


def test_help_and_page_name_everything_that_can_be_allowed(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    said = " ".join(capsys.readouterr().out.split()).partition("compare although ")[2].partition(" differ")[0]
    assert said.replace(" or ", ", ").split(", ") == list(ALLOWABLE)
    named = (REPOSITORY / "docs" / "compare.md").read_text().partition("by name:")[2].partition("Other datasets")[0]
    assert [name for name in ALLOWABLE if f"`{name}`" not in named] == []
