"""How long rank 0 takes to draw a batch from very many prompts.

    python benchmarks/curriculum/curriculum_draws.py [--prompts 1e7 1e8] [--batch 2048] [--repeats 5] [--json FILE]

Every draw is by weights that have just changed, as after each step of an online curriculum, so that nothing is reused,
and lies in another epoch of the walk than the one before. The median counts; weights take 4 bytes a prompt, and the
draw as much again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from mmr1_ds.curriculum.sampler import PromptSampler


def measure(num_prompts: int, batch: int, ratio: float, replacement: bool, repeats: int) -> list[float]:
    """Seconds of each draw, (repeats,)."""
    random = np.random.default_rng(0)
    sampler = PromptSampler(num_prompts, batch, 1, "curriculum", ratio, replacement)
    seconds = []
    for repeat in range(repeats + 1):
        weights = random.random(num_prompts, dtype=np.float32)
        weights.flags.writeable = False
        start = time.perf_counter()
        drawn = sampler.draw(1 + repeat * (num_prompts // batch + 1), weights)
        seconds.append(time.perf_counter() - start)
        assert drawn.shape == (batch,)
    return seconds[1:]  # the first also builds what is built once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=float, nargs="+", default=[1e7, 1e8])
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--ratio", type=float, default=0.5, help="lambda: the share drawn by weight")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    sys.stdout.write(f"{'prompts':>12}  {'drawn':<22}{'median s':>10}{'slowest s':>11}\n")
    for num_prompts in map(int, arguments.prompts):
        for replacement in (True, False):
            seconds = measure(num_prompts, arguments.batch, arguments.ratio, replacement, arguments.repeats)
            kind = "with replacement" if replacement else "without replacement"
            row = {"prompts": num_prompts, "drawn": kind, "median": statistics.median(seconds), "slowest": max(seconds)}
            sys.stdout.write(f"{num_prompts:>12,}  {kind:<22}{row['median']:>10.3f}{row['slowest']:>11.3f}\n")
            sys.stdout.flush()
            rows.append(row)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
