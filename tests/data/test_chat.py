"""Rendering with real tokenizers: a byte-level BPE trained on a few sentences, with and without a chat template."""

from __future__ import annotations

import hashlib

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data.chat import FALLBACK_TEMPLATE, Rendered, render, template_fingerprint
from data.errors import DataError
from objectives.rows import Row

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] }}{% endfor %}"
)
THINKING = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"

PROMPT = ({"role": "user", "content": "What is 2+2?"},)
YES, NO = ({"role": "assistant", "content": "It is 4."},), ({"role": "assistant", "content": "5\n"},)
CHAT = Row(prompt=PROMPT, responses={"chosen": YES, "rejected": NO}, source="d", index=4)


def tokenizer(template=None, **tokens) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>", "</s>", "<|im_end|>"]
    )
    backend.train_from_iterator(["What is 2+2? It is 4.", "User: hi\nAssistant: hello"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **tokens)


def test_strings_are_put_together_as_they_are():
    row = Row(prompt="2+2 is", responses={"chosen": " 4", "gold": " four"})
    assert render(row, tokenizer(CHATML)) == Rendered(
        prompt="2+2 is", full={"chosen": "2+2 is 4", "gold": "2+2 is four"}, chat=False
    )


def test_messages_are_rendered_with_the_models_template():
    rendered = render(CHAT, tokenizer(CHATML))
    assert rendered.prompt == "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert rendered.full["chosen"] == rendered.prompt + "It is 4.<|im_end|>\n"
    assert rendered.full["rejected"] == rendered.prompt + "5\n<|im_end|>\n"
    assert rendered.chat
    assert rendered.prompt_is_prefix


def test_the_fallback_template_is_plain():
    prompt = ({"role": "system", "content": "Be brief."}, *PROMPT, *YES, {"role": "user", "content": "And 3+3?"})
    row = Row(prompt=prompt, responses={"gold": ({"role": "assistant", "content": "6"},)})
    rendered = render(row, tokenizer(bos_token="<s>", eos_token="</s>"))
    assert rendered.prompt == (
        "<s>System: Be brief.\nUser: What is 2+2?\nAssistant: It is 4.</s>\nUser: And 3+3?\nAssistant:"
    )
    assert rendered.full == {"gold": rendered.prompt + " 6</s>"}
    assert render(row, tokenizer()).prompt == rendered.prompt.replace("<s>", "").replace("</s>", "")


def test_template_text_encodes_to_one_of_each_special_token():
    made = tokenizer(bos_token="<s>", eos_token="</s>")
    ids = made(render(CHAT, made).full["chosen"], add_special_tokens=False)["input_ids"]
    assert ids.count(made.bos_token_id) == ids.count(made.eos_token_id) == 1
    assert (ids[0], ids[-1]) == (made.bos_token_id, made.eos_token_id)


def test_it_is_told_when_the_prompt_is_no_prefix():
    rendered = render(CHAT, tokenizer(THINKING))
    assert rendered.prompt == "[What is 2+2?]<think>"
    assert rendered.full["chosen"] == "[What is 2+2?][It is 4.]"
    assert not rendered.prompt_is_prefix


def test_turns_with_tool_calls_render_without_content():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    answer = {"role": "tool", "content": "4"}
    row = Row(prompt=(*PROMPT, call, answer), responses={"gold": YES})
    assert render(row, tokenizer()).full["gold"].endswith("\nAssistant: \nTool: 4\nAssistant: It is 4.")


def test_rows_are_not_changed():
    before = (CHAT.prompt, dict(CHAT.responses))
    render(CHAT, tokenizer(CHATML))
    assert (CHAT.prompt, dict(CHAT.responses)) == before


@pytest.mark.parametrize(
    ("row", "template", "part"),
    [
        (
            Row(prompt=(*PROMPT, *YES), responses={"gold": NO}, source="d"),
            CHATML,
            "must end with a turn that the assist",
        ),
        (Row(prompt=(), responses={"gold": NO}, source="d"), CHATML, "d, row 0: the prompt must end"),
        (
            Row(prompt="text", responses={"gold": NO}, source="d"),
            CHATML,
            "the prompt is text and a response is messages",
        ),
        (
            Row(prompt=PROMPT, responses={"gold": "x"}, source="d"),
            CHATML,
            "the prompt is messages and a response is text",
        ),
        (
            Row(prompt=PROMPT * 2, responses={"gold": NO}, source="d"),
            STRICT,
            "refuses this conversation (roles must alt",
        ),
        (
            Row(prompt=PROMPT, responses={"gold": ({"role": "assistant"},)}, source="d"),
            CHATML,
            "d, row 0: the chat temp",
        ),
    ],
)
def test_what_can_not_be_rendered_is_named(row, template, part):
    with pytest.raises(DataError) as caught:
        render(row, tokenizer(template))
    assert part in str(caught.value)


def test_the_fingerprint_is_the_templates():
    assert template_fingerprint(tokenizer(CHATML)) == hashlib.sha256(CHATML.encode()).hexdigest()
    assert template_fingerprint(tokenizer()) == hashlib.sha256(FALLBACK_TEMPLATE.encode()).hexdigest()
    assert template_fingerprint(tokenizer(CHATML + " ")) != template_fingerprint(tokenizer(CHATML))
