"""A reference that follows the actor, saved and read on any number of ranks.

Usage: moving_reference.py MODEL FOLDER OUT write|read. Rank 0 writes OUT: its weights, and what they must be.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from fixtures.tiny_models import make_prompt
from settings import deepspeed_configs, end, make_actor, make_reference, small_config, start_ranks

from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.engine.weights.gathering import whole_parameters
from mmr1_ds.records import Trajectory

DECAY = 0.75
model, folder, out, mode = sys.argv[1:]
ranks = start_ranks()
config = small_config(model, prompts=2, responses=1, micro_batch=1)
config.worker.actor.optim.lr, config.worker.ref.ema_decay = 1e-2, DECAY
encoder = PromptEncoder(config.worker.actor.model, config.data)
for_actor, for_reference = deepspeed_configs(config, ranks.size)
for section in (for_actor, for_reference):  # some parameters stay whole between forwards, most do not
    section["zero_optimization"]["stage3_param_persistence_threshold"] = 100
reference = make_reference(config, for_reference, ranks, encoder)
tokens = np.arange(9, dtype=np.int32)
pairs = [(make_prompt(encoder, index, False), tokens) for index in range(2 // ranks.size)]
before = reference.log_probs(pairs)


def whole(engine: object) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in whole_parameters(engine.model)}


found = {}
if mode == "write":
    actor = make_actor(config, for_actor, ranks, encoder)
    expected = whole(reference)
    for _ in range(3):
        ones = np.ones(9, np.float32)
        actor.update([Trajectory(prompt, tokens, -3 * ones, ones) for prompt, _ in pairs])
        reference.follow(actor)
        expected = {name: DECAY * expected[name] + (1 - DECAY) * weight for name, weight in whole(actor).items()}
        assert not np.array_equal(reference.log_probs(pairs)[0], before[0])
    Path(folder).mkdir(exist_ok=True)
    reference.save(Path(folder))
    found["expected"] = expected
else:
    reference.load(Path(folder))
    assert not np.array_equal(reference.log_probs(pairs)[0], before[0])
found |= {"weights": whole(reference), "log_probs": torch.from_numpy(reference.log_probs(pairs)[0])}
if ranks.rank == 0:
    torch.save(found, out)
end(ranks)
