"""Where responses begin, how they end, what is cut, and that all of it is counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import DataError
from data.tokens import MIN_RESPONSE_ROOM, TRUNCATIONS, TokenPolicy, TokenStats, require_legs, tokenize_rows
from objectives.rows import Row
from tests.data.byte_level import BOS, EOS, IM_END, SPECIAL, byte_level

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
UNENDED = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
THINKING = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]<think>' }}{% endif %}"
)
PAIR = ("chosen", "rejected")


def row(prompt="ask:", chosen=" yes", rejected=" no", index=0, **more) -> Row:
    responses = {"chosen": chosen, "rejected": rejected, **more}
    return Row(prompt=prompt, responses=responses, source="d", index=index)


def chat(chosen="yes", rejected="no", **more) -> Row:
    said = {"chosen": chosen, "rejected": rejected, **more}
    return Row(
        prompt=({"role": "user", "content": "ask"},),
        responses={name: ({"role": "assistant", "content": text},) for name, text in said.items()},
        source="d",
    )


def tokenize(rows, tokenizer, *, max_length=1000, truncation="truncate_response_end", legs=PAIR):
    rows = [rows] if isinstance(rows, Row) else rows
    return tokenize_rows(rows, tokenizer, TokenPolicy(max_length=max_length, truncation=truncation), legs)


def only(rows, tokenizer, **options):
    """The one row that must be kept, as text, and what was counted."""
    kept, dropped, stats = tokenize(rows, tokenizer, **options)
    assert dropped == []
    (token_row,) = kept
    prompt = tokenizer.decode(token_row.prompt)
    return prompt, {name: tokenizer.decode(tokens) for name, tokens in token_row.legs.items()}, stats


def reason(rows, tokenizer, **options) -> str:
    """Why the one row is dropped. Nothing is counted of rows that are not trained on."""
    kept, dropped, stats = tokenize(rows, tokenizer, **options)
    assert kept == []
    assert stats == TokenStats()
    ((source, index, why),) = [(lost.source, lost.index, lost.reason) for lost in dropped]
    assert (source, index) == ("d", 0)
    return why


# Boundaries


def test_plain_text_is_split_where_the_prompt_ends():
    prompt, legs, stats = only(row(), byte_level())
    assert (prompt, legs) == ("ask:", {"chosen": " yes</s>", "rejected": " no</s>"})
    assert stats == TokenStats(terminator_added=Counter({"chosen": 1, "rejected": 1}))


def test_a_merge_across_the_boundary_moves_it_left_for_all_legs_and_is_counted():
    """``:`` and `` `` become one token in one response only; the other must not keep the longer prompt."""
    tokenizer = byte_level(merges=[(":", "Ġ")])
    prompt, legs, stats = only(row(rejected="no"), tokenizer)
    assert (prompt, legs) == ("ask", {"chosen": ": yes</s>", "rejected": ":no</s>"})
    assert stats.boundary_mismatches == 1


def test_a_merge_in_a_leg_that_is_not_wanted_moves_nothing():
    tokenizer = byte_level(merges=[(":", "Ġ")])
    prompt, _, stats = only(row(chosen="yes", rejected="no", gold=" maybe"), tokenizer)
    assert (prompt, stats.boundary_mismatches) == ("ask:", 0)


def test_a_template_that_renders_the_answered_prompt_differently_moves_the_boundary_left():
    prompt, legs, stats = only(chat(), byte_level(template=THINKING))
    assert (prompt, legs["chosen"]) == ("[user]ask</s>[assistant]", "yes</s>")
    assert stats.boundary_mismatches == 1


def test_responses_that_begin_alike_stay_responses():
    prompt, legs, _ = only(row(chosen=" yes", rejected=" yet"), byte_level())
    assert (prompt, legs) == ("ask:", {"chosen": " yes</s>", "rejected": " yet</s>"})


def test_three_legs_share_one_prompt_and_keep_their_order():
    kept, _, _ = tokenize(row(gold=" perhaps"), byte_level(), legs=("gold", "chosen", "rejected"))
    assert list(kept[0].legs) == ["gold", "chosen", "rejected"]
    assert len(kept[0].prompt) == 4
    assert kept[0].shared_length == 4 + 9 + 5 + 4
    assert kept[0].longest == 4 + 9


def test_one_leg_alone():
    kept, dropped, _ = tokenize(row(), byte_level(), legs=("chosen",))
    assert (list(kept[0].legs), dropped) == (["chosen"], [])


def test_a_prompt_of_which_no_token_is_left_is_dropped():
    assert reason(row(prompt="", chosen="yes"), byte_level()) == "no prompt token is shared by all responses"
    merged = byte_level(merges=[("a", "b")])
    assert reason(row(prompt="a", chosen="b", rejected="c"), merged) == "no prompt token is shared by all responses"


def test_an_empty_prompt_is_the_beginning_of_text_where_a_tokenizer_has_one():
    prompt, legs, _ = only(row(prompt="", chosen="yes", rejected="no"), byte_level(adds_bos=True))
    assert (prompt, legs["chosen"]) == ("<s>", "yes</s>")


# Beginnings: one token, never before a response


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        (byte_level(adds_bos=True), row()),
        (byte_level(adds_bos=True, adds_eos=True), row()),
        (byte_level(adds_bos=True, template=LLAMA3), chat()),  # the template writes it, and the tokenizer would again
        (byte_level(adds_bos=True), chat()),  # the fallback template writes it
    ],
    ids=["plain", "plain with both", "template", "fallback"],
)
def test_the_beginning_of_text_stands_once_and_before_no_response(tokenizer, text):
    (token_row,), _, stats = tokenize(text, tokenizer)
    assert token_row.prompt[0] == BOS
    assert token_row.prompt.count(BOS) == 1
    assert all(BOS not in tokens for tokens in token_row.legs.values())
    assert stats.bos_removed == 0


def test_text_that_brings_its_own_beginning_does_not_get_a_second():
    prompt, legs, stats = only(row(prompt="<s>ask:"), byte_level(adds_bos=True))
    assert (prompt, legs["chosen"]) == ("<s>ask:", " yes</s>")
    assert stats.bos_removed == 1


def test_templates_and_tokenizers_without_a_beginning_get_none():
    for tokenizer, text in ((byte_level(), row()), (byte_level(adds_bos=True, template=CHATML), chat())):
        (token_row,), _, _ = tokenize(text, tokenizer)
        assert BOS not in token_row.prompt


def test_one_token_may_be_both_beginning_and_end():
    """As in OPT: the token before every text also ends a response."""
    tokenizer = byte_level(adds_bos=True, eos_token="<s>")
    prompt, legs, stats = only(row(), tokenizer)
    assert (prompt, legs["chosen"], stats.boundary_mismatches) == ("<s>ask:", " yes<s>", 0)


# Ends: exactly one token, the last


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_tokenizer_that_closes_every_text_closes_responses_once_and_prompts_never(adds_bos):
    prompt, legs, stats = only(row(), byte_level(adds_bos=adds_bos, adds_eos=True))
    assert prompt == "<s>" * adds_bos + "ask:"
    assert legs == {"chosen": " yes</s>", "rejected": " no</s>"}
    assert stats == TokenStats(), "nothing had to be changed"


@pytest.mark.parametrize("adds_eos", [False, True])
def test_a_prompt_that_ends_with_the_end_token_keeps_it(adds_eos):
    prompt, legs, stats = only(row(prompt="ask</s>"), byte_level(adds_eos=adds_eos))
    assert (prompt, legs["chosen"], stats.boundary_mismatches) == ("ask</s>", " yes</s>", 0)


def test_text_that_brings_its_own_end_does_not_get_a_second():
    _, legs, stats = only(row(chosen=" yes</s>", rejected=" no</s></s>"), byte_level())
    assert legs == {"chosen": " yes</s>", "rejected": " no</s>"}
    assert stats == TokenStats(tail_removed=Counter({"rejected": 1}))
    _, legs, stats = only(row(chosen=" yes</s>"), byte_level(adds_eos=True))
    assert legs == {"chosen": " yes</s>", "rejected": " no</s>"}
    assert stats == TokenStats(tail_removed=Counter({"chosen": 1}))


def test_what_a_template_writes_after_the_end_token_is_not_trained_on():
    tokenizer = byte_level(template=CHATML, eos_token="<|im_end|>")
    prompt, legs, stats = only(chat(), tokenizer)
    assert prompt == "<|im_start|>user\nask<|im_end|>\n<|im_start|>assistant\n"
    assert legs == {"chosen": "yes<|im_end|>", "rejected": "no<|im_end|>"}
    assert stats == TokenStats(tail_removed=Counter({"chosen": 1, "rejected": 1}))


def test_an_end_token_in_the_message_and_in_the_template_is_one():
    tokenizer = byte_level(template=CHATML, eos_token="<|im_end|>")
    _, legs, _ = only(chat(chosen="yes<|im_end|>"), tokenizer)
    assert legs["chosen"] == "yes<|im_end|>"


def test_a_template_without_an_end_gets_one():
    prompt, legs, stats = only(chat(), byte_level(template=UNENDED))
    assert (prompt, legs) == ("[user]ask[assistant]", {"chosen": "yes</s>", "rejected": "no</s>"})
    assert stats == TokenStats(terminator_added=Counter({"chosen": 1, "rejected": 1}))


def test_newlines_of_a_response_without_an_end_are_its_own():
    _, legs, _ = only(chat(chosen="yes\n"), byte_level(template=UNENDED))
    assert legs["chosen"] == "yes\n</s>"


def test_turns_within_a_response_keep_their_ends():
    turns = (
        {"role": "assistant", "content": "call"},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "It is 42."},
    )
    text = Row(prompt=({"role": "user", "content": "ask"},), responses={"gold": turns}, source="d")
    (token_row,), _, _ = tokenize(text, byte_level(template=CHATML, eos_token="<|im_end|>"), legs=("gold",))
    assert token_row.legs["gold"].count(IM_END) == 3
    assert token_row.legs["gold"][-1] == IM_END


def test_an_end_token_within_plain_text_drops_the_row():
    """A model would learn to stop there, and what follows could never be sampled."""
    assert (
        reason(row(rejected=" n</s>o"), byte_level()) == "the rejected response contains the end token before its end"
    )


def test_without_an_end_token_nothing_could_end():
    with pytest.raises(DataError, match=r"has no end token.*set model\.eos_token"):
        tokenize(row(), byte_level(eos_token=None))


# What can't be trained on


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_level(adds_bos=True, adds_eos=True)])
@pytest.mark.parametrize("leg", PAIR)
@pytest.mark.parametrize("text", ["", "</s>"])
def test_empty_responses_are_dropped(tokenizer, leg, text):
    assert reason(row(**{leg: text}), tokenizer) == f"empty {leg} response"


@pytest.mark.parametrize("template", [CHATML, UNENDED])
def test_empty_messages_are_dropped(template):
    assert reason(chat(chosen=""), byte_level(template=template, eos_token="<|im_end|>")) == "empty chosen response"


def test_equal_responses_are_dropped():
    assert reason(row(chosen=" no"), byte_level()) == "chosen and rejected are the same tokens"
    assert reason(row(chosen=" no</s>"), byte_level()) == "chosen and rejected are the same tokens"


def test_equal_responses_do_not_matter_to_whom_needs_one():
    assert tokenize(row(chosen=" no"), byte_level(), legs=("chosen",))[1] == []


def test_a_missing_leg_is_named_before_anything_is_tokenised():
    rows = [row(), Row(prompt="p", responses={"chosen": "c"}, source="d", index=7)]
    with pytest.raises(DataError) as caught:
        require_legs(rows, PAIR)
    assert str(caught.value) == "d, row 7: the objective needs a rejected response and this row has only chosen"
    with pytest.raises(DataError, match="row 7"):
        tokenize(rows, None)


def test_labels_and_groups_stay_with_their_rows():
    rows = [replace(row(), label=True, group="g"), row(), replace(row(), label=False)]
    kept, _, _ = tokenize(rows, byte_level())
    assert [(each.label, each.group) for each in kept] == [(True, "g"), (None, ""), (False, "")]


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_a_long_mismatched_response_is_cut_and_decides_nothing(truncation):
    """It belongs to another row: its length must not drop this one, nor cost it prompt tokens."""
    rows = [row("ask: " * 4, " fine", mismatched=" m" * 40)]
    kept, dropped, stats = tokenize(
        rows, byte_level(), max_length=30, truncation=truncation, legs=("chosen", "mismatched")
    )
    assert dropped == []
    assert (len(kept[0].prompt), len(kept[0].legs["chosen"]), len(kept[0].legs["mismatched"])) == (20, 6, 10)
    assert stats.truncated == {"mismatched": 1}


# Truncation. Prompt "ask:" is 4 tokens unless said otherwise; responses count their end token.


def test_what_fits_exactly_is_not_cut():
    for truncation in TRUNCATIONS:
        kept, dropped, stats = tokenize(row(), byte_level(), max_length=4 + 5, truncation=truncation)
        assert (len(kept), dropped, stats.truncated) == (1, [], {}), truncation


def test_the_end_of_each_response_is_cut_alone():
    _, legs, stats = only(row(chosen="c" * 30, rejected="r" * 15), byte_level(), max_length=20)
    assert legs == {"chosen": "c" * 16, "rejected": "r" * 15 + "</s>"}
    assert stats.truncated == stats.terminator_lost == {"chosen": 1}
    assert stats.tokens_lost == {"chosen": 15}


def test_both_responses_are_held_to_the_same_length():
    _, legs, stats = only(row(chosen="c" * 30, rejected="r" * 40), byte_level(), max_length=20)
    assert legs == {"chosen": "c" * 16, "rejected": "r" * 16}
    assert stats.tokens_lost == {"chosen": 15, "rejected": 25}


def test_counts_add_up_over_rows():
    rows = [row(chosen="c" * n, index=n) for n in (30, 5, 40)]
    _, _, stats = tokenize(rows, byte_level(), max_length=20)
    assert (stats.truncated, stats.tokens_lost) == ({"chosen": 2}, {"chosen": 15 + 25})


def test_a_cut_response_needs_room():
    """One token less than the room, and the row is dropped; with the room it is kept."""
    text = row(chosen="c" * 30, rejected="r" * 40)
    assert len(tokenize(text, byte_level(), max_length=4 + MIN_RESPONSE_ROOM)[0]) == 1
    assert reason(text, byte_level(), max_length=3 + MIN_RESPONSE_ROOM) == (
        "the prompt leaves fewer than 16 response tokens"
    )
    assert reason(text, byte_level(), max_length=2) == "the prompt leaves fewer than 16 response tokens"


def test_the_start_of_the_prompt_is_cut_behind_its_first_token():
    long = "".join(chr(ord("a") + i % 26) for i in range(60))
    tokenizer = byte_level(adds_bos=True)
    prompt, legs, stats = only(
        row(prompt=long, chosen="c" * 20, rejected="no"), tokenizer, max_length=40, truncation="truncate_prompt_start"
    )
    assert legs == {"chosen": "c" * 20 + "</s>", "rejected": "no</s>"}
    assert prompt == "<s>" + long[-18:]
    assert stats.truncated == {"prompt": 1}
    assert stats.tokens_lost == {"prompt": 60 - 18}
    assert stats.terminator_lost == {}


def test_short_responses_need_no_more_room_than_they_take():
    prompt, legs, _ = only(row(prompt="p" * 60), byte_level(), max_length=40, truncation="truncate_prompt_start")
    assert (len(prompt), legs) == (35, {"chosen": " yes</s>", "rejected": " no</s>"})


def test_responses_longer_than_everything_are_cut_after_the_prompt_is():
    prompt, legs, stats = only(
        row(chosen="c" * 60), byte_level(adds_bos=True), max_length=40, truncation="truncate_prompt_start"
    )
    assert (prompt, legs["chosen"]) == ("<s>", "c" * 39)
    assert stats.tokens_lost == {"prompt": 4, "chosen": 61 - 39}


def test_drop_drops():
    assert reason(row(chosen="c" * 30), byte_level(), max_length=20, truncation="drop") == "longer than max_length"


def test_raise_raises():
    with pytest.raises(DataError) as caught:
        tokenize(row(chosen="c" * 30), byte_level(), max_length=20, truncation="raise")
    assert str(caught.value) == (
        "d, row 0: 4 prompt and 31 response tokens exceed data.max_length 20; raise data.max_length or set "
        "data.truncation to truncate_response_end, truncate_prompt_start or drop"
    )


def test_responses_that_differ_only_in_what_was_cut_are_dropped():
    text = row(chosen="x" * 40 + "a", rejected="x" * 40 + "b")
    assert reason(text, byte_level(), max_length=30) == "chosen and rejected are the same tokens after truncation"
    assert len(tokenize(text, byte_level())[0]) == 1


def test_a_character_may_be_cut_but_no_token():
    """Cuts are made on ids: what is left is a prefix of the ids, however it decodes."""
    (whole,), _, _ = tokenize(row(chosen="é" * 30), byte_level())
    (cut,), _, _ = tokenize(row(chosen="é" * 30), byte_level(), max_length=4 + 17)
    assert cut.legs["chosen"] == whole.legs["chosen"][:17]


# Properties

texts = st.text(st.characters(codec="utf-8"), max_size=30).filter(lambda t: not any(s in t for s in SPECIAL))
tokenizers = st.sampled_from(
    [
        byte_level(adds_bos=bos, adds_eos=eos, merges=merges)
        for bos in (False, True)
        for eos in (False, True)
        for merges in ((), [("a", "b"), ("Ġ", "a"), ("0", "0")])
    ]
)


@pytest.mark.slow
@given(texts, texts, texts, tokenizers)
def test_a_kept_row_decodes_to_its_text(prompt, chosen, rejected, tokenizer):
    kept, dropped, _ = tokenize(row(prompt, chosen, rejected), tokenizer)
    assert len(kept) + len(dropped) == 1
    for token_row in kept:
        for name, text in (("chosen", chosen), ("rejected", rejected)):
            ids = [*token_row.prompt, *token_row.legs[name]]
            assert ids[-1] == EOS
            assert ids.count(EOS) == 1
            assert tokenizer.decode([i for i in ids if i not in (BOS, EOS)]) == prompt + text


@given(
    st.lists(st.tuples(texts, texts, texts), max_size=8),
    tokenizers,
    st.integers(2, 40),
    st.sampled_from([t for t in TRUNCATIONS if t != "raise"]),
    st.integers(1, 9),
)
def test_nothing_is_lost_and_everything_fits(contents, tokenizer, max_length, truncation, batch):
    rows = [row(*content, index=i) for i, content in enumerate(contents)]
    policy = TokenPolicy(max_length=max_length, truncation=truncation)
    kept, dropped, stats = tokenize_rows(rows, tokenizer, policy, PAIR, batch)
    assert sorted(r.index for r in [*kept, *dropped]) == list(range(len(rows)))
    assert all(r.longest <= max_length and all(r.legs.values()) and r.prompt for r in kept)
    whole, _, _ = tokenize_rows(rows, tokenizer, TokenPolicy(max_length=10**6), PAIR)
    full = {r.index: r for r in whole}
    lost = sum(full[r.index].shared_length - r.shared_length for r in kept)
    assert lost == sum(stats.tokens_lost.values())
