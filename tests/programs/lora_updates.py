"""Train adapters on fixed responses from one step to another; write what moved, and what both references say.

Usage: lora_updates.py MODEL OUT CHECKPOINT_FOLDER FIRST_STEP LAST_STEP. Goes on from the checkpoint when the first step
is not 1, and leaves one behind. Each rank writes OUT.rank.
"""

import sys
from dataclasses import replace
from pathlib import Path

import deepspeed
import numpy as np
import torch
from settings import deepspeed_configs, end, fixed_trajectory, make_actor, make_reference, small_config, start_ranks

from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.engine.model.lora import adapters
from mmr1_ds.engine.reference import AdapterlessReference
from mmr1_ds.engine.weights import gathering as weights
from mmr1_ds.engine.weights.gathering import whole_parameters
from mmr1_ds.errors import UserError

weights.BUCKET_BYTES = 20_000  # several buckets, and parameters larger than one

model, out, folder, first, last = sys.argv[1:]
PROMPTS, RESPONSES = 4, 2

ranks = start_ranks()
config = small_config(model, PROMPTS, RESPONSES, micro_batch=2)
config.worker.actor.optim.lr = 1e-2
config.worker.actor.offload_states = int(first) > 1  # half of a run that is compared with a whole one
lora = config.worker.actor.model.lora
lora.rank, lora.alpha = 3, 6.0
encoder = PromptEncoder(config.worker.actor.model, config.data)
for_actor, for_reference = deepspeed_configs(config, ranks.size)
random_state = torch.get_rng_state()
actor = make_actor(config, for_actor, ranks, encoder)
leaves_random_state = torch.equal(random_state, torch.get_rng_state())
reference = AdapterlessReference(actor)
separate = make_reference(config, for_reference, ranks, encoder)


def copies(with_adapters: bool) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in whole_parameters(actor.model, None, with_adapters)}


def adapter_weights() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    found = {}
    for name, (a, b, _) in adapters(actor.model).items():
        with deepspeed.zero.GatheredParameters([a, b]):
            found[name.replace(".base_layer", "")] = (a.data.clone(), b.data.clone())
    return found


def are_partitioned() -> bool:
    return all(parameter.numel() == 0 for parameter in actor.model.parameters())


def trained() -> list[str]:
    return [name for name, parameter in actor.model.named_parameters() if parameter.requires_grad]


result = {
    "leaves_random_state": leaves_random_state,
    "are_partitioned": are_partitioned(),
    "trained": trained(),
    "at_first": adapter_weights(),
    "base_at_first": copies(False),
    "merged_at_first": copies(True),
    "names": [name for name, _ in whole_parameters(separate.model)],
}
if int(first) > 1:
    actor.load(Path(folder))

curve = []
for step in range(int(first), int(last) + 1):
    share = PROMPTS // ranks.size
    begin = step * PROMPTS + ranks.rank * share
    trajectories = [fixed_trajectory(encoder, i, k) for i in range(begin, begin + share) for k in range(RESPONSES)]
    pairs = [item.pair for item in trajectories]
    with actor.offloaded():  # as while responses are sampled
        pass
    own, off, other = actor.log_probs(pairs), reference.log_probs(pairs), separate.log_probs(pairs)
    metrics = actor.update(
        [replace(item, old_logprobs=own[i], ref_logprobs=off[i]) for i, item in enumerate(trajectories)]
    )
    metrics["off_minus_separate"] = max(float(np.abs(a - b).max()) for a, b in zip(off, other, strict=True))
    metrics["own_minus_off"] = max(float(np.abs(a - b).max()) for a, b in zip(own, off, strict=True))
    curve.append(metrics)
result |= {
    "curve": curve,
    "are_released": are_partitioned(),
    "still_trained": trained(),
    "adapters": adapter_weights(),
    "base": copies(False),
    "merged": copies(True),
    "digest": actor.weights_digest(),
}
actor.save(Path(folder))
ranks.barrier("saved")

errors = {}
if int(first) == 1:
    for name, changes in {"rank": {"rank": 2}, "none": {"rank": 0}, "layers": {"target_modules": ["v_proj"]}}.items():
        lora.rank, lora.target_modules = changes.get("rank", 3), changes.get("target_modules", "all-linear")
        other_actor = make_actor(config, for_actor, ranks, encoder)
        try:
            other_actor.load(Path(folder))
        except UserError as error:
            errors[name] = str(error)
    lora.target_modules = ["q_projj"]
    try:
        make_actor(config, for_actor, ranks, encoder)
    except UserError as error:
        errors["name"] = str(error)
torch.save({**result, "errors": errors}, f"{out}.{ranks.rank}")
end(ranks)
