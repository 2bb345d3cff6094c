"""Chat completions of any endpoint that speaks OpenAI's protocol: asked again where asking again helps."""

from __future__ import annotations

import email.utils
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from align.errors import RunError

AGAIN = frozenset({408, 409, 425, 429, *range(500, 600)})
"""Statuses after which the same question may be answered."""
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
"""Seconds before the second attempt, doubled before each further one up to the longest."""
LONGEST_ASKED_WAIT = 900.0
"""Most seconds that a server's Retry-After is followed."""


class RefusedError(Exception):
    """The server takes questions, but not this one: too long, say."""


class StoppedError(Exception):
    """Another thread has found that going on makes no sense."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model said."""

    text: str
    finish_reason: str


class Endpoint:
    """Asks for chat completions; one object serves many threads.

    Args:
        base_url: up to ``/v1``.
        key: sent as a bearer token; empty sends none.
        key_name: the variable that held it, for messages.
        timeout: seconds until an attempt is given up.
        attempts: how often a question is asked, at most.
        per_minute: requests, repeated ones included; None for no limit.
        local: on this machine, where no proxy that the environment names leads.
    """

    def __init__(
        self,
        base_url: str,
        *,
        key: str,
        key_name: str,
        timeout: float,
        attempts: int,
        per_minute: float | None,
        local: bool = False,
    ) -> None:
        import httpx2

        self.url = f"{base_url.rstrip('/')}/chat/completions"
        self._key, self.key_name, self.attempts = key, key_name, attempts
        self.interval = 60 / per_minute if per_minute else 0.0
        self.stop = threading.Event()
        self._lock, self._next = threading.Lock(), 0.0
        self._client = httpx2.Client(
            timeout=httpx2.Timeout(timeout, connect=min(timeout, 20.0)),
            limits=httpx2.Limits(max_connections=None),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            trust_env=not local,
        )

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def ask(self, body: Mapping[str, Any]) -> Reply:
        """The completion of a request's body.

        Raises:
            RefusedError: the server will never answer this question.
            StoppedError: ``stop`` was set meanwhile.
            RunError: it can't be reached, does not speak the protocol, or answers nobody with this key or model.
        """
        import httpx2

        why = ""
        for attempt in range(self.attempts):
            wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * random.uniform(0.75, 1.25)
            self._wait_for_turn()
            try:
                response = self._client.post(self.url, json=dict(body))
            except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
                raise RunError(
                    f"judge: base_url makes no address, {self.url!r} ({error}); begin with http(s)://"
                ) from None
            except httpx2.HTTPError as error:  # refused, cut off, timed out
                why = " ".join(str(error).split()) or type(error).__name__
            else:
                status = response.status_code
                if status == 200 and (reply := _reply(response)) is not None:
                    return reply
                why = "it gives no chat completion" if status == 200 else f"status {status}: {self._said(response)}"
                if status in (401, 403):
                    named = f"the key in {self.key_name} is not accepted" if self.key_name else "it wants a key"
                    raise RunError(
                        f"judge: {self.url}: {named} ({why}); set api_key_env to a variable with a valid one"
                    )
                if status == 404:
                    raise RunError(f"judge: {self.url} is not there ({why}); check base_url and model")
                if status != 200 and status not in AGAIN:
                    raise RefusedError(why)
                wait = _asked_to_wait(response, wait)
            if attempt + 1 < self.attempts:
                self._pause(wait)
        raise RunError(
            f"judge: {self.url} does not answer after {self.attempts} attempts ({why}); what was judged is kept, so "
            "run the same command again when it does"
        )

    def _said(self, response: Any) -> str:
        """A server's own words, without the key, which some repeat."""
        try:
            error = response.json()["error"]
            text = str(error["message"] if isinstance(error, dict) else error)
        except (ValueError, LookupError, TypeError):
            text = response.text
        text = text.replace(self._key, "…") if self._key else text
        return " ".join(text.split())[:200].rstrip(". ") or "nothing said"

    def _wait_for_turn(self) -> None:
        with self._lock:
            now = time.monotonic()
            self._next = max(self._next, now) + self.interval
            turn = self._next - self.interval
        self._pause(turn - now)

    def _pause(self, seconds: float) -> None:
        if self.stop.wait(max(seconds, 0)):
            raise StoppedError


def _reply(response: Any) -> Reply | None:
    """None where the body is not what the protocol says."""
    try:
        choice = response.json()["choices"][0]
        text = choice["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return None
    # Thinking models that ran out of tokens say null.
    return Reply(text or "", str(choice.get("finish_reason"))) if text is None or isinstance(text, str) else None


def _asked_to_wait(response: Any, otherwise: float) -> float:
    """Seconds that the server asks to wait: a number, or a date."""
    asked = response.headers.get("retry-after", "")
    try:
        seconds = float(asked)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(asked).timestamp() - time.time()
        except ValueError:
            return otherwise
    return min(max(seconds, 0.0), LONGEST_ASKED_WAIT) if seconds == seconds else otherwise
