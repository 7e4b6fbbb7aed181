"""Who is lost. Each rank tells the others where it is, and all end when one has died, stalls or went astray.

A thread of each rank writes the rank's place (step, stage, collective) to the store of the process groups, over a
connection of its own, and reads the others'. A collective in native code cannot be interrupted, so another thread
judges and ends the process. Ages are counted by the reader's clock alone: hosts' clocks need not agree.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from mmr1_ds.config.redaction import redacted
from mmr1_ds.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

EXIT_FAULT = 1
GRACE_SECONDS = 5.0  # beyond the time limit: to tell the other ranks, and then for an orderly end
RUNNING, DONE = "running", "done"


class CollectiveError(RuntimeError):
    """A collective failed or ran past its deadline. Names the lost rank, the stage and the step."""


@dataclass(frozen=True)
class Place:
    """What a rank tells of itself."""

    rank: int
    host: str
    beat: int = 0  # another number each time
    state: str = RUNNING  # or DONE, or the name of the error it ended with
    step: int = 0
    stage: str = "start"
    stage_seconds: float = 0.0
    number: int = 0  # of control collectives begun
    collective: str = ""  # the one it waits in
    verdict: str = ""  # whom it holds for lost

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host})"

    @classmethod
    def read(cls, text: bytes) -> Place:
        """From the store. Raises: ValueError, TypeError for what no rank wrote."""
        values = json.loads(text)
        return cls(**{field.name: values[field.name] for field in fields(cls)})


class Stacks:
    """Where the stacks of all threads of this process are written: on a fault, and on SIGUSR2."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._file: TextIO | None = None

    def write_into(self, folder: Path, signal_number: int) -> None:
        """From now on to `folder`/rank_N.txt; before, to stderr."""
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
    """The signs of life of all ranks. With one rank it watches nothing."""

    def __init__(self, rank: int, size: int, timeout_seconds: float, store: Store | None) -> None:
        """store: a connection that nothing else uses; None = watch nothing."""
        self.step = 0
        self.stacks = Stacks(rank)
        self._rank, self._size, self._timeout = rank, size, timeout_seconds
        self._host, self._store = socket.gethostname(), store
        self._interval = min(1.0, timeout_seconds / 20)
        self._silence = max(3 * self._interval, 1.0)  # after which a rank counts as silent where a collective failed
        self._stage, self._stage_since = "start", time.monotonic()
        self._number, self._collective, self._waiting_since = 0, "", 0.0
        self._state, self._verdict, self._unwinding = RUNNING, "", False
        self._places: dict[int, tuple[Place, float]] = {}  # and when its beat last changed
        self._answered = time.monotonic()  # the store's last answer
        self._store_is_lost = False
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
        """What this rank does, for the messages of all; of the main thread."""
        before = self._stage
        self._stage, self._stage_since = name, time.monotonic()
        yield
        self._stage, self._stage_since = before, time.monotonic()  # after an error it stays, to be named

    @contextmanager
    def waiting(self, collective: str, is_of_all: bool) -> Iterator[None]:
        """Around a collective. is_of_all: whether every rank calls it, so that their numbers compare."""
        self._number += is_of_all
        self._waiting_since = time.monotonic()
        self._collective = collective
        try:
            yield
        finally:
            self._collective = ""

    def wait_for_all(self) -> None:
        """Until every rank has told where it is. Raises: CollectiveError naming those that have not."""
        if self._store is None:
            return
        with self._changed:
            self._changed.wait_for(lambda: self._verdict or len(self._places) == self._size, self._timeout)
            missing = [rank for rank in range(self._size) if rank not in self._places]
            verdict = self._verdict
            if missing and not verdict:
                verdict = (
                    f"{_ranks(missing)} of {self._size} {'has' if len(missing) == 1 else 'have'} not come within "
                    f"{self._timeout:g} s (trainer.collective_timeout_seconds)"
                )
        if verdict:
            raise self._fault(verdict)

    def astray(self, names: Sequence[str]) -> CollectiveError:
        """The error for collectives of different names, by rank."""
        callers = {name: [rank for rank, other in enumerate(names) if other == name] for name in names}
        most = max(callers.values(), key=len)
        calls = [
            f"{_ranks(ranks, self._hosts())} call{'s' * (len(ranks) == 1)} {name!r}"
            for name, ranks in sorted(callers.items(), key=lambda item: item[1] is most)
        ]
        return self._fault(f"the ranks are desynchronised at step {self.step}: {', but '.join(calls)}")

    def explain(self, where: str, error: Exception) -> CollectiveError:
        """The error for a collective that failed in native code: names the lost rank as far as it can be told."""
        failed = f"{where} at step {self.step} failed (deadline {self._timeout:g} s)"
        reason = redacted((str(error) or repr(error)).splitlines()[0])
        if self._store is None:
            return self._fault(f"{self._me()} of {self._size}: {failed}: {reason}")
        end = time.monotonic() + self._silence + 2 * self._interval + 1
        lost = ""
        with self._changed:
            while not self._verdict and not lost and time.monotonic() < end:
                self._changed.wait(self._interval)
                lost = self._lost()
            told = f"{lost or self._astray_or_all()}; told by {self._me()}: {failed}"
        return self._fault(told if lost else f"{told}: {reason}")

    def close(self, error: BaseException | None = None) -> None:
        """Tell the others that this rank ends, and stop. Idempotent; not a collective."""
        if self._store is None or self._closed.is_set():
            return
        if error is not None:
            # Other errors may hold what is nobody's business; this one is told to the user as it is.
            told = f": {redacted(' '.join(str(error).split()))}" if isinstance(error, UserError) else ""
            self._state = f"{type(error).__name__}{told}"
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
        """On the main thread, which goes on to an orderly end, unless that takes too long."""
        self._unwinding = True
        self._condemn(verdict)
        return CollectiveError(self._verdict)

    def _condemn(self, verdict: str) -> None:
        """The first verdict counts: it is told, and the stacks are dumped. Returns in time even if a write hangs."""
        with self._changed:
            if not self._verdict:
                self._verdict = verdict
                self._changed.notify_all()
                if self._store is not None:  # should the end hang too, in a flush or an exit handler
                    end = threading.Timer(3 * GRACE_SECONDS + self._linger_seconds(), os._exit, (EXIT_FAULT,))
                    end.daemon = True
                    end.start()
                self._last_words = threading.Thread(target=self._tell, name="last words", daemon=True)
                self._last_words.start()
        assert self._last_words is not None
        self._last_words.join(GRACE_SECONDS)

    def _tell(self) -> None:
        """A thread, since whatever it writes to may hang."""
        tell_fault(self._rank, self._verdict)
        self.stacks.dump(self._verdict)

    def _exchange(self) -> None:
        """A thread: write own place, read the others'. Blocks when the store's host does not answer."""
        beat = 0
        assert self._store is not None
        while not self._store_is_lost:
            is_last = self._closed.is_set()
            beat += 1
            try:
                self._store.set(f"place/{self._rank}", json.dumps(asdict(self._place(beat))))
                known = [r for r in range(self._size) if r in self._places or self._store.check([f"place/{r}"])]
                texts = self._store.multi_get([f"place/{rank}" for rank in known])
            except (RuntimeError, OSError):  # DistError is a RuntimeError
                self._store_is_lost = True
                with self._changed:
                    self._changed.notify_all()
                return
            with self._changed:
                self._answered = now = time.monotonic()
                for place in map(Place.read, texts):
                    before = self._places.get(place.rank)
                    if before is None or before[0].beat != place.beat:
                        self._places[place.rank] = place, now
                self._changed.notify_all()
            if is_last:
                return
            self._closed.wait(self._interval)

    def _judge(self) -> None:
        """A thread: end this process when a rank is lost."""
        while not self._closed.is_set():
            # Should a native call keep the interpreter to itself, faulthandler's thread needs no interpreter. It writes
            # to stderr: the file of the stacks may hang.
            faulthandler.dump_traceback_later(self._timeout + GRACE_SECONDS, exit=True, file=2)
            with self._changed:
                verdict = self._verdict or self._overdue()
            if verdict:
                self._condemn(verdict)
                self._end()
                return
            self._closed.wait(self._interval)

    def _end(self) -> None:
        """End this process, in order if the main thread is on its way."""
        self._linger()
        if self._unwinding:
            time.sleep(GRACE_SECONDS)  # leave() ends the process meanwhile, if all is well
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(EXIT_FAULT)

    def _linger(self) -> None:
        """Until the others know too: with rank 0 the store ends, and with any rank a launcher may end the rest."""
        with self._changed:
            self._changed.wait_for(lambda: self._store_is_lost or self._all_know(), self._linger_seconds())

    def _linger_seconds(self) -> float:
        return self._silence + 2 * self._interval

    def _all_know(self) -> bool:
        now = time.monotonic()
        return all(
            place.verdict or place.state != RUNNING or now - heard > self._silence
            for rank, (place, heard) in self._places.items()
            if rank != self._rank
        )

    def _overdue(self) -> str:
        """Who is lost by the time limit; empty = nobody."""
        now = time.monotonic()
        for place, heard in self._others():
            if place.verdict:
                return place.verdict
            if self._silent_seconds(place, heard) > self._timeout and place.state != DONE and self._state == RUNNING:
                return f"{self._lost(self._timeout)}; told by {self._me()}, {self._where(now)}"
        waited = now - self._waiting_since
        if not self._collective or waited <= self._timeout:
            return ""
        lost = self._lost() or self._behind() or "every rank is there, the connections between them must be broken"
        return f"{lost}; told by {self._me()}, which waited {waited:.1f} s in {self._collective!r} at step {self.step}"

    def _lost(self, silence: float | None = None) -> str:
        """The ranks that have ended or give no sign of life; empty = none."""
        now, silence = time.monotonic(), self._silence if silence is None else silence
        if 0 in self._places and self._rank != 0 and (self._store_is_lost or now - self._answered > silence):
            place, heard = self._places[0]
            if place.state == RUNNING:
                told = "its connection is lost" if self._store_is_lost else "no sign of life"
                return (
                    f"{place} is lost: {told}, last heard {now - heard:.1f} s ago in {_doing(place)}; the other ranks "
                    "are heard through it"
                )
        found = []
        for place, heard in self._others():
            if place.state == DONE:
                found.append(f"{place} has ended, after step {place.step}")
            elif place.state != RUNNING:
                found.append(f"{place} has ended with {place.state} in {_doing(place)}")
            elif self._silent_seconds(place, heard) > silence:
                found.append(
                    f"{place} is lost: no sign of life for {now - heard:.1f} s (dead, stopped or cut off), "
                    f"last in {_doing(place)}"
                )
        return ", and ".join(found)

    def _silent_seconds(self, place: Place, heard: float) -> float:
        """Since a rank was heard, while the store answered: with rank 0 it ends, which says nothing of the others."""
        return (time.monotonic() if place.rank == 0 else self._answered) - heard

    def _behind(self) -> str:
        """The ranks that are alive and elsewhere than this one, which waits; empty = none."""
        lowest = min([self._number, *(place.number for place, _ in self._others())])
        idle = [(place, heard) for place, heard in self._others() if place.number == lowest and not place.collective]
        found = []
        for place, heard in idle or self._others():  # all others wait for the idle ones, some in collectives of a few
            if place.number > self._number or (place.collective and place.collective != self._collective):
                found.append(
                    f"{place} is desynchronised: it is in {place.collective or place.stage!r} at step {place.step}"
                )
            elif place.number < self._number or not place.collective:
                seconds = place.stage_seconds + time.monotonic() - heard
                found.append(f"{place} has stalled: {seconds:.1f} s in stage {place.stage!r} at step {place.step}")
        return ", and ".join(found)

    def _astray_or_all(self) -> str:
        """Where a collective failed and every rank is alive: the ranks that are elsewhere, else where each one is."""
        # A rank in a collective of DeepSpeed, which is not announced, looks like one that computes in the same stage.
        behind = self._behind() if self._collective else ""
        if behind:
            return behind
        now = time.monotonic()
        here, everywhere = (self._stage, self.step), [(self._place(0), now), *self._others()]
        elsewhere = [(place, heard) for place, heard in everywhere if (place.stage, place.step) != here]
        places = ", ".join(
            f"{place} for {place.stage_seconds + now - heard:.1f} s in {_doing(place)}"
            for place, heard in elsewhere or sorted(everywhere, key=lambda item: item[0].rank)
        )
        if elsewhere:
            return f"elsewhere than {self._me()}: {places}"
        return f"every rank shows signs of life, and the stacks tell which one did not come: {places}"

    def _others(self) -> list[tuple[Place, float]]:
        return [self._places[rank] for rank in sorted(self._places) if rank != self._rank]

    def _place(self, beat: int) -> Place:
        return Place(
            self._rank, self._host, beat, self._state, self.step, self._stage, time.monotonic() - self._stage_since,
            self._number, self._collective, self._verdict,
        )  # fmt: skip

    def _hosts(self) -> dict[int, str]:
        return {rank: place.host for rank, (place, _) in self._places.items()}

    def _me(self) -> str:
        return f"rank {self._rank} (host {self._host})"

    def _where(self, now: float) -> str:
        if self._collective:
            return f"which waited {now - self._waiting_since:.1f} s in {self._collective!r} at step {self.step}"
        return f"in stage {self._stage!r} at step {self.step}"


def tell_fault(rank: int, verdict: str) -> None:
    """On stderr, from every rank: the one that would log may be the one that is lost."""
    sys.stderr.write(f"mmr1-ds: fault (rank {rank}, host {socket.gethostname()}): {redacted(verdict)}\n")
    sys.stderr.flush()


def _doing(place: Place) -> str:
    within = f", collective {place.collective!r}" if place.collective else ""
    return f"stage {place.stage!r}{within} at step {place.step}"


def _ranks(ranks: Sequence[int], hosts: dict[int, str] | None = None) -> str:
    listed = ", ".join(f"{rank} (host {hosts[rank]})" if hosts and rank in hosts else str(rank) for rank in ranks)
    return f"rank{'s' * (len(ranks) > 1)} {listed}"
