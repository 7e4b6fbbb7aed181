"""What programs begin and end with that build their engines by hand: ranks, a small configuration, responses."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from fixtures.tiny_models import make_prompt

from mmr1_ds.cluster.exits import leave
from mmr1_ds.cluster.launch import launch_environment
from mmr1_ds.config import RunConfig
from mmr1_ds.config.derived import resolved_critic

if TYPE_CHECKING:  # other programs need no engine, whose imports take seconds
    import torch

    from mmr1_ds.cluster.ranks import Ranks
    from mmr1_ds.data.encoding import PromptEncoder
    from mmr1_ds.engine.actor import Actor
    from mmr1_ds.engine.critic import Critic
    from mmr1_ds.engine.reference import Reference
    from mmr1_ds.engine.zero_engine import Sizes
    from mmr1_ds.records import Prompt, Trajectory


def start_ranks(timeout_seconds: float = 120) -> "Ranks":
    """Be a rank of the launch. Collective."""
    from mmr1_ds.cluster.ranks import Ranks

    return Ranks(launch_environment(), timeout_seconds)


def end(ranks: "Ranks") -> NoReturn:
    """End well, together with all other ranks."""
    ranks.barrier("end")
    ranks.close()
    leave(0)


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
        "bf16": {"enabled": False},
    }
    adam = {"lr": actor.optim.lr, "betas": list(actor.optim.betas), "weight_decay": 0.01, "torch_adam": True}
    return {**shared, "optimizer": {"type": "AdamW", "params": adam}}, shared


def make_actor(
    config: RunConfig,
    deepspeed: dict[str, Any],
    ranks: "Ranks",
    encoder: "PromptEncoder",
    num_updates: int = 100,
    bad_batches: Path | None = None,
) -> "Actor":
    """The actor of the configuration."""
    from mmr1_ds.engine.actor import Actor
    from mmr1_ds.engine.bad_updates import BadUpdates

    bad_updates = BadUpdates("actor", config.trainer.max_bad_updates, ranks, bad_batches)
    temperature = config.worker.rollout.temperature
    actor = config.worker.actor
    return Actor(
        actor, config.algorithm, _sizes(config), temperature, deepspeed, ranks, encoder, num_updates, bad_updates
    )


def make_reference(
    config: RunConfig, deepspeed: dict[str, Any], ranks: "Ranks", encoder: "PromptEncoder"
) -> "Reference":
    """The reference of the configuration."""
    from mmr1_ds.engine.reference import Reference

    temperature = config.worker.rollout.temperature
    decay = config.worker.ref.ema_decay
    return Reference(config.worker.actor, decay, _sizes(config), temperature, deepspeed, ranks, encoder)


def make_critic(
    config: RunConfig,
    deepspeed: dict[str, Any],
    ranks: "Ranks",
    encoder: "PromptEncoder",
    num_updates: int = 100,
    bad_batches: Path | None = None,
) -> "Critic":
    """The critic of the configuration."""
    from mmr1_ds.engine.bad_updates import BadUpdates
    from mmr1_ds.engine.critic import Critic

    bad_updates = BadUpdates("critic", config.trainer.max_bad_updates, ranks, bad_batches)
    settings, offload = resolved_critic(config), config.worker.actor.offload_states
    return Critic(settings, _sizes(config), deepspeed, ranks, encoder, num_updates, bad_updates, offload)


def _sizes(config: RunConfig) -> "Sizes":
    from mmr1_ds.engine.zero_engine import Sizes

    return Sizes(config.worker.rollout.n, config.data.max_prompt_length, config.data.max_response_length)


def fixed_response(
    encoder: "PromptEncoder", random: np.random.Generator, index: int, with_videos: bool = False
) -> tuple["Prompt", np.ndarray]:
    """A prompt that its index decides, every third without an image, and response tokens that `random` decides."""
    token_ids = random.integers(0, 100, int(random.integers(1, 15))).astype(np.int32)
    return make_prompt(encoder, index, encoder.is_multimodal and index % 3 != 0, with_videos=with_videos), token_ids


def fixed_trajectory(
    encoder: "PromptEncoder", index: int, sample: int, spread: float = 0.1, with_videos: bool = False
) -> "Trajectory":
    """Response tokens, sampling log-probabilities and advantage that depend on the two numbers alone."""
    from mmr1_ds.records import Trajectory

    random = np.random.default_rng((index, sample))
    prompt, token_ids = fixed_response(encoder, random, index, with_videos)
    logprobs = random.normal(-3, spread, len(token_ids)).astype(np.float32)
    return Trajectory(prompt, token_ids, logprobs, np.full(len(token_ids), random.normal(), np.float32))


def kept_gradients(part: "Actor | Critic") -> list["torch.Tensor"]:
    """Have every optimiser step add its whole gradient, which the engine's step would forget, to the list returned."""
    import torch
    from deepspeed.utils import safe_get_full_grad

    gradients: list[torch.Tensor] = []
    step = part.engine.step

    def step_and_keep_gradient() -> None:
        if part.engine.is_gradient_accumulation_boundary():
            parts = [safe_get_full_grad(parameter).flatten() for parameter in part.module.parameters()]
            gradients.append(torch.cat(parts).float().cpu())
        step()

    part.engine.step = step_and_keep_gradient
    return gradients


def schedule_asynchronously() -> None:
    """As vLLM's configuration decides on a GPU; on the CPU the platform has overruled it by now."""
    from vllm.config import SchedulerConfig

    original = SchedulerConfig.get_scheduler_cls

    def asynchronous(self: SchedulerConfig) -> type:
        self.async_scheduling = True
        return original(self)

    SchedulerConfig.get_scheduler_cls = asynchronous  # type: ignore[method-assign]
