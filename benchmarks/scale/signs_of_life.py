"""What the signs of life of R ranks cost rank 0's node, with a real store and the watches of some ranks.

    python benchmarks/scale/signs_of_life.py [--ranks 512]

Every rank's place is in a real TCPStore; the reads of one ordinary rank are counted while nothing is unusual, in bytes
a second, and multiplied by the number of ranks; rank 0's own exchange is timed. The rest of the ranks is not started.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore

from mmr1_ds.cluster.judgement import Place
from mmr1_ds.cluster.watch import Watch


class Counting:
    """A connection to the store that counts what it is given."""

    def __init__(self, store: TCPStore) -> None:
        self._store, self.num_bytes, self.seconds, self.num_calls = store, 0, 0.0, 0

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            begin = time.perf_counter()
            found = getattr(self._store, name)(*arguments)
            self.seconds += time.perf_counter() - begin
            self.num_calls += 1
            values = found if isinstance(found, list) else [found] if isinstance(found, bytes) else []
            self.num_bytes += sum(map(len, values))
            return found

        return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    size, seconds = arguments.ranks, arguments.seconds
    host = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=30), wait_for_workers=False)
    connections = [
        Counting(TCPStore("127.0.0.1", host.port, timeout=timedelta(seconds=30), wait_for_workers=False))
        for _ in range(2)
    ]
    watches = [Watch(rank, size, 1800, store) for rank, store in enumerate(connections)]
    beat = 0
    end = time.monotonic() + 2 * seconds
    while time.monotonic() < end:
        beat += 1
        for rank in range(2, size):
            place = json.dumps(dataclasses.asdict(Place(rank, f"node{rank // 8:03d}", beat, stage="update_actor")))
            host.set(f"place/{rank}", watches[0]._signed(place))
        time.sleep(0.5)
        if end - time.monotonic() > seconds:
            for connection in connections:
                connection.num_bytes, connection.seconds, connection.num_calls = 0, 0.0, 0
    each = connections[1].num_bytes / seconds
    sys.stdout.write(
        f"{size} ranks: an ordinary rank reads {each / 1e3:.1f} kB/s, all together {each * size / 1e6:.2f} MB/s; "
        f"rank 0 reads {connections[0].num_bytes / seconds / 1e3:.1f} kB/s in {connections[0].seconds / seconds:.1%} "
        "of its time\n"
    )
    for watch in reversed(watches):
        watch.close()


if __name__ == "__main__":
    main()
