"""DeepSpeed compiles its operators at the first start. A process that is killed meanwhile must not lock out all others.

torch's own lock is a file that is there or not: one that a killed process left behind is waited for by every later
start, for ever. Here the lock is the kernel's (flock) on that file, which ends with the process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os

import torch.utils.cpp_extension


class KernelLock:
    """In place of torch.utils.file_baton.FileBaton, whose methods these are."""

    def __init__(self, lock_file_path: str, wait_seconds: float = 0.1, warn_after_seconds: float | None = None) -> None:
        """Of the two times nothing is needed: waiting is the kernel's."""
        self._path = lock_file_path
        self._file: int | None = None

    def try_acquire(self) -> bool:
        """Whether this process builds now."""
        return self._acquire(fcntl.LOCK_NB)

    def wait(self) -> None:
        """Until whoever builds has done so, or has ended."""
        self._acquire(0)
        self.release()

    def release(self) -> None:
        """Let the others go on. The file goes as well: to torch's own kind it is the lock."""
        if self._file is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
            os.close(self._file)
            self._file = None

    def _acquire(self, flags: int) -> bool:
        while True:
            file = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | flags)
                if self._is_at_path(file):
                    self._file = file
                    return True
            except BlockingIOError:
                os.close(file)
                return False
            os.close(file)  # it was removed by who held it before: another one may hold the new file

    def _is_at_path(self, file: int) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(file))
        except FileNotFoundError:
            return False


def lock_builds_by_kernel() -> None:
    """From now on torch's builds in this process use KernelLock."""
    torch.utils.cpp_extension.FileBaton = KernelLock  # type: ignore[misc, assignment, attr-defined]
