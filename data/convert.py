"""One raw row to prompt and responses: the content of each format, and what makes a row unusable.

Converters take a dictionary and return a ``Draft`` or raise ``RowError`` with a reason. Reasons name no content, so
that rows can be counted by them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from data.cells import RowError, is_text, label_in, mean_logp_in, number_in, rewards_in, text_in, turn
from objectives.rows import Candidate, Message, Text

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """The content of a row."""

    prompt: Text
    responses: Mapping[str, Text]
    scores: Mapping[str, float] = field(default_factory=dict)
    label: bool | None = None
    candidates: tuple[Candidate, ...] = ()


def paired(raw: Mapping[str, Any]) -> Draft:
    """``prompt``, ``chosen``, ``rejected``, each a string or messages.

    Strings next to messages are one turn: a prompt the user's, a response the assistant's. Responses written as whole
    conversations are cut after the prompt, or, if the prompt is a string equal to their first user turn, after the
    turns they share.
    """
    prompt, *_ = _texts(raw, "prompt")
    return Draft(**_joined(prompt, _responses(raw)), scores=_scores(raw))


def paired_implicit(raw: Mapping[str, Any]) -> Draft:
    """``chosen`` and ``rejected`` that begin with the same prompt.

    Of messages, the prompt is the turns both begin with, and what follows must be assistant turns. Of strings it is the
    longest common beginning, without a space at its end: the rule of TRL's ``extract_prompt``, which puts first
    *letters* that both responses happen to share into the prompt. Give a prompt column where you can.
    """
    responses = _responses(raw)
    chosen, rejected = responses["chosen"], responses["rejected"]
    if chosen == rejected:
        raise RowError("identical chosen and rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt = chosen[: _common_length(chosen, rejected)].removesuffix(" ")
        if not prompt.strip():
            raise RowError("chosen and rejected don't begin alike, so there is no prompt")
        return Draft(prompt=prompt, responses=_after(prompt, responses), scores=_scores(raw))
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise RowError("one of chosen and rejected is text and the other messages")
    return Draft(**_joined(_shared_turns([chosen, rejected]), responses), scores=_scores(raw))


def transcripts(raw: Mapping[str, Any]) -> Draft:
    """``chosen`` and ``rejected`` Anthropic HH transcripts, which differ in the last assistant turn only."""
    responses = _responses(raw)
    prompts = {}
    for name in ("chosen", "rejected"):
        text = responses[name]
        before, marker, after = text.rpartition(ASSISTANT) if isinstance(text, str) else ("", "", "")
        if not marker:
            raise RowError(f"no 'Assistant:' turn in {name}")
        if HUMAN in after:
            raise RowError(f"the last turn of {name} is the human's")
        prompts[name] = before + marker
    if prompts["chosen"] != prompts["rejected"]:
        raise RowError("the transcripts differ before the last assistant turn")
    prompt = prompts["chosen"]
    return Draft(prompt=prompt, responses=_after(prompt, responses), scores=_scores(raw))


def prompt_completion(raw: Mapping[str, Any]) -> Draft:
    """``prompt`` and ``completion``, strings or messages: the completion is the gold response."""
    prompt, completion = _texts(raw, "prompt", "completion")
    return Draft(**_joined(prompt, {"gold": completion}))


def unpaired(raw: Mapping[str, Any]) -> Draft:
    """``prompt`` and ``completion``, strings or messages, with a ``label``: whether the completion is desirable."""
    prompt, completion = _texts(raw, "prompt", "completion")
    return Draft(**_joined(prompt, {"completion": completion}), label=label_in(raw.get("label"), "label"))


def messages(raw: Mapping[str, Any]) -> Draft:
    """``messages``: what the assistant says last is the gold response, everything before it the prompt."""
    (conversation,) = _texts(raw, "messages")
    if isinstance(conversation, str):
        raise RowError("messages is text, not a list of messages")
    return Draft(**_joined(_shared_turns([conversation]), {"gold": conversation}))


def scored(raw: Mapping[str, Any]) -> Draft:
    """``prompt`` and ``responses`` with scores, which become candidates, best first and equal ones in their order.

    Responses are ``[{text, score}, …]``, or strings with a column ``scores`` beside. A response may have several
    rewards by name, ``{text, scores: {helpful: 1.2, harmless: −0.3}}``, all of them the same ones; without a score of
    its own they add up to it. ``mean_logp`` is the mean log-prob of its tokens under the policy that drew it. Empty
    responses are passed over. A gold response is the row's own only if it has a column for it.
    """
    (prompt,) = _texts(raw, "prompt")
    listed = [each for each in _listed(raw) if not _is_empty(each.text)]
    if not listed:
        raise RowError("no response that isn't empty")
    if any(each.rewards.keys() != listed[0].rewards.keys() for each in listed):
        raise RowError("the responses have different rewards")
    listed.sort(key=lambda each: -each.score)
    joined = _joined(prompt, {**{str(i): each.text for i, each in enumerate(listed)}, **_gold(raw)})
    texts = joined["responses"]
    return Draft(
        prompt=joined["prompt"],
        responses={"gold": texts["gold"]} if "gold" in texts else {},
        scores={leg: score for leg, score in _scores(raw).items() if leg in texts},
        candidates=tuple(replace(each, text=texts[str(i)]) for i, each in enumerate(listed)),
    )


def string_to_chat(draft: Draft) -> Draft:
    """Strings as a user's and an assistant's turn, without the space that joins plain text; messages as they are."""
    if isinstance(draft.prompt, tuple):
        return draft
    return replace(
        draft,
        prompt=(turn("user", draft.prompt),),
        responses={name: _spoken(text) for name, text in draft.responses.items()},
        candidates=tuple(replace(each, text=_spoken(each.text)) for each in draft.candidates),
    )


def _spoken(text: Text) -> Text:
    return (turn("assistant", text.removeprefix(" ")),) if isinstance(text, str) else text


def transcript_to_chat(draft: Draft) -> Draft:
    """An HH transcript as messages: Human is the user, Assistant the assistant, and white space around turns goes."""
    assert isinstance(draft.prompt, str)
    before, *parts = re.split(r"(?:\A\s*|\n\n)(Human|Assistant):", draft.prompt)
    if before.strip():
        raise RowError("text before the first 'Human:' turn")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [turn(roles[who], text.strip()) for who, text in zip(parts[::2], parts[1::2], strict=True)]
    responses = {name: (turn("assistant", str(text).strip()),) for name, text in draft.responses.items()}
    return Draft(
        prompt=tuple(turns[:-1]), responses=responses, scores=draft.scores
    )  # the last marker opens the response


def checked(draft: Draft) -> Draft:
    """The draft, if it can be trained on.

    Raises:
        RowError: an empty prompt or response, a prompt that ends or a response that doesn't end with the assistant,
            identical chosen and rejected.
    """
    if not draft.prompt or (isinstance(draft.prompt, str) and not draft.prompt.strip()):
        raise RowError("empty prompt")
    if isinstance(draft.prompt, tuple) and draft.prompt[-1]["role"] == "assistant":
        raise RowError("the prompt ends with an assistant turn")
    candidates = [("a response", candidate.text) for candidate in draft.candidates]
    for name, response in [*draft.responses.items(), *candidates]:
        if isinstance(response, tuple):
            if not response or response[-1]["role"] != "assistant":
                raise RowError(f"the last turn of {name} is not the assistant's")
            if not all(message["role"] in ("assistant", "tool") for message in response):
                raise RowError(f"{name} holds user or system turns after the prompt")
        if _is_empty(response):
            raise RowError(f"empty {name} response")
    if "rejected" in draft.responses and draft.responses["chosen"] == draft.responses["rejected"]:
        raise RowError("identical chosen and rejected")
    return draft


def _is_empty(response: Text) -> bool:
    if isinstance(response, str):
        return not response.strip()
    return not any(message.get("content", "").strip() or message.get("tool_calls") for message in response)


def _responses(raw: Mapping[str, Any]) -> dict[str, Text]:
    """Chosen and rejected; gold where the row has it."""
    chosen, rejected = _texts(raw, "chosen", "rejected")
    return {"chosen": chosen, "rejected": rejected, **_gold(raw)}


def _gold(raw: Mapping[str, Any]) -> dict[str, Text]:
    """The response in the column gold, or else in the column reference."""
    if raw.get("gold") is not None:
        return {"gold": text_in(raw["gold"], "gold")}
    # A column called reference may hold anything (sources, numbers): it is gold only where it is text or messages.
    reference = raw.get("reference")
    return {"gold": text_in(reference, "gold")} if is_text(reference) else {}


def _texts(raw: Mapping[str, Any], *columns: str) -> list[Text]:
    return [text_in(raw.get(column), column) for column in columns]


def _joined(prompt: Text, responses: Mapping[str, Text]) -> dict[str, Any]:
    """Prompt and responses both as strings or both as messages."""
    if isinstance(prompt, str):
        if all(isinstance(text, str) for text in responses.values()):
            return {"prompt": prompt, "responses": dict(responses)}
        whole = [text for text in responses.values() if isinstance(text, tuple) and _first_user(text) is not None]
        if any(str(_first_user(text)).strip() != prompt.strip() for text in whole):
            raise RowError("the prompt is not the first user turn of the responses")
        prompt = _shared_turns(whole) if whole else (turn("user", prompt),)
    cut: dict[str, Text] = {}
    for name, response in responses.items():
        if isinstance(response, str):
            response = (turn("assistant", response),)
        cut[name] = response[len(prompt) :] if response[: len(prompt)] == prompt else response
    return {"prompt": prompt, "responses": cut}


def _first_user(conversation: Sequence[Message]) -> str | None:
    return next((message.get("content", "") for message in conversation if message["role"] == "user"), None)


def _shared_turns(conversations: Sequence[tuple[Message, ...]]) -> tuple[Message, ...]:
    """The turns all conversations begin with, up to where the assistant begins to answer for the last time."""
    length = min(_common_length(*conversations), *(len(conversation) - 1 for conversation in conversations))
    while length and conversations[0][length - 1]["role"] == "assistant":
        length -= 1
    return conversations[0][:length]


def _common_length(*sequences: Sequence[Any]) -> int:
    """How many leading entries are the same in all sequences."""
    for i, entries in enumerate(zip(*sequences, strict=False)):
        if any(entry != entries[0] for entry in entries):
            return i
    return min(map(len, sequences))


def _after(prompt: str, responses: Mapping[str, Text]) -> dict[str, Text]:
    """What follows the prompt; a gold response may also be written without it."""
    cut: dict[str, Text] = {}
    for name, text in responses.items():
        if not isinstance(text, str):
            raise RowError(f"{name} is messages next to text")
        if not text.startswith(prompt) and text.startswith(HUMAN):
            raise RowError(f"{name} has another prompt than chosen and rejected")
        cut[name] = text.removeprefix(prompt)
    return cut


def _listed(raw: Mapping[str, Any]) -> list[Candidate]:
    responses, scores = raw.get("responses"), raw.get("scores")
    if not isinstance(responses, list):
        raise RowError("responses is not a list")
    if scores is None:
        entries = [entry if isinstance(entry, Mapping) else {} for entry in responses]
    else:
        if not isinstance(scores, list) or len(scores) != len(responses):
            raise RowError("responses and scores are not equally many")
        entries = [{"text": text, "score": score} for text, score in zip(responses, scores, strict=True)]
    if not all("text" in entry and {"score", "scores"} & entry.keys() for entry in entries):
        raise RowError("a response without text or score")
    if not all(is_text(entry["text"]) for entry in entries):
        raise RowError("a response that is not text")
    return [_candidate(entry) for entry in entries]


def _candidate(entry: Mapping[str, Any]) -> Candidate:
    text, score = text_in(entry["text"], "a response"), entry.get("score")
    rewards = rewards_in(entry.get("scores"), "a reward")
    number = math.fsum(rewards.values()) if score is None and rewards else number_in(score, "score")
    return Candidate(text=text, score=number, rewards=rewards, mean_logp=mean_logp_in(entry.get("mean_logp")))


def _scores(raw: Mapping[str, Any]) -> dict[str, float]:
    """Scores by leg, from ``score_chosen`` or ``chosen_score`` and the like.

    A ``margin`` alone, by which chosen is better, is a score of that much against 0.
    """
    found: dict[str, float] = {}
    for leg in ("chosen", "rejected", "gold"):
        for column in (f"score_{leg}", f"{leg}_score"):
            if raw.get(column) not in (None, ""):  # CSV has no other way to leave a score out
                found[leg] = number_in(raw[column], column)
    if not found and raw.get("margin") not in (None, ""):
        return {"chosen": number_in(raw["margin"], "margin"), "rejected": 0.0}
    return found
