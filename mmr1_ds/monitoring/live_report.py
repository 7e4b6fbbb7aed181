"""The report of a run, written during the run and at its end by a separate process."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

logger = logging.getLogger(__name__)

_PATIENCE_SECONDS = 120.0  # for the last one
_NICENESS = ["nice", "-n", "10"] if shutil.which("nice") else []  # training goes first


class LiveReport:
    """A context manager that starts `mmr1-ds report` every few steps, unless the previous one is still running.

    A failure there does not stop the training. A report that is still running at exit is stopped.
    """

    def __init__(self, run_dir: Path, every_steps: int | None) -> None:
        """every_steps: -1 = only at the end; None = never, as on every rank but 0."""
        self._run_dir, self._every_steps = run_dir, every_steps
        self._process: subprocess.Popen[str] | None = None

    def after_step(self, step: int) -> None:
        every = self._every_steps
        if every is None or every < 1 or step % every:
            return
        if self._process is not None and self._process.poll() is None:
            return
        self._collect()
        self._process = self._start()

    def finish(self) -> None:
        """Write the last report, wait for it, and log where it is."""
        if self._every_steps is None:
            return
        self._stop()
        self._process = self._start()
        try:
            self._process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            logger.warning("the report took over %.0f seconds and was stopped; see mmr1-ds report", _PATIENCE_SECONDS)
            self._stop()
            return
        if self._collect():
            logger.info("report: %s", self._run_dir / "report.html")

    def _start(self) -> subprocess.Popen[str]:
        command = [*_NICENESS, sys.executable, "-m", "mmr1_ds.commands.report", str(self._run_dir)]
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def _collect(self) -> bool:
        """Return whether the previous report was written; log why not."""
        process, self._process = self._process, None
        if process is None:
            return False
        said = process.communicate()[1].strip().splitlines()
        if process.returncode != 0:
            logger.warning("no report was written: %s", said[-1] if said else f"exit code {process.returncode}")
        return process.returncode == 0

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
