"""Change a server's weights in the middle of its responses; write how far each token is from the policy it names.

Usage: server_swap.py MODEL OUT.json
"""

import json
import sys
from pathlib import Path

import numpy as np
from fixtures.tiny_models import make_prompt
from settings import deepspeed_configs, end, make_actor, make_reference, small_config, start_ranks

from mmr1_ds.cluster.preemption import Preemption
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.records import RolloutRequest, SamplingSettings, Trajectory
from mmr1_ds.rollout.base import generate
from mmr1_ds.rollout.servers.engine import ServerRollout

model, out = sys.argv[1:]
PROMPTS, RESPONSES, LONGEST = 3, 2, 400

ranks = start_ranks()
config = small_config(model, PROMPTS, RESPONSES, micro_batch=2)
config.data.max_response_length = LONGEST
config.worker.actor.optim.lr = 1e-2
config.worker.rollout.engine, config.worker.rollout.weight_swap = "server", "in_flight"
encoder = PromptEncoder(config.worker.actor.model, config.data)
for_actor, for_reference = deepspeed_configs(config, ranks.size)
rollout = ServerRollout(
    config.worker.rollout, config.worker.actor.model, config.data, ranks, encoder,
    first_device=config.trainer.n_gpus_per_node, most_images=2,
    log_folder=Path(out).with_suffix(".servers"), preemption=Preemption(60.0, None),
)  # fmt: skip
actor = make_actor(config, for_actor, ranks, encoder)
before = make_reference(config, for_reference, ranks, encoder)
rollout.sync_weights(actor)
settings = SamplingSettings(1.0, 1.0, -1, 8)
requests = [RolloutRequest(make_prompt(encoder, i, i > 0, 2), RESPONSES, 50 * i) for i in range(PROMPTS)]
groups = generate(rollout, requests, settings)  # the first compiles
trajectories = [
    Trajectory(
        group.prompt,
        np.asarray(response.token_ids, np.int32),
        np.asarray(response.logprobs, np.float32),
        np.full(len(response.token_ids), 1 - 2 * (k % 2), np.float32),
    )
    for group in groups
    for k, response in enumerate(group.responses)
]
actor.update(trajectories)
submitted = rollout.submit(requests, SamplingSettings(1.0, 1.0, -1, LONGEST))
rollout.collect(rollout.submit(requests[:1], SamplingSettings(1.0, 1.0, -1, 5)))  # the others have begun by then
rollout.sync_weights(actor)
groups = [group for group in rollout.collect(submitted) if group is not None]
pairs = [(group.prompt, np.asarray(response.token_ids, np.int32)) for group in groups for response in group.responses]
own = {0: before.log_probs(pairs), 1: actor.log_probs(pairs)}
rows = []
for number, response in enumerate(response for group in groups for response in group.responses):
    sampled, start = np.asarray(response.logprobs, np.float32), 0
    row = {"length": len(response.token_ids), "spans": response.policy_versions, "far": {}, "other": {}}
    for version, count in response.policy_versions:
        part = slice(start, start + count)
        row["far"][version] = float(np.abs(sampled[part] - own[version][number][part]).max())
        row["other"][version] = float(np.abs(sampled[part] - own[1 - version][number][part]).max())
        start += count
    rows.append(row)
with open(out, "w", encoding="utf-8") as file:
    json.dump({"rows": rows, "oldest": [group.policy_version for group in groups]}, file)
rollout.close()
end(ranks)
