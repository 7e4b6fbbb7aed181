"""The guard that ends a rank with the launcher that started it.

The deepspeed launcher is two processes: the runner that the user (or the job manager) stops, and under it one that
starts the ranks. A SIGTERM to the runner ends the runner alone; the rest would keep training, unseen. So would all of
them when launch/train.sh, which starts the runner or the only rank, is killed: it names itself in MMR1_DS_SCRIPT_PID.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

import psutil

PR_SET_PDEATHSIG = 1  # linux/prctl.h
POLL_SECONDS = 0.5
SCRIPT = "MMR1_DS_SCRIPT_PID"


class LaunchGuard:
    """Ends this process when its launcher, the deepspeed runner or the script above it is gone. Linux only."""

    def __init__(self) -> None:
        """Begin to watch. SIGTERM comes before SIGKILL, so that the run can save."""
        self.patience_seconds = 30.0  # from SIGTERM to SIGKILL; nobody is left who would kill a run that hangs
        if sys.platform != "linux":
            return
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before the call above
            os.kill(os.getpid(), signal.SIGTERM)
        runner = _parent_of(parent)
        if runner is not None and "deepspeed" not in _command_of(runner):
            runner = None
        script = _process(os.environ[SCRIPT]) if SCRIPT in os.environ else None
        threading.Thread(target=self._watch, args=(parent, runner, script), name="launch guard", daemon=True).start()

    def _watch(self, parent: int, runner: int | None, script: psutil.Process | None) -> None:
        never = threading.Event()
        # An orphan is handed to another parent.
        while (
            os.getppid() == parent
            and (runner is None or _parent_of(parent) == runner)
            and (script is None or script.is_running())
        ):
            never.wait(POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        never.wait(self.patience_seconds)
        os.kill(os.getpid(), signal.SIGKILL)


def _process(pid: str) -> psutil.Process | None:
    try:
        return psutil.Process(int(pid))
    except (ValueError, psutil.Error):  # of another container
        return None


def _parent_of(pid: int) -> int | None:
    try:
        return int(psutil.Process(pid).ppid())
    except psutil.Error:
        return None


def _command_of(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return ""
