"""Scores of a reward model: ours, or any model of the Hub with a head for sequence classification."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch

from align.errors import RunError
from align.reward_files import RewardFiles, find
from align.samples import Group, Sample
from align.scorers import SCORERS, Scored
from align.value_head import output_names
from data.chat import render
from data.tokens import TokenPolicy, tokenize_rows
from objectives.checks import require
from objectives.rows import Row, Text

LEG = "completion"
ENDINGS = ("auto", "token", "template")
TRUNCATIONS = ("truncate_response_end", "drop")
DTYPES = ("auto", "float32", "bfloat16", "float16")


class Encoded(NamedTuple):
    """Prompt and response as the model reads them."""

    ids: Sequence[int]
    truncated: bool = False
    segments: Sequence[int] | None = None
    """Which of a pair of texts a token belongs to, for models that tell them apart."""


@SCORERS.register("reward_model")
@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """What a reward model says of a response.

        score = head(prompt + response)

    in the model's own unit: log-odds, up to a constant of the prompt, of one that was trained by Bradley-Terry. Prompts
    and responses are rendered and tokenised as in training, and what training would drop (an empty response, a prompt
    that leaves no room for it) has no score. Scores do not depend on what is computed beside them.
    """

    model: str
    """Folder of a run, a checkpoint or a model, or a Hub id; an adapter brings its base."""
    output: str | None = None
    """Which output of a head with several; null where there is one."""
    ending: str = "auto"
    """How a response ends. ``token``: with one end token, whatever the template writes, as reward models are trained
    here. ``template``: as the chat template writes it, which is how most others are trained; without a chat template,
    prompt and response are a pair of texts. ``auto``: ``token`` where a recipe.yaml lies beside the weights."""
    max_length: int | None = None
    """Most tokens of prompt and response; null is the model's context."""
    truncation: str = "truncate_response_end"
    """What is done with longer ones: ``truncate_response_end``, which is counted, or ``drop``: no score."""
    token_budget: int = 16384
    """Tokens computed together, padding included. Fewer take less memory and give the same scores."""
    dtype: str = "auto"
    """Of the computation: float32, bfloat16 or float16; auto is bfloat16 on GPUs that have it, else float32. The head
    is computed in float32 in any case, so that fewer scores are alike."""
    revision: str = "main"
    """Of a model on the Hub."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    answers: ClassVar[bool] = False
    free: ClassVar[frozenset[str]] = frozenset({"token_budget"})

    @classmethod
    def example(cls) -> RewardModel:
        """A model in a folder."""
        return cls(model="runs/reward_model")

    def __post_init__(self) -> None:
        require("model", self.model, bool(self.model.strip()), "a folder or a Hub id")
        require("ending", self.ending, self.ending in ENDINGS, f"one of {', '.join(ENDINGS)}")
        require("truncation", self.truncation, self.truncation in TRUNCATIONS, f"one of {', '.join(TRUNCATIONS)}")
        require("max_length", self.max_length, self.max_length is None or self.max_length >= 1, ">= 1, or null")
        require("token_budget", self.token_budget, self.token_budget >= 1, ">= 1")
        require("dtype", self.dtype, self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")

    def fingerprint(self) -> str:
        """Hash of the model's files, and of how it is computed.

        Raises:
            RunError: there is no such model, it has no scalar head, or no such output.
        """
        _ = self._column
        return f"{self._files.fingerprint()} {self._one_end_token} {_device().type} {self._torch_dtype}"

    def __call__(self, groups: Sequence[Group]) -> list[Scored]:
        """Scores in the model's unit; None for what training would drop.

        Raises:
            RunError: the model can't be loaded.
            DataError: a chat template refuses a conversation.
        """
        encoded = self._encoded([sample for group in groups for sample in group.samples])
        whole = {i: each for i, each in enumerate(encoded) if isinstance(each, Encoded)}
        scores: dict[int, float] = {}
        for batch in batches({i: len(each.ids) for i, each in whole.items()}, self.token_budget):
            scores |= dict(zip(batch, self._scores([whole[i] for i in batch]), strict=True))
        return [
            Scored(score=scores[i], counts={"truncated": 1} if each.truncated else {})
            if isinstance(each, Encoded)
            else Scored(score=None, reason=each)
            for i, each in enumerate(encoded)
        ]

    def close(self) -> None:
        """Frees the model's memory."""
        vars(self).pop("_loaded", None)

    @cached_property
    def _files(self) -> RewardFiles:
        return find(self.model, self.revision, trust_remote_code=self.trust_remote_code)

    @cached_property
    def _column(self) -> int:
        own = output_names(self._files.config)
        if self.output is None and len(own) == 1:
            return 0
        if self.output not in own:
            way_out = "set output to one of them" if self.output is None else f"output {self.output!r} is none of them"
            raise RunError(f"reward_model: {self.model!r} has the outputs {', '.join(own)}; {way_out}")
        return own.index(self.output)

    @cached_property
    def _one_end_token(self) -> bool:
        return self.ending == "token" or (self.ending == "auto" and self._files.trained_here)

    @property
    def _torch_dtype(self) -> torch.dtype:
        if self.dtype != "auto":
            return getattr(torch, self.dtype)
        return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        model, tokenizer = self._files.load(self._torch_dtype)
        return model.to(_device()), tokenizer

    # ---- samples to tokens ----

    def _encoded(self, samples: Sequence[Sample]) -> list[Encoded | str]:
        """Tokens of prompt and response, or why they can't be scored."""
        rows = [
            Row(prompt=each.prompt, responses={LEG: _response(each)}, source=f"prompt {each.prompt_id}", index=i)
            for i, each in enumerate(samples)
        ]
        return self._as_trained(rows) if self._one_end_token else [self._as_written(row) for row in rows]

    @property
    def _limit(self) -> int:
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as TWO_WAY

        config = self._files.config.get_text_config()
        context = getattr(config, "max_position_embeddings", None) or 1 << 30
        if config.model_type in TWO_WAY:  # RoBERTa's positions begin at 2, which its tokenizer knows
            context = min(context, self._loaded[1].model_max_length)
        if self.max_length is not None and self.max_length > context:
            raise RunError(
                f"reward_model: max_length {self.max_length} exceeds the context of {self.model!r}, {context} tokens; "
                "lower it"
            )
        return self.max_length or context

    def _as_trained(self, rows: Sequence[Row]) -> list[Encoded | str]:
        _, tokenizer = self._loaded
        policy = TokenPolicy(max_length=self._limit, truncation=self.truncation)
        kept, dropped, _ = tokenize_rows(rows, tokenizer, policy, (LEG,))
        found: dict[int, Encoded | str] = {each.index: each.reason for each in dropped}
        for row in kept:
            response = row.legs[LEG]
            found[row.index] = Encoded((*row.prompt, *response), truncated=response[-1] != tokenizer.eos_token_id)
        return [found[row.index] for row in rows]

    def _as_written(self, row: Row) -> Encoded | str:
        _, tokenizer = self._loaded
        pair = not isinstance(row.prompt, str) and not tokenizer.chat_template
        if pair:
            first, second = _said(row.prompt), _said(row.responses[LEG])
            if tokenizer.sep_token_id is None:
                raise RunError(
                    f"reward_model: {self.model!r} has no chat template, and the prompts are messages; set ending to "
                    "token if it was trained here, or add a chat_template.jinja to it"
                )
            coded = tokenizer(first, second)
        else:
            rendered = render(row, tokenizer)
            coded = tokenizer(rendered.full[LEG], add_special_tokens=not rendered.chat)
        ids, segments = coded["input_ids"], coded.get("token_type_ids") if pair else None
        if len(ids) <= self._limit:
            return Encoded(ids, segments=segments)
        if self.truncation == "drop":
            return "longer than max_length"
        return Encoded(ids[: self._limit], True, segments and segments[: self._limit])

    # ---- tokens to scores ----

    @torch.inference_mode()
    def _scores(self, batch: Sequence[Encoded]) -> list[float]:
        model, tokenizer = self._loaded
        width = max(len(each.ids) for each in batch)
        pad = _padding({each.ids[-1] for each in batch}, tokenizer.pad_token_id)
        # transformers reads the score at the last token that is no padding, going by the token's number.
        for config in (model.config, model.config.get_text_config()):
            config.pad_token_id = pad

        def filled(rows: Sequence[Sequence[int]], with_: int) -> torch.Tensor:
            return torch.tensor([[*row, *[with_] * (width - len(row))] for row in rows], device=model.device)

        inputs = {"input_ids": filled([each.ids for each in batch], pad)}
        inputs["attention_mask"] = filled([[1] * len(each.ids) for each in batch], 0)
        if batch[0].segments is not None:
            inputs["token_type_ids"] = filled([each.segments or () for each in batch], 0)
        return model(**inputs).logits[:, self._column].float().tolist()


def batches(lengths: dict[int, int], budget: int) -> Iterator[list[int]]:
    """Keys in batches of which rows × longest is within the budget, longest first; one that exceeds it goes alone."""
    batch: list[int] = []
    longest = 0
    for key in sorted(lengths, key=lambda key: -lengths[key]):
        if batch and (len(batch) + 1) * longest > budget:
            yield batch
            batch = []
        longest = longest if batch else lengths[key]
        batch.append(key)
    if batch:
        yield batch


def _padding(last: set[int], own: int | None) -> int:
    """The model's padding, unless a sequence ends with it, as where the end token pads; then any other token."""
    return own if own is not None and own not in last else next(i for i in range(len(last) + 1) if i not in last)


def _response(sample: Sample) -> Text:
    return sample.text if isinstance(sample.prompt, str) else ({"role": "assistant", "content": sample.text},)


def _said(text: Text) -> str:
    return text if isinstance(text, str) else "\n".join(str(message.get("content") or "") for message in text)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
