"""`python -m mmr1_ds.train config=FILE key=value ...`: check everything, then train.

Up to the call of `composition.run` nothing heavy is imported: a mistake is named, and a dry run done, in a second.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from mmr1_ds.config import RunConfig
from mmr1_ds.config_checks import check_config
from mmr1_ds.config_critic import trains_critic
from mmr1_ds.config_loading import load_config
from mmr1_ds.deadlines import EXIT_FAULT, CollectiveError
from mmr1_ds.deepspeed_config import DeepspeedConfigs, critic_deepspeed, reference_deepspeed, resolve_deepspeed
from mmr1_ds.distributed import leave
from mmr1_ds.errors import UserError
from mmr1_ds.extras import require
from mmr1_ds.launch_environment import LaunchEnvironment, launch_environment
from mmr1_ds.launch_guard import LaunchGuard
from mmr1_ds.logging import configure_logging, quiet_libraries
from mmr1_ds.plan import describe_plan
from mmr1_ds.preemption import Preempted, Preemption
from mmr1_ds.redaction import redacted, remember

logger = logging.getLogger("mmr1_ds.train")  # run with -m, __name__ is __main__

EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: saved, the same command goes on; launch/slurm.sbatch requeues on it
EXIT_INTERRUPTED = 130
_HEAD_START_SECONDS = 3  # of rank 0; the deepspeed launcher looks for ended processes once a second


def main(argv: Sequence[str]) -> int:
    """Run one rank. Returns: the exit code; 2 after a user's mistake, told in one line on stderr."""
    try:
        launch = launch_environment()
    except UserError as error:
        return _tell(error)
    guard = LaunchGuard() if launch.launcher == "environment" else None
    configure_logging(launch.rank == 0)
    try:
        prepared = _prepare(argv, launch)
    except UserError as error:
        # All ranks find the same mistake. Rank 0 tells; another that ended first would make the launcher kill it.
        if launch.rank > 0:
            time.sleep(_HEAD_START_SECONDS)
            return EXIT_USER_ERROR
        return _tell(error)
    if prepared is None:
        return 0
    quiet_libraries()
    if not gpu_is_here():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed guesses, with a warning
    from mmr1_ds import composition  # imports torch and DeepSpeed

    try:
        trainer = prepared[0].trainer
        if guard is not None:
            guard.patience_seconds = trainer.preemption_seconds
        preemption = Preemption(trainer.preemption_seconds, trainer.max_wall_seconds)
        with preemption.handled():
            composition.run(*prepared, launch, preemption)
    except UserError as error:
        # A mistake in the data may show on one rank alone; when it shows on rank 0 too, the launcher ends the others.
        if launch.rank > 0:
            time.sleep(_HEAD_START_SECONDS)
        return _tell(error, f" (rank {launch.rank})" if launch.rank > 0 else "")
    except CollectiveError:  # told already, by every rank
        return EXIT_FAULT
    except Preempted as stop:
        logger.warning("%s", stop)
        return EXIT_PREEMPTED
    except KeyboardInterrupt:
        logger.warning("interrupted")
        return EXIT_INTERRUPTED
    return 0


def _prepare(argv: Sequence[str], launch: LaunchEnvironment) -> tuple[RunConfig, DeepspeedConfigs] | None:
    """Check everything and log the plan. Returns: None after a dry run."""
    loaded = load_config(argv)
    config = loaded.config
    remember(asdict(config))
    if launch.rank == 0:
        for line in loaded.warnings:
            logger.warning("%s", line)
    world_size = launch.world_size
    if config.trainer.dry_run and launch.launcher == "none":
        world_size = config.trainer.nnodes * config.trainer.n_gpus_per_node
    plan = check_config(config, world_size)
    on_gpu = gpu_is_here()
    actor = resolve_deepspeed(config, world_size, on_gpu)
    reference = reference_deepspeed(config, actor, on_gpu)
    critic = critic_deepspeed(config, actor, world_size, on_gpu) if trains_critic(config) else None
    logger.info("%s", describe_plan(config, plan, actor, reference, critic, on_gpu))
    if config.trainer.dry_run:
        logger.info("dry run: everything checked, no model loaded")
        return None
    require("gpu", "torch", "deepspeed", "transformers", "accelerate", "datasets", purpose="training")
    return config, DeepspeedConfigs(actor, reference, critic)


def gpu_is_here(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this machine shows a GPU, without asking torch, which takes seconds to import."""
    if environ.get("DS_ACCELERATOR") == "cpu" or environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists() or Path("/dev/dxg").exists()


def _tell(error: UserError, rank: str = "") -> int:
    sys.stderr.write(f"mmr1-ds: error{rank}: {redacted(' '.join(str(error).split()))}\n")
    return EXIT_USER_ERROR


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
