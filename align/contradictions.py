"""Keys that contradict each other or have no effect: refused, never ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from align.errors import RecipeError

if TYPE_CHECKING:
    from align.recipe import Recipe

SINGLE_DATASET = ("dataset_name", "dataset_config", "dataset_train_split", "columns", "format")
"""Keys of the data section that describe its one dataset."""

# (key, what makes it idle, the keys that can do so, test on the other values)
_IDLE = (
    ("train.num_train_epochs", "train.max_steps decides", ("train.max_steps",),
     lambda v: _number(v, "train", "max_steps", -1) > 0),
    ("train.eval_strategy", "data.eval_share 0 holds no prompts out", ("data.eval_share",),
     lambda v: _get(v, "train", "eval_strategy") in ("steps", "epoch") and not _get(v, "data", "eval_dataset_name")
     and _number(v, "data", "eval_share", 1) == 0),
    ("train.eval_steps", "train.eval_strategy is not steps", ("train.eval_strategy", "data.eval_share"),
     lambda v: _get(v, "train", "eval_strategy") != "steps"),
    ("train.save_steps", "train.save_strategy is not steps", ("train.save_strategy",),
     lambda v: _get(v, "train", "save_strategy", "steps") != "steps"),
    ("train.async_save", "train.save_strategy is no", ("train.save_strategy",),
     lambda v: _get(v, "train", "async_save") is True and _get(v, "train", "save_strategy") in ("no", False)),
    ("train.warmup_steps", "this train.lr_scheduler_type does not warm up (constant_with_warmup and linear do)",
     ("train.lr_scheduler_type",),
     lambda v: _get(v, "train", "lr_scheduler_type") in ("constant", "reduce_lr_on_plateau")
     and _number(v, "train", "warmup_steps", 0) > 0),
    *(
        (f"train.{key}", "this train.optim is no Adam", ("train.optim",), lambda v: not is_adam(v))
        for key in ("adam_beta1", "adam_beta2", "adam_epsilon")
    ),
    ("train.run_name", "train.report_to names no tracker", ("train.report_to",),
     lambda v: _get(v, "train", "report_to") in (None, "none", [])),
    ("train.project", "neither wandb nor trackio is in train.report_to", ("train.report_to",),
     lambda v: not {"wandb", "trackio"} & set(_listed(_get(v, "train", "report_to")))),
    ("data.eval_share", "data.eval_dataset_name gives the eval set", ("data.eval_dataset_name",),
     lambda v: _get(v, "data", "eval_dataset_name")),
    ("data.eval_split", "there is no data.eval_dataset_name", ("data.eval_dataset_name",),
     lambda v: not _get(v, "data", "eval_dataset_name")),
    ("data.eval_dataset_config", "there is no data.eval_dataset_name", ("data.eval_dataset_name",),
     lambda v: not _get(v, "data", "eval_dataset_name")),
    *(
        (f"model.{key}", "model.load_in_4bit is false", ("model.load_in_4bit",),
         lambda v: not _get(v, "model", "load_in_4bit"))
        for key in ("bnb_4bit_quant_type", "use_bnb_nested_quant")
    ),
    ("data.threshold", "data.rule is not threshold", ("data.rule",),
     lambda v: _get(v, "data", "rule") != "threshold"),
    ("hub.hub_private_repo", "hub.push_to_hub is false", ("hub.push_to_hub",),
     lambda v: _get(v, "hub", "hub_private_repo") is True and not _get(v, "hub", "push_to_hub")),
    ("hub.push_samples", "hub.push_to_hub is false", ("hub.push_to_hub",),
     lambda v: _get(v, "hub", "push_samples") is True and not _get(v, "hub", "push_to_hub")),
)  # fmt: skip


def is_adam(values: Mapping[str, Any]) -> bool:
    """Whether the optimizer reads Adam's β and ε."""
    return any(name in str(_get(values, "train", "optim", "adamw_torch")) for name in ("adam", "lion", "ademamix"))


def _get(values: Mapping[str, Any], section: str, key: str, default: Any = None) -> Any:
    found = (values.get(section) or {}).get(key)
    return default if found is None else found


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _number(values: Mapping[str, Any], section: str, key: str, default: float) -> float:
    try:
        return float(_get(values, section, key, default))
    except (TypeError, ValueError):
        return default


def refuse_idle(values: dict[str, Any], written: Mapping[str, str], commanded: set[str], idle: list[str]) -> None:
    """A key without effect is an error, or one printed line where the command line made it so."""
    for path, reason, makers, is_idle in _IDLE:
        section, key = path.split(".")
        if path not in written or _get(values, section, key) is None or not is_idle(values):
            continue
        if path in commanded or commanded.isdisjoint(makers):
            raise RecipeError(f"{path} has no effect: {reason}; remove it")
        idle.append(f"{path} = {values[section].pop(key)!r} has no effect: {reason}")


def refuse_idle_reference(
    values: dict[str, Any], names: str, written: Mapping[str, str], commanded: set[str], idle: list[str]
) -> None:
    """The same for a reference beside objectives, ``names``, that need none."""
    keys = {path for path in written if path.split(".")[0] == "reference"}
    if not keys:
        return
    reason = f"reference has no effect: {names} needs no reference model"
    if not commanded.isdisjoint(keys) or commanded.isdisjoint(("objective", "objective.name")):
        raise RecipeError(f"{reason}; remove the section")
    values.pop("reference", None)
    idle.append(reason)


def refuse_contradictions(recipe: Recipe, values: Mapping[str, Any], written: Mapping[str, str]) -> None:
    """Raises ``RecipeError`` where two sections can't both be meant."""
    _refuse_parts(recipe)
    if recipe.reference.source == "adapter_off" and recipe.lora is None:
        raise RecipeError("reference.source adapter_off needs a lora section; use cached for full fine-tuning")
    if recipe.reference.source == "adapter_off" and recipe.reference.model not in ("initial", "base"):
        raise RecipeError(
            "reference.source adapter_off is the policy's own base; reference.model must be initial or base"
        )
    if recipe.reference.model == "base" and recipe.lora is None:
        raise RecipeError("reference.model base is the model without its adapter and needs a lora section; use initial")
    if recipe.reference.model == "base" and recipe.reference.source == "live":
        raise RecipeError("reference.source live loads a second model, and base needs none; use adapter_off or cached")
    if recipe.model.quantized and recipe.lora is None:
        raise RecipeError("model.load_in_4bit and load_in_8bit freeze weights and need a lora section")
    if recipe.model.quantized and recipe.mixture.needs.values:
        raise RecipeError("model.load_in_4bit and load_in_8bit are for language models, not for reward models")
    if recipe.lora is not None:
        if recipe.lora.lora_dropout > 0 and not recipe.train.allow_dropout:
            raise RecipeError("lora.lora_dropout has no effect while train.allow_dropout is false; set one of the two")
        own = [key for key in values["lora"] if key != "adapter_name_or_path"]
        if recipe.lora.adapter_name_or_path and own:
            raise RecipeError(f"lora.{own[0]} has no effect: it comes from lora.adapter_name_or_path; remove it")
        adapter_off = recipe.reference.source == "adapter_off" and recipe.reference.model == "initial"
        if recipe.lora.adapter_name_or_path and adapter_off:
            raise RecipeError(
                "reference.source adapter_off is not the initial policy when lora.adapter_name_or_path is given; "
                "use source: cached, or model: base"
            )
    if recipe.data.datasets is not None:
        # columns may be written key by key: --data.columns.prompt question
        own = [key for key in SINGLE_DATASET if any(f"{path}.".startswith(f"data.{key}.") for path in written)]
        if own:
            raise RecipeError(f"data.{own[0]} has no effect beside data.datasets; write it inside each dataset")
    if recipe.train.eval_strategy == "steps" and recipe.train.eval_steps is None:
        raise RecipeError("train.eval_strategy steps needs train.eval_steps")
    if recipe.train.allow_recipe_change and not recipe.train.resume_from_checkpoint:
        raise RecipeError("train.allow_recipe_change has no effect without train.resume_from_checkpoint; leave it out")
    if recipe.train.resume_from_checkpoint and recipe.train.overwrite_output_dir:
        raise RecipeError("train.overwrite_output_dir would delete the checkpoint to resume from; set one of the two")


def _refuse_parts(recipe: Recipe) -> None:
    """The same for objectives, token weights and relabelers."""
    needs = recipe.mixture.needs
    _refuse_reference(recipe)
    _refuse_reward_model(recipe)
    for entry in recipe.regularizers:
        if recipe.lora is not None and entry.built.full_fine_tuning_only:
            raise RecipeError(
                f"regularizers: {entry.name} is of all weights, and with a lora section they don't move; leave one out"
            )
        lora = recipe.lora
        if lora is not None and (lora.adapter_name_or_path or lora.modules_to_save or lora.use_dora):
            raise RecipeError(
                f"regularizers: {entry.name} needs an adapter that starts as nothing and is a sum of weights; leave "
                "lora.adapter_name_or_path, lora.modules_to_save and lora.use_dora out"
            )
    kinds = [entry.name for entry in recipe.regularizers]
    if len(set(kinds)) < len(kinds):
        raise RecipeError(f"regularizers: {max(kinds, key=kinds.count)} is listed twice; keep one")
    for entry in recipe.relabel:
        if not set(needs.legs) <= set(entry.built.legs):
            other = next(leg for leg in needs.legs if leg not in entry.built.legs)
            raise RecipeError(
                f"relabel: {entry.name} makes rows of {' and '.join(entry.built.legs)}, and the objective takes "
                f"{other}; use an objective on pairs, or leave relabel out"
            )
    if recipe.weighting.needs_reference:
        names = " and ".join(
            name for name, part in recipe.weighting.parts.items() if getattr(part, "over", "") == "dataset"
        )
        if recipe.reference.model != "initial" or recipe.reference.source != "cached":
            raise RecipeError(
                f"token_weights: {names} takes reference {{model: initial, source: cached}}; leave it out"
            )


def _refuse_reference(recipe: Recipe) -> None:
    """The same for a reference that some objective or modifier wants otherwise."""
    if "ref_kl" in recipe.mixture.needs.extras and recipe.reference.source == "cached":
        names = " and ".join(entry.name for entry in recipe.objectives if "ref_kl" in entry.built.needs.extras)
        raise RecipeError(
            f"objective: {names} compares whole distributions of policy and reference, and reference.source cached "
            "keeps one number per token; set reference.source to live, or with a lora section to adapter_off"
        )
    if recipe.synced is None:
        return
    if recipe.lora is not None:
        raise RecipeError("modifiers: tr_dpo moves all weights of the reference; leave the lora section out")
    if recipe.reference.source != "live":
        raise RecipeError("modifiers: tr_dpo moves the reference, which a cache can't; set reference.source to live")
    if recipe.weighting.needs_reference:
        raise RecipeError("modifiers: tr_dpo moves the reference that token_weights take from the start; keep one")


def _refuse_reward_model(recipe: Recipe) -> None:
    """The same for objectives of reward models, which have no language model's head."""
    of_head = [entry.name for entry in recipe.objectives if entry.built.needs.values]
    others = [entry.name for entry in recipe.objectives if not entry.built.needs.values]
    if of_head and others:
        raise RecipeError(
            f"objective: {of_head[0]} trains a scalar head and {others[0]} a language model; take one of them"
        )
