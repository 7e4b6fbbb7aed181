"""The gradient of one optimiser step on fixed responses, for every loss and every average, the weights left alone.

Usage: loss_modes.py MODEL OUT.npz MICRO_BATCH CHECKPOINT_FOLDER padded|packed|by-tokens|ulysses
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from settings import (
    deepspeed_configs,
    end,
    fixed_response,
    kept_gradients,
    make_actor,
    make_reference,
    small_config,
    start_ranks,
)

from mmr1_ds.algorithm.importance import ImportanceSampling
from mmr1_ds.algorithm.losses import PolicyLoss
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.records import Trajectory

model, out, micro_batch, folder, layout = sys.argv[1:]
PROMPTS, RESPONSES = 4, 2
LOSSES = (  # and averages: each of both at least once
    ("default", "token"), ("default", "seq"), ("default", "seq_sum"), ("gspo", "token"), ("gspo_token", "seq"),
    ("cispo", "seq_sum"), ("sapo", "token"), ("kl_cov", "seq"), ("gmpo", "seq"),
    ("dppo_tv", "token"), ("dppo_kl", "seq_sum"),
)  # fmt: skip

ranks = start_ranks()
config = small_config(model, PROMPTS, RESPONSES, int(micro_batch))
config.worker.actor.padding_free, config.worker.actor.dynamic_batching = layout != "padded", layout == "by-tokens"
config.worker.actor.ulysses_size = ranks.size if layout == "ulysses" else 1
config.worker.actor.kl_cov_ratio = 0.2
config.worker.actor.optim.lr = 0.0  # every mode starts from the same weights
config.algorithm.kl_type, config.algorithm.kl_target, config.algorithm.kl_horizon = "adaptive", 0.1, 100.0
encoder = PromptEncoder(config.worker.actor.model, config.data)
for_actor, for_reference = deepspeed_configs(config, ranks.size)
actor = make_actor(config, for_actor, ranks, encoder)
reference = make_reference(config, for_reference, ranks, encoder)


def fixed_trajectory(index: int, sample: int) -> tuple[Trajectory, np.ndarray]:
    """Tokens, advantages and log-probabilities of the rollout that follow from the two numbers; noise for the old."""
    random = np.random.default_rng((index, sample))
    prompt, token_ids = fixed_response(encoder, random, index)
    length = len(token_ids)
    noise = random.normal(0, 0.4, (2, length))
    advantages = np.full(length, random.normal(), np.float32)
    if sample:
        advantages = random.normal(size=length).astype(np.float32)
    return Trajectory(prompt, token_ids, noise[0], advantages), noise[1]


share = PROMPTS // ranks.size
own = [
    fixed_trajectory(index, sample)
    for index in range(ranks.rank * share, (ranks.rank + 1) * share)
    for sample in range(RESPONSES)
]
pairs = [(item.prompt, item.token_ids) for item, _ in own]
current = actor.log_probs(pairs)
old = [logprobs + noise.astype(np.float32) for logprobs, (_, noise) in zip(current, own, strict=True)]
ref = [logprobs - np.float32(0.3) for logprobs in reference.log_probs(pairs)]
trajectories = [  # what the rollout engine says is near what the trainer does
    replace(
        item,
        rollout_logprobs=(old[i] + item.rollout_logprobs).astype(np.float32),
        old_logprobs=old[i],
        ref_logprobs=ref[i],
    )
    for i, (item, _) in enumerate(own)
]

gradients = kept_gradients(actor)
results = {}
for kind, mode in LOSSES:
    level = "sequence" if mode == "seq" else "token"
    actor.policy_loss = PolicyLoss(kind, 0.2, 0.3, 3.0)
    actor.importance = ImportanceSampling(level, 2.0)
    config.worker.actor.loss_avg_mode = mode
    metrics = actor.update(trajectories)
    assert 0.2 <= metrics.pop("actor/kl_cov_fraction", 0.2) < 0.25
    results[f"{kind}|{mode}"] = gradients.pop().numpy()
    results[f"{kind}|{mode}|figures"] = np.array([metrics[name] for name in sorted(metrics)])
for mode in ("token", "seq", "seq_sum"):  # the second response to every other prompt was cut at its limit
    config.worker.actor.loss_avg_mode, actor.policy_loss = mode, PolicyLoss("default", 0.2, 0.3, 3.0)
    mask = {"token": "token", "seq": "geometric", "seq_sum": "k3"}[mode]
    actor.importance = ImportanceSampling("token", 2.0, mask, 0.8, 1.2)
    masked = [replace(item, trains=item.prompt.index % 2 == 0 or i % 2 == 0) for i, item in enumerate(trajectories)]
    metrics = actor.update(masked)
    assert metrics.pop("rollout/is_masked_fraction") < 1
    results[f"masked|{mode}"] = gradients.pop().numpy()
    results[f"masked|{mode}|figures"] = np.array([metrics[name] for name in sorted(metrics)])
actor.importance = ImportanceSampling("token", 2.0)
config.worker.actor.entropy_coef = 0.3
actor.model.get_output_embeddings()._entropy_gradient = True
metrics = actor.update(trajectories)
results["entropy|seq_sum"] = gradients.pop().numpy()
results["entropy|seq_sum|figures"] = np.array([metrics[name] for name in sorted(metrics)])
config.worker.actor.entropy_coef, config.worker.actor.top_entropy_quantile = 0.0, 0.3
entropies = actor.old_policy(pairs).entropies
chosen = [replace(item, old_entropies=entropies[i]) for i, item in enumerate(trajectories)]
metrics = actor.update(chosen)
assert 0.3 <= metrics.pop("actor/top_entropy_fraction") < 0.35
results["top entropy|seq_sum"] = gradients.pop().numpy()
results["top entropy|seq_sum|figures"] = np.array([metrics[name] for name in sorted(metrics)])
actor.save(Path(folder))
saved, actor.kl.coefficient = actor.kl.coefficient, 0.0
actor.load(Path(folder))
assert actor.kl.coefficient == saved != config.algorithm.kl_coef
if ranks.rank == 0:
    np.savez(out, names=np.array(sorted(metrics)), **results)
end(ranks)
