"""The output of a run for its users: log lines, metrics of every step, records, progress.

Only rank 0 writes; the other ranks hold a logger without writers.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mmr1_ds.config import TrainerConfig
from mmr1_ds.config.ranges import check_loggers
from mmr1_ds.config.redaction import hide_in_tracebacks, redacted
from mmr1_ds.monitoring.progress import is_terminal, progress
from mmr1_ds.monitoring.trackers import open_trackers
from mmr1_ds.monitoring.writers import (
    BarWriter,
    ConsoleWriter,
    JsonLinesWriter,
    TensorboardWriter,
    Writer,
)


def configure_logging(is_main: bool) -> None:
    """Send the package's log lines to stderr with the time; warnings only from ranks other than 0.

    Credentials are removed from them, and from the traceback of an error that ends the process.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    hide_in_tracebacks()
    package = logging.getLogger("mmr1_ds")
    package.handlers[:] = [handler]
    package.setLevel(logging.INFO if is_main else logging.WARNING)
    package.propagate = False  # libraries configure the root logger, which would print every line twice


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


# Libraries' own chatter, which would bury a run's one line a step. Anyone's own setting wins.
_QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR",  # its CPU worker warns once an image
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TQDM_DISABLE": "1",  # checkpoint shards; our own bars say so when they want to be seen
}


def quiet_libraries() -> None:
    """Limit the libraries' own logs to errors. Call this before they are imported."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    for name in ("DeepSpeed", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch|vllm|deepspeed|transformers")


class MetricsLogger:
    """A context manager that passes each step's metrics to the writers named in `trainer.logger`."""

    def __init__(self, writers: Sequence[Writer] = (), elapsed_seconds: float = 0.0) -> None:
        """Take the writers; without any, as on every rank but 0, nothing is written.

        elapsed_seconds: of the run, before this process.
        """
        self._writers = tuple(writers)
        self._began = time.monotonic() - elapsed_seconds

    @classmethod
    def open(
        cls,
        trainer: TrainerConfig,
        run_dir: Path,
        total_steps: int,
        resumed_step: int,
        run_config: Mapping[str, Any],
        is_main: bool,
    ) -> MetricsLogger:
        """Open the writers of a run.

        `metrics.jsonl` and the records are always written: the run directory holds all of a run.

        Args:
            run_dir: exists.
            total_steps: of the whole run, for progress.
            resumed_step: the checkpoint's step; what was logged after it is dropped. 0 for a fresh run, which
                renames what an earlier one logged to metrics.1.jsonl and so on.
            run_config: resolved; stored with trackers, values that look like secrets left out.
            is_main: False gives a logger that writes nothing.
        Raises: UserError for an unknown name.
        """
        check_loggers(trainer.logger)
        if not is_main:
            return cls()
        files = JsonLinesWriter(run_dir, resumed_step, int(trainer.samples_limit_gb * 1e9))
        writers: list[Writer] = [files]
        if "console" in trainer.logger:
            writers.append(ConsoleWriter(total_steps))
            if is_terminal():
                writers.append(BarWriter(total_steps, resumed_step))
        if "tensorboard" in trainer.logger:
            writers.append(TensorboardWriter(run_dir, resumed_step))
        writers += open_trackers(trainer, run_dir, resumed_step, run_config)
        return cls(writers, files.elapsed_seconds)

    @property
    def elapsed_seconds(self) -> float:
        """The seconds that the run has been at work; the time between a stop and its resume does not count."""
        return time.monotonic() - self._began

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log one flat dictionary of a step; a second one of the same step is merged into it. Steps never decrease."""
        for writer in self._writers:
            writer.log(step, metrics)

    def generations(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log sampled responses, each a mapping (prompt, response, ground_truth, ...); all have the same keys."""
        if rows:
            for writer in self._writers:
                writer.generations(step, rows)

    def record(self, name: str, step: int, row: Mapping[str, Any]) -> None:
        """Write a line of `<name>.jsonl`; see `writers.RECORDS`."""
        for writer in self._writers:
            writer.record(name, step, row)

    def progress(
        self, total: int, description: str, with_lines: bool = True
    ) -> AbstractContextManager[Callable[[int], None]]:
        """Show how far a long stage has come, as `progress.progress`."""
        return progress(total, description, with_lines) if self._writers else nullcontext(lambda count: None)

    def close(self) -> None:
        """Flush and close every writer, the others too when one fails."""
        with ExitStack() as stack:
            for writer in self._writers:
                stack.callback(writer.close)
        self._writers = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
