"""Adapters as they lie on disk, and whether they go with a model; known before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from align.errors import RunError

PREFIX, LOW, HIGH = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """What peft wrote into an adapter's folder."""

    path: str
    base: str
    """The model it was trained on, as it was called then."""
    rank: int
    """The largest, where layers have ranks of their own."""
    use_dora: bool
    modules_to_save: tuple[str, ...]
    layers: Mapping[str, tuple[int, int]]
    """Layers that it is added to, with their numbers of outputs and inputs."""


def read_adapter(path: str) -> AdapterInfo:
    """What is known of an adapter without its base.

    Raises:
        RunError: the folder holds no LoRA adapter, or it can't be read.
    """
    folder = Path(path)
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not config.is_file() or not weights.is_file():
        raise RunError(
            f"{path}: no adapter there (adapter_config.json and adapter_model.safetensors); name a run's folder"
        )
    try:
        values: dict[str, Any] = json.loads(config.read_text())
        with safe_open(weights, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (ValueError, OSError, SafetensorError) as error:
        raise RunError(f"{path}: the adapter can't be read ({' '.join(str(error).split())}); copy it again") from None
    if values.get("peft_type") != "LORA":
        raise RunError(f"{path}: a {values.get('peft_type')} adapter; only LoRA adapters are supported")
    layers = {
        name.removeprefix(PREFIX).removesuffix(LOW): (shapes[name.removesuffix(LOW) + HIGH][0], shape[1])
        for name, shape in shapes.items()
        if name.endswith(LOW) and name.removesuffix(LOW) + HIGH in shapes
    }
    if not layers:
        raise RunError(f"{path}: the adapter holds no LoRA layers; copy it again")
    return AdapterInfo(
        path=str(folder),
        base=str(values.get("base_model_name_or_path") or ""),
        rank=max(int(values.get("r", 0)), *(values.get("rank_pattern") or {"": 0}).values()),
        use_dora=bool(values.get("use_dora")),
        modules_to_save=tuple(values.get("modules_to_save") or ()),
        layers=layers,
    )


def refuse_other_base(adapter: AdapterInfo, model: str) -> None:
    """Refuses an adapter whose layers are not this model's, as far as its weight files tell.

    Args:
        adapter: from ``read_adapter``.
        model: what it is to be added to; nothing is known of a Hub id before it is loaded.
    Raises:
        RunError: the model lacks one of its layers, or has it in another size.
    """
    shapes: dict[str, list[int]] = {}
    for path in Path(model).glob("*.safetensors") if Path(model).is_dir() else ():
        with safe_open(path, "pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    for layer, (outputs, inputs) in adapter.layers.items():
        found = shapes.get(f"{layer}.weight")
        if shapes and found is not None and sorted(found) != sorted((outputs, inputs)):
            raise RunError(
                f"{adapter.path}: this adapter was trained on {adapter.base or 'another model'}, where {layer} is "
                f"{outputs} × {inputs}; in {model!r} it is {' × '.join(map(str, found))}: name the adapter's own base"
            )
    if shapes and not any(f"{layer}.weight" in shapes for layer in adapter.layers):
        raise RunError(
            f"{adapter.path}: this adapter was trained on {adapter.base or 'another model'}; {model!r} has no layer "
            f"{next(iter(adapter.layers))}: name the adapter's own base"
        )
