"""What draws samples: vLLM in this process, a server, or plain transformers; the same requests for all of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from align import vllm_sampler
from align.adapters import AdapterInfo
from align.errors import RunError
from align.sampling import Drawn, Request, Sampling, draw
from align.sections import ModelSection
from objectives.checks import require


@dataclass(frozen=True, kw_only=True)
class ServingSection:
    """What draws the samples."""

    engine: Literal["auto", "vllm", "server", "transformers"] = "auto"
    """vllm: in this process. server: one that is running, at serving.base_url. transformers: without vLLM, for small
    models. auto: vllm where it is installed, else transformers."""
    base_url: str | None = None
    """With engine server: where it is, e.g. http://localhost:8000/v1."""
    served_model_name: str | None = None
    """With engine server: the name it knows the model by, where it serves several."""
    api_key_env: str | None = None
    """With engine server: the variable that holds its key."""
    timeout: float = 600.0
    """With engine server: seconds for one request."""
    tensor_parallel_size: int = 1
    """With engine vllm: devices that share a model's layers."""
    data_parallel_size: int = 1
    """With engine vllm: copies of the model, each on tensor_parallel_size devices, that share the prompts."""
    gpu_memory_utilization: float | None = None
    """With engine vllm: share of the GPU's memory it may take."""
    max_model_len: int | None = None
    """Most tokens of prompt and response. Default: the model's context."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """With engine vllm: any further arguments of vllm.LLM."""

    def __post_init__(self) -> None:
        for key in ("tensor_parallel_size", "data_parallel_size", "timeout"):
            require(key, getattr(self, key), getattr(self, key) >= 1, ">= 1")
        if self.gpu_memory_utilization is not None:
            share = self.gpu_memory_utilization
            require("gpu_memory_utilization", share, 0 < share <= 1, "in (0, 1]")
        if self.max_model_len is not None:
            require("max_model_len", self.max_model_len, self.max_model_len >= 2, ">= 2")
        if (self.engine == "server") != (self.base_url is not None):
            raise ValueError("engine server and base_url go together: give both, or neither")
        server = () if self.engine == "server" else ("served_model_name", "api_key_env")
        others = self.engine in ("server", "transformers")
        own = ("gpu_memory_utilization", "engine_args") if others else ()
        idle = [key for key in (*server, *own) if getattr(self, key)]
        parallel = ("tensor_parallel_size", "data_parallel_size") if others else ()
        idle += [key for key in parallel if getattr(self, key) != 1]
        if idle:
            raise ValueError(f"{idle[0]} has no effect with engine {self.engine}; remove it")

    @property
    def chosen(self) -> str:
        """The engine that auto stands for here."""
        if self.engine != "auto":
            return self.engine
        return "vllm" if vllm_sampler.installed() is not None else "transformers"


@runtime_checkable
class Sampler(Protocol):
    """Continues prompts."""

    @property
    def engine(self) -> str:
        """Name and version."""
        ...

    def draw(self, requests: Iterable[Request], how: Sampling) -> Iterator[tuple[int, list[Drawn]]]:
        """Numbers of requests with their continuations, as they are done, in any order.

        Args:
            requests: read as far as the engine can use them.
            how: all but number, length and seed, which requests have of their own.
        """
        ...

    def close(self) -> None:
        """Gives memory and connections back."""
        ...


class TransformersSampler:
    """Continues prompts with a model of transformers.

    Args:
        model: the model, its adapter applied.
        tokenizer: of the model.
        ends: tokens that end a response.
        batch: sequences computed together.
        mixture: a second model and its share; see ``align.sampling.draw``.
    """

    WINDOW = 16
    """Batches of requests that are sorted by length together."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        ends: set[int],
        batch: int = 64,
        mixture: tuple[Any, float] | None = None,
    ) -> None:
        import transformers

        self.engine = f"transformers {transformers.__version__}"
        self.model, self.tokenizer, self.ends, self.batch = model, tokenizer, ends, batch
        self.mixture = mixture

    def draw(self, requests: Iterable[Request], how: Sampling) -> Iterator[tuple[int, list[Drawn]]]:
        """See ``Sampler``."""
        window: list[Request] = []
        for request in requests:
            window.append(request)
            if sum(each.n for each in window) >= self.WINDOW * self.batch:
                yield from self._draw(window, how)
                window = []
        yield from self._draw(window, how)

    def _draw(self, window: list[Request], how: Sampling) -> Iterator[tuple[int, list[Drawn]]]:
        pad = self.tokenizer.pad_token_id
        return draw(
            self.model,
            window,
            how,
            ends=self.ends,
            pad=pad,
            tokenizer=self.tokenizer,
            batch=self.batch,
            mixture=self.mixture,
        )

    def close(self) -> None:
        """Lets the model go."""
        self.model = self.mixture = None


def end_tokens(name: str, tokenizer: Any) -> set[int]:
    """Tokens that end a response: the tokenizer's, and those that the model's generation settings add."""
    ends = {int(tokenizer.eos_token_id)}
    path = Path(name) / "generation_config.json"
    if path.is_file():
        more = json.loads(path.read_text()).get("eos_token_id")
        ends |= set(more) if isinstance(more, list) else {more} if isinstance(more, int) else set()
    return ends


def make_sampler(
    serving: ServingSection,
    *,
    section: ModelSection,
    tokenizer: Any,
    adapter: AdapterInfo | None,
    max_model_len: int,
    ends: set[int],
    seed: int,
    mixture: tuple[str, float] | None = None,
) -> Sampler:
    """Starts what the settings ask for.

    Args:
        serving: the settings.
        section: of the model.
        tokenizer: loaded, with the recipe's end token.
        adapter: on the model.
        max_model_len: most tokens of prompt and response.
        ends: tokens that end a response.
        seed: of the engine.
        mixture: a second model and its share, with engine transformers.
    Raises:
        RunError: it can't be started.
    """
    if serving.chosen == "vllm":
        options = dict(serving.engine_args)
        if serving.tensor_parallel_size > 1:
            options["tensor_parallel_size"] = serving.tensor_parallel_size
        if serving.gpu_memory_utilization is not None:
            options["gpu_memory_utilization"] = serving.gpu_memory_utilization
        return vllm_sampler.VllmSampler(
            model=section.model_name_or_path,
            revision=section.model_revision,
            tokenizer=section.tokenizer_name_or_path or section.model_name_or_path,
            dtype=section.dtype,
            adapter=adapter,
            max_model_len=max_model_len,
            ends=ends,
            options=options,
            seed=seed,
            trust_remote_code=section.trust_remote_code,
        )
    assert serving.chosen == "transformers", "a server is made by its caller, who has to know what it serves"
    from align import model as models

    config = models.load_config(section)
    if section.attn_implementation == "auto":  # what is best for training need not be for one token after the other
        section = replace(section, attn_implementation=models.dense_attention(config))  # type: ignore[arg-type]
    model: Any = models.load_weights(section, config, models.compute_dtype(section))
    if adapter is not None:
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(model, adapter.path)
        except (ValueError, RuntimeError, KeyError) as error:
            why = " ".join(str(error).split())[:300]
            raise RunError(
                f"{adapter.path}: this adapter does not go with {section.model_name_or_path!r} ({why})"
            ) from None
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    second: tuple[Any, float] | None = None
    if mixture is not None:
        other = replace(section, model_name_or_path=mixture[0], model_revision="main")
        loaded: Any = models.load_weights(other, models.load_config(other), models.compute_dtype(other))
        if loaded.config.get_text_config().vocab_size != config.get_text_config().vocab_size:
            raise RunError(f"model.mixture_with: {mixture[0]!r} has another vocabulary than the model; name its kin")
        second = loaded.to(device).eval(), mixture[1]
    return TransformersSampler(model.to(device), tokenizer, ends=ends, mixture=second)


def api_key(serving: ServingSection) -> str | None:
    """The server's key.

    Raises:
        RunError: the variable that is to hold it is not set.
    """
    if serving.api_key_env is None:
        return None
    if serving.api_key_env not in os.environ:
        raise RunError(
            f"serving.api_key_env: the variable {serving.api_key_env} is not set; set it to the server's key"
        )
    return os.environ[serving.api_key_env]
