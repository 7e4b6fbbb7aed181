"""The critic's configuration with what it takes from the actor's filled in."""

from __future__ import annotations

import dataclasses

from mmr1_ds.config import CriticConfig, RunConfig

_SHARED = (
    "global_batch_size",
    "micro_batch_size_per_device_for_update",
    "micro_batch_size_per_device_for_experience",
    "padding_free",
    "dynamic_batching",
)


def trains_critic(config: RunConfig) -> bool:
    """Whether the run has a critic at all."""
    return config.algorithm.adv_estimator == "gae" and not config.trainer.val_only


def resolved_critic(config: RunConfig) -> CriticConfig:
    """worker.critic, nothing null that the actor decides: its batches, and its model where no other is named.

    The actor's model comes with the actor's override_config (the critic's own keys lie over it) and its permission to
    run code.
    """
    critic, actor = config.worker.critic, config.worker.actor
    shared = {name: getattr(actor if getattr(critic, name) is None else critic, name) for name in _SHARED}
    model = critic.model
    if model.model_path is None:
        model = dataclasses.replace(
            model,
            model_path=actor.model.model_path,
            override_config={**actor.model.override_config, **model.override_config},
            trust_remote_code=model.trust_remote_code or actor.model.trust_remote_code,
        )
    return dataclasses.replace(critic, **shared, model=model)
