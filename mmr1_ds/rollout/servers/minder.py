"""`python -m mmr1_ds.rollout.servers.minder PARENT SECONDS COMMAND...`: run a server, and see that all of it ends.

vLLM's server is several processes. When its first one is killed the others stay for ever, with their GPU; and all of
them would outlive a killed trainer. This small process stands between: whatever ends first, the trainer (PARENT, its
process id) or the server, the rest is ended too; what does not end within SECONDS is killed. The minder must lead a
process group of its own. It is asked to end by SIGINT.

A job manager that ends a job sends SIGTERM or SIGUSR1 to every process of it. The trainer may need the server to end
well, so neither gets through to this process or the server's.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import psutil

KILL_SECONDS = 5.0  # that the kernel has to end what is killed

_POLL_SECONDS = 0.5  # how often the trainer is looked for
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_SIGNALS = (signal.SIGINT, signal.SIGCHLD)
_OF_JOB_MANAGERS = (signal.SIGTERM, signal.SIGUSR1)
_TRACKER = "multiprocessing.resource_tracker"  # unlinks the shared memory of processes that were killed


def main(argv: Sequence[str]) -> int:
    """Returns: 0 when it was asked to end or the trainer is gone, else the exit code of the server."""
    parent, stop_seconds, command = int(argv[0]), float(argv[1]), argv[2:]
    assert os.getpgrp() == os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # they are waited for below
    signal.pthread_sigmask(signal.SIG_BLOCK, _OF_JOB_MANAGERS)  # and in all that starts from here, handlers or not
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans of the server come to this process
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_prepare_server)
    asked = False
    while server.poll() is None and not asked:
        if os.getppid() != parent:
            _tell("the process that started the server is gone: ending the server")
            break
        received = signal.sigtimedwait(_SIGNALS, _POLL_SECONDS)
        asked = received is not None and received.si_signo != signal.SIGCHLD
    code = server.poll()
    if code is not None:
        _tell(f"the server has ended with exit code {code}: ending what is left of it")
    else:
        server.send_signal(signal.SIGINT)
        _wait(server, stop_seconds)
    _end_group()
    return 0 if code is None else code if code > 0 else 1


def _prepare_server() -> None:
    """Runs in the server before its program. The signals are its own again; it does not outlive this process."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _wait(server: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        server.wait(seconds)
    except subprocess.TimeoutExpired:
        _tell(f"the server has not ended within {seconds:g} s: killing it")


def _end_group() -> None:
    """Kill every other process of this group; the trackers of shared memory last, and only if they do not end."""
    for is_last in (False, True):
        for process in _others():
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                if is_last or _TRACKER not in " ".join(process.cmdline()):
                    process.kill()
        deadline = time.monotonic() + KILL_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:  # orphans of the server
                    pass
            if not _others():
                return
            time.sleep(0.02)


def _others() -> list[psutil.Process]:
    """The other processes of this group that are not over."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            is_ours = os.getpgid(process.pid) == os.getpid() != process.pid
            if is_ours and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                found.append(process)
    return found


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
