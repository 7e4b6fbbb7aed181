"""Seconds and peak memory of the stages of a step."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

_PROCESS = Path("/proc/self")
_RESET_PEAK = "5"  # to clear_refs: the high-water mark falls to what is resident now (man 5 proc)


class StageMemory:
    """The peak of memory between `begin` and `end`: device memory on a GPU, else resident memory.

    Each stage resets torch's peak, and `perf/max_memory_*` mean the peak of the run: so those are kept here.
    """

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._most = {"allocated": 0, "reserved": 0}  # bytes, of the run so far

    def begin(self) -> None:
        if not self._on_gpu:
            with contextlib.suppress(OSError):  # not on this kernel: the peak is then the run's
                (_PROCESS / "clear_refs").write_text(_RESET_PEAK)
            return
        import torch

        self._note_peaks()
        torch.cuda.reset_peak_memory_stats()

    def end(self) -> float:
        """Return GB (1e9 bytes): on a GPU the larger of torch's peak and what all, vLLM included, hold now."""
        if not self._on_gpu:
            return _resident_peak_bytes() / 1e9
        import torch

        free, total = torch.cuda.mem_get_info()
        return max(total - free, torch.cuda.max_memory_reserved()) / 1e9

    def peaks_of_the_run(self) -> dict[str, float]:
        """Return `perf/max_memory_*_gb` under EasyR1's names; empty on the CPU."""
        if not self._on_gpu:
            return {}
        self._note_peaks()
        return {
            "perf/max_memory_allocated_gb": self._most["allocated"] / 1e9,
            "perf/max_memory_reserved_gb": self._most["reserved"] / 1e9,
        }

    def _note_peaks(self) -> None:
        import torch

        self._most["allocated"] = max(self._most["allocated"], torch.cuda.max_memory_allocated())
        self._most["reserved"] = max(self._most["reserved"], torch.cuda.max_memory_reserved())


def _resident_peak_bytes() -> int:
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", (_PROCESS / "status").read_text())
    except OSError:  # no Linux
        found = None
    return int(found[1]) * 1024 if found else int(psutil.Process().memory_info().rss)


@dataclass
class StageClock:
    """The seconds of each stage, summed over repeated entries, its peak of memory, and what else is counted."""

    mark: Callable[[str], AbstractContextManager[Any]] = nullcontext  # entered with each stage: Ranks.stage
    memory: StageMemory | None = None  # None: not measured
    seconds: dict[str, float] = field(default_factory=dict)
    memory_gb: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)  # by their metrics' names

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        if self.memory is not None:
            self.memory.begin()
        try:
            with self.mark(stage):
                yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
            if self.memory is not None:
                self.memory_gb[stage] = max(self.memory_gb.get(stage, 0.0), self.memory.end())

    def metrics(self) -> dict[str, float]:
        """Return `timing_s/*`, `memory_gb/*` and what else was counted on this rank."""
        timing = {f"timing_s/{stage}": seconds for stage, seconds in self.seconds.items()}
        return timing | {f"memory_gb/{stage}": size for stage, size in self.memory_gb.items()} | self.counts
