"""Rank 0 keeps the rollout servers running: it starts them, notices when one dies or hangs, and starts it anew."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mmr1_ds.rollout.servers.address import ServerAddress
from mmr1_ds.rollout.servers.process import Server

logger = logging.getLogger(__name__)

_WATCH_SECONDS = 0.5
_HEALTH_SECONDS = 3.0  # between two questions after the health of a server
_FIRST_PAUSE_SECONDS = 1.0  # between starts that fail, doubled each time
_LONGEST_PAUSE_SECONDS = 60.0


@dataclass
class _State:
    server: Server
    generation: int = 0  # starts so far
    started_at: float = 0.0
    asked_at: float = 0.0
    ready: bool = False
    next_start: float = 0.0
    pause_seconds: float = _FIRST_PAUSE_SECONDS
    complaint: str | None = None
    failed_start: str = ""  # how the first start failed
    unattended: str = ""  # what kept the watch from it last


class Supervisor:
    """Watches the servers from a thread of its own, so that a restart needs nothing of the training."""

    def __init__(
        self, servers: Sequence[Server], start_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """start_seconds: a server that does not answer for so long after its start is started again."""
        self._states = [_State(server) for server in servers]
        self._start_seconds, self._clock = start_seconds, clock
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self.num_restarts = 0

    def start(self) -> None:
        """Spawn all servers and begin to watch them; returns at once."""
        self._thread = threading.Thread(target=self._watch, name="rollout servers", daemon=True)
        self._thread.start()

    def ready(self) -> list[ServerAddress]:
        """Those that answer, whatever their weights."""
        with self._lock:
            return [
                ServerAddress(number, state.server.url, state.server.num_workers, state.generation)
                for number, state in enumerate(self._states)
                if state.ready and state.complaint is None
            ]

    def complain(self, reasons: Mapping[int, tuple[int, str]]) -> None:
        """Have servers started anew. Args: by number: the generation that failed, and why; older ones are gone."""
        with self._lock:
            for number, (generation, reason) in reasons.items():
                state = self._states[number]
                if state.ready and state.generation == generation and state.complaint is None:
                    state.complaint = reason

    def failed_start(self) -> str:
        """What became of a server that has never answered and will not; empty if all may yet."""
        return next((state.failed_start for state in self._states if state.failed_start), "")

    def last_words(self) -> str:
        """Of every server that does not answer."""
        return "; ".join(state.server.last_words() for state in self._states if not state.ready)

    def close(self) -> None:
        """End all servers."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        try:
            while not self._closing.is_set():
                self.look()
                self._closing.wait(_WATCH_SECONDS)
        finally:
            for state in self._states:
                state.server.stop()

    def look(self) -> None:
        """Attend to every server once: start it, start it anew, or note that it answers."""
        for number, state in enumerate(self._states):
            try:
                self._attend(number, state)
            except Exception as error:  # a full disk, an answer that is none: a run would wait for ever
                self._failed(number, state, f"{type(error).__name__}: {error}")

    def _failed(self, number: int, state: _State, fault: str) -> None:
        """What kept it from being attended to is told once, and is the end of a server that has never answered."""
        if fault != state.unattended:
            logger.warning("rollout server %d (%s) cannot be attended to: %s", number, state.server.url, fault)
        state.unattended = fault
        if state.generation <= 1 and not state.ready:
            state.failed_start = f"rollout server {number} ({state.server.url}) did not start: {fault}"

    def _attend(self, number: int, state: _State) -> None:
        now = self._clock()
        if state.generation == 0:
            self._spawn(state, state.server.start)
            return
        fault = state.complaint
        if fault is None and not state.server.is_running():
            fault = "its process has ended"
        if fault is None and state.ready and now - state.asked_at >= _HEALTH_SECONDS:
            state.asked_at = now
            fault = state.server.complaint() or None
        if fault is None and not state.ready:
            if state.server.is_ready():
                with self._lock:
                    state.ready, state.pause_seconds = True, _FIRST_PAUSE_SECONDS
                if state.generation > 1:
                    logger.info("rollout server %d (%s) is back", number, state.server.url)
            elif now - state.started_at > self._start_seconds:
                fault = f"it has not answered within {self._start_seconds:g} s of its start"
        if fault is None:
            return
        if state.generation == 1 and not state.ready:
            state.failed_start = f"rollout server {number} ({state.server.url}) did not start: {fault}. "
            state.failed_start += state.server.last_words()
        if state.ready or state.next_start == 0.0:
            logger.warning(
                "rollout server %d (%s): %s; starting it anew. %s",
                number, state.server.url, fault, state.server.last_words(),
            )  # fmt: skip
            with self._lock:
                # A server that falls over as soon as it starts must not be started a hundred times a minute.
                state.next_start = now if state.ready else now + state.pause_seconds
                state.pause_seconds = min(_LONGEST_PAUSE_SECONDS, 2 * state.pause_seconds)
                state.ready = False
        if self._clock() >= state.next_start:
            self._spawn(state, state.server.restart)
            self.num_restarts += 1

    def _spawn(self, state: _State, start: Callable[[], None]) -> None:
        start()
        with self._lock:
            state.generation += 1
            state.started_at = self._clock()
            state.ready, state.complaint, state.next_start = False, None, 0.0
