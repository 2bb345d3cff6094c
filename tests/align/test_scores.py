"""Scores of samples: combined, on disk, mended after a kill, and refused where they are not these samples'."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.errors import RunError
from align.samples import Group, read
from align.scores import BLOCK, SCORERS, Scored, Scoring, combine, read_scores, score_file
from align.typed import Entry
from align.verifiers import Exact, Python, Regex
from align.world_scorers import Gold, WorldAnswer
from data.errors import DataError
from data.worlds import candidates, problems
from objectives.registry import example, field_docs
from objectives.reward_transforms import R3, Clip, LengthPenalty, LogSigmoidCentered, ZScore
from tests.align.judge_server import JudgeServer
from tests.align.sampled import chat, write_samples
from tests.support import REPOSITORY

COLOURS = ["red", "green", "red", "blue"]


def colours(number: int = 3) -> list[Group]:
    return [chat(f"Colour {i}?", COLOURS, {"answer": "red" if i % 2 == 0 else "blue"}) for i in range(number)]


def exact(weight: float = 1.0, **keys: Any) -> Entry:
    return Entry(name="exact", built=Exact(**keys), weight=weight)


def quiet(line: str) -> None:
    """Says nothing."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Letters; what it is told can't be scored."""

    unknown: str = ""
    value: float | None = None

    answers: ClassVar[bool] = False

    def __call__(self, groups: Sequence[Group]) -> list[Scored]:
        return [
            Scored(score=None, reason=f"unknown: {sample.text}")
            if sample.text == self.unknown
            else Scored(
                score=len(sample.text) if self.value is None else self.value, counts={"letters": len(sample.text)}
            )
            for group in groups
            for sample in group.samples
        ]


def lengths(weight: float = 1.0, **keys: Any) -> Entry:
    return Entry(name="lengths", built=Lengths(**keys), weight=weight)


# ---- every scorer ----


@pytest.mark.parametrize("name", SCORERS.names())
def test_every_key_of_every_scorer_is_documented(name: str):
    cls = SCORERS[name]
    keys = [field.name for field in dataclasses.fields(cls)]
    assert [key for key in field_docs(cls) if key in keys] == keys, "a string under each field"
    assert cls.__doc__
    assert cls.__dataclass_params__.frozen
    assert set(getattr(cls, "free", ())) <= set(keys)
    assert isinstance(cls.answers, bool)
    assert cls(**dataclasses.asdict(example(cls))) == example(cls)


def test_other_names_are_answered_with_ours():
    assert SCORERS.names() == ["exact", "gold", "judge", "math", "python", "regex", "reward_model", "world_answer"]
    with pytest.raises(ValueError, match=r"unknown scorer 'llm_judge': it is called 'judge' here"):
        SCORERS["llm_judge"]


# ---- one score of several ----


def test_a_weighted_sum_by_hand():
    """2·1 − 0.5·3 = 0.5; a response without one of the rewards has no score."""
    rewards = {"right": [1.0, 0.0, None], "long": [3.0, 4.0, 5.0]}
    assert combine(rewards, {"right": 2.0, "long": -0.5}) == [0.5, -2.0, None]
    assert combine(rewards, {"right": 0.0, "long": 1.0}) == [3.0, 4.0, 5.0], "recorded only"
    assert combine({"right": [None, None]}, {}) == [None, None]
    with pytest.raises(ValueError, match="no scorer has a weight other than 0"):
        combine(rewards, {"right": 0.0, "long": 0.0})


def test_transforms_come_before_weights():
    """z-scores of (0, 2, 4) are (−1, 0, 1) whatever the scale; then 3·z."""
    assert combine({"a": [0.0, 2.0, 4.0]}, {"a": 3.0}, [ZScore()]) == pytest.approx([-3, 0, 3])
    assert combine({"a": [0.0, 2.0, None, 4.0]}, {"a": 3.0}, [ZScore()]) == pytest.approx([-3, 0, None, 3])
    assert combine({"a": [0.0, 9.0]}, {}, [Clip(highest=5)]) == [0, 5]
    found = combine({"a": [1.0, -1.0]}, {}, [LogSigmoidCentered(value=1.0)])
    assert found == pytest.approx([-0.693147, -2.126928], abs=1e-6)
    responses = ["one", "one two three"]
    assert combine({"a": [1.0, 1.0]}, {}, [LengthPenalty(alpha=0.1)], responses=responses) == pytest.approx([0.9, 0.7])


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6), st.floats(-3, 3).filter(bool))
def test_one_reward_of_weight_one_is_the_score(values: list[float], weight: float):
    assert combine({"a": values}, {}) == pytest.approx(values)
    assert combine({"a": values, "b": values}, {"a": weight, "b": 1 - weight or 2}) == pytest.approx(
        [value * (weight + (1 - weight or 2)) for value in values], abs=1e-9
    )


def test_scores_of_groups():
    with Scoring([exact(), lengths(0.1, unknown="green")]) as scoring:
        (found,) = scoring(colours(1))
    assert [each.score for each in found] == pytest.approx([1.3, None, 1.3, 0.4])
    assert [each.answer for each in found] == COLOURS
    assert found[1].scores == {"exact": 0.0, "lengths": None}
    assert found[1].reasons == {"lengths": "unknown: green"}
    assert found[0].counts == {"lengths": {"letters": 3}}


def test_two_scorers_of_a_name_are_told_apart():
    with Scoring([lengths(), lengths(unknown="red")]) as scoring:
        (found,) = scoring(colours(1))
    assert found[0].scores == {"lengths": 3, "lengths_2": None}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_none_stops_and_names_the_sample(value: float):
    groups = colours(1)
    with Scoring([lengths(value=value)]) as scoring, pytest.raises(RunError) as error:
        scoring(groups)
    assert str(error.value).startswith(
        f"lengths gives {value} to sample 0 of prompt {groups[0].prompt_id}, row 0; mend"
    )


def test_sums_that_are_no_number_stop():
    with (
        Scoring([lengths(1e308, value=1e10)]) as scoring,
        pytest.raises(RunError, match=r"^prompt \w+: the combined score"),
    ):
        scoring(colours(1))


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ([], "scorers is empty; name at least one of exact, gold"),
        ([exact(0.0)], "every weight is 0"),
        ([exact(float("nan"))], "the weight of exact must be a finite number, got nan"),
        ([Entry(name="python", built=Python(function="no_such_module:f"))], "python: can't import"),
    ],
)
def test_what_can_t_work_is_refused_before_a_sample_is_scored(entries: list[Entry], says: str, tmp_path: Path):
    samples = write_samples(tmp_path / "samples.jsonl", colours())
    with pytest.raises(RunError, match=says):
        score_file(samples, tmp_path / "scores.jsonl", entries, [], quiet)
    assert not (tmp_path / "scores.jsonl").exists()


def test_transforms_that_do_not_fit(tmp_path: Path):
    with pytest.raises(DataError, match="z_score has no effect before r3"):
        Scoring([exact()], [ZScore(), R3(encoder=str(tmp_path))])
    says = r"^prompt \w+: log_sigmoid_centered has a value of other"
    with Scoring([exact()], [LogSigmoidCentered(value={"other": 1.0})]) as scoring, pytest.raises(RunError, match=says):
        scoring(colours(1))


def test_an_encoder_s_transform(tmp_path: Path):
    """R3 takes the place of all scores; it reads the prompt and the responses."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaModel

    from tests.equivalence.worlds import save_model

    save_model(tmp_path / "lm")
    shape = {"vocab_size": 258, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    LlamaModel(LlamaConfig(**shape, num_attention_heads=1)).save_pretrained(tmp_path / "encoder")  # type: ignore[arg-type]
    AutoTokenizer.from_pretrained(tmp_path / "lm").save_pretrained(tmp_path / "encoder")
    with Scoring([exact(7.0)], [R3(encoder=str(tmp_path / "encoder"), normalize=True)]) as scoring:
        (found,) = scoring(colours(1))
    assert all(each.score is not None and each.score < 0.05 for each in found), "of one word each"
    assert found[0].scores == {"exact": 1.0}


# ---- the file ----


def test_a_file_of_scores(tmp_path: Path):
    said: list[str] = []
    samples = write_samples(tmp_path / "samples.jsonl", colours(3))
    output = tmp_path / "new" / "scores.jsonl"
    report = score_file(samples, output, [exact(2.0), lengths(0.0, unknown="green")], [], said.append)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    group = next(iter(read(samples)))
    assert lines[1] == {
        "prompt_id": group.prompt_id,
        "sample": 1,
        "text_key": group.samples[1].text_key,
        "answer": "green",
        "scores": {"exact": 0.0, "lengths": None},
        "score": 0.0,
        "settings": report.settings,
        "reasons": {"lengths": "unknown: green"},
    }
    assert lines[0]["counts"] == {"lengths": {"letters": 3}}
    assert (report.prompts, report.samples, report.combined, report.answered) == (3, 12, 12, 12)
    assert (report.scorers["exact"].mean, report.scorers["exact"].scored) == (5 / 12, 12)
    of_lengths = report.scorers["lengths"]
    assert (of_lengths.lowest, of_lengths.highest) == (3, 4)
    assert of_lengths.unscored == {"unknown": 3}
    assert of_lengths.particulars == {"unknown": "green"}
    assert of_lengths.counts == {"letters": 30}
    assert said == [
        "12 samples of 3 prompts; 12 have a score",
        "exact: 12 scored, mean 0.4167, from 0 to 1",
        "lengths: 9 scored, mean 3.333, from 3 to 4; letters 30",
        "lengths: 3 could not be scored: unknown (first: green)",
    ]
    joined = list(read_scores(output, read(samples)))
    assert [each.samples for each, _ in joined] == [each.samples for each in colours(3)]
    assert [score.score for _, scores in joined for score in scores] == [2, 0, 2, 0, 0, 0, 0, 2, 2, 0, 2, 0]


def test_scored_again_nothing_happens(tmp_path: Path):
    samples, output = write_samples(tmp_path / "samples.jsonl", colours()), tmp_path / "scores.jsonl"
    first = score_file(samples, output, [exact()], [], quiet)
    before, said = output.read_bytes(), []
    assert score_file(samples, output, [exact()], [], said.append) == first
    assert output.read_bytes() == before
    assert said[0] == "3 of 3 prompts are scored already"
    write_samples(samples, colours(5)[3:])
    assert score_file(samples, output, [exact()], [], quiet).prompts == 5
    assert output.read_bytes().startswith(before)


@pytest.mark.slow
@given(cut=st.floats(0, 1))
def test_wherever_a_kill_cuts_the_file_it_ends_the_same(cut: float, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("cut")
    samples, output = write_samples(folder / "samples.jsonl", colours(4)), folder / "scores.jsonl"
    entries = [exact(), lengths(unknown="green")]
    report = score_file(samples, output, entries, [ZScore()], quiet)
    whole = output.read_bytes()
    output.write_bytes(whole[: int(cut * len(whole))])
    assert score_file(samples, output, entries, [ZScore()], quiet) == report
    assert output.read_bytes() == whole


SLOW = """
import time

def slow(prompt, text, columns):
    time.sleep(0.004)
    return len(text)
"""
COMMAND = """
import sys
from pathlib import Path
from align.scores import score_file
from align.typed import Entry
from align.verifiers import Python

entry = Entry(name="python", built=Python(function=sys.argv[3]))
score_file(Path(sys.argv[1]), Path(sys.argv[2]), [entry], [], print)
"""


@pytest.mark.slow
def test_a_process_that_is_killed_goes_on(tmp_path: Path):
    (tmp_path / "slow.py").write_text(SLOW)
    groups = [chat(f"{i}?", ["a" * (1 + j) for j in range(16)]) for i in range(60)]
    samples, output = write_samples(tmp_path / "samples.jsonl", groups), tmp_path / "scores.jsonl"
    command = [sys.executable, "-c", COMMAND, str(samples), str(output), f"{tmp_path / 'slow.py'}:slow"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    running = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (output.exists() and output.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    begun = output.read_bytes()
    assert 0 < begun.count(b"\n") < 60 * 16
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert f"{begun.count(chr(10).encode()) // 16} of 60 prompts are scored already" in done.stdout
    assert output.read_bytes().startswith(begun)
    numbers = [json.loads(line)["score"] for line in output.read_text().splitlines()]
    assert numbers == [1 + j for _ in range(60) for j in range(16)]


def test_two_processes_do_not_write_one_file(tmp_path: Path):
    samples, output = write_samples(tmp_path / "samples.jsonl", colours()), tmp_path / "scores.jsonl"
    from align.scores import _alone

    with _alone(output), pytest.raises(RunError, match=r"another process is writing .*scores.jsonl; wait for it"):
        score_file(samples, output, [exact()], [], quiet)
    assert score_file(samples, output, [exact()], [], quiet).combined == 12


def test_blocks_hold_whole_prompts(tmp_path: Path):
    seen: list[int] = []

    @dataclass(frozen=True)
    class Counting(Lengths):
        def __call__(self, groups: Sequence[Group]) -> list[Scored]:
            seen.append(len(groups))
            return Lengths()(groups)

    number = BLOCK // 4 + 3
    samples = write_samples(tmp_path / "samples.jsonl", colours(number))
    score_file(samples, tmp_path / "scores.jsonl", [Entry(name="lengths", built=Counting())], [], quiet)
    assert seen == [BLOCK // 4, 3]


@pytest.mark.parametrize(
    "other",
    [
        ([exact(2.0)], []),
        ([exact(case=False)], []),
        ([exact(), exact()], []),
        ([Entry(name="regex", built=Regex(pattern="(.*)", column="answer"))], []),
        ([exact()], [ZScore()]),
    ],
)
def test_a_file_of_other_settings_is_refused(other: Any, tmp_path: Path):
    samples, output = write_samples(tmp_path / "samples.jsonl", colours()), tmp_path / "scores.jsonl"
    score_file(samples, output, [exact()], [], quiet)
    before = output.read_bytes()
    with pytest.raises(RunError, match=r"line 1: made with other scorers, weights or reward_transforms; give another"):
        score_file(samples, output, other[0], other[1], quiet)
    assert output.read_bytes() == before


def test_keys_that_no_score_depends_on_are_no_other_settings():
    from align.judges import Judge

    def settings(**keys: Any) -> str:
        judge = Judge(**{"model": "j", "base_url": "http://localhost/v1", **keys})
        with Scoring([Entry(name="judge", built=judge)]) as scoring:
            return scoring.settings

    assert settings() == settings(timeout=3.0, concurrency=1, attempts=2, requests_per_minute=5.0)
    assert len({settings(), settings(temperature=1.0), settings(rubric="x"), settings(policy="strict")}) == 4


def edited(path: Path, number: int, **values: Any) -> None:
    """Changes a line."""
    lines = path.read_text().splitlines(keepends=True)
    lines[number - 1] = json.dumps(json.loads(lines[number - 1]) | values) + "\n"
    path.write_text("".join(lines))


def without_line(path: Path, number: int) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: number - 1] + lines[number:]))


DAMAGES = {
    "missing in the middle": (
        lambda path: without_line(path, 6),
        r"line 6: scores of sample 2 .* stand where those of",
    ),
    "missing at the end": (lambda path: without_line(path, 12), r"scores.jsonl ends before line 12, where sample 3"),
    "one too many": (
        lambda path: path.write_text(path.read_text() * 2),
        r"line 13: there are only 12 samples",
    ),
    "another text": (lambda path: edited(path, 5, text_key="0" * 16), r"line 5: sample 0 .* had another text"),
    "another prompt": (lambda path: edited(path, 5, prompt_id="0" * 32), r"line 5: scores of sample 0 of prompt 0000"),
    "other settings": (lambda path: edited(path, 7, settings="0" * 16), r"line 7: made with other scorers"),
    "no number": (
        lambda path: edited(path, 2, score=float("nan")),
        r"line 2: no scores of a sample \(a score is not f",
    ),
    "text for a number": (lambda path: edited(path, 2, score="1"), r"line 2: no scores of a sample"),
    "unknown key": (lambda path: edited(path, 2, what=1), r"line 2: no scores of a sample \(got an unexpected keyword"),
    "no JSON": (lambda path: path.write_text("{}\n" + path.read_text()), r"line 1: no scores of a sample \(missing"),
    "a list": (lambda path: path.write_text("[]\n" + path.read_text()), r"line 1: no scores of a sample"),
    "bytes": (lambda path: path.write_bytes(b"\xff\xfe\n" + path.read_bytes()), r"line 1: no scores of a sample"),
    "a blank line": (lambda path: path.write_text("\n" + path.read_text()), r"line 1: no scores of a sample"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_not_these_samples_is_refused(damage: str, tmp_path: Path):
    samples, output = write_samples(tmp_path / "samples.jsonl", colours()), tmp_path / "scores.jsonl"
    score_file(samples, output, [exact()], [], quiet)
    change, says = DAMAGES[damage]
    change(output)
    damaged = output.read_bytes()
    with pytest.raises(RunError, match=says) as error:
        list(read_scores(output, read(samples)))
    assert "\n" not in str(error.value)
    if damage == "missing at the end":  # what a kill leaves too
        assert score_file(samples, output, [exact()], [], quiet).combined == 12
        return
    with pytest.raises(RunError, match=r"line \d+: .*(give another output, or remove the file|align.scores wrote)$"):
        score_file(samples, output, [exact()], [], quiet)
    assert output.read_bytes() == damaged, "nothing is changed"


def test_files_that_are_not_there(tmp_path: Path):
    with pytest.raises(RunError, match=r"there is no file of scores .*; python -m align.scores makes one"):
        list(read_scores(tmp_path / "no.jsonl", colours()))
    with pytest.raises(RunError, match="there is no file of samples"):
        score_file(tmp_path / "no.jsonl", tmp_path / "scores.jsonl", [exact()], [], quiet)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(RunError, match="holds no samples"):
        score_file(tmp_path / "empty.jsonl", tmp_path / "scores.jsonl", [exact()], [], quiet)
    samples = write_samples(tmp_path / "samples.jsonl", colours())
    before = samples.read_bytes()
    with pytest.raises(RunError, match="holds the samples; give another output"):
        score_file(samples, samples, [exact()], [], quiet)
    assert samples.read_bytes() == before


def test_a_place_that_can_t_be_written(tmp_path: Path):
    samples = write_samples(tmp_path / "samples.jsonl", colours())
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"run the same command again, or give another output$"):
        score_file(samples, tmp_path / "file" / "scores.jsonl", [exact()], [], quiet)


def test_half_a_pair_of_surrogates_is_written_and_read(tmp_path: Path):
    """A model's bytes are not always text."""
    samples = write_samples(tmp_path / "samples.jsonl", [chat("?", ["Ω 𝔸"], {"answer": "Ω 𝔸"})])
    entry = Entry(name="python", built=Python(function="tests.align.calls:surrogate"))
    score_file(samples, tmp_path / "scores.jsonl", [exact(), entry], [], quiet)
    ((_, (found,)),) = read_scores(tmp_path / "scores.jsonl", read(samples))
    assert found.answer == "Ω 𝔸"
    assert found.reasons == {"python": "raised ValueError: \ud800"}


# ---- everything together ----


def test_the_embedded_world_and_a_judge_that_goes_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What was judged before the endpoint went down is neither lost nor asked again."""
    from align import completions
    from align.judges import Judge

    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(completions, "FIRST_WAIT", 0.01)
    asked = problems("held_out", 4, seed=5)
    groups = [chat(problem.question, drawn) for problem, drawn in zip(asked, candidates(asked, 4), strict=True)]
    samples, output = write_samples(tmp_path / "samples.jsonl", groups), tmp_path / "scores.jsonl"

    with JudgeServer() as server:
        judge = Judge(model="j", base_url=server.base_url, attempts=2, concurrency=1, opponents=1)
        entries = [
            Entry(name="world_answer", built=WorldAnswer()),
            Entry(name="gold", built=Gold(), weight=0.0),
            Entry(name="judge", built=judge, weight=0.5),
        ]
        original = server.answer

        def failing(body: dict[str, Any]) -> str | None:
            if len(server.bodies) == 7:
                server.faults += [500, 500]
            return original(body)

        server.answer = failing
        with pytest.raises(RunError, match="does not answer after 2 attempts"):
            score_file(samples, output, entries, [], quiet)
        asked_before = len(server.bodies) - 2
        server.answer = original
        report = score_file(samples, output, entries, [], quiet)
        questions = len(server.bodies) - 2
        assert asked_before == 7
        assert report.scorers["judge"].counts["games"] >= questions
        assert len({json.dumps(body, sort_keys=True) for body in server.bodies}) == questions, "nothing twice"
        said: list[str] = []
        assert score_file(samples, output, entries, [], said.append) == report
        assert len(server.bodies) == questions + 2
    assert any(line.startswith("judge: 16 scored") and "position consistency 100.0%" in line for line in said)
    for _, scores in read_scores(output, read(samples)):
        for each in scores:
            assert each.scores["judge"] is not None
            assert each.score == pytest.approx((each.scores["world_answer"] or 0) + 0.5 * each.scores["judge"])


@pytest.mark.slow
def test_scoring_leaves_no_process_behind(tmp_path: Path):
    from align.verifiers import Math

    groups = [chat("3 + 4?", ["The answer is 7.", "The answer is 8."], {"answer": 7})]
    math = Math(processes=1)
    samples = write_samples(tmp_path / "samples.jsonl", groups)
    report = score_file(samples, tmp_path / "scores.jsonl", [Entry(name="math", built=math)], [], quiet)
    assert report.scorers["math"].mean == 0.5
    assert "_pool" not in vars(math)
    assert multiprocessing.active_children() == []
