"""Load a model as on a GPU, in bf16, and a model that lacks a tensor. Usage: model_loading.py MODEL DAMAGED OUT.json"""

import json
import sys
from pathlib import Path

import deepspeed
import torch
from settings import deepspeed_configs, end, small_config, start_ranks

from mmr1_ds.engine.model.policy import exact_types, load_policy
from mmr1_ds.errors import UserError

model, damaged, out = sys.argv[1:]
ranks = start_ranks()
config = small_config(model, 4, 3, 3)
settings = exact_types({**deepspeed_configs(config, 1)[0], "bf16": {"enabled": True}})
policy = load_policy(config.worker.actor, settings, (), 1.0, torch.bfloat16, trainable=True, ranks=ranks)
deepspeed.initialize(model=policy, config=settings, model_parameters=list(policy.parameters()))
frequencies = {name: tensor for name, tensor in policy.named_buffers() if name.endswith("inv_freq")}
config.worker.actor.model.model_path = damaged
error = ""
try:
    load_policy(config.worker.actor, settings, (), 1.0, torch.bfloat16, trainable=True, ranks=ranks)
except UserError as found:
    error = str(found)
result = {
    "parameter_types": sorted({str(parameter.dtype) for parameter in policy.parameters()}),
    "frequency_types": {name: str(tensor.dtype) for name, tensor in frequencies.items()},
    "inv_freq": frequencies["model.model.language_model.rotary_emb.inv_freq"].tolist(),
    "error": error,
}
Path(out).write_text(json.dumps(result))
end(ranks)
