"""The watch over all ranks: each reports where it is, and all end when one has died, stalls or went astray.

A thread of each rank writes the rank's place (step, stage, collective) to the store of the process groups, over a
connection of its own, and reads the others'. A collective in native code cannot be interrupted, so another thread
judges (`judgement`) and ends the process. Ages are counted by the reader's clock alone: hosts' clocks need not agree.
"""

from __future__ import annotations

import atexit
import faulthandler
import hmac
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeVar

from mmr1_ds.cluster import judgement
from mmr1_ds.cluster.exits import EXIT_USER_ERROR
from mmr1_ds.cluster.judgement import DONE, RUNNING, Heard, Known, Place
from mmr1_ds.config.redaction import redacted
from mmr1_ds.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

logger = logging.getLogger(__name__)

T = TypeVar("T")

EXIT_FAULT = 1
KEY_VARIABLE = "MMR1_DS_RUN_KEY"  # the launch scripts set it: what a stranger writes to the store is ignored
READ_BY_ALL = 64  # ranks, up to which each reads all others' places
_ALARM = "alarm"
GRACE_SECONDS = 5.0  # beyond the time limit: to inform the other ranks, and then for an orderly end


class CollectiveError(RuntimeError):
    """A collective failed or ran past its deadline. Names the lost rank, the stage and the step."""


def exit_code(verdict: str) -> int:
    """Return the status to end with: a user's error is every rank's, so that no launcher starts the run again."""
    return EXIT_USER_ERROR if judgement.ENDED_BY_USER in verdict else EXIT_FAULT


class Stacks:
    """Where the stacks of all threads of this process are written: on a fault, and on SIGUSR2."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._file: TextIO | None = None

    def write_into(self, folder: Path, signal_number: int) -> None:
        """Write to `folder`/rank_N.txt from now on, where before it was stderr."""
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"rank_{self._rank}.txt").open("a", encoding="utf-8")
        faulthandler.register(signal_number, self._file, all_threads=True)

    def dump(self, reason: str) -> None:
        """Append all stacks of this process.

        A file system may hang. While faulthandler writes, nothing else of Python runs, and a process with a thread in
        a write that hangs may not even be killed. So a child writes to the file, with a limit of its own.
        """
        memory = os.memfd_create("stacks")
        os.write(memory, f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} {redacted(reason)}\n".encode())
        faulthandler.dump_traceback(memory, all_threads=True)
        os.lseek(memory, 0, os.SEEK_SET)
        limited = ["timeout", "-s", "KILL", f"{GRACE_SECONDS:g}", "cat"]
        copy = subprocess.Popen(limited, stdin=memory, stdout=2 if self._file is None else self._file)
        os.close(memory)
        copy.wait()


class Watch:
    """The signs of life of all ranks: it gathers what `judgement` judges, and acts. With one rank it does nothing."""

    def __init__(
        self, rank: int, size: int, timeout_seconds: float, store: Store | None, lost_seconds: float = 120.0
    ) -> None:
        """Start to watch.

        store: a connection that nothing else uses; None = watch nothing. lost_seconds: the longest silence of a rank.
        """
        self.step = 0
        self.stacks = Stacks(rank)
        self._rank, self._size, self._timeout = rank, size, timeout_seconds
        self._host, self._store = socket.gethostname(), store
        self._interval = min(1.0, timeout_seconds / 20)
        self._lost_seconds = min(lost_seconds, timeout_seconds)
        self._asleep = 0.0  # seconds in which this process itself did not run: stopped, or on a starved machine
        self._silence = max(3 * self._interval, 1.0)  # after which a rank counts as silent where a collective failed
        self._stage, self._stage_since = "start", time.monotonic()
        self._number, self._collective, self._waiting_since = 0, "", 0.0
        self._state, self._verdict, self._unwinding = RUNNING, "", False
        self._places: dict[int, tuple[Place, float]] = {}  # and when its beat last changed
        self._answered = self._awake()  # the store's last answer
        self._store_is_lost = False
        self._alarm = True  # until rank 0 says that nothing is unusual
        self._asks = self._was_strange = False
        self._key = os.environ.get(KEY_VARIABLE, "").encode()
        self._changed = threading.Condition(threading.RLock())
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        self._last_words: threading.Thread | None = None
        if store is not None:
            for name, target in (("signs of life", self._exchange), ("deadlines", self._judge)):
                self._threads.append(threading.Thread(target=target, name=name, daemon=True))
                self._threads[-1].start()
            atexit.register(self.close)  # a thread in native code while Python shuts down would abort the process

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Name what this rank does inside, for the messages of all. For the main thread alone."""
        before = self._stage
        self._stage, self._stage_since = name, time.monotonic()
        yield
        self._stage, self._stage_since = before, time.monotonic()  # after an error it stays, to be named

    @contextmanager
    def waiting(self, collective: str, is_of_all: bool) -> Iterator[None]:
        """Surround a collective. is_of_all: whether every rank calls it, so that their numbers compare."""
        self._number += is_of_all
        self._waiting_since = time.monotonic()
        self._collective = collective
        try:
            yield
        finally:
            self._collective = ""

    def known(self) -> Known:
        """What this rank knows at this moment."""
        with self._changed:
            now = self._awake()
            return Known(
                own=self._place(0),  # before the seconds: a collective that begins meanwhile has not waited for long
                others=tuple(
                    Heard(place, now - heard)
                    for rank, (place, heard) in sorted(self._places.items())
                    if rank != self._rank
                ),
                waited_seconds=time.monotonic() - self._waiting_since,
                answered_seconds_ago=now - self._answered,
                store_is_lost=self._store_is_lost,
                silence_seconds=self._silence,
                lost_seconds=self._lost_seconds,
                timeout_seconds=self._timeout,
            )

    def wait_for_all(self) -> None:
        """Wait until every rank has reported where it is. Raises: CollectiveError naming those that have not."""
        if self._store is None:
            return
        with self._changed:
            self._changed.wait_for(lambda: self._verdict or len(self._places) == self._size, self._timeout)
            verdict = self._verdict or judgement.absent(self.known(), self._size)
        if verdict:
            raise self._fault(verdict)

    def astray(self, names: Sequence[str]) -> CollectiveError:
        """The error for collectives of different names, by rank."""
        return self._fault(judgement.desynchronised(self.known(), names))

    def explain(self, where: str, error: Exception) -> CollectiveError:
        """The error for a collective that failed in native code: it names the lost rank if one can be made out."""
        failed = f"{where} at step {self.step} failed (deadline {self._timeout:g} s)"
        reason = redacted((str(error) or repr(error)).splitlines()[0])
        if self._store is None:
            return self._fault(f"{self._place(0)} of {self._size}: {failed}: {reason}")
        end = time.monotonic() + self._silence + 2 * self._interval + 1
        lost, self._asks = "", True
        with self._changed:
            while not self._verdict and not lost and time.monotonic() < end:
                self._changed.wait(self._interval)
                lost = judgement.lost(self.known())
            known = self.known()
        verdict = f"{lost or judgement.elsewhere(known)}; reported by {known.own}: {failed}"
        return self._fault(verdict if lost else f"{verdict}: {reason}")

    def close(self, error: BaseException | None = None) -> None:
        """Report to the others that this rank ends, and stop. Idempotent; not a collective."""
        if self._store is None or self._closed.is_set():
            return
        if error is not None:
            # Other errors may hold what is nobody's business; this one the user reads as it is.
            words = f": {redacted(' '.join(str(error).split()))}" if isinstance(error, UserError) else ""
            self._state = f"{type(error).__name__}{words}"
        else:
            self._state = DONE
        if error is not None and self._rank == 0:  # the store ends with this process
            self._linger()
        self._closed.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(self._interval + 1)  # longer where the store hangs
        faulthandler.cancel_dump_traceback_later()

    def _fault(self, verdict: str) -> CollectiveError:
        """Condemn on the main thread, which then proceeds to an orderly end, unless that takes too long."""
        self._unwinding = True
        self._condemn(verdict)
        return CollectiveError(self._verdict)

    def _condemn(self, verdict: str) -> None:
        """Report the first verdict and dump the stacks. Returns in time even if a write hangs."""
        with self._changed:
            if not self._verdict:
                self._verdict = verdict
                self._changed.notify_all()
                if self._store is not None:  # should the end hang too, in a flush or an exit handler
                    end = threading.Timer(3 * GRACE_SECONDS + self._linger_seconds(), os._exit, (exit_code(verdict),))
                    end.daemon = True
                    end.start()
                self._last_words = threading.Thread(target=self._report, name="last words", daemon=True)
                self._last_words.start()
        assert self._last_words is not None
        self._last_words.join(GRACE_SECONDS)

    def _report(self) -> None:
        """Run as a thread, since whatever it writes to may hang."""
        report_fault(self._rank, self._verdict)
        self.stacks.dump(self._verdict)

    def _exchange(self) -> None:
        """Write this rank's place and read the others', as a thread. Blocks when the store's host does not answer."""
        beat = 0
        assert self._store is not None
        while not self._store_is_lost:
            is_last = self._closed.is_set()
            beat += 1
            try:
                self._store.set(f"place/{self._rank}", self._signed(json.dumps(asdict(self._place(beat)))))
                whole = self._reads_all()
                asked = range(self._size) if whole else (0, self._rank)
                known = [r for r in asked if r in self._places or self._store.check([f"place/{r}"])]
                texts = self._store.multi_get([f"place/{rank}" for rank in known])
                if self._rank == 0 and self._size > READ_BY_ALL:
                    self._store.set(_ALARM, self._signed(json.dumps(bool(judgement.unusual(self.known())))))
                elif self._size > READ_BY_ALL and self._store.check([_ALARM]):
                    self._alarm = self._read(self._store.get(_ALARM), json.loads) is not False
            except (RuntimeError, OSError):  # DistError is a RuntimeError
                self._store_is_lost = True
                with self._changed:
                    self._changed.notify_all()
                return
            with self._changed:
                self._answered = now = self._awake()
                for rank, text in zip(known, texts, strict=True):
                    place, before = self._read(text, Place.read), self._places.get(rank)
                    if place is not None and place.rank == rank and (before is None or before[0].beat != place.beat):
                        self._places[rank] = place, now
                if not whole and not self._alarm:  # rank 0 hears them all
                    heard = self._places[0][1] if 0 in self._places else now
                    self._places |= {r: (place, max(heard, at)) for r, (place, at) in self._places.items()}
                self._changed.notify_all()
            if is_last:
                return
            is_start = len(self._places) < self._size <= READ_BY_ALL  # a start does not wait a second for the last rank
            self._closed.wait(self._interval / 10 if is_start else self._interval)

    def _reads_all(self) -> bool:
        """Whether to read every rank's place: where few write one, and on other ranks than 0 when it may matter.

        Otherwise each rank reads rank 0's alone, whose alarm says whether anything is unusual: what goes out of its
        node grows with R and not with R squared.
        """
        if self._rank == 0 or self._size <= READ_BY_ALL or self._alarm or len(self._places) < self._size:
            return True
        waits_long = self._collective and time.monotonic() - self._waiting_since > self._timeout - 5 * self._interval
        return bool(waits_long or self._verdict or self._asks or self._closed.is_set())

    def _signed(self, text: str) -> str:
        return f"{hmac.digest(self._key, text.encode(), 'sha256').hex()} {text}"

    def _read(self, value: bytes, parse: Callable[[bytes], T]) -> T | None:
        """Read a value of the store. Returns: None, with a line in the log, for what no rank of this run wrote."""
        try:
            digest, _, text = value.partition(b" ")
            if not hmac.compare_digest(digest, hmac.digest(self._key, text, "sha256").hex().encode()):
                raise ValueError("another key signed it")
            return parse(text)
        except (ValueError, TypeError, KeyError) as error:
            if not self._was_strange:
                self._was_strange = True
                logger.warning("a value that no rank of this run wrote is ignored (%s): %.80r", error, value)
            return None

    def _judge(self) -> None:
        """End this process when a rank is lost, as a thread."""
        looked = time.monotonic()
        while not self._closed.is_set():
            # Should a native call keep the interpreter to itself, faulthandler's thread needs no interpreter. It writes
            # to stderr: the file of the stacks may hang.
            faulthandler.dump_traceback_later(self._timeout + GRACE_SECONDS, exit=True, file=2)
            # The silence of others counts while this process could have heard them.
            before, looked = looked, time.monotonic()
            self._asleep += max(0.0, looked - before - 3 * self._interval)
            if verdict := self._verdict or judgement.overdue(self.known()):
                self._condemn(verdict)
                self._end()
                return
            self._closed.wait(self._interval)

    def _awake(self) -> float:
        """Seconds by a clock that stands still while this process does not run."""
        return time.monotonic() - self._asleep

    def _end(self) -> None:
        """End this process, in good order if the main thread is about to."""
        self._linger()
        if self._unwinding:
            time.sleep(GRACE_SECONDS)  # leave() ends the process meanwhile, if all is well
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(exit_code(self._verdict))

    def _linger(self) -> None:
        """Wait until the others know too: the store ends with rank 0, and a launcher may end the rest with any rank."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._store_is_lost or judgement.everyone_knows(self.known()), self._linger_seconds()
            )

    def _linger_seconds(self) -> float:
        return self._silence + 2 * self._interval

    def _place(self, beat: int) -> Place:
        return Place(
            self._rank, self._host, beat, self._state, self.step, self._stage, time.monotonic() - self._stage_since,
            self._number, self._collective, self._verdict,
        )  # fmt: skip


def report_fault(rank: int, verdict: str) -> None:
    """Write the verdict to stderr, from every rank: the one that would log may be the one that is lost."""
    sys.stderr.write(f"mmr1-ds: fault (rank {rank}, host {socket.gethostname()}): {redacted(verdict)}\n")
    sys.stderr.flush()
