"""`python -m mmr1_ds.train`, with a CPU build of vLLM that says which experts it chose; one rank of several."""

import sys

from fixtures.routed_experts import return_routed_experts

from mmr1_ds.cluster.exits import leave
from mmr1_ds.loop import composition
from mmr1_ds.train import main

composition.check_ranks = lambda *_: None  # type: ignore[assignment]  # which refuses it on the CPU
return_routed_experts()
leave(main(sys.argv[1:]))
