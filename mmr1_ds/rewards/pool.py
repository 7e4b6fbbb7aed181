"""The pool of reward processes: whatever a reward does, every response gets a result in bounded time."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import selectors
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from mmr1_ds.config import RewardConfig
from mmr1_ds.errors import UserError
from mmr1_ds.rewards.interfaces import ON_REQUEST
from mmr1_ds.rewards.loading import JUDGED, check_reward_config, each_function, reward_setup
from mmr1_ds.rewards.process import Closed, WorkerProcess

logger = logging.getLogger(__name__)

STARTUP_SECONDS = 120.0  # a worker may import much before it is ready
MAX_RESTART_FAILURES = 3  # failed starts in a row; then the reward is broken for good, and the run must report it
LOGGED_FAILURES = 3  # reasons of each kind logged, each once; later failures are only counted
MAX_REWARD = 1.0e30  # larger ones would not be finite as float32 sums
FAILURE_KINDS = ("timeout", "crash", "invalid", "error", "unscored")
MAX_RESPONSE_LENGTH = 2048  # tokens, where the caller gives no limit


@dataclass(frozen=True)
class RewardItem:
    """One response to be scored."""

    response: str
    response_length: int  # tokens
    ground_truth: str
    prompt: str = ""  # the chat as text, for a judge
    group: int = 0  # responses to one prompt, side by side, have the same number
    columns: Mapping[str, Any] = field(default_factory=dict)  # of the prompt's row, by data.reward_columns
    prompt_ids: Sequence[int] = ()  # tokens; these go to a reward that asks for them
    response_ids: Sequence[int] = ()
    messages: Sequence[Mapping[str, Any]] = ()  # of the prompt's row, to a reward that asks; none where it is a text


@dataclass(frozen=True)
class RewardResult:
    """The result of a reward. A failed response has overall 0, no parts, and accuracy NaN (0 by on_failure=zero)."""

    overall: float  # finite
    accuracy: float  # [0, 1]; NaN = unknown
    parts: Mapping[str, float]  # every further number the reward returned, finite; NaN of one that does not apply
    failure: str | None = None  # one of FAILURE_KINDS
    reason: str = ""  # why it failed, one line


@dataclass(eq=False)
class _Call:
    """Responses that a reward sees together."""

    slots: tuple[int, ...]
    whole: _Call | None = None  # the call that failed, of which this one tries a response alone
    num_tried: int = 0  # of its responses, alone
    is_last: bool = False  # what is left of a call that failed, without the responses that fail alone


@dataclass
class _Worker:
    """A process and what it is doing."""

    process: WorkerProcess
    deadline: float  # monotonic seconds: the deadline of the start while not ready, of the call while busy
    is_ready: bool = False
    call: _Call | None = None  # what is being scored


@dataclass
class _Round:
    """One call of `score`."""

    items: list[RewardItem]
    waiting: deque[_Call]
    results: dict[int, RewardResult] = field(default_factory=dict)


class RewardPool:
    """`num_workers` processes, each scoring one response at a time, a group or a batch; a context manager.

    A response whose reward hangs past `timeout_seconds`, ends its process, raises, or returns no finite number is
    a failed result with the kind named, and so is one that its judge could not judge ("unscored"); its process is
    replaced where needed, and the others continue. Where responses are scored together and the call fails, each is
    tried alone, and those that do not fail alone are scored together once more. Use the pool from one thread. The
    kernel ends the workers, and what they started, when this process ends in whatever way.
    """

    def __init__(
        self, config: RewardConfig, max_response_length: int = MAX_RESPONSE_LENGTH, logs_failures: bool = True
    ) -> None:
        """Start the workers and wait until all have imported the reward.

        Args: max_response_length: tokens, for rewards by length; logs_failures: of the responses.
        Raises: UserError with the reward's own message when it cannot be imported.
        """
        assert config.num_workers >= 1, config.num_workers
        check_reward_config(config)
        self._config = config
        self._setup = reward_setup(config, max_response_length)
        # A judge gives up by itself, so that what overruns both limits is the response's own doing.
        is_judged = any(one.reward_function in JUDGED for one in each_function(config))
        judge_seconds = config.judge.timeout_seconds if is_judged else 0.0
        self._seconds_per_response = config.timeout_seconds + judge_seconds
        self._selector = selectors.DefaultSelector()
        self._workers: list[_Worker] = []
        self._logs_failures = logs_failures
        self._num_logged: Counter[str] = Counter()  # failures by kind
        self._logged: set[tuple[str, str, bool]] = set()
        self.first_reasons: list[str] = []  # of the failures that are logged
        self._num_restart_failures = 0
        self._warned_accuracy = False
        self._is_closed = False
        self._together, self._takes = "one", frozenset[str]()  # the workers tell when they have started
        try:
            for _ in range(config.num_workers):
                self._workers.append(self._start())
            while not all(worker.is_ready for worker in self._workers):
                self._step(_Round([], deque()), is_startup=True)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def together(self) -> str:
        """Which responses the reward sees in one call: one, group or batch. Known once the workers have started."""
        return self._together

    @property
    def takes_messages(self) -> bool:
        """Whether the reward is given the messages of the prompt's row. Known once the workers have started."""
        return "messages" in self._takes

    @property
    def pids(self) -> list[int]:
        """The numbers of the workers' processes."""
        return [worker.process.pid for worker in self._workers]

    def score(self, items: list[RewardItem]) -> list[RewardResult]:
        """Score responses; results in the order of the items, failures included. Never raises for a bad response.

        Raises: UserError when the workers can no longer be started.
        """
        assert not self._is_closed, "the reward pool is closed"
        current = _Round(items, deque(self._calls(items)))
        try:
            while current.waiting or any(worker.call is not None for worker in self._workers):
                self._hand_out(current)
                self._step(current)
        except BaseException:
            self.close()  # an interrupted round must not answer the next one
            raise
        return [current.results[position] for position in range(len(items))]

    def _calls(self, items: list[RewardItem]) -> list[_Call]:
        slots = range(len(items))
        if self._together == "one":
            return [_Call((slot,)) for slot in slots]
        if self._together == "batch":
            return [_Call(tuple(slots))] if items else []
        return [_Call(tuple(part)) for _, part in itertools.groupby(slots, lambda slot: items[slot].group)]

    def close(self) -> None:
        """Kill all workers. Idempotent; nothing is left running."""
        if self._is_closed:
            return
        self._is_closed = True
        for worker in [*self._workers]:
            with contextlib.suppress(KeyError, TypeError, ValueError):  # a thread that scores may be closing it too
                worker.process.close()
        self._workers.clear()
        self._selector.close()

    def _start(self) -> _Worker:
        if self._is_closed:  # by another thread than that which scores
            raise RuntimeError("the reward pool is closed")
        process = WorkerProcess(self._selector)
        process.send(self._setup)
        return _Worker(process, time.monotonic() + STARTUP_SECONDS)

    def _hand_out(self, current: _Round) -> None:
        for index, worker in enumerate(self._workers):
            if not current.waiting or not worker.is_ready or worker.call is not None:
                continue
            if worker.process.has_ended():  # died between two responses: no response is to blame
                worker.process.close()
                self._workers[index] = self._start()
                continue
            worker.call = current.waiting.popleft()
            worker.deadline = time.monotonic() + self._seconds_per_response * len(worker.call.slots)
            items = [vars(current.items[slot]) for slot in worker.call.slots]
            left_out = set(ON_REQUEST) - self._takes
            worker.process.send([{key: item[key] for key in item if key not in left_out} for item in items])

    def _step(self, current: _Round, is_startup: bool = False) -> None:
        """Wait for the next reply or deadline and act on it."""
        deadlines = [worker.deadline for worker in self._workers if not worker.is_ready or worker.call is not None]
        wait_seconds = max(0.0, min(deadlines) - time.monotonic()) if deadlines else 0.0
        for key, _ in self._selector.select(wait_seconds):
            if key.fd not in self._selector.get_map():
                continue  # closed by an event before it
            reply = key.data.handle(key.fd)
            if reply is not None:
                self._take(self._index_of(key.data), reply, current, is_startup)
        for index, worker in enumerate(self._workers):
            if (not worker.is_ready or worker.call is not None) and time.monotonic() >= worker.deadline:
                self._expire(index, current, is_startup)

    def _index_of(self, process: WorkerProcess) -> int:
        return next(index for index, worker in enumerate(self._workers) if worker.process is process)

    def _take(self, index: int, reply: dict[str, Any] | Closed, current: _Round, is_startup: bool) -> None:
        worker = self._workers[index]
        if not worker.is_ready:
            self._take_start(index, reply, is_startup)
        elif isinstance(reply, Closed):
            self._workers[index] = self._start()
            if worker.call is not None:
                self._fail_call(current, worker.call, reply.kind, reply.reason)
        else:
            assert worker.call is not None, "a reply without a request"
            call, worker.call = worker.call, None
            if "results" not in reply:
                self._fail_call(current, call, reply["kind"], reply["reason"])
                return
            for slot, result in zip(call.slots, reply["results"], strict=True):
                if "score" in result:
                    self._accept(current, slot, result["score"])
                else:
                    self._fail(current, slot, result["kind"], result["reason"])
            self._end_try(current, call)

    def _take_start(self, index: int, reply: dict[str, Any] | Closed, is_startup: bool) -> None:
        if not isinstance(reply, Closed) and "ready" in reply:
            self._workers[index].is_ready = True
            self._together, self._takes = reply["ready"], frozenset(reply["takes"])
            self._num_restart_failures = 0
            return
        if isinstance(reply, Closed):
            self._start_failed(index, reply.reason, is_startup)
        else:
            self._workers[index].process.close()
            self._start_failed(index, reply["failed"], is_startup)

    def _start_failed(self, index: int, reason: str, is_startup: bool) -> None:
        """The process at `index` is closed already; put another in its place, or give up."""
        self._num_restart_failures += 1
        if is_startup or self._num_restart_failures >= MAX_RESTART_FAILURES:
            del self._workers[index]
            raise UserError(f"worker.reward.reward_function {self._config.reward_function!r} does not start: {reason}")
        logger.warning("a reward worker did not start again (%s); trying once more", reason)
        self._workers[index] = self._start()

    def _expire(self, index: int, current: _Round, is_startup: bool) -> None:
        worker = self._workers[index]
        worker.process.close()
        if not worker.is_ready:
            self._start_failed(index, f"it took over {STARTUP_SECONDS:g} seconds to import", is_startup)
            return
        self._workers[index] = self._start()
        assert worker.call is not None
        seconds = self._seconds_per_response * len(worker.call.slots)
        self._fail_call(current, worker.call, "timeout", f"no result within {seconds:g} seconds")

    def _fail_call(self, current: _Round, call: _Call, kind: str, reason: str) -> None:
        """A call that gave nothing: its responses are tried alone, so that it costs only those that fail."""
        if len(call.slots) == 1:
            self._fail(current, call.slots[0], kind, reason)
            self._end_try(current, call)
        elif not call.is_last:
            if self._is_to_be_logged(kind, reason, of_call=True):
                logger.warning("reward %s: %s; its %d responses are tried alone", kind, reason, len(call.slots))
            current.waiting.extend(_Call((slot,), whole=call) for slot in call.slots)
        elif self._together == "group":  # of a batch what each response had alone stands
            for slot in call.slots:
                self._fail(current, slot, kind, reason)

    def _is_to_be_logged(self, kind: str, reason: str, of_call: bool) -> bool:
        """Return True for a reason that is new, of which a few a kind are logged."""
        if (kind, reason, of_call) in self._logged or self._num_logged[kind] >= LOGGED_FAILURES:
            return False
        self._logged.add((kind, reason, of_call))
        self._num_logged[kind] += 1
        self.first_reasons.append(f"{kind}: {reason}")
        return self._logs_failures

    def _end_try(self, current: _Round, call: _Call) -> None:
        """After the last of a call's responses was tried alone, those that did not fail are scored together."""
        whole = call.whole
        if whole is None:
            return
        whole.num_tried += 1
        if whole.num_tried < len(whole.slots):
            return
        left = tuple(slot for slot in whole.slots if current.results[slot].failure is None)
        if len(left) > 1:
            current.waiting.append(_Call(left, is_last=True))

    def _accept(self, current: _Round, position: int, found: dict[str, float | None]) -> None:
        score = {key: value for key, value in found.items() if value is not None}
        reason = _why_invalid(score)
        if reason:
            self._fail(current, position, "invalid", reason)
            return
        if "accuracy" not in score and not self._warned_accuracy:
            self._warned_accuracy = True
            logger.warning(
                "the reward returns no 'accuracy'; the curriculum uses 'overall', clipped to [0, 1], in its place"
            )
        overall = score["overall"]
        accuracy = max(score.get("accuracy", min(overall, 1.0)), 0.0)
        absent = {key: math.nan for key in found if key not in score}
        parts = {key: value for key, value in score.items() if key not in ("overall", "accuracy")} | absent
        current.results[position] = RewardResult(overall, accuracy, parts)

    def _fail(self, current: _Round, position: int, kind: str, reason: str) -> None:
        assert kind in FAILURE_KINDS, kind
        if self._is_to_be_logged(kind, reason, of_call=False):
            shown = current.items[position].response[:200]
            effect = "teaches nothing" if self._teaches_nothing(kind) else "counts 0"
            logger.warning("reward %s: %s; the response %s: %r", kind, reason, effect, shown)
        accuracy = math.nan if self._teaches_nothing(kind) else 0.0
        current.results[position] = RewardResult(0.0, accuracy, {}, failure=kind, reason=reason)

    def _teaches_nothing(self, kind: str) -> bool:
        return kind == "unscored" or self._config.on_failure == "mask"


def _why_invalid(score: dict[str, float]) -> str:
    """Why a score cannot be used; empty when it can."""
    if "overall" not in score:
        return f"no number 'overall' in the result; it has {', '.join(score) or 'nothing'}"
    for key, value in score.items():
        if not abs(value) <= MAX_REWARD:  # NaN too
            return f"{key!r} is {value}"
    if not -1.0 <= score.get("accuracy", 0.0) <= 1.0:
        return f"'accuracy' is {score['accuracy']}; it must be in [0, 1], or negative down to -1 for wrong"
    return ""
