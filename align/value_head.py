"""Scalar heads: what makes a language model a reward model."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING

from align.errors import RunError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def is_reward_model(config: PretrainedConfig) -> bool:
    """Whether a checkpoint has a scalar head already."""
    return any("ForSequenceClassification" in kind for kind in getattr(config, "architectures", None) or ())


def output_names(config: PretrainedConfig) -> list[str]:
    """Names of the head's outputs, in order."""
    names = {int(number): str(name) for number, name in (config.id2label or {}).items()}
    return [names[number] for number in sorted(names)]


def with_head(config: PretrainedConfig, values: tuple[str, ...], name: str) -> PretrainedConfig:
    """The configuration of a reward model with these outputs; a reward model keeps those it has.

    Args:
        config: of a language model or a reward model.
        values: names of the outputs that are trained.
        name: the model, for messages.
    Raises:
        RunError: the model has a scalar head without these outputs, or its architecture has none in transformers.
    """
    from transformers.models.auto import modeling_auto as known

    if config.model_type not in known.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        raise RunError(
            f"{name!r} is a {config.model_type} model, for which transformers has no scalar head; name another model"
        )
    if is_reward_model(config):
        outputs_of(config, values, name)
        return config
    changed = copy.deepcopy(config)
    changed.num_labels = len(values)
    changed.id2label = dict(enumerate(values))
    changed.label2id = {value: number for number, value in enumerate(values)}
    return changed


def outputs_of(config: PretrainedConfig, values: tuple[str, ...], name: str = "the model") -> tuple[int, ...]:
    """Which of a head's outputs have these names; an only output without a name of its own has any.

    Raises:
        RunError: there is no such output.
    """
    own = output_names(config)
    if own == ["LABEL_0"] and len(values) == 1:
        return (0,)
    for value in values:
        if value not in own:
            raise RunError(
                f"{name!r} is a reward model with outputs {', '.join(own)}, and the objective trains {value!r}; set "
                "the objective's attribute to one of them"
            )
    return tuple(own.index(value) for value in values)


def settle_padding(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Chooses the pad token of a saved reward model, which must not be the end token; says whether there is one.

    transformers reads the reward at the last token that is not padding. Where the end token pads, as many tokenizers
    have it, that is the token before the end, and not the one that was trained on. Without any token for it, the model
    takes one sequence at a time, which transformers says itself.
    """
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        spare = tokenizer.unk_token if tokenizer.unk_token_id != tokenizer.eos_token_id else None
        tokenizer.pad_token = spare
    config.pad_token_id = tokenizer.pad_token_id
    return tokenizer.pad_token_id is not None


@contextlib.contextmanager
def without_load_report() -> Iterator[None]:
    """Keeps transformers from reporting that a language model has no scalar head yet: the run says so itself."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
