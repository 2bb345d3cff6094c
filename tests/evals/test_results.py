import json
import math

import pytest

from evals.results import VERSION, Result, Results, as_metrics
from objectives.stats import mean_with_interval

FIELDS = {
    "metric": "ranking/accuracy",
    "dataset": "acme/pairs",
    "split": "test",
    "n": 4,
    "clusters": 4,
    "value": 0.5,
    "stderr": 0.25,
    "low": 0.15,
    "high": 0.85,
    "interval": "wilson",
    "step": 10,
}


def test_written_and_read_again(tmp_path):
    results = Results(run={"model": "m", "seed": 0}, results=[Result(**FIELDS, extra={"n_dropped": 2})])
    results.write(tmp_path / "results.json")
    assert Results.read(tmp_path / "results.json") == results
    assert json.loads((tmp_path / "results.json").read_text())["version"] == VERSION
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("name", ["value", "stderr", "low", "high"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused(name, bad):
    with pytest.raises(ValueError, match=rf"{name} of 'ranking/accuracy'"):
        Result(**{**FIELDS, name: bad})


def test_also_inside_extra_and_run(tmp_path):
    with pytest.raises(ValueError, match="extra of 'ranking/accuracy'"):
        Result(**FIELDS, extra={"grid": [0.1, {"deep": math.nan}]})
    with pytest.raises(ValueError, match="description of the run"):
        Results(run={"loss": math.inf}, results=[]).write(tmp_path / "results.json")
    assert not list(tmp_path.iterdir())


def test_one_prompt_has_no_spread(tmp_path):
    estimate = mean_with_interval([1.0, 0.5], ["p", "p"])
    result = Result.of(estimate, metric="m", dataset="d", split="s", step=0)
    assert (result.value, result.stderr, result.low, result.high) == (0.75, None, None, None)
    Results(run={}, results=[result]).write(tmp_path / "results.json")
    assert Results.read(tmp_path / "results.json").results == [result]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read"),
        ("{", "is not JSON"),
        ('{"version": 2, "run": {}, "results": []}', "has version 2, and this code reads version 1"),
        ("[]", "has version None"),
        ('{"version": 1, "results": []}', "needs a mapping 'run'"),
        ('{"version": 1, "run": {}, "results": [{"metric": "m"}]}', "result 0 of .* lacks"),
        (json.dumps({"version": 1, "run": {}, "results": [{**FIELDS, "valeu": 1}]}), "unknown fields"),
        (json.dumps({"version": 1, "run": {}, "results": [{**FIELDS, "n": "4"}]}), "n in result 0 .* is '4', not int"),
        (json.dumps({"version": 1, "run": {}, "results": [{**FIELDS, "value": math.nan}]}), "not a finite"),
    ],
)
def test_errors_are_one_sentence(tmp_path, text, message):
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        Results.read(path)
    assert "\n" not in str(caught.value)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    Results(run={}, results=[]).write(path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        Results(run={"odd": object()}, results=[]).write(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_flat_keys_for_the_log():
    assert as_metrics([Result(**FIELDS)]) == {
        "eval/ranking/accuracy": 0.5,
        "eval/ranking/accuracy_low": 0.15,
        "eval/ranking/accuracy_high": 0.85,
    }
