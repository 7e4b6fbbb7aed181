"""Draw five steps of the small curriculum on every rank: curriculum_draws.py FOLDER. Writes FOLDER/RANK.json."""

import json
import sys
from pathlib import Path

from fixtures.coordinators import make, train

from mmr1_ds.cluster.launch import launch_environment
from mmr1_ds.cluster.ranks import Ranks

with Ranks(launch_environment(), timeout_seconds=60) as ranks:
    batches = [batch for batch, _ in train(make(ranks), range(1, 6))]
    (Path(sys.argv[1]) / f"{ranks.rank}.json").write_text(json.dumps(batches))
