"""How a judge is asked: what it said before is on disk; the rest goes to its endpoint, or to a server of its own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import xxhash

from align import judge_prompts, local_server
from align.completions import Endpoint, RefusedError, StoppedError
from align.errors import RunError
from align.judge_games import Judged, Question
from align.judge_prompts import rating_of, verdict_of
from align.local_server import LocalServer, Served
from align.reply_cache import ReplyCache
from data.store import cache_dir

if TYPE_CHECKING:
    from align.judges import Judge

T = TypeVar("T")

AT_ONCE = {"server": 8, "vllm": 64}
"""Requests under way at a time, where the recipe does not say: an endpoint has others to serve too."""
PATIENCE = 10.0
"""Seconds until a server that does not answer is seen to have ended."""
BUMP = 0.5
"""How much warmer the judge is each time it gave no verdict."""
REFUSED = "the judge's endpoint refuses the question"
NO_VERDICT = "the judge gave no verdict"


class Asking:
    """Asks one judge, whose keys say whom and how.

    A server is started when a question has to be asked that was not asked before, and runs until ``close``.
    """

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    @cached_property
    def served(self) -> Served:
        """What a server of ours serves, with engine vllm."""
        return Served(model=self.judge.model, revision=self.judge.revision, arguments=self.judge.engine_args)

    @cached_property
    def identity(self) -> str:
        """What the model is, wherever it lies and on whichever port it is served; with engine vllm.

        Raises:
            RunError: there is no such model.
        """
        with _as_judge():
            return self.served.identity()

    def check(self) -> None:
        """Refuses what can't be asked, before anything is read.

        Raises:
            RunError: the variable with the key is not set; with engine vllm, vLLM or the model is not there.
        """
        self._key()
        if self.judge.engine == "vllm":
            with _as_judge():
                self.served.check()

    def __call__(self, questions: Sequence[Question]) -> dict[Question, Judged]:
        """What is said of each question.

        Raises:
            RunError: nobody answers, or every question is refused.
        """
        found = {question: self._judged(question, known=True) for question in dict.fromkeys(questions)}
        new = [question for question, judged in found.items() if judged is None]
        found |= dict(zip(new, self._at_once(self._judged, new), strict=True)) if new else {}
        judged = {question: each for question, each in found.items() if each is not None}
        refused = [each.reason for each in judged.values() if each.reason.startswith(REFUSED)]
        if refused and len(refused) == len(judged) and not self._cache.answered:
            raise RunError(f"judge: {self._endpoint.url}: {refused[0]}; check model, max_tokens and extra_body")
        return judged

    def close(self) -> None:
        """Closes connections and stops the server; the next question begins anew."""
        if (endpoint := vars(self).pop("_endpoint", None)) is not None:
            endpoint.stop.set()
            endpoint.close()
        if (server := vars(self).pop("_server", None)) is not None:
            local_server.give_back(server)
        vars(self).pop("_cache", None)

    def _judged(self, question: Question, known: bool = False) -> Judged | None:
        """Asks until there is a verdict, warmer each time; None where that takes a reply that is not ``known``."""
        parse = verdict_of if len(question.answers) == 2 else rating_of
        for again in range(self.judge.retries + 1):
            body = self._body(question, again)
            key = ReplyCache.key({"again": again, **body, **self._whom})
            if (reply := self._cache.get(key)) is None:
                if known:
                    return None
                try:
                    reply = self._endpoint.ask(body)
                except RefusedError as error:
                    return Judged(None, again, f"{REFUSED}: {error}")
                self._cache.put(key, reply)
            if (said := parse(reply.text)) is not None:
                return Judged(said, again)
        return Judged(None, self.judge.retries + 1, NO_VERDICT)

    def _body(self, question: Question, again: int) -> dict[str, Any]:
        judge = self.judge
        how: dict[str, Any] = {"rubric": judge.rubric, "reference": question.reference}
        texts = [shown.text for shown in question.answers]
        cut_off = [shown.cut_off for shown in question.answers]
        if len(texts) == 2:
            messages = judge_prompts.pairwise(question.prompt, *texts, cut_off=cut_off, **how)
        else:
            messages = judge_prompts.pointwise(question.prompt, *texts, cut_off=cut_off[0], **how)
        return {
            "model": judge.model,
            "messages": messages,
            "temperature": judge.temperature + BUMP * again,
            "max_tokens": judge.max_tokens,
            **judge.extra_body,
        }

    def _at_once(self, function: Callable[[Question], T], questions: Sequence[Question]) -> list[T]:
        """Results in order; the first fault stops the others, after what is under way."""
        endpoint = self._endpoint
        endpoint.stop.clear()

        def guarded(question: Question) -> T:
            if endpoint.stop.is_set():
                raise StoppedError
            try:
                return function(question)
            except BaseException:
                endpoint.stop.set()
                raise

        try:
            with ThreadPoolExecutor(self.judge.concurrency or AT_ONCE[self.judge.engine]) as threads:
                futures = [threads.submit(guarded, question) for question in questions]
        except BaseException:  # Ctrl-C, which other threads do not hear of
            endpoint.stop.set()
            raise
        faults = [error for future in futures if (error := future.exception()) is not None]
        for error in sorted(faults, key=lambda error: isinstance(error, StoppedError)):
            raise self._explained(error)
        return [future.result() for future in futures]

    def _explained(self, error: BaseException) -> BaseException:
        """A server of ours that has ended says why better than its silence does."""
        server: LocalServer | None = vars(self).get("_server")
        if server is None or not isinstance(error, RunError) or (fate := server.fate(within=PATIENCE)) is None:
            return error
        return RunError(f"judge: what was judged is kept, but {fate}")

    def _key(self) -> str:
        name = self.judge.api_key_env
        if name is None:
            return ""
        if not (key := os.environ.get(name, "").strip()):
            raise RunError(
                f"judge: the variable {name} is not set; export it with the endpoint's key, or set api_key_env to null"
            )
        return key

    @cached_property
    def _whom(self) -> dict[str, str]:
        """Who replies: what the key of a reply holds besides the question."""
        if self.judge.engine == "vllm":
            return {"model": self.identity}
        return {"url": str(self.judge.base_url).rstrip("/")}

    @cached_property
    def _server(self) -> LocalServer:
        with _as_judge():
            return local_server.borrow(self.served, self.judge.start_timeout)

    @cached_property
    def _endpoint(self) -> Endpoint:
        judge, ours = self.judge, self.judge.engine == "vllm"
        return Endpoint(
            self._server.base_url if ours else str(judge.base_url),
            key=self._server.key if ours else self._key(),
            key_name=judge.api_key_env or "",
            timeout=judge.timeout,
            attempts=judge.attempts,
            per_minute=judge.requests_per_minute,
            local=ours,
        )

    @cached_property
    def _cache(self) -> ReplyCache:
        whom = self.identity if self.judge.engine == "vllm" else f"{self._whom['url']} {self.judge.model}"
        return ReplyCache(cache_dir() / "judge" / f"{xxhash.xxh3_64_hexdigest(whom.encode())}.jsonl")


@contextlib.contextmanager
def _as_judge() -> Iterator[None]:
    """Says of whom a message is."""
    try:
        yield
    except RunError as error:
        raise RunError(f"judge: {error}") from None
