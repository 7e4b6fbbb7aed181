"""The early end of a run: by SIGTERM or SIGUSR1, as job managers send, or by `trainer.max_wall_seconds`.

Until training begins there is nothing to save, and the run ends at once. From then on it ends at the next boundary of
a step; sampling that would not leave the time to learn and save is abandoned, and the step begins anew on resume.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_SLACK = 1.5  # the last step's and save's times may be short of the next ones'


class Preempted(BaseException):  # as KeyboardInterrupt: raised by a signal, in code that may catch Exception
    """The run ends early. From `Trainer.fit` on, all is saved, and the same command resumes from there."""


class SamplingAbandoned(BaseException):
    """The time left is needed to save. Raised on every rank at the same call."""


class Preemption:
    """Whether this process is asked to end, and by when. For the main thread alone, which handles the signals."""

    def __init__(self, notice_seconds: float, max_wall_seconds: float | None) -> None:
        """Start the clock.

        notice_seconds: from a signal to the kill; max_wall_seconds: from now until all must be saved.

        SIGUSR1 is `sbatch --signal=USR1@...`, a warning of the job's end, whose time SLURM_JOB_END_TIME gives.
        """
        self._notice_seconds = notice_seconds
        self._seconds_after_sampling = notice_seconds / 2 / _SLACK  # until a step has been timed
        self._seconds_to_save = 0.0
        self._deadline: float | None = None  # monotonic
        self._training = self._interruptible = False
        self.reason = ""  # why the run is to end; empty while it is not
        self._wall_deadline = None if max_wall_seconds is None else time.monotonic() + max_wall_seconds

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Let signals ask the run to end inside; afterwards they do what they did before."""
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._on_alarm)
        self._set_alarm()
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in before.items():
                signal.signal(number, handler)

    def begin_training(self) -> None:
        """Declare that there is something to save from now on."""
        self._training = True

    @property
    def is_asked(self) -> bool:
        """Whether the run is to end at the next boundary, as far as this rank knows: others may not have heard yet."""
        return bool(self.reason)

    @property
    def is_urgent(self) -> bool:
        """Whether sampling would take time that is needed to learn and save."""
        return self._deadline is not None and time.monotonic() >= self._deadline - self._seconds_needed

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Surround sampling that other ranks do not wait for. Raises: SamplingAbandoned, on this rank, once urgent."""
        self._interruptible = True
        try:
            if self.is_urgent:
                raise SamplingAbandoned
            yield
        finally:
            self._interruptible = False

    def took(self, *, after_sampling: float | None = None, to_save: float | None = None) -> None:
        """Record the seconds that a step took after its sampling, or a save: the next are expected to take as long."""
        if after_sampling is not None:
            self._seconds_after_sampling = after_sampling
        if to_save is not None:
            self._seconds_to_save = to_save

    @property
    def _seconds_needed(self) -> float:
        return _SLACK * (self._seconds_after_sampling + self._seconds_to_save)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self._training:
            if self.is_asked:
                return
            self.reason = f"{name} before training began"
            raise Preempted(self.reason)
        seconds = self._notice_seconds
        if number == signal.SIGUSR1 and os.environ.get("SLURM_JOB_END_TIME", "").isdigit():
            seconds = int(os.environ["SLURM_JOB_END_TIME"]) - time.time()
        deadline = time.monotonic() + seconds
        # A second signal is heeded where it leaves less time: a warning long before, then the job is ended.
        if self._deadline is None or deadline < self._deadline:
            self._ask(self.reason or f"{name} received", deadline)

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:
        if not self.is_asked and self._wall_deadline is not None:
            if time.monotonic() >= self._wall_deadline - self._notice_seconds:
                self._ask("trainer.max_wall_seconds are over", self._wall_deadline)
        elif self.is_urgent and self._interruptible:
            raise SamplingAbandoned
        self._set_alarm()

    def _ask(self, reason: str, deadline: float) -> None:
        self.reason, self._deadline = reason, deadline
        if self._wall_deadline is not None:
            self._deadline = min(deadline, self._wall_deadline)
        seconds = self._deadline - time.monotonic()
        logger.warning("%s: the run saves and ends within %.0f s, after this step if there is time", reason, seconds)
        self._set_alarm()

    def _set_alarm(self) -> None:
        """Set the alarm for the next moment that changes anything, and repeat it: the seconds needed may grow."""
        now, at = time.monotonic(), None
        if self._deadline is not None:
            at = self._deadline - self._seconds_needed
        elif self._wall_deadline is not None:
            at = self._wall_deadline - self._notice_seconds
        if at is not None:
            signal.setitimer(signal.ITIMER_REAL, max(0.01, at - now), 0.5)
