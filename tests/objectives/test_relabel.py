"""Relabelers: laws for all that are registered, and reward-augmented relabelling by hand."""

from __future__ import annotations

import copy
import json
import math
import re
from collections import Counter
from dataclasses import FrozenInstanceError, asdict, fields, replace
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from objectives import RELABELERS, Candidate, LeftOut, RewardAugmented, Row
from objectives.registry import field_docs, formula, source
from tests.objectives.test_conformance import Values, configs

every_relabeler = pytest.mark.parametrize("name", RELABELERS.names())

KEYS: dict[tuple[str, str], Values] = {
    ("reward_augmented", "form"): Values(allowed=("system", "text"), refused=("prefix", "System", "")),
    ("reward_augmented", "lowest"): Values(allowed=(0.0, 1.0), refused=(math.nan, math.inf, -math.inf)),
    ("reward_augmented", "highest"): Values(allowed=(5.0, 10.0), refused=(1.0, 0.0, math.nan, math.inf, -math.inf)),
    ("reward_augmented", "decimals"): Values(allowed=(0, 2, 6), refused=(-1, 7)),
}
"""Every key of every relabeler, with what a recipe may and may not say."""


def turn(role: str, content: str, **more: Any) -> MappingProxyType[str, Any]:
    """A message that raises when it is edited."""
    return MappingProxyType({"role": role, "content": content, **more})


QUESTION, GOOD, BAD = turn("user", "Q"), (turn("assistant", "GOOD"),), (turn("assistant", "BAD"),)


def pair(**changes: Any) -> Row:
    """A question with an answer of score 9 and a worse one of score 3.5, in read-only mappings."""
    row = Row(
        prompt=(QUESTION,),
        responses=MappingProxyType({"chosen": GOOD, "rejected": BAD}),
        scores=MappingProxyType({"chosen": 9.0, "rejected": 3.5}),
        source="pairs.jsonl",
        index=7,
    )
    return replace(row, **changes)


def scored(chosen: float, rejected: float, **changes: Any) -> Row:
    return pair(scores=MappingProxyType({"chosen": chosen, "rejected": rejected}), **changes)


PLAIN = {"prompt": "Q:", "responses": MappingProxyType({"chosen": " good", "rejected": " bad"})}


def plainly(value: Any) -> Any:
    """The same in dictionaries and lists, to compare and to keep."""
    if hasattr(value, "items"):
        return {key: plainly(inner) for key, inner in value.items()}
    return [plainly(inner) for inner in value] if isinstance(value, (list, tuple)) else copy.copy(value)


def contents(row: Row) -> dict[str, Any]:
    return {field.name: plainly(getattr(row, field.name)) for field in fields(Row)}


# Laws.


def test_the_registry_is_not_empty():
    assert "reward_augmented" in RELABELERS.names()


def test_every_key_is_in_the_table():
    assert set(KEYS) == {(name, field.name) for name in RELABELERS for field in fields(RELABELERS[name])}


@every_relabeler
def test_docstrings_have_formula_source_and_keys(name: str):
    cls = RELABELERS[name]
    assert re.match(r"row\(.*→.*row\(", formula(cls)), "the first indented block says what becomes of a row"
    assert re.search(r"arXiv:\d{4}\.\d{5}", source(cls)), "References: with something to look up"
    docs = field_docs(cls)
    for field in fields(cls):
        assert docs.get(field.name, "").strip(), f"write a docstring under {name}.{field.name}"


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [(name, key, value) for (name, key), values in KEYS.items() for value in values.refused],
)
def test_values_out_of_range_are_refused_by_name(name: str, key: str, value: object):
    with pytest.raises(ValueError, match=rf"^{key} must be .*got {re.escape(repr(value))}$"):
        RELABELERS[name](**{key: value})


@every_relabeler
def test_recipe_to_relabeler_to_recipe_is_the_identity(name: str):
    allowed = {key: values.allowed for (relabeler, key), values in KEYS.items() if relabeler == name}
    for config in ({}, *configs(allowed)):
        relabeler = RELABELERS[name](**config)
        assert RELABELERS[name](**json.loads(json.dumps(asdict(relabeler)))) == relabeler


@every_relabeler
def test_relabelers_are_frozen_and_keys_are_checked(name: str):
    for field in fields(RELABELERS[name]):
        with pytest.raises(FrozenInstanceError):
            setattr(RELABELERS[name](), field.name, None)
    with pytest.raises(TypeError, match="no_such_key"):
        RELABELERS[name](no_such_key=1)


@every_relabeler
def test_nothing_is_edited(name: str):
    """The row is what it was, down to its messages, and what cannot be edited is not tried."""
    row = pair(group="maths", candidates=(Candidate(text="GOOD", score=9.0),))
    before = contents(row)
    new = RELABELERS[name]()(row)
    assert contents(row) == before
    assert contents(row) not in [contents(other) for other in new]
    assert [contents(other) for other in RELABELERS[name]()(row)] == [contents(other) for other in new]


@every_relabeler
def test_rows_keep_what_is_not_relabelled(name: str):
    """Where a row came from, and what no relabeler is about."""
    row = pair(label=True, candidates=(Candidate(text="GOOD", score=9.0),))
    row = replace(row, responses={**row.responses, "gold": GOOD}, scores={**row.scores, "gold": 9.5})
    for new in RELABELERS[name]()(row):
        assert (new.where, new.label, new.candidates) == (row.where, row.label, row.candidates)
        assert new.responses["gold"] == GOOD
        assert new.scores["gold"] == 9.5


# Reward-augmented relabelling.


def goal(score: str, low: str = "1", high: str = "10") -> str:
    """The wording is fixed: models are asked for scores in the words they were trained on."""
    return (
        f"The assistant's answers reach the target scores below, on a scale from {low} (lowest) to {high} (highest), "
        f"without mentioning them.\nOverall score: {score}."
    )


def test_each_pair_is_learned_twice():
    """As ranked under the better score, printed 9, and exchanged under the worse, printed 3.5."""
    first, second = RewardAugmented()(pair())
    assert first.prompt == ({"role": "system", "content": goal("9")}, QUESTION)
    assert (first.responses["chosen"], first.responses["rejected"]) == (GOOD, BAD)
    assert dict(first.scores) == {"chosen": 9.0, "rejected": 3.5}
    assert second.prompt == ({"role": "system", "content": goal("3.5")}, QUESTION)
    assert (second.responses["chosen"], second.responses["rejected"]) == (BAD, GOOD)
    assert dict(second.scores) == {"chosen": 3.5, "rejected": 9.0}
    assert (first.group, second.group) == ("goal=chosen", "goal=rejected")


def test_the_goal_before_the_first_user_turn():
    """For models without a system role; later turns, and what stands before the first user turn, stay."""
    first, second = RewardAugmented(form="text")(pair())
    assert first.prompt == ({"role": "user", "content": f"{goal('9')}\n\nQ"},)
    assert second.prompt == ({"role": "user", "content": f"{goal('3.5')}\n\nQ"},)
    assert (second.responses["chosen"], second.responses["rejected"]) == (BAD, GOOD)
    turns = (turn("system", "S"), turn("user", "Q1", name="n"), turn("assistant", "A"), turn("user", "Q2"))
    (new, _) = RewardAugmented(form="text")(pair(prompt=turns))
    assert new.prompt == (turns[0], {"role": "user", "content": f"{goal('9')}\n\nQ1", "name": "n"}, *turns[2:])


def test_the_goal_before_plain_text():
    first, second = RewardAugmented(form="text")(pair(**PLAIN))
    assert (first.prompt, second.prompt) == (f"{goal('9')}\n\nQ:", f"{goal('3.5')}\n\nQ:")
    assert dict(second.responses) == {"chosen": " bad", "rejected": " good"}


def test_a_system_message_is_kept():
    """It follows the goal, in the same message: many templates allow one only."""
    turns = (turn("system", "Be brief.", tools="none"), QUESTION)
    (new, _) = RewardAugmented()(pair(prompt=turns))
    assert new.prompt == ({"role": "system", "content": f"{goal('9')}\n\nBe brief.", "tools": "none"}, QUESTION)


@pytest.mark.parametrize("form", ["system", "text"])
def test_both_legs_share_one_prompt(form: str):
    """The published code gave them different user turns; here a row has one prompt, and answers hold no question."""
    for new in RewardAugmented(form=form)(pair()):
        assert sum(message["role"] == "user" for message in new.prompt) == 1
        assert new.prompt[-1]["content"].endswith("Q")
        assert sum(message["content"].count("Overall score") for message in new.prompt) == 1
        assert {response[0]["content"] for response in new.responses.values()} == {"GOOD", "BAD"}


def test_groups_are_added_to_the_rows_own():
    assert [new.group for new in RewardAugmented()(pair(group="maths"))] == [
        "maths, goal=chosen",
        "maths, goal=rejected",
    ]


def test_a_worse_chosen_response_is_relabelled_all_the_same():
    """Where ranking and scores disagree, each response still appears first under its own score."""
    first, second = RewardAugmented()(scored(2.0, 8.0))
    assert first.prompt[0]["content"] == goal("2")
    assert first.responses["chosen"] == GOOD
    assert second.prompt[0]["content"] == goal("8")
    assert second.responses["chosen"] == BAD


@pytest.mark.parametrize(
    ("decimals", "chosen", "rejected"), [(2, 4.0, 4.0), (2, 4.001, 4.0), (0, 4.4, 3.6), (0, 3.5, 4.5), (1, 7.04, 7)]
)
def test_scores_that_print_alike_leave_the_pair_out(decimals: int, chosen: float, rejected: float):
    """They would give two rows that contradict each other. (Halves are rounded to even: 3.5 and 4.5 print 4.)"""
    with pytest.raises(LeftOut, match=r"^chosen and rejected have the same score$"):
        RewardAugmented(decimals=decimals)(scored(chosen, rejected))


def test_reasons_for_leaving_out_can_be_counted():
    """They name no row."""
    reasons: Counter[str] = Counter()
    for index in range(3):
        try:
            RewardAugmented()(scored(5.0, 5.0, index=index))
        except LeftOut as reason:
            reasons[str(reason)] += 1
    assert list(reasons.values()) == [3]


@pytest.mark.parametrize("leg", ["chosen", "rejected"])
def test_a_missing_score_is_named_with_its_row(leg: str):
    scores = {key: value for key, value in pair().scores.items() if key != leg}
    message = (
        rf"^pairs.jsonl, row 7: reward_augmented needs a score of the {leg} response and there is none; add columns"
    )
    with pytest.raises(ValueError, match=message) as caught:
        RewardAugmented()(pair(scores=scores))
    assert not isinstance(caught.value, LeftOut), "a mistake, not a row to leave out"


@pytest.mark.parametrize("score", [0.9, 10.5, -3.0, math.nan, math.inf, -math.inf])
def test_a_score_off_the_scale_is_named_with_its_row(score: float):
    for row in (scored(score, 3.5), scored(9.0, score)):
        with pytest.raises(
            ValueError, match=r"^pairs.jsonl, row 7: the score .* is outside the scale from 1 to 10; set"
        ):
            RewardAugmented()(row)
    ends = RewardAugmented()(scored(10.0, 1.0))
    assert [new.prompt[0]["content"] for new in ends] == [goal("10"), goal("1")]


def test_prompts_without_a_place_for_the_goal_are_named():
    with pytest.raises(
        ValueError, match=r"^pairs.jsonl, row 7: plain text has no system message: set data.as_chat, or"
    ):
        RewardAugmented()(pair(**PLAIN))
    unasked = pair(prompt=(turn("system", "S"),))
    with pytest.raises(ValueError, match=r"^pairs.jsonl, row 7: the prompt has no user turn to put the goal into: set"):
        RewardAugmented(form="text")(unasked)
    assert len(RewardAugmented()(unasked)) == 2


@pytest.mark.parametrize(
    ("score", "printed"),
    [(9.0, "9"), (9, "9"), (3.5, "3.5"), (3.14159, "3.14"), (2.999, "3"), (-0.001, "0"), (-2.5, "-2.5"), (10, "10")],
)
def test_scores_print_short(score: float, printed: str):
    assert RewardAugmented().printed(score) == printed


def test_the_scale_is_part_of_the_goal():
    assert RewardAugmented(lowest=0.0, highest=4.5).goal(2.25) == goal("2.25", low="0", high="4.5")


@pytest.mark.parametrize(
    ("form", "prompt"),
    [
        ("system", (QUESTION,)),
        ("system", (turn("system", "S"), QUESTION)),
        ("text", (QUESTION,)),
        ("text", (turn("system", "S"), QUESTION)),
        ("text", "Q:"),
    ],
)
@pytest.mark.parametrize("highest", [10.0, 5, 4.25])
def test_inference_asks_for_the_highest_score_in_the_words_of_training(form: str, prompt: Any, highest: float):
    """Byte for byte what a pair whose better answer has that score was trained with."""
    relabeler = RewardAugmented(form=form, highest=highest)
    answers = PLAIN["responses"] if isinstance(prompt, str) else pair().responses
    (trained, _) = relabeler(scored(float(highest), 2.0, prompt=prompt, responses=answers))
    assert plainly(relabeler.condition(prompt)) == plainly(trained.prompt)
    assert json.dumps(plainly(relabeler.condition(prompt))) == json.dumps(plainly(trained.prompt))
    assert relabeler.condition(prompt) == relabeler.condition(prompt, highest)
    assert relabeler.condition(prompt) != relabeler.condition(prompt, 2.0)


@given(
    chosen=st.floats(1, 10),
    rejected=st.floats(1, 10),
    form=st.sampled_from(["system", "text"]),
    decimals=st.integers(0, 4),
)
def test_two_rows_mirror_each_other(chosen: float, rejected: float, form: str, decimals: int):
    """Exchanging the pair beforehand gives the same two rows in the other order; their goals differ."""
    relabeler = RewardAugmented(form=form, decimals=decimals)
    assume(relabeler.printed(chosen) != relabeler.printed(rejected))
    first, second = relabeler(scored(chosen, rejected))
    exchanged = relabeler(scored(rejected, chosen, responses=MappingProxyType({"chosen": BAD, "rejected": GOOD})))
    assert first.prompt != second.prompt
    for ours, theirs in zip((first, second), reversed(exchanged), strict=True):
        assert (ours.prompt, dict(ours.responses)) == (theirs.prompt, dict(theirs.responses))
        assert dict(ours.scores) == dict(theirs.scores)
