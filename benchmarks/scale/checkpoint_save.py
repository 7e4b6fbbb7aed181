"""What a checkpoint takes from the training: written at once, or from a copy in the background.

    python benchmarks/scale/checkpoint_save.py [--millions 64] [--saves 5] [--folder FOLDER]

One rank's ZeRO-3 shards: a stack of linear layers of that many million parameters after an update by AdamW, 12 bytes
a parameter. Between two saves come matrix products, as a step would have; the seconds are medians over the saves.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch

from mmr1_ds.cluster.launch import LaunchEnvironment
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.engine.weights.zero_checkpoint import ZeroCheckpoint
from mmr1_ds.loop.checkpoint import Checkpoints

WIDTH = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=64)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    ranks = Ranks(LaunchEnvironment(0, 1, 0, "none"), timeout_seconds=600)
    layers = [torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(arguments.millions)]
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(model=torch.nn.Sequential(*layers), config=settings)
    engine.backward(engine(torch.randn(4, WIDTH, device=engine.device)).square().mean())
    engine.step()
    zero = ZeroCheckpoint(engine, ranks)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
        for in_background in (False, True):
            found = [save(Path(root), zero, ranks, step, in_background) for step in range(1, arguments.saves + 1)]
            taken, whole, kept = (statistics.median(column) for column in zip(*found, strict=True))
            name = "in the background" if in_background else "at once"
            sys.stdout.write(
                f"{name}: {taken:.2f} s of the step, there after {whole:.2f} s; "
                f"meanwhile a matrix product took {kept:.2f} times as long as alone\n"
            )
    ranks.close()


def save(root: Path, zero: ZeroCheckpoint, ranks: Ranks, step: int, in_background: bool) -> tuple[float, float, float]:
    """Return the seconds until training goes on, and until the checkpoint is there, and how far it slowed a product."""
    checkpoints = Checkpoints(root / str(in_background), 1, ranks)

    def write(folder: Path) -> Any:
        return zero.save(folder / "actor", {}, in_background=in_background)

    alone = min(product() for _ in range(20))
    start = time.perf_counter()
    assert checkpoints.save(step, write, in_background=in_background)
    taken, products = time.perf_counter() - start, []
    while in_background and not checkpoints.has_written():
        products.append(product())
    if in_background:
        assert checkpoints.finish()
    return taken, time.perf_counter() - start, statistics.median(products or [alone]) / alone


def product() -> float:
    """Return the seconds of one matrix product."""
    start = time.perf_counter()
    torch.mm(torch.ones(WIDTH, WIDTH), torch.ones(WIDTH, WIDTH))
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
