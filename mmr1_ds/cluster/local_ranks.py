"""Start the ranks of one machine: `python local_ranks.py NUM_RANKS MODULE ARGUMENT ...`.

It does what the deepspeed launcher does there, but imports neither DeepSpeed nor torch, which the launcher's two
processes do one after the other, for 8 seconds before the first rank begins. Environment: MASTER_PORT.
Exits with the status of the rank that failed first, after the others were ended.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

import psutil

POLL_SECONDS = 0.5
GRACE_SECONDS = 2.0  # that the others have to end by themselves, after the first
PATIENCE_SECONDS = 30.0  # from SIGTERM to SIGKILL


def main(argv: Sequence[str]) -> int:
    """Run the ranks until all are done or one fails. Returns: the exit code."""
    num_ranks, command = int(argv[0]), [sys.executable, "-u", "-m", *argv[1:]]
    ranks: list[subprocess.Popen[bytes]] = []

    def stop(number: int, frame: FrameType | None) -> None:
        _end(ranks)
        sys.exit(1)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    shared = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(num_ranks), "LOCAL_SIZE": str(num_ranks)}
    for rank in range(num_ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(subprocess.Popen(command, env=os.environ | shared | own))
    while True:
        codes = [process.poll() for process in ranks]
        failed = next((code for code in codes if code), None)
        if failed is not None:
            last = time.monotonic() + GRACE_SECONDS
            while time.monotonic() < last and any(process.poll() is None for process in ranks):
                time.sleep(POLL_SECONDS / 5)
            _end([process for process in ranks if process.poll() is None])
            return failed if failed > 0 else 128 - failed
        if None not in codes:
            return 0
        time.sleep(POLL_SECONDS)


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the ranks and all that they started."""
    found = []
    for process in ranks:
        try:
            rank = psutil.Process(process.pid)
            found += [*rank.children(recursive=True), rank]
        except psutil.NoSuchProcess:
            continue
    for item in found:
        try:
            item.terminate()
        except psutil.NoSuchProcess:
            continue
    for item in psutil.wait_procs(found, timeout=PATIENCE_SECONDS)[1]:
        item.kill()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
