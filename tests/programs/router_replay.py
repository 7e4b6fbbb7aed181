"""Sample with vLLM from a mixture whose routers differ from the actor's; write the drift with and without replay.

Usage: router_replay.py MODEL OUT.json TENSOR_PARALLEL
"""

import json
import sys
from typing import Any

import deepspeed
import numpy as np
import torch
from fixtures.delta_net import compute_delta_nets_in_float32
from fixtures.routed_experts import return_routed_experts
from fixtures.tiny_models import make_prompt
from settings import deepspeed_configs, end, make_actor, small_config, start_ranks

from mmr1_ds.cluster.preemption import Preemption
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.records import RolloutGroup, RolloutRequest, SamplingSettings, Trajectory
from mmr1_ds.rollout.base import generate
from mmr1_ds.rollout.colocated.engine import VllmRollout

model, out, tensor_parallel = sys.argv[1:]
PROMPTS, RESPONSES = 4, 3

ranks = start_ranks()
config = small_config(model, PROMPTS, RESPONSES, micro_batch=3)
config.worker.rollout.temperature, config.worker.rollout.tensor_parallel_size = 0.8, int(tensor_parallel)
config.worker.actor.router_replay.mode = "R3"
encoder = PromptEncoder(config.worker.actor.model, config.data)
actor = make_actor(config, deepspeed_configs(config, ranks.size)[0], ranks, encoder)
return_routed_experts()
compute_delta_nets_in_float32()
rollout = VllmRollout(
    config.worker.rollout, config.worker.actor.model, config.data, ranks, encoder, 4, Preemption(60.0, None),
    returns_experts=True,
)  # fmt: skip
rollout.sync_weights(actor)
settings = SamplingSettings(0.8, 1.0, -1, 20, with_experts=True)


def sample(step: int) -> list[RolloutGroup]:
    share = PROMPTS // ranks.size
    indices = range(step * PROMPTS + ranks.rank * share, step * PROMPTS + (ranks.rank + 1) * share)
    prompts = [make_prompt(encoder, i, encoder.is_multimodal and i % 3 != 0, 4) for i in indices]
    return generate(rollout, [RolloutRequest(prompt, RESPONSES, 1000 * prompt.index) for prompt in prompts], settings)


def drift(groups: list[RolloutGroup], with_replay: bool) -> dict[str, float]:
    """Of the actor's log-probabilities from vLLM's, over this rank's tokens."""
    pairs = [(group.prompt, response.token_ids) for group in groups for response in group.responses]
    experts = [response.experts for group in groups for response in group.responses]
    found = np.concatenate(actor.log_probs(pairs, experts if with_replay else None))
    expected = np.concatenate([response.logprobs for group in groups for response in group.responses])
    return {"mean": float(np.abs(found - expected).mean()), "max": float(np.abs(found - expected).max())}


def update(groups: list[RolloutGroup], with_replay: bool) -> dict[str, float]:
    random = np.random.default_rng(ranks.rank)
    return actor.update([
        Trajectory(
            group.prompt, response.token_ids, response.logprobs,
            np.full(len(response.token_ids), random.normal(), np.float32),
            experts=response.experts if with_replay else None,
        )
        for group in groups
        for response in group.responses
    ])  # fmt: skip


def perturb_routers() -> None:
    torch.manual_seed(4)
    for name, weight in actor.model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            with deepspeed.zero.GatheredParameters(weight, modifier_rank=0):
                if ranks.rank == 0:
                    weight.data += 0.1 * weight.std() * torch.randn_like(weight)


result: dict[str, Any] = {}
for step, name in enumerate(("equal", "perturbed")):
    groups = sample(step)
    result[name] = {"without": drift(groups, False), "with": drift(groups, True)}
    if name == "equal":
        perturb_routers()
result["updates"] = []
for step in range(2, 5):  # after the first the routers are equal again
    result["updates"].append(update(sample(step), with_replay=True))
    rollout.sync_weights(actor)
groups = sample(5)
config.worker.actor.router_replay.mode = "R2"  # of which the actor has the same object
pairs = [(group.prompt, response.token_ids) for group in groups for response in group.responses]
text = getattr(actor.model.base_model, "language_model", actor.model.base_model)
mixed = [number for number, layer in enumerate(text.layers) if hasattr(layer.mlp, "experts")]
of_vllm = [np.sort(response.experts[:, mixed]) for group in groups for response in group.responses]
recorded = actor.old_policy(pairs).experts
assert recorded is not None
result["recorded"] = all(np.array_equal(np.sort(a[:, mixed]), b) for a, b in zip(recorded, of_vllm, strict=True))
everyone = ranks.all_gather_objects(result, "gather results")
if ranks.rank == 0:
    with open(out, "w", encoding="utf-8") as file:
        json.dump(everyone, file)
rollout.close()
end(ranks)
