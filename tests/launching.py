"""Starts real processes for tests: N ranks of a program, with the environment that a launcher would give them."""

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
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


class WarmProcess:
    """Runs programs one after the other, each in a fork of a process that has the imports behind it."""

    def __init__(self) -> None:
        command = [sys.executable, str(ROOT / "tests" / "warm_process.py")]
        self._process = subprocess.Popen(
            command, env=environment(), cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self.pid = 0  # of the program that runs, 0 when none does

    def start(self, arguments: list[str], variables: dict[str, str], log: Path) -> None:
        """Returns when the program runs."""
        job = {"arguments": arguments, "environment": variables, "log": str(log)}
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()
        self.pid = self._answer()

    def wait(self, timeout_seconds: float) -> int:
        """The program's exit code. Raises: TimeoutError."""
        if not select.select([self._process.stdout], [], [], timeout_seconds)[0]:
            raise TimeoutError(f"the program did not end in {timeout_seconds:g} s")
        code, self.pid = self._answer(), 0
        return code

    def has_ended(self) -> bool:
        """Whether the program has; its code waits for `wait`."""
        return bool(select.select([self._process.stdout], [], [], 0)[0])

    def stop_program(self) -> None:
        """End the program and what it started, if it runs."""
        if self.pid:
            os.killpg(self.pid, signal.SIGKILL)
            self.wait(60)

    def close(self) -> None:
        self.stop_program()
        with contextlib.suppress(BrokenPipeError):  # it has ended, which a test has told
            self._process.stdin.close()  # it ends with its input
        self._process.wait(60)

    def _answer(self) -> int:
        line = self._process.stdout.readline()
        assert line, "tests/warm_process.py ended"
        return int(line)


class ColdProcess:
    """Runs a program in a Python of its own: quicker for one that imports little."""

    def start(self, arguments: list[str], variables: dict[str, str], log: Path) -> None:
        command = [sys.executable, *arguments]
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command, env=variables, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self, timeout_seconds: float) -> int:
        return self._process.wait(timeout_seconds)

    def stop_program(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(60)


_warm: list[WarmProcess] = []  # one for each rank; they start with the first program of so many


def _warm_processes(number: int) -> list[WarmProcess]:
    while len(_warm) < number:
        _warm.append(WarmProcess())
        atexit.register(_warm[-1].close)
    return _warm[:number]


def run_ranks(
    program: str, *arguments: str | Path, num_ranks: int = 1, timeout_seconds: float = 300, warm: bool = True
) -> None:
    """Run tests/programs/<program> on `num_ranks` processes; fail with their output unless all exit 0.

    warm: False for a program without the engine, which would wait for imports that it does not need.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = _warm_processes(num_ranks) if warm else [ColdProcess() for _ in range(num_ranks)]
    started: list[WarmProcess | ColdProcess] = []
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank{rank}.log" for rank in range(num_ranks)]
        try:
            for rank, process in enumerate(processes):
                ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
                variables = environment(**ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
                process.start([str(PROGRAMS / program), *map(str, arguments)], variables, logs[rank])
                started.append(process)
            codes = [process.wait(timeout_seconds) for process in started]
        finally:
            for process in started:
                process.stop_program()
        for rank, code in enumerate(codes):
            assert code == 0, f"rank {rank} exited with {code}:\n{logs[rank].read_text()[-6000:]}"


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
