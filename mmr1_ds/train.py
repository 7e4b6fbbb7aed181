"""`python -m mmr1_ds.train config=FILE key=value ...`: check everything, then train.

Up to the call of `composition.run` nothing heavy is imported: a mistake is named, and a dry run done, in a second.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace

from mmr1_ds.cluster.exits import EXIT_INTERRUPTED, EXIT_PREEMPTED, EXIT_USER_ERROR, leave, tell
from mmr1_ds.cluster.guard import SCRIPT, LaunchGuard
from mmr1_ds.cluster.launch import (
    LaunchEnvironment,
    gpu_is_here,
    launch_environment,
    long_imports,
    put_own_programs_on_path,
)
from mmr1_ds.cluster.preemption import Preempted, Preemption
from mmr1_ds.cluster.watch import CollectiveError, exit_code
from mmr1_ds.config import RunConfig
from mmr1_ds.config.derived import without_training
from mmr1_ds.config.loading import load_config
from mmr1_ds.config.ranges import value_at
from mmr1_ds.config.redaction import remember
from mmr1_ds.config.schema import names_a_file
from mmr1_ds.config.user_files import FUNCTION_KEYS
from mmr1_ds.errors import UserError, require
from mmr1_ds.monitoring.logger import configure_logging, quiet_libraries
from mmr1_ds.monitoring.trackers import check_trackers
from mmr1_ds.preflight.checks import check_config
from mmr1_ds.preflight.deepspeed import (
    DeepspeedConfigs,
    engines_on_gpus,
    own_deepspeed,
    resolve_engines,
    with_dropped_sections,
)
from mmr1_ds.preflight.installed import check_installed
from mmr1_ds.preflight.machine import MachineError, check_machine, use_own_nvcc
from mmr1_ds.preflight.plan import describe_plan
from mmr1_ds.preflight.reward import pays_nothing, try_reward

logger = logging.getLogger("mmr1_ds.train")  # run with -m, __name__ is __main__

_HEAD_START_SECONDS = 3  # of rank 0; the deepspeed launcher looks for ended processes once a second


def main(argv: Sequence[str]) -> int:
    """Run one rank. Returns: the exit code; 2 after a user's mistake, told in one line on stderr."""
    put_own_programs_on_path()
    try:
        launch = launch_environment()
    except UserError as error:
        return tell(error)
    guard = LaunchGuard() if launch.launcher == "environment" or SCRIPT in os.environ else None
    configure_logging(launch.rank == 0)
    try:
        prepared = _prepare(argv, launch)
    except UserError as error:
        # All ranks find the same mistake. Rank 0 tells; another that ended first would make the launcher kill it.
        # What a machine lacks is told by the first rank on it.
        if launch.rank > 0 and not (isinstance(error, MachineError) and launch.local_rank == 0):
            time.sleep(_HEAD_START_SECONDS)
            return EXIT_USER_ERROR
        return tell(error)
    if prepared is None:
        return 0
    quiet_libraries()
    if not gpu_is_here():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed guesses, with a warning
    with long_imports():
        from mmr1_ds.loop import composition  # imports torch and DeepSpeed

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
        return tell(error, f" (rank {launch.rank})" if launch.rank > 0 else "")
    except CollectiveError as error:  # told already, by every rank
        return exit_code(str(error))
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
    if config.trainer.val_only:
        config = without_training(config)
    remember(asdict(config))
    if launch.rank == 0:
        for line in loaded.warnings:
            logger.warning("%s", line)
    world_size = launch.world_size
    if config.trainer.dry_run and launch.launcher == "none":
        world_size = config.trainer.nnodes * config.trainer.n_gpus_per_node
    plan = check_config(config, world_size)
    on_gpu = gpu_is_here()
    configs = resolve_engines(config, world_size, on_gpu)
    elsewhere = engines_on_gpus(config, world_size) if config.trainer.dry_run and not on_gpu else None
    logger.info("%s", describe_plan(config, plan, configs, on_gpu, elsewhere))
    if on_gpu:
        use_own_nvcc()  # before torch is imported
        for line in check_machine(config, configs.actor):
            logger.warning("%s", line)
    if (own := own_deepspeed(config)) is not None:
        if not on_gpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed guesses, with a warning
        from mmr1_ds.loop.deepspeed_check import check_engines  # imports torch and DeepSpeed

        check_engines(replace(configs, actor=with_dropped_sections(config, configs.actor)), own)
    if importlib.util.find_spec("deepspeed") is not None:
        check_trackers(config.trainer.logger)
        check_installed(config)
    else:  # only a dry run is done here
        logger.warning("deepspeed is not installed here, so that other packages of the run are not looked for either")
    if config.trainer.dry_run:
        result = try_reward(config.worker.reward, config.data)
        prompt = None if "data.system_prompt" in loaded.given else config.data.system_prompt
        if result is not None and pays_nothing(result) and "\\boxed" in (prompt or ""):
            logger.warning(
                "the reward gives 0 to a right answer in the form that data.system_prompt asks for, which comes from a "
                "preset: set data.system_prompt=null, or to a text that asks for the form that the reward reads"
            )
        if any(names_a_file(value_at(config, key)) for key in FUNCTION_KEYS):
            from mmr1_ds.loop.own_functions import try_functions  # imports torch

            try_functions(config.worker.actor, config.algorithm)
        logger.info(
            "dry run: settings and columns checked, no model loaded; mmr1-ds data, with the same settings, checks the "
            "rows"
        )
        return None
    require("gpu", "torch", "deepspeed", "transformers", "accelerate", "datasets", purpose="training")
    return config, configs


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
