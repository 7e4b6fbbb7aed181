"""A small run configuration for programs that build the engine by hand."""

from pathlib import Path
from typing import Any

from mmr1_ds.config import RunConfig


def small_config(model: str | Path, prompts: int, responses: int, micro_batch: int) -> RunConfig:
    """`prompts` prompts an optimiser step, `responses` responses each."""
    config = RunConfig()
    config.data.min_pixels, config.data.max_pixels = 28 * 28, 112 * 112
    config.data.max_prompt_length, config.data.max_response_length = 96, 24
    config.algorithm.kl_coef = 0.05
    actor = config.worker.actor
    actor.model.model_path = str(model)
    actor.global_batch_size = prompts
    actor.micro_batch_size_per_device_for_update = micro_batch
    actor.optim.lr, actor.optim.betas = 1e-3, (0.9, 0.95)
    config.worker.rollout.n = responses
    config.worker.rollout.kv_cache_gb = 1
    config.worker.rollout.enforce_eager = True
    return config


def deepspeed_configs(config: RunConfig, num_ranks: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the actor and of the reference. Nothing stays unpartitioned, however small."""
    actor = config.worker.actor
    total = actor.global_batch_size * config.worker.rollout.n
    shared = {
        "train_batch_size": total,
        "train_micro_batch_size_per_gpu": actor.micro_batch_size_per_device_for_update,
        "gradient_accumulation_steps": total // actor.micro_batch_size_per_device_for_update // num_ranks,
        "gradient_clipping": actor.max_grad_norm,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    adam = {"lr": actor.optim.lr, "betas": list(actor.optim.betas), "weight_decay": 0.01, "torch_adam": True}
    return {**shared, "optimizer": {"type": "AdamW", "params": adam}}, shared
