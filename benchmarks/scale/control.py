"""What the control collectives of a step cost a rank, with the program's own ranks over gloo and a real store.

    python benchmarks/scale/control.py [--ranks 16 32 64 128] [--rounds 30] [--hop-microseconds 20]

Ranks are forked processes of one machine, which has fewer cores than ranks: what they wait for each other says nothing,
so processor time is taken. gloo gathers in a ring, R - 1 hops one after the other; the time of R = 512 is reckoned from
the line through what was measured, and from a hop's time in the network, which is assumed.
"""

from __future__ import annotations

import argparse
import os
import socket
import struct
import sys
import time

import numpy as np
import torch  # before the fork, so that the ranks share its memory

from mmr1_ds.cluster.launch import LaunchEnvironment
from mmr1_ds.cluster.ranks import Ranks

COLLECTIVES = {1: 14, 4: 18}  # of a step with so many optimiser steps: tests/loop/test_collectives.py
RECKONED = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--hop-microseconds", type=float, default=20.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = [measure(size, arguments.rounds) for size in arguments.ranks]
    for size, seconds in zip(arguments.ranks, found, strict=True):
        sys.stdout.write(f"{size:4d} ranks: {1e3 * seconds:.2f} ms of a rank's processor a collective\n")
    slope, start = np.polyfit(arguments.ranks, found, 1)
    own = start + slope * RECKONED
    network = (RECKONED - 1) * arguments.hop_microseconds / 1e6
    for steps, number in COLLECTIVES.items():
        sys.stdout.write(
            f"{RECKONED} ranks, {number} collectives ({steps} optimiser steps): {number * own:.2f} s of the processor, "
            f"{number * network:.2f} s in the network, reckoned\n"
        )


def measure(size: int, rounds: int) -> float:
    """The median over ranks of the processor's seconds for a collective."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    pipes = []
    for rank in range(size):
        reader, writer = os.pipe()
        if os.fork() == 0:
            code = 1
            try:
                os.write(writer, struct.pack("d", of_a_rank(rank, size, rounds)))
                code = 0
            finally:
                os._exit(code)
        os.close(writer)
        pipes.append(reader)
    codes = [os.wait()[1] for _ in range(size)]
    assert not any(codes), f"{sum(map(bool, codes))} of {size} ranks failed"
    return float(np.median([struct.unpack("d", os.read(reader, 8))[0] for reader in pipes]))


def of_a_rank(rank: int, size: int, rounds: int) -> float:
    ranks = Ranks(LaunchEnvironment(rank, size, rank, "none"), timeout_seconds=300)
    ranks.barrier("begin")
    begin = time.process_time()
    for i in range(rounds):
        ranks.sum_and_max({f"sum {j}": float(i) for j in range(20)}, {"most": 1.0}, "measure")
    seconds = (time.process_time() - begin) / rounds
    ranks.barrier("end")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
