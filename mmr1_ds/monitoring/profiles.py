"""Traces of whole steps by torch's profiler, and snapshots of the GPU's memory, of every rank."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mmr1_ds.cluster.ranks import Ranks

if TYPE_CHECKING:
    from torch.profiler import profile

logger = logging.getLogger(__name__)

_MOST_EVENTS = 1_000_000  # of memory, in a snapshot


class StepProfiles:
    """Writes `profiles/step_N_rank_R.trace.json.gz`, on a GPU with `step_N_rank_R.memory.pickle` beside it.

    Perfetto or chrome://tracing opens the first, pytorch.org/memory_viz the second. A disk that fails costs the files.
    """

    def __init__(self, run_dir: Path, steps: Sequence[int], ranks: Ranks) -> None:
        self._folder, self._steps, self._ranks = run_dir / "profiles", frozenset(steps), ranks
        self._running: profile | None = None
        self._step = 0

    def begin(self, step: int) -> None:
        """Start to record `step` where it is asked for."""
        if step not in self._steps:
            return
        import torch
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._ranks.on_gpu else [])]
        if self._ranks.on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=_MOST_EVENTS)
        self._running, self._step = profile(activities=activities, record_shapes=True, profile_memory=True), step
        self._running.start()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Name what happens inside in the trace."""
        if self._running is None:
            yield
            return
        from torch.profiler import record_function

        with record_function(name):
            yield

    def end(self) -> None:
        """Write what was recorded since `begin`, if anything was."""
        running, self._running = self._running, None
        if running is None:
            return
        import torch

        running.stop()
        path = self._folder / f"step_{self._step}_rank_{self._ranks.rank}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            running.export_chrome_trace(f"{path}.trace.json.gz")
            if self._ranks.on_gpu:
                torch.cuda.memory._dump_snapshot(f"{path}.memory.pickle")
        except (OSError, RuntimeError) as error:
            logger.warning("the profile of step %d is not written (%s)", self._step, error)
        else:
            logger.info("profile of step %d: %s.trace.json.gz", self._step, path)
        finally:
            if self._ranks.on_gpu:
                torch.cuda.memory._record_memory_history(enabled=None)
