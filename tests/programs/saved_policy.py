"""Train a policy for a step, save it, and write what it then is: its weights, and its greedy responses.

Usage: saved_policy.py MODEL RUN_DIR LORA_RANK. Leaves RUN_DIR as a run does; rank 0 adds policy.pt and the responses'
log-probabilities by the actor.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from fixtures.tiny_models import make_prompt
from settings import deepspeed_configs, end, make_actor, small_config, start_ranks

from mmr1_ds.config.loading import dump_config
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.loop.checkpoint import Checkpoints
from mmr1_ds.records import RolloutRequest, SamplingSettings, Trajectory
from mmr1_ds.rollout.base import generate
from mmr1_ds.rollout.hf.engine import TransformersRollout

model, run_dir, lora_rank = sys.argv[1:]
ranks = start_ranks()
config = small_config(model, prompts=2, responses=2, micro_batch=1)
config.trainer.run_dir = run_dir
config.worker.actor.optim.lr = 1e-2
config.worker.actor.model.lora.rank, config.worker.actor.model.lora.alpha = int(lora_rank), 6.0
encoder = PromptEncoder(config.worker.actor.model, config.data)
actor = make_actor(config, deepspeed_configs(config, ranks.size)[0], ranks, encoder)


def prompt(index: int) -> object:
    return make_prompt(encoder, index, with_image=encoder.is_multimodal and index % 3 != 0)


for step in range(2):
    random = np.random.default_rng((step, ranks.rank))
    tokens = [random.integers(0, 100, 7).astype(np.int32) for _ in range(4 // ranks.size)]
    ones = np.ones(7, np.float32)
    actor.update([Trajectory(prompt(i), part, -3 * ones, (1 - 2 * (i % 2)) * ones) for i, part in enumerate(tokens)])
checkpoints = Checkpoints(Path(run_dir) / "checkpoints", -1, ranks)
assert checkpoints.save(2, lambda folder: actor.save(folder / "actor"))
weights = {name: weight.clone() for name, weight in actor.weights(as_held=True)}
requests = [RolloutRequest(prompt(index), 1, 0) for index in range(4)]
groups = generate(TransformersRollout(actor, ranks, encoder, 8), requests, SamplingSettings(0.0, 1.0, -1, 8))
pairs = [(group.prompt, np.asarray(group.responses[0].token_ids, np.int32)) for group in groups]
logprobs = actor.log_probs(pairs)
if ranks.rank == 0:
    (Path(run_dir) / "config.yaml").write_text(dump_config(config))
    answers = {"tokens": [tuple(pair[1].tolist()) for pair in pairs], "logprobs": list(map(torch.tensor, logprobs))}
    torch.save({"weights": weights, **answers}, f"{run_dir}/policy.pt")
end(ranks)
