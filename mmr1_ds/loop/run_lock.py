"""One run at a time in a folder: two would write over each other's checkpoints and records.

The lock is a file that names its holder. A holder on this machine lives while its process does; another machine's,
whose processes cannot be seen from here, lives while it counts on in the file. Neither clocks nor the locks of a
network file system are relied on, which machines may not share.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from mmr1_ds.errors import UserError

logger = logging.getLogger(__name__)

NAME = "lock.json"
BEAT_SECONDS = 10.0
SILENCE_SECONDS = 60.0  # in which another machine's holder must count on; a starved one counts late
_DIGITS = 12  # of the count, which is written in place
_MOST_TRIES = 10


class RunLock:
    """The right to write in a folder, held from `__enter__` to `__exit__`."""

    def __init__(
        self, folder: Path, key: str, beat_seconds: float = BEAT_SECONDS, silence_seconds: float = SILENCE_SECONDS
    ) -> None:
        """key: of the configuration that names the folder, for errors."""
        self._folder, self._path, self._key = folder, folder / NAME, key
        self._beat_seconds, self._silence_seconds = beat_seconds, silence_seconds
        self._token = secrets.token_hex(8)
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> RunLock:
        """Take the lock; one whose holder is gone is replaced. Raises: UserError naming a living holder; OSError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._take(self._path)
        self._thread = threading.Thread(target=self._count_on, name="run lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if _holder(_read(self._path)).get("token") == self._token:
            self._path.unlink(missing_ok=True)

    def _take(self, path: Path) -> None:
        content = json.dumps({"beat": "0" * _DIGITS, "token": self._token, **_own_names()}) + "\n"
        for _ in range(_MOST_TRIES):
            try:
                with path.open("x", encoding="utf-8") as file:
                    file.write(content)
                return
            except FileExistsError:
                found = _read(path)
            if found is None:  # released meanwhile
                continue
            if self._lives(path, found):
                raise self._refusal(found)
            # The right to replace what was found is a lock too: one alone has it, and who comes late sees a new holder.
            successor = path.with_name(f"{path.name}.{hashlib.sha256(found.encode()).hexdigest()[:16]}")
            self._take(successor)
            if _read(path) == found:
                logger.warning("%s: the lock of %s is replaced: it is gone", self._folder, _in_words(_holder(found)))
                successor.replace(path)
                return
            successor.unlink()
        raise self._refusal(_read(path))

    def _lives(self, path: Path, content: str) -> bool:
        """Return whether the holder is there; for another machine's, or one that is not readable, wait and see."""
        holder = _holder(content)
        own = _own_names()
        if all(holder.get(name) == own[name] for name in ("host", "boot", "processes")):
            return holder.get("started") == _started(holder.get("pid"))
        logger.info("waiting up to %g s to see whether %s still runs", self._silence_seconds, _in_words(holder))
        last = time.monotonic() + self._silence_seconds
        while time.monotonic() < last:
            time.sleep(min(1.0, self._silence_seconds / 10))
            found = _read(path)
            if found is None:
                return False
            if found != content:
                return True
        return False

    def _count_on(self) -> None:
        beat = 0
        while not self._ended.wait(self._beat_seconds):
            beat += 1
            try:
                with self._path.open("r+", encoding="utf-8") as file:
                    if _holder(file.read()).get("token") != self._token:
                        break
                    file.seek(len('{"beat": "'))
                    file.write(f"{beat:0{_DIGITS}d}")
            except FileNotFoundError:
                break
            except OSError:  # of a disk that is full or away for a while
                continue
        if not self._ended.is_set():
            logger.error("%s is no longer this run's: another may write in %s", self._path, self._folder)

    def _refusal(self, content: str | None) -> UserError:
        return UserError(
            f"{self._key}={self._folder} is in use by {_in_words(_holder(content))}; wait for it to end, or set "
            "another trainer.experiment_name"
        )


def _own_names() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "boot": _text("/proc/sys/kernel/random/boot_id"),  # two machines may have one name
        "processes": _namespace(),  # as may two containers, which do not see each other's processes
    }


def _started(pid: Any) -> str | None:
    """Return when a process began, in ticks since the machine did; None for one that is gone."""
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return None if len(fields) < 20 or fields[0] in "ZX" else fields[19]


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _read(path: Path) -> str | None:
    """Return what a lock says; None without one."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _holder(content: str | None) -> dict[str, Any]:
    try:
        holder = json.loads(content or "")
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _in_words(holder: dict[str, Any]) -> str:
    if "pid" not in holder:
        return "a process that does not say its name"
    return f"process {holder['pid']} on {holder.get('host')}"
