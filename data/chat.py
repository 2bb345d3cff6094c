"""Rows to the text a model reads: chat templates for messages, plain concatenation for strings."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from data.errors import DataError
from objectives.rows import Message, Row, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FALLBACK_TEMPLATE = (
    "{% if bos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}"
    # As an expression: block trimming would eat a newline that follows a tag.
    "{% if not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] or '' }}"
    "{% if message['role'] == 'assistant' and eos_token %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nAssistant:' }}{% endif %}"
)
"""For tokenizers without a template: ``User: …`` and ``Assistant: …`` lines, an end token after the assistant's. Like
other templates it writes the beginning-of-text token itself, where the tokenizer has one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """One row as text."""

    prompt: str
    """What all responses follow; of messages, it ends with the template's opening of an assistant turn."""
    full: Mapping[str, str]
    """Prompt and response by leg, as the model reads them. Where the response begins is found on token ids."""
    chat: bool
    """Whether a template wrote it. Such text holds its own special tokens: encode it with
    ``add_special_tokens=False``."""

    @property
    def prompt_is_prefix(self) -> bool:
        """Whether every leg's text begins with the prompt's. A template may render a last turn differently."""
        return all(text.startswith(self.prompt) for text in self.full.values())


def render(row: Row, tokenizer: PreTrainedTokenizerBase | None) -> Rendered:
    """Writes a row as text. Plain text takes no tokenizer.

    A prompt of messages must end with a turn of someone other than the assistant: a response that continues an opened
    turn has no template-independent rendering, since templates strip and close turns as they like.

    Raises:
        DataError: strings are mixed with messages, the prompt ends with an assistant turn, or the template refuses.
    """
    if isinstance(row.prompt, str):
        full = {name: row.prompt + _plain(response, row) for name, response in row.responses.items()}
        return Rendered(prompt=row.prompt, full=full, chat=False)
    if not row.prompt or row.prompt[-1]["role"] == "assistant":
        raise DataError(
            f"{row.where}: the prompt must end with a turn that the assistant answers; move a last assistant turn into "
            "the responses"
        )
    assert tokenizer is not None, "a chat template is a tokenizer's"
    prompt = _apply(row.prompt, row, tokenizer, add_generation_prompt=True)
    full = {
        name: _apply((*row.prompt, *_turns(response, row)), row, tokenizer) for name, response in row.responses.items()
    }
    return Rendered(prompt=prompt, full=full, chat=True)


def chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template, or the plain fallback."""
    return tokenizer.get_chat_template() if tokenizer.chat_template else FALLBACK_TEMPLATE


def template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the template that ``render`` uses, in hex."""
    return hashlib.sha256(chat_template(tokenizer).encode()).hexdigest()


def _apply(
    messages: tuple[Message, ...], row: Row, tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool = False
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=chat_template(tokenizer),
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
    except (TemplateError, TypeError) as error:  # a template's raise_exception, or its use of what a message lacks
        why = " ".join(str(error).split()).rstrip(".")
        raise DataError(
            f"{row.where}: the chat template refuses this conversation ({why}); leave the row out, or give another "
            "template with model.chat_template"
        ) from error
    assert isinstance(text, str)
    return text


def _plain(response: Text, row: Row) -> str:
    if not isinstance(response, str):
        raise DataError(f"{row.where}: the prompt is text and a response is messages; write both alike")
    return response


def _turns(response: Text, row: Row) -> tuple[Message, ...]:
    if isinstance(response, str):
        raise DataError(f"{row.where}: the prompt is messages and a response is text; write both alike")
    return response
