"""`python -m mmr1_ds.train`, for a warm process."""

import sys

from mmr1_ds.cluster.exits import leave
from mmr1_ds.train import main

leave(main(sys.argv[1:]))
