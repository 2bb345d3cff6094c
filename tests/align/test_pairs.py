"""Datasets of scored samples: nothing is dropped without being counted, and training reads what is written."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from align.errors import RecipeError
from align.pairs import SCHEMA, PairsSection, against, main, make_rows
from align.samples import Group
from align.score_lines import SampleScore, append
from align.settings import read_settings
from data.errors import DataError
from data.sources import Source, load_rows
from tests.align.sampled import chat, group, write_samples

FIVE = ["best", "good", "bad", "best", "worst"]
SCORES = (0.9, 0.7, 0.2, 0.9, 0.1)


def scored(one: Group, scores: Sequence[float | None], **several: Sequence[float]) -> tuple[Group, list[SampleScore]]:
    names = several or {"gold": scores}
    return one, [
        SampleScore(
            prompt_id=sample.prompt_id,
            sample=sample.index,
            text_key=sample.text_key,
            answer=None,
            scores={name: values[i] for name, values in names.items()},
            score=scores[i],
            settings="s",
        )
        for i, sample in enumerate(one.samples)
    ]


def made(*pairs: Any, **keys: Any) -> Any:
    return make_rows(pairs, PairsSection(samples="samples.jsonl", scores="s", output="o", **keys))


def test_lists_are_best_first_without_repetitions():
    found = made(scored(chat("Q?", FIVE, {"answer": 12}), SCORES))
    (row,) = found.rows
    assert row["prompt"] == [{"role": "user", "content": "Q?"}]
    assert [(each["text"], each["score"]) for each in row["responses"]] == [
        ("best", 0.9), ("good", 0.7), ("bad", 0.2), ("worst", 0.1),
    ]  # fmt: skip
    assert row["answer"] == 12
    assert found.counts == {"prompts": 1, "samples": 5, "repeated": 1, "prompts_left_out": 0}


def test_every_scorer_s_score_is_kept():
    (row,) = made(scored(chat("Q?", ["a", "b"]), (1.5, 0.5), right=(1.0, 0.0), short=(0.5, 0.5))).rows
    assert [each["scorers"] for each in row["responses"]] == [
        {"right": 1.0, "short": 0.5},
        {"right": 0.0, "short": 0.5},
    ]


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"kind": "pairs"}, [("best", "worst", None)]),
        ({"kind": "pairs", "margin": 0.85}, []),
        (
            {"kind": "pairs", "rule": "margin", "margin": 0.5},
            [(better, worse, None) for better in ("best", "good") for worse in ("bad", "worst")],
        ),
        ({"kind": "triples"}, [("good", "worst", "best")]),
        ({"kind": "pairs", "max_length_ratio": 1.2}, [("best", "good", None)]),
    ],
    ids=str,
)  # fmt: skip
def test_pairs_and_triples(keys: dict[str, Any], wanted: list[tuple[str, str, str | None]]):
    if not wanted:
        with pytest.raises(DataError, match=r"scores differ by less than data\.margin"):
            made(scored(chat("Q?", FIVE), SCORES), **keys)
        return
    rows = made(scored(chat("Q?", FIVE), SCORES), **keys).rows
    said = [
        tuple(row[leg][0]["content"] if leg in row else None for leg in ("chosen", "rejected", "gold")) for row in rows
    ]
    assert said == wanted
    assert rows[0]["score_chosen"] > rows[0]["score_rejected"]


def test_thumbs_up_and_down():
    rows = made(scored(group("Q: ", FIVE), SCORES), kind="labels", rule="threshold", threshold=0.7).rows
    assert [(row["completion"], row["label"]) for row in rows] == [
        ("best", True), ("good", True), ("bad", False), ("worst", False),
    ]  # fmt: skip


def test_gold_from_a_column():
    (row,) = made(scored(chat("Q?", FIVE, {"worked": "4."}), SCORES), kind="triples", gold_column="worked").rows
    assert (row["gold"][0]["content"], row["chosen"][0]["content"]) == ("4.", "best")
    with pytest.raises(DataError, match="has no text in the column 'solution'"):
        made(scored(chat("Q?", FIVE), SCORES), kind="triples", gold_column="solution")


def test_what_can_t_be_used_is_counted():
    unfinished = chat("A?", ["one", "two", "three"], finish_reasons=["stop", "length", "stop"])
    found = made(
        scored(unfinished, (0.3, 0.9, 0.1)),
        scored(chat("B?", ["x", "y", " "]), (None, 0.5, 0.4)),
        scored(chat("C?", ["x", "y"]), (None, None)),
        kind="pairs",
    )
    assert [row["chosen"][0]["content"] for row in found.rows] == ["one"]
    assert found.counts == {
        "prompts": 3, "samples": 8, "unfinished": 1, "without_score": 4, "prompts_left_out": 2
    }  # fmt: skip
    assert found.reasons == {"no usable response": 1, "fewer than two responses with scores": 1}
    kept = made(scored(unfinished, (0.3, 0.9, 0.1)), kind="pairs", keep_unfinished=True)
    assert kept.rows[0]["chosen"][0]["content"] == "two"


def test_ties_make_no_pair():
    with pytest.raises(DataError, match=r"all scores are 0\.5"):
        made(scored(chat("A?", ["x", "y"]), (0.5, 0.5)), kind="pairs")
    found = made(scored(chat("A?", ["x", "y"]), (0.5, 0.5)), scored(chat("B?", ["x", "y"]), (0.5, 0.4)), kind="pairs")
    assert found.reasons == {"all responses have the same score": 1}


@pytest.mark.parametrize("kind", ["scored", "pairs", "triples", "labels"])
@pytest.mark.parametrize("prompt", ["text", "messages"])
def test_training_reads_what_is_written(tmp_path: Path, kind: str, prompt: str, capsys: pytest.CaptureFixture[str]):
    ask = group if prompt == "text" else chat
    pairs = [scored(ask(f"Q{i}", FIVE), SCORES) for i in range(4)]
    write_samples(tmp_path / "samples.jsonl", [one for one, _ in pairs])
    append(tmp_path / "scores.jsonl", [each for _, scores in pairs for each in scores])
    words = [f"--{key}={tmp_path / key}.jsonl" for key in ("samples", "scores", "output")]
    more = ["--rule=threshold", "--threshold=0.5"] if kind == "labels" else []
    assert main([*words, f"--kind={kind}", *more]) == 0
    assert "of 4 prompts with 20 samples" in capsys.readouterr().out
    loaded = load_rows(Source(dataset_name=str(tmp_path / "output.jsonl")))
    assert loaded.problems == []
    assert loaded.format == {"scored": "scored", "labels": "unpaired"}.get(kind, "paired")
    assert len(loaded.rows) == (16 if kind == "labels" else 4)
    if kind == "triples":
        assert loaded.rows[0].responses.keys() == {"chosen", "rejected", "gold"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--kind=scored", "--margin=0.3"], "margin has no effect with kind scored: a recipe's data.margin decides"),
        (["--kind=labels"], "kind labels needs rule threshold"),
        (["--kind=pairs", "--gold_column=g"], "gold_column has no effect with kind pairs"),
        (["--kind=pair"], "pairs.kind must be one of scored, pairs, triples, labels"),
        (["--rull=margin"], "unknown key --rull; did you mean 'rule'"),
    ],
    ids=str,
)
def test_settings_that_can_t_be_meant(words: list[str], says: str):
    with pytest.raises(RecipeError, match=says):
        read_settings(None, ["--samples=a", "--scores=b", "--output=c", *words], SCHEMA)


def test_samples_against_an_opponent_s():
    policy = scored(chat("A?", ["p1", "p2", "p3"]), (0.9, 0.2, 0.5)), scored(chat("B?", ["q"]), (1.0,))
    other = scored(chat("B?", ["q"]), (0.0,)), scored(chat("A?", ["r1", "r2", "r3"]), (0.1, 0.7, 0.5))
    keys = {"samples": "s", "scores": "s", "output": "o", "opponent": "t", "opponent_scores": "u"}
    found = against(policy, other, PairsSection(**keys, kind="xpo"))
    said = [(row["chosen"][0]["content"], row["rejected"][0]["content"], row["chosen_by"]) for row in found.rows]
    assert said == [("p1", "r1", "policy"), ("r2", "p2", "reference")]
    assert found.reasons == {"equal scores or texts": 1}
    nash = against(policy, other, PairsSection(**keys, kind="nash_md"))
    wanted = [1 / (1 + math.exp(-0.8)), 1 / (1 + math.exp(0.5)), 0.5, 1 / (1 + math.exp(-1.0))]
    assert [row["preference"] for row in nash.rows] == pytest.approx(wanted, abs=1e-12)
    assert [row["completion"][0]["content"] for row in nash.rows] == ["p1", "p2", "p3", "q"]
    with pytest.raises(RecipeError, match="kinds xpo and nash_md need opponent and opponent_scores"):
        read_settings(None, ["--samples=a", "--scores=b", "--output=c", "--kind=xpo"], SCHEMA)


def test_repetitions_count_against_an_opponent():
    """Rows stand for draws: what the policy says seven times in eight weighs as much."""
    policy = (scored(chat("A?", ["p", "p", "p", "q"]), (0.9, 0.9, 0.9, 0.2)),)
    other = (scored(chat("A?", ["r", "r", "s"]), (0.5, 0.5, None)),)
    keys = {"samples": "s", "scores": "s", "output": "o", "opponent": "t", "opponent_scores": "u"}
    found = against(policy, other, PairsSection(**keys, kind="nash_md"))
    assert [row["completion"][0]["content"] for row in found.rows] == ["p", "p"]
    assert found.counts["opponent_without_score"] == 1
    assert found.counts["unpaired"] == 2


def test_scores_of_other_samples_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one, scores = scored(chat("Q", FIVE), SCORES)
    write_samples(tmp_path / "samples.jsonl", [chat("Q", [*FIVE[:-1], "other"])])
    append(tmp_path / "scores.jsonl", scores)
    words = [f"--{key}={tmp_path / key}.jsonl" for key in ("samples", "scores", "output")]
    assert main(words) == 2
    assert "scores.jsonl, line 5" in capsys.readouterr().err
    assert not (tmp_path / "output.jsonl").exists()
    assert json.dumps(one.samples[0].text)
