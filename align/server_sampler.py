"""A running server that speaks OpenAI's protocol: ``vllm serve``, which ``trl vllm-serve`` starts too."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any

import httpx2 as httpx

from align.errors import RunError
from align.sampling import Drawn, Request, Sampling

AT_ONCE = 64
"""Requests under way. The server has its own queue; more would only wait there."""
WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds between attempts."""


class ServerSampler:
    """Continues prompts on a server.

    Args:
        base_url: up to and including ``/v1``, or without it.
        model: the name that the server knows the model by; None where it serves one.
        ends: tokens that end a response.
        timeout: seconds for one request.
        api_key: sent as a bearer token.
        waits: seconds before each further attempt.
    Raises:
        RunError: nothing answers there, or the server serves no such model.
    """

    def __init__(
        self,
        base_url: str,
        *,
        model: str | None,
        ends: set[int],
        timeout: float = 600.0,
        api_key: str | None = None,
        waits: tuple[float, ...] | None = None,
    ) -> None:
        self.url = base_url.rstrip("/").removesuffix("/v1")
        self.ends, self.waits = sorted(ends), WAITS if waits is None else waits
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._of_model = True
        self._client = httpx.Client(timeout=timeout, headers=headers)
        self._served = self._models()
        if model is not None and model not in self._served:
            known = ", ".join(self._served) or "none"
            raise RunError(f"{self.url} does not serve {model!r} (it serves: {known}); set serving.served_model_name")
        if model is None and not self._served:
            raise RunError(f"{self.url} serves no model; start it with one")
        self.model = model or next(iter(self._served))
        self.engine = f"server {self._version()}"

    @property
    def root(self) -> str:
        """Path or Hub id of what is served, as the server says."""
        return str(self._served[self.model].get("root") or self.model)

    @property
    def max_model_len(self) -> int | None:
        """Most tokens of prompt and response, as the server says."""
        length = self._served[self.model].get("max_model_len")
        return None if length is None else int(length)

    def draw(self, requests: Iterable[Request], how: Sampling) -> Iterator[tuple[int, list[Drawn]]]:
        """See ``align.samplers.Sampler``."""
        plain = (how.temperature, how.top_p, how.top_k, how.min_p) in ((1.0, 1.0, 0, 0.0), (0.0, 1.0, 0, 0.0))
        self._of_model = plain or self._says_log_probs_of_model()
        waiting = iter(requests)
        under_way: dict[Future[list[Drawn]], Request] = {}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                while True:
                    for request in islice(waiting, AT_ONCE - len(under_way)):
                        under_way[pool.submit(self._ask, request, how)] = request
                    if not under_way:
                        return
                    for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                        request = under_way.pop(future)
                        yield request.number, future.result()
            finally:
                for future in under_way:
                    future.cancel()

    def close(self) -> None:
        """Ends the connections."""
        self._client.close()

    def _says_log_probs_of_model(self) -> bool:
        """Whether log-probs are the model's rather than those after temperature and cuts, as `trl vllm-serve` has them:
        of a distribution cut to its best token, that token has log-prob 0."""
        probe = Request(number=0, prompt=(self.ends[0],), n=1, max_tokens=1, seed=0)
        (drawn,) = self._ask(probe, Sampling(top_k=1, max_tokens=1))
        return drawn.logprob != 0.0

    def _ask(self, request: Request, how: Sampling) -> list[Drawn]:
        answer = self._post(
            "/v1/completions",
            {
                "model": self.model,
                "prompt": list(request.prompt),
                "n": request.n,
                "max_tokens": request.max_tokens,
                # All of them: what is left out comes from the model's own configuration.
                "temperature": how.temperature,
                "top_p": how.top_p,
                "top_k": how.top_k,
                "min_p": how.min_p,
                "repetition_penalty": 1.0,
                "seed": request.seed if how.temperature > 0 else None,
                "stop": how.stop,
                "stop_token_ids": self.ends,
                "skip_special_tokens": False,
                "logprobs": 0,
                "return_token_ids": True,
                "add_special_tokens": False,
            },
        )
        choices = sorted(answer.get("choices", ()), key=lambda choice: choice["index"])
        if len(choices) != request.n:
            raise RunError(f"{self.url} gave {len(choices)} of {request.n} responses; is it a vLLM server?")
        return [self._drawn(choice) for choice in choices]

    def _drawn(self, choice: Mapping[str, Any]) -> Drawn:
        ids = choice.get("token_ids")
        if ids is None:
            raise RunError(f"{self.url} does not return token ids; take a vLLM server (0.27 or later)")
        reason = choice.get("finish_reason")
        if reason not in ("stop", "length"):
            raise RunError(f"{self.url} gave a response up ({reason}); start again, what is finished is kept")
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
        return Drawn(
            token_ids=tuple(ids),
            logprob=None if logprobs is None or not self._of_model else float(sum(logprobs)),
            finish_reason=reason,
        )

    def _models(self) -> dict[str, Mapping[str, Any]]:
        found = self._request("GET", "/v1/models", None)
        return {str(each["id"]): each for each in found.get("data", ())}

    def _version(self) -> str:
        try:
            return f"vllm {self._client.get(f'{self.url}/version').json()['version']}"
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return "of unknown version"

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._request("POST", path, body)

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        """One answer, asked for again where that can help."""
        problem = ""
        for pause in (*self.waits, None):
            try:
                response = self._client.request(method, self.url + path, json=body)
                if response.status_code < 400:
                    return response.json()
                problem = f"{response.status_code}: {_message(response)}"
                if response.status_code in (401, 403):
                    raise RunError(
                        f"{self.url} refuses the key ({problem}); set serving.api_key_env to the one it takes"
                    )
                if response.status_code < 500 and response.status_code != 429:
                    raise RunError(
                        f"{self.url}{path} refuses a request ({problem}). What is finished is kept: mend the settings "
                        "or the server, and start again to go on"
                    )
            except (httpx.HTTPError, ValueError) as error:
                problem = " ".join(str(error).split()) or type(error).__name__
            if pause is not None:
                time.sleep(pause)
        raise RunError(
            f"{self.url}{path} does not answer ({problem}); see that the server runs (vllm serve MODEL) and that "
            "serving.base_url is right. What is finished is kept: start again to go on"
        )


def _message(response: Any) -> str:
    try:
        body = response.json()
        return " ".join(str((body.get("error") or body).get("message", body)).split())[:300]
    except (json.JSONDecodeError, ValueError, AttributeError):
        return " ".join(response.text.split())[:300]
