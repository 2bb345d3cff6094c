"""Answers: the strategy's, on stored samples and end to end; QAlign on a real engine's interface."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

from align.answer import STRATEGIES, main, read_answer, run
from align.errors import RecipeError
from align.score_lines import append
from align.selection import SELECTIONS
from data.worlds import POLICY, problems
from tests.align.sampled import chat, write_samples
from tests.align.test_pairs import scored
from tests.align.test_sample import write

TEN = [7, 12, 7, 9, 12, 7, 5, 9, 12, 7]
REWARDS = (0.2, 0.9, 0.3, 2.5, 0.8, 0.1, 1.9, -1.0, 0.7, 0.4)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """The ten samples of the specification's example, and a prompt with nothing usable."""
    groups = [scored(chat("Q?", [f"{a} (sample {i})" for i, a in enumerate(TEN)]), REWARDS)]
    groups.append(scored(chat("R?", ["a", "b"]), (None, None)))
    lines = [each for _, scores in groups for each in scores]
    answers = [*map(str, TEN), None, None]
    write_samples(tmp_path / "samples.jsonl", [one for one, _ in groups])
    from dataclasses import replace

    append(tmp_path / "scores.jsonl", [replace(line, answer=a) for line, a in zip(lines, answers, strict=True)])
    return tmp_path


def answers(folder: Path, *words: str) -> list[dict[str, Any]]:
    files = [f"--{key}={folder / key}.jsonl" for key in ("samples", "scores", "output")]
    assert main([*files, *words]) == 0
    return [json.loads(line) for line in (folder / "output.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--strategy=best_of_majority", "--alpha=0", "--k=2"], ["5", "12"]),
        (["--strategy=best_of_majority", "--alpha=0.15", "--k=2"], ["12", "9"]),
        (["--strategy=best_of_majority", "--alpha=0.25", "--k=2"], ["12", "7"]),
        (["--strategy=best_of_majority", "--alpha=0.5", "--k=2"], ["7"]),
        (["--strategy={name: best_of_majority, alpha: 0.15, k: 2, aggregation: max}"], ["9", "12"]),
        (["--strategy=best_of_n"], ["9"]),
        (["--strategy=majority"], ["7"]),
        (["--strategy=weighted_majority"], ["9"]),
        (["--strategy=best_of_n_answers"], ["5"]),
    ],
    ids=str,
)
def test_the_specification_s_example(stored: Path, words: list[str], wanted: list[str], capsys):
    first, second = answers(stored, *words)
    assert [pick["answer"] for pick in first["picks"]] == wanted
    assert all(pick["text"].startswith(f"{pick['answer']} ") for pick in first["picks"])
    best = max((r, i) for r, i, a in zip(REWARDS, range(10), TEN, strict=True) if str(a) == wanted[0])[1]
    assert first["picks"][0]["sample"] == best
    assert second["picks"] == []
    said = capsys.readouterr().out
    assert "1 of 2 prompts answered" in said
    assert first["fallback_used"] == ("--alpha=0.5" in words)
    assert ("1 where no answer was frequent enough" in said) == ("--alpha=0.5" in words)


@pytest.mark.slow
def test_every_selection_is_a_strategy(stored: Path):
    assert set(STRATEGIES.names()) == {*SELECTIONS.names(), "qalign"}
    for name in SELECTIONS.names():
        first, _ = answers(stored, f"--strategy={name}")
        assert first["strategy"]["name"] == name
        assert len(first["picks"]) == 1


def test_without_answers_every_response_is_its_own(tmp_path: Path, capsys):
    one, scores = scored(chat("Q?", ["long", "longer", "long"]), (0.1, 0.7, 0.3))
    write_samples(tmp_path / "samples.jsonl", [one])
    append(tmp_path / "scores.jsonl", scores)
    (found,) = answers(tmp_path, "--strategy=best_of_n")
    assert (found["picks"][0]["text"], found["picks"][0]["answer"]) == ("longer", None)
    files = [f"--{key}={tmp_path / key}.jsonl" for key in ("samples", "scores", "output")]
    assert main([*files, "--strategy=majority"]) == 2
    assert "majority counts equal answers, and no scorer finds answers" in capsys.readouterr().err


@pytest.mark.slow
def test_answers_that_are_written_differently_vote_together(tmp_path: Path):
    from dataclasses import replace

    one, scores = scored(chat("Q?", ["a", "b", "c", "d", "e"]), (1, 1, 1, 1, 1))
    found = ["1/2", "0.5", "3", "3", "\\frac{1}{2}"]
    write_samples(tmp_path / "samples.jsonl", [one])
    append(tmp_path / "scores.jsonl", [replace(line, answer=a) for line, a in zip(scores, found, strict=True)])
    (plain,) = answers(tmp_path, "--strategy=majority")
    assert plain["picks"][0]["answer"] == "3"
    (together,) = answers(tmp_path, "--strategy=majority", "--scorers={name: math, column: null}")
    assert (together["picks"][0]["answer"], together["picks"][0]["count"]) == ("1/2", 3)


# ---- end to end ----


def world(folder: Path, number: int = 10) -> list[str]:
    asked = problems("held_out", number, seed=1)
    write(folder / "prompts.jsonl", [{"prompt": [{"role": "user", "content": p.question}]} for p in asked])
    return [
        f"--model_name_or_path={POLICY}",
        f"--dataset_name={folder / 'prompts.jsonl'}",
        "--engine=transformers",
        "--max_tokens=48",
        f"--output={folder / 'answers.jsonl'}",
    ]


@pytest.mark.slow
def test_samples_scores_and_chooses(tmp_path: Path):
    words = [*world(tmp_path), "--n=8", "--scorers=gold"]
    assert main([*words, "--strategy=best_of_n"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    asked = problems("held_out", 10, seed=1)
    right = [line["picks"][0]["answer"] == str(p.answer) for line, p in zip(lines, asked, strict=True) if line["picks"]]
    assert sum(right) >= 8  # by the gold score, the best of eight is right where one of them is
    drawn = (tmp_path / "answers.samples.jsonl").stat().st_mtime_ns
    assert main([*words, "--strategy=majority"]) == 0
    assert (tmp_path / "answers.samples.jsonl").stat().st_mtime_ns == drawn, "another strategy samples nothing anew"


@pytest.mark.slow
def test_qalign_leans_to_what_scores(tmp_path: Path):
    words = [*world(tmp_path), "--scorers=world_answer", "--seed=4"]
    share = {}
    for beta in (100.0, 0.2):
        assert main([*words, "--strategy=qalign", "--steps=24", f"--strategy.beta={beta}"]) == 0
        lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
        assert {line["samples"] for line in lines} == {25}
        share[beta] = np.mean(
            [sum(pick["mean_reward"] * pick["count"] for pick in line["picks"]) / 25 for line in lines]
        )
    assert share[0.2] > share[100.0] + 0.15


@pytest.mark.slow
def test_a_response_without_a_score_ends_no_chain(tmp_path: Path, capsys):
    """Its state is left as soon as possible, and counted."""
    (tmp_path / "mine.py").write_text(
        "def score(text, **_):\n    return None if 'answer is 1' in text else float('answer' in text)\n"
    )
    scorers = "[{name: world_answer, weight: 0.0}, {name: python, function: " + str(tmp_path / "mine.py") + ":score}]"
    assert main([*world(tmp_path), f"--scorers={scorers}", "--strategy=qalign", "--steps=8"]) == 0
    assert "responses have no score" in capsys.readouterr().out


@pytest.mark.slow
def test_qalign_at_high_beta_is_plain_sampling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing is rejected but for lengths, so states are draws from the model: their answers are distributed alike."""
    words = world(tmp_path, 1)
    chain = [*words, "--scorers=world_answer", "--strategy=qalign", "--strategy.beta=1e6"]
    found = read_answer(None, [*chain, "--steps=16", "--chains=40", "--burn_in=8", "--final=vote"])
    counts: Counter[str] = Counter()
    from align import chains

    original = chains._Run._answer

    def spy(self: Any, number: int, made: Any, how: Any) -> Any:
        for each in made:  # one state of each chain: states of a chain depend on each other
            counts[str(self.known[number, each.states[-1]].answer)] += 1
        return original(self, number, made, how)

    monkeypatch.setattr(chains._Run, "_answer", spy)
    run(found, say=lambda line: None)
    assert main([*words, "--n=400", "--scorers=world_answer", "--strategy=majority"]) == 0
    lines = (tmp_path / "answers.scores.jsonl").read_text().splitlines()
    plain = Counter(str(json.loads(line)["answer"]) for line in lines)
    common = [answer for answer, number in plain.items() if number >= 40]
    rest = sum(plain.values()) - sum(plain[a] for a in common)
    wanted = np.array([*(plain[a] for a in common), rest], dtype=float) + 1e-9
    seen = np.array([*(counts[a] for a in common), 40 - sum(counts[a] for a in common)], dtype=float)
    assert chisquare(seen, wanted / wanted.sum() * 40).pvalue > 0.001


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--strategy=majority", "--samples=x"], "samples and scores go together"),
        (
            ["--strategy=majority", "--samples=x", "--scores=y", "--n=4"],
            "section sampling has no effect on stored samples",
        ),
        ([], "there is no 'strategy' section"),
        (["--strategy=majority"], "there is no 'model' section"),
        (["--strategy=best_of_n", "--beta=1"], "unknown key --beta"),
    ],
    ids=str,
)
def test_settings_that_can_t_be_meant(words: list[str], says: str):
    with pytest.raises(RecipeError, match=says):
        read_answer(None, ["--answer.output=a", *words])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--strategy=best"], "unknown strategy 'best'"),
        (["--strategy=best_of_majority", "--alpha=2"], r"strategy\.alpha must be in"),
        (["--strategy=best_of_majority", "--k=0"], r"strategy\.k must be >= 1"),
        (["--strategy=qalign", "--steps=0"], r"strategy\.steps must be >= 1"),
        (["--strategy=self_consistency"], "it is called 'majority' here"),
    ],
    ids=str,
)
def test_strategies_that_can_t_be_meant(words: list[str], says: str):
    with pytest.raises(RecipeError, match=says):
        read_answer(None, ["--answer.output=a", "--model_name_or_path=m", "--dataset_name=d", *words])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--strategy=qalign", "--top_p=0.9"], "qalign needs plain sampling"),
        (["--strategy=qalign", "--temperature=0"], "qalign needs plain sampling"),
        (["--strategy=qalign", "--reward_transforms=z_score"], "qalign looks at one"),
        (["--strategy=qalign", "--engine=vllm", "--data_parallel_size=2"], "has no effect with strategy qalign"),
        (["--strategy=qalign", "--max_tokens=900"], "no prompt leaves room for sampling.max_tokens 900"),
        (
            ["--strategy={name: weighted_majority, weights: reward}", "--scorers={name: gold, weight: -1}"],
            "needs rewards >= 0",
        ),
    ],
    ids=str,
)
def test_what_can_t_be_answered_is_one_sentence(tmp_path: Path, words: list[str], says: str, capsys):
    assert main([*world(tmp_path, 2), "--scorers=gold", "--n=1", *words]) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert main([*world(tmp_path, 2), "--strategy=majority"]) == 2
    assert "there is no 'scorers' section" in capsys.readouterr().err
