"""Two updates by an actor whose optimiser has bf16 moments, the second once more from a checkpoint of the first.

Usage: bf16_states.py MODEL OUT.npz SAVED_FOLDER. Where the folder has a checkpoint it only goes on from it.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from deepspeed.utils import safe_get_full_fp32_param
from fixtures.tiny_models import make_prompt
from settings import deepspeed_configs, make_actor, small_config

from mmr1_ds.cluster.exits import leave
from mmr1_ds.cluster.launch import launch_environment
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.io import digest
from mmr1_ds.records import Trajectory

model, out, saved = sys.argv[1:]
PROMPTS = 4
ranks = Ranks(launch_environment(), timeout_seconds=120)
config = small_config(model, PROMPTS, 1, micro_batch=2)
config.worker.actor.optim.strategy = "adamw_bf16"
encoder = PromptEncoder(config.worker.actor.model, config.data)
settings = deepspeed_configs(config, ranks.size)[0]
settings["zero_optimization"]["sub_group_size"] = 20_000  # several groups of parameters
actor = make_actor(config, settings, ranks, encoder)


def update(step: int) -> None:
    share = PROMPTS // ranks.size
    trajectories = []
    for index in range(ranks.rank * share, (ranks.rank + 1) * share):
        random = np.random.default_rng((step, index))
        length = int(random.integers(1, 15))
        token_ids = random.integers(0, 100, length).astype(np.int32)
        advantages = np.full(length, random.normal(), np.float32)
        prompt = make_prompt(encoder, index, False)
        trajectories.append(Trajectory(prompt, token_ids, np.full(length, -3.0, np.float32), advantages))
    actor.update(trajectories)


def weights() -> np.ndarray:
    parts = [safe_get_full_fp32_param(parameter).flatten() for parameter in actor.module.parameters()]
    return torch.cat(parts).cpu().numpy()


found = {"start": weights()}
begun = (Path(saved) / "zero3").is_dir()
if not begun:
    update(1)
    found["first"] = weights()
    at_once = [file.write() for file in actor.save(Path(f"{saved}.at_once"))]
    pending = actor.save(Path(saved), in_background=True)
    update(2)  # what was copied must not change with it
    written = [file.write() for file in pending]
    assert not any(
        file.path.is_file() and digest(file.path) != entry["sha256"] for file, entry in zip(pending, written)
    )
    found["second"], found["saved_alike"] = weights(), np.array(written == at_once and len(written) > 0)
actor.load(Path(saved))
if begun:
    found["first"] = weights()
update(2)
found["again"] = weights()
states = actor.engine.optimizer.optimizer.state.values()
sizes = {state[name].element_size() for state in states for name in ("exp_avg", "exp_avg_sq")}
found["moments"] = np.array(max(sizes))
if ranks.rank == 0:
    np.savez(out, **found)
torch.distributed.barrier()
ranks.close()
leave(0)
