"""Values that follow from the configuration: the critic's full section, the number of steps, the run's folders."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mmr1_ds.config.schema import CriticConfig, RunConfig

_SHARED = (
    "global_batch_size",
    "micro_batch_size_per_device_for_update",
    "micro_batch_size_per_device_for_experience",
    "padding_free",
    "attention",
    "dynamic_batching",
)


def trains_critic(config: RunConfig) -> bool:
    """Return whether the run has a critic."""
    return config.algorithm.adv_estimator == "gae" and not config.trainer.val_only


def resolved_critic(config: RunConfig) -> CriticConfig:
    """Fill in worker.critic what is null there and the actor decides: its batches, and its model.

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


def without_training(config: RunConfig) -> RunConfig:
    """Return the configuration of a validation alone: what only training reads is put where it asks for nothing.

    The validation data stand for the training data, from which no prompt is drawn.
    """
    data = dataclasses.replace(
        config.data, train_files=config.data.val_files, train_weights=[], sampling_strategy="sequential", shuffle=False
    )
    algorithm = dataclasses.replace(config.algorithm, disable_kl=True)
    return dataclasses.replace(config, data=data, algorithm=algorithm)


def prompt_features(config: RunConfig) -> str:
    """Return what else but categories tells prompts apart: none, text or model; none where nothing reads it."""
    data = config.data
    is_read = data.sampling_strategy == "curriculum" and data.curriculum_refresh == "online"
    return data.curriculum_features if is_read and not config.trainer.val_only else "none"


def total_training_steps(config: RunConfig, num_prompts: int) -> int:
    """Return the steps of the whole run: trainer.max_steps, or total_episodes times P // B, at least 1 an episode."""
    if config.trainer.max_steps is not None:
        return config.trainer.max_steps
    return config.trainer.total_episodes * max(1, num_prompts // config.data.rollout_batch_size)


def steps_between_saves(config: RunConfig, num_steps: int) -> int:
    """Return trainer.save_freq, without one a tenth of the run's steps: a fault never costs more than that."""
    every = config.trainer.save_freq
    return max(1, num_steps // 10) if every is None else every


def run_directory(config: RunConfig) -> Path:
    """Return the folder of the run: trainer.run_dir, or runs/<experiment_name>."""
    trainer = config.trainer
    return Path(trainer.run_dir) if trainer.run_dir else Path("runs") / trainer.experiment_name


def checkpoint_directory(config: RunConfig) -> Path:
    """Return the folder of the checkpoints: trainer.save_checkpoint_path, or checkpoints/ in the run directory."""
    path = config.trainer.save_checkpoint_path
    return Path(path) if path else run_directory(config) / "checkpoints"


def returns_experts(config: RunConfig) -> bool:
    """Whether the rollout engine says which experts of a mixture its tokens went to."""
    return config.worker.actor.router_replay.mode == "R3" and not config.trainer.val_only
