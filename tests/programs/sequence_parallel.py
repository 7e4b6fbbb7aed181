"""Log-probabilities by all ranks together, and by each rank alone. Usage: sequence_parallel.py MODEL OUT_FOLDER"""

import sys
from pathlib import Path

import numpy as np
from fixtures.tiny_models import make_prompt
from settings import deepspeed_configs, end, make_reference, small_config, start_ranks

from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.engine.model.router_replay import RouterReplay

model, folder = sys.argv[1:]

ranks = start_ranks()
config = small_config(model, 2 * ranks.size, 3, 2)
encoder = PromptEncoder(config.worker.actor.model, config.data)
_, settings = deepspeed_configs(config, ranks.size)
config.worker.actor.padding_free = False
alone = make_reference(config, settings, ranks, encoder)
config.worker.actor.padding_free, config.worker.actor.ulysses_size = True, ranks.size
together = make_reference(config, settings, ranks, encoder)

pairs = []
for i in range(5):
    with_image = encoder.is_multimodal and i % 2 == 0
    prompt = make_prompt(encoder, 7 * ranks.rank + i, with_image, most_images=3, with_videos=encoder.takes_videos)
    pairs.append((prompt, np.arange(20, 20 + 5 * (i + ranks.rank) % 13, dtype=np.int32)))
cuts: list[int] = []
language_model = getattr(together.model.base_model, "language_model", together.model.base_model)
language_model.norm.register_forward_hook(lambda _, args, states: cuts.append(states.shape[1]))
found = {f"together {i}": values for i, values in enumerate(together.log_probs(pairs))}
found |= {f"alone {i}": values for i, values in enumerate(alone.log_probs(pairs))}
cuts_of_one_pass = np.array(cuts)
if ranks.size > 1 and hasattr(language_model.layers[0].mlp, "experts"):  # sent to experts of any choice
    random = np.random.default_rng(ranks.rank)
    experts = []
    for prompt, response in pairs:
        length = len(encoder.expand(prompt).input_ids) + len(response) - 1
        experts.append(np.array([[random.permutation(5)[:2] for _ in range(3)] for _ in range(length)], dtype=np.uint8))
    for engine in (together, alone):
        engine.module.replay = RouterReplay(engine.model)
    for name, engine in {"together": together, "alone": alone}.items():
        logprobs, _, differing = engine._evaluate(pairs, 3, experts)
        found |= {f"{name} {5 + i}": values for i, values in enumerate(logprobs)}
        found |= {f"{name} {10 + i}": values for i, values in enumerate(differing)}
lengths = [len(encoder.expand(prompt).input_ids) + len(response) for prompt, response in pairs]
np.savez(Path(folder) / f"{ranks.rank}.npz", cuts=cuts_of_one_pass, lengths=np.array(lengths), **found)
end(ranks)
