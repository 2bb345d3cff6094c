"""From scored rows to pairs with transformed scores: what is read, what changes, what is refused; groups of rows."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.assemble import data_spec, tell_data
from align.recipe import read_recipe
from data import rescoring
from data.encoders import Encoder
from data.errors import DataError
from data.formats import FORMATS, RowProblem, recognise, to_row
from data.preparation import prepare, read_sources
from data.rescoring import rescored
from data.sources import LoadedRows, Source, load_rows
from objectives import Candidate, Row
from objectives.reward_transforms import R3, Clip, LengthPenalty, LogSigmoidCentered, ZScore
from tests.align.test_density import save_encoder
from tests.data.byte_level import byte_level
from tests.data.preparing import a_spec


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))


def write(path: Path, rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def listed(*rewards: tuple[float, float], number: int = 0) -> dict[str, Any]:
    return {
        "prompt": f"{number}?",
        "responses": [
            {"text": f" {i}", "scores": {"helpful": helpful, "harmless": harmless}}
            for i, (helpful, harmless) in enumerate(rewards)
        ],
    }


BOTH = [listed((6, -3), (1, 1), (-1, 2), number=i) for i in range(8)]
"""By the sum of rewards the first response is best; in both respects the second one is good."""
PLAIN = [
    {"prompt": f"{i}?", "responses": [{"text": " yes" * 9, "score": 1.0}, {"text": " yes", "score": 0.9}]}
    for i in range(8)
]
PAIRS = [{"prompt": f"{i}?", "chosen": " a", "rejected": " b"} for i in range(8)]


def refused(spec: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_sources(spec)
    said = str(caught.value)
    assert "\n" not in said
    return said


def pairs_of(spec: Any) -> set[tuple[str, str]]:
    rows = read_sources(spec)
    return {(str(r.responses["chosen"]), str(r.responses["rejected"])) for r in (*rows.train, *rows.held)}


# ---- several rewards in the data ----


def read(raw: dict[str, Any]) -> Row | RowProblem:
    return to_row(raw, recognise([raw], where="d"), source="d", index=0)


def test_rewards_by_name_add_up_to_a_score():
    row = read(listed((0.1, 0.2), (1, 1)))
    assert isinstance(row, Row)
    assert [(each.text, each.score) for each in row.candidates] == [(" 1", 2.0), (" 0", math.fsum((0.1, 0.2)))]
    assert row.candidates[0].rewards == {"helpful": 1.0, "harmless": 1.0}


def test_a_score_of_its_own_comes_before_the_sum():
    raw = {"prompt": "q", "responses": [{"text": "a", "score": 5, "scores": {"helpful": "1.5"}}]}
    row = read(raw)
    assert isinstance(row, Row)
    assert row.candidates == (Candidate(text="a", score=5.0, rewards={"helpful": 1.5}),)


def test_rewards_that_only_other_rows_have_are_none():
    """Arrow fills the keys of all rows with None, and a score that some have too."""
    raw = {"prompt": "q", "responses": [{"text": "a", "score": None, "scores": {"helpful": 1.0, "style": None}}]}
    row = read(raw)
    assert isinstance(row, Row)
    assert row.candidates == (Candidate(text="a", score=1.0, rewards={"helpful": 1.0}),)
    scores_alone = {"prompt": "q", "responses": [{"text": "a", "score": 2, "scores": {"helpful": None}}]}
    row = read(scores_alone)
    assert isinstance(row, Row)
    assert row.candidates == (Candidate(text="a", score=2.0),)


def test_columns_that_mean_something_else_are_passed_over():
    row = read({"prompt": "q", "responses": [{"text": "a", "score": 2, "scores": [1, 2]}]})
    assert isinstance(row, Row)
    assert row.candidates == (Candidate(text="a", score=2.0),)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([{"text": "a", "scores": {"helpful": "much"}}], "a reward is not a finite number"),
        ([{"text": "a", "scores": {"helpful": [1]}}], "a reward is not a number"),
        ([{"text": "a", "scores": {}}], "score is not a number"),
        ([{"text": "a", "scores": {"h": 1}}, {"text": "b"}], "a response without text or score"),
        ([{"text": "a", "scores": {"h": 1}}, {"text": "b", "score": 1}], "the responses have different rewards"),
        (
            [{"text": "a", "scores": {"h": 1}}, {"text": "b", "scores": {"g": 1}}],
            "the responses have different rewards",
        ),
    ],
)
def test_bad_rewards_are_told(entries: list[dict[str, Any]], reason: str):
    row = to_row({"prompt": "q", "responses": entries}, FORMATS["scored"], source="d", index=0)
    assert isinstance(row, RowProblem)
    assert row.reason == reason


def test_rewards_survive_chat_and_parquet(tmp_path: Path):
    pandas = pytest.importorskip("pandas")
    path = tmp_path / "a.parquet"
    pandas.DataFrame(BOTH).to_parquet(path)
    (loaded,) = [load_rows(Source(dataset_name=str(path), as_chat=True))]
    assert loaded.format == "scored"
    assert loaded.rows[0].candidates[0].rewards == {"helpful": 6.0, "harmless": -3.0}
    assert loaded.rows[0].candidates[0].text == ({"role": "assistant", "content": "0"},)


# ---- which pairs are made ----


def test_transforms_run_before_the_rule(tmp_path: Path):
    spec = a_spec(write(tmp_path / "a.jsonl", BOTH))
    assert pairs_of(spec) == {(" 0", " 2")}
    good_in_both = dataclasses.replace(spec, reward_transforms=(LogSigmoidCentered(value=0.0),))
    assert pairs_of(good_in_both) == {(" 1", " 0")}
    one = next(iter(read_sources(good_in_both).train))
    assert one.scores["chosen"] == pytest.approx(2 * -math.log1p(math.exp(-1)))


def test_thresholds_and_margins_are_of_transformed_scores(tmp_path: Path):
    from data.shapes import Rule

    path = write(tmp_path / "a.jsonl", BOTH)
    spec = a_spec(path, reward_transforms=(Clip(highest=0.0),), rule=Rule(name="margin", margin=2.5))
    assert pairs_of(spec) == {(" 1", " 0")}, "−3 against 0 and −1"


def test_several_transforms_one_after_the_other(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", BOTH)
    both = (Clip(lowest=-2.0, highest=2.0), LengthPenalty(alpha=10.0))
    rows = read_sources(a_spec(path, reward_transforms=both)).train
    assert {name: rows[0].scores[name] for name in ("chosen", "rejected")} == {"chosen": -8.0, "rejected": -10.0}


def test_rows_of_other_shapes_stay_as_they_are(tmp_path: Path):
    paths = write(tmp_path / "a.jsonl", BOTH), write(tmp_path / "b.jsonl", [r | {"prompt": "p"} for r in PAIRS[:1]])
    spec = a_spec(*paths, reward_transforms=(LogSigmoidCentered(value=0.0),), eval_share=0.0)
    assert pairs_of(spec) == {(" 1", " 0"), (" a", " b")}


def test_the_evaluation_set_is_rescored_too(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", BOTH)
    held = Source(dataset_name=str(write(tmp_path / "b.jsonl", BOTH)))
    spec = a_spec(path, eval=held, reward_transforms=(LogSigmoidCentered(value=0.0),))
    assert {row.responses["chosen"] for row in read_sources(spec).held} == {" 1"}


def test_the_cache_and_the_report_know_of_them(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", BOTH)
    plain = prepare(a_spec(path), byte_level())
    spec = a_spec(path, reward_transforms=(LogSigmoidCentered(value=0.0),))
    new = prepare(spec, byte_level())
    assert new.report["dataset_hash"] != plain.report["dataset_hash"]
    assert new.report["shaped"]["reward_transforms"] == {
        "names": ["log_sigmoid_centered"],
        "rows": 8,
        "best_changed": 8,
    }
    assert "reward_transforms" not in plain.report["shaped"]
    lines: list[str] = []
    tell_data(new.report, lines.append)
    assert "  scores changed by log_sigmoid_centered: of 8 lists of responses, 8 have another best one" in lines
    scored = a_spec(path, scores=("chosen", "rejected"))
    hashes = [
        prepare(dataclasses.replace(scored, reward_transforms=(each,)), byte_level()).report["dataset_hash"]
        for each in (LogSigmoidCentered(value=0.0), LogSigmoidCentered(value=0.1))
    ]
    assert hashes[0] != hashes[1], "the same pairs with other scores"


# ---- what is refused ----


def test_rows_without_scores_are_refused(tmp_path: Path):
    said = refused(a_spec(write(tmp_path / "a.jsonl", PAIRS), reward_transforms=(ZScore(),)))
    assert "reward_transforms change the scores of several responses to a prompt, and the rows have none" in said


def test_a_transform_that_changes_no_score_is_refused(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", BOTH)
    said = refused(a_spec(path, reward_transforms=(LogSigmoidCentered(value=0.0), Clip(highest=9.0))))
    assert "reward_transforms: clip changes no score (those it gets lie between -3.04859 and -0.00247569)" in said


def test_transforms_that_change_nothing_that_is_read_are_refused(tmp_path: Path):
    """With one reward the order of responses stays, and DPO reads no scores; reward-aware objectives do."""
    path = write(tmp_path / "a.jsonl", PLAIN)
    said = refused(a_spec(path, reward_transforms=(LogSigmoidCentered(), ZScore())))
    assert "reward_transforms (log_sigmoid_centered, z_score) have no effect: the same responses are trained on" in said
    read_sources(a_spec(path, reward_transforms=(ZScore(),), scores=("chosen", "rejected")))
    read_sources(a_spec(path, reward_transforms=(LengthPenalty(alpha=0.1),)))


def test_equal_scores_may_become_different_ones(tmp_path: Path):
    """What can't be used without transforms can be with them."""
    alike = [{**row, "responses": [{**each, "score": 1.0} for each in row["responses"]]} for row in PLAIN]
    path = write(tmp_path / "a.jsonl", alike)
    assert "all scores are 1, so that no pair" in refused(a_spec(path))
    assert pairs_of(a_spec(path, reward_transforms=(LengthPenalty(alpha=0.1),))) == {(" yes", " yes" * 9)}


def test_what_an_objective_lacks_is_told_as_it_is_without_transforms(tmp_path: Path):
    """Not that transforms have no effect."""
    lists = [{**row, "responses": row["responses"][:2]} for row in BOTH]
    path = write(tmp_path / "a.jsonl", lists)
    spec = a_spec(path, reward_transforms=(LogSigmoidCentered(value=0.0),), legs=("completion",), scores=("humour",))
    assert "the objective learns the attribute 'humour', and no row has a score of it" in refused(spec)


def test_a_value_for_other_rewards_names_the_row(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", BOTH)
    said = refused(a_spec(path, reward_transforms=(LogSigmoidCentered(value={"helpful": 1.0}),)))
    assert said.startswith(f"{path}, row 0: log_sigmoid_centered has a value of helpful, and the rewards are helpful, ")


def test_scores_that_are_not_finite_name_the_row():
    class Broken:
        replaces = False

        def __call__(self, answers: Any) -> Any:
            return dataclasses.replace(answers, scores=answers.scores * np.nan)

    row = Row(prompt="p", responses={}, candidates=(Candidate(text="a", score=1.0),), source="d", index=3)
    loaded = LoadedRows(source="d", format="scored", rows=[row], problems=[])
    with pytest.raises(DataError, match="d, row 3: reward_transforms give a score that is not finite"):
        rescored([loaded], [Broken()])


# ---- encoders ----


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_encoder(tmp_path_factory.mktemp("encoder"), "bert"))


def test_relevance_is_the_encoder_s(tmp_path: Path, encoder: str):
    path = write(tmp_path / "a.jsonl", PLAIN)
    transform = R3(encoder=encoder, questions="open")
    spec = a_spec(path, reward_transforms=(transform,), scores=("chosen", "rejected"), eval_share=0.0)
    rows = read_sources(spec).train
    assert len(rows) == 8
    asked = Encoder(encoder, key="key")
    for row in rows:
        texts = [str(row.prompt), *(str(row.responses[leg]).strip() for leg in ("chosen", "rejected"))]
        asked.prefetch(texts)
        prompt, *both = asked(texts).astype(float)
        for leg, text, vector in zip(("chosen", "rejected"), texts[1:], both, strict=True):
            worth = 0.01 if text == "yes" else 0.09 / 7  # nine times the same word has seven trigrams, all alike
            assert row.scores[leg] == pytest.approx(worth * float(prompt @ vector), rel=1e-4)


def test_what_an_encoder_said_is_kept(tmp_path: Path, encoder: str, monkeypatch: pytest.MonkeyPatch):
    """Other ranks read it; with another key, or other texts, it is asked again."""
    asked: list[int] = []
    prefetch = Encoder.prefetch

    def noted(self: Encoder, texts: list[str]) -> None:
        asked.append(len(texts))
        prefetch(self, texts)

    monkeypatch.setattr(Encoder, "prefetch", noted)
    monkeypatch.setattr(rescoring, "ROWS_AT_A_TIME", 3)
    path = write(tmp_path / "a.jsonl", PLAIN)

    def scores(path: Path = path, **keys: Any) -> list[float]:
        transform = R3(encoder=encoder, **keys)
        spec = a_spec(path, reward_transforms=(transform,), scores=("chosen", "rejected"), eval_share=0.0)
        return [row.scores[leg] for row in read_sources(spec).train for leg in ("chosen", "rejected")]

    first = scores()
    assert asked == [9, 9, 6], "three texts a row, three rows at a time"
    assert scores() == first
    assert len(asked) == 3
    assert scores(most_words=5) != first
    assert len(asked) == 6
    scores(write(tmp_path / "b.jsonl", PLAIN[:4]))
    assert len(asked) == 8


def test_an_encoder_that_is_not_there_is_told_before_rows_are_read(tmp_path: Path):
    said = refused(a_spec(tmp_path / "nowhere.jsonl", reward_transforms=(R3(encoder=str(tmp_path / "nope")),)))
    assert said.startswith(f"reward_transforms: encoder '{tmp_path / 'nope'}' can't be loaded (")
    assert said.endswith("; give an encoder's Hub id or folder")


def test_what_is_replaced_has_no_effect(tmp_path: Path):
    said = refused(a_spec(tmp_path / "nowhere.jsonl", reward_transforms=(ZScore(), R3(encoder="e"))))
    assert said.startswith("reward_transforms: z_score has no effect before r3, which takes the place of all scores")


def test_closed_questions_need_a_gold_response(tmp_path: Path, encoder: str):
    path = write(tmp_path / "a.jsonl", PLAIN)
    said = refused(a_spec(path, reward_transforms=(R3(encoder=encoder, questions="closed"),)))
    assert said.startswith(f"{path}, row 0: r3 compares answers to closed questions with a gold response")
    with_gold = write(tmp_path / "b.jsonl", [row | {"gold": " no"} for row in PLAIN])
    spec = a_spec(
        with_gold, reward_transforms=(R3(encoder=encoder, questions="closed"),), scores=("chosen", "rejected")
    )
    assert read_sources(spec).train


# ---- recipes ----

KEYS = ["--model_name_or_path=m", "--dataset_name=d", "--output_dir=o", "--objective=dpo"]


def test_a_recipe_s_section_reads_back_and_arrives(tmp_path: Path):
    words = "[{name: log_sigmoid_centered, value: {helpful: 1, harmless: 0.5}}, {name: clip, lowest: -3}, z_score]"
    recipe = read_recipe(None, [*KEYS, f"--reward_transforms={words}"])
    wanted = (LogSigmoidCentered(value={"helpful": 1.0, "harmless": 0.5}), Clip(lowest=-3.0), ZScore())
    assert data_spec(recipe, 100).reward_transforms == wanted
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert read_recipe(tmp_path / "r.yaml") == recipe
    assert read_recipe(None, KEYS).resolved().keys().isdisjoint({"reward_transforms"})
    alone = read_recipe(None, [*KEYS, "--reward_transforms=length_penalty", "--alpha=0.1"])
    assert alone.reward_transforms[0].built == LengthPenalty(alpha=0.1)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--reward_transforms=z_scor"],
            "reward_transforms.name: unknown reward transform 'z_scor'; did you mean 'z_sc",
        ),
        (["--reward_transforms=lsc"], "reward_transforms.name: unknown reward transform 'lsc': it is called 'log_sigm"),
        (["--reward_transforms=length_penalty"], "reward_transforms.alpha is required"),
        (["--reward_transforms={name: clip, lowest: 2, highest: 1}"], "reward_transforms.highest must be above lowest"),
        (
            ["--reward_transforms={name: log_sigmoid_centered, value: 1, quantile: 0.5}"],
            "reward_transforms.quantile has no effect: value says what is good enough; remove it",
        ),
        (["--reward_transforms=[]"], "reward_transforms is empty"),
    ],
    ids=str,
)
def test_a_faulty_section_is_told(words: list[str], says: str):
    with pytest.raises(ValueError, match="^" + says.replace("(", r"\(")):
        read_recipe(None, [*KEYS, *words])


# ---- groups ----


@pytest.mark.parametrize(
    ("value", "group"),
    [
        ("code", "code"),
        (" two\n words ", "two words"),
        (3, "3"),
        (3.0, "3"),
        (0.25, "0.25"),
        (True, "true"),
        ("", ""),
        (None, ""),
        (math.nan, ""),
        (["a"], ""),
        ({"a": 1}, ""),
    ],
)
def test_a_column_names_groups(value: Any, group: str):
    for raw in (PAIRS[0], PLAIN[0], {"prompt": "q", "completion": "a"}):
        row = read(raw | {"group": value})
        assert isinstance(row, Row)
        assert row.group == group
    row = read(PAIRS[0])
    assert isinstance(row, Row)
    assert row.group == ""


def test_half_a_character_names_no_group():
    row = read(PAIRS[0] | {"group": "\ud800"})
    assert isinstance(row, RowProblem)
    assert row.reason == "group holds half of a character (a lone surrogate)"


def test_groups_are_mapped_and_suggested(tmp_path: Path):
    rows = [row | {"subset": f"s{i % 2}"} for i, row in enumerate(PAIRS)]
    path = write(tmp_path / "a.jsonl", rows)
    spec = a_spec(train=(Source(dataset_name=str(path), columns={"group": "subset"}),))
    prepared = prepare(spec, byte_level())
    assert set(prepared.train.groups) == {"s0", "s1"}
    odd = {"question": "q", "response": "a", "category": "x"}
    with pytest.raises(DataError, match=r"set data.columns: {prompt: question, completion: response, group: category}"):
        recognise([odd], where="d")
