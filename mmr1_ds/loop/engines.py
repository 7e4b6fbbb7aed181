"""The models of a run: what samples, what learns, what the policy is held to, and how they are loaded."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from mmr1_ds.cluster.preemption import Preemption
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.config import RunConfig
from mmr1_ds.config.derived import resolved_critic, returns_experts, run_directory
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.engine.actor import Actor
from mmr1_ds.engine.bad_updates import BadUpdates
from mmr1_ds.engine.critic import Critic
from mmr1_ds.engine.model.loading import load_config
from mmr1_ds.engine.model.lora import adapted_layers, layers_to_adapt
from mmr1_ds.engine.reference import AdapterlessReference, Reference
from mmr1_ds.engine.zero_engine import Sizes
from mmr1_ds.preflight.checks import check_lora_sync
from mmr1_ds.preflight.deepspeed import DeepspeedConfigs
from mmr1_ds.preflight.families import check_family
from mmr1_ds.rollout.base import RolloutEngine
from mmr1_ds.rollout.colocated.engine import VllmRollout
from mmr1_ds.rollout.hf.engine import TransformersRollout

logger = logging.getLogger(__name__)

LOADED_PARTS = 3  # for their bar: actor (and critic), reference, rollout engine


@dataclass
class Engines:
    """The models of a run: what samples, what learns, what the policy is held to."""

    rollout: RolloutEngine
    actor: Actor
    reference: Reference | AdapterlessReference | None = None
    critic: Critic | None = None


def load_engines(
    config: RunConfig,
    deepspeed: DeepspeedConfigs,
    num_steps: int,
    most_images: int,
    most_videos: int,
    ranks: Ranks,
    encoder: PromptEncoder,
    preemption: Preemption,
    stack: ExitStack,
    advance: Callable[[int], None],
    before_others: Callable[[Actor], None],
) -> Engines:
    """Load the models. The rollout engine is closed with `stack`; `advance` is called `LOADED_PARTS` times in all.

    Args: before_others: called with the actor while nothing else has taken memory of the device.
    """
    check_family(config, load_config(config.worker.actor.model).model_type)  # a hub model's is here now
    check_lora_sync(config)
    rollout: RolloutEngine | None = None
    alone = config.worker.rollout.lora_sync == "adapters"
    if config.worker.rollout.engine == "server":  # the servers load while the models here do
        from mmr1_ds.rollout.servers.engine import ServerRollout  # its HTTP client comes with vLLM

        rollout = ServerRollout(
            config.worker.rollout,
            config.worker.actor.model,
            config.data,
            ranks,
            encoder,
            first_device=config.trainer.n_gpus_per_node,
            most_images=most_images,
            log_folder=run_directory(config) / "servers",
            preemption=preemption,
            adapted=layers_to_adapt(config.worker.actor.model) if alone else (),
        )
        stack.callback(rollout.close)
    # Adapters are put on what trains, and so need an optimiser.
    learns = not config.trainer.val_only or config.worker.actor.model.lora.rank > 0
    actor = _actor(config, deepspeed.actor if learns else deepspeed.reference, num_steps, ranks, encoder)
    advance(1)
    before_others(actor)
    critic = None
    if deepspeed.critic is not None:
        critic = _critic(config, deepspeed.critic, num_steps, ranks, encoder)
    reference = _reference(config, deepspeed.reference, actor, ranks, encoder)
    advance(1)
    if rollout is None:
        rollout = _rollout(config, actor, ranks, encoder, most_images, most_videos, preemption)
        stack.callback(rollout.close)
    advance(1)
    return Engines(rollout, actor, reference, critic)


def _actor(
    config: RunConfig, deepspeed: Mapping[str, Any], num_steps: int, ranks: Ranks, encoder: PromptEncoder
) -> Actor:
    updates = (num_steps - config.trainer.critic_warmup) * config.worker.actor.ppo_epochs
    updates *= config.data.rollout_batch_size // config.worker.actor.global_batch_size
    return Actor(
        config.worker.actor,
        config.algorithm,
        _sizes(config),
        config.worker.rollout.temperature,
        deepspeed,
        ranks,
        encoder,
        updates,
        _bad_updates("actor", config, ranks),
    )


def _critic(
    config: RunConfig, deepspeed: Mapping[str, Any], num_steps: int, ranks: Ranks, encoder: PromptEncoder
) -> Critic:
    settings = resolved_critic(config)
    assert settings.global_batch_size is not None  # resolved
    updates = num_steps * (config.data.rollout_batch_size // settings.global_batch_size * settings.ppo_epochs)
    bad_updates = _bad_updates("critic", config, ranks)
    offload = config.worker.actor.offload_states
    return Critic(settings, _sizes(config), deepspeed, ranks, encoder, updates, bad_updates, offload)


def _reference(
    config: RunConfig, reference_config: Mapping[str, Any], actor: Actor, ranks: Ranks, encoder: PromptEncoder
) -> Reference | AdapterlessReference | None:
    if config.algorithm.disable_kl or config.trainer.val_only:
        return None
    if config.worker.actor.model.lora.rank > 0:
        return AdapterlessReference(actor)
    temperature = config.worker.rollout.temperature
    decay = config.worker.ref.ema_decay
    return Reference(config.worker.actor, decay, _sizes(config), temperature, reference_config, ranks, encoder)


def _rollout(
    config: RunConfig,
    actor: Actor,
    ranks: Ranks,
    encoder: PromptEncoder,
    most_images: int,
    most_videos: int,
    preemption: Preemption,
) -> RolloutEngine:
    settings, model = config.worker.rollout, config.worker.actor.model
    has_vllm = importlib.util.find_spec("vllm") is not None
    if settings.engine == "auto" and not has_vllm:
        logger.warning("vllm is not installed: responses are sampled by transformers, which is far slower")
    if settings.engine == "hf" or not has_vllm:
        return TransformersRollout(actor, ranks, encoder, settings.max_num_seqs)
    adapted = adapted_layers(actor.model) if settings.lora_sync == "adapters" else ()
    return VllmRollout(
        settings, model, config.data, ranks, encoder, most_images, preemption,
        most_videos=most_videos, adapted=adapted, returns_experts=returns_experts(config),
    )  # fmt: skip


def _sizes(config: RunConfig) -> Sizes:
    return Sizes(config.worker.rollout.n, config.data.max_prompt_length, config.data.max_response_length)


def _bad_updates(engine: str, config: RunConfig, ranks: Ranks) -> BadUpdates:
    return BadUpdates(engine, config.trainer.max_bad_updates, ranks, run_directory(config) / "bad_batches")
