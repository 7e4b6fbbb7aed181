"""Train on fixed responses in fp32 and, by the preset of an H100, in bf16; write losses, gradients and types.

Usage: bf16_training.py MODEL OUT.json
"""

import json
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from deepspeed.utils import safe_get_full_grad
from fixtures.tiny_models import make_prompt
from settings import end, make_actor, small_config, start_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.engine.actor import Actor
from mmr1_ds.preflight.deepspeed import resolve_deepspeed
from mmr1_ds.records import Trajectory

model, out = sys.argv[1:]
PROMPTS, RESPONSES, STEPS = 4, 4, 20

ranks = start_ranks(300)
config = small_config(model, PROMPTS, RESPONSES, micro_batch=1)  # as many additions as responses
actor_config = config.worker.actor
actor_config.micro_batch_size_per_device_for_experience = 16
actor_config.deepspeed, actor_config.optim.weight_decay = "zero3_h100.json", 0.01
encoder = PromptEncoder(actor_config.model, config.data)


def trajectory(index: int, sample: int) -> Trajectory:
    """A response to be learned by heart."""
    random = np.random.default_rng((index, sample))
    length = int(random.integers(3, 9))
    start = 10 + 7 * index + sample
    token_ids = np.arange(start, start + length, dtype=np.int32)
    prompt = make_prompt(encoder, index, with_image=encoder.is_multimodal and index % 2 == 0)
    return Trajectory(prompt, token_ids, np.full(length, -3, np.float32), np.ones(length, np.float32))


trajectories = [trajectory(i, k) for i in range(ranks.rank, PROMPTS, ranks.size) for k in range(RESPONSES)]
pairs = [item.pair for item in trajectories]


class Types(TorchDispatchMode):
    """Notes the types of what functions of interest are given."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, set[str]] = defaultdict(set)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("rsqrt", "cos", "sin", "exp", "logsumexp", "_log_softmax", "mm", "addmm"):
            self.found[name].add(str(args[0].dtype))
        return func(*args, **(kwargs or {}))


def loss(actor: Actor) -> float:
    """The mean of -log p over all response tokens."""
    found = np.concatenate(actor.log_probs(pairs))
    sums = ranks.sum({"loss": -float(found.sum()), "tokens": float(len(found))}, "loss")
    return sums["loss"] / sums["tokens"]


def train(deepspeed: dict, num_steps: int) -> dict:
    actor = make_actor(config, deepspeed, ranks, encoder, num_updates=STEPS)
    with Types() as types:
        losses = [loss(actor)]
    gradients: dict[str, torch.Tensor] = {}
    step = actor.engine.step

    def step_and_note() -> None:
        if actor.engine.is_gradient_accumulation_boundary() and not gradients:
            named = actor.model.named_parameters()
            gradients.update({name: safe_get_full_grad(parameter).clone() for name, parameter in named})
        step()

    actor.engine.step = step_and_note
    for _ in range(num_steps):
        actor.update([replace(item) for item in trajectories])
        losses.append(loss(actor))
    optimizer = actor.engine.optimizer
    masters = optimizer.fp32_partitioned_groups_flat
    states = [value for state in optimizer.optimizer.state.values() for value in state.values() if value.ndim]
    own = {
        "weights": {str(parameter.dtype) for parameter in actor.model.parameters()},
        "masters": {str(tensor.dtype) for tensor in masters},
        "moments": {str(tensor.dtype) for tensor in states},
        "sums": {str(optimizer.grad_partitions_flat_buffer.dtype)},
        "reduced": {str(optimizer.communication_data_type)},
    }
    own |= types.found
    return {"losses": losses, "types": {name: sorted(found) for name, found in own.items()}, "gradients": gradients}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Of two gradients, as a part of their length."""
    squares = sum(float((one[name].double() - other[name].double()).square().sum()) for name in one)
    return (squares / sum(float(one[name].double().square().sum()) for name in one)) ** 0.5


preset = resolve_deepspeed(config, ranks.size, on_gpu=True)
preset["optimizer"]["params"]["torch_adam"] = True  # the fused one needs a GPU
preset["zero_optimization"]["overlap_comm"] = False  # streams
in_fp32 = preset | {"bf16": {"enabled": False}}
summed_in_bf16 = preset | {"data_types": {"grad_accum_dtype": "bf16"}}
exact = train(in_fp32, STEPS)
ours = train(preset, STEPS)
rough = train(summed_in_bf16, 1)
if ranks.rank == 0:
    report = {
        "exact": exact["losses"],
        "ours": ours["losses"],
        "types": ours["types"],
        "distance": distance(exact["gradients"], ours["gradients"]),
        "distance_summed_in_bf16": distance(exact["gradients"], rough["gradients"]),
    }
    Path(out).write_text(json.dumps(report))
end(ranks)
