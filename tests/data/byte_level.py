"""A tokenizer one can count by hand: one token per byte of UTF-8, plus the merges and special tokens asked for."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
BOS, EOS, IM_START, IM_END = range(4)


def byte_level(
    *,
    merges: Sequence[tuple[str, str]] = (),
    adds_bos: bool = False,
    adds_eos: bool = False,
    template: str | None = None,
    eos_token: str | None = "</s>",
    bos_token: str | None = "<s>",
) -> PreTrainedTokenizerFast:
    """Args are what differs between the tokenizers of real models: ``adds_*`` is what plain text gets."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*SPECIAL, *alphabet, *(left + right for left, right in merges)]
    backend = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=list(merges)))
    # Without the usual split into words, so that a merge can cross any boundary.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    single = ["<s>"] * adds_bos + ["$A"] + ["</s>"] * adds_eos
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join(single), special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos_token, eos_token=eos_token, chat_template=template
    )
