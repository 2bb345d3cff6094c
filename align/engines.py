"""What differs between the engines that a run can be launched on: one process, DDP, DeepSpeed's ZeRO and FSDP2.

The trainer, the forward and the objectives do not know them. What has to be known stands here:

    DeepSpeed  the optimizer steps inside the backward pass of a step's last microbatch; under ZeRO-3 a parameter holds
               nothing between uses, and its size is in ``ds_numel``
    FSDP2      parameters are DTensors, of which every process has a part

Weights are read whole into host memory, where their fingerprint is taken: by every process, or by one for all where
the engine divides them (``align.read_once``). That happens afterwards, parameter by parameter, so that no device ever
holds all of a model that is larger than it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def launched() -> str:
    """The engine that ``accelerate launch`` was told to use: ``zero1``, ``zero2``, ``zero3``, ``fsdp2``, ``ddp`` or
    ``single``."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        return f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        return f"fsdp{os.environ.get('FSDP_VERSION', '1')}"
    return "ddp" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "single"


def shards_weights(engine: str) -> bool:
    """Whether a process holds a part of the weights only."""
    return engine in ("zero3", "fsdp2")


def keep_float32(accelerator: Any) -> None:
    """Sums gradients in float32 and leaves outputs as they are, under FSDP2 in lower precision.

    accelerate's default rounds what the model returns, our log-probs among it, to three digits.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and accelerator.mixed_precision == "bf16":
        from torch.distributed.fsdp import MixedPrecisionPolicy

        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def steps_in_backward(accelerator: Any) -> bool:
    """Whether the optimizer moves in the backward pass, so that nothing can be looked at in between."""
    return accelerator.distributed_type.name == "DEEPSPEED"


def discarded_gradients(accelerator: Any, model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """For a backward pass whose gradients are deleted: not summed over processes where that can be left out.

    FSDP2 keeps gradients that it has not summed yet beside ``grad``, where nothing deletes them.
    """
    return contextlib.nullcontext() if accelerator.distributed_type.name == "FSDP" else accelerator.no_sync(model)


def size(parameter: Tensor) -> int:
    """Elements of a parameter, wherever they are."""
    return int(getattr(parameter, "ds_numel", None) or parameter.numel())


@contextlib.contextmanager
def whole_weights() -> Iterator[None]:
    """Models loaded here are not partitioned as they are read, as transformers does it under ZeRO-3."""
    from transformers.integrations import deepspeed

    held = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = held


def on_gpu() -> bool:
    """Whether this run computes on a GPU: there is one, and the launcher was not told to leave it alone."""
    left_alone = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t")
    return torch.cuda.is_available() and not left_alone


def is_reader() -> bool:
    """Whether this process reads the weights, and does not only make room for them."""
    return int(os.environ.get("RANK", "0")) == 0 or not shards_weights(launched())


def before_fsdp(model: nn.Module) -> dict[str, Tensor]:
    """Whole weights by name, for ``fill``; where they were not read, none."""
    return {_plain(name): value.detach() for name, value in model.named_parameters()} if is_reader() else {}


def _plain(name: str) -> str:
    """Of a parameter, without the wrappers that accelerate puts around layers when it divides a model."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


@torch.no_grad()
def fill(model: nn.Module, weights: Mapping[str, Tensor], device: torch.device) -> None:
    """Sends every process its parts of what one has read, one parameter after the other.

    Args:
        model: divided by FSDP2, which sends nothing itself.
        weights: as ``before_fsdp`` gave them.
        device: through which processes talk.
    """
    for name, value in model.named_parameters():
        if is_reader():
            whole = weights[_plain(name)].to(device, value.dtype).contiguous()
        else:
            whole = torch.empty(value.shape, dtype=value.dtype, device=device)
        torch.distributed.broadcast(whole, 0)
        value.copy_(like(whole, value))


def partition(model: nn.Module) -> None:
    """Divides the weights of the process that read them for ZeRO-3, one parameter after the other: DeepSpeed itself
    would move all of them first."""
    import deepspeed
    from accelerate import PartialState
    from transformers.integrations.deepspeed import deepspeed_config

    deepspeed.zero.Init(module=model, config_dict_or_path=deepspeed_config())
    for buffer in model.buffers():  # which DeepSpeed leaves where they are, once parameters are divided
        buffer.data = buffer.data.to(PartialState().device)


def prepare_frozen(accelerator: Any, model: Any) -> nn.Module:
    """A model that is only asked, sharded as the policy is."""
    kind = accelerator.distributed_type.name
    model.requires_grad_(False).eval()
    if kind == "FSDP":
        from accelerate.utils import fsdp_utils

        weights = before_fsdp(model)
        fsdp_utils.fsdp2_prepare_model(accelerator, model)  # in place
        fill(model, weights, accelerator.device)
        return model
    if kind == "DEEPSPEED":
        return _frozen_by_deepspeed(accelerator, model)
    return model.to(accelerator.device)


def _frozen_by_deepspeed(accelerator: Any, model: nn.Module) -> nn.Module:
    import copy

    import deepspeed

    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    if config["zero_optimization"]["stage"] != 3:
        return model.to(accelerator.device)
    for key in ("optimizer", "scheduler"):
        config.pop(key, None)
    config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0}
    config.pop("train_batch_size", None)
    config["zero_optimization"].pop("offload_optimizer", None)
    for key in ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"):
        if config["zero_optimization"].get(key) == "auto":
            config["zero_optimization"].pop(key)
    partition(model)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine


@contextlib.contextmanager
def gathered(*parameters: Tensor, change: bool = False) -> Iterator[None]:
    """Lets ZeRO-3's parameters be read, and changed: what the first process writes counts. Others are there anyhow."""
    if not any(hasattr(each, "ds_id") for each in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if change else None):
        yield


def put_back(model: nn.Module) -> None:
    """Parameters as shards, where FSDP2 has kept some whole after a forward pass that no backward pass followed."""
    for module in model.modules():
        reshard = getattr(module, "reshard", None)
        if callable(reshard):
            reshard()


def like(whole: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a whole tensor, as the parameter has it."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(whole, DTensor) or not isinstance(parameter, DTensor):
        return whole.to(parameter.device)
    mesh, placements = parameter.device_mesh, parameter.placements
    part = distribute_tensor(whole.to(parameter.device), mesh, placements, src_data_rank=None)
    return part.to(parameter.device)  # which is another one than the mesh's where shards are in host memory


def in_full(values: Any) -> Any:
    """All of a DTensor, on every process; anything else as it is."""
    full_tensor = getattr(values, "full_tensor", None)
    return full_tensor() if callable(full_tensor) else values


def finite(norm: Any) -> bool:
    """Whether a gradient norm is a number: as a tensor, a DTensor or what DeepSpeed reports."""
    return bool(torch.as_tensor(in_full(norm)).isfinite())


def rehearse_on_cpu() -> None:
    """Lets FSDP2 run on CPU processes, as rehearsals do.

    accelerate 1.15 shards on accelerators only, and trains replicas where it was told to shard on CPUs. To be called
    when the process group is there and the Accelerator is not.
    """
    from accelerate import DistributedType, PartialState

    if launched() == "fsdp2" and not on_gpu():
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
