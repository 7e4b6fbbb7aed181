"""The composition root: builds the parts of a run in the order that fails cheapest first, runs, takes them down."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mmr1_ds.checkpoint import Checkpoints
from mmr1_ds.collect import Collector
from mmr1_ds.config import RunConfig
from mmr1_ds.config_checks import total_training_steps
from mmr1_ds.config_loading import dump_config
from mmr1_ds.curriculum.coordinator import Coordinator
from mmr1_ds.data.dataset import load_dataset
from mmr1_ds.data.encoding import PromptEncoder
from mmr1_ds.distributed import LaunchEnvironment, Ranks
from mmr1_ds.engine.actor import Actor, Reference
from mmr1_ds.errors import UserError
from mmr1_ds.logging import MetricsLogger
from mmr1_ds.plan import checkpoint_directory, run_directory
from mmr1_ds.rewards.pool import RewardPool
from mmr1_ds.rollout.base import RolloutEngine
from mmr1_ds.rollout.colocated import VllmRollout
from mmr1_ds.rollout.transformers_engine import TransformersRollout
from mmr1_ds.trainer import Parts, Trainer

logger = logging.getLogger(__name__)


def run(
    config: RunConfig,
    deepspeed_config: Mapping[str, Any],
    reference_config: Mapping[str, Any],
    launch: LaunchEnvironment,
) -> None:
    """Train, or validate only, as the config says. Every rank of the launch calls this.

    Raises: UserError for data, model or environment that cannot be used.
    """
    with ExitStack() as stack:
        rewards = stack.enter_context(RewardPool(config.worker.reward))  # starts before the models take the memory
        encoder = PromptEncoder(config.worker.actor.model, config.data)
        train_data = load_dataset(config.data.train_files, config.data, encoder)
        val_data = (
            load_dataset(config.data.val_files, config.data, encoder, "data.val_files")
            if config.data.val_files
            else None
        )
        num_steps = total_training_steps(config, len(train_data))
        run_dir = run_directory(config) / ("eval" if config.trainer.val_only else "")  # a run's own log stays as it is

        ranks = Ranks(launch, config.trainer.collective_timeout_seconds)
        stack.callback(ranks.close)
        if ranks.rank == 0:
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        ranks.barrier("make the run directory")
        if ranks.on_gpu != bool(deepspeed_config["bf16"]["enabled"]):
            raise UserError(
                f"torch.cuda.is_available() is {ranks.on_gpu}, unlike what /dev and CUDA_VISIBLE_DEVICES show; "
                "install a CUDA build of torch, or set DS_ACCELERATOR=cpu to train on the CPU"
            )
        checkpoints = Checkpoints(checkpoint_directory(config), config.trainer.save_limit, ranks)
        start = _starting_point(config, checkpoints)
        coordinator = Coordinator(config.data, len(train_data), train_data.prompt_ids, train_data.fingerprint, ranks)
        metrics_logger = stack.enter_context(
            MetricsLogger.open(
                config.trainer,
                run_dir,
                num_steps,
                start[0] if start else 0,
                dataclasses.asdict(config),
                is_main=ranks.rank == 0,
            )
        )

        updates = num_steps * config.worker.actor.ppo_epochs
        updates *= config.data.rollout_batch_size // config.worker.actor.global_batch_size
        if ranks.rank == 0:
            logger.info("loading %s on %d ranks", config.worker.actor.model.model_path, ranks.size)
        actor = Actor(config, deepspeed_config, ranks, encoder, updates)
        reference = None if config.algorithm.disable_kl else Reference(config, reference_config, ranks, encoder)
        rollout = _rollout(config, actor, ranks, encoder)
        stack.callback(rollout.close)

        parts = Parts(
            ranks=ranks,
            encoder=encoder,
            train_data=train_data,
            val_data=val_data,
            coordinator=coordinator,
            collector=Collector(rollout, rewards, encoder),
            rollout=rollout,
            actor=actor,
            reference=reference,
            checkpoints=checkpoints,
            metrics_logger=metrics_logger,
        )
        trainer = Trainer(config, parts, num_steps)
        if start is not None:
            trainer.resume(*start)
        trainer.fit()


def _starting_point(config: RunConfig, checkpoints: Checkpoints) -> tuple[int, Path] | None:
    """Step and folder to go on from: the run's own newest checkpoint, else the one that the user named."""
    found = checkpoints.newest() if config.trainer.resume else None
    if found is None and config.trainer.load_checkpoint_path:
        folder = Path(config.trainer.load_checkpoint_path)
        found = checkpoints.require(folder), folder
    if found is not None:
        checkpoints.check_ranks(found[1])
    return found


def _rollout(config: RunConfig, actor: Actor, ranks: Ranks, encoder: PromptEncoder) -> RolloutEngine:
    settings, model = config.worker.rollout, config.worker.actor.model
    has_vllm = importlib.util.find_spec("vllm") is not None
    if settings.engine == "vllm" and not has_vllm:
        raise UserError("worker.rollout.engine=vllm but vllm is not installed; install it or set engine=hf")
    if settings.engine == "hf" or not has_vllm:
        return TransformersRollout(
            actor, ranks, encoder, config.worker.actor.micro_batch_size_per_device_for_experience
        )
    return VllmRollout(settings, model, config.data, ranks, encoder)
