"""The policy: tokenizer, configuration, weights, adapter."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import pickle
import re
import warnings
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import nn

from align import read_once
from align.engines import launched, on_gpu, shards_weights, whole_weights
from align.errors import RunError
from align.forward import bind, causal_lm
from align.sections import LoraSection, ModelSection
from align.segments import NAME
from align.value_head import is_reward_model, with_head, without_load_report

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from align.recipe import Recipe
    from data.store import TokenTable

DEFAULT_MAX_LENGTH = 2048
PACKING = ("flex_attention", NAME)
"""Attention that takes rows end to end, so that no position is padding."""


def load_config(section: ModelSection, reference: str | None = None) -> PretrainedConfig:
    """The model's configuration; cheap, so that much can be checked before the weights are read.

    Args:
        section: where from.
        reference: the model that ``reference.model`` names, instead of the section's.
    Raises:
        RunError: there is no such model, it is no causal language model, or its weights are cut off.
    """
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto as known

    name = reference or section.model_name_or_path
    key = "reference.model" if reference else "model.model_name_or_path"
    _require_folder(name, key)
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise RunError(f"{key}: the folder {name!r} holds no model (no config.json); name one that does")
    try:
        config = AutoConfig.from_pretrained(
            name, revision=_revision(section, name), trust_remote_code=section.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise RunError(
            f"{key}: can't load the configuration of {name!r} ({_first_line(error)}); check the name, or give a folder"
        ) from None
    if section.trust_remote_code:
        return config
    kind = config.model_type
    two_way = kind in known.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    causal = kind in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    # transformers builds "causal" BERTs and BARTs too: they would train, and see the tokens they are to predict.
    if not causal or two_way or getattr(config, "is_encoder_decoder", False):
        raise RunError(f"{key}: {name!r} is a {kind} model, not a causal language model; name one that is")
    _require_whole_files(name, key)
    return config


def _revision(section: ModelSection, name: str) -> str:
    """The revision is the policy's; another model comes from its main branch."""
    return section.model_revision if name == section.model_name_or_path else "main"


def _require_whole_files(name: str, key: str) -> None:
    """Refuses a folder whose weight files are missing or cut off, as a broken download leaves them."""
    folder = Path(name)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = {str(shard) for shard in json.loads(index.read_text())["weight_map"].values()}
        except (ValueError, KeyError, AttributeError):
            raise RunError(f"{key}: {index} is damaged; copy or download the model again") from None
        absent = sorted(shard for shard in shards if not (folder / shard).is_file())
        if absent:
            raise RunError(f"{key}: {folder / absent[0]} is missing; copy or download the model again")
    if folder.is_dir() and not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        raise RunError(f"{key}: the folder {name!r} holds no weights (no *.safetensors); copy or download it again")
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise RunError(
                f"{key}: {path} is damaged ({_first_line(error)}); copy or download the model again"
            ) from None


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer, with the end token and chat template the recipe asks for.

    Raises:
        RunError: there is none, it has no end token, or the recipe's end token is not one of its tokens.
    """
    from transformers import AutoTokenizer

    name = section.tokenizer_name_or_path or section.model_name_or_path
    _require_folder(name, "model.tokenizer_name_or_path")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=section.model_revision, trust_remote_code=section.trust_remote_code
        )
    except Exception as error:  # tokenizer files fail in many ways, none of which a user can act on
        raise RunError(
            f"can't load a tokenizer from {name!r} ({_first_line(error)}); set model.tokenizer_name_or_path"
        ) from None
    if section.eos_token is not None:
        if section.eos_token not in tokenizer.get_vocab():
            own = f", such as {tokenizer.eos_token!r}" if tokenizer.eos_token else ""
            raise RunError(
                f"model.eos_token {section.eos_token!r} is not a token of {name!r}; name one of its tokens{own}"
            )
        tokenizer.eos_token = section.eos_token
    if tokenizer.eos_token_id is None:
        raise RunError(
            f"the tokenizer of {name!r} has no end token, so responses could never end; "
            "set model.eos_token to the token that ends a response"
        )
    if section.chat_template is not None:
        path = Path(section.chat_template)
        if not path.is_file():
            raise RunError(f"model.chat_template: there is no file {str(path)!r}")
        try:
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(
                f"model.chat_template: can't read {str(path)!r} ({_first_line(error)}); give a Jinja template as text"
            ) from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # only for generation; our batches carry no pad token
    return tokenizer


def context_length(config: PretrainedConfig) -> int | None:
    """Positions the model was made for, or None where nothing limits them."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None


def max_length(asked: int | None, config: PretrainedConfig) -> int:
    """Most tokens of prompt + response.

    Raises:
        RunError: more was asked for than the model's context holds.
    """
    context = context_length(config)
    if asked is None:
        return min(DEFAULT_MAX_LENGTH, context or DEFAULT_MAX_LENGTH)
    if context is not None and asked > context:
        raise RunError(f"data.max_length {asked} exceeds the model's context of {context} tokens; lower it")
    return asked


def check_vocabulary(section: ModelSection, config: PretrainedConfig, *tables: TokenTable) -> None:
    """Raises ``RunError`` if the rows hold a token that the model has no embedding for."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    ids = (ragged.values for table in tables for ragged in (table.prompts, *table.legs.values()))
    highest = max(int(values.max(initial=0)) for values in ids)
    if size is not None and highest >= size:
        raise RunError(
            f"the tokenizer gives token {highest} and {section.model_name_or_path!r} knows {size} tokens; set "
            "model.tokenizer_name_or_path to the model's own tokenizer"
        )


def compute_dtype(section: ModelSection) -> torch.dtype:
    """What ``model.dtype`` resolves to on this machine."""
    if section.dtype == "auto":
        capable = on_gpu() and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if capable else torch.float32
    return getattr(torch, section.dtype)


def attention(section: ModelSection, config: PretrainedConfig) -> str:
    """Attention implementation, by device and by what the model needs.

    Raises:
        RunError: the recipe asks for one that can't be trained with on this machine.
    """
    if section.attn_implementation == "flex_attention" and not on_gpu():
        raise RunError("model.attn_implementation flex_attention can't be trained on a CPU; use auto or sdpa")
    if section.attn_implementation != "auto":
        return section.attn_implementation
    if on_gpu():
        return "flex_attention"
    dense = dense_attention(config)
    return NAME if dense == "sdpa" else dense


def dense_attention(config: PretrainedConfig) -> str:
    """Attention that takes any mask: SDPA, but eager where scores are soft-capped, which SDPA would leave out."""
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else "sdpa"


def load_weights(
    section: ModelSection,
    config: PretrainedConfig,
    dtype: torch.dtype,
    name: str | None = None,
    values: tuple[str, ...] = (),
) -> PreTrainedModel:
    """The model with its weights, every one of them from the checkpoint.

    Args:
        section: where from and how.
        config: as ``load_config`` gave it.
        dtype: of the weights: float32 if they are trained, the compute type if they are frozen.
        name: another model than the section's, for a reference.
        values: names of the outputs of a scalar head, for a reward model. A language model gets a new head, whose
            weights are random; a reward model must have these outputs already.
    Raises:
        RunError: it can't be read, or weights are missing or of another shape and would be random.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    name = name or section.model_name_or_path
    wanted = attention(section, config)
    kind: Any = AutoModelForSequenceClassification if values else AutoModelForCausalLM
    fresh = bool(values) and not is_reward_model(config)
    if values:
        config = with_head(config, values, name)
    fallbacks = ["sdpa", "eager"] if section.attn_implementation == "auto" else []
    for implementation in dict.fromkeys([wanted, *fallbacks]):
        try:
            with whole_weights(), without_load_report() if fresh else contextlib.nullcontext():
                loaded: Any = kind.from_pretrained(
                    name,
                    revision=_revision(section, name),
                    dtype=dtype,
                    attn_implementation=implementation,
                    trust_remote_code=section.trust_remote_code,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # so that they are ours to name, below
                    **({"config": config} if values else {}),
                    **_quantization(section, dtype),
                )
            model, info = loaded
            break
        except ValueError as error:  # this architecture has no such attention
            if "attention" not in str(error).lower() or implementation == "eager":
                raise RunError(f"can't load {name!r}: {_first_line(error)}") from None
        except (OSError, RuntimeError, KeyError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
            raise RunError(
                f"can't load the weights of {name!r} ({_first_line(error)}); copy or download the model again"
            ) from None
    else:
        raise RunError(f"{name!r} supports none of {[wanted, *fallbacks]}; set model.attn_implementation")
    missing = sorted(key for key in info["missing_keys"] if not (fresh and key.startswith("score.")))
    if missing:
        raise RunError(
            f"{name!r} lacks {len(missing)} weights ({missing[0]} …), which would start as random numbers; "
            "copy or download the model again"
        )
    _keep_trainable(model)
    for weight, stored, expected in sorted(info["mismatched_keys"]):
        raise RunError(
            f"{name!r} holds {weight} of shape {list(stored)} and its config.json says {list(expected)}; "
            "copy or download the model again"
        )
    return model


def load_divided(
    section: ModelSection,
    config: PretrainedConfig,
    dtype: torch.dtype,
    name: str | None = None,
    values: tuple[str, ...] = (),
) -> PreTrainedModel:
    """``load_weights`` for the engine this run was launched on: where it divides weights, one process reads for all."""
    if not shards_weights(launched()):
        return load_weights(section, config, dtype, name, values)

    def make(attention: str) -> nn.Module:
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        kind: Any = AutoModelForSequenceClassification if values else AutoModelForCausalLM
        return kind.from_config(
            copy.deepcopy(with_head(config, values, name or section.model_name_or_path) if values else config),
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=section.trust_remote_code,
        )

    return read_once.read(lambda: load_weights(section, config, dtype, name, values), make)


def _quantization(section: ModelSection, dtype: torch.dtype) -> dict[str, Any]:
    """What ``from_pretrained`` needs to quantize while it reads."""
    if not section.quantized:
        return {}
    from transformers import BitsAndBytesConfig

    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=section.load_in_4bit,
            load_in_8bit=section.load_in_8bit,
            bnb_4bit_quant_type=section.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=section.use_bnb_nested_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    }


def _keep_trainable(model: nn.Module) -> None:
    """Where CPUs have AVX-512 for bfloat16, bitsandbytes packs 4-bit weights the first time they are used in eval mode,
    for a kernel that gradients don't pass through; it goes on using it when training begins."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def policy(
    section: ModelSection,
    lora: LoraSection | None,
    config: PretrainedConfig,
    dtype: torch.dtype,
    values: tuple[str, ...] = (),
) -> nn.Module:
    """The model to train, with its adapter if it has one, ready to score batches.

    Args:
        section: where from.
        lora: its adapter.
        config: as ``load_config`` gave it.
        dtype: of the computation.
        values: outputs of a scalar head, for a reward model.
    """
    # What is trained is kept in float32: bfloat16 rounds small updates to nothing. Frozen weights need not be.
    model: nn.Module = load_divided(section, config, torch.float32 if lora is None else dtype, values=values)
    if lora is not None:
        model = add_adapter(model, lora)
        keep_input_dtype(model)
    bind(model)
    return model


def keep_input_dtype(model: nn.Module) -> None:
    """Under autocast lets adapters take their inputs as they are.

    peft turns them into the adapter's float32, and autocast back into bfloat16: the same numbers, of which every
    adapted layer would keep a copy of its own for the backward pass. DoRA reads the type for its norms.
    """
    from peft.tuners.lora import LoraLayer

    def cast(self: Any, states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if torch.is_autocast_enabled(states.device.type) and not any(self.use_dora.values()):
            return states
        return type(self)._cast_input_dtype(self, states, dtype)

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module._cast_input_dtype = MethodType(cast, module)


def check_before_loading(recipe: Recipe, config: PretrainedConfig) -> None:
    """What can be known of model, adapter and reference without a weight.

    Raises:
        RunError: this machine can't train with the attention that is asked for, the checkpoint is quantized and there
            is no adapter, the adapter to go on from or the reference is not there, or a module that ``lora`` names is
            not in the model.
    """
    attention(recipe.model, config)
    if recipe.model.quantized and importlib.util.find_spec("bitsandbytes") is None:
        raise RunError("model.load_in_4bit and load_in_8bit need bitsandbytes; pip install 'bitsandbytes>=0.50'")
    kept = getattr(config, "quantization_config", None)
    method = kept.get("quant_method") if isinstance(kept, dict) else getattr(kept, "quant_method", None)
    if recipe.lora is None and method == "bitsandbytes":
        raise RunError(
            f"model.model_name_or_path {recipe.model.model_name_or_path!r} holds weights in few bits (bitsandbytes), "
            "which can't be trained themselves; add a lora section, or name the model that they were made of"
        )
    values = recipe.mixture.needs.values
    if values:
        with_head(config, values, recipe.model.model_name_or_path)
    elif is_reward_model(config):
        raise RunError(
            f"model.model_name_or_path {recipe.model.model_name_or_path!r} is a reward model, and the objective trains "
            "a language model; name one, or use an objective of reward models (bradley_terry)"
        )
    if recipe.lora is not None and recipe.lora.adapter_name_or_path is not None:
        _find_adapter(recipe.lora.adapter_name_or_path)
    elif recipe.lora is not None:
        _try_adapter(recipe.model, recipe.lora, config, values)
    if recipe.needs_reference and recipe.reference.model not in ("initial", "base"):
        load_config(recipe.model, recipe.reference.model)


def _try_adapter(section: ModelSection, lora: LoraSection, config: PretrainedConfig, values: tuple[str, ...]) -> None:
    """Adds the adapter to a model that has modules and no weights."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind: Any = AutoModelForSequenceClassification if values else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            skeleton = kind.from_config(config, trust_remote_code=section.trust_remote_code)
    except (ValueError, ImportError, RuntimeError, NotImplementedError):
        return  # what is wrong with the model is told where it is loaded
    with warnings.catch_warnings(action="ignore"):  # peft gives them again when the adapter is added
        add_adapter(skeleton, lora)


def _find_adapter(name: str) -> None:
    from peft import PeftConfig

    key = "lora.adapter_name_or_path"
    _require_folder(name, key)
    try:
        PeftConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{key}: can't load the adapter {name!r} ({_first_line(error)}); check the name") from None
    _require_whole_files(name, key)


def add_adapter(model: Any, lora: LoraSection) -> nn.Module:
    """Wraps the model with a new adapter, or with a trained one to go on from.

    Raises:
        RunError: a target module is not in the model, or the adapter can't be read.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if lora.adapter_name_or_path is not None:
        try:
            return PeftModel.from_pretrained(model, lora.adapter_name_or_path, is_trainable=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise RunError(
                f"lora.adapter_name_or_path: the adapter {lora.adapter_name_or_path!r} does not go with this model "
                f"({_first_line(error)}); name the model it was trained on"
            ) from None
    _require_modules(model, lora)
    scalar = getattr(model, "score", None) is not None
    settings = LoraConfig(
        task_type="SEQ_CLS" if scalar else "CAUSAL_LM",  # which trains the scalar head in full
        r=lora.r,
        lora_alpha=lora.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )
    try:
        with warnings.catch_warnings():
            # peft 0.21 reads a name that transformers 5.23 has renamed. Remove with peft 0.22.
            warnings.filterwarnings(
                "ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning
            )
            return get_peft_model(model, settings)
    except ValueError as error:
        raise RunError(
            f"lora.target_modules {lora.target_modules!r} does not fit the model ({_first_line(error)}); name some of "
            "its linear layers"
        ) from None


def _require_modules(model: nn.Module, lora: LoraSection) -> None:
    """Every name the section lists is in the model: peft passes over one that is not as long as another is."""
    names = [name for name, _ in model.named_modules()]
    linear = sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
    if isinstance(lora.target_modules, str) and lora.target_modules != "all-linear":
        try:
            found = any(re.fullmatch(lora.target_modules, name) for name in names)
        except re.error:
            found = False
        if not found:
            raise RunError(
                f"lora.target_modules: no module's full name matches the pattern {lora.target_modules!r}; write "
                f"all-linear or a list of {', '.join(linear)}"
            )
    for key in ("target_modules", "modules_to_save"):
        listed = getattr(lora, key)
        for module in listed if isinstance(listed, list) else ():
            if not any(name == module or name.endswith(f".{module}") for name in names):
                raise RunError(
                    f"lora.{key}: no module of the model is called {module!r}; its linear layers are "
                    f"{', '.join(linear)}"
                )


def starts_as_base(model: nn.Module, lora: LoraSection | None) -> bool:
    """Whether the policy, as it starts, computes what its base model computes."""
    return lora is not None and lora.adapter_name_or_path is None


def switch_off_dropout(model: nn.Module) -> None:
    """Sets every dropout rate of every module to zero; the saved configuration keeps its own."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if ("drop" in name or name == "jitter_noise") and isinstance(value, float):
                setattr(module, name, 0.0)


def weights_fingerprint(model: nn.Module, *, without_adapter: bool = False) -> str:
    """Content hash of all weights, names, shapes and types; all processes of a run have to ask for it.

    Args:
        model: before it is wrapped or sharded.
        without_adapter: leave out adapter weights, for an adapter that does nothing yet: its random factor would
            otherwise give every seed a key of its own.
    """
    return read_once.of_reader(lambda: _hashed(model, without_adapter))


def _hashed(model: nn.Module, without_adapter: bool) -> str:
    state = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        if without_adapter and ("lora_" in name or "modules_to_save" in name):
            continue
        name = name.replace("base_model.model.", "").replace(".base_layer", "").replace(".original_module", "")
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        state.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    inner = causal_lm(model)
    state.update(inner.config.to_json_string().encode())
    return state.hexdigest()


def _require_folder(name: str, key: str) -> None:
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not Path(name).expanduser().is_dir():
        raise RunError(f"{key}: there is no folder {name!r}")


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".: ").removesuffix(" from one of")
