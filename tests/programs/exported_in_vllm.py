"""What vLLM answers greedily to fixed prompts, with the weights of a model folder as they lie there.

Usage: exported_in_vllm.py FOLDER OUT
"""

import os
import sys

import torch
from fixtures.delta_net import compute_delta_nets_in_float32
from fixtures.tiny_models import make_prompt
from settings import small_config

from mmr1_ds.cluster.exits import leave
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.rollout.options import engine_environment, engine_options, image_bounds

folder, out = sys.argv[1:]
config = small_config(folder, prompts=2, responses=2, micro_batch=1)
settings, model = config.worker.rollout, config.worker.actor.model
encoder = PromptEncoder(model, config.data)
for variables in engine_environment(settings, on_gpu=False):
    os.environ.update(variables)
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    del os.environ[name]
from vllm import LLM, SamplingParams  # noqa: E402  reads the environment

compute_delta_nets_in_float32()
llm = LLM(
    **engine_options(settings, model, config.data, on_gpu=False, images=image_bounds(encoder, 1))
)
bias = dict.fromkeys(encoder.forbidden_token_ids, -100.0)
parameters = SamplingParams(
    temperature=0.0, max_tokens=8, logprobs=0, logit_bias=bias, stop_token_ids=list(encoder.eos_token_ids)
)
prompts = [make_prompt(encoder, index, with_image=encoder.is_multimodal and index % 3 != 0) for index in range(4)]
inputs = [
    {"prompt_token_ids": list(prompt.token_ids)}
    | ({"multi_modal_data": {"image": list(prompt.images)}} if prompt.images else {})
    for prompt in prompts
]
answers = [output.outputs[0] for output in llm.generate(inputs, parameters, use_tqdm=False)]
tokens = [tuple(answer.token_ids) for answer in answers]
logprobs = [
    torch.tensor([entry[token].logprob for token, entry in zip(answer.token_ids, answer.logprobs, strict=True)])
    for answer in answers
]
torch.save({"tokens": tokens, "logprobs": logprobs}, out)
llm.llm_engine.engine_core.shutdown()
leave(0)
