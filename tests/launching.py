"""Starts real processes for tests: N ranks of a program, with the environment that a launcher would give them."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = Path(__file__).parent / "programs"


def environment(**extra: str) -> dict[str, str]:
    """The environment of a child: this checkout importable, one thread, the CPU, nothing from a hub."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), inherited.get("PYTHONPATH", "")]
    tools = str(Path(sys.executable).parent)  # ninja, for DeepSpeed's CPU operations
    return inherited | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PATH": os.pathsep.join([tools, inherited["PATH"]]),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        **extra,
    }


def run_ranks(program: str, *arguments: str | Path, num_ranks: int = 1, timeout_seconds: float = 300) -> None:
    """Run tests/programs/<program> on `num_ranks` processes; fail with their output unless all exit 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, str(PROGRAMS / program), *map(str, arguments)]
    processes = []
    for rank in range(num_ranks):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
        processes.append(
            subprocess.Popen(
                command,
                env=environment(**ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=timeout_seconds)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank} exited with {process.returncode}:\n{output[-6000:]}"


def wait_until(condition: Callable[[], bool], timeout_seconds: float, what: str) -> None:
    """Poll until `condition` holds; fail, naming `what`, when it does not in time."""
    end = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_seconds:g} s: {what}"
        time.sleep(0.05)


def processes_with(marker: str) -> list[str]:
    """Command lines of the live processes whose environment has `marker`: what a launch and its children left."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and marker.encode() in (entry / "environ").read_bytes():
                found.append(f"{entry.name}: {(entry / 'cmdline').read_bytes().replace(bytes(1), b' ').decode()}")
        except OSError:
            continue  # it has just ended
    return found
