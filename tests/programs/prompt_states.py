"""What an actor makes of prompts, on any number of ranks, and what the plain model makes of each alone.

Usage: prompt_states.py MODEL OUT packed|padded. Rank 0 writes OUT: states by the actor, (K, H), and the plain ones.
"""

import sys

import numpy as np
import torch
from fixtures.tiny_models import make_prompt
from settings import deepspeed_configs, end, make_actor, small_config, start_ranks
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from mmr1_ds.data.encoding import PromptEncoder

NUM_PROMPTS = 10
model, out, layout = sys.argv[1:]
ranks = start_ranks()
config = small_config(model, prompts=2, responses=1, micro_batch=1)
config.worker.actor.padding_free = layout == "packed"
config.worker.actor.micro_batch_size_per_device_for_experience = 2  # several forwards a rank
encoder = PromptEncoder(config.worker.actor.model, config.data)
actor = make_actor(config, deepspeed_configs(config, ranks.size)[0], ranks, encoder)
prompts = [make_prompt(encoder, 10**index, encoder.is_multimodal and index % 3 > 0) for index in range(NUM_PROMPTS)]
own = actor.prompt_states(prompts[ranks.rank :: ranks.size])
states = np.stack(ranks.all_gather_array(own, "gather"), axis=1).reshape(NUM_PROMPTS, -1)
logprobs = actor.log_probs([(prompts[0], np.arange(5, dtype=np.int32))])[0]
assert logprobs.shape == (5,)  # as ever

if ranks.rank == 0:
    family = AutoModelForImageTextToText if encoder.is_multimodal else AutoModelForCausalLM
    plain = family.from_pretrained(model, dtype=torch.float32).eval().model
    expected = []
    for prompt in prompts:
        inputs = encoder.expand(prompt)
        more = {} if inputs.positions is None else {"position_ids": inputs.positions[:, None]}
        if inputs.pixel_values is not None:
            more |= {"pixel_values": inputs.pixel_values, "image_grid_thw": inputs.image_grid_thw}
        with torch.no_grad():
            expected.append(plain(input_ids=inputs.input_ids[None], **more).last_hidden_state[0, -1].numpy())
    np.savez(out, found=states, expected=np.stack(expected))
end(ranks)
