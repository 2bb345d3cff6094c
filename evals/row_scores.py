"""What models make of a run's pairs before it is trained: log-probs, CHES, rewards; computed once and kept by content.

    columns(split, judge=None, …)       of the initial policy: difficulty, reference_margin, ches, ln_ches
    columns(split, judge="runs/rm", …)  of a reward model: reward_margin

A pass is made by one process; others that ask for the same wait for it and read what it found. What is kept depends on
the weights, the type of computation, the kind of device, and the tokens of the pairs: a changed one is never answered
with numbers of another.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from align import model as models
from align.errors import RunError
from align.forward import bind
from align.reward_files import RewardFiles, find
from align.scoring import OfStates, RowScorer, telling
from align.sections import ModelSection
from align.value_head import is_reward_model, output_names
from data.chat import template_fingerprint
from data.preparation import Split
from data.store import TokenTable, cache_dir, digest
from evals import loading
from evals.ches import of_batch
from evals.ranking import difficulty

Say = Callable[[str], None]
PAIR = ("chosen", "rejected")
FORMAT = 1
"""Raise when the meaning of what is kept changes."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The model that a run starts from."""

    section: ModelSection
    adapter: str | None
    """Folder of the adapter that training goes on from; a new one changes nothing yet."""
    config: Any
    tokenizer: Any


def columns(split: Split, policy: Policy, judge: str | None, say: Say) -> dict[str, np.ndarray]:
    """Numbers of every pair, float64, (row,); NaN where a model gives none.

    Args:
        split: rows with the legs chosen and rejected.
        policy: the model that a run starts from.
        judge: a reward model, by folder or Hub id; None for the policy itself.
        say: told what is done.
    Returns:
        Of the policy ``difficulty`` (nats), ``reference_margin`` (nats per token, above 0 where it prefers the rejected
        response), ``ches`` and ``ln_ches``; of a reward model ``reward_margin``, above 0 likewise.
    Raises:
        RunError: the model can't be loaded or can't score these rows.
    """
    table = TokenTable(split.table.prompts, {leg: split.table.legs[leg] for leg in PAIR})
    found = _of_policy(table, policy, say) if judge is None else _of_reward_model(table, policy, judge, say)
    missing = int((~np.all([np.isfinite(values) for values in found.values()], axis=0)).sum())
    if missing == len(table):
        raise RunError(f"{judge or 'the initial policy'} gives no pair finite numbers; look for NaN in its weights")
    if missing:
        say(f"warning: {judge or 'the initial policy'} gives {missing} of {len(table)} pairs no finite numbers")
    if judge is not None:
        return {"reward_margin": found["value/rejected/0"] - found["value/chosen/0"]}
    per_token = {leg: found[f"sum/{leg}"] / table.legs[leg].lengths() for leg in PAIR}
    return {
        "difficulty": difficulty(found["sum/chosen"], found["sum/rejected"]),
        "reference_margin": per_token["rejected"] - per_token["chosen"],
        "ches": found["ches"],
        "ln_ches": found["ln_ches"],
    }


def _of_policy(table: TokenTable, policy: Policy, say: Say) -> dict[str, np.ndarray]:
    section = policy.section
    if is_reward_model(policy.config):
        raise RunError(
            f"{section.model_name_or_path!r} is a reward model, which has no log-probs; name a language model, or a "
            "filter that asks a reward model"
        )
    models.check_vocabulary(section, policy.config, table)
    dtype = models.compute_dtype(section)
    bits = [section.load_in_4bit, section.load_in_8bit, section.bnb_4bit_quant_type, section.use_bnb_nested_quant]
    weights = loading.fingerprint(section, policy.adapter)
    key = digest(FORMAT, "policy", weights, bits, _shape(policy.config), _computed(dtype), table.fingerprint())

    def compute() -> dict[str, np.ndarray]:
        with loading.loaded(section, policy.adapter, policy.config) as model:
            return _pass(section, model, table, dtype, "the initial policy", of_batch, say)

    return kept(key, compute)


def _of_reward_model(table: TokenTable, policy: Policy, name: str, say: Say) -> dict[str, np.ndarray]:
    files = find(name)
    _refuse_reward_model(files, table, policy.tokenizer)
    section = dataclasses.replace(
        policy.section,
        model_name_or_path=files.base,
        model_revision="main",
        load_in_4bit=False,
        load_in_8bit=False,
    )
    models.check_vocabulary(section, files.config, table)
    dtype = models.compute_dtype(section)
    key = digest(FORMAT, "reward", files.fingerprint(), _computed(dtype), table.fingerprint())

    def compute() -> dict[str, np.ndarray]:
        model, _ = files.load(dtype)
        bind(model)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        return _pass(section, model, table, dtype, f"reward model {name}", None, say)

    return kept(key, compute)


def _refuse_reward_model(files: RewardFiles, table: TokenTable, tokenizer: Any) -> None:
    from transformers import AutoTokenizer

    outputs = output_names(files.config)
    if len(outputs) > 1:
        raise RunError(
            f"reward model {files.name!r} has the outputs {', '.join(outputs)}; name one with a single output"
        )
    own = AutoTokenizer.from_pretrained(files.name, revision=files.revision, trust_remote_code=files.trust_remote_code)
    if _reads(own) != _reads(tokenizer):
        raise RunError(
            f"reward model {files.name!r} has another tokenizer, end token or chat template than the policy, so these "
            "tokens mean something else to it; name one that was trained from the same model"
        )
    context = getattr(files.config.get_text_config(), "max_position_embeddings", None)
    longest = max(int((table.prompts.lengths() + leg.lengths()).max(initial=0)) for leg in table.legs.values())
    if context is not None and longest > context:
        raise RunError(
            f"reward model {files.name!r} reads {context} tokens and a row has {longest}; lower data.max_length"
        )


def _reads(tokenizer: Any) -> list[Any]:
    """What a token, an end and a message are to a tokenizer."""
    return [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id, template_fingerprint(tokenizer)]


def _shape(config: Any) -> str:
    """What a model computes with its weights: rotations, scales, layers."""
    own = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
    return digest(json.loads(json.dumps(own, default=str)))


def _computed(dtype: torch.dtype) -> list[str]:
    return [str(dtype), "cuda" if torch.cuda.is_available() else "cpu"]


def _pass(
    section: ModelSection,
    model: Any,
    table: TokenTable,
    dtype: torch.dtype,
    who: str,
    of_states: OfStates | None,
    say: Say,
) -> dict[str, np.ndarray]:
    return RowScorer(section, model, table, dtype)(of_states, telling(say, f"scored by {who}"))


# ---- kept by content ----


def kept(key: str, compute: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays by name, read where they were computed before, by whichever process.

    Args:
        key: of all that they depend on.
        compute: called by one process at most, while others wait.
    """
    folder = cache_dir() / "row_scores"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key}.npz"
    with FileLock(path.with_suffix(".lock")):
        found = _read(path)
        if found is None:
            if torch.cuda.is_available():  # the device that this process will train on
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            found = dict(compute())
            part = path.with_suffix(".part.npz")
            arrays: dict[str, Any] = found
            np.savez(part, **arrays)
            os.replace(part, path)
    return found


def _read(path: Path) -> dict[str, np.ndarray] | None:
    """None where there is nothing, or something damaged."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except PermissionError as error:
        raise RunError(f"can't read {path}: {error.strerror}; set ALIGN_CACHE to a folder of your own") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
