"""What the curriculum's state costs rank 0, by the number of prompts: what a step keeps to go back to, saves, weights.

    python benchmarks/scale/curriculum_state.py [--prompts 1000000] [--draw proportional]

Prompt ids are those of a data set, 32 hexadecimal digits in an Arrow column. Each line is one call in seconds,
and in seconds of the processor, which other work on the machine distorts less. Of the saves only the first writes the
prompt ids; sizes are of what one save writes anew. A whole step draws, observes, learns and reports; of several the
median counts.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mmr1_ds.config import DataConfig
from mmr1_ds.curriculum.coordinator import Coordinator
from mmr1_ds.curriculum.statistics import PromptStatistics
from mmr1_ds.data.dataset import TextColumn

NUM_STEPS = 7


class Alone:
    """The control of a run of one rank."""

    rank, size = 0, 1

    def broadcast_array(self, array: np.ndarray, stage: str) -> np.ndarray:
        return array

    def all_gather_array(self, array: np.ndarray, stage: str) -> list[np.ndarray]:
        return [array]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--draw", choices=["proportional", "candidates", "posterior"], default="proportional")
    arguments = parser.parse_args()
    num_prompts = arguments.prompts
    data = DataConfig(
        rollout_batch_size=512, sampling_strategy="curriculum", curriculum_refresh="online",
        curriculum_draw=arguments.draw,
        curriculum_metrics=["learnability"], curriculum_metric_weights=[1.0],
    )  # fmt: skip
    prompt_ids = TextColumn(pa.array((f"{i * 7919:032x}" for i in range(num_prompts)), pa.large_string()))
    categories = [f"c{i % 9}" for i in range(num_prompts)]
    coordinator = Coordinator(data, prompt_ids, categories, "fingerprint", 8, 10_000, Alone())
    for share in (0.0, 0.1, 1.0):
        believe(coordinator, int(share * num_prompts))
        weights(coordinator)
        timed(f"weights, {share:.0%} of the prompts seen", lambda: weights(coordinator))
    for number in (1, 2):
        weights(coordinator)
        timed(f"draw {number}, from new weights", lambda: coordinator.next_batch(1))
    timed("metrics", coordinator.metrics)
    whole_steps(coordinator)
    timed("what a step keeps to go back to", coordinator.position)
    with tempfile.TemporaryDirectory() as root:
        kept, seen = Path(root) / "prompt_ids.safetensors", set()
        for step in (1, 2):
            folder = Path(root) / f"global_step_{step}"
            folder.mkdir()
            timed(f"save {step}", lambda folder=folder: coordinator.save(folder, kept))
            new = {path.stat().st_ino: path.stat().st_size for path in folder.iterdir()}
            sys.stdout.write(f"  {sum(new[inode] for inode in new.keys() - seen) / 1e6:.1f} MB written\n")
            seen |= new.keys()
        folder = Path(root) / "global_step_2"
        timed("load", lambda: coordinator.load(folder))
    sys.stdout.write(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB\n")


def believe(coordinator: Coordinator, num_seen: int) -> None:
    """Give the first prompts a belief of their own, as if each had been seen."""
    beliefs, random = coordinator.table._filter, np.random.default_rng(0)
    beliefs._last_seen[:num_seen] = 0
    beliefs._anchor[:num_seen] = random.normal(0.0, 2.0, num_seen)
    beliefs._variance[:num_seen] = 1.0


def weights(coordinator: Coordinator) -> np.ndarray:
    coordinator.table._weights = None
    return coordinator.table.sampling_weights


def whole_steps(coordinator: Coordinator) -> None:
    """Take the median of some steps, the learning of 512 groups and a metrics line among them."""
    seconds, of_process = [], []
    for step in range(1, NUM_STEPS + 1):
        begin, own = time.perf_counter(), time.process_time()
        indices = coordinator.next_groups(step).indices
        coordinator.next_probes(step)
        coordinator.observe(step, [PromptStatistics(int(i), 8, 0.5, 0.5, 0.25, 0.3, 0.5) for i in indices])
        coordinator.finish_step(step, indices)
        coordinator.metrics()
        seconds.append(time.perf_counter() - begin)
        of_process.append(time.process_time() - own)
    tell("a whole step", statistics.median(seconds), statistics.median(of_process))


def timed(name: str, action: Callable[[], Any]) -> None:
    begin, own = time.perf_counter(), time.process_time()
    action()
    own, seconds = time.process_time() - own, time.perf_counter() - begin
    tell(name, seconds, own)


def tell(name: str, seconds: float, own: float) -> None:
    sys.stdout.write(f"{name:45s} {seconds:8.3f} s, {own:8.3f} s of this process\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
