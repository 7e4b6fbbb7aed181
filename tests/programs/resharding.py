"""Train an actor, a critic and adapters on fixed responses; save, or go on from another number of ranks' checkpoint.

Usage: resharding.py TEXT_MODEL OUT SAVED_FOLDER FIRST_STEP LAST_STEP SAVE_FOLDER PARTS. Goes on from SAVED_FOLDER when
the first step is not 1. Rank 0 writes OUT: weights and moments after loading, and with metrics after each step. A
checkpoint of every step but the first is left: there the last rank's disk fails the save.
"""

import resource
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from settings import deepspeed_configs, end, fixed_trajectory, make_actor, make_critic, small_config, start_ranks

from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.engine.actor import Actor
from mmr1_ds.engine.critic import Critic
from mmr1_ds.loop.checkpoint import Checkpoints

model, out, saved, first, last, save_to, wanted = sys.argv[1:]
PROMPTS, RESPONSES = 6, 1

ranks = start_ranks()
config = small_config(model, PROMPTS, RESPONSES, micro_batch=1)
config.data.rollout_batch_size = PROMPTS
config.worker.critic.optim.lr = 1e-3
encoder = PromptEncoder(config.worker.actor.model, config.data)
settings = deepspeed_configs(config, ranks.size)[0]
settings["zero_optimization"]["sub_group_size"] = 20_000  # several groups of parameters, each with a step count
parts: dict[str, Actor | Critic] = {}
if "actor" in wanted:
    parts["actor"] = make_actor(config, settings, ranks, encoder)
    assert len(parts["actor"].engine.optimizer.fp16_groups) > 2
if "critic" in wanted:
    parts["critic"] = make_critic(config, settings, ranks, encoder)
if "adapted" in wanted:
    config.worker.actor.model.lora.rank, config.worker.actor.model.lora.alpha = 3, 6.0
    parts["adapted"] = make_actor(config, settings, ranks, encoder)


def write(folder: Path) -> None:
    for name, part in parts.items():
        part.save(folder / name)


def state() -> dict[str, torch.Tensor]:
    found = {}
    for name, part in parts.items():
        for parameter, tensor in part.engine.module.named_parameters():
            if tensor.requires_grad:
                found[f"{name} {parameter}"] = safe_get_full_fp32_param(tensor)
                for moment in ("exp_avg", "exp_avg_sq"):
                    found[f"{name} {parameter} {moment}"] = safe_get_full_optimizer_state(tensor, moment)
    return {name: tensor.clone() for name, tensor in found.items()}


if int(first) > 1:
    for name, part in parts.items():
        part.load(Path(saved) / name)
result = {"loaded": state() if int(first) > 1 else None, "metrics": {}, "states": {}}
checkpoints = Checkpoints(Path(save_to), -1, ranks)
share = PROMPTS // ranks.size
for step in range(int(first), int(last) + 1):
    begin = step * PROMPTS + ranks.rank * share
    own = [fixed_trajectory(encoder, index, 0) for index in range(begin, begin + share)]
    metrics = {}
    for name, part in parts.items():
        if isinstance(part, Critic):
            values = part.values([item.pair for item in own])
            metrics[name] = part.update(
                [replace(item, values=values[i], returns=values[i] + item.advantages) for i, item in enumerate(own)]
            )
        else:
            metrics[name] = part.update(own)
    result["metrics"][step] = metrics
    result["states"][step] = state()
    if step == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if ranks.rank == ranks.size - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        result["failed"] = checkpoints.save(step, write)
        result["failure"] = checkpoints.failure
        result["left"] = [path.name for path in Path(save_to).iterdir()]
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    else:
        assert checkpoints.save(step, write)
if ranks.rank == 0:
    torch.save(result, out)
end(ranks)
