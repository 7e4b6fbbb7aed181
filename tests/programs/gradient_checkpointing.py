"""The gradients with and without checkpointing, and one optimiser step, of policies partly frozen or with adapters.

Usage: gradient_checkpointing.py MODEL OUT. Each rank writes OUT.rank.
"""

import sys
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.utils import safe_get_full_grad
from fixtures.tiny_models import make_prompt
from settings import deepspeed_configs, end, small_config, start_ranks

from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.engine.model.batching import ModelBatch, collate
from mmr1_ds.engine.model.lora import adapters
from mmr1_ds.engine.model.policy import load_policy
from mmr1_ds.engine.weights.gathering import whole_parameters

model, out = sys.argv[1:]
ranks = start_ranks()
config = small_config(model, 2, ranks.size, 1)
settings = config.worker.actor.model
encoder = PromptEncoder(settings, config.data)
deepspeed.init_distributed(auto_mpi_discovery=False)
for_actor, _ = deepspeed_configs(config, ranks.size)


def batch(index: int) -> ModelBatch:
    random = np.random.default_rng(index)
    prompt = make_prompt(encoder, index, with_image=encoder.is_multimodal and index % 2 == 0)
    return collate([(prompt, random.integers(10, 60, 9).astype(np.int32))], encoder, ranks.device)


def two_micro_batches(lora_rank: int, freeze_tower: bool, checkpoint: bool) -> dict[str, Any]:
    settings.lora.rank, settings.freeze_vision_tower = lora_rank, freeze_tower
    settings.enable_gradient_checkpointing = checkpoint
    policy = load_policy(
        config.worker.actor, for_actor, encoder.forbidden_token_ids, 0.7, torch.float32, trainable=True, ranks=ranks
    )
    for number, adapter in enumerate(adapters(policy.model).values()):  # B = 0 would leave A without a gradient
        torch.nn.init.normal_(adapter.b, std=0.1, generator=torch.Generator().manual_seed(number))
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=policy, config=for_actor, model_parameters=trained)
    calls: dict[str, int] = {}

    def count(name: str) -> None:
        calls[name] = calls.get(name, 0) + 1

    for part in ("layers.0", "blocks.0"):  # of the language model, of the vision tower
        (layer,) = (module for name, module in policy.named_modules() if name.endswith(part))
        # Before, not after: computing again stops as soon as the backward has what it needs.
        layer.register_forward_pre_hook(lambda *_, part=part: count(part))
    engine.train()
    before = {name: weight.clone() for name, weight in whole_parameters(policy.model, with_adapters=False)}
    for k in range(2):
        engine.set_gradient_accumulation_boundary(k == 1)
        logprobs, _ = engine(batch(10 * ranks.rank + k))
        engine.backward((logprobs * torch.linspace(-1, 2, len(logprobs))).sum(), scale_wrt_gas=False)
    named = policy.model.named_parameters()
    gradients = {name: safe_get_full_grad(parameter) for name, parameter in named if parameter.requires_grad}
    engine.step()
    after = {name: weight.clone() for name, weight in whole_parameters(policy.model, with_adapters=False)}
    return {
        "gradients": gradients,
        "calls": calls,
        "unchanged": [name for name in before if torch.equal(before[name], after[name])],
        "changed": [name for name in before if not torch.equal(before[name], after[name])],
        "are_released": all(parameter.numel() == 0 for parameter in policy.parameters()),
    }


results = {
    f"{'lora' if rank else 'whole'}{', frozen tower' if frozen else ''}": [
        two_micro_batches(rank, frozen, checkpoint) for checkpoint in (False, True)
    ]
    for rank in (0, 3)
    for frozen in (False, True)
}
torch.save(results, f"{out}.{ranks.rank}")
end(ranks)
