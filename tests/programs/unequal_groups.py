"""The gradients of two optimiser steps on groups of different sizes, the weights left alone.

Usage: unequal_groups.py MODEL OUT.npz padded|packed|by-tokens
"""

import sys

import numpy as np
import torch
from fixtures.groups import SIZES, fixed_group
from settings import deepspeed_configs, end, kept_gradients, make_actor, small_config, start_ranks

from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.records import Trajectory

model, out, layout = sys.argv[1:]
ranks = start_ranks()
config = small_config(model, prompts=2, responses=sum(SIZES) // len(SIZES), micro_batch=2)
actor_config = config.worker.actor
actor_config.padding_free, actor_config.dynamic_batching = layout != "padded", layout == "by-tokens"
actor_config.micro_batch_size_per_device_for_experience = 2
config.data.max_prompt_length, config.data.max_response_length = 8, 6  # a budget that few sequences fill
actor_config.optim.lr = 0.0
config.algorithm.kl_type, config.algorithm.kl_target, config.algorithm.kl_horizon = "adaptive", 0.1, 1000.0
encoder = PromptEncoder(actor_config.model, config.data)
actor = make_actor(config, deepspeed_configs(config, ranks.size)[0], ranks, encoder)

own = [fixed_group(encoder, index) for index in range(len(SIZES)) if index % ranks.size == ranks.rank]
pairs = [(prompt, tokens) for prompt, responses, _ in own for tokens in responses]
counted = len(actor._micro_batches(pairs, 2, actor._most_of_all_ranks))
found = actor.log_probs(pairs)
advantages = [advantage for _, _, values in own for advantage in values]
trajectories = [
    Trajectory(prompt, tokens, logprobs, np.full(len(tokens), advantage, np.float32), ref_logprobs=logprobs - 0.1)
    for (prompt, tokens), logprobs, advantage in zip(pairs, found, advantages, strict=True)
]

gradients = kept_gradients(actor)
sizes = [len(responses) for _, responses, _ in own]
results, figures = {}, []
actor.kl.coefficient = 0.0  # as the brute force has none; its target is far off
for mode in ("token", "seq"):
    actor_config.loss_avg_mode = mode
    metrics = actor.update(trajectories, sizes)
    figures += [metrics["actor/pg_loss"], metrics["actor/entropy_loss"], metrics["actor/ref_kl"]]
    results[mode] = torch.stack(gradients).numpy()
    gradients.clear()
actor.kl.coefficient = 1.0
actor.update(trajectories, sizes)
shared = ranks.all_gather_objects(([len(tokens) for _, tokens in pairs], found, actor.kl.coefficient), "results")
assert actor.needs_old_log_probs(len(sizes)) and not actor.needs_old_log_probs(1 if ranks.size == 2 else 2)
if ranks.rank == 0:
    by_group = {}
    for rank, (_, logprobs, _) in enumerate(shared):
        at = 0
        for index in range(rank, len(SIZES), ranks.size):
            by_group[index] = np.concatenate(logprobs[at : at + SIZES[index]])
            at += SIZES[index]
    coefficients = np.array([coefficient for _, _, coefficient in shared])
    log_probs = np.concatenate([by_group[index] for index in range(len(SIZES))])
    np.savez(out, log_probs=log_probs, coefficients=coefficients, figures=figures, counted=counted, **results)
end(ranks)
