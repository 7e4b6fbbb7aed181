"""Resident bytes that an actor holds, and takes at most in an update, beside what the planner estimates.

Usage: planned_memory.py MODEL OUT.json RESPONSE_TOKENS CHECKPOINTING
"""

import ctypes
import gc
import json
import re
import sys
from pathlib import Path

import numpy as np
from fixtures.tiny_models import make_prompt
from settings import deepspeed_configs, end, make_actor, small_config, start_ranks

from mmr1_ds.commands.plan import activations
from mmr1_ds.commands.plan.activations import MicroBatch
from mmr1_ds.commands.plan.memory import zero_engine
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.engine.model.shapes import policy_shape
from mmr1_ds.records import Trajectory

model, out, length, checkpointing = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "true"


def resident(field: str) -> int:
    ctypes.CDLL(None).malloc_trim(0)
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


ranks = start_ranks()
config = small_config(model, 2, 2, micro_batch=2)
config.data.max_response_length = length
config.worker.actor.model.enable_gradient_checkpointing = checkpointing
encoder = PromptEncoder(config.worker.actor.model, config.data)
deepspeed = deepspeed_configs(config, ranks.size)[0]
zero = deepspeed["zero_optimization"]
zero |= {"reduce_bucket_size": 1_000_000, "overlap_comm": False, "stage3_prefetch_bucket_size": 0}


def trajectories(tokens: int) -> list[Trajectory]:
    response, ones = (30 + np.arange(tokens) % 40).astype(np.int32), np.ones(tokens, np.float32)
    return [
        Trajectory(make_prompt(encoder, i, False), response, -3 * ones, (1 - 2 * (i % 2)) * ones)
        for i in range(4 // ranks.size)
    ]


# Imports, threads and DeepSpeed's own operation are there before the first reading.
small = make_actor(config, deepspeed, ranks, encoder, num_updates=10)
small.update(trajectories(3))
held_by_python = resident("VmRSS")
gc.collect()
actor = make_actor(config, deepspeed, ranks, encoder, num_updates=10)
actor.update(trajectories(3))
gc.collect()
held = resident("VmRSS") - held_by_python
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
actor.update(trajectories(length))
peak = resident("VmHWM") - before

shape = policy_shape(config.worker.actor.model)
engine = zero_engine(shape, zero, ranks.size, 4, trained=True, torch_adam=True)
prompt = len(trajectories(1)[0].prompt.token_ids)
batch = MicroBatch(2.0 * (prompt + length), 2.0 * length, 0.0)
working = activations.training(shape, batch, 4, checkpointing, "cpu")
planned = {
    "held": engine.weights + engine.gradients + engine.optimizer,
    "peak": max(engine.gathered + working.peak, engine.update),
}
if ranks.rank == 0:
    Path(out).write_text(json.dumps({"measured": {"held": held, "peak": peak}, "planned": planned}, indent=1))
end(ranks)
