"""What the prompts of a run take of a rank's memory beside its model: on rank 0, and on any other.

    python benchmarks/scale/data_memory.py [--prompts 10000000] [--repeated 1000]

The scan of so many rows is made up, with ids of 32 hexadecimal digits of which some repeat, and lies in a file as a run
keeps it; from there on it is the program's own code: the data set, and with it the curriculum (online, each prompt
seen once by the end), a draw, a save. Each role runs in a process of its own. `own` is memory of the process itself,
above what it had before; `mapped` are pages of the file that it has touched, which the ranks of a machine share and the
system may take back. The peak is of both, from the first line on.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import feather

from mmr1_ds.config import DataConfig
from mmr1_ds.curriculum.coordinator import Coordinator
from mmr1_ds.data import scan
from mmr1_ds.data.dataset import PromptDataset

ROWS = 500_000  # that are made up at a time


class Control:
    """One rank of two; what it would hear from rank 0 is a batch."""

    size = 2

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def broadcast_array(self, array: np.ndarray | None, stage: str) -> np.ndarray:
        return np.arange(3 * 512) if array is None else array

    def all_gather_array(self, array: np.ndarray, stage: str) -> list[np.ndarray]:
        return [array]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=10_000_000)
    parser.add_argument("--repeated", type=int, default=1_000, help="rows whose id another has too")
    parser.add_argument("--role", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--scan", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role is not None:
        run(arguments.role, arguments.scan, arguments.prompts)
        return
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "scan.arrow"
        write(path, arguments.prompts, arguments.repeated)
        sys.stdout.write(f"{arguments.prompts} prompts, a scan of {path.stat().st_size / 1e6:.0f} MB\n")
        for role in (1, 1, 0):  # the first of a machine may leave something for those that follow
            command = [sys.executable, __file__, "--role", str(role), "--scan", str(path)]
            environment = {**os.environ, "HF_DATASETS_CACHE": root}
            subprocess.run([*command, "--prompts", str(arguments.prompts)], check=True, env=environment)


def write(path: Path, num_prompts: int, num_repeated: int) -> None:
    """Write a scan as `scan._kept_scan` does."""
    parts = []
    for start in range(0, num_prompts, ROWS):
        rows = np.arange(start, min(start + ROWS, num_prompts))
        numbers = np.where(rows >= num_prompts - num_repeated, rows % 7, rows)
        columns = {
            "prompt_id": pa.array([f"{number * 7919:032x}" for number in numbers.tolist()], pa.string()),
            "length": (rows % 401).astype(np.int32),
            "category": pa.array([f"c{number % 9}" for number in numbers.tolist()], pa.string()),
            "num_images": (rows % 2).astype(np.int32),
            "num_videos": np.zeros(len(rows), dtype=np.int32),
            "has_answer": np.zeros(len(rows), dtype=bool),
            "passed_over": pa.nulls(len(rows), pa.string()),
        }
        parts.append(pa.table(columns))
    table = pa.concat_tables(parts).combine_chunks()
    feather.write_feather(table, str(path), compression="uncompressed", chunksize=len(table))


def run(rank: int, path: Path, num_prompts: int) -> None:
    """One rank."""
    scan._scan_reader = lambda *arguments: feather.read_table(str(path), memory_map=True)
    begin = {"own": held("RssAnon"), "mapped": held("RssFile")}
    data = DataConfig(
        max_prompt_length=512, sampling_strategy="curriculum", curriculum_refresh="online", category_key="category",
        rollout_batch_size=512,
    )  # fmt: skip

    def timed(name: str, action: Callable[[], Any]) -> Any:
        start = time.process_time()
        found = action()
        own, mapped = (held(kind) - begin[key] for kind, key in (("RssAnon", "own"), ("RssFile", "mapped")))
        figures = f"own {own:8.1f} MB, mapped {mapped:8.1f} MB, {time.process_time() - start:7.2f} s"
        sys.stdout.write(f"rank {rank}: {name:28s} {figures}\n")
        return found

    reader: Any = FakeReader(num_prompts)
    encoder: Any = SimpleNamespace()
    prompts = timed(
        "the data set", lambda: PromptDataset([reader], scan.scan_rows([reader], data, encoder), data, encoder)
    )
    coordinator = timed(
        "and the curriculum",
        lambda: Coordinator(
            data, prompts.prompt_ids, prompts.categories, prompts.fingerprint, 8, 10_000, Control(rank),
            prompts.sources, prompts.source_names,
        ),
    )  # fmt: skip
    if rank == 0:
        beliefs, random = coordinator.table._filter, np.random.default_rng(0)
        beliefs._last_seen[:] = 0
        beliefs._anchor[:] = random.normal(0.0, 2.0, num_prompts)
        beliefs._variance[:] = 1.0
    timed("and a draw", lambda: coordinator.next_groups(1))
    with tempfile.TemporaryDirectory() as folder:
        timed("and a save", lambda: coordinator.save(Path(folder)))
    peak = held("VmHWM") - begin["own"] - begin["mapped"]
    sys.stdout.write(f"rank {rank}: peak {peak:.1f} MB\n")


class FakeReader:
    """A source that is asked for nothing but its size."""

    name = "made up"

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows

    def __len__(self) -> int:
        return self._num_rows


def held(kind: str) -> float:
    """What this process holds, in MB, by the kernel's name for it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) / 1e3
    raise KeyError(kind)


if __name__ == "__main__":
    main()
