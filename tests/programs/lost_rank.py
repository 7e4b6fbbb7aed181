"""Rank 1 leaves; rank 0 waits for it and prints the error."""

import os
import sys

from mmr1_ds.distributed import CollectiveError, Ranks
from mmr1_ds.launch_environment import launch_environment

ranks = Ranks(launch_environment(), timeout_seconds=5)
ranks.step = 17
if ranks.rank == 1:
    os._exit(0)
try:
    ranks.barrier("wait for the others")
except CollectiveError as error:
    sys.stdout.write(f"{error}\n")
    sys.stdout.flush()
os._exit(0)
