"""Two updates by an actor with an optimiser, the second once more from a checkpoint of the first.

Usage: optimizer_states.py MODEL OUT.npz SAVED_FOLDER [STRATEGY: adamw_bf16, or fused: adamw by torch's fused kernel]

Where the folder has a checkpoint it only goes on from it.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from deepspeed.utils import safe_get_full_fp32_param
from fixtures.tiny_models import make_prompt
from settings import deepspeed_configs, end, make_actor, small_config, start_ranks

from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.io import digest
from mmr1_ds.records import Trajectory

model, out, saved, strategy = [*sys.argv[1:], "adamw_bf16"][:4]
PROMPTS = 4
ranks = start_ranks()
config = small_config(model, PROMPTS, 1, micro_batch=2)
config.worker.actor.optim.strategy = strategy if strategy != "fused" else "adamw"
config.worker.actor.optim.muon_lr = 0.01 if strategy == "muon" else None
encoder = PromptEncoder(config.worker.actor.model, config.data)
settings = deepspeed_configs(config, ranks.size)[0]
settings["zero_optimization"]["sub_group_size"] = 20_000  # several groups of parameters
if strategy == "fused":
    settings["optimizer"]["params"]["fused"] = True
actor = make_actor(config, settings, ranks, encoder)
assert bool(actor.engine.optimizer.optimizer.defaults.get("fused")) is (strategy == "fused")


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
    for file, entry in zip(pending, written, strict=True):
        assert not file.path.is_file() or digest(file.path) == entry["sha256"]
    found["second"], found["saved_alike"] = weights(), np.array(written == at_once and len(written) > 0)
actor.load(Path(saved))
if begun:
    found["first"] = weights()
update(2)
found["again"] = weights()
states = actor.engine.optimizer.optimizer.state.values()
tensors = [value for state in states for value in state.values() if torch.is_tensor(value) and value.numel() > 4096]
found["moments"] = np.array(max(tensor.element_size() for tensor in tensors))
found["shapes"] = np.array([(*item.ds_shape, 1)[:2] for item in actor.module.parameters()])
if ranks.rank == 0:
    np.savez(out, **found)
end(ranks)
