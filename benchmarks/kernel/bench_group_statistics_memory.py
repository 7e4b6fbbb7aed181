"""Peak extra memory of one contender on one batch, printed as bytes a token. Run by `bench_group_statistics.py`.

In a process of its own: what earlier work left behind would hide the peak. Linux only.

    python benchmarks/kernel/bench_group_statistics_memory.py CONTENDER THREADS N T GROUPS
"""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

from bench_group_statistics import zipf_groups
from bench_group_statistics_rivals import contender

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident_bytes(field: str) -> int:
    """VmRSS, or VmHWM: the peak since it was cleared."""
    return int(re.search(rf"{field}:\s+(\d+) kB", STATUS.read_text())[1]) * 1024


def main() -> None:
    name, num_threads, group_size, num_tokens, num_groups = sys.argv[1], *map(int, sys.argv[2:])
    measured = contender(name, num_threads)
    measured.self_bleu(measured.prepare(zipf_groups(group_size, 8, 1)))  # loads what it loads once
    groups = measured.prepare(zipf_groups(group_size, num_tokens, num_groups))
    ctypes.CDLL(None).malloc_trim(0)  # free memory that is still resident would hide what the call takes
    CLEAR.write_text("5")  # sets the peak back to what is resident now
    before = resident_bytes("VmRSS")
    measured.self_bleu(groups)
    extra = resident_bytes("VmHWM") - before
    sys.stdout.write(f"{extra / (group_size * num_tokens * num_groups)}\n")


if __name__ == "__main__":
    main()
