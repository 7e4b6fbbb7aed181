"""Chat completions of OpenAI-compatible servers: deadlines, retries with backoff, circuit breakers."""

from __future__ import annotations

import json
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from mmr1_ds import io

FIRST_BACKOFF_SECONDS = 0.5  # doubled by each retry, times a random number in [0.5, 1]
MAX_BACKOFF_SECONDS = 16.0
MAX_REPLY_BYTES = 1 << 20
MAX_REASON_CHARS = 300
FAILURES_TO_OPEN = 5  # in a row; then the server is left alone
OPEN_SECONDS = 30.0  # then one request tries it again
_SHOWN_BYTES = 1 << 14  # of an error; far over what is told of it
_RETRYABLE = frozenset((408, 409, 425, 429))  # and every 5xx
_REQUESTS_FAULT = frozenset((400, 413, 422))  # the request is at fault; the server is well


class ChatFailure(Exception):
    """No completion, and why; never holds the key."""


@dataclass(frozen=True)
class _Failure:
    """One request that failed."""

    reason: str
    is_retryable: bool = True
    is_servers_fault: bool = True
    retry_after_seconds: float = 0.0


class CircuitBreaker:
    """Closed while a server answers; open for OPEN_SECONDS after FAILURES_TO_OPEN failures in a row."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._num_failures = 0
        self._opened_at = 0.0

    def allows(self) -> bool:
        """Whether a request may be sent. After OPEN_SECONDS one may; its failure opens the circuit again."""
        return self._num_failures < FAILURES_TO_OPEN or self._clock() - self._opened_at >= OPEN_SECONDS

    def record(self, is_success: bool) -> None:
        self._num_failures = 0 if is_success else self._num_failures + 1
        self._opened_at = self._clock()


class _Endpoint:
    """One server."""

    def __init__(self, base_url: str, clock: Callable[[], float]) -> None:
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.breaker = CircuitBreaker(clock)
        self.last_failure = ""


class ChatClient:
    """Spreads requests over servers of one model. Use it on one thread."""

    def __init__(
        self,
        base_urls: Sequence[str],
        model: str,
        key: str | None,
        *,
        timeout_seconds: float,
        request_timeout_seconds: float,
        max_retries: int,
        max_tokens: int,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Args: timeout_seconds: of one completion, retries and pauses included; the others are a request's."""
        self._endpoints = [_Endpoint(url, clock) for url in base_urls]
        self._next = os.getpid() % len(self._endpoints)  # many processes: not all at the first server
        self._model, self._key, self._max_tokens = model, key, max_tokens
        self._timeout_seconds, self._request_timeout_seconds = timeout_seconds, request_timeout_seconds
        self._max_retries = max_retries
        self._clock, self._sleep = clock, sleep

    def complete(self, prompt: str) -> str:
        """The model's reply to one user message, sampled at temperature 0.

        Raises: ChatFailure, at the latest after `timeout_seconds`.
        """
        deadline = self._clock() + self._timeout_seconds
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0.0,
            "max_tokens": self._max_tokens,
        }
        reason = ""
        for attempt in range(self._max_retries + 1):
            endpoint = self._choose()
            outcome = self._request(endpoint.url, body, min(self._request_timeout_seconds, deadline - self._clock()))
            if isinstance(outcome, str):
                endpoint.breaker.record(is_success=True)
                return outcome
            endpoint.last_failure = reason = outcome.reason
            endpoint.breaker.record(is_success=not outcome.is_servers_fault)
            if not outcome.is_retryable or attempt == self._max_retries:
                break
            pause = max(_backoff_seconds(attempt), outcome.retry_after_seconds)
            if self._clock() + pause >= deadline:
                break
            self._sleep(pause)
        raise ChatFailure(reason)

    def _choose(self) -> _Endpoint:
        """The next server in turn that is not left alone."""
        for _ in self._endpoints:
            endpoint = self._endpoints[self._next]
            self._next = (self._next + 1) % len(self._endpoints)
            if endpoint.breaker.allows():
                return endpoint
        raise ChatFailure(f"left alone after {FAILURES_TO_OPEN} failures in a row, the last: {endpoint.last_failure}")

    def _request(self, url: str, body: dict[str, Any], seconds: float) -> str | _Failure:
        """One request. A thread sends it: a socket's timeout restarts with every byte, a thread can be left behind."""
        outcomes: queue.SimpleQueue[str | _Failure] = queue.SimpleQueue()
        thread = threading.Thread(target=lambda: outcomes.put(self._send(url, body, seconds)), daemon=True)
        thread.start()
        try:
            outcome = outcomes.get(timeout=max(seconds, 0.0))
        except queue.Empty:
            outcome = _Failure(f"no reply within {seconds:.3g} seconds")
        if isinstance(outcome, _Failure):
            # Servers quote the key in their errors. Only then cut: a part of it would be left.
            reason = outcome.reason.replace(self._key, "***") if self._key else outcome.reason
            reason = reason[:MAX_REASON_CHARS]
            return _Failure(reason, outcome.is_retryable, outcome.is_servers_fault, outcome.retry_after_seconds)
        return outcome

    def _send(self, url: str, body: dict[str, Any], seconds: float) -> str | _Failure:
        most = MAX_REPLY_BYTES + 1
        try:
            answer = io.ask(
                "POST", url, self._key, body, timeout_seconds=max(seconds, 0.001), most_bytes=most, through_proxies=True
            )
        except (OSError, HTTPException, ValueError) as error:
            return _Failure(f"{type(error).__name__}: {error}")
        if not 200 <= answer.status < 300:
            return _refusal(answer)
        if len(answer.content) > MAX_REPLY_BYTES:
            return _Failure(f"a reply of over {MAX_REPLY_BYTES} bytes", is_retryable=False)
        try:
            text = json.loads(answer.content)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            return _Failure(f"no chat completion: {answer.content[:_SHOWN_BYTES]!r}", is_retryable=False)
        return text if isinstance(text, str) else _Failure("an empty completion", False, is_servers_fault=False)


def _refusal(answer: io.Answer) -> _Failure:
    """What a status other than 2xx means."""
    shown = " ".join(answer.content[:_SHOWN_BYTES].decode(errors="replace").split())
    wait = answer.headers.get("Retry-After", "")
    return _Failure(
        f"HTTP {answer.status}: {shown}",
        is_retryable=answer.status in _RETRYABLE or answer.status >= 500,
        is_servers_fault=answer.status not in _REQUESTS_FAULT,
        retry_after_seconds=float(wait) if wait.isdecimal() and wait.isascii() else 0.0,
    )


def _backoff_seconds(attempt: int) -> float:
    return min(FIRST_BACKOFF_SECONDS * 2.0**attempt, MAX_BACKOFF_SECONDS) * random.uniform(0.5, 1.0)
