"""Reward models from folders and the Hub, ours or others', whole or as an adapter: what they are, and their weights."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from align.errors import RunError
from align.fingerprints import joined, weights_on_disk, with_texts
from align.hub_adapters import adapter_folder
from align.value_head import is_reward_model, without_load_report


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFiles:
    """A reward model, before its weights are read."""

    name: str
    """Folder or Hub id."""
    base: str
    """The same; of an adapter, that of its base."""
    config: Any
    revision: str
    trust_remote_code: bool

    @property
    def is_adapter(self) -> bool:
        """Whether weights are a base's and an adapter's."""
        return self.base != self.name

    @property
    def trained_here(self) -> bool:
        """Whether there is a recipe of ours beside the weights, or beside the checkpoint."""
        from transformers.utils.hub import cached_file

        folder = Path(self.name)
        if folder.is_dir():
            return any((place / "recipe.yaml").is_file() for place in (folder, folder.resolve().parent))
        quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        return cached_file(self.name, "recipe.yaml", revision=self.revision, **quiet) is not None

    def fingerprint(self) -> str:
        """Hash of weights, configuration and tokenizer; of models on the Hub, of their commits.

        Raises:
            RunError: there are no weights, or the Hub does not tell.
        """
        weights = joined(
            weights_on_disk(self.base, "main" if self.is_adapter else self.revision),
            weights_on_disk(self.name, self.revision) if self.is_adapter else None,
        )
        return with_texts(weights, self.name)

    def load(self, dtype: torch.dtype) -> tuple[Any, Any]:
        """Model, in eval mode, and tokenizer.

        The head is computed in float32 whatever the type of the rest is.

        Raises:
            RunError: they can't be read, or weights are missing and would be random.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        how = {"trust_remote_code": self.trust_remote_code}
        own = {**how, "revision": self.revision}
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.name, **own)
            with without_load_report():
                loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                    self.base,
                    config=self.config,
                    dtype=dtype,
                    output_loading_info=True,
                    **(how if self.is_adapter else own),
                )
            model, info = loaded
            model = _with_adapter(model, self.name) if self.is_adapter else model
        except Exception as error:  # model files fail in many ways, none of which a user can act on otherwise
            raise RunError(
                f"reward_model: can't load {self.name!r} ({_first_line(error)}); copy or download the model again"
            ) from None
        missing = sorted(key for key in info["missing_keys"] if not (self.is_adapter and key.startswith("score.")))
        if missing:
            raise RunError(
                f"reward_model: {self.name!r} lacks {len(missing)} weights ({missing[0]} …), which would be random "
                "numbers; copy or download the model again"
            )
        _head_in_float32(model)
        return model.eval().requires_grad_(False), tokenizer


def find(name: str, revision: str = "main", *, trust_remote_code: bool = False) -> RewardFiles:
    """What there is of a model, from its configuration alone.

    Raises:
        RunError: there is no such model, or it has no scalar head.
    """
    from transformers import AutoConfig

    folder = Path(name).expanduser()
    if not folder.is_dir() and (fetched := adapter_folder(name, revision)) is not None:
        folder = fetched
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise RunError(f"reward_model: there is no folder {name!r}; name a folder or a Hub id")
    name = base = str(folder) if folder.is_dir() else name
    more: dict[str, Any] = {"revision": revision}
    try:
        if (folder / "adapter_config.json").is_file():
            base = str(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"])
            more = {"num_labels": _outputs_of_adapter(folder)}
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code, **more)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise RunError(
            f"reward_model: can't load the configuration of {name!r} ({_first_line(error)}); check the name, or give a "
            "folder"
        ) from None
    if base == name and not is_reward_model(config) and not trust_remote_code:
        kind = ", ".join(getattr(config, "architectures", None) or [config.model_type])
        raise RunError(
            f"reward_model: {name!r} is a {kind} and has no scalar head, which would be random numbers; name a reward "
            "model"
        )
    return RewardFiles(name=name, base=base, config=config, revision=revision, trust_remote_code=trust_remote_code)


def _outputs_of_adapter(folder: Path) -> int:
    with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
        heads = [key for key in weights.keys() if key.endswith("score.weight")]  # noqa: SIM118  # no mapping
        if not heads:
            raise ValueError("its adapter has no scalar head")
        return int(weights.get_slice(heads[0]).get_shape()[0])


def _with_adapter(model: Any, name: str) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        # peft 0.21 reads a name that transformers 5.23 has renamed. Remove with peft 0.22.
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
        return PeftModel.from_pretrained(model, name).merge_and_unload()


def _head_in_float32(model: Any) -> None:
    head = getattr(model, "score", None)
    if isinstance(head, torch.nn.Linear):
        head.float().register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".: ")
