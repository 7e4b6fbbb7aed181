"""`python -m mmr1_ds.train`, with vLLM's linear attention in float32; one rank of several."""

import sys

from fixtures.delta_net import compute_delta_nets_in_float32

from mmr1_ds.cluster.exits import leave
from mmr1_ds.train import main

compute_delta_nets_in_float32()
leave(main(sys.argv[1:]))
