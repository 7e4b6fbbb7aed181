"""What is written of a run: a line of figures a step."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import psutil

from mmr1_ds.monitoring.writers import Writer

_METRICS = {  # of the trainer -> of the record
    "reward/overall": "reward",
    "reward/accuracy": "accuracy",
    "curriculum/effective_group_fraction": "drawn_effective_fraction",
    "curriculum/extra_rollout_fraction": "extra_rollout_fraction",
    "curriculum/log_loss": "log_loss",
    "actor/grad_norm": "gradient_norm",
    "actor/pg_clipfrac_higher": "clip_fraction",
    "online_filtering/num_tries": "num_tries",
    "rollout/logprob_diff_max": "log_probability_difference",
    "val/accuracy_reward": "validation_accuracy",
    "timing_s/step": "seconds",
    "timing_s/testing": "validation_seconds",
    "timing_s/refresh": "refresh_seconds",
}


class StepFile(Writer):
    """A JSON lines file: the trial, a line a step, the end. Under another name until it is whole."""

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self._path, self._unfinished = path, path.with_suffix(".partial")
        self._file: TextIO = self._unfinished.open("w", encoding="utf-8")
        self._line: dict[str, Any] = {}
        self._started, self._started_cpu = time.monotonic(), time.process_time()
        self._write({"trial": dict(header)})

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """As the trainer's metrics logger calls it; several calls of a step make one line."""
        self.note(step, {_METRICS[name]: value for name, value in metrics.items() if name in _METRICS})

    def note(self, step: int, values: Mapping[str, Any]) -> None:
        """Add to a step's line."""
        if self._line.get("step") != step:
            self._flush()
            self._line = {"step": step}
        self._line |= values

    def has(self, step: int, name: str) -> bool:
        """Whether the line of `step`, the last one so far, has a figure."""
        return self._line.get("step") == step and name in self._line

    def finish(self, figures: Mapping[str, Any] | None = None) -> None:
        """The run is whole. Args: figures: for the last line, of what came after the training."""
        self._flush()
        seconds = round(time.monotonic() - self._started, 1)
        last = {
            "finished": True,
            "seconds": seconds,
            "cpu_seconds": round(time.process_time() - self._started_cpu, 1),  # where others use the cores too
            "memory_gb": psutil.Process().memory_info().rss / 1e9,
        }
        self._write(last | dict(figures or {}))
        self._file.close()
        self._unfinished.rename(self._path)

    def close(self) -> None:
        """Nothing: `finish` says whether the run is whole."""

    def _flush(self) -> None:
        if self._line:
            self._write(self._line)
            self._line = {}

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


def transition_counts(before: np.ndarray, after: np.ndarray, num_responses: int) -> np.ndarray:
    """How many prompts went from i right of N to j right of N, (N + 1, N + 1) int64.

    Args: before, after: (P,) pass rates that are multiples of 1 / N.
    """
    rows, columns = (np.rint(rates * num_responses).astype(np.int64) for rates in (before, after))
    counts = np.zeros((num_responses + 1, num_responses + 1), dtype=np.int64)
    np.add.at(counts, (rows, columns), 1)
    return counts
