"""A tokenizer as rows need it: text to ids, by the shortest way, in this process or in a worker."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


CUT = re.compile(r"[A-Za-z](?= [A-Za-z])")
"""Ends where a word does, before the space and the next: byte-level tokenizers end a token there, whatever else the
text holds."""
LAST_CUT = re.compile(rf".*{CUT.pattern}", re.DOTALL)
REACH = 200
"""Characters at the end of a prompt in which such a place is looked for."""
CLASSES = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]")
"""Sets of characters in a pattern; in them nothing is an anchor."""
UNSURE = re.compile(r"\\[bBAGZzK]|\(\?[<=!]|[\^$]")
"""What makes the rest of a pattern look around, or at where the text begins and ends."""
AT_SPACES = r"\s+(?!\S)"
"""The exception: it looks behind a run of spaces, never behind a word."""
PROBE = (
    "It's a Test of we'll THEY'RE x Y z aB cD, 12 apples cost 3.50 each (or so) and\n\nHuman: what do\tyou  mean by it?"
    " I don't know a thing... Café cafe\u0301 naïve 你好 ok then yes рус no https://a.b/c d \n  def f(x): return x if"
    " y else None  # done now\r\n\r\nAssistant: sure thing"
)


class Codec:
    """Encodes texts as ``tokenizer(texts)`` does.

    Half of what that call takes goes into masks and offsets that nobody here reads, so a tokenizer of the library
    ``tokenizers`` is asked itself, unless its class does something of its own. Pickled, that one comes along; the whole
    tokenizer, whose import takes a second, comes as bytes and is made where a chat template is rendered.

    Texts that begin alike, such as a prompt and the same with each of its responses, are not encoded from their
    beginning each: they are cut between two words, what comes before is encoded once, and the ids are put together.
    That gives the same ids where no token spans such a place and no rule looks back over it. It is done for byte-level
    BPE, when the pattern that divides words says so and all cuts through a text made for it agree.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.eos: Any = tokenizer.eos_token_id
        self.bos: Any = tokenizer.bos_token_id
        self._tokenizer: PreTrainedTokenizerBase | None = tokenizer
        self._raw = b""
        self._backend: Any = tokenizer.backend_tokenizer if _is_plain(tokenizer) else None  # type: ignore[attr-defined]
        self._split_special = bool(getattr(tokenizer, "split_special_tokens", False))
        self._around = self._specials() if self._backend is not None and _may_be_cut(self._backend) else None
        if self._around is not None and not self._agrees():
            self._around = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that this was made of."""
        if self._tokenizer is None:
            self._tokenizer = pickle.loads(self._raw)
        assert self._tokenizer is not None
        return self._tokenizer

    def encode(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        """Token ids of every text, with the special tokens that the tokenizer adds where these are wanted."""
        if not texts:
            return []
        if self._backend is None:
            # Not verbose: what is longer than the context is cut or dropped later, so a warning of it would mislead.
            return self.tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]  # type: ignore[return-value]
        return self._ids(texts, special=special)

    def encode_rows(self, rows: Sequence[tuple[str, Sequence[str]]], *, special: bool) -> list[list[list[int]]]:
        """Token ids of each row's texts, a prompt and others that mostly begin with it: those ``encode`` gives."""
        around = self._around
        cuts = [_place(prompt, others) if around is not None else 0 for prompt, others in rows]
        texts: list[str] = []
        for (prompt, others), cut in zip(rows, cuts, strict=True):
            if cut:
                texts.append(prompt[:cut])
            texts += (text[cut:] for text in (prompt, *others))
        if around is None:
            found = iter(self.encode(texts, special=special))
            return [[next(found) for _ in range(1 + len(others))] for _, others in rows]
        before, after = around[special]
        found = iter(self._ids(texts, special=False))
        encoded = []
        for (_, others), cut in zip(rows, cuts, strict=True):
            first = [*before, *(next(found) if cut else ())]
            encoded.append([[*first, *next(found), *after] for _ in range(1 + len(others))])
        return encoded

    def _ids(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        # Whoever used it last may have left how to cut and pad, as its own calls do.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = self._split_special
        return [each.ids for each in self._backend.encode_batch_fast(texts, add_special_tokens=special)]

    def _specials(self) -> dict[bool, tuple[list[int], list[int]]] | None:
        """What goes before and after every text, with special tokens and without; None where that can't be said."""
        (inner,), (whole,) = (self._ids([PROBE], special=each) for each in (False, True))
        starts = [i for i in range(len(whole) - len(inner) + 1) if whole[i : i + len(inner)] == inner]
        if len(starts) != 1:
            return None
        return {False: ([], []), True: (whole[: starts[0]], whole[starts[0] + len(inner) :])}

    def _agrees(self) -> bool:
        """Whether a text that is cut anywhere gives the ids of the whole."""
        places = [match.end() for match in CUT.finditer(PROBE)]
        words = {start for _, (start, _) in self._backend.pre_tokenizer.pre_tokenize_str(PROBE)}
        whole, *parts = self._ids([PROBE, *(part for at in places for part in (PROBE[:at], PROBE[at:]))], special=False)
        together = (first + second for first, second in zip(parts[::2], parts[1::2], strict=True))
        return words.issuperset(places) and all(each == whole for each in together)

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""
        return str(self.tokenizer.decode(ids))

    def __getstate__(self) -> dict[str, Any]:
        raw = self._raw or pickle.dumps(self._tokenizer, protocol=5)
        return {**self.__dict__, "_tokenizer": None, "_raw": raw}


def _is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a call of the tokenizer does no more than ask the library's."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    kind = type(tokenizer)
    return (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind.__call__ is PreTrainedTokenizerBase.__call__
        and kind._encode_plus is PreTrainedTokenizerFast._encode_plus
    )


def _place(prompt: str, others: Sequence[str]) -> int:
    """Where the last word of the prompt begins that all texts have, with its space; 0 where none is near its end."""
    found = LAST_CUT.match(prompt, max(len(prompt) - REACH, 0))
    if found is None:
        return 0
    common = prompt[: found.end() + 2]
    return found.end() if all(text.startswith(common) for text in others) else 0


def _may_be_cut(backend: Any) -> bool:
    """Whether a tokenizer's rules are those of byte-level BPE, and none reaches over ``CUT``."""
    model = backend.model
    if type(model).__name__ != "BPE" or model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    parts = _parts(backend.normalizer, "normalizers") + _parts(backend.pre_tokenizer, "pretokenizers")
    if not any(part["type"] == "ByteLevel" for part in parts) or not all(map(_is_local, parts)):
        return False
    tokens = backend.get_vocab()
    # A space is written as this letter. What was added besides is looked for in the text before it is divided.
    spans = re.compile("[A-Za-z][\u0120 ]")
    added = backend.get_added_tokens_decoder().values()
    if any(spans.search(each.content) or (each.rstrip and each.content[-1:].isalpha()) for each in added):
        return False
    return not spans.search("\n".join(tokens))


def _parts(component: Any, name: str) -> list[dict[str, Any]]:
    """The settings of a normalizer or pre-tokenizer, one after the other."""
    if component is None:
        return []
    told = json.loads(component.__getstate__())
    return told[name] if told["type"] == "Sequence" else [told]


def _is_local(part: dict[str, Any]) -> bool:
    """Whether a rule does the same to a text's parts as to the whole, cut where ``CUT`` says."""
    kind = part["type"]
    if kind == "Split":
        pattern = part["pattern"].get("Regex")
        if pattern is None or part["behavior"] != "Isolated":
            return False
        return not UNSURE.search(CLASSES.sub(".", pattern.replace(AT_SPACES, "")))
    return kind in ("ByteLevel", "Digits", "NFC")
