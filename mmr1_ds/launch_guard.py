"""A rank does not outlive the launcher that started it.

The deepspeed launcher is two processes: the runner that the user (or the job manager) stops, and under it one that
starts the ranks. A SIGTERM to the runner ends the runner alone; the rest trains on, unseen.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1  # linux/prctl.h
POLL_SECONDS = 0.5


def end_with_launcher() -> None:
    """End this process by SIGTERM when its launcher, or the deepspeed runner above it, is gone. Linux only."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it went before the call above
        os.kill(os.getpid(), signal.SIGTERM)
    runner = _parent_of(parent)
    if runner is not None and "deepspeed" in _command_of(runner):
        threading.Thread(target=_watch, args=(parent, runner), name="launch guard", daemon=True).start()


def _watch(parent: int, runner: int) -> None:
    while _parent_of(parent) == runner:  # an orphan is handed to another parent
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def _parent_of(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[1])  # the command in brackets may hold spaces


def _command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
