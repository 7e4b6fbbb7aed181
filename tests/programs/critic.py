"""The critic on fixed responses: values, gradients of an optimiser step, a checkpoint, and whether it learns.

Usage: critic.py MODEL OUT.npz MICRO_BATCH CHECKPOINT_FOLDER padded|packed|by-tokens
"""

import sys
from pathlib import Path

import numpy as np
import torch
from settings import deepspeed_configs, end, fixed_response, kept_gradients, make_critic, small_config, start_ranks

from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.engine import critic as module
from mmr1_ds.engine.model.value_model import ValueModel
from mmr1_ds.records import Pair, Trajectory

model, out, micro_batch, folder, layout = sys.argv[1:]
PROMPTS, RESPONSES = 4, 2

ranks = start_ranks()
config = small_config(model, PROMPTS, RESPONSES, int(micro_batch))
config.data.rollout_batch_size = PROMPTS
config.worker.actor.padding_free, config.worker.actor.dynamic_batching = layout != "padded", layout == "by-tokens"
config.worker.actor.offload_states = ranks.size > 1
settings = config.worker.critic
settings.micro_batch_size_per_device_for_experience = 3
settings.optim.lr = 0.0  # both averages start from the same weights
encoder = PromptEncoder(config.worker.actor.model, config.data)
load_value_model = module.load_value_model
starts_at_zero = []


def with_a_head(*arguments: object) -> ValueModel:
    """With a head of zeros the model under it would have no gradient to compare."""
    loaded = load_value_model(*arguments)
    starts_at_zero.append(not loaded.head.weight.any() and not loaded.head.bias.any())
    with torch.no_grad():
        size = loaded.head.in_features
        loaded.head.weight.copy_(torch.tensor(np.random.default_rng(5).normal(0, size**-0.5, (1, size))))
        loaded.head.bias.fill_(0.1)
    return loaded


module.load_value_model = with_a_head
critic = make_critic(config, deepspeed_configs(config, ranks.size)[0], ranks, encoder)
assert starts_at_zero == [True]


def fixed(index: int, sample: int) -> tuple[Pair, np.ndarray, np.ndarray]:
    """A pair, how far its old values lie from those now, and its returns: all from the two numbers."""
    random = np.random.default_rng((index, sample))
    prompt, token_ids = fixed_response(encoder, random, index)
    length = len(token_ids)
    drift, returns = random.normal(0, 0.6, length), random.normal(0.5, 1.0, length)
    return (prompt, token_ids), drift.astype(np.float32), returns.astype(np.float32)


share = PROMPTS // ranks.size
own = [
    fixed(index, sample) for index in range(ranks.rank * share, (ranks.rank + 1) * share) for sample in range(RESPONSES)
]
pairs, returns = [pair for pair, _, _ in own], [item for _, _, item in own]
with critic.offloaded():  # as while responses are sampled; on one rank the states stay
    assert len(critic.engine.optimizer.offloaded_states) == (3 if ranks.size > 1 else 0)
values = critic.values(pairs)
old = [value + drift for value, (_, drift, _) in zip(values, own, strict=True)]


def update(old: list[np.ndarray]) -> dict[str, float]:
    """An update from these values at the rollout."""
    nothing = [np.zeros(len(value), np.float32) for value in old]
    return critic.update(
        [Trajectory(*pairs[i], nothing[i], nothing[i], values=value, returns=returns[i]) for i, value in enumerate(old)]
    )


gradients = kept_gradients(critic)
results = {}
for mode in ("token", "seq"):
    critic.settings.loss_avg_mode = mode
    metrics = update(old)
    results[mode] = gradients.pop().numpy()
    results[f"{mode}|figures"] = np.array([metrics[name] for name in sorted(metrics)])
everyone = ranks.all_gather_objects((pairs, values, old, returns), "what the test computes from")
for name, column in (("values", 1), ("old", 2), ("returns", 3)):
    results[name] = np.concatenate([item for part in everyone for item in part[column]])
responses = [token_ids for part in everyone for _, token_ids in part[0]]
results["tokens"], results["lengths"] = np.concatenate(responses), np.array([len(item) for item in responses])

critic.settings.optim.lr, critic.settings.loss_avg_mode = 3e-5, "token"
critic.save(Path(folder))
num_updates = 12 if layout == "by-tokens" else 3
losses = [update(critic.values(pairs))["critic/vf_loss"] for _ in range(num_updates)]
learnt = critic.values(pairs)
assert critic.num_updates_done == 2 + num_updates
critic.load(Path(folder))
assert critic.num_updates_done == 2
for at_save, again, later in zip(values, critic.values(pairs), learnt, strict=True):
    np.testing.assert_allclose(again, at_save, atol=1e-6, rtol=0)
    assert np.abs(later - at_save).max() > 1e-3
again = [update(critic.values(pairs))["critic/vf_loss"] for _ in range(2)]
np.testing.assert_allclose(again, losses[:2], rtol=1e-6)  # the optimiser's moments too are those of the save
results["losses"] = np.array(losses)
if ranks.rank == 0:
    np.savez(out, names=np.array(sorted(metrics)), **results)
end(ranks)
