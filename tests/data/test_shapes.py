"""Rules, arrangement and mismatched responses: what rows become, and what is said where they can't."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import DataError
from data.formats import recognise, to_row
from data.shapes import (
    RULES,
    RowsKind,
    Rule,
    arrange,
    objectives_for,
    prompt_key,
    refuse_one_class,
    rule_matters,
    with_mismatched,
)
from data.sources import Source, load_rows
from objectives.registry import OBJECTIVES
from objectives.rows import Candidate, Row

PAIR, TRIPLE = ("chosen", "rejected"), ("chosen", "rejected", "gold")
LABELLED = ("completion",)
THRESHOLD = Rule(name="threshold", threshold=0.5)
MARGIN = Rule(name="margin", margin=0.3)
EVERY_RULE = (Rule(), Rule(name="best_vs_random"), THRESHOLD, MARGIN)


def scored(*scores, index=0, source="d", **more) -> Row:
    """A row whose responses are called after their scores and places."""
    ranked = sorted(enumerate(scores), key=lambda pair: -pair[1])
    candidates = tuple(Candidate(text=f"{place}:{score}", score=float(score)) for place, score in ranked)
    return Row(prompt=f"p{index}", candidates=candidates, source=source, index=index, **({"responses": {}} | more))


def arranged(rows, legs=PAIR, rule=None, seed=0, labels=None):
    rows = [rows] if isinstance(rows, Row) else rows
    labels = "completion" in legs if labels is None else labels
    return arrange(rows, legs=legs, labels=labels, rule=rule or Rule(), seed=seed)


def made(rows, legs=PAIR, rule=None, **options):
    """The scores by leg of every row made, none of which may be left out."""
    new, problems = arranged(rows, legs, rule, **options)
    assert problems == []
    assert all(row.candidates == () for row in new)
    return [dict(row.scores) for row in new]


def reason(rows, legs=PAIR, rule=None) -> str:
    new, (problem,) = arranged(rows, legs, rule)
    assert new == []
    return problem.reason


# Rules by hand


def test_best_against_worst():
    assert made(scored(0.2, 0.9, 0.5)) == [{"chosen": 0.9, "rejected": 0.2}]
    (row,), _ = arranged(scored(0.2, 0.9, 0.5))
    assert row.responses == {"chosen": "1:0.9", "rejected": "0:0.2"}
    assert (row.label, row.where) == (None, "d, row 0")


def test_best_against_a_random_worse_one():
    """0.9 occurs twice: neither is rejected, and the first is chosen."""
    rows = [scored(0.1, 0.9, 0.5, 0.9, index=i) for i in range(100)]
    new, _ = arranged(rows, rule=Rule(name="best_vs_random"))
    assert {row.responses["chosen"] for row in new} == {"1:0.9"}
    counts = Counter(row.scores["rejected"] for row in new)
    assert set(counts) == {0.1, 0.5}
    assert min(counts.values()) > 30


def test_a_response_over_the_threshold_against_one_below():
    """0.5 itself reaches the threshold of 0.5."""
    rows = [scored(0.1, 0.9, 0.5, 0.4, index=i) for i in range(200)]
    new, _ = arranged(rows, rule=THRESHOLD)
    counts = Counter((row.scores["chosen"], row.scores["rejected"]) for row in new)
    assert set(counts) == {(0.9, 0.1), (0.9, 0.4), (0.5, 0.1), (0.5, 0.4)}
    assert min(counts.values()) > 25


def test_every_two_responses_that_are_far_enough_apart():
    pairs = made(scored(0.9, 0.5, 0.7, 0.2), rule=MARGIN)
    assert [tuple(pair.values()) for pair in pairs] == [(0.9, 0.5), (0.9, 0.2), (0.7, 0.2), (0.5, 0.2)]
    assert made(scored(0.9, 0.8), rule=Rule(name="margin", margin=0.1)), "whatever floating point makes of 0.9 − 0.8"


def test_a_margin_goes_with_any_rule():
    rows = [scored(0.1, 0.55, 0.9, index=i) for i in range(50)]
    for rule in (Rule(name="best_vs_random", margin=0.5), Rule(name="threshold", threshold=0.5, margin=0.5)):
        assert {tuple(scores.values()) for scores in made(rows, rule=rule)} == {(0.9, 0.1)}
    assert reason(scored(0.1, 0.3, index=1), rule=Rule(margin=0.5)) == "scores differ by less than data.margin"


def test_lengths_of_a_pair_are_alike_where_asked():
    """40, 10, 20 and 39 characters: with a ratio of 2, the best goes with the worst of at least 20."""
    row = replace(
        scored(0.9, 0.1, 0.3, 0.5),
        candidates=tuple(
            Candidate(text="x" * length, score=score) for length, score in ((40, 0.9), (39, 0.5), (20, 0.3), (10, 0.1))
        ),
    )
    assert [tuple(pair.values()) for pair in made(row, rule=Rule(max_length_ratio=2))] == [(0.9, 0.3)]
    assert [tuple(pair.values()) for pair in made(row, rule=Rule(max_length_ratio=1.1))] == [(0.9, 0.5)]
    assert reason(row, rule=Rule(max_length_ratio=1)) == "lengths differ by more than data.max_length_ratio"
    every = made(row, rule=Rule(name="margin", margin=0.1, max_length_ratio=2))
    assert [tuple(pair.values()) for pair in every] == [(0.9, 0.5), (0.9, 0.3), (0.5, 0.3), (0.3, 0.1)]


def test_triples_are_the_best_the_second_and_the_worst():
    """The construction of TPO's authors."""
    assert made(scored(3, 9, 7, 8), TRIPLE) == [{"chosen": 8.0, "rejected": 3.0, "gold": 9.0}]
    assert reason(scored(9, 9, 7, 8), TRIPLE) == "two responses share the best score, so that none is the gold one"
    assert reason(scored(9, 7, 7), TRIPLE) == "all responses have the same score"
    assert reason(scored(9, 7), TRIPLE) == "fewer than three responses with scores"


def test_triples_follow_the_rule_below_gold():
    assert made(scored(0.9, 0.8, 0.6, 0.1), TRIPLE, Rule(name="margin", margin=0.5)) == [
        {"chosen": 0.8, "rejected": 0.1, "gold": 0.9},
        {"chosen": 0.6, "rejected": 0.1, "gold": 0.9},
    ]
    assert made(scored(0.9, 0.6, 0.1), TRIPLE, THRESHOLD) == [{"chosen": 0.6, "rejected": 0.1, "gold": 0.9}]
    assert reason(scored(0.9, 0.4, 0.1), TRIPLE, THRESHOLD) == "no response scores at least data.threshold"


def test_a_gold_response_of_its_own_leaves_the_best_to_the_pair():
    row = scored(0.9, 0.1, responses={"gold": "g"}, scores={"gold": 7.0})
    (new,), _ = arranged(row, TRIPLE)
    assert new.responses == {"chosen": "0:0.9", "rejected": "1:0.1", "gold": "g"}
    assert new.scores == {"chosen": 0.9, "rejected": 0.1, "gold": 7.0}
    assert made(row, ("gold",)) == [{"gold": 7.0}]


@pytest.mark.parametrize("leg", ["gold", "chosen"])
@pytest.mark.parametrize("rule", EVERY_RULE, ids=lambda rule: rule.name)
def test_one_response_alone_is_the_best(leg, rule):
    assert made([scored(0.2, 0.9), scored(0.5, 0.5), scored(0.1)], (leg,), rule) == [{leg: s} for s in (0.9, 0.5, 0.1)]
    assert not rule_matters((leg,), labels=False)


def test_labels_are_the_two_sides_of_a_pair_or_of_the_threshold():
    pair, _ = arranged(scored(0.2, 0.9, 0.5), LABELLED)
    assert [(row.responses, row.label, row.scores) for row in pair] == [
        ({"completion": "1:0.9"}, True, {"score": 0.9}),
        ({"completion": "0:0.2"}, False, {"score": 0.2}),
    ]
    every, _ = arranged([scored(0.2, 0.9, 0.5), scored(0.9)], LABELLED, THRESHOLD)
    assert [(row.scores["score"], row.label) for row in every] == [
        (0.9, True),
        (0.5, True),
        (0.2, False),
        (0.9, True),
    ]


def test_equal_texts_are_no_pair():
    row = Row(prompt="p", responses={}, candidates=tuple(Candidate(text="same", score=s) for s in (2.0, 1.0)))
    assert reason(row) == "identical chosen and rejected"


@pytest.mark.parametrize("rule", EVERY_RULE, ids=lambda rule: rule.name)
def test_too_few_or_equal_scores_are_left_out_and_counted(rule):
    rows = [scored(0.9), scored(0.7, 0.7, index=1), scored(0.1, 0.9, index=2)]
    new, problems = arranged(rows, rule=rule)
    assert [row.index for row in new] == [2]
    assert [problem.index for problem in problems] == [0, 1]
    assert [problem.reason for problem in problems] == [
        "fewer than two responses with scores",
        "all responses have the same score",
    ]


@pytest.mark.parametrize(("scores", "side"), [((0.6, 0.7), "below"), ((0.1, 0.2), "at least")])
def test_responses_on_one_side_of_the_threshold_are_left_out(scores, side):
    assert reason(scored(*scores), rule=THRESHOLD) == f"no response scores {side} data.threshold"


# Rules in general


score_lists = st.lists(st.sampled_from([0, 0.1, 0.3, 0.4, 0.5, 0.7, 0.8, 1]), min_size=1, max_size=7)
rules = st.one_of(
    st.builds(Rule, name=st.sampled_from(RULES[:2]), margin=st.sampled_from([0, 0.1, 0.4])),
    st.builds(Rule, name=st.just("threshold"), threshold=st.sampled_from([0.3, 0.5]), margin=st.sampled_from([0, 0.2])),
    st.builds(Rule, name=st.just("margin"), margin=st.sampled_from([0.1, 0.3, 0.6])),
)


@given(lists=st.lists(score_lists, min_size=1, max_size=6), rule=rules, seed=st.integers(0, 3), gold=st.booleans())
def test_what_holds_for_every_pair(lists, rule, seed, gold):
    rows = [scored(*scores, index=i) for i, scores in enumerate([[0, 0.5, 1], *lists])]
    legs = TRIPLE if gold else PAIR
    new, problems = arranged(rows, legs, rule, seed)
    assert {row.index for row in new} | {problem.index for problem in problems} == set(range(len(rows)))
    assert not {row.index for row in new} & {problem.index for problem in problems}
    for row in new:
        chosen, rejected = row.scores["chosen"], row.scores["rejected"]
        assert chosen > rejected, "never a tie"
        assert chosen - rejected >= rule.margin - 1e-9
        if rule.threshold is not None:
            assert chosen >= rule.threshold > rejected
        top = max(c.score for c in rows[row.index].candidates)
        if rule.name.startswith("best") and not gold:
            assert chosen == top
        if gold:
            assert row.scores["gold"] == top > chosen
    assert len({(row.index, row.responses["chosen"], row.responses["rejected"]) for row in new}) == len(new)
    if rule.name != "margin":
        assert max(Counter(row.index for row in new).values(), default=0) <= 1


@given(lists=st.lists(score_lists, min_size=2, max_size=6), rule=rules, order=st.randoms(use_true_random=False))
def test_what_a_row_becomes_depends_on_itself_and_the_seed(lists, rule, order):
    rows = [scored(*scores, index=i) for i, scores in enumerate([[0, 0.5, 1], *lists])]
    shuffled = order.sample(rows, len(rows))
    for legs in (PAIR, LABELLED):
        for new, again in zip(arranged(rows, legs, rule), arranged(shuffled, legs, rule), strict=True):
            assert sorted(new, key=repr) == sorted(again, key=repr)
        assert arranged(rows, legs, rule) == arranged(rows, legs, rule)


def test_random_choices_follow_the_seed():
    rows = [scored(*range(6), index=i) for i in range(40)]
    one, other = (arranged(rows, rule=Rule(name="best_vs_random"), seed=seed)[0] for seed in (1, 2))
    assert one != other


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"name": "best_vs_wrost"}, "data.rule: unknown rule 'best_vs_wrost'; did you mean 'best_vs_worst'? (known: "),
        ({"name": "threshold"}, "data.rule threshold needs data.threshold"),
        ({"threshold": 0.5}, "data.threshold has no effect with data.rule best_vs_worst; leave it out"),
        ({"name": "threshold", "threshold": float("nan")}, "data.threshold must be a finite number, not nan"),
        ({"margin": -1.0}, "data.margin must be a finite number >= 0, not -1.0"),
        ({"margin": float("inf")}, "data.margin must be a finite number >= 0, not inf"),
        ({"name": "margin"}, "data.rule margin needs data.margin > 0"),
        ({"max_length_ratio": 0.9}, "data.max_length_ratio must be a finite number >= 1, not 0.9"),
    ],
)
def test_rules_that_make_no_sense(options, part):
    with pytest.raises(DataError) as caught:
        Rule(**options)
    assert str(caught.value).startswith(part)


# Every kind of data for every kind of objective


RAW = {
    "pairs": {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": 1},
    "triples": {"prompt": "p", "chosen": "a", "rejected": "b", "gold": "g", "score_gold": 3},
    "unpaired": {"prompt": "p", "completion": "a", "label": True},
    "completions": {"prompt": "p", "completion": "a"},
    "messages": {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]},
    "scored": {"prompt": "p", "responses": [{"text": t, "score": s} for t, s in (("a", 3), ("b", 2), ("c", 1))]},
}
LEGS = {
    "pair": PAIR,
    "triple": TRIPLE,
    "gold": ("gold",),
    "chosen": ("chosen",),
    "labels": LABELLED,
    "labels and mismatched": ("completion", "mismatched"),
    "labels beside a pair": (*PAIR, "completion"),
}
SERVED = {
    "pairs": {"pair": 1, "chosen": 1, "labels": 2, "labels and mismatched": 2, "labels beside a pair": 2},
    "triples": {"pair": 1, "triple": 1, "gold": 1, "chosen": 1, "labels": 2, "labels and mismatched": 2}
    | {"labels beside a pair": 2},
    "unpaired": {"labels": 1, "labels and mismatched": 1},
    "completions": {"gold": 1},
    "messages": {"gold": 1},
    "scored": {"pair": 1, "triple": 1, "gold": 1, "chosen": 1, "labels": 2, "labels and mismatched": 2}
    | {"labels beside a pair": 2},
}


def loaded(raw, *more, **options):
    form = recognise([raw, *more], where="x.jsonl", **options)
    rows = [to_row(each, form, source="x.jsonl", index=i) for i, each in enumerate([raw, *more])]
    assert all(isinstance(row, Row) for row in rows)
    return rows


@pytest.mark.parametrize("wanted", LEGS)
@pytest.mark.parametrize("data", RAW)
def test_every_kind_of_data_for_every_kind_of_objective(data, wanted):
    legs = LEGS[wanted]
    if wanted not in SERVED[data]:
        with pytest.raises(DataError, match=r"^x\.jsonl, row 0: the objective needs "):
            arranged(loaded(RAW[data]), legs)
        return
    new, problems = arranged(loaded(RAW[data]), legs)
    assert (len(new), problems) == (SERVED[data][wanted], [])
    for row in new:
        assert set(legs) - {"mismatched"} <= row.responses.keys()
        assert (row.label is not None) is ("completion" in legs)
        assert set(row.scores) <= {*row.responses, "score"}


def test_pairs_become_labelled_completions_with_their_scores():
    good, bad = arranged(loaded(RAW["pairs"]), LABELLED)[0]
    assert (good.responses, good.label, good.scores) == ({"completion": "a"}, True, {"score": 2.0})
    assert (bad.responses, bad.label, bad.scores) == ({"completion": "b"}, False, {"score": 1.0})
    assert good.index == bad.index == 0


def test_labels_can_be_passed_over_on_request():
    rows = loaded(RAW["unpaired"], name="prompt_completion")
    assert [(row.responses, row.label) for row in arranged(rows, ("gold",))[0]] == [({"gold": "a"}, None)]


@pytest.mark.parametrize(
    ("raw", "legs", "needs", "has", "remedy", "works", "does_not"),
    [
        (
            "pairs",
            TRIPLE,
            "a gold response",
            "prompt, chosen, rejected",
            "add a gold or reference column",
            "dpo",
            "tpo",
        ),
        (
            "unpaired",
            PAIR,
            "chosen and rejected responses",
            "prompt, completion, label",
            "add chosen and",
            "bco",
            "dpo",
        ),
        (
            "unpaired",
            ("gold",),
            "a gold response",
            "prompt, completion, label",
            "set data.format: prompt_comp",
            "kto",
            "sft",
        ),
        (
            "completions",
            LABELLED,
            "a label",
            "prompt, completion",
            "add a label column with true and false",
            "sft",
            "bco",
        ),
        (
            "messages",
            PAIR,
            "chosen and rejected responses",
            "prompt, completion",
            "add chosen and rejected",
            "sft",
            "dpo",
        ),
        ("completions", TRIPLE, "chosen and rejected responses", "prompt, completion", "add chosen and", "sft", "tpo"),
        ("unpaired", TRIPLE, "chosen, rejected and gold responses", "prompt, completion, label", "add", "bco", "dpo"),
        ("pairs", (*LABELLED, "gold"), "a gold response", "prompt, chosen, rejected", "add a gold", "bco", "sft"),
    ],
)
def test_what_is_missing_is_said_with_what_would_work(raw, legs, needs, has, remedy, works, does_not):
    with pytest.raises(DataError) as caught:
        arranged(loaded(RAW[raw]), legs)
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith(f"x.jsonl, row 0: the objective needs {needs} and the rows have {has}; {remedy}")
    _, _, names = said.partition("or use an objective that works with this data: ")
    assert works in names.split(", ")
    assert does_not not in names.split(", ")


def test_the_sentence_in_full(monkeypatch):
    monkeypatch.setattr("data.shapes.objectives_for", lambda kinds: ["bco", "dpo"])
    with pytest.raises(DataError) as caught:
        arranged(loaded(RAW["pairs"]), TRIPLE)
    assert str(caught.value) == (
        "x.jsonl, row 0: the objective needs a gold response and the rows have prompt, chosen, rejected; add a gold or "
        "reference column (data.columns maps names), or use an objective that works with this data: dpo, bco"
    )


def test_the_first_row_that_lacks_something_is_named():
    with pytest.raises(
        DataError, match=r"^x\.jsonl, row 1: .* gold response and this row has prompt, chosen, rejected;"
    ):
        arranged(loaded(RAW["triples"], RAW["pairs"], RAW["pairs"]), TRIPLE)


def test_what_is_recommended_works():
    """Every objective that a kind of data is said to serve gets its legs from it."""
    for raw in RAW.values():
        (row,) = loaded(raw)
        for name in objectives_for([RowsKind.of(row)]):
            cls = OBJECTIVES[name]
            needs = (cls.example() if hasattr(cls, "example") else cls()).needs
            assert arranged([row], needs.legs, labels=needs.labels)[0]


def test_recommendations_hold_for_all_rows_and_know_examples(monkeypatch):
    from objectives.needs import Needs

    class Hard:
        @staticmethod
        def example():
            return Hard()

        needs: ClassVar[Needs] = Needs(legs=("chosen", "strange"))

    monkeypatch.setitem(OBJECTIVES._classes, "hard", Hard)
    pair, triple, gold = (RowsKind(frozenset(legs)) for legs in (PAIR, TRIPLE, ("gold",)))
    assert "dpo" in objectives_for([pair, triple])
    assert "sft" in objectives_for([triple, gold])
    assert objectives_for([pair, gold]) == []
    assert "hard" not in objectives_for([triple])
    assert "hard" in objectives_for([RowsKind(frozenset({"chosen", "strange"}))])


def test_scores_that_are_all_equal_make_no_pair():
    rows = [scored(0.5, 0.5, index=i) for i in range(3)]
    for legs in (PAIR, TRIPLE, LABELLED):
        with pytest.raises(DataError, match=r"^d: all scores are 0\.5, so that no pair of a better and a worse"):
            arranged(rows, legs)
    assert len(arranged(rows, ("gold",))[0]) == 3
    assert len(arranged(rows, LABELLED, THRESHOLD)[0]) == 6
    other = [scored(1, 2, source="e")]
    with pytest.raises(DataError, match=r"^d: all scores"):
        arranged([*other, *rows])


@pytest.mark.parametrize(("good", "bad", "label", "other"), [(3, 0, "true", "false"), (0, 2, "false", "true")])
def test_labels_of_one_class(good, bad, label, other):
    with pytest.raises(DataError) as caught:
        refuse_one_class(good, bad, "x.jsonl")
    assert str(caught.value).startswith(
        f"x.jsonl: all {good + bad} training rows have label {label}, and the objective"
    )
    assert f"add rows with label {other}" in str(caught.value)
    assert ("objective sft with data.format prompt_completion" in str(caught.value)) is bool(good)
    refuse_one_class(1, 1, "x.jsonl")
    refuse_one_class(0, 0, "x.jsonl")


# Mismatched responses


def completions(prompts):
    return [Row(prompt=p, responses={"completion": f"{i}"}, label=True, index=i) for i, p in enumerate(prompts)]


@given(prompts=st.lists(st.integers(0, 6), min_size=2, max_size=30), seed=st.integers(0, 5))
def test_mismatched_responses_belong_to_other_prompts(prompts, seed):
    rows = completions([f"p{p}" for p in prompts])
    if len(set(prompts)) == 1:
        with pytest.raises(DataError, match=rf"all {len(rows)} rows have the same prompt"):
            with_mismatched(rows, seed)
        return
    new = with_mismatched(rows, seed)
    assert new == with_mismatched(rows, seed)
    by_text = {row.responses["completion"]: row.prompt for row in rows}
    for before, after in zip(rows, new, strict=True):
        assert after == replace(before, responses=after.responses)
        assert by_text[after.responses["mismatched"]] != before.prompt
    if max(Counter(prompts).values()) * 2 <= len(prompts):
        assert len({row.responses["mismatched"] for row in new}) == len(rows), "each serves once"


def test_mismatched_responses_follow_the_seed_and_are_spread():
    rows = completions([f"p{i}" for i in range(50)])
    drawn = [[row.responses["mismatched"] for row in with_mismatched(rows, seed)] for seed in (0, 1)]
    assert drawn[0] != drawn[1]
    shifts = {(int(text) - i) % 50 for i, text in enumerate(drawn[0])}
    assert len(shifts) > 10, "not merely the next row"


def test_messages_get_messages_and_text_gets_text():
    chats = [({"role": "user", "content": f"c{i}"},) for i in range(3)]
    rows = [
        *completions(["a", "b"]),
        *(Row(prompt=chat, responses={"completion": ({"role": "assistant", "content": "x"},)}) for chat in chats),
    ]
    for row in with_mismatched(rows, 0):
        assert type(row.responses["mismatched"]) is type(row.responses["completion"])
    with pytest.raises(
        DataError, match=r"all 1 rows among those written as text or as messages alike \(data.as_chat\)"
    ):
        with_mismatched(rows[:3], 0)
    assert with_mismatched([], 0) == []


def test_prompt_keys():
    assert prompt_key("p") == prompt_key("p") != prompt_key("q")
    one = ({"role": "user", "content": "p"},)
    assert prompt_key(one) == prompt_key(({"content": "p", "role": "user"},))
    assert len({prompt_key(one), prompt_key("p"), prompt_key(json.dumps(one))}) == 3


# Real data


@pytest.mark.slow
@pytest.mark.parametrize("legs", [PAIR, TRIPLE, LABELLED], ids=" ".join)
@pytest.mark.parametrize(
    "rule",
    [Rule(), Rule(name="best_vs_random"), Rule(name="threshold", threshold=0.01), Rule(name="margin", margin=0.1)],
    ids=lambda rule: rule.name,
)
def test_every_rule_on_real_scores(shared, rule, legs):
    rows = load_rows(Source(dataset_name=str(shared / "data" / "alpaca_eval_scored.jsonl.gz"))).rows
    assert sum(len(row.candidates) for row in rows) > 3000
    new, problems = arranged(rows, legs, rule)
    kept = {row.index for row in new}
    assert len(kept) + len(problems) == 600
    assert kept.isdisjoint(problem.index for problem in problems)
    if legs == LABELLED:
        labels = Counter(row.label for row in new)
        if rule.name == "threshold":
            assert len(new) == sum(len(row.candidates) for row in rows)
            assert labels[True] == sum(c.score >= 0.01 for row in rows for c in row.candidates)
        else:
            pairs, _ = arranged(rows, PAIR, rule)
            assert labels[True] == labels[False] == len(pairs)
        return
    assert len(new) == len(kept) or rule.name == "margin"
    for row in new:
        gap = row.scores["chosen"] - row.scores["rejected"]
        assert gap > 0
        assert gap >= rule.margin - 1e-9
        if "gold" in legs:
            assert row.scores["gold"] > row.scores["chosen"]
    lost = Counter(problem.reason for problem in problems)
    if rule.name.startswith("best"):
        tied = "two responses share the best score, so that none is the gold one"
        assert lost == ({tied: 1} if "gold" in legs else {})
