"""Rows whose texts begin alike: what they have in common is encoded once, and the ids are those of every text alone."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from data.codec import PROBE, Codec

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA_3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS_FROM_THE_RIGHT = r"\p{L}+| \p{L}+|\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))|[^\p{L}]"


def split(*patterns: str) -> Any:
    """Words by patterns, then bytes."""
    parts = [pre_tokenizers.Split(Regex(each), "isolated") for each in patterns]
    return pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def tokenizer(
    words: Any,
    *,
    texts: tuple[str, ...] = (PROBE,),
    normalizer: Any = None,
    model: Any = None,
    added: tuple[AddedToken, ...] = (),
    bos: bool = False,
    eos: bool = False,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose merges are those of ``texts``, and whose words are cut by ``words``."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = words
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator([*texts] * 3, trainer)
    if model is not None:
        model(trained.model)
    trained.normalizer = normalizer
    trained.decoder = decoders.ByteLevel()
    trained.add_tokens(list(added))
    trained.post_processor = processors.TemplateProcessing(
        single=" ".join(["<s>"] * bos + ["$A"] + ["</s>"] * eos), special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=trained, bos_token="<s>", eos_token="</s>")


def gpt_2(**options: Any) -> PreTrainedTokenizerFast:
    """The words of GPT-2."""
    return tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False), **options)


def ignores_merges(model: Any) -> None:
    """Takes a word that is a token as it is, as Llama 3 does."""
    model.ignore_merges = True


TURN = AddedToken("<|im_start|>", special=True)
CUT: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "gpt-2": gpt_2,
    "llama-3": lambda: tokenizer(split(LLAMA_3), model=ignores_merges, bos=True, added=(TURN,)),
    "qwen": lambda: tokenizer(split(LLAMA_3), normalizer=normalizers.NFC(), added=(TURN,)),
    "deepseek": lambda: tokenizer(split(*DEEPSEEK), bos=True, eos=True),
    "o200k": lambda: tokenizer(split(O200K)),
    "a space before every text": lambda: tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "words among the tokens": lambda: gpt_2(
        added=(AddedToken("thing", single_word=True), AddedToken("of", lstrip=True))
    ),
}
"""Tokenizers whose texts may be cut between words."""
WHOLE: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "no words": lambda: tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "a token of two words": lambda: gpt_2(added=(AddedToken("of we"),)),
    "a token that takes the space after it": lambda: gpt_2(added=(AddedToken("you", rstrip=True),)),
    "looks back": lambda: tokenizer(split(r"(?<=e) \p{L}| ?\p{L}+|[^\p{L}]")),
    "looks ahead": lambda: tokenizer(split(r"\p{L}+(?= )|\p{L}| \p{L}|[^\p{L}]")),
    "digits from the right": lambda: tokenizer(split(DIGITS_FROM_THE_RIGHT)),
    "where the text begins": lambda: tokenizer(split(r"^ | ?\p{L}+|[^\p{L}]")),
    "pairs of words": lambda: tokenizer(split(r" ?\p{L}+ \p{L}+| ?\p{L}+|[^\p{L}]")),
    "strips": lambda: gpt_2(normalizer=normalizers.Strip()),
    "drops merges": lambda: gpt_2(model=lambda model: setattr(model, "dropout", 0.5)),
}
"""Tokenizers that take another way."""

PIECES = [
    "a",
    "B",
    "thing",
    "it's",
    "we'LL",
    "123",
    "4567",
    "cafe",
    "\u0301",
    "é",
    "你好",
    ".",
    ",",
    "don't",
    "you",
    "of",
    "we",
]
GAPS = [" ", " ", " ", "  ", "\n", "\n\n", "\t", "", "\r\n ", " \n", "<|im_start|>", "</s>", "\u00a0", "'", "/"]
TEXT = st.lists(st.tuples(st.sampled_from(PIECES), st.sampled_from(GAPS)), max_size=12).map(
    lambda parts: "".join(piece + gap for piece, gap in parts)
)


def alone(codec: Codec, prompt: str, others: list[str], *, special: bool) -> list[list[int]]:
    """The ids of every text by itself."""
    return [codec.encode([text], special=special)[0] for text in (prompt, *others)]


@pytest.fixture(scope="module")
def made() -> dict[str, Codec]:
    """A codec of each tokenizer that may be cut."""
    return {name: Codec(make()) for name, make in CUT.items()}


@pytest.mark.parametrize("name", CUT)
@settings(max_examples=80, deadline=None)
@given(prompt=TEXT, responses=st.lists(TEXT, min_size=1, max_size=2), other=TEXT, special=st.booleans())
def test_ids_are_those_of_every_text_alone(
    made: dict[str, Codec], name: str, prompt: str, responses: list[str], other: str, special: bool
):
    codec = made[name]
    assert codec._around is not None
    rows = [(prompt, [prompt + each for each in responses]), (prompt, [other]), (other, [])]
    found = codec.encode_rows(rows, special=special)
    assert found == [alone(codec, first, list(rest), special=special) for first, rest in rows]


@pytest.mark.parametrize("name", CUT)
def test_a_prompt_is_encoded_once(made: dict[str, Codec], name: str, monkeypatch: pytest.MonkeyPatch):
    codec, seen = made[name], list[str]()
    ids = codec._ids
    monkeypatch.setattr(codec, "_ids", lambda texts, special: [seen.extend(texts), ids(texts, special=special)][1])
    rows = [(PROBE, [PROBE + " yes", PROBE + "no"]), ("a", ["ab"])]
    assert codec.encode_rows(rows, special=True) == [alone(codec, *row, special=True) for row in rows]
    assert seen[:6] == [PROBE[:-6], " thing", " thing yes", " thingno", "a", "ab"]


@pytest.mark.parametrize("name", WHOLE)
def test_other_tokenizers_see_whole_texts(name: str):
    codec = Codec(WHOLE[name]())
    assert codec._around is None
    if name != "drops merges":
        rows = [(PROBE, [PROBE + " yes", PROBE + "no"])]
        assert codec.encode_rows(rows, special=True) == [alone(codec, *row, special=True) for row in rows]


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("a token of two words", "of we"),
        ("a token that takes the space after it", "you do"),
        ("looks back", "me each"),
        ("looks ahead", "apples cost"),
        ("where the text begins", "x yes"),
        ("strips", "x yes"),
    ],
)
def test_cutting_them_would_have_gone_wrong(name: str, prompt: str):
    """So that no condition is there for nothing."""
    codec = Codec(WHOLE[name]())
    codec._around = {False: ([], []), True: ([], [])}
    assert codec.encode_rows([(prompt, [])], special=False) != [alone(codec, prompt, [], special=False)]


def test_it_comes_along_into_a_worker(made: dict[str, Codec]):
    codec = pickle.loads(pickle.dumps(made["llama-3"]))
    assert codec._around == {False: ([], []), True: ([0], [])}
    assert codec.encode_rows([(PROBE, [PROBE])], special=True) == [alone(codec, PROBE, [PROBE], special=True)]
