"""One reward worker process as its parent sees it: pipes that never block, a deadline, and a certain end."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmr1_ds.rewards.lines import to_line

MAX_REPLY_BYTES = 1 << 20  # a reward is a few numbers; more is a runaway
REPLY_BYTES_A_RESPONSE = 1 << 12  # and so many where more responses than those take are scored in one call
READ_BYTES = 1 << 16
PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])


@dataclass(frozen=True)
class Closed:
    """The end of a worker, and its reason."""

    kind: str  # crash, or invalid when it was ended for what it answered
    reason: str


class WorkerProcess:
    """A subprocess that answers one JSON line with one JSON line. It lives in a session of its own."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self._selector = selector
        self._is_closed = False
        self._unsent = memoryview(b"")
        self._received = b""
        self._most_bytes = MAX_REPLY_BYTES  # of the reply
        read_fd, write_fd = os.pipe()
        guard_fd, self._lifeline = os.pipe()  # its end is the worker's, whatever ends this process
        environment = {**os.environ, "PYTHONPATH": _python_path()}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "mmr1_ds.rewards.worker", str(write_fd), str(guard_fd)],
                stdin=subprocess.PIPE, pass_fds=(write_fd, guard_fd), start_new_session=True, env=environment,
            )  # fmt: skip
        except OSError:
            os.close(read_fd)
            os.close(self._lifeline)
            raise
        finally:
            os.close(write_fd)
            os.close(guard_fd)
        self._replies = read_fd
        assert self._process.stdin is not None
        self._requests = self._process.stdin.fileno()
        os.set_blocking(self._replies, False)
        os.set_blocking(self._requests, False)
        selector.register(self._replies, selectors.EVENT_READ, self)

    @property
    def pid(self) -> int:
        return self._process.pid

    def has_ended(self) -> bool:
        """Return whether the worker is dead; `close` collects it."""
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def send(self, message: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Queue one line; `handle` sends the rest when the pipe takes it. Never blocks."""
        assert not self._unsent and not self._received, "one request at a time"
        self._unsent = memoryview(to_line(message))
        self._most_bytes = max(MAX_REPLY_BYTES, REPLY_BYTES_A_RESPONSE * len(message))
        self._selector.register(self._requests, selectors.EVENT_WRITE, self)
        self._write()

    def handle(self, fd: int) -> dict[str, Any] | Closed | None:
        """Act on a ready file descriptor. Returns: a whole reply, Closed when the worker is gone, else None."""
        if fd == self._requests:
            self._write()
            return None
        return self._read()

    def close(self) -> int:
        """Kill the worker and everything it started, and collect it. Idempotent. Returns: its exit status."""
        if self._is_closed:
            return self._process.wait()
        self._is_closed = True
        self._selector.unregister(self._replies)
        self._stop_writing()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            # The whole session, children of the user's code included. The worker is not collected yet, even when
            # it ended by itself, so its id cannot belong to anyone else.
            os.killpg(self._process.pid, signal.SIGKILL)
        status = self._process.wait()
        os.close(self._replies)
        os.close(self._lifeline)
        assert self._process.stdin is not None
        self._process.stdin.close()
        return status

    def _write(self) -> None:
        try:
            sent = os.write(self._requests, self._unsent)
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._stop_writing()  # it died; the closed reply pipe says so too
            return
        self._unsent = self._unsent[sent:]
        if not self._unsent:
            self._stop_writing()

    def _stop_writing(self) -> None:
        self._unsent = memoryview(b"")
        if self._requests in self._selector.get_map():
            self._selector.unregister(self._requests)

    def _read(self) -> dict[str, Any] | Closed | None:
        try:
            chunk = os.read(self._replies, READ_BYTES)
        except BlockingIOError:
            return None
        self._received += chunk
        if b"\n" in self._received:
            line, _, rest = self._received.partition(b"\n")
            assert not rest, "a reward worker answered twice"
            self._received = b""
            return json.loads(line)
        if not chunk:
            return Closed("crash", f"its process ended ({_describe_status(self.close())})")
        if len(self._received) > self._most_bytes:
            self.close()
            return Closed("invalid", f"it answered over {self._most_bytes} bytes; a reward is a few numbers")
        return None


def _describe_status(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def _python_path() -> str:
    """PYTHONPATH by which the worker finds this very package, however this process found it."""
    inherited = os.environ.get("PYTHONPATH")
    return os.pathsep.join([PACKAGE_ROOT, *([inherited] if inherited else [])])
