"""Update on fixed responses and write the loss curve, the drawn indices and the first parameters' sums.

Usage: loss_curve.py MODEL OUT.json MICRO_BATCH CHECKPOINT_FOLDER|-

With a folder the actor is saved there before the last step, and another one, which loads it, takes that step again.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from settings import deepspeed_configs, end, fixed_trajectory, make_actor, make_reference, small_config, start_ranks

from mmr1_ds.config import DataConfig
from mmr1_ds.curriculum.coordinator import Coordinator
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.engine.actor import Actor
from mmr1_ds.loop.sharing import batch_slots
from mmr1_ds.records import Trajectory

model, out, micro_batch, folder = sys.argv[1:]
BATCH, MINI_BATCH, RESPONSES, STEPS = 8, 4, 3, 3

ranks = start_ranks()
config = small_config(model, MINI_BATCH, RESPONSES, int(micro_batch))
config.worker.actor.offload_states = ranks.size > 1
encoder = PromptEncoder(config.worker.actor.model, config.data)
for_actor, for_reference = deepspeed_configs(config, ranks.size)
actor = make_actor(config, for_actor, ranks, encoder, num_updates=STEPS * BATCH // MINI_BATCH)
reference = make_reference(config, for_reference, ranks, encoder)
data = DataConfig(sampling_strategy="curriculum", rollout_batch_size=BATCH, seed=7)
coordinator = Coordinator(data, [str(i) for i in range(29)], [""] * 29, "fingerprint", 8, STEPS, ranks)


def fixed(index: int, sample: int) -> Trajectory:
    return fixed_trajectory(encoder, index, sample, spread=1.0, with_videos=encoder.takes_videos)


def update(actor: Actor, indices: np.ndarray) -> dict[str, float]:
    """One step on the responses of the prompts drawn. Returns: its metrics."""
    slots = batch_slots(BATCH, MINI_BATCH, ranks.rank, ranks.size)
    trajectories = [fixed(int(i), k) for i in indices[slots] for k in range(RESPONSES)]
    with actor.offloaded():  # as while responses are sampled; on one rank the states stay
        assert len(actor.engine.optimizer.offloaded_states) == (3 if ranks.size > 1 else 0)
    pairs = [item.pair for item in trajectories]
    old, ref = actor.log_probs(pairs), reference.log_probs(pairs)
    return actor.update(
        [replace(item, old_logprobs=old[i], ref_logprobs=ref[i]) for i, item in enumerate(trajectories)]
    )


curve, drawn = [], []
for step in range(1, STEPS + 1):
    indices = coordinator.next_batch(step)
    drawn.append(indices.tolist())
    if folder != "-" and step == STEPS:
        Path(folder).mkdir(exist_ok=True, parents=True)
        actor.save(Path(folder))
    curve.append(update(actor, indices))
weights = {name: float(tensor.double().sum()) for name, tensor in actor.weights()}
result = {"curve": curve, "drawn": drawn, "weights": weights, "digest": actor.weights_digest()}
if folder != "-":
    resumed = make_actor(config, for_actor, ranks, encoder, num_updates=STEPS * BATCH // MINI_BATCH)
    resumed.load(Path(folder))
    result["before"] = resumed.weights_digest()
    result["again"] = update(resumed, indices)
    result["digest_again"] = resumed.weights_digest()
if ranks.rank == 0:
    Path(out).write_text(json.dumps(result), encoding="utf-8")
end(ranks)
