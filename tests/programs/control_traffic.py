"""Every control collective once. Usage: control_traffic.py OUT_FOLDER"""

import json
import sys
from pathlib import Path

import numpy as np

from mmr1_ds.cluster.exits import leave
from mmr1_ds.cluster.launch import launch_environment
from mmr1_ds.cluster.ranks import Ranks

ranks = Ranks(launch_environment(), timeout_seconds=30)
rank = ranks.rank
wide = np.arange(12).reshape(3, 4)[:, ::2]  # not contiguous
to_ranks = [{f"{rank} to {other}": wide[:rank], "flag": np.array([rank > other])} for other in range(ranks.size)]
exchanged = ranks.exchange_arrays(to_ranks if rank else [{}] * ranks.size, "exchange")
result = {
    "broadcast": ranks.broadcast_array(np.array([5, 7, 2**40]) if rank == 0 else None, "broadcast").tolist(),
    "gathered": [
        part.tolist()
        for part in ranks.all_gather_array(
            np.array([[rank + 0.5, row] for row in range(rank)]).reshape(-1, 2), "gather"
        )
    ],
    "exchanged": [{name: array.tolist() for name, array in sorted(part.items())} for part in exchanged],
    "sum": ranks.sum({"a": rank, "b": 10.0}, "sum"),
    "max": ranks.max({"a": rank}, "max"),
    "any": [ranks.any(rank == 1, "any"), ranks.any(False, "any")],
}
try:
    ranks.sum({"a" if rank else "b": 1.0}, "of one rank alone")
except RuntimeError as error:
    result["refused"] = str(error)
counter = ranks.counter()
result["counted"] = []
for _ in range(2):
    if rank == 0:
        counter.reset()
    ranks.barrier("count")
    result["counted"].append([counter.next() for _ in range(7 * rank)])
    ranks.barrier("counted")
(Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(result))
ranks.barrier("end")
ranks.close()
leave(0)
