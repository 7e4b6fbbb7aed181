"""Every control collective once. Usage: control_traffic.py OUT_FOLDER"""

import json
import sys
from pathlib import Path

import numpy as np

from mmr1_ds.cluster.launch import launch_environment
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.exits import leave

ranks = Ranks(launch_environment(), timeout_seconds=30)
rank = ranks.rank
result = {
    "broadcast": ranks.broadcast_array(np.array([5, 7, 2**40]) if rank == 0 else None, "broadcast").tolist(),
    "gathered": [
        part.tolist()
        for part in ranks.all_gather_array(
            np.array([[rank + 0.5, row] for row in range(rank)]).reshape(-1, 2), "gather"
        )
    ],
    "exchanged": ranks.exchange_objects([f"{rank} to {other}" * rank for other in range(ranks.size)], "exchange"),
    "sum": ranks.sum({"a": rank, "b": 10.0}, "sum"),
    "max": ranks.max({"a": rank}, "max"),
    "any": [ranks.any(rank == 1, "any"), ranks.any(False, "any")],
}
(Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(result))
ranks.barrier("end")
ranks.close()
leave(0)
