"""Recognising formats and converting rows, without files: what goes in is what ``reading`` yields."""

from __future__ import annotations

import copy

import pytest

from data.errors import DataError
from data.formats import FORMATS, RowProblem, recognise, to_row
from objectives.rows import Candidate, Row


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def converted(raw, *, as_chat=False, name="auto", also=()):
    """The row or problem that ``raw`` becomes, in a dataset that also has the rows ``also``."""
    form = recognise([raw, *also], where="d", name=name)
    return to_row(raw, form, source="d", index=7, as_chat=as_chat)


def row(raw, **options) -> Row:
    result = converted(raw, **options)
    assert isinstance(result, Row), result
    assert result.where == "d, row 7"
    return result


PAIR = {"prompt": "2+2 is", "chosen": " 4", "rejected": " 5"}
HH = {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: go"}
CHAT = {"prompt": [user("hi")], "chosen": [assistant("hello")], "rejected": [assistant("go")]}
UNPAIRED = {"prompt": "q", "completion": " a", "label": True}
SCORED = {"prompt": "q", "responses": [{"text": t, "score": s} for t, s in (("mid", 0.5), ("low", 0), ("top", 0.9))]}


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        (PAIR, "paired"),
        (CHAT, "paired"),
        ({"prompt": "hi", "chosen": [user("hi"), assistant("a")], "rejected": [user("hi"), assistant("b")]}, "paired"),
        (HH | {"prompt": "given prompts are never parsed"}, "paired"),
        (HH, "hh"),
        ({"chosen": "Q: x A: yes", "rejected": "Q: x A: no"}, "paired_implicit"),
        ({"chosen": [user("hi"), assistant("a")], "rejected": [user("hi"), assistant("b")]}, "paired_implicit"),
        (SCORED, "scored"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, 2.5]}, "scored"),
        (PAIR | SCORED, "paired"),
        ({"prompt": "q", "completion": "a", "label": True}, "unpaired"),
        ({"prompt": "q", "completion": "a", "label": "0"}, "unpaired"),
        ({"prompt": [user("q")], "completion": [assistant("a")], "label": 1}, "unpaired"),
        (PAIR | {"completion": "a", "label": True}, "paired"),
        ({"prompt": "q", "completion": "a"}, "prompt_completion"),
        ({"prompt": "q", "completion": "a", "label": [1]}, "prompt_completion"),
        ({"prompt": [user("q")], "completion": [assistant("a")], "id": 3}, "prompt_completion"),
        ({"messages": [user("q"), assistant("a")]}, "messages"),
    ],
)
def test_formats_are_recognised(raw, name):
    assert recognise([raw], where="d").name == name
    before = copy.deepcopy(raw)
    assert isinstance(converted(raw), Row)
    assert raw == before


EVERYTHING = PAIR | SCORED | {"completion": "c", "messages": [], "label": True}


def test_every_format_is_reached_by_name():
    for name in FORMATS:
        assert recognise([EVERYTHING], where="d", name=name).name == name


def test_strings_stay_as_they_are():
    result = row(PAIR | {"score_chosen": 8.5, "rejected_score": "2", "reference": " four"})
    assert result.prompt == "2+2 is"
    assert result.responses == {"chosen": " 4", "rejected": " 5", "gold": " four"}
    assert result.scores == {"chosen": 8.5, "rejected": 2.0}


def test_strings_as_chat_are_single_turns():
    result = row(PAIR, as_chat=True)
    assert result.prompt == (user("2+2 is"),)
    assert result.responses == {"chosen": (assistant("4"),), "rejected": (assistant("5"),)}
    assert row(CHAT, as_chat=True) == row(CHAT)


def test_hh_is_split_at_the_last_assistant_turn_and_stays_text():
    shared = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    result = row({"chosen": shared + " yes\n\nsir", "rejected": shared + " no", "gold": shared + " maybe"})
    assert result.prompt == shared
    assert result.responses == {"chosen": " yes\n\nsir", "rejected": " no", "gold": " maybe"}


def test_hh_as_chat():
    shared = "\n\nHuman: a\n\nb\n\nAssistant: b \n\nHuman: c\n\nAssistant:"
    result = row({"chosen": shared + " yes", "rejected": shared + " no"}, as_chat=True)
    assert result.prompt == (user("a\n\nb"), assistant("b"), user("c"))
    assert result.responses == {"chosen": (assistant("yes"),), "rejected": (assistant("no"),)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: x A: yes", "Q: x A: no", "Q: x A:"),
        ("Q: x A: that", "Q: x A: this", "Q: x A: th"),  # letters that both share go to the prompt
        ("Q:\nyes", "Q:\nno", "Q:\n"),
    ],
)
def test_implicit_prompts_of_strings_are_trls(chosen, rejected, prompt):
    from trl.data_utils import extract_prompt

    result = row({"chosen": chosen, "rejected": rejected})
    assert {"prompt": result.prompt, **result.responses} == extract_prompt({"chosen": chosen, "rejected": rejected})
    assert result.prompt == prompt


def test_implicit_prompts_of_messages_are_the_shared_turns():
    turns = [{"role": "system", "content": "s"}, user("a"), assistant("b"), user("c")]
    result = row({"chosen": [*turns, assistant("d")], "rejected": [*turns, assistant("e")], "gold": "g"})
    assert result.prompt == tuple(turns)
    assert result.responses == {"chosen": (assistant("d"),), "rejected": (assistant("e"),), "gold": (assistant("g"),)}


def test_a_shared_assistant_turn_before_the_response_belongs_to_the_response():
    a, b = [user("q"), assistant("x"), assistant("y")], [user("q"), assistant("x"), assistant("z")]
    result = row({"chosen": a, "rejected": b})
    assert result.prompt == (user("q"),)
    assert result.responses["rejected"] == (assistant("x"), assistant("z"))


def test_ultrafeedback_prompt_is_the_first_user_turn():
    shared = [{"role": "system", "content": "s"}, user("hi"), assistant("b"), user("c")]
    raw = {"prompt": "hi", "chosen": [*shared, assistant("d")], "rejected": [*shared, assistant("e")]}
    result = row(raw | {"messages": [*shared, assistant("d")], "score_chosen": 9.0, "score_rejected": 6.5})
    assert result.prompt == tuple(shared)
    assert result.responses == {"chosen": (assistant("d"),), "rejected": (assistant("e"),)}
    assert result.scores == {"chosen": 9.0, "rejected": 6.5}


@pytest.mark.parametrize("prompt", ["hi", [user("hi")]])
@pytest.mark.parametrize("chosen", ["yes", [assistant("yes")], [user("hi"), assistant("yes")], assistant("yes")])
def test_strings_next_to_messages_are_one_turn(prompt, chosen):
    result = row({"prompt": prompt, "chosen": chosen, "rejected": [assistant("no")]})
    assert result.prompt == (user("hi"),)
    assert result.responses == {"chosen": (assistant("yes"),), "rejected": (assistant("no"),)}


def test_messages_keep_what_templates_read_and_lose_what_arrow_added():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": None}}]}
    answer = {"role": "tool", "content": "3", "name": "f", "tool_calls": None}
    raw = {"messages": [user("q") | {"id": 5, "name": None}, call, answer, assistant("a")]}
    result = row(raw)
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    assert result.prompt == (user("q"), called, {"role": "tool", "content": "3", "name": "f"})
    assert result.responses == {"gold": (assistant("a"),)}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_scored_lists_are_candidates_best_first_in_any_order(order):
    result = row(SCORED | {"responses": [SCORED["responses"][i] | {"model": "m", "n": 3} for i in order]})
    assert [(each.text, each.score) for each in result.candidates] == [("top", 0.9), ("mid", 0.5), ("low", 0.0)]
    assert (result.responses, result.scores, result.label) == ({}, {}, None)


def test_equal_scores_keep_their_order():
    result = row({"prompt": "q", "responses": list("abcd"), "scores": [1, 2, 1, 2]})
    assert [each.text for each in result.candidates] == list("bdac")


def test_scored_parallel_lists_pass_over_empty_responses():
    result = row({"prompt": "q", "responses": ["", "a", "b"], "scores": [0, 1, "2"]})
    assert result.candidates == (Candidate(text="b", score=2.0), Candidate(text="a", score=1.0))


@pytest.mark.parametrize("text", ["b", [assistant("b")], [user("q"), assistant("b")]])
def test_scored_responses_to_messages_are_turns(text):
    raw = {"prompt": [user("q")], "responses": [{"text": "a", "score": 1}, {"text": text, "score": 2}], "gold": "g"}
    result = row(raw)
    assert result.prompt == (user("q"),)
    assert [each.text for each in result.candidates] == [(assistant("b"),), (assistant("a"),)]
    assert result.responses == {"gold": (assistant("g"),)}


def test_scored_lists_as_chat_and_with_a_gold_response_of_their_own():
    result = row(SCORED | {"reference": " g", "score_gold": 2, "score_chosen": 1}, as_chat=True)
    assert result.prompt == (user("q"),)
    assert [each.text for each in result.candidates] == [(assistant(text),) for text in ("top", "mid", "low")]
    assert (result.responses, result.scores) == ({"gold": (assistant("g"),)}, {"gold": 2.0})


LABELS = [(True, True), (False, False), (1, True), (0, False), (1.0, True), ("1", True), ("0", False)]
LABELS += [("true", True), ("false", False), ("True", True), (" FALSE ", False)]


@pytest.mark.parametrize(("written", "label"), LABELS)
def test_labels(written, label):
    result = row(UNPAIRED | {"label": written})
    assert result.label is label
    assert (result.prompt, result.responses) == ("q", {"completion": " a"})


@pytest.mark.parametrize("prompt", ["q", [user("q")]])
@pytest.mark.parametrize("completion", [[assistant("a")], [user("q"), assistant("a")], assistant("a")])
def test_unpaired_messages(prompt, completion):
    result = row({"prompt": prompt, "completion": completion, "label": False})
    assert (result.prompt, result.responses) == ((user("q"),), {"completion": (assistant("a"),)})
    assert result.label is False


def test_unpaired_text_next_to_messages_and_as_chat():
    for result in (row(UNPAIRED | {"prompt": [user("q")], "completion": "a"}), row(UNPAIRED, as_chat=True)):
        assert (result.prompt, result.responses, result.label) == (
            (user("q"),),
            {"completion": (assistant("a"),)},
            True,
        )


def test_labels_are_passed_over_on_request():
    result = row(UNPAIRED | {"label": "sports"}, name="prompt_completion")
    assert (result.responses, result.label) == ({"gold": " a"}, None)


TEXT = {"chosen": "Q: x A: yes", "rejected": "Q: x A: no"}
CONVERSATION = {"chosen": [user("hi"), assistant("a")], "rejected": [user("hi"), assistant("b")]}


@pytest.mark.parametrize("column", ["gold", "reference"])
@pytest.mark.parametrize("as_chat", [False, True])
@pytest.mark.parametrize(
    ("raw", "gold", "text", "chat"),
    [
        (PAIR, " four", " four", "four"),
        (HH, HH["chosen"].replace("hello", "good"), " good", "good"),
        (HH, " good", " good", "good"),
        (TEXT, "Q: x A: maybe", " maybe", "maybe"),
        (TEXT, " maybe", " maybe", "maybe"),
        (CHAT, "good", None, "good"),
        (CHAT, [assistant("good")], None, "good"),
        (CHAT, [user("hi"), assistant("good")], None, "good"),
        (CONVERSATION, "good", None, "good"),
        (CONVERSATION, [assistant("good")], None, "good"),
        (CONVERSATION, [user("hi"), assistant("good")], None, "good"),
        (CONVERSATION | {"prompt": "hi"}, [user("hi"), assistant("good")], None, "good"),
        (CONVERSATION | {"prompt": "hi"}, "good", None, "good"),
    ],
)
def test_triples_in_every_paired_format(raw, gold, text, chat, as_chat, column):
    result = row(raw | {column: gold, "score_gold": 9, "chosen_score": 8}, as_chat=as_chat)
    assert list(result.responses) == ["chosen", "rejected", "gold"]
    assert result.responses["gold"] == (text if text is not None and not as_chat else (assistant(chat),))
    assert result.scores == {"gold": 9.0, "chosen": 8.0}
    without = row(raw, as_chat=as_chat)
    assert result.prompt == without.prompt
    assert {**result.responses, **without.responses} == result.responses, "gold changes nothing else"


def test_a_reference_stands_in_for_a_missing_gold():
    assert row(PAIR | {"gold": None, "reference": " r"}).responses["gold"] == " r"
    assert row(PAIR | {"gold": " g", "reference": " r"}).responses["gold"] == " g"


def test_a_row_without_gold_is_a_row_without_that_leg():
    assert set(row(PAIR | {"gold": None}, also=[PAIR | {"gold": "g"}]).responses) == {"chosen", "rejected"}
    assert set(row(PAIR | {"reference": ["a source"]}).responses) == {"chosen", "rejected"}


TURNS = [user("q"), assistant("a"), user("r")]
TRANSCRIPT = "\n\nHuman: q\n\nAssistant:"


@pytest.mark.parametrize(
    ("good", "bad", "reason"),
    [
        (PAIR, PAIR | {"chosen": None}, "no chosen"),
        (PAIR, {"prompt": "p", "rejected": "r"}, "no chosen"),
        (PAIR, PAIR | {"chosen": 4}, "chosen is neither text nor messages"),
        (PAIR, PAIR | {"chosen": ""}, "empty chosen response"),
        (PAIR, PAIR | {"rejected": " \n"}, "empty rejected response"),
        (PAIR, PAIR | {"gold": " "}, "empty gold response"),
        (PAIR, PAIR | {"rejected": " 4"}, "identical chosen and rejected"),
        (PAIR, PAIR | {"prompt": "  "}, "empty prompt"),
        (PAIR, PAIR | {"score_chosen": "high"}, "score_chosen is not a finite number"),
        (PAIR, PAIR | {"score_chosen": [1]}, "score_chosen is not a number"),
        (PAIR, ["a", "list"], "not an object with columns"),
        (CHAT, CHAT | {"chosen": []}, "chosen is an empty list"),
        (CHAT, CHAT | {"chosen": ["text"]}, "chosen is a list of something other than messages"),
        (CHAT, CHAT | {"chosen": [{"content": "x"}]}, "a message of chosen has no role"),
        (CHAT, CHAT | {"chosen": [{"role": "assistant"}]}, "a message of chosen has no content"),
        (CHAT, CHAT | {"chosen": [assistant([{"type": "image"}])]}, "a message of chosen has content that is not text"),
        (CHAT, CHAT | {"chosen": [assistant(" ")]}, "empty chosen response"),
        (CHAT, CHAT | {"chosen": [user("x")]}, "the last turn of chosen is not the assistant's"),
        (CHAT, CHAT | {"prompt": TURNS[:2]}, "the prompt ends with an assistant turn"),
        (
            CHAT,
            CHAT | {"chosen": [user("other"), assistant("x")]},
            "chosen holds user or system turns after the prompt",
        ),
        (
            CHAT | {"prompt": "hi"},
            CHAT | {"prompt": "hi", "chosen": [user("ho"), assistant("x")]},
            "the prompt is not the first user turn of the responses",
        ),
        (
            {"chosen": [*TURNS, assistant("x")], "rejected": [*TURNS, assistant("y")]},
            {"chosen": [*TURNS, assistant("x")], "rejected": [user("q"), assistant("b"), user("r"), assistant("y")]},
            "chosen holds user or system turns after the prompt",
        ),
        (
            {"chosen": "a b", "rejected": "a c"},
            {"chosen": "x", "rejected": "y"},
            "chosen and rejected don't begin alike, so there is no prompt",
        ),
        ({"chosen": "a b", "rejected": "a c"}, {"chosen": "a b", "rejected": "a b"}, "identical chosen and rejected"),
        ({"chosen": "a b", "rejected": "a c"}, {"chosen": "a b", "rejected": "a"}, "empty rejected response"),
        (
            {"chosen": "a b", "rejected": "a c"},
            {"chosen": "a b", "rejected": [assistant("c")]},
            "one of chosen and rejected is text and the other messages",
        ),
        (HH, HH | {"chosen": "hello"}, "no 'Assistant:' turn in chosen"),
        (HH, HH | {"chosen": TRANSCRIPT + " a\n\nHuman: b"}, "the last turn of chosen is the human's"),
        (
            HH,
            {"chosen": TRANSCRIPT + " a", "rejected": TRANSCRIPT + " a" + TRANSCRIPT + " b"},
            "the transcripts differ before the last assistant turn",
        ),
        (HH, HH | {"chosen": "\n\nHuman: hi\n\nAssistant: "}, "empty chosen response"),
        (HH, HH | {"gold": TRANSCRIPT + " other"}, "gold has another prompt than chosen and rejected"),
        (SCORED, SCORED | {"responses": []}, "no response that isn't empty"),
        (SCORED, SCORED | {"responses": [{"text": " ", "score": 1}]}, "no response that isn't empty"),
        (
            SCORED,
            SCORED | {"prompt": [user("q")], "responses": [{"text": [user("x")], "score": 1}]},
            "the last turn of a response is not the assistant's",
        ),
        (
            SCORED,
            SCORED | {"responses": [{"text": "\ud83d", "score": 1}]},
            "a response holds half of a character (a lone surrogate)",
        ),
        (SCORED, SCORED | {"gold": 3}, "gold is neither text nor messages"),
        (UNPAIRED, UNPAIRED | {"label": None}, "no label"),
        (UNPAIRED, UNPAIRED | {"label": 2}, "label is neither true nor false"),
        (UNPAIRED, UNPAIRED | {"label": 0.5}, "label is neither true nor false"),
        (UNPAIRED, UNPAIRED | {"label": float("nan")}, "label is neither true nor false"),
        (UNPAIRED, UNPAIRED | {"label": "yes"}, "label is neither true nor false"),
        (UNPAIRED, UNPAIRED | {"label": ""}, "label is neither true nor false"),
        (UNPAIRED, UNPAIRED | {"label": [1]}, "label is neither true nor false"),
        (UNPAIRED, UNPAIRED | {"completion": None}, "no completion"),
        (UNPAIRED, UNPAIRED | {"completion": " "}, "empty completion response"),
        (
            UNPAIRED,
            UNPAIRED | {"prompt": [user("q")], "completion": [user("a")]},
            "the last turn of completion is not the assistant's",
        ),
        (SCORED, SCORED | {"responses": [{"text": "a"}, {"text": "b"}]}, "a response without text or score"),
        (SCORED, SCORED | {"responses": [{"text": None, "score": 1}]}, "a response that is not text"),
        (SCORED, SCORED | {"responses": None}, "responses is not a list"),
        (SCORED, SCORED | {"responses": [{"text": "a", "score": True}] * 2}, "score is not a number"),
        (SCORED, SCORED | {"responses": [{"text": "a", "score": float("nan")}] * 2}, "score is not a finite number"),
        (
            {"prompt": "q", "responses": ["a", "b"], "scores": [1, 2]},
            {"prompt": "q", "responses": ["a", "b"], "scores": [1]},
            "responses and scores are not equally many",
        ),
        ({"messages": TURNS[:2]}, {"messages": TURNS}, "the last turn of gold is not the assistant's"),
        ({"messages": TURNS[:2]}, {"messages": [assistant("a")]}, "empty prompt"),
        ({"messages": TURNS[:2]}, {"messages": "text"}, "messages is text, not a list of messages"),
    ],
)
def test_bad_rows_become_problems_with_a_reason(good, bad, reason):
    form = recognise([good, bad], where="d")
    assert isinstance(to_row(good, form, source="d", index=0), Row)
    problem = to_row(bad, form, source="d", index=3)
    assert problem == RowProblem(source="d", index=3, reason=reason)
    assert str(problem) == f"d, row 3: {reason}"


def test_transcripts_with_something_before_the_first_turn_have_no_messages():
    raw = {name: "note" + text for name, text in HH.items()}
    problem = converted(raw, as_chat=True, also=[HH])
    assert isinstance(problem, RowProblem)
    assert problem.reason == "text before the first 'Human:' turn"


@pytest.mark.parametrize(
    ("raw", "mapping"),
    [
        ({"question": "q", "better": "b", "worse": "w"}, "prompt: question, chosen: better, rejected: worse"),
        ({"instruction": "q", "chosen": "b", "lose": "w"}, "prompt: instruction, rejected: lose"),
        ({"Prompt": "q", "Chosen": "b", "Rejected": "w"}, "prompt: Prompt, chosen: Chosen, rejected: Rejected"),
        ({"prompt": "q", "choosen": "b", "rejected": "w"}, "chosen: choosen"),
        ({"preferred": "x b", "dispreferred": "x w"}, "chosen: preferred, rejected: dispreferred"),
        ({"query": "q", "answer": "a", "n": 3}, "prompt: query, completion: answer"),
        (
            {"query": "q", "answer": "a", "thumbs_up": True},
            "prompt: query, completion: answer, label: thumbs_up",
        ),
        ({"prompt": "q", "output": "a", "is_good": 1}, "completion: output, label: is_good"),
        ({"prompt": "q", "output": "a", "preference": None}, "completion: output, label: preference"),
        ({"question": "q", "answers": ["a", "b"], "ratings": [1, 2]}, "prompt: question, responses: answers, scores: "),
        ({"conversations": [user("q"), assistant("a")]}, "messages: conversations"),
    ],
)
def test_when_nothing_fits_the_error_shows_the_mapping_that_would(raw, mapping):
    with pytest.raises(DataError) as caught:
        recognise([raw], where="d")
    assert f"set data.columns: {{{mapping}" in str(caught.value)
    for column in raw:
        assert repr(column) in str(caught.value)


def test_when_nothing_fits_the_error_is_one_sentence():
    with pytest.raises(DataError) as caught:
        recognise([{"question": "q", "better": "b", "worse": "w"}], where="d.jsonl")
    assert str(caught.value) == (
        "d.jsonl: found columns 'question' (text), 'better' (text), 'worse' (text); expected prompt + chosen + "
        "rejected (or chosen + rejected that begin with the prompt; prompt + responses [{text, score}, …]; prompt + "
        "completion, with or without label; messages); set data.columns: {prompt: question, chosen: better, rejected: "
        "worse}"
    )


@pytest.mark.parametrize(
    ("raw", "part"),
    [
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "found columns 'prompt' (number), 'chosen' (text)"),
        ({"text_a": "x", "when": None, "ok": True}, "'when' (nothing), 'ok' (true/false)"),
        (
            {"a": {"b": 1}, "c": [{"from": "x", "value": "y"}], "d": []},
            "'a' ({b}), 'c' (list of {from, value}), 'd' (em",
        ),
        ("just text", "found no columns"),
    ],
)
def test_what_no_mapping_helps(raw, part):
    with pytest.raises(DataError) as caught:
        recognise([raw], where="d")
    assert part in str(caught.value)
    assert "set data.columns" not in str(caught.value)


def test_a_named_format_needs_its_columns():
    with pytest.raises(DataError, match=r"expected prompt \+ chosen \+ rejected, text or messages for format paired"):
        recognise([{"question": "q", "better": "b", "worse": "w"}], where="d", name="paired")
    implicit = recognise([HH], where="d", name="paired_implicit")
    assert implicit.name == "paired_implicit"


def test_a_dataset_whose_first_prompts_are_missing_is_not_taken_for_another_format():
    assert recognise([{"prompt": None, "chosen": "a b", "rejected": "a c"}], where="d").name == "paired"
