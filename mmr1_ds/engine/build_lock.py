"""DeepSpeed compiles its operators at the first start. A process that is killed meanwhile must not lock out all others.

torch's own lock is a file that is there or not: one that a killed process left behind is waited for by every later
start, for ever. Here the lock is the kernel's on that file, which ends with the process.
"""

from __future__ import annotations

from pathlib import Path

import torch.utils.cpp_extension
from filelock import FileLock, Timeout


class KernelLock:
    """In place of torch.utils.file_baton.FileBaton, whose methods these are."""

    def __init__(self, lock_file_path: str, wait_seconds: float = 0.1, warn_after_seconds: float | None = None) -> None:
        self._path = Path(lock_file_path)
        self._building = self._path.with_name(f"{self._path.name}.building")
        self._lock = FileLock(lock_file_path, poll_interval=wait_seconds)

    def try_acquire(self) -> bool:
        """Whether this process builds now."""
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            return False
        if self._building.exists():
            # Whoever built was killed, and its ninja wrote on. Of a torn log ninja says that it recovers, and then
            # compiles again at every start, a minute each.
            for name in (".ninja_deps", ".ninja_log"):
                (self._path.parent / name).unlink(missing_ok=True)
        self._building.touch()
        return True

    def wait(self) -> None:
        """Wait until whoever builds has done so, or has ended."""
        self._lock.acquire()
        self._let_go()

    def release(self) -> None:
        """Let the others go on."""
        self._building.unlink(missing_ok=True)
        self._let_go()

    def _let_go(self) -> None:
        self._path.unlink(missing_ok=True)  # to torch's own kind the file is the lock
        self._lock.release()


def lock_builds_by_kernel() -> None:
    """From now on torch's builds in this process use KernelLock."""
    torch.utils.cpp_extension.FileBaton = KernelLock  # type: ignore[misc, assignment, attr-defined]
