"""The rollout servers as one rank sees them: requests wait here, go to the least busy server, and come back checked."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mmr1_ds.records import RolloutGroup, RolloutRequest, SamplingSettings
from mmr1_ds.rollout.base import longest_first
from mmr1_ds.rollout.servers.client import Exchange, Fault, ServerClient

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 2.0  # between two looks at a server that owes answers
_FAULTS_TO_SUSPECT = 3  # answers in a row that are errors or nonsense
_MOST_TRIES = 5  # of a request that living servers answer so
_MOST_LOSSES = 10  # of servers that died, hung or were given up with the same request, which may be what ends them
_FIRST_PAUSE_SECONDS = 0.5  # before a server that failed is asked again, doubled each time
_LONGEST_PAUSE_SECONDS = 15.0
_COUNTS = ("num_repeated_requests", "num_nonsense_responses", "num_request_timeouts")


@dataclass(eq=False)
class Ticket:
    """Requests that were submitted together, and what has come of them."""

    num_requests: int
    groups: dict[int, RolloutGroup | None] = field(default_factory=dict)  # by position; None was given up
    taken: bool = False

    @property
    def num_responses(self) -> int:
        """Return how many responses are there so far."""
        return sum(len(group.responses) for group in list(self.groups.values()) if group is not None)


@dataclass(eq=False)
class _Job:
    """One request of a ticket on its way through the queue and one server."""

    ticket: Ticket
    position: int
    request: RolloutRequest
    settings: SamplingSettings
    priority: int
    num_tries: int = 0
    num_losses: int = 0
    task: asyncio.Task[None] | None = None


@dataclass(eq=False)
class _Server:
    url: str
    usable: bool = False
    num_returns: int = 0  # times that it became usable: news of a server before its last return are old
    jobs: set[_Job] = field(default_factory=set)
    num_faults: int = 0  # in a row
    pause_seconds: float = _FIRST_PAUSE_SECONDS
    not_before: float = 0.0  # by the loop's clock

    @property
    def load(self) -> int:
        """Responses in flight."""
        return sum(job.request.num_responses for job in self.jobs)


class ServerGroup:
    """Sends requests from a thread of its own. No method is a collective.

    A request whose server fails goes back to the front of the queue; its first attempt is cancelled before that, so no
    late answer to it is ever read. Each request of a ticket gets one group, whatever happens to servers. A server that
    fails for good is a suspect: it is asked nothing more until `set_usable` names it again.
    """

    def __init__(
        self,
        urls: Sequence[str],
        key: str,
        *,
        eos_token_ids: Sequence[int],
        forbidden_token_ids: Sequence[int],
        vocabulary_size: int,
        max_in_flight: int,
        server_timeout_seconds: float,
        request_timeout_seconds: float,
        first_server: int,
    ) -> None:
        """No server is usable until `set_usable` says so.

        Args: key: what every request carries; max_in_flight: responses asked of one server at once, but for a request
            that is larger by itself; first_server: the one that goes first where loads are equal, so that ranks spread.
        """
        self._servers = [_Server(url.rstrip("/")) for url in urls]
        self._exchange = Exchange(eos_token_ids, forbidden_token_ids, vocabulary_size)
        self._client = ServerClient(self._exchange, key, server_timeout_seconds, request_timeout_seconds)
        self._max_in_flight, self._first_server = max_in_flight, first_server
        self._look_seconds = min(_LOOK_SECONDS, server_timeout_seconds / 4)
        self._condition = threading.Condition()  # guards all that follows
        self._queue: list[tuple[int, int, _Job]] = []  # a heap: priority, order
        self._back, self._front = itertools.count(), itertools.count(-1, -1)
        self._suspects: dict[int, str] = {}
        self._counts: Counter[str] = Counter()
        self._held = self._closing = False
        self._error: BaseException | None = None
        self._name, self._numbers = uuid.uuid4().hex[:12], itertools.count()
        self._loop = asyncio.new_event_loop()
        self._wake = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="rollout requests", daemon=True)
        self._thread.start()

    # What the trainer calls

    def submit(self, requests: Sequence[RolloutRequest], settings: SamplingSettings, priority: int = 0) -> Ticket:
        """Put requests into the queue, the longest first, and return at once. priority: the lower the sooner."""
        ticket = Ticket(len(requests))
        with self._condition:
            for position in longest_first(requests, num_at_once=0):  # whether they wait depends on other ranks too
                job = _Job(ticket, position, requests[position], settings, priority)
                heapq.heappush(self._queue, (priority, next(self._back), job))
        self._poke()
        return ticket

    def sample_with(self, adapter: str) -> None:
        """Let requests that are sent from now on be answered by LoRA's adapter of this name."""
        self._exchange.adapter = adapter

    def finished(self, ticket: Ticket) -> int:
        """Number of its requests that are answered or given up."""
        return len(ticket.groups)

    def wait(self, ticket: Ticket, timeout_seconds: float) -> bool:
        """Whether all are. Raises: RuntimeError for a request that no server can answer."""

        def all_are() -> bool:
            return len(ticket.groups) == ticket.num_requests

        return self._wait_for(all_are, timeout_seconds)

    def take(self, ticket: Ticket) -> list[RolloutGroup | None]:
        """Its groups, once, in the order of the requests; None for those given up."""
        with self._condition:
            assert not ticket.taken, "a ticket's groups are taken once"
            assert len(ticket.groups) == ticket.num_requests, "wait for a ticket before taking its groups"
            ticket.taken = True
            return [ticket.groups[position] for position in range(ticket.num_requests)]

    def cut_off(self, ticket: Ticket) -> int:
        """Give up what is not there, in the queue and at the servers. Returns: how many."""
        with self._condition:
            missing = [position for position in range(ticket.num_requests) if position not in ticket.groups]
            ticket.groups.update(dict.fromkeys(missing))
            self._queue = [entry for entry in self._queue if entry[2].ticket is not ticket]
            heapq.heapify(self._queue)
        self._call(lambda: self._cancel(lambda job, _: job.ticket is ticket, repeat=False))
        return len(missing)

    def set_usable(self, servers: Collection[int]) -> None:
        """Ask these servers alone; what others still owe is asked again. Suspects not yet told of are not asked."""
        lost, has_more = set(), False
        with self._condition:
            for number, server in enumerate(self._servers):
                usable = number in servers and number not in self._suspects
                if usable and not server.usable:
                    has_more = server.usable = True
                    server.num_returns += 1
                    server.num_faults, server.pause_seconds, server.not_before = 0, _FIRST_PAUSE_SECONDS, 0.0
                elif server.usable and not usable:
                    server.usable = False
                    lost.add(number)
        if lost:
            self._call(lambda: self._cancel(lambda _, number: number in lost, repeat=True))
        if has_more:
            self._poke()

    def suspects(self) -> dict[int, str]:
        """Servers that failed since the last call, with the reason."""
        with self._condition:
            found, self._suspects = self._suspects, {}
        return found

    def hold(self) -> None:
        """Ask nothing more for now; what is asked goes on."""
        with self._condition:
            self._held = True

    def wait_idle(self, timeout_seconds: float) -> bool:
        """Whether no server owes an answer."""
        return self._wait_for(lambda: not any(server.jobs for server in self._servers), timeout_seconds)

    def release(self) -> None:
        """Go on after `hold`."""
        with self._condition:
            self._held = False
        self._poke()

    def metrics(self) -> dict[str, float]:
        """Counts since the last call."""
        with self._condition:
            counts, self._counts = self._counts, Counter()
        return {f"rollout/{name}": float(counts[name]) for name in _COUNTS}

    def close(self) -> None:
        """Give up everything and end the thread."""
        self._closing = True
        self._poke()
        self._thread.join()

    def _wait_for(self, condition: Callable[[], bool], timeout_seconds: float) -> bool:
        with self._condition:
            self._condition.wait_for(lambda: self._error is not None or condition(), timeout_seconds)
            if self._error is not None:
                raise RuntimeError(f"sampling failed: {self._error}") from self._error
            return condition()

    def _poke(self) -> None:
        self._call(self._wake.set)

    def _call(self, function: Callable[[], object]) -> None:
        def guarded() -> None:
            try:
                function()
            except Exception as error:
                self._fail(error)

        try:
            self._loop.call_soon_threadsafe(guarded)
        except RuntimeError:  # the thread has ended; if not by `close`, `wait` says why
            assert self._closing or self._error is not None

    # What runs in the thread

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._work())
        except BaseException as error:
            self._fail(error)
        finally:
            self._loop.close()

    def _fail(self, error: BaseException) -> None:
        """Let the trainer hear of it: what waits would wait for ever."""
        with self._condition:
            self._error = self._error or error
            self._condition.notify_all()

    def _fail_with(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    async def _work(self) -> None:
        async with self._client:
            try:
                for number in range(len(self._servers)):
                    self._begin(self._look_after(number))
                while not self._closing:
                    self._wake.clear()
                    seconds = self._dispatch()
                    try:
                        await asyncio.wait_for(self._wake.wait(), seconds)
                    except TimeoutError:
                        continue  # a pause is over
            finally:
                self._cancel(lambda *_: True, repeat=False)
                others = asyncio.all_tasks() - {asyncio.current_task()}
                for task in others:
                    task.cancel()
                await asyncio.gather(*others, return_exceptions=True)

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        task.add_done_callback(self._fail_with)
        return task

    def _dispatch(self) -> float | None:
        """Send what can be sent. Returns: seconds until it is worth another look; None when only an event can help."""
        now = self._loop.time()
        with self._condition:
            while self._queue and not self._held:
                job = self._queue[0][2]
                number = self._least_busy(job.request.num_responses, now)
                if number is None:
                    break
                heapq.heappop(self._queue)
                self._servers[number].jobs.add(job)
                job.task = self._begin(self._ask(job, number))
            pauses = [s.not_before - now for s in self._servers if s.usable and s.not_before > now]
            return max(0.01, min(pauses)) if self._queue and pauses and not self._held else None

    def _least_busy(self, num_responses: int, now: float) -> int | None:
        """The server for so many responses more."""
        size, first = len(self._servers), self._first_server
        return min(
            (
                number
                for number, server in enumerate(self._servers)
                if server.usable
                and server.not_before <= now
                and (server.load + num_responses <= self._max_in_flight or not server.jobs)
            ),
            key=lambda number: (self._servers[number].load, (number - first) % size),
            default=None,
        )

    async def _ask(self, job: _Job, number: int) -> None:
        """One attempt. What is neither an answer nor a server's fault ends the task, and with it the run."""
        server, num_returns = self._servers[number], self._servers[number].num_returns
        request_id = f"{self._name}-{next(self._numbers)}"
        group, fault = None, None
        try:
            group = await self._client.group(server.url, job.request, job.settings, request_id, job.priority)
        except Fault as error:
            fault = error
        with self._condition:
            if job not in server.jobs:  # given up at the last moment: whoever did has seen to it
                return
            server.jobs.discard(job)
            if fault is None:
                server.num_faults, server.pause_seconds = 0, _FIRST_PAUSE_SECONDS
                job.ticket.groups.setdefault(job.position, group)
            else:
                self._note_fault(job, number, fault, is_news=server.usable and server.num_returns == num_returns)
            self._condition.notify_all()
        self._wake.set()

    def _note_fault(self, job: _Job, number: int, fault: Fault, is_news: bool) -> None:
        server, now = self._servers[number], self._loop.time()
        if fault.counted_as:
            self._counts[fault.counted_as] += 1
        if not fault.is_lost:
            logger.warning("rollout server %d (%s): %s; asked again", number, server.url, str(fault).rstrip(","))
            job.num_tries += 1
            if job.num_tries >= _MOST_TRIES:
                words = f"{fault} to prompt {job.request.prompt.prompt_id!r}, the last of {_MOST_TRIES} times"
                self._fail(RuntimeError(words))
        self._ask_again(job, was_lost=fault.is_lost)
        if not is_news:
            return
        server.num_faults += 1
        if server.not_before <= now:  # one pause for all requests that fail together
            server.not_before = now + server.pause_seconds
            server.pause_seconds = min(_LONGEST_PAUSE_SECONDS, 2 * server.pause_seconds)
        if fault.is_lost or server.num_faults >= _FAULTS_TO_SUSPECT:
            self._suspect(number, str(fault).rstrip(","))

    def _suspect(self, number: int, reason: str) -> None:
        """Ask others what it owes: the trainer may not look at its servers for minutes."""
        self._suspects[number] = reason
        self._servers[number].usable = False
        self._cancel(lambda _, owing: owing == number, repeat=True)

    def _ask_again(self, job: _Job, was_lost: bool) -> None:
        if job.position in job.ticket.groups:  # given up meanwhile
            return
        self._counts["num_repeated_requests"] += 1
        again = replace(job, num_losses=job.num_losses + was_lost, task=None)
        heapq.heappush(self._queue, (job.priority, next(self._front), again))
        if again.num_losses >= _MOST_LOSSES:
            name = job.request.prompt.prompt_id
            self._fail(
                RuntimeError(f"{_MOST_LOSSES} times a rollout server was lost while it answered prompt {name!r}")
            )

    def _cancel(self, which: Callable[[_Job, int], bool], repeat: bool) -> None:
        """End attempts: closing its connection aborts a request at the server."""
        with self._condition:
            for number, server in enumerate(self._servers):
                for job in [job for job in server.jobs if which(job, number)]:
                    assert job.task is not None
                    job.task.cancel()
                    server.jobs.discard(job)
                    if repeat:
                        self._ask_again(job, was_lost=True)
            self._condition.notify_all()
        self._wake.set()

    async def _look_after(self, number: int) -> None:
        """Look for signs of life of a server whenever it owes answers."""
        server = self._servers[number]
        while True:
            await asyncio.sleep(self._look_seconds)
            num_returns = server.num_returns
            if not (server.usable and server.jobs):
                continue
            fault = await self._client.sign_of_life(server.url)
            with self._condition:
                if fault and server.usable and server.num_returns == num_returns:
                    self._suspect(number, fault)
